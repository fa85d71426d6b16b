"""The transport of one block of many requests: what every solver step needs is prepared, then it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colada.dit import DiT
from colada.engine.graphs import Graphs
from colada.engine.memory import Memory, Plan, Span
from colada.engine.passes import PriorPass
from colada.engine.request import Slot
from colada.flow import SOLVERS, Solver, T, velocity_from_z0

COMMITTED_ROWS = 512
"""The most latents that join the first solver step of a block to be committed."""


@dataclass(frozen=True)
class _Cohort:
    """Rows that share solver and grid: neighbours in the batch."""

    rows: slice
    solver: Solver
    grid: list[float]

    @property
    def steps(self) -> int:
        return len(self.grid) - 1


@dataclass(frozen=True)
class _Step:
    """What a solver step needs to know, prepared so that running it asks the host for nothing.

    Attributes:
        active: rows still under way; they come first.
        everyone: the rows of the pass: those, and again the guided ones; None where none is guided.
        guided: those with an unconditional row, or None.
        scale: (guided, 1, 1).
        row: of the modulation table, one for all positions or one each.
        a: () or (rows, size), of each latent that is not clean, 0 where pinned; where the DiT predicts z0.
    """

    plan: Plan
    rotations: Tensor
    active: int
    everyone: Tensor | None
    guided: Tensor | None
    scale: Tensor
    row: int | Tensor
    a: Tensor | None


class Transport:
    """Integrates the flow for blocks of slots.

    Args:
        dit: whose weights are used as they are.
        memory: of its histories.
        size: latents in a block.
        bucket: read histories in multiples of so many positions and replay passes of equal shape;
            None reads just what is there.
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

    def run(self, slots: Sequence[Slot], z: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Integrate dz/da = v from noise z (B, block, C); yields step, steps, z and the z0 pointed at.

        See :func:`colada.generation.transport`. The first pass also commits what is not yet committed.
        """
        cohorts = self._cohorts(slots)
        clean, committed = self._commit(slots)
        while len(clean) * self._size > COMMITTED_ROWS:
            # A long prefix goes ahead in parts, so that no pass needs memory for all of it.
            part = COMMITTED_ROWS // self._size or 1
            self._commit_alone(clean[:part], committed[:part])
            clean, committed = clean[part:], committed[part:]
        pins = [slot.pinned_block(self._size) for slot in slots]
        where = torch.stack([own for own, _ in pins])
        pinned = torch.stack([own for _, own in pins])
        any_pinned = any(bool(len(slot.where) > slot.blocks * self._size) for slot in slots)
        steps = self._steps(slots, cohorts, clean, where, any_pinned)
        mask = where[..., None]
        for number, step in enumerate(steps):
            if any_pinned:
                z = torch.where(mask, pinned, z)
            now = z[: step.active]
            noisy = now if step.everyone is None else now[step.everyone]
            noisy = noisy.flatten(0, 1)
            rows = torch.cat([*committed, noisy]) if number == 0 else noisy
            forward = self._prior if self.graphs is None or step.plan.clean_rows else self.graphs
            velocity = forward(rows, step.row, step.plan, step.rotations)
            if number == 0:
                for slot in slots:
                    slot.history += len(slot.uncommitted)
            if step.a is not None:
                velocity = velocity_from_z0(noisy, velocity, step.a)
            velocity = velocity.unflatten(0, (-1, self._size))
            velocity, unconditional = velocity[: step.active], velocity[step.active :]
            if step.guided is not None:
                moved_away = unconditional + step.scale * (velocity[step.guided] - unconditional)
                velocity = velocity.index_copy(0, step.guided, moved_away)
            moved, guesses = [], []
            for cohort in cohorts:
                if cohort.steps <= number:
                    continue
                a, a_next = cohort.grid[number : number + 2]
                own = now[cohort.rows]
                moved.append(cohort.solver.step(own, velocity[cohort.rows], a, a_next))
                guesses.append(own - a * velocity[cohort.rows])
            finished = z[step.active :]
            z = torch.cat([*moved, finished])
            z0 = torch.cat([*guesses, finished])
            if any_pinned:
                z, z0 = torch.where(mask, pinned, z), torch.where(mask, pinned, z0)
            yield number + 1, len(steps), z, z0

    def _cohorts(self, slots: Sequence[Slot]) -> list[_Cohort]:
        cohorts: list[_Cohort] = []
        begin = 0
        for number, slot in enumerate(slots, start=1):
            own = slot.request
            following = slots[number].request if number < len(slots) else None
            kind = (own.steps, own.solver, own.schedule)
            if following is None or kind != (following.steps, following.solver, following.schedule):
                cohorts.append(_Cohort(slice(begin, number), SOLVERS[own.solver](), own.grid))
                begin = number
        return cohorts

    def _commit(self, slots: Sequence[Slot]) -> tuple[list[Span], list[Tensor]]:
        """Plan the commit of what is finished: spans of the DiT's memory, one a block, and their latents."""
        blocks: list[tuple[int, int, Tensor]] = []
        for slot in slots:
            latents, history = slot.uncommitted, slot.history
            for begin in range(0, len(latents), self._size):
                history += self._size
                blocks.append((history, slot.start, latents[begin : begin + self._size]))
        blocks.sort(key=lambda block: block[:2])
        patch = self.dit.config.patch_size
        spans = [Span(start // patch, (start + history) // patch) for history, start, _ in blocks]
        return spans, [latents for _, _, latents in blocks]

    def _commit_alone(self, spans: list[Span], latents: Sequence[Tensor]) -> None:
        """Write finished blocks into the DiT's history in a pass of their own."""
        plan = Plan(self._memory, spans, [], 0, self._size // self.dit.config.patch_size)
        clean = self._prior.modulation.rows([0.0])[0.0]
        self._prior(torch.cat(list(latents)), clean, plan, self._prior.rotations(plan.positions))

    def _steps(
        self,
        slots: Sequence[Slot],
        cohorts: Sequence[_Cohort],
        clean: list[Span],
        where: Tensor,
        any_pinned: bool,
    ) -> list[_Step]:
        """Prepare all solver steps of a block."""
        patch, device = self.dit.config.patch_size, self._device
        size = self._size // patch
        histories = [slot.history + len(slot.uncommitted) for slot in slots]
        noisy = [
            Span(slot.start // patch, (slot.start + history + self._size) // patch)
            for slot, history in zip(slots, histories, strict=True)
        ]
        table = self._prior.modulation.rows({0.0, *(T * a for cohort in cohorts for a in cohort.grid[:-1])})
        plans: dict[tuple[int, int, tuple[int, ...]], tuple[Plan, Tensor]] = {}
        prepared = []
        for number in range(cohorts[0].steps):
            going = [cohort for cohort in cohorts if cohort.steps > number]
            active = going[-1].rows.stop
            values = [cohort.grid[number] for cohort in going for _ in range(*cohort.rows.indices(active))]
            guided = [
                row
                for row, (slot, a) in enumerate(zip(slots, values, strict=False))
                if slot.request.guidance != 1
                and histories[row]
                and slot.request.interval[0] <= a <= slot.request.interval[1]
            ]
            commits = clean if number == 0 else []
            key = (len(commits), active, tuple(guided))
            if key not in plans:
                plan = Plan(self._memory, commits, noisy[:active], len(guided), size, self._bucket)
                plans[key] = plan, self._prior.rotations(plan.positions)
            index = torch.tensor(guided, device=device)
            everyone = torch.cat([torch.arange(active, device=device), index]) if guided else None
            where_now = where[:active] if everyone is None else where[everyone]
            row: int | Tensor = table[T * values[0]]
            if len(set(values)) > 1 or commits or any_pinned:
                rows = [table[T * a] for a in [*values, *(values[at] for at in guided)]]
                own = torch.tensor(rows, device=device)[:, None]
                own = torch.where(where_now[:, patch - 1 :: patch], table[0.0], own)
                row = torch.cat([own.new_full((len(commits) * size,), table[0.0]), own.flatten()])
            a = None
            if self.dit.config.prediction == "z0":
                each = [*values, *(values[at] for at in guided)]
                a = (torch.tensor(each, device=device)[:, None] * ~where_now).flatten()
            scale = torch.tensor([slots[at].request.guidance for at in guided], device=device)[:, None, None]
            prepared.append(
                _Step(
                    *plans[key],
                    active,
                    everyone,
                    index if guided else None,
                    scale,
                    row,
                    a,
                )
            )
        return prepared
