"""What a peer is asked to do: continue a batch of equal prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
