"""Continuous batching: requests join at block boundaries, each with its own settings, and leave alone.

Everything here gives what :class:`colada.generation.BlockGenerator`, the readable loop, gives for each
request by itself. The words are the same; what differs is the order of the work. The history is written in
place (:mod:`colada.engine.memory`), modulation is a table, conditional and unconditional rows and the commit
of the block before share the first pass of a block, and the decoder's prefix shares its first decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from colada.dit import DiT
from colada.engine.memory import Memory, Plan, Regions, Span
from colada.engine.passes import PriorPass
from colada.errors import ColadaError
from colada.flow import SCHEDULES, SOLVERS, Solver, T, choose, velocity_from_z0
from colada.generation import Block, Noise, TransportStep, block_generator, encode
from colada.layers import inverse_frequencies, rotary_table
from colada.sampling import Sampling
from colada.vae import TextVAE


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

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise ColadaError(f"new_tokens={self.new_tokens}, expected at least 1")
        if self.steps < 1:
            raise ColadaError(f"steps={self.steps}, expected at least 1")
        choose("solver", self.solver, SOLVERS)
        choose("schedule", self.schedule, SCHEDULES)

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
    error: ColadaError | None = None

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


class Engine:
    """Generates blocks for requests that come and go.

    Args:
        vae, dit: the networks, in evaluation mode; weights are used as they are, in their type.
        capacity: latents of history in all; a request takes those of its prompt and of the blocks to come,
            rounded up to whole blocks, from when it is admitted until it leaves.
        slots: requests generated together at most; None is no limit.
        pad_id: fills up prompts.
    """

    def __init__(
        self, vae: TextVAE, dit: DiT, *, capacity: int, slots: int | None = None, pad_id: int = 0
    ) -> None:
        self.vae, self.dit, self.slots, self.pad_id = vae, dit, slots, pad_id
        self._size, self._patch = vae.config.block_size, vae.config.patch_size
        capacity = capacity // self._size * self._size
        self.regions = Regions(capacity)
        device = dit.txt_in.proj.weight.device
        prior, decoder = dit.config, vae.config
        self._prior_memory = Memory(
            prior.num_layers,
            capacity // prior.patch_size,
            prior.heads,
            prior.head_dim,
            dit.txt_in.proj.weight.dtype,
            device,
        )
        self._decoder_memory = Memory(
            decoder.decoder_num_blocks,
            capacity,
            decoder.num_heads,
            decoder.dim // decoder.num_heads,
            vae.decoder.in_layer.weight.dtype,
            device,
        )
        self._decoder_frequencies = inverse_frequencies(decoder.dim // decoder.num_heads, decoder.rope_theta)
        self._prior = PriorPass(dit)
        self._waiting: deque[Request] = deque()
        self.under_way: list[Slot] = []

    @property
    def busy(self) -> bool:
        """Whether anyone waits or is under way."""
        return bool(self._waiting or self.under_way)

    @property
    def history_bytes(self) -> int:
        """Size of the memory that holds histories."""
        return self._prior_memory.bytes + self._decoder_memory.bytes

    # --- who is under way ------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Let a request wait for its admission, first come first served.

        Raises:
            ColadaError: if it could never be admitted; nothing else is affected.
        """
        room, capacity = request.room(self._patch, self._size), self.regions.capacity
        if room > capacity:
            raise ColadaError(f"a request of {room} latents, expected at most {capacity}: the history's room")
        self._waiting.append(request)

    def leave(self, slot: Slot) -> None:
        """Take a slot out between blocks; its region is free again."""
        self.under_way.remove(slot)
        self.regions.give_back(slot.start, slot.length)

    def withdraw(self, request: Request) -> None:
        """Take back a request that waits; one that does not is no error."""
        self._waiting = deque(one for one in self._waiting if one is not request)

    @torch.inference_mode()
    def admit(self) -> list[Slot]:
        """Give those who wait, in order, the room there is, and encode their prompts in one pass."""
        arriving: list[tuple[Request, int]] = []
        while self._waiting and (self.slots is None or len(self.under_way) + len(arriving) < self.slots):
            start = self.regions.take(self._waiting[0].room(self._patch, self._size))
            if start is None:
                break
            arriving.append((self._waiting.popleft(), start))
        latents = encode(self.vae, [request.ids for request, _ in arriving], self.pad_id) if arriving else []
        new = [self._slot(*who, own) for who, own in zip(arriving, latents, strict=True)]
        self.under_way += new
        return new

    def _slot(self, request: Request, start: int, latents: Tensor) -> Slot:
        prefix, given, blocks = request.latents(self._patch, self._size)
        where = torch.ones(given, dtype=torch.bool, device=latents.device)
        if request.hole is not None:
            where[request.hole[0] - prefix : request.hole[1] - prefix] = False
        pinned = latents[prefix : prefix + given]
        return Slot(
            request, start, request.room(self._patch, self._size), blocks, latents[:prefix], where, pinned
        )

    # --- one block -------------------------------------------------------------------------

    @torch.inference_mode()
    def next_block(self) -> Iterator[TransportStep]:
        """Admit who waits and generate the next block of every slot, yielding after every solver step.

        When the iterator ends, each slot under way has its new ``block``, or an ``error``: its latents were
        not finite. Who is done stays until it is told to :meth:`leave`; a slot that is ``done`` gets nothing.
        The steps count those of the longest grid; rows that are finished before stay as they are.
        """
        self.admit()
        order = [slot for slot in self.under_way if not slot.done]
        if not order:
            return
        # Rows of one solver and grid are neighbours, the longest grid first, so that rows under way
        # are the first ones; among them equal shapes are neighbours, which attend in one call.
        order.sort(key=self._rank)
        original = torch.tensor([order.index(slot) for slot in self.under_way if not slot.done])
        original = original.to(self.device)
        z = torch.stack([slot.request.noise(slot.blocks) for slot in order])
        for step, steps, latents, z0 in self._transport(order, z):
            z = latents
            yield TransportStep(step, steps, latents[original], z0[original])
        finite = z.isfinite().flatten(1).all(1).tolist()
        for slot, fine in zip(order, finite, strict=True):
            if not fine:
                slot.error = ColadaError(f"block {slot.blocks} of a request has latents that are not finite")
        self._finish([slot for slot in order if slot.error is None], z[torch.tensor(finite)])

    @property
    def device(self) -> torch.device:
        """Where the latents are."""
        return self.dit.txt_in.proj.weight.device

    @staticmethod
    def _rank(slot: Slot) -> tuple[int, str, str, int, int]:
        request = slot.request
        history = slot.history + len(slot.uncommitted)
        return -request.steps, request.solver, request.schedule, history, slot.start

    def _transport(self, slots: Sequence[Slot], z: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Integrate dz/da = v from noise z (B, block, C); yields step, steps, z and the z0 pointed at.

        See :func:`colada.generation.transport`. The first pass also commits what is not yet committed.
        """
        cohorts = self._cohorts(slots)
        clean, committed = self._commit(slots)
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
            velocity = self._prior(rows, step.row, step.plan, step.rotations)
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

    def _steps(
        self,
        slots: Sequence[Slot],
        cohorts: Sequence[_Cohort],
        clean: list[Span],
        where: Tensor,
        any_pinned: bool,
    ) -> list[_Step]:
        """Prepare all solver steps of a block."""
        patch, device = self.dit.config.patch_size, self.device
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
                plan = Plan(self._prior_memory, commits, noisy[:active], len(guided), size)
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

    # --- latents to tokens -----------------------------------------------------------------

    def _hidden(self, slots: Sequence[Slot], latents: Tensor) -> Tensor:
        """Return the decoder's hidden states (B * block * patch, dim) of the coming blocks (B, block, C).

        A prefix that the decoder has not seen yet goes along, without being spelled.
        """
        prefixes: list[tuple[int, int, Tensor]] = []
        for slot in slots:
            for begin in range(slot.decoded, len(slot.prefix), self._size):
                end = begin + self._size
                prefixes.append((end, slot.start, slot.prefix[begin:end]))
        prefixes.sort(key=lambda prefix: prefix[:2])
        clean = [Span(start, start + end) for end, start, _ in prefixes]
        blocks = [
            Span(slot.start, slot.start + max(slot.decoded, len(slot.prefix)) + self._size) for slot in slots
        ]
        plan = Plan(self._decoder_memory, clean, blocks, 0, self._size)
        rows = torch.cat([*(block for _, _, block in prefixes), latents.flatten(0, 1)])
        shared = _DecoderPass(plan, rotary_table(plan.positions, self._decoder_frequencies))
        decoder = self.vae.decoder
        hidden = decoder.unpatch(decoder.run(rows, shared)[plan.clean_rows :])
        for slot in slots:
            slot.decoded = max(slot.decoded, len(slot.prefix))
        return hidden

    def _finish(self, slots: Sequence[Slot], z: Tensor) -> None:
        """Decode the finished latents (B, block, C) of these slots and pick their tokens."""
        if not slots:
            return
        logits = self.vae.decoder.logits(self._hidden(slots, z))
        own = logits.split(self._size * self._patch)
        greedy = logits.argmax(-1).cpu().split(self._size * self._patch)
        for slot, latents, mine, likeliest in zip(slots, z, own, greedy, strict=True):
            sampling, seed = slot.request.sampling, slot.request.seed
            if sampling.temperature == 0 and sampling.repetition_penalty == 1:
                ids = likeliest.tolist()
            else:
                ids = sampling.pick(mine, slot.seen, block_generator(seed, slot.blocks, 1)).tolist()
            slot.seen.update(ids)
            slot.block = Block(latents, mine, ids)
            slot.decoded += self._size
            slot.blocks += 1

    @torch.inference_mode()
    def spell(self, z0: Tensor) -> list[list[int]]:
        """Return the likeliest ids of a guess (B, block, C) of the coming block of those under way.

        Nothing is committed: the block's own positions of the decoder's memory are written again.
        """
        slots = [slot for slot in self.under_way if not slot.done]
        ids = self.vae.decoder.logits(self._hidden(slots, z0)).argmax(-1)
        return [part.tolist() for part in ids.split(self._size * self._patch)]


@dataclass(frozen=True)
class _DecoderPass:
    """What the decoder's layers share; see :class:`colada.layers.Shared`."""

    plan: Plan
    table: tuple[Tensor, Tensor]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return self.plan.attend(q, k, v, layer)
