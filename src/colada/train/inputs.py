"""A recipe's data: the tokenizer, the token shards of its sources, and the rows of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from colada.data.documents import Cut, Holdout, Split
from colada.data.rows import MixedRows, Rows, SampleRows, SingleRows, StreamRows
from colada.data.shards import prepare
from colada.data.sources import Source, hold_out, read_texts
from colada.data.stream import TokenStream
from colada.errors import ColadaError
from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.text.chat import ANSWERING, DEFAULT_TEMPLATE, PLAIN_TEMPLATE, encode_messages, read_template
from colada.text.tokenizer import IM_END, Tokenizer
from colada.train.kinds import JointSection, RolloutSection, StageSection, TextVAESection
from colada.train.pairs import cut_texts, open_pairs
from colada.train.recipe import Recipe, source_weights


@dataclass(frozen=True)
class Inputs:
    """The token streams of a recipe's sources, by split."""

    recipe: Recipe
    pad_id: int
    streams: Sequence[tuple[Source, dict[Split, TokenStream]]]

    def digests(self) -> list[tuple[str, str]]:
        """Return what tells this training data from other: each source's name and digest, in their order."""
        texts = [(f"text of {source.name}", streams["train"].digest) for source, streams in self.streams]
        splits = open_pairs(self.recipe)
        pictures = {} if splits is None else splits.digests
        return texts + [(f"set of pictures {name}", digest) for name, digest in pictures.items()]

    def validation_rows(
        self, section: StageSection, seed: int, block: int, say: Callable[[str], None]
    ) -> Rows | None:
        """Return the validation rows of a stage, or None, and say why, if there is too little text."""
        try:
            return self.rows("validation", section, seed, block)
        except ColadaError as error:
            say(f"validation is left out: {error}")
            return None

    def rows(self, split: Split, section: StageSection, seed: int, block: int) -> Rows:
        """Return the rows of a stage: of its sources by weight, those too short for validation left out.

        Whole samples are padded to multiples of ``block`` tokens.

        Raises:
            ColadaError: if there is too little text.
        """
        parts: list[tuple[Rows, float]] = []
        problem: ColadaError | None = None
        weights = source_weights(section, self.recipe.data.sources)
        for (source, streams), weight in zip(self.streams, weights, strict=True):
            if weight == 0:
                continue
            try:
                rows = self._rows(streams[split], section, seed, f"{source.name}: {split}", block)
            except ColadaError as error:
                if split == "train":
                    raise
                problem = error
                continue
            parts.append((rows, weight))
        if not parts:
            assert problem is not None
            raise problem
        return parts[0][0] if len(parts) == 1 else MixedRows(parts, seed)

    def _rows(self, stream: TokenStream, section: StageSection, seed: int, name: str, block: int) -> Rows:
        data, length = self.recipe.data, section.length
        if section.group is not None:
            room = section.new_tokens if isinstance(section, RolloutSection) else 1
            settings = {"seed": seed, "pad_id": self.pad_id, "group": section.group, "room": room}
            return SingleRows(stream, length, block, name=name, **settings)
        if data.packing == "samples":
            return SampleRows(stream, length, block, seed=seed, pad_id=self.pad_id, name=name)
        return StreamRows(stream, length, seed=seed, align=data.align, name=name)


def chat_template(recipe: Recipe, tokenizer: Tokenizer, start: LanguageModel | None) -> str | None:
    """Return the recipe's chat template, or that of the model to continue from; conversations have one.

    It is ChatML. Without tokens for that, or where a frozen Text VAE has never learnt them, roles are words.

    Raises:
        ColadaError: if the file cannot be read or is no template, or answers would end with what a frozen
            Text VAE does not spell, and so never.
    """
    template = start.chat_template if start is not None else None
    if recipe.data.chat_template is not None:
        template = read_template(Path(recipe.data.chat_template))
    if template is None and not recipe.data.chats:
        return None
    end = tokenizer.id_of(IM_END)
    if template is None and end is None:
        return PLAIN_TEMPLATE
    if not recipe.data.chats or not isinstance(start, ColaDLM) or _learns_tokens(recipe):
        return template or DEFAULT_TEMPLATE
    turns = [{"role": "user", "content": "a"}, {"role": ANSWERING, "content": "b"}]
    ((ids, _),) = encode_messages(turns, tokenizer, template or DEFAULT_TEMPLATE, "the chat template")
    # One that does not spell the end of a text either has learnt nothing yet.
    if _spells(start, ids[-1]) or not _spells(start, tokenizer.eos_id):
        return template or DEFAULT_TEMPLATE
    if template is None:
        return PLAIN_TEMPLATE
    end_text, eos_text = (
        repr(tokenizer.decode([token], skip_special=False)) for token in (ids[-1], tokenizer.eos_id)
    )
    raise ColadaError(
        f"the chat template ends answers with {end_text}, which the Text VAE of"
        f" model.init={recipe.model.init} does not spell: they would never end; give a data.chat_template"
        f" that ends them with {eos_text}"
    )


def _learns_tokens(recipe: Recipe) -> bool:
    return any(
        isinstance(section, TextVAESection | JointSection)
        for section in recipe.trained.values()
        if section.steps
    )


def _spells(model: ColaDLM, token: int) -> bool:
    """Return whether a Text VAE reads a token back from its latent."""
    ids = [token] * model.vae.config.patch_size
    return model.decode(model.encode(ids)) == ids


def held_out(recipe: Recipe, source: Source) -> Holdout:
    """Return what of a source is validation text: a share of its documents, or of pieces of them.

    Raises:
        ColadaError: for what cannot be read.
    """
    rows = max((section.length for section in recipe.trained.values()), default=1)
    return hold_out(source, recipe.data.validation_share, 8 * rows)  # A token has fewer characters than that.


def make_tokenizer(recipe: Recipe, start: LanguageModel | None, say: Callable[[str], None]) -> Tokenizer:
    """Return the recipe's tokenizer, that of the model to continue from, or a new one.

    Raises:
        ColadaError: for a file that is none, a model without one, or too little text.
    """
    if recipe.tokenizer.file is not None:
        return Tokenizer.from_file(Path(recipe.tokenizer.file))
    if start is not None:
        if start.tokenizer is None:
            raise ColadaError(f"model.init={recipe.model.init} has no tokenizer: give tokenizer.file")
        return start.tokenizer
    entries = recipe.tokenizer.vocab_size
    say(f"training a tokenizer of {entries} entries")
    tokenizer = train_tokenizer(recipe)
    if tokenizer.vocab_size < entries:
        say(f"the text is too little for {entries} entries: {tokenizer.vocab_size}")
    return tokenizer


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """Train the recipe's tokenizer on the training text of its sources, an equal share of each at most.

    Where the text is too little for as many entries as the recipe wants, there are as many as it yields.
    """
    share = recipe.tokenizer.characters // len(recipe.data.sources)

    def texts() -> Iterator[str]:
        for source in recipe.data.sources:
            room = share
            for text in read_texts(source, held_out(recipe, source)):
                yield text[:room]
                room -= len(text)
                if room <= 0:
                    break

    return Tokenizer.train(texts(), recipe.tokenizer.vocab_size, fewer=True)


def prepare_inputs(
    recipe: Recipe,
    tokenizer: Tokenizer,
    template: str | None,
    cache: Path,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> Inputs:
    """Tokenise what is not yet in ``cache``, and open the shards; say what of texts is left out.

    Raises:
        ColadaError: for unusable sources.
    """
    data = recipe.data
    streams = []
    for source in data.sources:
        validation = held_out(recipe, source)
        if isinstance(validation, Cut):
            say(f"{source.name}: few documents, or long ones: parts of them are the validation text")
        split_streams = prepare(
            source,
            cache,
            tokenizer,
            validation_share=validation,
            template=template,
            workers=data.workers,
            progress=progress,
            say=say,
        )
        for split, stream in split_streams.items():
            say(f"{source.name}: {split}: {len(stream):,} tokens in {len(stream.starts):,} samples")
        streams.append((source, split_streams))
    for line in cut_texts(recipe, tokenizer):
        say(line)
    return Inputs(recipe, tokenizer.pad_id, streams)
