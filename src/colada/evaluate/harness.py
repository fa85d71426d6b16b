"""Models of this package in the lm-evaluation-harness (extra ``eval``), registered there as "colada".

A text and what it follows are parted where the harness parts them: white space at the end of the context
belongs to the continuation. Both are encoded as one text and cut where the context's own tokens end; where
a token would reach over that place, each is encoded alone, so that every character is counted once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from colada.checks import require_count
from colada.errors import ColadaError
from colada.evaluate.texts import require_tokenizer
from colada.generate.settings import Settings, TextRequest, check_settings
from colada.models.base import LanguageModel
from colada.models.likelihood import bound_settings, kind, measure
from colada.models.load import load
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Completion
from colada.train.provenance import provenance

NEW_TOKENS = 256
"""Of a request that names no number, as elsewhere in the harness."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # The first one counts.


class HarnessRequest(Protocol):
    """What the harness asks: its ``Instance``."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Context and continuation, a text, or context and generation arguments."""


@register_model("colada")
class HarnessLM(LM):  # type: ignore[misc]
    """A model as the harness asks it.

    Results depend on the request alone, not on its place or the batch. Where the model has only a bound on
    its likelihood, that is what is returned as log-likelihood, so perplexities are upper bounds.

    Args:
        model: a model, or where to load one from, see :func:`colada.load`; the bundled one if left out.
        revision, dtype, device: of loading, as on the command line.
        batch_size: requests computed together; changes no result.
        samples, at, flow_steps: of the bound, see :func:`~colada.models.likelihood.bound_settings`.
        seed: every request has a seed of its own, made of this one and of what it asks.
        max_length: tokens of context and continuation together. Contexts lose their beginning; a longer text
            is measured in windows of half as many tokens, each after the one before. None: no limit.
        settings: of generation, over the model's own, see :class:`~colada.generate.settings.Settings`.

    Raises:
        ColadaError: naming the argument at fault; for a model without a tokenizer.
    """

    def __init__(
        self,
        model: LanguageModel | str | None = None,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        samples: int | None = None,
        at: float | None = None,
        flow_steps: int | None = None,
        seed: int = 0,
        max_length: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise ColadaError(f"max_batch_size={max_batch_size}: there is no search for a batch size")
        # The harness's command line has it as a string, which may say "auto".
        size = int(batch_size) if isinstance(batch_size, str) and batch_size.isdigit() else batch_size
        require_count("batch_size", size)
        if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
            raise ColadaError(f"max_length={max_length!r}, expected a whole number of at least 2")
        for name in ("stop", "end_ids"):
            if name in settings:
                raise ColadaError(f"{name}={settings[name]!r}: the tasks say where a text ends")
        check_settings(settings)
        if not isinstance(model, LanguageModel):
            torch_dtype: Any = None if dtype is None else getattr(torch, dtype, dtype)
            model = load(model, revision=revision, device=device, dtype=torch_dtype)
        self.model = model
        self.encoding = require_tokenizer(self.model, "tasks are text")
        self.batch_size, self.seed, self.max_length, self.settings = int(size), seed, max_length, settings
        self.model.check(settings)
        self._bound = bound_settings(self.model, samples=samples, at=at, steps=flow_steps)
        self._device = self.model.device

    # --- likelihood ------------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[HarnessRequest], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) of every request, or its bound, and whether it is greedy.

        It is greedy if the model, asked for as many tokens at temperature 0, writes just these. That is
        generation as the model's settings have it, guidance and all; the likelihood is without guidance.
        A continuation without tokens has likelihood 1.
        """
        pairs = [split_pair(self.encoding, *request.args) for request in requests]
        pairs = [(self._cut(context, len(text)), text) for context, text in pairs]
        seeds = [self._seed("loglikelihood", *request.args) for request in requests]
        numbers = [number for number, (_, text) in enumerate(pairs) if text]
        measured = [pairs[number] for number in numbers]
        scored = zip(
            self._measure(measured, [seeds[number] for number in numbers]),
            self._greedy(measured),
            strict=True,
        )
        result_of = dict(zip(numbers, scored, strict=True))
        results = [result_of.get(number, (0.0, True)) for number in range(len(requests))]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[HarnessRequest], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p(text) of every request, or its bound; of a text without tokens 0."""
        windows, seeds, owners = [], [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for at, window in enumerate(self._windows(self.encoding.encode(text))):
                windows.append(window)
                seeds.append(self._seed("loglikelihood_rolling", text, at))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, value in zip(owners, self._measure(windows, seeds), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Return whether each text is what is written greedily after its context: once a context.

        What a LLaDA model writes first depends on how many masks follow: once a context and length there.
        """
        masks = self.model.arch == "llada"
        keys = [(tuple(context), len(text) if masks else 0) for context, text in pairs]
        lengths: dict[tuple[tuple[int, ...], int], int] = {}
        for key, (_, text) in zip(keys, pairs, strict=True):
            lengths[key] = max(len(text), lengths.get(key, 0))
        fixed = {**self.settings, "temperature": 0.0, "stop": (), "end_ids": ()}
        completions = self._complete(
            [
                (context, length, {**fixed, "seed": self._seed("greedy", context)})
                for (context, _), length in lengths.items()
            ]
        )
        written = {key: done.tokens for key, done in zip(lengths, completions, strict=True)}
        return [written[key][: len(text)] == tuple(text) for key, (_, text) in zip(keys, pairs, strict=True)]

    def _complete(self, contexts: Sequence[tuple[Sequence[int], int, dict[str, Any]]]) -> list[Completion]:
        """Return the completions of contexts, each with a number of tokens and settings."""
        requests = [TextRequest(ids, length, cast(Settings, settings)) for ids, length, settings in contexts]
        return self.model.generate(requests, batch=self.batch_size)

    def _measure(self, pairs: Sequence[tuple[list[int], list[int]]], seeds: Sequence[int]) -> list[float]:
        if not pairs:
            return []
        texts, contexts = [text for _, text in pairs], [context for context, _ in pairs]
        scores = measure(self.model, texts, contexts, seed=seeds, batch=self.batch_size, **self._bound)
        return [score.log_likelihood for score in scores]

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return what is measured of a text, each part with what it follows."""
        if not ids:
            return []
        if self.max_length is None or len(ids) <= self.max_length:
            return [([], ids)]
        size = self.max_length // 2
        return [
            (ids[max(0, start - size) : start], ids[start : start + size])
            for start in range(0, len(ids), size)
        ]

    def _cut(self, context: list[int], new: int) -> list[int]:
        """Return the end of a context that leaves room for so many tokens."""
        if self.max_length is None:
            return context
        if new > self.max_length:
            raise ColadaError(
                f"{new} tokens to follow a context, expected at most max_length={self.max_length}"
            )
        return context[max(0, len(context) + new - self.max_length) :]

    # --- generation ------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[HarnessRequest], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after every context, up to the first of the ``until`` strings.

        Greedily, unless ``do_sample`` or a temperature says otherwise. Besides the harness's own arguments,
        generation settings of the model may be given; others are refused by name.
        """
        asked = [self._asked(request.args[1]) for request in requests]
        repeats: Counter[str] = Counter()
        seeds = []
        for request in requests:
            # A request that is there again is another sample.
            key = json.dumps(request.args, sort_keys=True, default=str)
            seeds.append(self._seed("generate_until", key, repeats[key]))
            repeats[key] += 1
        completions = self._complete(
            [
                (self._cut(self.encoding.encode(request.args[0]), length), length, {**settings, "seed": seed})
                for request, (length, settings), seed in zip(requests, asked, seeds, strict=True)
            ]
        )
        for request, completion in zip(requests, completions, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return [completion.text for completion in completions]

    def _asked(self, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return number of tokens and settings that a request's generation arguments stand for."""
        rest = dict(arguments)
        lengths = [rest.pop(name) for name in _LENGTHS if name in rest]
        length = next((length for length in lengths if length is not None), NEW_TOKENS)
        require_count("max_gen_toks", length)
        until = rest.pop("until", None) or []
        sampled = rest.pop("do_sample", None)
        if sampled is None:
            sampled = bool(rest.get("temperature"))
        if not isinstance(sampled, bool):
            raise ColadaError(f"do_sample={sampled!r}, expected true or false")
        for name in ("stop", "end_ids", "seed"):
            if name in rest:
                raise ColadaError(
                    f"generation argument {name!r}: expected 'until' for where a text ends, and"
                    " the model's seed= for its randomness"
                )
        check_settings(rest, "generation arguments")
        settings = {**self.settings, **rest, "stop": [until] if isinstance(until, str) else list(until)}
        if not sampled:
            settings["temperature"] = 0.0
        elif not settings.get("temperature"):
            raise ColadaError(f"do_sample with temperature={settings.get('temperature')!r}, expected above 0")
        return length, settings

    # --- what the harness wants to know ------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's caches."""
        return hashlib.sha256(self.encoding.to_json().encode()).hexdigest()[:16]

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness's results say about the model."""
        return {
            "model_source": self.model.origin,
            "likelihood": {"kind": kind(self.model), **self._bound},
            "settings": self.model.chosen(self.settings),
            "seed": self.seed,
            "max_length": self.max_length,
            "made_with": provenance(self.model.device),
        }

    def _seed(self, *what: Any) -> int:
        """Return the seed of a request: the same wherever it stands, and in any batch."""
        digest = hashlib.sha256(json.dumps([self.seed, *what]).encode()).digest()
        return int.from_bytes(digest[:4], "big")


def split_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and of what follows it, see the module."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, tokenizer.encode(continuation)


def run_harness(arguments: Sequence[str]) -> None:
    """Run the harness's own command line, with this model known to it.

    Without a file of settings (``--config``), the model is this one and the device the CPU unless named.

    Raises:
        SystemExit: as the harness's command does.
    """
    named = {argument.partition("=")[0] for argument in arguments}
    defaults = []
    if not named & {"--config", "-C"}:
        defaults += [] if named & {"--model", "-M"} else ["--model", "colada"]
        defaults += [] if "--device" in named else ["--device", "cpu"]  # The harness's own is a GPU.
    arguments_before, sys.argv = sys.argv, ["lm-eval", "run", *defaults, *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = arguments_before
