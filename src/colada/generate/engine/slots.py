"""How far a request is, and where in the memory of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from colada.flow import Evaluation, evaluations_of
from colada.generate.reference import Block
from colada.generate.writer import Request, Slot


def latents_of(request: Request, patch: int, size: int) -> tuple[int, int, int]:
    """Return how many latents are the prefix, how many after it may be pinned, and the blocks to come.

    Args:
        patch, size: tokens in a latent, and latents in a block.
    """
    length = -(-len(request.ids) // patch)
    if request.draws:  # After all of the caption, padded to whole blocks.
        return -(-length // size) * size, 0, 1
    if request.picture is not None:  # What is before is the picture's and its prompt's, and not the text's.
        return 0, 0, -(-request.new_tokens // (patch * size))
    if request.hole is None:
        prefix = length // size * size
        # A padded latent at the prompt's end counts as the prompt's.
        end = length + -(-request.new_tokens // patch)
        return prefix, length - prefix, -(-(end - prefix) // size)
    start, end = request.hole
    prefix, last = start // size * size, -(-end // size) * size
    return prefix, min(last, length) - prefix, (last - prefix) // size


def room_of(request: Request, patch: int, size: int) -> int:
    """Return how many latents of history a request takes, whole blocks; arguments as :func:`latents_of`."""
    prefix, _, blocks = latents_of(request, patch, size)
    if request.draws:
        return -(-(prefix + request.draws) // size) * size
    blocks += request.settings.candidates - 1
    if request.picture is not None:
        prefix = -(-len(request.ids) // (patch * size)) * size + len(request.picture)
    return -(-prefix // size) * size + blocks * size


@dataclass(frozen=True)
class Begun:
    """A block in the middle of its transport.

    Attributes:
        done: how many evaluations are.
        latents: (K, block, C), where its candidates are.
        velocities: (K, block, C) each, the last ones (or guesses of z0), the newest first.
        guess: (K, block, C), the conditional guess of z0 before, where the DiT takes one.
    """

    done: int
    latents: Tensor
    velocities: Sequence[Tensor]
    guess: Tensor | None = None


@dataclass(eq=False, kw_only=True)
class LatentSlot(Slot):
    """A request under way in the engine.

    Attributes:
        start, length: its region of the memory, in latents.
        wanted: blocks to be generated.
        prefix: latents (P, C) of the prompt's whole blocks.
        where, pinned: bool (M,) and (M, C): which of the latents still to come are pinned, and to what.
        history, decoded: how many latents are in the DiT's and in the decoder's history.
        block: the last that was generated.
        begun: the coming block, where a round has ended in the middle of it.
        step: how many of its evaluations are done, in a round; those beyond its own change nothing.
        shown: positions of the DiT's history that are of a picture and its prompt; the decoder has none.
        shift: by how much later ones' rotary positions are beyond those in the memory.
    """

    start: int
    length: int
    wanted: int
    prefix: Tensor
    where: Tensor
    pinned: Tensor
    history: int = 0
    decoded: int = 0
    block: Block | None = None
    begun: Begun | None = None
    step: int = 0
    shown: int = 0
    shift: int = 0

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """All that a block takes."""
        own = self.request.settings
        return evaluations_of(own.solver, own.schedule, own.steps, own.early_end)

    @property
    def candidates(self) -> int:
        """How many times each block is drawn: K."""
        return self.request.settings.candidates

    @property
    def left(self) -> int:
        """How many evaluations the coming block still takes."""
        return len(self.evaluations) - (0 if self.begun is None else self.begun.done)

    @property
    def uncommitted(self) -> Tensor:
        """The finished latents (L, C) that the DiT's history lacks."""
        if self.block is None:
            return self.prefix[self.history - self.shown :]
        written = self.shown + len(self.prefix) + (self.blocks - 1) * len(self.block.latents)
        return self.block.latents[self.history - written :]

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self.error is not None or self.blocks == self.wanted

    def pinned_block(self, size: int) -> tuple[Tensor, Tensor]:
        """Return which latents of the coming block are pinned (size,), and to what (size, C)."""
        begin = self.blocks * size
        missing = max(0, begin + size - len(self.where))
        where = torch.cat([self.where, self.where.new_zeros(missing)])
        pinned = torch.cat([self.pinned, self.pinned.new_zeros(missing, self.pinned.shape[-1])])
        return where[begin : begin + size], pinned[begin : begin + size]
