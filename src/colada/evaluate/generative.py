"""How generated text reads to a judge, beside how varied it is, and the same of real text.

A model that repeats itself pleases any judge: perplexity alone says nothing, so entropy and distinct-n
stand next to it, and both next to those of real text that follows the same prompts for as many tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from colada.checks import require_count
from colada.errors import ColadaError
from colada.evaluate.statistics import ratio_error
from colada.evaluate.texts import Text, check_lengths
from colada.generate.settings import Prompt, Settings, TextRequest
from colada.models.base import LanguageModel
from colada.models.bound import Kind, TextScore
from colada.models.likelihood import kind, measure
from colada.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

NGRAMS = (1, 2, 3)
TRANSFORMERS = "hf:"
"""What the name of a judge from ``transformers`` begins with."""

Progress = Callable[[int, int], None]


# --- variety --------------------------------------------------------------------------------------


def entropy(sequence: Iterable[Hashable]) -> float:
    """Return the entropy of a sequence's unigrams in bits, of the shares as counted; 0 of an empty one."""
    counts = Counter(sequence)
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())


def distinct(sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """Return the share of different n-grams among all n-grams within sequences; 0 if there are none."""
    grams = [tuple(own[at : at + n]) for own in sequences for at in range(len(own) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


# --- judges ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """A text and the prompt before it, as text and as the writer's tokens."""

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


class Judge(Protocol):
    """Who says how likely a text is after its prompt.

    Attributes:
        origin: where it is from.
        kind: "exact", or "bound": perplexities are then upper bounds.
        settings: what its figures depend on besides.
    """

    origin: str
    kind: Kind
    settings: dict[str, Any]

    def score(self, passages: Sequence[Passage], progress: Progress | None = None) -> list[TextScore]:
        """Return log p(text | prompt) of each passage in nats, and its tokens as the judge counts them."""


class ModelJudge:
    """A model of this package as judge, of any kind.

    With the writer's own tokenizer it reads the writer's tokens, else their text, prompt and text encoded
    apart.

    Args:
        model: the judge.
        writer: the tokenizer of the passages.
        settings: of :func:`~colada.models.likelihood.measure`.

    Raises:
        ColadaError: if it has no tokenizer.
    """

    def __init__(self, model: LanguageModel, writer: Tokenizer, **settings: Any) -> None:
        if model.tokenizer is None:
            raise ColadaError(f"{model.origin or 'the judge'} has no tokenizer.json, and judges text")
        self.model, self.origin, self.kind, self.settings = model, model.origin, kind(model), settings
        self._same = model.tokenizer.to_json() == writer.to_json()

    def score(self, passages: Sequence[Passage], progress: Progress | None = None) -> list[TextScore]:
        """See :class:`Judge`."""
        pairs: list[tuple[Prompt, Prompt]] = [
            (own.prompt_ids, own.ids) if self._same else (own.prompt, own.text) for own in passages
        ]
        given, texts = [prompt for prompt, _ in pairs], [text for _, text in pairs]
        return measure(self.model, texts, given, progress=progress, **self.settings)


class TransformersJudge:
    """A causal language model of the ``transformers`` library as judge.

    Args:
        where: directory or hub id.
        device: where to compute.

    Raises:
        ColadaError: without that library, or if the model cannot be loaded.
    """

    kind: Kind = "exact"

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


# --- figures --------------------------------------------------------------------------------------


def figures(passages: Sequence[Passage], scores: Sequence[TextScore]) -> dict[str, Any]:
    """Return perplexity under the judge, entropy and distinct-n of some passages, for JSON.

    ``perplexity`` is exp(-sum log p / judge's tokens), ``standard_error`` that over texts, None for one.
    Entropies, in bits a token, and distinct-n are of the writer's tokens: ``entropy`` is the mean of each
    text's own, ``entropy_together`` that of all texts' tokens, which is low too if texts are alike.
    """
    losses, sizes = [-score.log_likelihood for score in scores], [score.tokens for score in scores]
    rate, error = sum(losses) / sum(sizes), ratio_error(losses, sizes)
    sequences = [passage.ids for passage in passages]
    everything = [token for own in sequences for token in own]
    return {
        "perplexity": math.exp(rate),
        "standard_error": None if error is None else math.exp(rate) * error,
        "nats_per_token": rate,
        "entropy": sum(map(entropy, sequences)) / len(sequences),
        "entropy_together": entropy(everything),
        **{f"distinct_{n}": distinct(sequences, n) for n in NGRAMS},
        "texts": len(passages),
        "tokens": len(everything),
        "judge_tokens": sum(sizes),
    }


def read_generated(
    model: LanguageModel,
    texts: Sequence[Text],
    judge: Judge,
    *,
    prompt_tokens: int,
    new_tokens: int,
    seed: int = 0,
    batch: int = 16,
    writing: Progress | None = None,
    judging: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Return a judge's figures of what a model writes after the beginnings of texts, and of the texts.

    Of each text, ``prompt_tokens`` are the prompt (0: none) and the ``new_tokens`` after them are real text;
    shorter ones are left out. Where the model ends its text early, the real one is cut to as many tokens;
    where it writes nothing, neither counts.

    Args:
        model: the writer.
        texts: real ones.
        judge: of both.
        seed: the i-th text used has seed + i.
        batch: prompts continued together; changes no result.
        writing, judging: called with how many texts are done, and of how many; judging of both kinds.
        settings: of ``model.generate``, over the model's own.

    Returns: for JSON: ``kind``, ``generated`` and ``real`` (see :func:`figures`), ``left_out``, ``empty`` and
    ``ended``, how many texts were too short, were given no continuation, and one that ended early, and
    ``records``, a text each.

    Raises:
        ColadaError: naming the argument at fault; if no text is long enough, or nothing was written.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ColadaError(f"{model.origin or 'this model'} has no tokenizer.json, and judges read text")
    check_lengths(prompt_tokens, new_tokens)
    require_count("batch", batch)
    length = prompt_tokens + new_tokens
    long = [(text, ids) for text in texts if len(ids := tokenizer.encode(text.text)) >= length]
    if not long:
        raise ColadaError(f"none of {len(texts)} texts has the {length} tokens of prompt and continuation")
    requests = [
        TextRequest(ids[:prompt_tokens], new_tokens, cast(Settings, {**settings, "seed": seed + number}))
        for number, (_, ids) in enumerate(long)
    ]
    written = [done.tokens for done in model.complete_all(requests, batch, writing)]
    pairs = [
        (
            text.origin,
            _passage(tokenizer, ids[:prompt_tokens], own),
            _passage(tokenizer, ids[:prompt_tokens], ids[prompt_tokens : prompt_tokens + len(own)]),
        )
        for (text, ids), own in zip(long, written, strict=True)
        if own
    ]
    if not pairs:
        raise ColadaError(f"{model.origin or 'the model'} ended every one of {len(long)} texts at once")
    generated, real = [passage for _, passage, _ in pairs], [passage for _, _, passage in pairs]
    scores = judge.score([*generated, *real], judging)
    ours, theirs = scores[: len(pairs)], scores[len(pairs) :]
    return {
        "kind": judge.kind,
        "generated": figures(generated, ours),
        "real": figures(real, theirs),
        "left_out": len(texts) - len(long),
        "empty": len(long) - len(pairs),
        "ended": sum(len(own) < new_tokens for own in written),
        "records": [
            {
                "origin": origin,
                "prompt": own.prompt,
                "generated": own.text,
                "real": other.text,
                "log_likelihood": score.log_likelihood,
                "real_log_likelihood": other_score.log_likelihood,
            }
            for (origin, own, other), score, other_score in zip(pairs, ours, theirs, strict=True)
        ],
    }


def _passage(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> Passage:
    return Passage(tokenizer.decode(prompt), tokenizer.decode(ids), tuple(prompt), tuple(ids))
