"""Where the KV caches of all requests live: memory made once, a contiguous region for each request."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from colada.device import on_device
from colada.networks.packing import block_causal


class Regions:
    """Hands out contiguous regions of so many latents, first fit.

    Args:
        capacity: latents in all.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = [(0, capacity)] if capacity else []

    @property
    def free(self) -> int:
        """How many latents are in no region."""
        return sum(length for _, length in self._free)

    def take(self, length: int) -> int | None:
        """Return the start of a region of this length, or None while there is none."""
        for number, (start, room) in enumerate(self._free):
            if room >= length:
                rest = [(start + length, room - length)] if room > length else []
                self._free[number : number + 1] = rest
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Make a region free again, joined with its free neighbours."""
        merged: list[tuple[int, int]] = []
        for begin, room in sorted([*self._free, (start, length)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = merged[-1][0], merged[-1][1] + room
            else:
                merged.append((begin, room))
        self._free = merged


class Memory:
    """Keys and values by position, rotated and normalised as they are used.

    Args:
        spare: positions beyond the others, for what :class:`PaddedRows` writes for nobody.

    Attributes:
        keys, values: (layers, positions + spare, K, D) in the compute type.
        positions: where the spare ones begin.
    """

    def __init__(
        self,
        layers: int,
        positions: int,
        heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        spare: int = 0,
    ) -> None:
        shape = (layers, positions + spare, heads, width)
        self.positions = positions
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, start: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write keys and values (L, K, D) of each layer from a position on."""
        for layer, (keys, values) in enumerate(layers):
            self.keys[layer, start : start + len(keys)] = keys
            self.values[layer, start : start + len(values)] = values

    def move(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of so many positions to others, in all layers."""
        for store in (self.keys, self.values):
            store[:, target : target + count] = store[:, source : source + count].clone()

    @property
    def bytes(self) -> int:
        """Size of both."""
        return 2 * self.keys.numel() * self.keys.element_size()


@dataclass(frozen=True)
class Span:
    """Neighbouring blocks of one sample in a pass: what they see is ``start..end`` of the memory.

    Their own positions, ``blocks`` blocks, are the last of it; those before are the sample's KV cache. Blocks
    ``apart`` are candidates for one place in it: each sees that and itself.

    Rotary positions are those in the memory plus ``shift``: a picture has one of these, and many of those.
    """

    start: int
    end: int
    blocks: int = 1
    apart: bool = False
    shift: int = 0

    def cached(self, size: int) -> int:
        """Return how many positions come before its blocks of so many."""
        return self.end - self.start - self.blocks * size

    def seen(self, size: int) -> int:
        """Return the positions that one of its blocks sees at most."""
        return self.cached(size) + (1 if self.apart else self.blocks) * size


Piece = tuple[Span, Tensor]
"""A span and its latents (L, C)."""


def pieces(
    start: int, begin: int, latents: Tensor, size: int, patch: int, most: int, shift: int = 0
) -> list[Piece]:
    """Return the spans that write latents (L, C) of a sample, whole blocks, each with its own.

    Args:
        start: latents before the sample's first in the memory.
        begin: latents of the sample that are written already.
        size: latents in a block.
        patch: latents in a position.
        most: latents in a span, if a block is no longer.
        shift: of rotary positions.
    """
    parts, done = [], begin
    for part in latents.split(max(1, most // size) * size) if len(latents) else ():
        done += len(part)
        parts.append((Span(start // patch, (start + done) // patch, len(part) // size, shift=shift), part))
    return parts


def in_parts(some: Sequence[Piece], most: int) -> list[list[Piece]]:
    """Return pieces in passes of at most so many latents, if a piece is no longer: none before its past."""
    parts: list[list[Piece]] = []
    for piece in sorted(some, key=lambda piece: (piece[0].end - piece[0].start, piece[0].start)):
        if parts and sum(len(latents) for _, latents in [*parts[-1], piece]) <= most:
            parts[-1].append(piece)
        else:
            parts.append([piece])
    return parts


@dataclass(frozen=True)
class _Group:
    """``count`` spans of one length and kind of blocks, evenly spaced in memory: one attention call."""

    count: int
    start: int
    spacing: int
    length: int
    blocks: int
    apart: bool


def round_up(length: int, multiple: int) -> int:
    """Return the least multiple that is no less than a length."""
    return -(-length // multiple) * multiple


def doubled_to(count: int, unit: int = 1) -> int:
    """Return the least of unit, 2 unit, 4 unit, ... that is no less than a count."""
    return unit << max(0, (-(-count // unit) - 1).bit_length())


def _grouped(spans: Sequence[Span]) -> list[_Group]:
    """Join neighbouring spans of one shape and even spacing (upwards: strides are never negative)."""
    groups: list[_Group] = []
    for span in spans:
        length = span.end - span.start
        last = groups[-1] if groups else None
        if last and (last.length, last.blocks, last.apart) == (length, span.blocks, span.apart):
            spacing = span.start - (last.start + (last.count - 1) * last.spacing)
            if spacing >= 0 and (last.count == 1 or spacing == last.spacing):
                groups[-1] = replace(last, count=last.count + 1, spacing=spacing)
                continue
        groups.append(_Group(1, span.start, 0, length, span.blocks, span.apart))
    return groups


class PassRows:
    """The rows of a pass: where they are written, and their positions.

    They are those of the clean spans, of the noisy spans, and of blocks that see only themselves, or whose
    latents do, and are written nowhere (the unconditional ones).

    Args:
        memory: of one network.
        clean, noisy: spans; the rows of clean ones are not needed after their keys and values are written.
        alone: of each block that sees only itself, whether each of its positions does.
        size: positions in a block.
        pictures: blocks are pictures, each of which has one rotary position.

    Attributes:
        apart: bool (alone, 1, 1, 1), the same for tensors; None where no position sees only itself.
        slots: int64, where each written row is in the memory.
        positions: int64 (N,), of each row in its sample.
        clean_rows, written_rows: how many rows, the first ones, are clean, and are written.
    """

    def __init__(
        self,
        memory: Memory,
        clean: Sequence[Span],
        noisy: Sequence[Span],
        alone: Sequence[bool],
        size: int,
        pictures: bool = False,
    ) -> None:
        device = memory.keys.device
        self.memory, self.size, self.alone = memory, size, len(alone)
        self.apart = on_device(list(alone), device, torch.bool)[:, None, None, None] if any(alone) else None
        self._all_apart = all(alone)
        self.clean_rows = sum(span.blocks for span in clean) * size
        self.written_rows = self.clean_rows + sum(span.blocks for span in noisy) * size
        slots: list[int] = []
        positions: list[int] = []
        for span in [*clean, *noisy]:
            before, shift = span.cached(size), span.shift
            slots += range(span.start + before, span.end)
            if pictures:
                positions += [before + shift] * size
            elif span.apart:
                positions += [*range(before + shift, before + shift + size)] * span.blocks
            else:
                positions += range(before + shift, span.end - span.start + shift)
        self.slots = on_device(slots, device)
        own = [0] * size if pictures else [*range(size)]
        self.positions = on_device(positions + own * self.alone, device)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.positions)

    def write(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write keys and values (N, K, D) of one layer; return that layer's memory."""
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        keys.index_copy_(0, self.slots, k[: self.written_rows])
        values.index_copy_(0, self.slots, v[: self.written_rows])
        return keys, values

    def see_themselves(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in the blocks alone: the last rows of q, k, v (N, K, D). Who sees itself gets its value."""
        rows = self.alone * self.size
        if self._all_apart:
            return v[len(v) - rows :]
        q, k, v = (x[len(x) - rows :].unflatten(0, (self.alone, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        if self.apart is not None:
            out = torch.where(self.apart, v, out)
        return out.transpose(1, 2).flatten(0, 1)


class ViewRows(PassRows):
    """Rows that see their spans as views of the memory: nothing is copied, one attention call for a group.

    Spans of one block need no mask, because they see all of their span; of those of several, the mask is
    over their own positions, and all of it only as large as one span and what it sees.
    """

    def __init__(
        self,
        memory: Memory,
        clean: Sequence[Span],
        noisy: Sequence[Span],
        alone: Sequence[bool],
        size: int,
        pictures: bool = False,
    ) -> None:
        super().__init__(memory, clean, noisy, alone, size, pictures)
        self._clean_groups, self._groups = _grouped(clean), _grouped(noisy)
        self._views: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._masks = [self._mask(group) for group in [*self._clean_groups, *self._groups]]

    def _mask(self, group: _Group) -> Tensor | None:
        """Return what is added to the scores of a group, 0 or -inf, (own, length); None where all is seen."""
        if group.blocks == 1:
            return None
        count = group.blocks * self.size
        seen = block_causal(count, count, self.size)
        hidden = ~(seen & seen.T if group.apart else seen).to(self.memory.keys.device)
        mask = self.memory.keys.new_zeros(count, group.length)
        mask[:, group.length - count :].masked_fill_(hidden, -torch.inf)
        return mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, silent: int = 0) -> Tensor:
        """Write keys and values (N, K, D) of one layer to memory, and attend.

        Args:
            q: of the rows from ``silent`` on.
            silent: 0, or ``clean_rows`` where the clean ones are not needed any more.

        Returns: (N - kept, K, D).
        """
        keys, values = self.write(k, v, layer)
        if silent == len(self):
            return q
        groups = [*self._clean_groups, *self._groups]
        if layer not in self._views:
            self._views[layer] = [(self._seen(keys, group), self._seen(values, group)) for group in groups]
        outputs = []
        begin = 0
        first = len(self._clean_groups) if silent else 0
        seen = zip(groups[first:], self._views[layer][first:], self._masks[first:], strict=True)
        for group, (past_keys, past_values), mask in seen:
            end = begin + group.count * group.blocks * self.size
            queries = q[begin:end].unflatten(0, (group.count, -1)).transpose(1, 2)
            out = F.scaled_dot_product_attention(queries, past_keys, past_values, attn_mask=mask)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            begin = end
        if self.alone:
            outputs.append(self.see_themselves(q, k, v))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def _seen(memory: Tensor, group: _Group) -> Tensor:
        """Return what a group sees as a view (count, K, length, D) of one layer's memory."""
        position, head, channel = memory.stride()
        return memory.as_strided(
            (group.count, memory.shape[1], group.length, memory.shape[2]),
            (group.spacing * position, head, position, channel),
            memory.storage_offset() + group.start * position,
        )


class PaddedRows(PassRows):
    """Rows that all attend in one call a layer, in a pass whose shape hardly ever changes.

    Spans, of one block each or of blocks apart, are padded to a number of blocks and a length; where these
    are in the memory is a table of indices, whose entries may change while its shape does not. What pads it
    writes to the spare positions of the memory and reads those that nobody writes to.

    Args:
        memory: with ``size + 1`` spare positions.
        clean, noisy, alone, size: as :class:`PassRows`.
        clean_blocks, noisy_blocks: how many to pad to.
        length: that a block sees at most, what all are padded to.
    """

    def __init__(
        self,
        memory: Memory,
        clean: Sequence[Span],
        noisy: Sequence[Span],
        alone: Sequence[bool],
        size: int,
        clean_blocks: int,
        noisy_blocks: int,
        length: int,
    ) -> None:
        spare = memory.positions
        nobody = Span(spare, spare + size)
        clean = [*clean, *[nobody] * (clean_blocks - len(clean))]
        noisy = [*noisy, *[nobody] * (noisy_blocks - sum(span.blocks for span in noisy))]
        super().__init__(memory, clean, noisy, alone, size)
        device = memory.keys.device
        if self.alone and self.apart is None:  # A pass is replayed for those who are guided against latents.
            self.apart = torch.zeros(self.alone, 1, 1, 1, dtype=torch.bool, device=device)
        self._all_apart = False
        # Of each block: where its KV cache begins, where it ends, and how far after it the block is.
        places = [
            (span.start, span.start + span.cached(size), k * size)
            for span in [*clean, *noisy]
            for k in range(span.blocks)
        ]
        first, begin, gap = on_device([[*place] for place in places], device).T[:, :, None]
        index = first + torch.arange(length, device=device)
        index, last = index + gap * (index >= begin), begin + gap + size
        self.mask = (index < last)[:, None, None]
        self.index = index.masked_fill(index >= last, spare + size)

    @property
    def shape(self) -> tuple[int, ...]:
        """What passes must share to be replayed one for another: all but what :meth:`take` takes."""
        return self.clean_rows, self.written_rows, self.alone, self.size, self.index.shape[1]

    def copy(self) -> PaddedRows:
        """Return a plan of the same rows with tensors of its own."""
        plan = copy(self)
        plan.slots, plan.positions = self.slots.clone(), self.positions.clone()
        plan.index, plan.mask = self.index.clone(), self.mask.clone()
        plan.apart = None if self.apart is None else self.apart.clone()
        return plan

    def take(self, other: PaddedRows) -> None:
        """Take over what another plan of the same shape writes to and sees, in place."""
        self.slots.copy_(other.slots)
        self.index.copy_(other.index)
        self.mask.copy_(other.mask)
        if self.apart is not None and other.apart is not None:
            self.apart.copy_(other.apart)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, silent: int = 0) -> Tensor:
        """Write keys and values of one layer to memory, and attend; see :meth:`Plan.attend`."""
        keys, values = self.write(k, v, layer)
        if silent == len(self):
            return q
        first = silent // self.size
        index, mask = self.index[first:], self.mask[first:]
        past_keys, past_values = (
            x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
            for x in (keys, values)
        )
        queries = q[: self.written_rows - silent].unflatten(0, (len(index), -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, past_keys, past_values, attn_mask=mask)
        out = out.transpose(1, 2).flatten(0, 1)
        return torch.cat([out, self.see_themselves(q, k, v)]) if self.alone else out
