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
from torch import Tensor

from colada.errors import ColadaError


def block_causal(queries: int, keys: int, block_size: int) -> Tensor:
    """Return the (queries, keys) visibility of one sample; the queries are its last positions."""
    block = torch.arange(keys) // block_size
    return block[keys - queries :, None] >= block[None, :]


def two_copy(length: int, block_size: int) -> Tensor:
    """Return the visibility of one training row laid out as ``[clean | noisy]`` (section 2 of the paper).

    The clean copy holds ``length - block_size`` positions (nobody attends to its
    last block), the noisy copy ``length``. A clean query sees clean blocks up to
    its own; a noisy query of block b sees clean blocks before b and noisy block b.

    Returns: bool (2 * length - block_size, 2 * length - block_size), True where the query (row) sees the key.

    Raises:
        ColadaError: if the length is not a multiple of ``block_size``.
    """
    if length % block_size:
        raise ColadaError(f"rows of {length} positions, expected a multiple of block_size={block_size}")
    clean = length - block_size
    block = torch.cat([torch.arange(clean), torch.arange(length)]) // block_size
    noisy = torch.arange(clean + length) >= clean
    query, key = block[:, None], block[None, :]
    sees_clean = ~noisy[None, :] & torch.where(noisy[:, None], key < query, key <= query)
    sees_noisy = noisy[None, :] & noisy[:, None] & (key == query)
    return sees_clean | sees_noisy


@lru_cache(maxsize=256)
def _mask(kind: str, queries: int, keys: int, block_size: int, device: torch.device) -> Tensor | None:
    visible = two_copy(queries, block_size) if kind == "two_copy" else block_causal(queries, keys, block_size)
    return None if bool(visible.all()) else visible.to(device)


@dataclass(frozen=True)
class Group:
    """Samples of one shape: their numbers, the shared mask, and where their new positions are packed.

    ``index`` is (B_group * L,), or None when the group is the whole batch in order.
    """

    samples: tuple[int, ...]
    length: int
    mask: Tensor | None
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
        masks = {
            (n, h): _mask("block_causal", n, n + h, block_size, self.device) for n, h in set(shapes) if n > 0
        }
        self.groups = self._group(shapes, masks)

    @classmethod
    def two_copy(cls, rows: int, length: int, block_size: int, device: torch.device | str = "cpu") -> Layout:
        """Return the layout of ``rows`` training rows, each ``[clean | noisy]``; see :func:`two_copy`."""
        layout = cls.__new__(cls)
        clean = length - block_size
        layout.lengths = (clean + length,) * rows
        layout.history = (0,) * rows
        layout.block_size = block_size
        layout.device = torch.device(device)
        layout.positions = torch.cat([torch.arange(clean), torch.arange(length)]).repeat(rows).to(device)
        shape = (clean + length, 0)
        masks = {shape: _mask("two_copy", length, 0, block_size, layout.device)}
        layout.groups = layout._group([shape] * rows, masks)
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
