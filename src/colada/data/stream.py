"""Documents to token streams: all samples of a split, end to end."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from colada.data.documents import Document, Split
from colada.tokenizer import Tokenizer

_ENCODE_BATCH = 512  # documents encoded in parallel

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
    """

    parts: Sequence[Ids]
    starts: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int64] | None = None
    describe: Callable[[int], str] = "sample {}".format

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


def tokenize(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[Split, TokenStream]:
    """Encode ``documents`` into one stream per split; both keys are always there, maybe empty.

    ``progress`` is called after every batch with the number of documents done
    so far. What reading the documents raises passes through.
    """
    dtype: type[np.uint16] | type[np.uint32] = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    splits: tuple[Split, ...] = ("train", "validation")
    # Typed arrays, not lists of ints: a corpus has billions of ids and millions of documents.
    pieces: dict[Split, list[npt.NDArray[Any]]] = {split: [np.empty(0, dtype)] for split in splits}
    starts = {split: array("q") for split in splits}
    totals = dict.fromkeys(splits, 0)
    remaining = iter(documents)
    done = 0
    while batch := list(islice(remaining, _ENCODE_BATCH)):
        fresh: dict[Split, list[int]] = {split: [] for split in splits}
        for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
            starts[document.split].append(totals[document.split] + len(fresh[document.split]))
            fresh[document.split] += [*ids, tokenizer.eos_id]
        for split in splits:
            pieces[split].append(np.array(fresh[split], dtype))
            totals[split] += len(fresh[split])
        done += len(batch)
        if progress is not None:
            progress(done)
    return {
        split: TokenStream([np.concatenate(pieces[split])], np.array(starts[split], dtype=np.int64))
        for split in splits
    }
