"""The latent prior as a flow over long texts: where it takes latents, and how likely it makes them.

A block moves under the finished blocks before it, whose keys and values are computed once and kept. So a
text is worked on a few blocks at a time, in memory that its length adds to only by those keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from colada.flow import PREDICTIONS, Solver, T, advance, memory
from colada.generate.engine.memory import Memory, Span, ViewRows
from colada.generate.engine.passes import Moment, PriorPass
from colada.generate.engine.transport import APPENDED_ROWS
from colada.networks.dit import DiT

Velocity = Callable[[Tensor, float], Tensor]
"""z (B, L, C) and a -> v (B, L, C), each block's depending on its own z only."""


@dataclass(frozen=True)
class Pins:
    """Latents that are given and stay as they are: where (B, L) bool, their values (B, L, C)."""

    where: Tensor
    values: Tensor

    @classmethod
    def none(cls, z: Tensor) -> Pins:
        """Return what pins none of the latents z (B, L, C)."""
        return cls(torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device), torch.zeros_like(z))

    @classmethod
    def first(cls, tails: Sequence[Tensor], length: int) -> Pins:
        """Return tails (n, C), each pinned at the beginning of ``length`` latents."""
        values = tails[0].new_zeros(len(tails), length, tails[0].shape[1])
        where = torch.zeros(len(tails), length, dtype=torch.bool, device=values.device)
        for row, tail in enumerate(tails):
            values[row, : len(tail)], where[row, : len(tail)] = tail, True
        return cls(where, values)

    def put(self, z: Tensor) -> Tensor:
        """Return z (B, L, C) with the pinned latents in their places."""
        return torch.where(self.where[..., None], self.values, z)

    def free_sum(self, values: Tensor) -> Tensor:
        """Return the sums of values (B, L, C) over the free latents, (B,)."""
        return values.masked_fill(self.where[..., None], 0.0).sum((1, 2))

    def part(self, start: int, end: int) -> Pins:
        """Return those of latents ``start`` to ``end``."""
        return Pins(self.where[:, start:end], self.values[:, start:end])


class Passes:
    """The DiT as it is computed here: fast to transport latents, and differentiable for divergences."""

    def __init__(self, dit: DiT) -> None:
        with torch.no_grad():
            self.dit, self.fast, self.differentiable = (
                dit,
                PriorPass(dit),
                PriorPass(dit, differentiable=True),
            )


class BlockFlow:
    """The flow of B texts of equal length, each block under the clean ones before it.

    Args:
        passes: of the DiT.
        rows: B.
        length: latents of each text, whole blocks; memory for their keys and values is made at once.
    """

    def __init__(self, passes: Passes, rows: int, length: int) -> None:
        config = passes.dit.config
        weight = passes.dit.txt_in.proj.weight
        self._passes, self._rows, self._config = passes, rows, config
        self._positions, self._size = length // config.patch_size, config.block_size // config.patch_size
        self._device = weight.device
        cells = rows * self._positions
        self._memory = Memory(
            config.num_layers, cells, config.heads, config.head_dim, weight.dtype, weight.device
        )

    def _spans(self, block: int) -> list[Span]:
        """Return what a block of each row sees, itself included."""
        starts = range(0, self._rows * self._positions, self._positions)
        return [Span(start, start + (block + 1) * self._size) for start in starts]

    @torch.no_grad()
    def append(self, latents: Tensor, start: int = 0) -> None:
        """Append clean latents (B, L, C), whole blocks, to the KV cache behind the first ``start``."""
        size = self._config.block_size
        each = max(1, APPENDED_ROWS // (size * self._rows)) * size
        forward = self._passes.fast
        clean = forward.modulation.rows([0.0])[0.0]
        for begin in range(0, latents.shape[1], each):
            part = latents[:, begin : begin + each]
            last = (start + begin + part.shape[1]) // size - 1
            spans = [Span(span.start, span.end, part.shape[1] // size) for span in self._spans(last)]
            plan = ViewRows(self._memory, spans, [], (), self._size)
            forward(part.flatten(0, 1), clean, plan, forward.rotations(plan.positions))

    @torch.no_grad()
    def finish(
        self,
        z: Tensor,
        grid: Sequence[float],
        solver: Solver,
        start: int = 0,
        pins: Pins | None = None,
        done: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return where the flow takes latents (B, L, C), each block under the finished ones before it.

        All but the last block are appended.

        Args:
            z: at the first value of the grid; they follow the ``start`` latents that are appended.
            grid: descending values of a, to 0.
            pins: latents that do not move; none by default.
            done: called after every block with its number among those of z, from 1.
        """
        size, pins = self._config.block_size, pins or Pins.none(z)
        forward, evaluations = self._passes.fast, solver(grid)
        finished: list[Tensor] = []
        for number, block in enumerate(z.split(size, 1)):
            block_pins = pins.part(number * size, (number + 1) * size)
            table = forward.modulation.rows({0.0, *(T * evaluation.a for evaluation in evaluations)})
            spans = self._spans(start // size + number)
            plan = ViewRows(self._memory, [], spans, (), self._size)
            turns = forward.rotations(plan.positions)
            pinned = bool(block_pins.where.any())
            velocities: list[Tensor] = []
            if finished:
                self.append(finished[-1], start + (number - 1) * size)
            for a, weights, _ in evaluations:
                block = block_pins.put(block) if pinned else block
                row = self._row(table, a, block_pins.where if pinned else None)
                output = forward(block.flatten(0, 1), row, plan, turns)
                velocities = [self._velocity_of(block, output, a), *velocities][: memory(evaluations)]
                block = advance(block, velocities, weights)
            finished.append(block_pins.put(block) if pinned else block)
            if done is not None:
                done(number + 1)
        return torch.cat(finished, 1)

    def _row(self, table: Mapping[Moment, int], a: float, where: Tensor | None) -> int | Tensor:
        """Return the modulation rows of a pass over latents at a, or at 0 where they are pinned."""
        if where is None:
            return table[T * a]
        patch = self._config.patch_size
        return torch.where(where[:, patch - 1 :: patch], table[0.0], table[T * a]).flatten()

    def _velocity_of(self, z: Tensor, output: Tensor, a: float) -> Tensor:
        """Return what the network's output (N, C) at z (B, L, C) says of the velocity."""
        at = torch.tensor(a, device=z.device)
        return PREDICTIONS[self._config.prediction].velocity(z.flatten(0, 1), output, at).view_as(z)

    def velocity(self, start: int, length: int, where: Tensor | None = None) -> Velocity:
        """Return v of the blocks of ``length`` latents from ``start`` on, all at once, differentiable.

        Every block sees the clean ones before it, which must be appended.

        Args:
            start, length: whole blocks.
            where: (B, length) bool, latents at timestep 0, whose velocity is 0; none by default.
        """
        patch, size, forward = self._config.patch_size, self._size, self._passes.differentiable
        first, count = start // patch, length // patch
        plan = _Blocks(self._memory, self._rows, first, count, size)
        positions = torch.arange(first, first + count, device=self._device).repeat(self._rows)
        turns = forward.rotations(positions)
        if where is not None and not bool(where.any()):
            where = None

        def velocity(z: Tensor, a: float) -> Tensor:
            with torch.no_grad():
                row = self._row(forward.modulation.rows({0.0, T * a}), a, where)
            v = self._velocity_of(z, forward(z.flatten(0, 1), row, plan, turns), a)
            return v if where is None else v.masked_fill(where[..., None], 0.0)

        return velocity


class _Blocks:
    """Rows of neighbouring noisy blocks, each of which sees the clean ones before it and itself.

    Nothing is written, and a mask of these blocks alone says who sees whom: what is before is seen by all.
    """

    def __init__(self, memory: Memory, rows: int, first: int, count: int, size: int) -> None:
        self.clean_rows = 0
        self._memory, self._rows, self._count = memory, rows, count
        self._seen = first + count - size  # The last block is clean to none.
        block = torch.arange(count, device=memory.keys.device) // size
        earlier = block[:, None] > block[None, : count - size]
        mask = torch.cat([earlier, block[:, None] == block[None, :]], 1)
        # One block sees all there is.
        self._mask = None if count == size else F.pad(mask, (first, 0), value=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, silent: int = 0) -> Tensor:
        """Attend: q, k, v (B * count, K, D) -> the same."""
        q, k, v = (x.unflatten(0, (self._rows, self._count)).transpose(1, 2) for x in (q, k, v))
        past = (
            x[layer].unflatten(0, (self._rows, -1))[:, : self._seen].transpose(1, 2)
            for x in (self._memory.keys, self._memory.values)
        )
        k, v = (torch.cat([old, new], 2) for old, new in zip(past, (k, v), strict=True))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask)
        return out.transpose(1, 2).flatten(0, 1)


# --- density -------------------------------------------------------------------------------------


def log_prior(
    velocity: Velocity,
    z: Tensor,
    probes: Tensor,
    steps: int,
    at: float,
    pins: Pins | None = None,
    done: Callable[[int], None] | None = None,
) -> Tensor:
    """Return log p(z), the density at a = ``at`` of the flow that starts at N(0, I), float64 (B,).

    Heun's method on a geometric grid: near the data, where the flow contracts, v changes like 1 / a.

    Args:
        velocity: of each block; 0 at pinned latents.
        z: (B, L, C).
        probes: (R, B, L, C), for the divergence, see :func:`divergence`.
        steps: of the solver.
        pins: latents that are given: the density is of the others; none by default.
        done: called after every step with its number, from 1.
    """
    pins = pins or Pins.none(z)
    # Along a pinned latent nothing is probed: its velocity is 0, but it acts on the others'.
    probes = probes.masked_fill(pins.where[..., None], 0.0)
    grid = [at ** (1 - step / steps) for step in range(steps + 1)]
    z, total = z.detach(), torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for number, (a, a_next) in enumerate(pairwise(grid), 1):
        slope, trace = divergence(velocity, z, a, probes)
        ahead, trace_ahead = divergence(velocity, z + (a_next - a) * slope, a_next, probes)
        z = z + 0.5 * (a_next - a) * (slope + ahead)
        total += 0.5 * (a_next - a) * (trace + trace_ahead).double()
        if done is not None:
            done(number)
    return total - pins.free_sum(0.5 * z.double() ** 2 + 0.5 * math.log(2 * math.pi))


def divergence(velocity: Velocity, z: Tensor, a: float, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Return v (B, L, C) and the sum over probes e of e . (dv / dz) e, (B,).

    With the unit vectors of a block, in all blocks at once, that is the exact trace, since a block's velocity
    depends on no other noisy block; with one vector of random signs, Hutchinson's estimate.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        v = velocity(z, a)
        trace = torch.zeros(len(z), device=z.device)
        for number, probe in enumerate(probes):
            (product,) = torch.autograd.grad(v, z, probe, retain_graph=number + 1 < len(probes))
            trace = trace + (product * probe).sum((1, 2))
    return v.detach(), trace
