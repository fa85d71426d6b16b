"""How much text a recipe's sources hold, estimated from a sample: for a look before a run."""

from __future__ import annotations

from dataclasses import dataclass

from colada.data.sources import Source, identity, parts, read_texts
from colada.errors import ColadaError
from colada.locate import find_tokenizer, locate
from colada.text.tokenizer import Tokenizer
from colada.train.inputs import held_out
from colada.train.recipe import Recipe

_SAMPLE_BYTES = 2**22  # Read of a source, in parts from its beginning to its end.
_PART_BYTES = 2**20


@dataclass(frozen=True)
class Survey:
    """What a source holds of training text, about.

    Attributes:
        name: of the source.
        documents, tokens: how many; None for a data set of the hub, which is read when a run begins.
    """

    name: str
    documents: int | None
    tokens: int | None

    def __str__(self) -> str:
        if self.documents is None or self.tokens is None:
            return "on the hub, not read yet"
        return f"about {self.documents:,} documents, {self.tokens:,} tokens to train on"


def survey(recipe: Recipe) -> list[Survey]:
    """Look at the sources of a recipe; where it trains a tokenizer, one is trained on the sample.

    Raises:
        ColadaError: for sources that are not there or cannot be read, or hold too little text.
    """
    samples = [_sample(recipe, source) for source in recipe.data.sources]
    texts = [text for _, _, sample in samples for text in sample]
    tokenizer = None
    if recipe.tokenizer.file is not None:
        tokenizer = Tokenizer.from_file(recipe.tokenizer.file)
    elif recipe.model.init is not None:
        file = find_tokenizer(locate(recipe.model.init))
        tokenizer = None if file is None else Tokenizer.from_file(file)
    elif texts:
        try:
            tokenizer = Tokenizer.train(texts, recipe.tokenizer.vocab_size, fewer=True)
        except ColadaError:
            if all(share == 1 for _, share, _ in samples):
                raise  # The sample is all there is: the run would end here too.
    surveys = []
    for source, (name, share, sample) in zip(recipe.data.sources, samples, strict=True):
        if source.hub is not None:
            surveys.append(Survey(name, None, None))
            continue
        # Where no tokenizer can be had, as many as a large one makes of English.
        lengths = [len(tokenizer.encode(text)) if tokenizer else len(text) // 4 for text in sample]
        tokens = sum(lengths) + len(sample)
        surveys.append(Survey(name, round(len(sample) / share), round(tokens / share)))
    return surveys


def _sample(recipe: Recipe, source: Source) -> tuple[str, float, list[str]]:
    """Return a source's name, which share of it was read, and the training texts of that."""
    if source.hub is not None:
        identity(source)  # Whether it is there at all.
        return source.name, 1.0, []
    every = parts(source, _PART_BYTES)
    stride = max(1, len(every) * _PART_BYTES // _SAMPLE_BYTES)
    chosen = every[::stride]
    texts = list(read_texts(source, held_out(recipe, source), chosen))
    total = sum(part.size for part in every)
    return source.name, (sum(part.size for part in chosen) / total if total else 1.0), texts
