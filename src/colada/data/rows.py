"""Token streams to fixed-length training rows, each a pure function of (seed, row number).

Resuming therefore needs the step alone, and the order of asking, the size of a batch and the
number of ranks change no row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from colada.data.order import Permutation, turn_of
from colada.data.stream import TokenStream
from colada.errors import ColadaError

FILLING = -1  # The sample number of what only fills a row up.

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowTensors:
    """Tensors (B, ...), others of these, or None, that belong to the rows of a batch."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return them with a function applied to each."""
        values = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        mapped = {
            name: value.map(function) if isinstance(value, RowTensors) else function(value)
            for name, value in values.items()
        }
        return replace(self, **mapped)

    def to(self, device: torch.device) -> Self:
        """Return them on a device."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def rows(self, begin: int, end: int, stride: int = 1) -> Self:
        """Return those of some rows, or of one of ``stride`` each."""
        return self.map(lambda x: x[begin:end:stride])


@dataclass(frozen=True)
class Batch(RowTensors):
    """Rows of tokens.

    Attributes:
        ids: (B, L) int64.
        sample: (B, L) int64, which sample of its row a token belongs to, from 0, or ``FILLING``; tokens
            see their own sample only. None: each row is one sample.
        trained: bool (B, L), tokens whose latents have a flow loss; the others are a prompt or
            filling. None: all.
    """

    ids: Tensor
    sample: Tensor | None = None
    trained: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)


class Rows(Protocol):
    """Rows of ``length`` tokens by number, without end; ``per_epoch`` of them use all the text once."""

    @property
    def length(self) -> int:
        """Tokens a row."""

    @property
    def per_epoch(self) -> int:
        """Rows that use the text once."""

    def row(self, number: int) -> Batch:
        """Return one row, as a batch of one."""

    def describe(self, number: int) -> str:
        """Return where a row is from, for errors."""


def batch(rows: Rows, numbers: Sequence[int]) -> Batch:
    """Return some rows as one batch, in the order of their numbers."""
    return joined([rows.row(number) for number in numbers])


def joined(parts: Sequence[Batch]) -> Batch:
    """Return batches of equally long rows as one, in their order."""

    def together(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if all(value is None for value in values) else torch.cat(values)

    return Batch(torch.cat([part.ids for part in parts]), together("sample"), together("trained"))


class StreamRows:
    """Rows cut from all samples of a stream end to end; tokens see across the end tokens between samples.

    Each epoch cuts the stream into ``per_epoch = max(1, (ids - length) // length)``
    windows from a random offset and permutes them. A share ``align`` of them is
    moved forward to the first sample that starts at or after the window's start
    (where that would run past the end of the stream, to the last start that
    fits), so that the row begins with a sample's first token.
    """

    def __init__(
        self, stream: TokenStream, length: int, *, seed: int, align: float = 0.5, name: str = "stream"
    ) -> None:
        """Prepare rows of ``length`` ids; ``name`` names the stream in errors.

        Raises ColadaError when the stream has fewer than ``length + 1`` ids.
        """
        if len(stream) < length + 1:
            raise ColadaError(
                f"{name} has {len(stream)} ids, expected at least {length + 1} for rows of {length}"
            )
        self.length = length
        self.per_epoch = max(1, (len(stream) - length) // length)
        self._stream, self._seed, self._align, self._name = stream, seed, align, name
        self._starts = stream.starts[stream.starts <= len(stream) - length]  # those with room for a row

    def row(self, number: int) -> Batch:
        """Return a row, a copy: ids (1, length)."""
        return Batch(torch.from_numpy(self._stream.read(self._begin(number), self.length))[None])

    def describe(self, number: int) -> str:
        """Return the row's ids within the stream, and the origin of the sample it begins in."""
        begin = self._begin(number)
        sample = int(np.searchsorted(self._stream.starts, begin, side="right")) - 1
        origin = self._stream.describe(sample)
        return f"{self._name}, tokens {begin} to {begin + self.length - 1}, from {origin}"

    def _begin(self, number: int) -> int:
        """Return where a row begins in the stream."""
        epoch, index = divmod(number, self.per_epoch)
        # Below two lengths the only window has less than a length of room to move.
        room = len(self._stream) - self.per_epoch * self.length
        offset = _offset(self._seed, epoch, min(self.length, room + 1))
        begin = offset + self.length * Permutation(self.per_epoch, self._seed, epoch)[index]
        aligned = np.random.default_rng((self._seed, epoch, index)).random() < self._align
        if aligned and len(self._starts):
            at = min(int(np.searchsorted(self._starts, begin)), len(self._starts) - 1)
            begin = int(self._starts[at])
        return begin


@lru_cache(maxsize=1024)
def _offset(seed: int, epoch: int, below: int) -> int:
    """Return where the first window of an epoch begins."""
    return int(np.random.default_rng((seed, epoch)).integers(0, below))


class SampleRows:
    """Rows of whole samples, which do not see each other.

    Each sample is filled up with padding to whole blocks of the DiT. This padding belongs to it
    and is trained, which teaches the model to fill the block after the end token. What is then left
    of a row belongs to no sample and has no loss.

    A document longer than a row is cut into rows; a sample with a prompt keeps its first ``length``
    tokens, and is left out if no answer is among them. Samples are packed once, best fit decreasing in a
    random order of equals; each epoch permutes the rows.
    """

    def __init__(
        self,
        stream: TokenStream,
        length: int,
        block_tokens: int,
        *,
        seed: int,
        pad_id: int,
        name: str = "stream",
    ) -> None:
        """Pack rows of ``length`` ids, a multiple of ``block_tokens``; ``name`` names the stream in errors.

        Raises ColadaError when ``length`` is not whole blocks, or no sample is left to train on.
        """
        if length % block_tokens:
            raise ColadaError(f"{name}: rows of {length} ids, expected whole blocks of {block_tokens}")
        self.length = length
        self._stream, self._seed, self._name = stream, seed, name
        self._pad, self._block = pad_id, block_tokens
        begins, sizes, prompts, origins = _pieces(stream, length)
        if not len(begins):
            samples = len(stream.starts)
            why = (
                f"the prompts of its {samples} samples leave no room for answers" if samples else "no samples"
            )
            raise ColadaError(f"{name} has nothing to train on in rows of {length}: {why}")
        blocks = -(-sizes // block_tokens)
        order = np.random.default_rng(seed).permutation(len(blocks))
        row_of = np.empty(len(blocks), np.int64)
        row_of[order] = pack(blocks[order], length // block_tokens)
        by_row = np.argsort(row_of, kind="stable")
        self.per_epoch = int(row_of.max()) + 1
        self._first = np.searchsorted(row_of[by_row], np.arange(self.per_epoch + 1))
        self._begins, self._sizes = begins[by_row], sizes[by_row]
        self._prompts, self._origins = prompts[by_row], origins[by_row]

    def row(self, number: int) -> Batch:
        """Return a row, a copy: ids, sample and trained (1, length)."""
        ids = np.full(self.length, self._pad, np.int64)
        sample = np.full(self.length, FILLING, np.int64)
        trained = np.zeros(self.length, np.bool_)
        at = 0
        for index, piece in enumerate(self._in_row(number)):
            size, prompt = int(self._sizes[piece]), int(self._prompts[piece])
            end = at + -(-size // self._block) * self._block
            ids[at : at + size] = self._stream.read(int(self._begins[piece]), size)
            sample[at:end] = index
            trained[at + prompt : end] = True
            at = end
        tensors = (torch.from_numpy(x)[None] for x in (ids, sample, trained))
        return Batch(*tensors)

    def describe(self, number: int) -> str:
        """Return the origin of the row's first sample."""
        pieces = self._in_row(number)
        origin = self._stream.describe(int(self._origins[pieces[0]]))
        return f"{self._name}, {len(pieces)} samples from {origin}"

    def _in_row(self, number: int) -> range:
        epoch, index = divmod(number, self.per_epoch)
        row = Permutation(self.per_epoch, self._seed, epoch)[index]
        return range(int(self._first[row]), int(self._first[row + 1]))


class SingleRows:
    """Rows of one sample each: what follows from a sample as a whole needs it alone.

    A number is a group of samples that follow each other, such as the answers to one prompt, and has a row
    for each. A sample is filled up with padding to whole blocks, which is trained; what is then left of its
    row belongs to none. Groups with a prompt that leaves no ``room`` for an answer of so many ids are left
    out; each epoch permutes the others.
    """

    def __init__(
        self,
        stream: TokenStream,
        length: int,
        block_tokens: int,
        *,
        seed: int,
        pad_id: int,
        name: str = "stream",
        group: int = 1,
        room: int = 1,
    ) -> None:
        """Prepare rows of ``length`` ids, a multiple of ``block_tokens``; ``name`` is for errors.

        Raises ColadaError when ``length`` is not whole blocks, or no sample is left.
        """
        if length % block_tokens:
            raise ColadaError(f"{name}: rows of {length} ids, expected whole blocks of {block_tokens}")
        samples = len(stream.starts)
        prompts = np.zeros(samples, np.int64) if stream.prompts is None else np.asarray(stream.prompts)
        fits = (prompts + room <= length).reshape(-1, group).all(1)
        self._groups = np.flatnonzero(fits)
        if not len(self._groups):
            raise ColadaError(
                f"{name}: none of {samples} prompts leaves room for an answer in {length} tokens"
            )
        self.length, self.per_epoch = length, len(self._groups)
        self._stream, self._seed, self._name, self._group = stream, seed, name, group
        self._pad, self._block, self._prompts = pad_id, block_tokens, prompts
        self._sizes = np.minimum(np.diff(stream.starts, append=len(stream)), length)

    def row(self, number: int) -> Batch:
        """Return the rows of a group, copies: ids, sample and trained (group, length)."""
        shape = (self._group, self.length)
        ids, sample = np.full(shape, self._pad, np.int64), np.full(shape, FILLING, np.int64)
        trained = np.zeros(shape, np.bool_)
        for row, at in enumerate(self._samples(number)):
            size = int(self._sizes[at])
            end = -(-size // self._block) * self._block
            ids[row, :size] = self._stream.read(int(self._stream.starts[at]), size)
            sample[row, :end] = 0
            trained[row, int(self._prompts[at]) : end] = True
        return Batch(*(torch.from_numpy(x) for x in (ids, sample, trained)))

    def describe(self, number: int) -> str:
        """Return the origin of the group's first sample."""
        return f"{self._name}, {self._stream.describe(self._samples(number)[0])}"

    def _samples(self, number: int) -> range:
        epoch, index = divmod(number, self.per_epoch)
        first = int(self._groups[Permutation(self.per_epoch, self._seed, epoch)[index]]) * self._group
        return range(first, first + self._group)


def _pieces(stream: TokenStream, length: int) -> tuple[_Ids, _Ids, _Ids, _Ids]:
    """Return what of a stream goes into rows: begin, size, prompt and sample number of each piece."""
    starts = stream.starts
    sizes = np.diff(starts, append=len(stream))
    prompts = np.zeros_like(sizes) if stream.prompts is None else np.asarray(stream.prompts)
    count = np.where(prompts > 0, (prompts < length).astype(np.int64), -(-sizes // length))
    origins = np.repeat(np.arange(len(starts)), count)
    offsets = length * (np.arange(len(origins)) - np.repeat(np.cumsum(count) - count, count))
    return starts[origins] + offsets, np.minimum(sizes[origins] - offsets, length), prompts[origins], origins


def pack(sizes: _Ids, capacity: int) -> _Ids:
    """Return the bin of each item, from 0: best fit decreasing, equal sizes in the order given.

    Args:
        sizes: (N,), 1 to ``capacity``.
    """
    bins = np.empty(len(sizes), np.int64)
    number, room = 0, [np.empty(0, np.int64) for _ in range(capacity + 1)]  # bins by the room they have left
    by_size = np.argsort(-sizes, kind="stable")
    bounds = np.searchsorted(-sizes[by_size], np.arange(-capacity, 1))
    for size in range(capacity, 0, -1):
        waiting = by_size[bounds[capacity - size] : bounds[capacity - size + 1]]
        for least_room in (*(n for n in range(size, capacity) if len(room[n])), capacity):
            if not len(waiting):
                break
            # The fullest bin with room takes as many as it holds: after each it is the fullest still.
            each = least_room // size
            used = -(-len(waiting) // each)
            if least_room == capacity:  # New bins.
                room[least_room] = np.arange(number, number + used)
                number += used
            chosen, room[least_room] = room[least_room][:used], room[least_room][used:]
            placed = min(len(waiting), len(chosen) * each)
            bins[waiting[:placed]] = np.repeat(chosen, each)[:placed]
            waiting = waiting[placed:]
            full, over = divmod(placed, each)
            room[least_room - each * size] = np.append(room[least_room - each * size], chosen[:full])
            room[least_room - over * size] = np.append(room[least_room - over * size], chosen[full:])
    return bins


class MixedRows:
    """Rows of several sources, each with its share: exact over every ``order.MIX_PERIOD`` rows, shuffled.

    The rows of one source are taken in turn, none left out.
    """

    def __init__(self, parts: Sequence[tuple[Rows, float]], seed: int) -> None:
        """Mix (rows, weight) pairs of one length."""
        self._parts = [rows for rows, _ in parts]
        self._seed = seed
        self._weights = tuple(weight for _, weight in parts)
        self.length = self._parts[0].length
        self.per_epoch = sum(rows.per_epoch for rows in self._parts)

    def row(self, number: int) -> Batch:
        """Return a row of the source whose turn it is."""
        rows, turn = self._of(number)
        return rows.row(turn)

    def describe(self, number: int) -> str:
        """Return where a row is from."""
        rows, turn = self._of(number)
        return rows.describe(turn)

    def _of(self, number: int) -> tuple[Rows, int]:
        """Return whose turn it is, and which of its rows."""
        part, turn = turn_of(self._weights, self._seed, number)
        return self._parts[part], turn
