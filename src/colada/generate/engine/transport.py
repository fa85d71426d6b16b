"""The transport of one block of many requests: what every solver step needs is prepared, then it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from colada.device import on_device
from colada.flow import PREDICTIONS, Evaluation, advance, memory
from colada.generate.engine.graphs import Graphs
from colada.generate.engine.memory import (
    Memory,
    PaddedRows,
    Piece,
    Span,
    ViewRows,
    doubled_to,
    in_parts,
    pieces,
    round_up,
)
from colada.generate.engine.passes import PriorPass
from colada.generate.engine.slots import Begun, LatentSlot
from colada.generate.guidance import Guidance, against_latents, estimate, is_bounded, is_guided
from colada.networks.dit import DiT

APPENDED_ROWS = 512
"""The most latents of a pass that are appended, alone or with the first solver step of a block."""

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
        return sum(round_up(slot.left, steps) / len(slot.evaluations) for slot in slots)

    return min({length(slot.left) for slot in slots}, key=lambda steps: (waiting(steps), -steps))


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
        guidance: of the guided rows.
        bounded: whether any of their guesses is.
    """

    plan: ViewRows | PaddedRows
    rotations: Tensor
    active: int
    rows: int
    everyone: Tensor | None
    guided: Tensor | None
    guidance: Guidance
    bounded: bool


class _Pass(NamedTuple):
    """What an evaluation needs to know, prepared so that running it asks the host for nothing.

    Attributes:
        shape: of the pass.
        numbers: (2 + velocities, active, 1, 1), of each row its a, what of z is kept, and the weights of the
            velocities.
        pointed: bool (active, 1, 1), rows whose weights are of guesses of z0 instead; None without any.
        row: of the modulation table, one for all positions or one each.
        a: (rows of the pass, size), of each latent that is not clean, 0 where pinned; where the DiT
            predicts anything but the velocity, else None.
    """

    shape: _Shape
    numbers: Tensor
    pointed: Tensor | None
    row: int | Tensor
    a: Tensor | None


def _numbers(evaluation: Evaluation, width: int) -> list[float]:
    """Return an evaluation as numbers, with so many weights."""
    z_factor = 1.0 if evaluation.z_factor is None else evaluation.z_factor
    return [evaluation.a, z_factor, *evaluation.weights, *[0.0] * (width - len(evaluation.weights))]


def _is_guided(slot: LatentSlot, a: float) -> bool:
    """Return whether a slot's velocity at a has an unconditional one beside it."""
    return is_guided(slot.request.settings, a, bool(slot.cached + len(slot.to_append)))


def _last_velocities(slots: Sequence[LatentSlot], none: Tensor) -> list[Tensor]:
    """Return the velocities (R, block, C) that were before a round, newest first, or ``none`` (block, C)."""
    begun = [() if slot.begun is None else slot.begun.velocities for slot in slots]
    return [
        torch.cat(
            [
                velocities[age] if age < len(velocities) else none.expand(slot.candidates, -1, -1)
                for slot, velocities in zip(slots, begun, strict=True)
            ]
        )
        for age in range(max(map(len, begun)))
    ]


def _last_guesses(slots: Sequence[LatentSlot], z: Tensor) -> Tensor:
    """Return the guesses of z0 (R, block, C) that were before a round, 0 where there were none."""
    guesses = []
    for slot in slots:
        last = None if slot.begun is None else slot.begun.guess
        guesses.append(z.new_zeros(slot.candidates, *z.shape[1:]) if last is None else last)
    return torch.cat(guesses)


class Transport:
    """Integrates the flow for blocks of slots.

    Args:
        dit: whose weights are used as they are.
        memory: of its KV caches.
        size: latents in a block.
        bucket: pad rows to powers of two, KV caches to so many positions, twice as many and so on, and
            replay passes of equal shape; None reads just what is there.
        text: the transport of text beside which this is one of pictures, each a block. What is before them is
            to be appended already.
    """

    def __init__(
        self,
        dit: DiT,
        memory: Memory,
        size: int,
        bucket: int | None = None,
        text: Transport | None = None,
    ) -> None:
        self.dit, self._memory, self._size, self._bucket = dit, memory, size, bucket
        self._device = dit.txt_in.proj.weight.device
        self._pictures = text is not None
        self._prior: PriorPass = PriorPass(dit, text=None if text is None else text._prior)
        self.graphs = Graphs(self._prior) if bucket is not None else None

    def refresh(self) -> None:
        """Take the DiT's weights as they are now."""
        self._prior.refresh()
        if self.graphs is not None:
            self.graphs.refresh()

    def run(self, slots: Sequence[LatentSlot], z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Integrate dz/da = v for a round from z (R, block, C); yields z and the z0 pointed at.

        See :func:`colada.generate.reference.transport`, and :func:`round_steps`. The first pass also appends
        what is not yet appended. At the end, slots whose blocks are not finished have them as ``begun``.

        Args:
            slots: those with most evaluations left come first.
            z: their noise, or where they are; a row for each candidate of each slot.
        """
        members = [slot for slot in slots for _ in range(slot.candidates)]
        riding = self._append(slots)
        clean = [latents for _, latents in riding]
        pins = [slot.pinned_block(self._size) for slot in members]
        where = torch.stack([pin for pin, _ in pins])
        pinned = torch.stack([pin for _, pin in pins])
        any_pinned = any(slot.tail > slot.blocks * self._size for slot in slots)
        passes = self._passes(members, [span for span, _ in riding], where, any_pinned)
        mask = where[..., None]
        if riding:
            padding = passes[0].shape.plan.clean_rows * self.dit.config.patch_size - sum(map(len, clean))
            clean.append(z.new_zeros(padding, z.shape[-1]))
        velocities = _last_velocities(slots, torch.zeros_like(z[0]))
        guess = _last_guesses(slots, z) if self.dit.config.self_conditioning else None
        for number, (shape, numbers, pointed, row, of_latents) in enumerate(passes):
            if any_pinned:
                z = torch.where(mask, pinned, z)
            now, finished = z[: shape.active], z[shape.active :]
            noisy = now if shape.everyone is None else now[shape.everyone]
            noisy = noisy.flatten(0, 1)
            rows = torch.cat([*clean, noisy]) if number == 0 else noisy
            if guess is not None:
                rows = self._with_guesses(rows, guess[: shape.active], shape)
            output = self._forward(rows, row, shape)
            if number == 0:
                for slot in slots:
                    slot.cached += len(slot.to_append)
            if of_latents is not None:
                output = PREDICTIONS[self.dit.config.prediction].velocity(noisy, output, of_latents)
            output = output.unflatten(0, (-1, self._size))
            conditional, unconditional = output[: shape.active], output[shape.rows :]
            if shape.guided is not None:
                unconditional = unconditional[: len(shape.guided)]
            a, z_factor, *weights = numbers
            free = ~where[: shape.active] if shape.bounded else None
            velocity, z0 = estimate(now, a, conditional, unconditional, shape.guided, shape.guidance, free)
            if guess is not None:
                guess = torch.where(mask[: shape.active], pinned[: shape.active], now - a * conditional)
            past = [velocity_before[: shape.active] for velocity_before in velocities]
            if pointed is not None:
                velocity, now = torch.where(pointed, z0, velocity), z_factor * now
            velocities = [velocity, *past][: len(weights)]
            z, z0 = torch.cat([advance(now, velocities, weights), finished]), torch.cat([z0, finished])
            if any_pinned:
                z, z0 = torch.where(mask, pinned, z), torch.where(mask, pinned, z0)
            yield z, z0
        begin = 0
        for slot in slots:
            rows_of, begin = slice(begin, begin + slot.candidates), begin + slot.candidates
            done = len(slot.evaluations) - slot.left + len(passes)
            if slot.left <= len(passes):
                slot.begun = None
            else:
                last = [velocity_before[rows_of] for velocity_before in velocities]
                slot.begun = Begun(done, z[rows_of], last, None if guess is None else guess[rows_of])

    def _with_guesses(self, latents: Tensor, guess: Tensor, shape: _Shape) -> Tensor:
        """Return rows (N, 2 C) of latents beside guesses of z0; what is appended has none."""
        noisy = guess if shape.everyone is None else guess[shape.everyone]
        clean = latents.new_zeros(len(latents) - noisy.shape[0] * self._size, latents.shape[-1])
        return torch.cat([latents, torch.cat([clean, noisy.flatten(0, 1)])], -1)

    def _forward(self, latents: Tensor, row: int | Tensor, shape: _Shape) -> Tensor:
        if isinstance(shape.plan, ViewRows):
            return self._prior(latents, row, shape.plan, shape.rotations)
        assert self.graphs is not None
        assert isinstance(row, Tensor)
        return self.graphs(latents, row, shape.plan, shape.rotations)

    def _append(self, slots: Sequence[LatentSlot]) -> list[Piece]:
        """Append what is finished to the DiT's KV cache, but for what may join the coming pass: return that.

        A long prefix goes ahead in parts, so that no pass needs memory for all of it. To a padded pass, a
        block each comes along, and nothing else.
        """
        patch = self.dit.config.patch_size
        alone: list[Piece] = []
        riding: list[Piece] = []
        for slot in slots:
            new = slot.start, slot.cached, slot.to_append
            new_pieces = pieces(*new, self._size, patch, APPENDED_ROWS, slot.shift)
            fits = self._bucket is None or len(slot.to_append) == self._size
            (riding if fits else alone).extend(new_pieces)
        if self._bucket is None:
            *parts, riding = in_parts(riding, APPENDED_ROWS) or [[]]
        else:
            parts = in_parts(alone, APPENDED_ROWS)
        for part in parts:
            self._append_alone(part)
        return riding

    def append(self, parts: Iterable[tuple[int, int, Tensor]]) -> None:
        """Append latents, whole blocks, to the DiT's KV cache.

        Args:
            parts: of each sample, the start of its region, how many latents are in its KV cache, and those
                (L, C) that follow.
        """
        patch = self.dit.config.patch_size
        all_pieces = [piece for part in parts for piece in pieces(*part, self._size, patch, APPENDED_ROWS)]
        for some in in_parts(all_pieces, APPENDED_ROWS):
            self._append_alone(some)

    def _append_alone(self, part: Sequence[Piece]) -> None:
        """Append finished blocks to the DiT's KV cache in a pass of their own."""
        plan = ViewRows(
            self._memory, [span for span, _ in part], [], (), self._size // self.dit.config.patch_size
        )
        clean = self._prior.modulation.rows([0.0])[0.0]
        self._prior(
            torch.cat([latents for _, latents in part]), clean, plan, self._prior.rotations(plan.positions)
        )

    def _passes(
        self, slots: Sequence[LatentSlot], clean: list[Span], where: Tensor, any_pinned: bool
    ) -> list[_Pass]:
        """Prepare all evaluations of a round; ``slots`` has one for each row of z."""
        patch, device = self.dit.config.patch_size, self._device
        count = min(round_steps(slots), slots[0].left)
        coming = [slot.evaluations[len(slot.evaluations) - slot.left :][:count] for slot in slots]
        moment = self._prior.modulation.moment
        table = self._prior.modulation.rows(
            [0.0, *(moment(each) for evaluations in coming for each in evaluations)]
        )
        width = max(map(memory, coming))
        # Of every evaluation and row its numbers; nothing for those who have ended.
        padded = [[_numbers(evaluation, width) for evaluation in evaluations] for evaluations in coming]
        none = [0.0] * (2 + width)
        numbers = on_device(
            [
                [row_numbers[number] if number < len(row_numbers) else none for row_numbers in padded]
                for number in range(count)
            ],
            device,
            torch.float32,
        )
        numbers = numbers.movedim(2, 1)[..., None, None]
        shapes: dict[tuple[int, int, tuple[int, ...]], _Shape] = {}
        passes = []
        for number in range(count):
            now = [evaluations[number] for evaluations in coming if number < len(evaluations)]
            active = len(now)
            guided = [row for row, evaluation in enumerate(now) if _is_guided(slots[row], evaluation.a)]
            appended = clean if number == 0 else []
            key = (len(appended), active, tuple(guided))
            if key not in shapes:
                shapes[key] = self._shape(slots, active, guided, appended)
            shape = shapes[key]
            # Each noisy row's a and pins; what pads it counts as the first.
            each = [now[row] for row in self._members(shape.rows, active, guided)]
            where_now = where[:active] if shape.everyone is None else where[shape.everyone]
            row: int | Tensor = table[moment(now[0])]
            if len(set(map(moment, now))) > 1 or appended or any_pinned or self._bucket is not None:
                own_rows = on_device([table[moment(evaluation)] for evaluation in each], device)[:, None]
                own_rows = torch.where(where_now[:, patch - 1 :: patch], table[0.0], own_rows)
                row = torch.cat([own_rows.new_full((shape.plan.clean_rows,), table[0.0]), own_rows.flatten()])
            of_latents = None
            if self.dit.config.prediction != "velocity":
                times = on_device([evaluation.a for evaluation in each], device, torch.float32)
                of_latents = (times[:, None] * ~where_now).flatten()
            pointed = None
            if any(evaluation.z_factor is not None for evaluation in now):
                pointed = on_device(
                    [evaluation.z_factor is not None for evaluation in now], device, torch.bool
                )[:, None, None]
            passes.append(_Pass(shape, numbers[number][:, :active], pointed, row, of_latents))
        return passes

    def _members(self, rows: int, active: int, guided: list[int]) -> list[int]:
        """Return of each noisy row of a pass which row of z it is; see :class:`_Shape`."""
        alone = rows if guided and self._bucket is not None else len(guided)
        return [*range(active), *[0] * (rows - active), *guided, *[0] * (alone - len(guided))]

    def _shape(
        self, slots: Sequence[LatentSlot], active: int, guided: list[int], appended: list[Span]
    ) -> _Shape:
        """Prepare a pass of the first ``active`` rows of z, with what is appended on the way."""
        patch, device = self.dit.config.patch_size, self._device
        noisy = []
        for slot in dict.fromkeys(slots[:active]):
            past, count = slot.cached + len(slot.to_append), slot.candidates
            end = slot.start + past + count * self._size
            noisy.append(Span(slot.start // patch, end // patch, count, apart=count > 1, shift=slot.shift))
        rows = active if self._bucket is None else doubled_to(active)
        members = self._members(rows, active, guided)
        size = self._size // patch
        settings = [slots[row].request.settings for row in guided]
        apart = [against_latents(one) for one in settings]
        alone = [*apart, *[False] * (len(members) - rows - len(apart))]
        plan: ViewRows | PaddedRows
        if self._bucket is None:
            plan = ViewRows(self._memory, appended, noisy, alone, size, self._pictures)
        else:
            length = doubled_to(max(span.seen(size) for span in noisy), self._bucket)
            clean_blocks = doubled_to(len(set(slots))) if appended else 0
            plan = PaddedRows(self._memory, appended, noisy, alone, size, clean_blocks, rows, length)
        return _Shape(
            plan,
            self._prior.rotations(plan.positions),
            active,
            rows,
            on_device(members, device) if len(members) > active else None,
            on_device(guided, device) if guided else None,
            Guidance.of(settings, device),
            any(map(is_bounded, settings)),
        )
