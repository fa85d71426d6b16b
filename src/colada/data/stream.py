"""Token streams: all samples of a split, end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class TokenStream:
    """All samples of a split, one after another, each with its end token.

    Attributes:
        parts: the ids, in consecutive arrays (in memory or mapped from shards), uint16 where the
            vocabulary fits it, else uint32.
        starts: (samples,) int64, the ascending index of each sample's first id in the whole stream.
        prompts: (samples,) int64, how many of a sample's first ids are a prompt (read, not
            trained), or None where all are 0.
        describe: names the origin of sample i, for errors.
        digest: of the content; equal text, tokenised alike, has the same wherever it lies.
    """

    parts: Sequence[Ids]
    starts: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int64] | None = None
    describe: Callable[[int], str] = "sample {}".format
    digest: str = ""

    def __post_init__(self) -> None:
        ends = np.array([0, *accumulate(len(part) for part in self.parts)], dtype=np.int64)
        object.__setattr__(self, "_ends", ends)

    def __len__(self) -> int:
        """Return the number of ids."""
        return int(self._ends[-1])  # type: ignore[attr-defined]

    def read(self, begin: int, count: int) -> npt.NDArray[np.int64]:
        """Return ids ``begin`` to ``begin + count - 1``, a copy: (count,) int64."""
        ends = self._ends  # type: ignore[attr-defined]
        if not 0 <= begin <= begin + count <= len(self):
            raise IndexError(f"ids {begin} to {begin + count - 1} of a stream of {len(self)}")
        out = np.empty(count, np.int64)
        done = 0
        part = int(np.searchsorted(ends, begin, side="right")) - 1
        while done < count:
            at = begin + done - int(ends[part])
            piece = self.parts[part][at : at + count - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            part += 1
        return out
