"""Continuous batching: requests join at block boundaries, each with its own settings, and leave alone.

Everything here gives what the readable loop, :class:`colada.generate.reference.BlockGenerator`, gives for
each request by itself. The words are the same; what differs is the order of the work. The KV cache is
written in place (:mod:`colada.generate.engine.memory`), modulation is a table, conditional and unconditional
rows and appending the block before share the first pass of a block, and the decoder's prefix shares its
first decoding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colada.device import plain_torch, require_memory, undisturbed
from colada.errors import ColadaError, failure
from colada.generate.engine.graphs import Graphs
from colada.generate.engine.kernels import fits_packed, product
from colada.generate.engine.memory import (
    Memory,
    PaddedRows,
    Piece,
    Regions,
    Span,
    ViewRows,
    in_parts,
    pieces,
    round_up,
)
from colada.generate.engine.passes import blocks_of, matrices
from colada.generate.engine.slots import JOINING_LATENTS, LatentSlot, read_prompts, room_of, shares
from colada.generate.engine.transport import APPENDED_ROWS, Transport
from colada.generate.noise import NOISE_RULES, block_generator
from colada.generate.pictures import show
from colada.generate.reference import Block, TransportStep
from colada.generate.sampling import confidence, pick, surest
from colada.generate.writer import Guess, Request, Writer
from colada.networks.config import TextVAEConfig
from colada.networks.dit import DiT
from colada.networks.layers import kept_frequencies, rotary_table
from colada.networks.pictures import widened
from colada.networks.vae import TextVAE

GPU_BUCKET = 128
"""Latents in a KV cache to which a GPU's passes are padded, or to twice as many, and so on."""


def capacity_for(requests: Iterable[Request], config: TextVAEConfig, slots: int | None = None) -> int:
    """Return the latents of KV cache that the ``slots`` largest of some requests take, or all of them."""
    rooms = sorted(
        (room_of(request, config.patch_size, config.block_size) for request in requests), reverse=True
    )
    return sum(rooms[:slots])


def cache_bytes(vae: TextVAE, dit: DiT, latents: int) -> int:
    """Return the size of the memory that holds the KV cache of so many latents."""
    prior_numbers = latents * dit.config.cache_numbers // dit.config.patch_size
    decoder_bytes = latents * vae.config.cache_numbers * vae.decoder.in_layer.weight.element_size()
    return prior_numbers * dit.txt_in.proj.weight.element_size() + decoder_bytes


class Engine(Writer[LatentSlot]):
    """Generates blocks for requests that come and go.

    Args:
        vae, dit: the networks, in evaluation mode; weights are used as they are, in their type.
        capacity: latents in all KV caches; a request takes those of its prompt and of the blocks to come,
            rounded up to whole blocks, from when it is admitted until it leaves.
        slots: requests generated together at most; None is no limit.
        pad_id: fills up prompts.
        bucket: pad rows to powers of two, and KV caches to so many latents, twice as many and so on, and
            replay passes of equal shape; by default 128 on a GPU, where each replay is a CUDA graph, and
            elsewhere None, not at all.
        keep_logits: give each finished block its logits, which are large; else None.

    Raises:
        ColadaError: if the bucket is no multiple of the block.
    """

    unit = "latents"

    def __init__(
        self,
        vae: TextVAE,
        dit: DiT,
        *,
        capacity: int,
        slots: int | None = None,
        pad_id: int = 0,
        bucket: int | None = None,
        keep_logits: bool = False,
    ) -> None:
        super().__init__(capacity // vae.config.block_size * vae.config.block_size, slots)
        self._keep_logits = keep_logits
        self.vae, self.dit, self.pad_id = vae, dit, pad_id
        self._size, self._patch = vae.config.block_size, vae.config.patch_size
        device = dit.txt_in.proj.weight.device
        if bucket is None and device.type == "cuda":
            bucket = round_up(GPU_BUCKET, self._size)
        if bucket is not None and bucket % self._size:
            raise ColadaError(f"bucket={bucket}, expected a multiple of the block of {self._size} latents")
        self._padded = bucket is not None
        capacity = self.capacity
        require_memory(cache_bytes(vae, dit, capacity), device, f"a KV cache of {capacity} latents")
        self.regions = Regions(capacity)
        prior, decoder = dit.config, vae.config
        self._prior_memory = Memory(
            prior.num_layers,
            capacity // prior.patch_size,
            prior.heads,
            prior.head_dim,
            dit.txt_in.proj.weight.dtype,
            device,
            self._size // prior.patch_size + 1 if self._padded else 0,
        )
        self._decoder_memory = Memory(
            decoder.decoder_num_blocks,
            capacity,
            decoder.num_heads,
            decoder.dim // decoder.num_heads,
            vae.decoder.in_layer.weight.dtype,
            device,
            self._size + 1 if self._padded else 0,
        )
        bucket = None if bucket is None else bucket // prior.patch_size
        self._transport = Transport(dit, self._prior_memory, self._size, bucket)
        self._refresh_head()
        self._painting: Transport | None = None
        if prior.img_grid is not None:
            pictures = math.prod(prior.img_grid)
            self._painting = Transport(dit, self._prior_memory, pictures, text=self._transport)
        self.joining: list[LatentSlot] = []
        self._going: list[LatentSlot] = []  # Those of whom the last step was, in the order of its rows.

    @property
    def graphs(self) -> Graphs | None:
        """The passes that are replayed, if any are."""
        return self._transport.graphs

    @property
    def busy(self) -> bool:
        """Whether anyone waits, joins or is under way."""
        return super().busy or bool(self.joining)

    @property
    def news(self) -> list[LatentSlot]:
        """Those to whom the last round brought a block or an error."""
        return [slot for slot in self.under_way if slot.error is not None or slot.begun is None]

    @property
    def cache_bytes(self) -> int:
        """Size of the memory that holds the KV caches."""
        return self._prior_memory.bytes + self._decoder_memory.bytes

    # --- who is under way ------------------------------------------------------------------

    def room(self, request: Request) -> int:
        """Return how many latents of KV cache a request takes."""
        return room_of(request, self._patch, self._size)

    def leave(self, slot: LatentSlot) -> None:
        """Take a slot out between rounds; its region is free again."""
        super().leave(slot)
        self.regions.give_back(slot.start, slot.length)

    def withdraw(self, request: Request) -> None:
        """Take back a request that waits or joins; one that does neither is no error."""
        super().withdraw(request)
        for slot in [slot for slot in self.joining if slot.request is request]:
            self.joining.remove(slot)
            self.regions.give_back(slot.start, slot.length)

    @plain_torch()
    def admit(self) -> list[LatentSlot]:
        """Give those who wait, in order, the room there is, and read their prompts.

        Returns those who are now under way.
        Where others are under way, long prompts are read in parts, one before each block. One that cannot be
        read has a slot with an ``error``. Where nobody is, the weights are taken as they are now: they may
        have changed.
        """
        if self.waiting and not self.under_way and not self.joining:
            self._refresh_head()
            self._transport.refresh()
            if self._painting is not None:  # Which shares what the other has made.
                self._painting.refresh()
        while self.waiting and (self.slots is None or len(self.under_way) + len(self.joining) < self.slots):
            room = self.room(self.waiting[0])
            start = self.regions.take(room)
            if start is None:
                break
            self.joining.append(LatentSlot.of(self.waiting.popleft(), start, room, self.vae, self.device))
        new = self._join(self._latents_to_join())
        self.under_way += new
        return new

    def _latents_to_join(self) -> int | None:
        """Return how many latents of prompts may be read between two blocks; None is all, as nobody waits.

        To read one takes encoder, DiT and decoder, about as long as four rows of a solver step: the coming
        block then takes about twice as long, or as :data:`JOINING_LATENTS` take.
        """
        going = [slot for slot in self.under_way if not slot.done]
        rows = (
            sum(
                slot.left * slot.candidates * (1 if slot.request.settings.guidance == 1 else 2)
                for slot in going
            )
            * self._size
        )
        return max(JOINING_LATENTS, self._size, rows // 4) if going else None

    def _join(self, most: int | None) -> list[LatentSlot]:
        """Read at most so many latents of those who join; return slots for those who are then read."""
        counts = [slot.unread for slot in self.joining]
        if most is not None:
            counts = shares(counts, most, self._size)
        pairs = zip(self.joining, counts, strict=True)
        parts = [(slot, count) for slot, count in pairs if count or not slot.unread]
        if parts:
            read_prompts(self.vae, parts, self.pad_id)
        self._append([slot for slot, _ in parts if slot.error is None and slot.unread])
        new = [slot for slot in self.joining if slot.error is not None or not slot.unread]
        for slot in new:
            if slot.request.picture is not None and slot.error is None:
                self._show(slot, slot.request.picture)
        self.joining = [slot for slot in self.joining if slot not in new]
        return new

    def _show(self, slot: LatentSlot, picture: Tensor) -> None:
        """Write a picture and its prompt, which see each other, into the DiT's KV cache."""
        try:
            (context,) = show(self.dit, [slot.latents], picture.to(self.device)[None])
        except Exception as error:  # As with those who cannot be encoded.
            slot.error = failure("its picture cannot be read", error)
            return
        self._prior_memory.write(slot.start, context.cache.layers)
        slot.cached = slot.shown = len(context.cache)

    def _append(self, joining: Sequence[LatentSlot]) -> None:
        """Append to both KV caches what is read of prompts that are not read to their ends."""
        if not joining:
            return
        parts = [(slot.start, slot.cached, slot.to_append) for slot in joining]
        try:
            self._transport.append(parts)
            self._decode_alone(self._prefixes(parts))
        except Exception as error:  # As with those who cannot be encoded.
            if len(joining) > 1:
                for slot in joining:
                    self._append([slot])
            else:
                joining[0].error = failure("its prompt cannot be read", error)
            return
        for slot in joining:
            slot.cached = slot.decoded = slot.cached + len(slot.to_append)

    # --- one block -------------------------------------------------------------------------

    @undisturbed
    def next_block(self) -> Iterator[TransportStep]:
        """Admit who waits and generate the next block of the slots, yielding after every solver step.

        Where all take as many steps, that is the next block of every slot. Else nobody waits for the longest:
        the iterator ends as ``transport.round_steps`` says, and who is in the middle of a
        block then has it as ``begun`` and goes on with the next call. The steps count those of the block that
        has most steps left; rows that are finished before stay as they are. Each candidate of a block is a
        row.

        Pictures have rounds of their own, after those of texts.

        When the iterator ends, each of :attr:`news` has its new ``block``, or an ``error``: its latents were
        not finite. Who is done stays until it is told to :meth:`leave`; a slot that is ``done`` gets nothing.
        """
        self.admit()
        going = [slot for slot in self.under_way if not slot.done]
        yield from self._round([slot for slot in going if not slot.request.draws], self._transport)
        drawing = [slot for slot in going if slot.request.draws]
        if drawing:
            assert self._painting is not None
            prefixes = [(slot.start, slot.cached, slot.to_append) for slot in drawing]
            self._transport.append(prefixes)
            for slot in drawing:
                slot.cached += len(slot.to_append)
            yield from self._round(drawing, self._painting)

    def _round(self, going: list[LatentSlot], transport: Transport) -> Iterator[TransportStep]:
        """Run a round of slots that are all of texts, or all of pictures; see :meth:`next_block`."""
        noises = {slot: self._noise(slot) if slot.begun is None else slot.begun.latents for slot in going}
        order = [slot for slot in noises if not slot.done]
        if not order:
            return
        # Those with most left first, so that rows under way are the first ones; among equals, equal shapes
        # are neighbours, which attend in one call.
        order.sort(key=lambda slot: (-slot.left, slot.cached + len(slot.to_append), slot.start))
        z = torch.cat([noises[slot] for slot in order])
        rows = _rows_of(order)
        self._going = going = [slot for slot in going if not slot.done]
        original = torch.tensor([row for slot in going for row in rows[slot]], device=self.device)
        evaluations = len(order[0].evaluations)
        before = evaluations - order[0].left
        try:
            for number, (latents, z0) in enumerate(transport.run(order, z), start=1):
                z = latents
                for slot in order:
                    slot.step = len(slot.evaluations) - slot.left + number
                yield TransportStep(before + number, evaluations, latents[original], z0[original])
        finally:
            self._going = []
        finite = z.isfinite().flatten(1).all(1).tolist()
        for slot in order:
            if not any(finite[row] for row in rows[slot]) and slot.error is None:
                settings = slot.request.settings
                slot.error = ColadaError(
                    f"block {slot.blocks} of a request has latents that are not finite, with guidance="
                    f"{settings.guidance}, steps={settings.steps}, solver={settings.solver!r}: expected "
                    "smaller settings, or finite weights"
                )
        ended = [slot for slot in order if slot.error is None and slot.begun is None]
        if transport is self._painting:
            for slot in ended:
                slot.drawn = z[rows[slot].start]
                slot.take([], None)
        else:
            self._finish(ended, z[[row for slot in ended for row in rows[slot]]])

    def _noise(self, slot: LatentSlot) -> Tensor:
        """Return the noises (K, block, C) of a slot's coming block; one that has none fails by itself."""
        settings, width = slot.request.settings, self.vae.config.latent_dim
        shape = (
            slot.request.draws or self._size,
            self.dit.config.img_channels if slot.request.draws else width,
        )
        try:
            noise = slot.request.noise or NOISE_RULES[settings.noise](settings.seed, shape, self.device)
            return widened(torch.stack([noise(slot.blocks, k) for k in range(slot.candidates)]), width)
        except Exception as error:
            slot.error = failure(f"block {slot.blocks} has no noise", error)
            return torch.zeros(slot.candidates, shape[0], width, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the latents are."""
        return self.dit.txt_in.proj.weight.device

    # --- latents to tokens -----------------------------------------------------------------

    def _hidden(self, slots: Sequence[LatentSlot], latents: Tensor) -> Tensor:
        """Return the decoder's hidden states (R * block * patch, dim) of the coming blocks (R, block, C).

        A prefix that the decoder has not seen yet goes along, without being spelled.
        """
        decoder = self.vae.decoder
        prefixes = self._prefixes(
            (slot.start, slot.decoded, slot.latents[slot.decoded : slot.prefix]) for slot in slots
        )
        riding = prefixes.pop() if prefixes and not self._padded else []
        self._decode_alone(prefixes)
        clean = [span for span, _ in riding]
        noisy = []
        for slot in slots:
            end = slot.start + max(slot.decoded, slot.prefix) + slot.candidates * self._size
            noisy.append(Span(slot.start, end, slot.candidates, apart=slot.candidates > 1))
        plan: ViewRows | PaddedRows
        if self._padded:
            length = max(span.seen(self._size) for span in noisy)
            plan = PaddedRows(self._decoder_memory, [], noisy, (), self._size, 0, len(latents), length)
        else:
            plan = ViewRows(self._decoder_memory, clean, noisy, (), self._size)
        rows = torch.cat([*(latents for _, latents in riding), latents.flatten(0, 1)])
        hidden = decoder.unpatch(decoder.run(rows, self._decoder_pass(plan))[plan.clean_rows :])
        for slot in slots:
            slot.decoded = max(slot.decoded, slot.prefix)
        return hidden

    def _refresh_head(self) -> None:
        """Take the vocabulary head's weights as they are now, packed if there is room beside the DiT's."""
        head = self.vae.decoder.final_layer
        layers = [layer for block in blocks_of(self.dit, False) for layer in matrices(block)]
        self._head = product(head, packed=fits_packed([*layers, head]))

    def _logits(self, slots: Sequence[LatentSlot], latents: Tensor) -> Tensor:
        """Return the logits float32 (R, block * patch, V) of the coming blocks (R, block, C)."""
        hidden = self.vae.decoder.final_norm(self._hidden(slots, latents))
        return self._head(hidden).float().unflatten(0, (len(latents), -1))

    def _prefixes(self, parts: Iterable[tuple[int, int, Tensor]]) -> list[list[Piece]]:
        """Return what the decoder's KV caches lack, pass by pass; arguments as :meth:`Transport.append`."""
        all_pieces = [piece for part in parts for piece in pieces(*part, self._size, 1, APPENDED_ROWS)]
        return in_parts(all_pieces, APPENDED_ROWS)

    def _decode_alone(self, prefixes: Iterable[Sequence[Piece]]) -> None:
        """Append prefixes to the decoder's KV caches in passes of their own."""
        for part in prefixes:
            plan = ViewRows(self._decoder_memory, [span for span, _ in part], [], (), self._size)
            self.vae.decoder.run(torch.cat([latents for _, latents in part]), self._decoder_pass(plan))

    def _decoder_pass(self, plan: ViewRows | PaddedRows) -> _DecoderPass:
        config = self.vae.config
        frequencies = kept_frequencies(config.dim // config.num_heads, config.rope_theta, self.device)
        return _DecoderPass(plan, rotary_table(plan.positions, frequencies))

    def _finish(self, slots: Sequence[LatentSlot], z: Tensor) -> None:
        """Decode the finished latents (R, block, C) of these slots and pick their tokens."""
        if not slots:
            return
        logits = self._logits(slots, z)
        likeliest = logits.argmax(-1).cpu()
        # Not finite where any logit is not: a sum reads them once. One wait for all.
        finite = logits.sum((1, 2)).isfinite().tolist()
        for slot, rows in _rows_of(slots).items():
            chosen = self._surest(slot, logits[rows.start : rows.stop])
            row = rows[chosen]
            latents, block, settings = z[row], logits[row], slot.request.settings
            if chosen:
                first = slot.start + slot.decoded
                self._decoder_memory.move(first + chosen * self._size, first, self._size)
            try:
                if settings.temperature == 0 and settings.repetition_penalty == 1 and finite[row]:
                    ids = likeliest[row].tolist()
                else:
                    generator = block_generator(settings.seed, slot.blocks, 1)
                    ids = pick(block, settings, slot.seen, generator).tolist()
            except Exception as error:  # Its own: the others have their tokens.
                slot.error = failure(f"block {slot.blocks} has no tokens", error)
                continue
            slot.take(ids, confidence(block, torch.tensor(ids)) if slot.request.confidence else None)
            slot.block = Block(latents, block if self._keep_logits else None, ids)
            slot.decoded += self._size

    def _surest(self, slot: LatentSlot, logits: Tensor) -> int:
        """Return which of the candidates of a slot's coming block is kept, by their logits (K, n, V)."""
        if len(logits) == 1:
            return 0
        where, _ = slot.pinned_block(self._size)
        return surest(logits, ~where.repeat_interleave(self._patch))

    @plain_torch()
    def guesses(self, step: TransportStep, asking: Collection[LatentSlot]) -> dict[LatentSlot, Guess]:
        """Return how the blocks of slots would read after this step; one that is not finite does not.

        Nothing is appended: the block's own positions of the decoder's memory are written again.
        """
        finite = step.z0.isfinite().flatten(1).all(1).tolist()
        rows_of = {
            slot: rows
            for slot, rows in _rows_of(self._going).items()
            if slot in asking and any(finite[row] for row in rows) and slot.step <= len(slot.evaluations)
        }
        if not rows_of:
            return {}
        if next(iter(rows_of)).request.draws:
            return {
                slot: Guess(
                    slot.step, len(slot.evaluations), [], (), step.latents[rows.start], step.z0[rows.start]
                )
                for slot, rows in rows_of.items()
            }
        z0 = step.z0[[row for rows in rows_of.values() for row in rows]]
        logits = self._logits(list(rows_of), z0)
        guesses = {}
        for slot, spelled in _rows_of(list(rows_of)).items():
            chosen = self._surest(slot, logits[spelled.start : spelled.stop])
            slot_logits, steps = logits[spelled[chosen]], len(slot.evaluations)
            ids, latents = slot_logits.argmax(-1), step.latents[rows_of[slot][chosen]]
            guesses[slot] = Guess(slot.step, steps, ids.tolist(), confidence(slot_logits, ids), latents)
        return guesses


def _rows_of(slots: Sequence[LatentSlot]) -> dict[LatentSlot, range]:
    """Return the rows that the candidates of slots have, one slot after the other."""
    rows, begin = dict[LatentSlot, range](), 0
    for slot in slots:
        rows[slot] = range(begin, begin + slot.candidates)
        begin += slot.candidates
    return rows


@dataclass(frozen=True)
class _DecoderPass:
    """What the decoder's layers share; see :class:`colada.networks.layers.Shared`."""

    plan: ViewRows | PaddedRows
    table: tuple[Tensor, Tensor]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return self.plan.attend(q, k, v, layer)
