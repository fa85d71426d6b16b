"""How generated text reads to a judge, beside how varied it is, and the same of real text.

A model that repeats itself pleases any judge: perplexity alone says nothing, so what it is worth is a line
of perplexity over variety, which guidance moves a model along, and real text's own point beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from colada.checks import require_count
from colada.errors import ColadaError
from colada.evaluate import variety
from colada.evaluate.statistics import ratio_error
from colada.evaluate.texts import TRANSFORMERS, Text, check_lengths, require_tokenizer
from colada.generate.settings import Prompt, Settings, TextRequest
from colada.models.base import LanguageModel
from colada.models.bound import LikelihoodKind, TextScore
from colada.models.likelihood import kind, measure
from colada.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

NGRAMS = (1, 2, 3)

Progress = Callable[[int, int], None]


# --- judges ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """A text and the prompt before it, as text and as tokens; and where the prompt is from."""

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    origin: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], origin: str) -> Passage:
        """Return the passage that some tokens spell."""
        return cls(tokenizer.decode(prompt), tokenizer.decode(ids), tuple(prompt), tuple(ids), origin)


class Judge(Protocol):
    """Who says how likely a text is after its prompt.

    Attributes:
        origin: where it is from.
        kind: "exact", or "bound": perplexities are then upper bounds.
        settings: what its figures depend on besides.
    """

    origin: str
    kind: LikelihoodKind
    settings: dict[str, Any]

    def score(self, passages: Sequence[Passage], progress: Progress | None = None) -> list[TextScore]:
        """Return log p(text | prompt) of each passage in nats, and its tokens as the judge counts them."""


class ModelJudge:
    """A model of this package as judge, of any kind.

    With the tokenizer of the passages it reads their ids, else their text, prompt and text encoded apart.

    Args:
        model: the judge.
        tokenizer: of the passages' ids.
        settings: of :func:`~colada.models.likelihood.measure`.

    Raises:
        ColadaError: if it has no tokenizer.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, **settings: Any) -> None:
        reader = require_tokenizer(model, "it judges text")
        self.model, self.origin, self.kind, self.settings = model, model.origin, kind(model), settings
        self._same = reader.to_json() == tokenizer.to_json()

    def score(self, passages: Sequence[Passage], progress: Progress | None = None) -> list[TextScore]:
        """See :class:`Judge`."""
        pairs: list[tuple[Prompt, Prompt]] = [
            (passage.prompt_ids, passage.ids) if self._same else (passage.prompt, passage.text)
            for passage in passages
        ]
        contexts, texts = [prompt for prompt, _ in pairs], [text for _, text in pairs]
        return measure(self.model, texts, contexts, progress=progress, **self.settings)


class TransformersJudge:
    """A causal language model of the ``transformers`` library as judge.

    Args:
        where: directory or hub id.
        device: where to compute.

    Raises:
        ColadaError: without that library, or if the model cannot be loaded.
    """

    kind: LikelihoodKind = "exact"

    def __init__(self, where: str, device: torch.device) -> None:
        try:
            import transformers  # type: ignore[import-not-found, unused-ignore]
        except ModuleNotFoundError:
            name = TRANSFORMERS + where
            raise ColadaError(f"judge {name} needs transformers: pip install transformers") from None
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(where)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(where).to(device).eval()
        except (OSError, ValueError) as error:
            raise ColadaError(f"judge {TRANSFORMERS}{where} cannot be loaded ({error})") from None
        self.origin, self.device = TRANSFORMERS + where, device
        self.settings: dict[str, Any] = {"transformers": transformers.__version__}

    def score(self, passages: Sequence[Passage], progress: Progress | None = None) -> list[TextScore]:
        """See :class:`Judge`; a text without prompt follows the tokenizer's first token.

        Raises:
            ColadaError: if there is neither a prompt nor such a token.
        """
        import torch

        scores = []
        for passage in passages:
            prompt, ids = (
                list(self.tokenizer.encode(part, add_special_tokens=False))
                for part in (passage.prompt, passage.text)
            )
            if not prompt and self.tokenizer.bos_token_id is None:
                raise ColadaError(f"{self.origin} has no token to begin with: give the texts a prompt")
            before = prompt or [self.tokenizer.bos_token_id]
            with torch.inference_mode():
                logits = self.model(input_ids=torch.tensor([before + ids], device=self.device)).logits[0]
            spelled = logits[len(before) - 1 : -1].double().log_softmax(-1)
            expected = torch.tensor(ids, device=self.device)[:, None]
            value = spelled.gather(1, expected).sum().item()
            scores.append(TextScore(len(ids), len(passage.text.encode()), value, {}))
            if progress is not None:
                progress(len(scores), len(passages))
        return scores


# --- texts ----------------------------------------------------------------------------------------


def real_passages(
    tokenizer: Tokenizer, texts: Sequence[Text], prompt_tokens: int, new_tokens: int
) -> list[Passage]:
    """Return the beginnings of texts: so many tokens as prompt, 0 for none, and so many after them.

    Raises:
        ColadaError: for lengths out of bounds; if no text is long enough. Shorter ones are left out.
    """
    check_lengths(prompt_tokens, new_tokens)
    length = prompt_tokens + new_tokens
    long = [(text, ids) for text in texts if len(ids := tokenizer.encode(text.text)) >= length]
    if not long:
        raise ColadaError(f"none of {len(texts)} texts has the {length} tokens of prompt and continuation")
    return [
        Passage.of(tokenizer, ids[:prompt_tokens], ids[prompt_tokens:length], text.origin)
        for text, ids in long
    ]


def continue_passages(
    model: LanguageModel,
    tokenizer: Tokenizer,
    passages: Sequence[Passage],
    new_tokens: int,
    settings: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    samples: int = 1,
    batch: int = 16,
    progress: Progress | None = None,
) -> list[list[list[Passage]]]:
    """Return what a model writes after the prompts of passages, under each of several settings.

    Args:
        model: the writer. With another tokenizer it is given the prompts' texts.
        tokenizer: of the passages; what is written is counted in its tokens, so that models may be compared.
        passages: of which the prompts are continued.
        new_tokens: of each continuation, as the model counts.
        settings: of generation, over the model's own, one or several.
        seed: sample k of passage i has the seed ``seed + i + k * len(passages)``, under all settings.
        samples: of each prompt.
        batch: prompts continued together; changes no result.
        progress: called with how many texts are done, and of how many.

    Returns: for each settings and each sample, a passage a prompt; an empty one where nothing was written.

    Raises:
        ColadaError: naming the argument at fault; if under some settings nothing was written.
    """
    require_count("batch", batch)
    require_count("samples", samples)
    writer = require_tokenizer(model, "judges read text")
    same = writer.to_json() == tokenizer.to_json()
    prompts: list[Prompt] = [passage.prompt_ids if same else passage.prompt for passage in passages]
    seeds = range(seed, seed + samples * len(passages))
    requests = [
        TextRequest(prompts[number % len(prompts)], new_tokens, cast(Settings, {**one, "seed": own_seed}))
        for one in settings
        for number, own_seed in enumerate(seeds)
    ]
    texts = [
        Passage(passage.prompt, done.text, passage.prompt_ids, tuple(done.tokens), passage.origin)
        if same
        else Passage.of(tokenizer, passage.prompt_ids, tokenizer.encode(done.text), passage.origin)
        for done, passage in zip(
            model.generate(requests, batch=batch, progress=progress),
            [*passages] * samples * len(settings),
            strict=True,
        )
    ]
    rows = [texts[start : start + len(passages)] for start in range(0, len(texts), len(passages))]
    written = [rows[start : start + samples] for start in range(0, len(rows), samples)]
    for samples_of in written:
        if not any(passage.ids for row in samples_of for passage in row):
            raise ColadaError(
                f"{model.origin or 'the model'} ended every one of {len(passages)} texts at once"
            )
    return written


# --- figures --------------------------------------------------------------------------------------


def figures(
    samples: Sequence[Sequence[Passage]], scores: Sequence[TextScore], vocabulary: Collection[str] = ()
) -> dict[str, Any]:
    """Return perplexity under the judge, and the variety, of some passages, for JSON.

    ``perplexity`` is exp(-sum log p / judge's tokens), ``standard_error`` that over texts, None for one.
    Entropies, in bits a token, and distinct-n are of the passages' tokens: ``entropy`` is the mean of each
    text's own, ``entropy_together`` that of all texts' tokens, which is low too if texts are alike.
    ``repeated_words`` and ``known_words`` are shares of words, case and punctuation aside; ``overlap`` is
    :func:`~colada.evaluate.variety.overlap` of the samples of a prompt, None for a single one.

    Args:
        samples: a list of passages, one a prompt, for each sample; empty ones do not count.
        scores: of the passages that are not empty, in order.
        vocabulary: whose words are known.
    """
    passages = [passage for row in samples for passage in row if passage.ids]
    losses, sizes = [-score.log_likelihood for score in scores], [score.tokens for score in scores]
    rate, error = sum(losses) / sum(sizes), ratio_error(losses, sizes)
    sequences = [passage.ids for passage in passages]
    spoken = [variety.words(passage.text) for passage in passages]
    return {
        "perplexity": math.exp(rate),
        "standard_error": None if error is None else math.exp(rate) * error,
        "nats_per_token": rate,
        "entropy": sum(map(variety.entropy, sequences)) / len(sequences),
        "entropy_together": variety.entropy([token for ids in sequences for token in ids]),
        **{f"distinct_{n}": variety.distinct(sequences, n) for n in NGRAMS},
        "repeated_words": variety.repeated(spoken),
        "known_words": variety.known(spoken, vocabulary),
        "overlap": variety.overlap(
            [[passage.ids for passage in each if passage.ids] for each in zip(*samples, strict=True)]
        ),
        "texts": len(passages),
        "tokens": sum(map(len, sequences)),
        "judge_tokens": sum(sizes),
    }


def frontier(
    writers: Iterable[tuple[LanguageModel, Sequence[Mapping[str, Any]]]],
    real: Sequence[Passage],
    judge: Judge,
    tokenizer: Tokenizer,
    new_tokens: int,
    *,
    vocabulary: Collection[str] = (),
    seed: int = 0,
    samples: int = 1,
    batch: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return a judge's figures of what models write after the beginnings of texts, and of the texts.

    Args:
        writers: models, each with the settings that it writes under; one model is looked at after the other.
        real: of which the prompts are continued, see :func:`real_passages`.
        judge: of all.
        tokenizer: of ``real``.
        new_tokens, seed, samples, batch: see :func:`continue_passages`.
        vocabulary: see :func:`figures`.
        progress: called with how many texts are done, and of how many; of writing and of judging.

    Returns: for JSON: ``kind``; ``real``, its :func:`figures` and ``records``, a text each; and ``points``,
    for each model and settings ``model``, ``settings``, figures and records, ``empty`` and ``ended``, how
    many continuations are empty or end early, and ``real_distinct_2``: of real texts cut to the same lengths.

    Raises:
        ColadaError: as :func:`continue_passages` does.
    """

    def read(passages: Sequence[Sequence[Passage]]) -> dict[str, Any]:
        spoken = [passage for row in passages for passage in row if passage.ids]
        scores = judge.score(spoken, progress)
        records = [
            {
                "origin": passage.origin,
                "prompt": passage.prompt,
                "text": passage.text,
                "log_likelihood": score.log_likelihood,
            }
            for passage, score in zip(spoken, scores, strict=True)
        ]
        return {**figures(passages, scores, vocabulary), "records": records}

    points = []
    for model, settings in writers:
        written = continue_passages(
            *(model, tokenizer, real, new_tokens, settings),
            seed=seed,
            samples=samples,
            batch=batch,
            progress=progress,
        )
        for choice, passages in zip(settings, written, strict=True):
            lengths = [len(passage.ids) for row in passages for passage in row]
            cut = [passage.ids[:size] for passage, size in zip([*real] * samples, lengths, strict=True)]
            points.append(
                {
                    "model": model.origin,
                    "settings": model.chosen(choice),
                    **read(passages),
                    "empty": lengths.count(0),
                    "ended": sum(size < new_tokens for size in lengths),
                    "real_distinct_2": variety.distinct(cut, 2),
                }
            )
    return {"kind": judge.kind, "real": read([real]), "points": points}
