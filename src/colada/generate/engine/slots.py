"""How far a request is, and where in the memory of the engine.

Prompts of those who join are read in parts, so that nobody has to wait for a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from colada.errors import failure
from colada.flow import Evaluation, evaluations_of
from colada.generate.engine.memory import round_up
from colada.generate.reference import Block, encode
from colada.generate.writer import Request, Slot
from colada.networks.layers import KVCache
from colada.networks.vae import TextVAE

JOINING_LATENTS = 256
"""The fewest latents of prompts that are read between two blocks of those under way."""


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
    """Return how many latents of KV cache a request takes, whole blocks; arguments as :func:`latents_of`."""
    prefix, _, blocks = latents_of(request, patch, size)
    if request.draws:
        return room_for(prefix + request.draws, 1, size)
    if request.picture is not None:
        prefix = round_up(-(-len(request.ids) // patch), size) + len(request.picture)
    return room_for(prefix + blocks * size, request.settings.candidates, size)


def room_for(latents: int, candidates: int, size: int) -> int:
    """Return the room of so many latents: whole blocks of ``size``, and one for each further candidate."""
    return round_up(latents, size) + (candidates - 1) * size


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
    """A request that joins the engine or is under way in it.

    Attributes:
        start, length: its region of the memory, in latents.
        prefix, tail, block_count: see :func:`latents_of`.
        where: bool (tail,), which of the latents still to come are pinned.
        prompt: how many latents its prompt takes, whole blocks.
        latents: (L, C), those of them that are read.
        read: what the encoder has seen, where that is needed.
        cached, decoded: how many latents are in the DiT's and in the decoder's KV cache.
        block: the last that was generated.
        begun: the coming block, where a round has ended in the middle of it.
        step: how many of its evaluations are done, in a round; those beyond its own change nothing.
        shown: positions of the DiT's KV cache that are of a picture and its prompt; the decoder has none.
        shift: by how much later ones' rotary positions are beyond those in the memory.
    """

    start: int
    length: int
    prefix: int
    tail: int
    block_count: int
    where: Tensor
    prompt: int
    latents: Tensor
    read: KVCache | None = None
    cached: int = 0
    decoded: int = 0
    block: Block | None = None
    begun: Begun | None = None
    step: int = 0
    shown: int = 0
    shift: int = 0

    @classmethod
    def of(cls, request: Request, start: int, length: int, vae: TextVAE, device: torch.device) -> Self:
        """Return a request that has a region of the memory, before any of its prompt is read."""
        size, none = vae.config.block_size, torch.zeros(0, vae.config.latent_dim, device=device)
        prefix, tail, block_count = latents_of(request, vae.config.patch_size, size)
        where = torch.ones(tail, dtype=torch.bool, device=device)
        if request.hole is not None:
            where[request.hole[0] - prefix : request.hole[1] - prefix] = False
        prompt, shift = round_up(prefix + tail, size), 0
        if request.picture is not None:
            prompt = round_up(-(-len(request.ids) // vae.config.patch_size), size)
            shift = size - len(request.picture)
        return cls(
            request,
            start=start,
            length=length,
            prefix=prefix,
            tail=tail,
            block_count=block_count,
            where=where,
            prompt=prompt,
            latents=none,
            shift=shift,
        )

    @property
    def unread(self) -> int:
        """How many latents of its prompt are still to be encoded."""
        return self.prompt - len(self.latents)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """All that a block takes."""
        settings = self.request.settings
        return evaluations_of(settings.solver, settings.schedule, settings.steps, settings.early_end)

    @property
    def candidates(self) -> int:
        """How many times each block is drawn: K."""
        return self.request.settings.candidates

    @property
    def left(self) -> int:
        """How many evaluations the coming block still takes."""
        return len(self.evaluations) - (0 if self.begun is None else self.begun.done)

    @property
    def to_append(self) -> Tensor:
        """The finished latents (L, C) that the DiT's KV cache lacks."""
        if self.block is None:
            return self.latents[self.cached - self.shown : self.prefix]
        written = self.shown + self.prefix + (self.blocks - 1) * len(self.block.latents)
        return self.block.latents[self.cached - written :]

    @property
    def written(self) -> Tensor:
        """The latents (L, C) of the last block; before the first, of the prompt's whole blocks too."""
        assert self.block is not None
        prompt = self.latents[: self.prefix if self.blocks == 1 else 0]
        return torch.cat([prompt, self.block.latents])

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self.error is not None or self.blocks == self.block_count

    def pinned_block(self, size: int) -> tuple[Tensor, Tensor]:
        """Return which latents of the coming block are pinned (size,), and to what (size, C)."""
        begin = self.blocks * size
        where = self.where[begin : begin + size]
        pinned = self.latents[self.prefix + begin : self.prefix + begin + len(where)]
        return F.pad(where, (0, size - len(where))), F.pad(pinned, (0, 0, 0, size - len(where)))


# --- those who join ----------------------------------------------------------------------------


def shares(lefts: Sequence[int], most: int, size: int) -> list[int]:
    """Divide ``most`` latents, in whole blocks of ``size``, among prompts with so many left each.

    In order, one that can be finished is; any other takes half of what is left, or all where nobody follows,
    so that the first always goes on and short ones behind it need not wait for its end.
    """
    parts = []
    for number, left in enumerate(lefts, start=1):
        part = left
        if left > most:
            part = max(size, most // (1 if number == len(lefts) else 2) // size * size)
            part = part if part <= most else 0
        parts.append(part)
        most -= part
    return parts


def read_prompts(vae: TextVAE, parts: Sequence[tuple[LatentSlot, int]], pad_id: int) -> None:
    """Encode so many latents more of each prompt, in one pass; one that cannot be encoded has an error."""
    patch = vae.config.patch_size
    prompts: list[Sequence[int]] = []
    caches: list[KVCache | None] = []
    for slot, count in parts:
        begin = len(slot.latents) * patch
        prompts.append(slot.request.ids[begin : begin + count * patch])
        # What is read at once leaves nothing for later.
        whole = count == slot.prompt
        caches.append(None if whole else slot.read.copy() if slot.read is not None else KVCache())
    try:
        encoded = encode(vae, prompts, pad_id, caches)
    except Exception as error:  # Whatever it is, the others and their regions must not be lost.
        if len(parts) > 1:
            for part in parts:
                read_prompts(vae, [part], pad_id)
        else:
            parts[0][0].error = failure("its prompt cannot be encoded", error)
        return
    for (slot, _), latents, cache in zip(parts, encoded, caches, strict=True):
        slot.latents, slot.read = torch.cat([slot.latents, latents]), cache
