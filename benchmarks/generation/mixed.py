"""Continuous batching on requests of mixed lengths, against the ideal of slots that are always full."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.generation.contestants import fixed_settings
from benchmarks.generation.machine import synchronise
from benchmarks.generation.run import Spread
from colada.errors import ColadaError
from colada.generate.settings import TextRequest
from colada.models.cola import ColaDLM


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens are to follow it."""

    ids: tuple[int, ...]
    new_tokens: int


Serve = Callable[[Sequence[Request], int], int]
"""Runs all requests, at most so many at once, and returns how many new tokens there were."""


@dataclass(frozen=True)
class Mixed:
    """What serving requests of mixed lengths took.

    Attributes:
        requests, slots: how many, and how many at once.
        tokens: new ones, of all requests.
        seconds: of each turn.
        ideal: seconds of each turn if slots had always been full: the tokens at the rate of a full batch
            of requests of average length, measured just before.
        share: ideal / seconds.
    """

    requests: int
    slots: int
    tokens: int
    seconds: Spread
    ideal: Spread
    share: Spread


def mixed_requests(count: int, context: int, new_tokens: int, vocab_size: int, seed: int) -> list[Request]:
    """Draw requests whose lengths are uniform between half and one and a half times those given.

    Raises:
        ColadaError: if there is no request, or nothing to generate.
    """
    if count < 1 or new_tokens < 1:
        raise ColadaError(f"{count} requests of {new_tokens} tokens, expected at least one of each")
    generator = torch.Generator().manual_seed(seed)

    def lengths(mean: int, least: int) -> list[int]:
        low = max(least, mean - mean // 2)
        return torch.randint(low, mean + mean // 2 + 1, (count,), generator=generator).tolist()

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (length,), generator=generator).tolist())

    drawn = zip(lengths(context, 0), lengths(new_tokens, 1), strict=True)
    return [Request(ids(length), new) for length, new in drawn]


def full_batch(requests: Sequence[Request], slots: int, vocab_size: int, seed: int) -> list[Request]:
    """Return requests of the average lengths, one for each slot, of random ids."""
    context = round(sum(len(request.ids) for request in requests) / len(requests))
    new_tokens = max(1, round(sum(request.new_tokens for request in requests) / len(requests)))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (slots, context), generator=generator).tolist()
    return [Request(tuple(own), new_tokens) for own in ids]


def measure_mixed(
    serve: Serve,
    requests: Sequence[Request],
    slots: int,
    device: torch.device,
    *,
    vocab_size: int,
    repeats: int,
    warm_up: int,
    seed: int = 0,
) -> Mixed:
    """Serve a full batch and the mixed requests in turns, and compare their rates.

    Raises:
        ColadaError: if ``serve`` generates another number of tokens than it was asked for.
    """
    full = full_batch(requests, slots, vocab_size, seed)
    tokens = sum(request.new_tokens for request in requests)
    seconds, ideal = [], []
    for number in range(warm_up + repeats):
        alone, mixed = (_timed(serve, batch, slots, device) for batch in (full, requests))
        if number >= warm_up:
            seconds.append(mixed)
            ideal.append(alone * tokens / sum(request.new_tokens for request in full))
    shares = [best / took for best, took in zip(ideal, seconds, strict=True)]
    return Mixed(len(requests), slots, tokens, Spread.of(seconds), Spread.of(ideal), Spread.of(shares))


def _timed(serve: Serve, requests: Sequence[Request], slots: int, device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    tokens = serve(requests, slots)
    synchronise(device)
    seconds = time.perf_counter() - begin
    expected = sum(request.new_tokens for request in requests)
    if tokens != expected:
        raise ColadaError(f"{tokens} tokens were generated, expected {expected}")
    return seconds


def engine_serve(model: ColaDLM, steps: int, guidance: float, seed: int) -> Serve:
    """Return continuous batching by :meth:`ColaDLM.complete_all`, in so many slots at once."""

    def serve(requests: Sequence[Request], slots: int) -> int:
        asked = [
            TextRequest(own.ids, own.new_tokens, fixed_settings(steps, guidance, seed + number))
            for number, own in enumerate(requests)
        ]
        return sum(len(own.tokens) for own in model.complete_all(asked, slots))

    return serve
