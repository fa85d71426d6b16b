"""Ragged batches packed end to end, and who may attend to whom.

Shape legend, used throughout: B samples, L positions of one sample, N packed
positions of all samples, K heads, D head width, C latent width, V vocabulary,
S steps. Block-causal visibility: within a sample, a query of block i sees the
keys of blocks j <= i, with block = position // block_size. Samples never see
each other, and no mask over the packed batch is ever made: samples of equal
shape form a group that shares one small mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from colada.errors import ColadaError


def block_causal(queries: int, keys: int, block_size: int) -> Tensor:
    """Return the (queries, keys) visibility of one sample; the queries are its last positions."""
    block = torch.arange(keys) // block_size
    return block[keys - queries :, None] >= block[None, :]


def sees(query: Tensor, key: Tensor, query_copy: Tensor, key_copy: Tensor) -> Tensor:
    """Whether queries of some blocks and copies see keys of others (section 2 of the paper); broadcasts.

    Copy 0 is clean, copies 1, 2, ... are noisy. A clean query sees clean blocks up to its own; a
    noisy query of block b sees clean blocks before b and block b of its own copy.
    """
    clean = (key_copy == 0) & torch.where(query_copy == 0, key <= query, key < query)
    return clean | ((key_copy > 0) & (key_copy == query_copy) & (key == query))


def two_copy_cells(length: int, block_size: int, copies: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return position, block and copy of every cell of a row ``[clean | noisy 1 | ... | noisy m]``.

    The clean copy holds ``length - block_size`` positions (nobody attends to its last block), each
    noisy copy ``length``. Without copies the row is all clean.

    Returns: three int64 vectors of the row's cells.

    Raises:
        ColadaError: if the length is not a multiple of ``block_size``.
    """
    if length % block_size:
        raise ColadaError(f"rows of {length} positions, expected a multiple of block_size={block_size}")
    clean = length - block_size if copies else length
    position = torch.cat([torch.arange(clean), *[torch.arange(length)] * copies])
    copy = torch.cat(
        [torch.zeros(clean, dtype=torch.long), torch.arange(copies).repeat_interleave(length) + 1]
    )
    return position, position // block_size, copy


def two_copy(length: int, block_size: int, copies: int = 1) -> Tensor:
    """Return the visibility of one training row, see :func:`two_copy_cells` and :func:`sees`.

    Returns: bool (Q, Q), True where the query (row) sees the key.
    """
    _, block, copy = two_copy_cells(length, block_size, copies)
    return sees(block[:, None], block[None, :], copy[:, None], copy[None, :])


@lru_cache(maxsize=256)
def _mask(queries: int, keys: int, block_size: int, device: torch.device) -> Tensor | None:
    visible = block_causal(queries, keys, block_size)
    return None if bool(visible.all()) else visible.to(device)


@dataclass(frozen=True)
class Group:
    """Samples of one shape: their numbers, the shared mask, and where their new positions are packed.

    ``mask`` is bool (L, keys) or (B_group, 1, L, keys), a FlexAttention block mask on a GPU's training
    rows, or None where all is visible. ``index`` is (B_group * L,), or None when the group is
    the whole batch in order.
    """

    samples: tuple[int, ...]
    length: int
    mask: Tensor | BlockMask | None
    index: Tensor | None


class Layout:
    """How the samples of one pass are packed.

    Args:
        lengths: new positions of each sample in this pass.
        block_size: positions in a block.
        history: committed positions of each sample, seen by its new ones; none by default.
        device: where masks and indices live.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        block_size: int,
        history: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths = tuple(lengths)
        self.history = tuple(history) if history is not None else (0,) * len(self.lengths)
        self.block_size = block_size
        self.device = torch.device(device)
        self.positions = torch.cat(
            [torch.arange(h, h + n) for n, h in zip(self.lengths, self.history, strict=True)]
            or [torch.zeros(0, dtype=torch.long)]
        ).to(self.device)
        shapes = list(zip(self.lengths, self.history, strict=True))
        masks = {(n, h): _mask(n, n + h, block_size, self.device) for n, h in set(shapes) if n > 0}
        self.groups = self._group(shapes, masks)

    @classmethod
    def rows(
        cls,
        rows: int,
        length: int,
        block_size: int,
        copies: int = 0,
        sample: Tensor | None = None,
        device: torch.device | str = "cpu",
        history: int = 0,
    ) -> Layout:
        """Return the layout of equal training rows, clean or ``[clean | noisy 1 | ... | noisy m]``.

        Args:
            copies: noisy copies, which share one clean copy; see :func:`two_copy_cells`.
            sample: (rows, length), which sample of its row a position belongs to; samples do not see
                each other. None where every row is one sample.
            history: committed positions of each row, whole blocks, seen by all its cells.
        """
        device = torch.device(device)
        if sample is None:
            return cls._equal_rows(rows, length, block_size, copies, device, history)
        position, block, copy = (x.to(device) for x in two_copy_cells(length, block_size, copies))
        own = sample.to(device)[:, position]
        return cls._of_cells(rows, block_size, position, block, copy, own, history)

    @classmethod
    @lru_cache(maxsize=64)
    def _equal_rows(
        cls, rows: int, length: int, block_size: int, copies: int, device: torch.device, history: int
    ) -> Layout:
        # Kept: a training run asks for the same layout at every step, and its block mask is slow to build.
        position, block, copy = (x.to(device) for x in two_copy_cells(length, block_size, copies))
        return cls._of_cells(rows, block_size, position, block, copy, None, history)

    @classmethod
    def _of_cells(
        cls,
        rows: int,
        block_size: int,
        position: Tensor,
        block: Tensor,
        copy: Tensor,
        sample: Tensor | None,
        history: int = 0,
    ) -> Layout:
        cells = len(position)

        def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = sees(block[query], block[key], copy[query], copy[key])
            return seen if sample is None else seen & (sample[row, query] == sample[row, key])

        mask: Tensor | BlockMask | None
        if position.device.type == "cuda" and history == 0:
            mask = create_block_mask(
                visible, None if sample is None else rows, None, cells, cells, device=str(position.device)
            )
        else:
            at = torch.arange(cells, device=position.device)
            row = torch.arange(1 if sample is None else rows, device=position.device)
            mask = F.pad(
                visible(row[:, None, None, None], row, at[:, None], at[None, :]), (history, 0), value=True
            )
            mask = None if bool(mask.all()) else mask[0] if mask.ndim == 4 and sample is None else mask
        layout = cls.__new__(cls)
        layout.lengths, layout.history = (cells,) * rows, (history,) * rows
        layout.block_size, layout.device = block_size, position.device
        layout.positions = (position + history).repeat(rows)
        layout.groups = (Group(tuple(range(rows)), cells, mask, None),)
        return layout

    def __len__(self) -> int:
        """Return the number N of packed positions."""
        return sum(self.lengths)

    def _group(
        self, shapes: list[tuple[int, int]], masks: dict[tuple[int, int], Tensor | None]
    ) -> tuple[Group, ...]:
        starts = [0, *accumulate(self.lengths)]
        members: dict[tuple[int, int], list[int]] = {}
        for sample, shape in enumerate(shapes):
            if shape[0] > 0:
                members.setdefault(shape, []).append(sample)
        groups = []
        for shape, samples in members.items():
            index = None
            if len(members) > 1:
                first = torch.tensor([starts[sample] for sample in samples])
                index = (first[:, None] + torch.arange(shape[0])).flatten().to(self.device)
            groups.append(Group(tuple(samples), shape[0], masks[shape], index))
        return tuple(groups)


def pad_to_multiple(ids: Sequence[int], multiple: int, pad_id: int) -> list[int]:
    """Return the ids followed by as many ``pad_id`` as make their number a multiple."""
    return [*ids, *[pad_id] * (-len(ids) % multiple)]
