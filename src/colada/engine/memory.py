"""Where the histories of all requests live: memory made once, a contiguous region for each request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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

    Attributes:
        keys, values: (layers, positions, K, D) in the compute type.
    """

    def __init__(
        self, layers: int, positions: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, positions, heads, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def forget(self, start: int, length: int) -> None:
        """Set positions to zero, so that masked reads of them are harmless."""
        self.keys[:, start : start + length] = 0
        self.values[:, start : start + length] = 0

    @property
    def bytes(self) -> int:
        """Size of both."""
        return 2 * self.keys.numel() * self.keys.element_size()


@dataclass(frozen=True)
class Span:
    """One block of rows of a pass: what it sees is ``start..end`` of the memory, its own positions last.

    ``history`` positions, those before its own, are its sample's history.
    """

    start: int
    end: int


@dataclass(frozen=True)
class _Group:
    """``count`` spans of one length, evenly spaced in memory: one attention call."""

    first: int  # span of the pass
    count: int
    start: int
    spacing: int
    length: int


def round_up(length: int, multiple: int) -> int:
    """Return the least multiple that is no less than a length."""
    return -(-length // multiple) * multiple


def _grouped(spans: list[Span], offset: int, bucket: int) -> list[_Group]:
    """Join neighbouring spans of one length and even spacing (upwards: strides are never negative)."""
    groups: list[_Group] = []
    for number, span in enumerate(spans, start=offset):
        length = round_up(span.end - span.start, bucket)
        if groups and groups[-1].length == length:
            last = groups[-1]
            spacing = span.start - (last.start + (last.count - 1) * last.spacing)
            if spacing >= 0 and (last.count == 1 or spacing == last.spacing):
                groups[-1] = _Group(last.first, last.count + 1, last.start, spacing, length)
                continue
        groups.append(_Group(number, 1, span.start, 0, length))
    return groups


class Plan:
    """Where the rows of a pass are written and what they see.

    There is no mask, because no row sees part of a span; unless spans are read in buckets, so that
    passes over growing histories keep their shapes, with what is beyond a span's end masked.

    The rows are those of the clean spans, of the noisy spans, and of blocks that see only themselves and
    are written nowhere (the unconditional ones).

    Args:
        memory: of one network.
        clean, noisy: spans; the rows of clean ones are not needed after their keys and values are written.
        alone: blocks that see only themselves.
        size: positions in a block.
        bucket: read spans in multiples of so many positions, which must all be their own sample's.
    """

    def __init__(
        self,
        memory: Memory,
        clean: list[Span],
        noisy: list[Span],
        alone: int,
        size: int,
        bucket: int | None = None,
    ) -> None:
        device = memory.keys.device
        self.memory, self.size, self.alone = memory, size, alone
        self.clean_rows = len(clean) * size
        self.written_rows = (len(clean) + len(noisy)) * size
        own = [range(span.end - size, span.end) for span in [*clean, *noisy]]
        self.slots = torch.tensor([slot for part in own for slot in part], device=device)
        starts = [span.end - span.start - size for span in [*clean, *noisy]] + [0] * alone
        self.positions = torch.tensor(
            [start + place for start in starts for place in range(size)], device=device
        )
        self._clean_groups = _grouped(clean, 0, bucket or 1)
        self._groups = _grouped(noisy, len(clean), bucket or 1)
        self.masks: list[Tensor] = []  # of each group, (count, 1, 1, length); none where all is seen
        if bucket is not None:
            spans = [*clean, *noisy]
            for group in [*self._clean_groups, *self._groups]:
                members = spans[group.first : group.first + group.count]
                seen = torch.tensor([span.end - span.start for span in members], device=device)
                self.masks.append((torch.arange(group.length, device=device) < seen[:, None])[:, None, None])
        # Rows of each group, all of them and without the clean ones; the last are the blocks alone.
        alone_rows = [alone * size] if alone else []
        self._late_rows = [group.count * size for group in self._groups] + alone_rows
        self._rows = [group.count * size for group in self._clean_groups] + self._late_rows
        self._views: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.positions)

    @property
    def shape(self) -> tuple[object, ...]:
        """What passes must share to be replayed one for another: all but what :meth:`take` takes."""
        return self.clean_rows, self.alone, self.size, tuple(self._clean_groups), tuple(self._groups)

    def take(self, other: Plan) -> None:
        """Take over what another plan of the same shape writes to and sees, in place."""
        self.slots.copy_(other.slots)
        for mask, theirs in zip(self.masks, other.masks, strict=True):
            mask.copy_(theirs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, kept: int = 0) -> Tensor:
        """Write keys and values (N, K, D) of one layer to memory, and attend.

        Args:
            q: of the rows from ``kept`` on.
            kept: 0, or ``clean_rows`` where the clean ones are not needed any more.

        Returns: (N - kept, K, D).
        """
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        keys.index_copy_(0, self.slots, k[: self.written_rows])
        values.index_copy_(0, self.slots, v[: self.written_rows])
        if kept == len(self):
            return q
        if layer not in self._views:
            groups = [*self._clean_groups, *self._groups]
            self._views[layer] = [(self._seen(keys, group), self._seen(values, group)) for group in groups]
        outputs = []
        parts = q.split(self._late_rows if kept else self._rows)
        first = len(self._clean_groups) if kept else 0
        for number, (past_keys, past_values) in enumerate(self._views[layer][first:]):
            mask = self.masks[first + number] if self.masks else None
            outputs.append(self._attention(parts[number], past_keys, past_values, mask))
        if self.alone:
            new = (x[self.written_rows :].unflatten(0, (self.alone, self.size)) for x in (k, v))
            outputs.append(self._attention(parts[-1], *(x.transpose(1, 2) for x in new)))
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

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q = q.view(-1, self.size, *q.shape[1:])
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1)
