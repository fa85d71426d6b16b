"""Requests that join: their prompts are read in parts, so that nobody has to wait for a long one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from colada.errors import ColadaError, failure
from colada.generate.engine.memory import round_up
from colada.generate.engine.slots import LatentSlot, latents_of
from colada.generate.reference import encode
from colada.generate.writer import Request
from colada.networks.layers import History
from colada.networks.vae import TextVAE

JOINING_LATENTS = 256
"""The fewest latents of prompts that are read between two blocks of those under way."""


@dataclass(eq=False)
class Arrival:
    """A request that joins.

    Attributes:
        request: what was asked for.
        start, length: its region of the memory, in latents.
        prefix, tail, blocks: see :func:`~colada.generate.engine.slots.latents_of`.
        total: latents that its prompt takes, whole blocks.
        latents: (L, C), those there are.
        block: latents in one of text.
        history: how many of them are in the DiT's and the decoder's history.
        read: what the encoder has seen.
        shown: positions in the DiT's history of a picture and its prompt.
        error: why it failed.
    """

    request: Request
    start: int
    length: int
    prefix: int
    tail: int
    blocks: int
    total: int
    latents: Tensor
    block: int
    history: int = 0
    read: History | None = None
    shown: int = 0
    error: ColadaError | None = field(default=None)

    @property
    def left(self) -> int:
        """How many latents are still to be encoded."""
        return self.total - len(self.latents)

    @property
    def uncommitted(self) -> Tensor:
        """The latents (L, C) of its prefix, as far as there are any, that the histories lack."""
        return self.latents[self.history : self.prefix]

    def slot(self) -> LatentSlot:
        """Return it as a request under way."""
        where = torch.ones(self.tail, dtype=torch.bool, device=self.latents.device)
        if self.request.hole is not None:
            where[self.request.hole[0] - self.prefix : self.request.hole[1] - self.prefix] = False
        return LatentSlot(
            self.request,
            error=self.error,
            start=self.start,
            length=self.length,
            wanted=self.blocks,
            prefix=self.latents[: self.prefix],
            where=where,
            pinned=self.latents[self.prefix : self.prefix + self.tail],
            history=self.history + self.shown,
            decoded=self.history,
            shown=self.shown,
            shift=0 if self.request.picture is None else self.block - len(self.request.picture),
        )


def arrival(request: Request, start: int, length: int, vae: TextVAE, device: torch.device) -> Arrival:
    """Return a request that has a region of the memory, before any of its prompt is read."""
    size = vae.config.block_size
    prefix, tail, blocks = latents_of(request, vae.config.patch_size, size)
    none = torch.zeros(0, vae.config.latent_dim, device=device)
    total = round_up(prefix + tail, size)
    if request.picture is not None:
        total = round_up(-(-len(request.ids) // vae.config.patch_size), size)
    return Arrival(request, start, length, prefix, tail, blocks, total, none, size)


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


def read(vae: TextVAE, parts: Sequence[tuple[Arrival, int]], pad_id: int) -> None:
    """Encode so many latents more of each prompt, in one pass; one that cannot be encoded has an error."""
    patch = vae.config.patch_size
    prompts: list[Sequence[int]] = []
    histories: list[History | None] = []
    for own, count in parts:
        begin = len(own.latents) * patch
        prompts.append(own.request.ids[begin : begin + count * patch])
        # What is read at once leaves nothing for later.
        whole = count == own.total
        histories.append(None if whole else own.read.copy() if own.read is not None else History())
    try:
        encoded = encode(vae, prompts, pad_id, histories)
    except Exception as error:  # Whatever it is, the others and their regions must not be lost.
        if len(parts) > 1:
            for part in parts:
                read(vae, [part], pad_id)
        else:
            parts[0][0].error = failure("its prompt cannot be encoded", error)
        return
    for (own, _), latents, history in zip(parts, encoded, histories, strict=True):
        own.latents, own.read = torch.cat([own.latents, latents]), history
