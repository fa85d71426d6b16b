"""Token streams to fixed-length training rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from colada.data.stream import TokenStream
from colada.errors import ColadaError

if TYPE_CHECKING:
    import torch


class Rows:
    """Fixed-length training rows, a pure function of (seed, row number).

    Resuming therefore needs the step number alone, and neither the order of
    asking nor the batch size changes a row.

    Each epoch cuts the stream into ``per_epoch = max(1, (ids - length) // length)``
    windows from a random offset and permutes them. A share ``align`` of them is
    moved forward to the first document start at or after the window's start
    (where that would run past the end of the stream, to the last start that
    fits), so that the row begins with a document's first token.

    A row may hold several documents; its tokens see across the end-of-text id
    between them.
    """

    def __init__(
        self, stream: TokenStream, length: int, *, seed: int, align: float = 0.5, name: str = "stream"
    ) -> None:
        """Prepare rows of ``length`` ids; ``name`` names the stream in errors.

        Raises ColadaError when the stream has fewer than ``length + 1`` ids, or
        ``length``, ``seed`` or ``align`` is out of range.
        """
        if length < 1:
            raise ColadaError(f"row length is {length}, expected at least 1")
        if seed < 0:
            raise ColadaError(f"seed is {seed}, expected 0 or more")
        if not 0 <= align <= 1:
            raise ColadaError(f"align is {align}, expected 0 to 1")
        if len(stream) < length + 1:
            raise ColadaError(
                f"{name} has {len(stream)} ids, expected at least {length + 1} for rows of {length}"
            )
        self.length = length
        self.per_epoch = max(1, (len(stream) - length) // length)
        self._stream = stream
        self._seed = seed
        self._align = align
        self._starts = stream.starts[stream.starts <= len(stream) - length]  # those with room for a row
        self._cached: tuple[int, npt.NDArray[np.int64]] | None = None

    def row(self, r: int) -> npt.NDArray[np.int64]:
        """Return row ``r`` (0 or more), a copy: (length,) int64."""
        epoch, index = divmod(r, self.per_epoch)
        begin = self._begins(epoch)[index]
        return self._stream.read(int(begin), self.length)

    def batch(self, step: int, size: int) -> torch.Tensor:
        """Return rows ``step * size`` to ``step * size + size - 1``: (size, length) int64."""
        import torch

        return torch.from_numpy(np.stack([self.row(r) for r in range(step * size, (step + 1) * size)]))

    def _begins(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return where each row of an epoch begins in the stream: (per_epoch,)."""
        if self._cached is None or self._cached[0] != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            # Below two lengths the only window has less than a length of room to move.
            room = len(self._stream) - self.per_epoch * self.length
            offset = rng.integers(0, min(self.length, room + 1))
            begins = offset + self.length * rng.permutation(self.per_epoch)
            aligned = rng.random(self.per_epoch) < self._align
            if len(self._starts):
                following = np.searchsorted(self._starts, begins[aligned])
                begins[aligned] = self._starts[np.minimum(following, len(self._starts) - 1)]
            self._cached = epoch, begins
        return self._cached[1]
