"""Dropout of which a row's masks follow from the row's own seed, whatever batch or device it is on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Of a hash of 32 bits with little bias ("lowbias32", Chris Wellons), and odd numbers that tell its inputs
# apart.
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
_SHIFTS = (16, 15, 16)
_SITE, _CELL, _CHANNEL = 0x3C6EF372, 0x1B873593, 0x2545F491


def _mixed(x: Tensor) -> Tensor:
    """Return a hash of int32 numbers; products and sums wrap around."""
    for number, shift in enumerate(_SHIFTS):
        x = x ^ ((x >> shift) & (2 ** (32 - shift) - 1))  # The sign is not to be shifted in.
        if number < len(_MULTIPLIERS):
            x = x * _MULTIPLIERS[number]
    return x


@dataclass(frozen=True)
class Masks:
    """Dropout in one pass.

    Attributes:
        keys: int32 (N,), a number for each position of each row.
        share: of the numbers that are dropped.
    """

    keys: Tensor
    share: float

    def rows(self, index: Tensor) -> Masks:
        """Return those of some positions."""
        return replace(self, keys=self.keys.index_select(0, index))

    def __call__(self, x: Tensor, site: int) -> Tensor:
        """Return x (N, dim) with a share of its numbers at 0 and the others scaled up by as much.

        Args:
            site: which of the network's dropouts it is; each drops others.
        """
        channels = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) * _CHANNEL
        hashed = _mixed((self.keys ^ (_SITE * (site + 1) % 2**31))[:, None] + channels)
        stays = hashed >= round(self.share * 2**32) - 2**31
        return torch.where(stays, x / (1 - self.share), torch.zeros((), dtype=x.dtype, device=x.device))


@dataclass(frozen=True)
class Dropout:
    """Dropout in the rows of a training step.

    Attributes:
        seeds: int32 (B,), one a row.
        share: of the numbers that are dropped.
    """

    seeds: Tensor
    share: float

    def masks(self, positions: int) -> Masks:
        """Return the masks of rows packed end to end, so many positions in all."""
        cells = torch.arange(positions // len(self.seeds), dtype=torch.int32, device=self.seeds.device)
        keys = _mixed(_mixed(self.seeds)[:, None] + cells * _CELL)
        return Masks(keys.flatten(), self.share)
