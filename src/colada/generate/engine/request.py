"""What is asked of the engine, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from colada.checks import MOST_TOKENS, require_count
from colada.errors import ColadaError
from colada.flow import SCHEDULES, Solver
from colada.generate.reference import Block, Noise
from colada.generate.sampling import Sampling
from colada.generate.settings import check_settings


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        ids: the prompt.
        new_tokens: how many tokens are to follow it; blocks are generated whole.
        noise, seed: of its latents, by block, and of its token draws.
        guidance: scale s; 1 is off.
        interval: the values of a between which guidance acts, (0, 1) everywhere.
        steps: solver steps per block.
        solver, schedule: names in ``flow.SOLVERS`` and ``flow.SCHEDULES``.
        sampling: how tokens are picked.
        hole: latents (start, end) of ``ids`` to be generated, in place of what follows; the others
            of their blocks are pinned.
        confidence: blocks say how likely their tokens are.

    Raises:
        ColadaError: naming a setting out of range.
    """

    ids: tuple[int, ...]
    new_tokens: int
    noise: Noise
    seed: int = 0
    guidance: float = 7.0
    interval: tuple[float, float] = (0.0, 1.0)
    steps: int = 16
    solver: str = "euler"
    schedule: str = "uniform"
    sampling: Sampling = field(default_factory=Sampling)
    hole: tuple[int, int] | None = None
    confidence: bool = False

    def __post_init__(self) -> None:
        require_count("new_tokens", self.new_tokens, MOST_TOKENS)
        check_settings(
            {
                "steps": self.steps,
                "solver": self.solver,
                "schedule": self.schedule,
                "guidance": self.guidance,
                "guidance_interval": self.interval,
                "seed": self.seed,
            }
        )

    @property
    def grid(self) -> list[float]:
        """Descending values of a from 1 to 0, ``steps + 1`` of them."""
        values: list[float] = SCHEDULES[self.schedule](self.steps).tolist()
        return values

    def latents(self, patch: int, size: int) -> tuple[int, int, int]:
        """Return how many latents are the prefix, how many after it may be pinned, and the blocks to come.

        Args:
            patch, size: tokens in a latent, and latents in a block.
        """
        length = -(-len(self.ids) // patch)
        if self.hole is None:
            prefix = length // size * size
            # A padded latent at the prompt's end counts as the prompt's.
            end = length + -(-self.new_tokens // patch)
            return prefix, length - prefix, -(-(end - prefix) // size)
        start, end = self.hole
        prefix, last = start // size * size, -(-end // size) * size
        return prefix, min(last, length) - prefix, (last - prefix) // size

    def room(self, patch: int, size: int) -> int:
        """Return how many latents of history it takes; arguments as :meth:`latents`."""
        prefix, _, blocks = self.latents(patch, size)
        return prefix + blocks * size


@dataclass(frozen=True)
class Begun:
    """A block of which some solver steps are done: how many, its latents (block, C), and what goes on."""

    steps: int
    latents: Tensor
    solver: Solver


@dataclass(eq=False)
class Slot:
    """A request under way.

    Attributes:
        request: what was asked for.
        start, length: its region of the memory, in latents.
        prefix: latents (P, C) of the prompt's whole blocks.
        where, pinned: bool (M,) and (M, C): which of the latents still to come are pinned, and to what.
        history, decoded: how many latents are in the DiT's and in the decoder's history.
        blocks: number of blocks generated so far, of ``wanted``.
        seen: ids decoded in those blocks.
        block: the last of them.
        begun: the coming block, where a round has ended in the middle of it.
        error: why it failed; nothing more comes.
    """

    request: Request
    start: int
    length: int
    wanted: int
    prefix: Tensor
    where: Tensor
    pinned: Tensor
    history: int = 0
    decoded: int = 0
    blocks: int = 0
    seen: set[int] = field(default_factory=set)
    block: Block | None = None
    begun: Begun | None = None
    error: ColadaError | None = None

    @property
    def pace(self) -> tuple[int, str, str, int]:
        """What slots share that take equal solver steps, those with most left first."""
        return -self.left, self.request.solver, self.request.schedule, self.request.steps

    @property
    def left(self) -> int:
        """How many solver steps the coming block still takes."""
        return self.request.steps - (0 if self.begun is None else self.begun.steps)

    @property
    def uncommitted(self) -> Tensor:
        """The finished latents (L, C) that the DiT's history lacks."""
        if self.block is None:
            return self.prefix[self.history :]
        written = len(self.prefix) + (self.blocks - 1) * len(self.block.latents)
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
