"""Ragged batches packed end to end, and who may attend to whom.

Shape legend, used throughout: B samples, L positions of one sample, N packed
positions of all samples, K heads, D head width, C latent width, V vocabulary,
S steps. Block-causal visibility: within a sample, a query of block i sees the
keys of blocks j <= i, with block = position // block_size. Samples never see
each other, and no mask over the packed batch is ever made: samples of equal
shape form a group that shares small masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from colada.errors import ColadaError


def block_causal(queries: int, keys: int, block_size: int) -> Tensor:
    """Return the (queries, keys) visibility of one sample; the queries are its last positions."""
    block = torch.arange(keys) // block_size
    return block[keys - queries :, None] >= block[None, :]


class CellKind:
    """What a cell of a row holds; :data:`RULES` says which kinds see each other.

    Plain numbers: traced by torch.compile, a comparison with a member of an IntEnum is always False.
    """

    PROMPT = 0
    """Clean text that pictures beside it may see, because nobody's answer is in it."""
    CLEAN = 1
    """Clean text: the history of the noisy blocks."""
    NOISY = 2
    """Noisy text, which is to be predicted."""
    SHOWN = 3
    """A clean picture that text is about."""
    DRAWN = 4
    """A noisy picture, one block, which is to be predicted from the clean text before it."""


class Sight:
    """Of cells of one kind, those that a cell of another kind sees."""

    NONE = 0
    ALL = 1
    UP_TO = 2
    """Those of blocks up to its own."""
    BEFORE = 3
    """Those of blocks before its own."""
    OWN = 4
    """Those of its own block and copy."""


# A row of the table is a query's kind, a column a key's, both as CellKind has them. What it sees of text is
# section 2 of the paper (arXiv:2605.06548), of pictures its section on unified text and images.
RULES = torch.tensor(
    [
        [Sight.ALL, Sight.NONE, Sight.NONE, Sight.ALL, Sight.NONE],  # PROMPT
        [Sight.ALL, Sight.UP_TO, Sight.NONE, Sight.ALL, Sight.NONE],  # CLEAN
        [Sight.ALL, Sight.BEFORE, Sight.OWN, Sight.ALL, Sight.NONE],  # NOISY
        [Sight.ALL, Sight.NONE, Sight.NONE, Sight.ALL, Sight.NONE],  # SHOWN
        [Sight.NONE, Sight.BEFORE, Sight.NONE, Sight.NONE, Sight.OWN],  # DRAWN
    ],
    dtype=torch.int8,
)


class Cells(NamedTuple):
    """The cells of a training row, each field int64 of one shape.

    Attributes:
        position: in the sample, which rotary positions are of.
        block: number of the block in the sample.
        kind: a :class:`CellKind`.
        copy: 0 for what is clean, 1, 2, ... for noisy copies, which do not see each other.
    """

    position: Tensor
    block: Tensor
    kind: Tensor
    copy: Tensor

    def at(self, index: Any) -> Cells:
        """Return some of the cells, by an index of tensors."""
        return Cells(*(part[index] for part in self))

    def to(self, device: torch.device) -> Cells:
        """Return the cells on a device."""
        return Cells(*(part.to(device) for part in self))


def sees(query: Cells, key: Cells) -> Tensor:
    """Return where cells see others, by :data:`RULES`: bool; queries and keys broadcast."""
    rule = RULES.to(query.kind.device)[query.kind, key.kind]
    same = (key.block == query.block) & (key.copy == query.copy)
    return (
        (rule == Sight.ALL)
        | ((rule == Sight.UP_TO) & (key.block <= query.block))
        | ((rule == Sight.BEFORE) & (key.block < query.block))
        | ((rule == Sight.OWN) & same)
    )


def two_copy_cells(length: int, block_size: int, copies: int = 1) -> Cells:
    """Return the cells of a row ``[clean | noisy 1 | ... | noisy m]``.

    The clean copy holds ``length - block_size`` positions (nobody attends to its last block), each
    noisy copy ``length``. Without copies the row is all clean.

    Raises:
        ColadaError: if the length is not a multiple of ``block_size``.
    """
    if length % block_size:
        raise ColadaError(f"rows of {length} positions, expected a multiple of block_size={block_size}")
    clean = length - block_size if copies else length
    position = torch.cat([torch.arange(clean), *[torch.arange(length)] * copies])
    copy = torch.cat([torch.zeros(clean).long(), torch.arange(copies).repeat_interleave(length) + 1])
    return Cells(
        position, position // block_size, torch.where(copy > 0, CellKind.NOISY, CellKind.CLEAN), copy
    )


def two_copy(length: int, block_size: int, copies: int = 1) -> Tensor:
    """Return the visibility of one training row, see :func:`two_copy_cells` and :func:`sees`.

    Returns: bool (Q, Q), True where the query (row) sees the key.
    """
    cells = two_copy_cells(length, block_size, copies)
    return sees(cells.at((slice(None), None)), cells)


TILE = 256
"""Most queries of one attention call over a long sample: its mask takes TILE² bytes and no more."""

SEGMENT = 32
"""Least positions of a training row whose queries attend together: shorter ones are many small products."""

Range = tuple[int, int]


@lru_cache(maxsize=256)
def _own_mask(queries: int, before: int, block_size: int, device: torch.device) -> Tensor | None:
    """Return what queries see of themselves, ``before`` positions into a block; None if all of it."""
    visible = block_causal(queries, before + queries, block_size)[:, before:]
    return None if bool(visible.all()) else visible.to(device)


@dataclass(frozen=True)
class Tile:
    """Queries of a sample that attend in one call, and the keys that any of them sees.

    A long sample is many tiles: no mask over all its positions exists, and what cannot be seen
    by any query of a tile is not computed.

    Attributes:
        queries: ranges of the positions that ask, in order.
        keys: ranges of cached and new positions together, in order.
        mask: bool (Q, n) or (B_group, 1, Q, n) over the last n keys, of which those before are seen by
            all; a FlexAttention block mask on a GPU's training rows; None where all is visible.
    """

    queries: tuple[Range, ...]
    keys: tuple[Range, ...]
    mask: Tensor | BlockMask | None


@dataclass(frozen=True)
class Group:
    """Samples of one shape: their numbers, their tiles, and where their new positions are packed.

    ``length`` are the new positions of each; ``asking`` of them have queries, the last ones. ``index`` is
    (B_group * length,), or None when the group is the whole batch in order; ``queries`` the same of those
    that ask, where not all do.
    """

    samples: tuple[int, ...]
    length: int
    asking: int
    tiles: tuple[Tile, ...]
    index: Tensor | None
    queries: Tensor | None = None


def _causal_tiles(length: int, cached: int, block_size: int, device: torch.device) -> tuple[Tile, ...]:
    """Return the tiles of a sample of new positions after so many in the KV cache."""
    tiles, start = [], 0
    while start < length:
        end = (cached + start + max(TILE, block_size)) // block_size * block_size - cached
        end = min(end, length)
        mask = _own_mask(end - start, (cached + start) % block_size, block_size, device)
        tiles.append(Tile(((start, end),), ((0, cached + end),), mask))
        start = end
    return tuple(tiles)


def _after(rows: int, cells: int, clean: int, device: torch.device) -> Tensor | None:
    """Return the packed positions of what follows the first ``clean`` cells of rows; None if all does."""
    numbers = torch.arange(rows * cells, device=device).view(rows, cells)
    return numbers[:, clean:].flatten() if clean else None


class Layout:
    """How the samples of one pass are packed.

    Args:
        lengths: new positions of each sample in this pass.
        block_size: positions in a block.
        cached: positions of each sample in the KV cache, seen by its new ones; none by default.
        device: where masks and indices live.

    Attributes:
        positions: int64 (N,), of every packed position in its sample.
        groups: samples that attend together, and how.
        noisy_groups: the same with queries of noisy cells only, for the last layer of a pass whose
            clean outputs nobody reads; ``groups`` where there are no noisy cells.
        noisy: int64, packed positions of noisy cells; None where there are no clean ones before them.
        pictures: bool (N,), the positions that hold latents of pictures; None where all are text.
    """

    noisy: Tensor | None = None
    pictures: Tensor | None = None

    def __init__(
        self,
        lengths: Sequence[int],
        block_size: int,
        cached: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths = tuple(lengths)
        self.cached = tuple(cached) if cached is not None else (0,) * len(self.lengths)
        self.block_size = block_size
        self.device = torch.device(device)
        self.positions = torch.cat(
            [torch.arange(h, h + n) for n, h in zip(self.lengths, self.cached, strict=True)]
            or [torch.zeros(0, dtype=torch.long)]
        ).to(self.device)
        self.groups = self._group(list(zip(self.lengths, self.cached, strict=True)))
        self.noisy_groups = self.groups

    @classmethod
    def rows(
        cls,
        rows: int,
        length: int,
        block_size: int,
        copies: int = 0,
        sample: Tensor | None = None,
        device: torch.device | str = "cpu",
        alone: Tensor | None = None,
    ) -> Layout:
        """Return the layout of equal training rows, clean or ``[clean | noisy 1 | ... | noisy m]``.

        Args:
            copies: noisy copies, which share one clean copy; see :func:`two_copy_cells`.
            sample: (rows, length), which sample of its row a position belongs to; samples do not see each
                other. None where every row is one sample.
            alone: bool (rows, copies, blocks), noisy blocks that see no clean cell; none by default.
        """
        device = torch.device(device)
        if sample is None and alone is None:
            return cls._equal_rows(rows, length, block_size, copies, device)
        sample, alone = (None if x is None else x.to(device) for x in (sample, alone))
        return cls._of_rows(rows, length, block_size, copies, sample, device, device.type == "cuda", alone)

    @classmethod
    @lru_cache(maxsize=16)
    def _equal_rows(
        cls, rows: int, length: int, block_size: int, copies: int, device: torch.device
    ) -> Layout:
        # Kept: a training run asks for the same layout at every step, and its block mask is slow to build.
        return cls._of_rows(rows, length, block_size, copies, None, device, device.type == "cuda")

    @classmethod
    def _of_rows(
        cls,
        rows: int,
        length: int,
        block_size: int,
        copies: int,
        sample: Tensor | None,
        device: torch.device,
        flex: bool,
        alone: Tensor | None = None,
    ) -> Layout:
        cells = two_copy_cells(length, block_size, copies).to(device)
        layout = cls.__new__(cls)
        layout.lengths, layout.cached = (len(cells.position),) * rows, (0,) * rows
        layout.block_size, layout.device = block_size, device
        layout.positions = cells.position.repeat(rows)
        clean = length - block_size if copies else 0
        layout.noisy = _after(rows, len(cells.position), clean, device)
        visibility = _Visibility(rows, cells, sample, alone)
        make = visibility.block_mask if flex else partial(visibility.tiles, length, copies, block_size)
        group = partial(Group, tuple(range(rows)), len(cells.position), index=None)
        layout.groups = (group(asking=len(cells.position), tiles=make(0)),)
        layout.noisy_groups = layout.groups
        if clean:
            layout.noisy_groups = (group(asking=copies * length, tiles=make(clean)),)
        return layout

    @classmethod
    def of_cells(
        cls, cells: Cells, block_size: int, clean: int, hidden: Tensor, alone: Tensor | None = None
    ) -> Layout:
        """Return the layout of short rows of text and pictures, each row with cells of its own.

        Their mask is over all cells of a row, so a row is to be no longer than some tiles.

        Args:
            cells: (rows, cells).
            block_size: positions in a block of text.
            clean: how many of each row, its first ones, are clean.
            hidden: bool (rows, cells), padding, which nobody sees but itself.
            alone: bool (rows,), rows whose drawn picture sees no text.
        """
        rows, length = cells.kind.shape
        query, key = cells.at((slice(None), slice(None), None)), cells.at((slice(None), None))
        seen = sees(query, key)
        if alone is not None:
            seen = seen & ~(
                alone[:, None, None] & (query.kind == CellKind.DRAWN) & (key.kind == CellKind.CLEAN)
            )
        itself = torch.eye(length, dtype=torch.bool, device=hidden.device)
        seen = ((seen & ~hidden[:, None] & ~hidden[:, :, None]) | itself)[:, None]
        layout = cls.__new__(cls)
        layout.lengths, layout.cached = (length,) * rows, (0,) * rows
        layout.block_size, layout.device = block_size, hidden.device
        layout.noisy = _after(rows, length, clean, hidden.device)
        layout.positions = cells.position.flatten()
        layout.pictures = ((cells.kind == CellKind.SHOWN) | (cells.kind == CellKind.DRAWN)).flatten()

        def groups(first: int) -> tuple[Group, ...]:
            asking, keys = ((0, length - first),), ((0, length),)
            tile = Tile(asking, keys, seen[:, :, first:])
            return (Group(tuple(range(rows)), length, length - first, (tile,), None),)

        layout.groups, layout.noisy_groups = groups(0), groups(clean)
        return layout

    @classmethod
    def one_block(
        cls, positions: Sequence[Tensor], block_size: int, cached: Sequence[int], pictures: Sequence[Tensor]
    ) -> Layout:
        """Return the layout of samples whose new positions all see each other and their KV cache.

        Args:
            positions: of each sample, int64 (L,).
            block_size: positions in a block of text.
            cached: positions of each sample in the KV cache.
            pictures: of each sample, bool (L,), which of its positions hold latents of pictures.
        """
        lengths = [len(one) for one in positions]
        layout = cls(lengths, block_size, cached, positions[0].device)
        layout.positions, layout.pictures = torch.cat(list(positions)), torch.cat(list(pictures))
        layout.groups = layout.noisy_groups = tuple(
            replace(group, tiles=(Tile(((0, n),), ((0, layout.cached[group.samples[0]] + n),), None),))
            for group in layout.groups
            for n in (group.length,)
        )
        return layout

    def __len__(self) -> int:
        """Return the number N of packed positions."""
        return sum(self.lengths)

    def _group(self, shapes: list[Range]) -> tuple[Group, ...]:
        starts = [0, *accumulate(self.lengths)]
        members: dict[Range, list[int]] = {}
        for sample, shape in enumerate(shapes):
            if shape[0] > 0:
                members.setdefault(shape, []).append(sample)
        groups = []
        for (length, cached), samples in members.items():
            index = None
            if len(members) > 1:
                first = torch.tensor([starts[sample] for sample in samples])
                index = (first[:, None] + torch.arange(length)).flatten().to(self.device)
            tiles = _causal_tiles(length, cached, self.block_size, self.device)
            groups.append(Group(tuple(samples), length, length, tiles, index))
        return tuple(groups)


@dataclass(frozen=True)
class _Visibility:
    """Who sees whom in equal training rows, cell by cell.

    Attributes:
        cells: of a row.
        sample: (rows, positions), or None where every row is one sample.
        alone: (rows, copies, blocks), noisy blocks that see no clean cell; None where there are none.
    """

    rows: int
    cells: Cells
    sample: Tensor | None
    alone: Tensor | None = None

    def seen(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return where cells of rows see others; all three int64, and broadcast."""
        asking, asked = self.cells.at(query), self.cells.at(key)
        seen = sees(asking, asked)
        if self.sample is not None:
            seen = seen & (self.sample[row, asking.position] == self.sample[row, asked.position])
        if self.alone is not None:
            noisy = asking.kind == CellKind.NOISY
            alone = noisy & self.alone[row, (asking.copy - 1).clamp_min(0), asking.block]
            seen = seen & ~(alone & (asked.kind == CellKind.CLEAN))
        return seen

    @property
    def differs(self) -> bool:
        """Whether rows see differently."""
        return self.sample is not None or self.alone is not None

    def mask(self, query: Tensor, key: Tensor) -> Tensor | None:
        """Return what cells see of others, bool (Q, K), or (rows, 1, Q, K) where rows differ; None if all."""
        row = torch.arange(self.rows, device=query.device)[:, None, None, None]
        seen = self.seen(row, query[:, None], key)
        return None if bool(seen.all()) else seen

    def tiles(self, length: int, copies: int, block_size: int, first: int) -> tuple[Tile, ...]:
        """Return the tiles of queries from cell ``first`` on: segments of positions, in all copies.

        Every query of a segment sees all clean positions before it, so that the mask is over the
        segment only; with samples, which may end anywhere, or blocks alone, it is over all keys.
        """
        clean = len(self.cells.block) - copies * length
        segment = -(-min(max(SEGMENT, length // 8), TILE) // block_size) * block_size
        tiles = []
        for start in range(0, length, segment):
            end = min(start + segment, length)
            noisy = [(clean + copy * length + start, clean + copy * length + end) for copy in range(copies)]
            block_ranges = [(start, min(end, clean)), *noisy] if start < clean else noisy
            keys = [(0, min(end, clean)), *noisy] if clean else noisy
            masked = keys if self.differs else block_ranges
            queries = [part for part in block_ranges if part[0] >= first]
            if not queries:
                continue
            mask = self.mask(self._cells(queries), self._cells(masked))
            asked = tuple((begin - first, stop - first) for begin, stop in queries)
            tiles.append(Tile(asked, tuple(keys), mask))
        return tuple(tiles)

    def _cells(self, ranges: Sequence[Range]) -> Tensor:
        device = self.cells.block.device
        return torch.cat([torch.arange(start, end, device=device) for start, end in ranges])

    def block_mask(self, first: int) -> tuple[Tile, ...]:
        """Return one tile with a FlexAttention mask: all keys, and queries from cell ``first`` on."""
        cells = len(self.cells.block)

        def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.seen(row, query + first, key)

        rows = self.rows if self.differs else None
        device = str(self.cells.block.device)
        mask = create_block_mask(visible, rows, None, cells - first, cells, device=device)
        return (Tile(((0, cells - first),), ((0, cells),), mask),)


def pad_to_multiple(ids: Sequence[int], multiple: int, pad_id: int) -> list[int]:
    """Return the ids followed by as many ``pad_id`` as make their number a multiple."""
    return [*ids, *[pad_id] * (-len(ids) % multiple)]
