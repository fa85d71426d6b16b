"""What a peer is asked to do: continue a batch of equal prompts; and a turn of one, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.machine import synchronise
from colada.errors import ColadaError


@dataclass(frozen=True)
class Job:
    """One generation of a whole batch.

    Attributes:
        batch: samples, all alike.
        context: tokens of the prompt.
        new_tokens: that each sample gets.
        steps: solver steps per block.
        guided: whether the guidance scale is other than 1.

    Raises:
        ColadaError: for numbers no generation can have.
    """

    batch: int
    context: int
    new_tokens: int
    steps: int = 16
    guided: bool = True

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("context", 0), ("new_tokens", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ColadaError(f"{name}={getattr(self, name)}, expected at least {least}")

    @property
    def tokens(self) -> int:
        """New tokens of the batch."""
        return self.batch * self.new_tokens


Prompts = Sequence[Sequence[int]]
Write = Callable[[int, Sequence[int]], None]
"""Takes the next ids of the sample with this number, as soon as they are there."""
Peer = Callable[[Prompts, Job, Write], None]
"""Continues every prompt by exactly ``job.new_tokens`` tokens."""


@dataclass(frozen=True)
class Turn:
    """One generation of a batch.

    Attributes:
        seconds: of all of it, prompts included.
        first: seconds until a sample had its first block's tokens.
        memory: greatest bytes that torch allocated on the GPU meanwhile; None on a CPU.
    """

    seconds: float
    first: float
    memory: int | None


def take_turn(peer: Peer, prompts: Prompts, job: Job, first_tokens: int, device: torch.device) -> Turn:
    """Let a peer generate, and time it.

    Args:
        first_tokens: of one sample, that count as its first block.

    Raises:
        ColadaError: if it did not generate what it was asked for.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    counts, first = [0] * job.batch, 0.0

    def write(index: int, ids: Sequence[int]) -> None:
        nonlocal first
        counts[index] += len(ids)
        if not first and counts[index] >= first_tokens:
            first = time.perf_counter() - begin

    synchronise(device)
    begin = time.perf_counter()
    peer(prompts, job, write)
    synchronise(device)
    seconds = time.perf_counter() - begin
    if counts != [job.new_tokens] * job.batch:
        raise ColadaError(f"{sum(counts)} tokens were generated, expected {job.tokens}")
    return Turn(seconds, first, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)
