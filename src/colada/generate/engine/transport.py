"""The transport of one block of many requests: what every solver step needs is prepared, then it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colada.flow import SOLVERS, Solver, T, velocity_from_z0
from colada.generate.engine.graphs import Graphs
from colada.generate.engine.memory import (
    Memory,
    PaddedPlan,
    Piece,
    Plan,
    Span,
    doubled_to,
    in_parts,
    on_device,
    pieces,
    round_up,
)
from colada.generate.engine.passes import PriorPass
from colada.generate.engine.slots import Begun, LatentSlot
from colada.networks.dit import DiT

COMMITTED_ROWS = 512
"""The most latents of a pass that are committed, alone or with the first solver step of a block."""

SHORTEST_ROUND = 4
"""The fewest solver steps of a round, as what is prepared for it takes time too."""

LONGEST_ROUND = 63
"""The most solver steps of a round, as what is prepared for it takes memory."""


def round_steps(slots: Sequence[LatentSlot]) -> int:
    """Return how many solver steps some slots take together before those whose blocks end have their tokens.

    One whose block ends before waits for the others: the sum of all waiting, each by its own length, is
    the least; of equal sums the longer round. Very long grids are several rounds of equal length.
    """

    def length(left: int) -> int:
        return max(SHORTEST_ROUND, -(-left // -(-left // LONGEST_ROUND)))

    def waiting(steps: int) -> float:
        return sum(round_up(slot.left, steps) / slot.request.settings.steps for slot in slots)

    return min({length(slot.left) for slot in slots}, key=lambda steps: (waiting(steps), -steps))


@dataclass(frozen=True)
class _Cohort:
    """Rows that share solver and grid, and how far they are on it: neighbours in the batch.

    ``grid`` is what is left of it.
    """

    rows: slice
    solver: Solver
    grid: list[float]

    @property
    def steps(self) -> int:
        return len(self.grid) - 1


@dataclass(frozen=True)
class _Shape:
    """What steps have in common that have the same rows: where they are and what they see.

    Attributes:
        plan, rotations: of the pass.
        active: rows still under way; they come first.
        rows: those, and what pads them.
        everyone: of each noisy row of the pass, the row of z that it is: those under way, and again the
            guided ones; None where it is just those under way.
        guided: those with an unconditional row, or None.
        scale: (guided, 1, 1).
    """

    plan: Plan | PaddedPlan
    rotations: Tensor
    active: int
    rows: int
    everyone: Tensor | None
    guided: Tensor | None
    scale: Tensor


@dataclass(frozen=True)
class _Step:
    """What a solver step needs to know, prepared so that running it asks the host for nothing.

    Attributes:
        shape: of the pass.
        row: of the modulation table, one for all positions or one each.
        a: (rows of the pass, size), of each latent that is not clean, 0 where pinned; where the DiT
            predicts z0, else None.
    """

    shape: _Shape
    row: int | Tensor
    a: Tensor | None


class Transport:
    """Integrates the flow for blocks of slots.

    Args:
        dit: whose weights are used as they are.
        memory: of its histories.
        size: latents in a block.
        bucket: pad rows to powers of two, and histories to so many positions, twice as many and so on, and
            replay passes of equal shape; None reads just what is there.
    """

    def __init__(self, dit: DiT, memory: Memory, size: int, bucket: int | None = None) -> None:
        self.dit, self._memory, self._size, self._bucket = dit, memory, size, bucket
        self._device = dit.txt_in.proj.weight.device
        self._prior = PriorPass(dit)
        self.graphs = Graphs(self._prior) if bucket is not None else None

    def refresh(self) -> None:
        """Take the DiT's weights as they are now."""
        self._prior.refresh()
        if self.graphs is not None:
            self.graphs.refresh()

    def run(self, slots: Sequence[LatentSlot], z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Integrate dz/da = v for a round from z (B, block, C); yields z and the z0 pointed at.

        See :func:`colada.generate.reference.transport`, and :func:`round_steps`. The first pass also commits
        what is not yet committed. At the end, slots whose blocks are not finished have them as ``begun``.

        Args:
            slots: those with most steps left come first, and those of one cohort are neighbours.
            z: their noise, or where they are.
        """
        cohorts = self._cohorts(slots)
        riding = self._commit(slots)
        committed = [latents for _, latents in riding]
        pins = [slot.pinned_block(self._size) for slot in slots]
        where = torch.stack([own for own, _ in pins])
        pinned = torch.stack([own for _, own in pins])
        any_pinned = any(bool(len(slot.where) > slot.blocks * self._size) for slot in slots)
        steps = self._steps(slots, cohorts, [span for span, _ in riding], where, any_pinned)
        mask = where[..., None]
        if riding:
            padding = steps[0].shape.plan.clean_rows * self.dit.config.patch_size - sum(map(len, committed))
            committed.append(z.new_zeros(padding, z.shape[-1]))
        for number, (shape, row, of_latents) in enumerate((own.shape, own.row, own.a) for own in steps):
            if any_pinned:
                z = torch.where(mask, pinned, z)
            now = z[: shape.active]
            noisy = now if shape.everyone is None else now[shape.everyone]
            noisy = noisy.flatten(0, 1)
            rows = torch.cat([*committed, noisy]) if number == 0 else noisy
            velocity = self._forward(rows, row, shape)
            if number == 0:
                for slot in slots:
                    slot.history += len(slot.uncommitted)
            if of_latents is not None:
                velocity = velocity_from_z0(noisy, velocity, of_latents)
            velocity = velocity.unflatten(0, (-1, self._size))
            velocity, unconditional = velocity[: shape.active], velocity[shape.rows :]
            if shape.guided is not None:
                unconditional = unconditional[: len(shape.guided)]
                moved_away = unconditional + shape.scale * (velocity[shape.guided] - unconditional)
                velocity = velocity.index_copy(0, shape.guided, moved_away)
            moved, guesses = [], []
            for cohort in cohorts:
                if cohort.steps <= number:
                    continue
                a, a_next = cohort.grid[number : number + 2]
                own = now[cohort.rows]
                moved.append(cohort.solver.step(own, velocity[cohort.rows], a, a_next))
                guesses.append(own - a * velocity[cohort.rows])
            finished = z[shape.active :]
            z = torch.cat([*moved, finished])
            z0 = torch.cat([*guesses, finished])
            if any_pinned:
                z, z0 = torch.where(mask, pinned, z), torch.where(mask, pinned, z0)
            yield z, z0
        for cohort in cohorts:
            members = slots[cohort.rows]
            solvers = cohort.solver.split(len(members))
            for slot, latents, solver in zip(members, z[cohort.rows], solvers, strict=True):
                done = slot.request.settings.steps - slot.left + len(steps)
                slot.begun = None if len(steps) >= slot.left else Begun(done, latents, solver)

    def _cohorts(self, slots: Sequence[LatentSlot]) -> list[_Cohort]:
        cohorts: list[_Cohort] = []
        begin = 0
        for number, slot in enumerate(slots, start=1):
            if number == len(slots) or slot.pace != slots[number].pace:
                own = slots[begin:number]
                kind = SOLVERS[slot.request.settings.solver]
                solver = kind.joined([kind() if one.begun is None else one.begun.solver for one in own])
                cohorts.append(_Cohort(slice(begin, number), solver, slot.grid))
                begin = number
        return cohorts

    def _forward(self, latents: Tensor, row: int | Tensor, shape: _Shape) -> Tensor:
        if isinstance(shape.plan, Plan):
            return self._prior(latents, row, shape.plan, shape.rotations)
        assert self.graphs is not None
        assert isinstance(row, Tensor)
        return self.graphs(latents, row, shape.plan, shape.rotations)

    def _commit(self, slots: Sequence[LatentSlot]) -> list[Piece]:
        """Write what is finished into the DiT's history, but for what may join the coming pass: return that.

        A long prefix goes ahead in parts, so that no pass needs memory for all of it. To a padded pass, a
        block each comes along, and nothing else.
        """
        patch = self.dit.config.patch_size
        alone: list[Piece] = []
        riding: list[Piece] = []
        for slot in slots:
            own = pieces(slot.start, slot.history, slot.uncommitted, self._size, patch, COMMITTED_ROWS)
            fits = self._bucket is None or len(slot.uncommitted) == self._size
            (riding if fits else alone).extend(own)
        if self._bucket is None:
            *parts, riding = in_parts(riding, COMMITTED_ROWS) or [[]]
        else:
            parts = in_parts(alone, COMMITTED_ROWS)
        for part in parts:
            self._commit_alone(part)
        return riding

    def commit(self, parts: Iterable[tuple[int, int, Tensor]]) -> None:
        """Write latents, whole blocks, into the DiT's history.

        Args:
            parts: of each sample, the start of its region, how many latents are in its history, and those
                (L, C) that follow.
        """
        patch = self.dit.config.patch_size
        own = [piece for part in parts for piece in pieces(*part, self._size, patch, COMMITTED_ROWS)]
        for some in in_parts(own, COMMITTED_ROWS):
            self._commit_alone(some)

    def _commit_alone(self, part: Sequence[Piece]) -> None:
        """Write finished blocks into the DiT's history in a pass of their own."""
        plan = Plan(self._memory, [span for span, _ in part], [], 0, self._size // self.dit.config.patch_size)
        clean = self._prior.modulation.rows([0.0])[0.0]
        self._prior(
            torch.cat([latents for _, latents in part]), clean, plan, self._prior.rotations(plan.positions)
        )

    def _steps(
        self,
        slots: Sequence[LatentSlot],
        cohorts: Sequence[_Cohort],
        clean: list[Span],
        where: Tensor,
        any_pinned: bool,
    ) -> list[_Step]:
        """Prepare all solver steps of a round."""
        patch, device = self.dit.config.patch_size, self._device
        steps = min(round_steps(slots), cohorts[0].steps)
        times = {T * a for cohort in cohorts for a in cohort.grid[:-1][:steps]}
        table = self._prior.modulation.rows({0.0, *times})
        shapes: dict[tuple[int, int, tuple[int, ...]], _Shape] = {}
        prepared = []
        for number in range(steps):
            going = [cohort for cohort in cohorts if cohort.steps > number]
            active = going[-1].rows.stop
            values = [cohort.grid[number] for cohort in going for _ in range(*cohort.rows.indices(active))]
            guided = [
                row
                for row, (slot, a) in enumerate(zip(slots, values, strict=False))
                if slot.request.settings.guidance != 1
                and slot.history + len(slot.uncommitted)
                and slot.request.settings.guidance_interval[0] <= a
                and a <= slot.request.settings.guidance_interval[1]
            ]
            commits = clean if number == 0 else []
            key = (len(commits), active, tuple(guided))
            if key not in shapes:
                shapes[key] = self._shape(slots, active, guided, commits)
            shape = shapes[key]
            # Each noisy row's a and pins; what pads it counts as the first.
            each = [values[row] for row in self._members(shape.rows, active, guided)]
            where_now = where[:active] if shape.everyone is None else where[shape.everyone]
            row: int | Tensor = table[T * values[0]]
            if len(set(values)) > 1 or commits or any_pinned or self._bucket is not None:
                own = on_device([table[T * a] for a in each], device)[:, None]
                own = torch.where(where_now[:, patch - 1 :: patch], table[0.0], own)
                row = torch.cat([own.new_full((shape.plan.clean_rows,), table[0.0]), own.flatten()])
            a = None
            if self.dit.config.prediction == "z0":
                a = (on_device(each, device, torch.float32)[:, None] * ~where_now).flatten()
            prepared.append(_Step(shape, row, a))
        return prepared

    def _members(self, rows: int, active: int, guided: list[int]) -> list[int]:
        """Return of each noisy row of a pass which row of z it is; see :class:`_Shape`."""
        alone = rows if guided and self._bucket is not None else len(guided)
        return [*range(active), *[0] * (rows - active), *guided, *[0] * (alone - len(guided))]

    def _shape(
        self, slots: Sequence[LatentSlot], active: int, guided: list[int], commits: list[Span]
    ) -> _Shape:
        """Prepare a pass of the first ``active`` slots, with what is committed on the way."""
        patch, device = self.dit.config.patch_size, self._device
        noisy = [
            Span(
                slot.start // patch, (slot.start + slot.history + len(slot.uncommitted) + self._size) // patch
            )
            for slot in slots[:active]
        ]
        rows = active if self._bucket is None else doubled_to(active)
        members = self._members(rows, active, guided)
        alone, size = len(members) - rows, self._size // patch
        plan: Plan | PaddedPlan
        if self._bucket is None:
            plan = Plan(self._memory, commits, noisy, alone, size)
        else:
            length = doubled_to(max(span.end - span.start for span in noisy), self._bucket)
            clean_spans = doubled_to(len(slots)) if commits else 0
            plan = PaddedPlan(self._memory, commits, noisy, alone, size, clean_spans, rows, length)
        scale = on_device([slots[row].request.settings.guidance for row in guided], device, torch.float32)
        return _Shape(
            plan,
            self._prior.rotations(plan.positions),
            active,
            rows,
            on_device(members, device) if len(members) > active else None,
            on_device(guided, device) if guided else None,
            scale[:, None, None],
        )
