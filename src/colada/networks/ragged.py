"""Training rows without the cells that no wanted output follows from.

Of a conversation's row only answers have a loss. A noisy block of the prompt, or of what a row is filled up
with, is then computed for nothing, in every copy; so is a clean block that no answer comes after. Rows
without these have lengths of their own; those of equal shape attend together, under masks of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colada.networks.packing import CellKind, Group, Layout, Tile, sees, two_copy_cells

MOST_CELLS = 1024
"""Cells of a whole row, at most: masks are over all cells of a row, and those of longer ones are large."""


def needed_cells(
    needed: Tensor,
    block_size: int,
    copies: int,
    sample: Tensor | None = None,
    alone: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return which cells of rows ``[clean | noisy 1 | ...]`` are needed, and who of a row's sees whom.

    A noisy cell is needed if its block is, a clean one if a needed noisy cell sees it; whatever that one
    sees is then seen by the noisy cell too.

    Args:
        needed: bool (B, blocks), the noisy blocks whose output is wanted.
        sample, alone: as :meth:`Layout.rows` takes them.

    Returns: bool (B, cells), and bool (B, cells, cells), queries by keys.
    """
    rows, blocks = needed.shape
    cells = two_copy_cells(blocks * block_size, block_size, copies).to(needed.device)
    seen = sees(cells.at((slice(None), None)), cells).expand(rows, -1, -1)
    if sample is not None:
        sample_of = sample[:, cells.position]
        seen = seen & (sample_of[:, :, None] == sample_of[:, None])
    noisy = cells.kind == CellKind.NOISY
    if alone is not None:
        hidden = alone[:, (cells.copy - 1).clamp_min(0), cells.block] & noisy
        seen = seen & ~(hidden[:, :, None] & ~noisy)
    noisy_needed = needed[:, cells.block] & noisy
    return noisy_needed | ((seen & noisy_needed[:, :, None]).any(1) & ~noisy), seen


def needed_layout(
    needed: Tensor,
    block_size: int,
    copies: int,
    sample: Tensor | None = None,
    alone: Tensor | None = None,
) -> tuple[Layout, Tensor]:
    """Return the layout of rows with their needed cells alone, and which these are, bool (B, cells).

    Arguments as :func:`needed_cells`.
    """
    cells_needed, seen = needed_cells(needed, block_size, copies, sample, alone)
    rows, length, device = len(needed), needed.shape[1] * block_size, needed.device
    clean = length - block_size
    cells = two_copy_cells(length, block_size, copies).to(device)
    lengths, before = cells_needed.sum(1).tolist(), cells_needed[:, :clean].sum(1).tolist()
    layout = Layout.__new__(Layout)
    layout.lengths, layout.cached = tuple(lengths), (0,) * rows
    layout.block_size, layout.device = block_size, device
    layout.positions = cells.position.expand(rows, -1)[cells_needed]
    layout.noisy = (cells.kind == CellKind.NOISY).expand(rows, -1)[cells_needed].nonzero().flatten()
    alike: dict[tuple[int, int], list[int]] = {}
    for row, shape in enumerate(zip(lengths, before, strict=True)):
        if shape[0]:
            alike.setdefault(shape, []).append(row)
    ends, noisy_ends = cells_needed.sum(1).cumsum(0), cells_needed[:, clean:].sum(1).cumsum(0)
    groups, noisy_groups = list[Group](), list[Group]()
    for (count, first), members in alike.items():
        rows_alike = torch.tensor(members, device=device)
        where = cells_needed[rows_alike].nonzero()[:, 1].view(len(members), count)
        mask = seen[rows_alike[:, None, None], where[:, :, None], where[:, None]][:, None]
        index, asking = _packed(ends[rows_alike], count), count - first
        every, noisy = (Tile(((0, n),), ((0, count),), mask[:, :, count - n :]) for n in (count, asking))
        groups.append(Group(tuple(members), count, count, (every,), index))
        queries = _packed(noisy_ends[rows_alike], asking)
        noisy_groups.append(Group(tuple(members), count, asking, (noisy,), index, queries))
    layout.groups, layout.noisy_groups = tuple(groups), tuple(noisy_groups)
    return layout, cells_needed


def _packed(ends: Tensor, count: int) -> Tensor:
    """Return the packed positions of the last ``count`` before each of some ends, flat."""
    return (ends[:, None] - count + torch.arange(count, device=ends.device)).flatten()
