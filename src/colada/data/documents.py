"""Files to records, and records of text to documents."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha1
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from colada.checks import choose
from colada.data.jsonl import parse_object
from colada.data.listing import require_kind
from colada.errors import ColadaError, nearest, reason
from colada.files import decode, read_lines, require_file
from colada.text.tokenizer import END_OF_TEXT

Split = Literal["train", "validation"]

# What a file's own split column may say; None marks rows that are left out.
_SPLITS: Mapping[str, Split | None] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": None,
}

_PARQUET_BATCH = 1024  # rows held in memory at once


@dataclass(frozen=True)
class Record:
    """Some columns of a record, the split it belongs to, and where it is: a line or row from 1.

    Its split is ``stated`` by its file, or else follows from its text.
    """

    values: tuple[Any, ...]
    split: Split
    number: int
    origin: str
    stated: bool = False

    @property
    def text(self) -> str:
        """Its only value, of a record that :func:`read_documents` has read."""
        (text,) = self.values
        return str(text)


@dataclass(frozen=True)
class Cut:
    """Which pieces of documents are validation text, where whole documents are too few or too long for it.

    Attributes:
        size: of a piece in characters, about: it ends after a line, or else a word.
        share: pieces are validation when the SHA-1 of their text, as a fraction of 2**160, is below it.
    """

    size: int
    share: float


Holdout = float | Cut
"""What is held out for validation: documents, as such a share of them, or pieces of them."""


@dataclass(frozen=True)
class Part:
    """Part of a file, or of a data set, that can be read alone.

    Attributes:
        where: the file, or the data set's split.
        place: what precedes a record's number in errors, such as ``texts.parquet:row ``.
        begin, end: what of it: byte offsets of .txt and .jsonl, row groups of .parquet, rows of a data
            set, files of a streamed one; None: to the end.
        before: how many lines or rows of ``where`` come before.
        size: in bytes, about.
        split: of all its records ("train": but those marked test); None: each record's own.
    """

    where: str
    place: str
    begin: int = 0
    end: int | None = None
    before: int = 0
    size: int = 0
    split: Split | None = None


def read_documents(
    files: Iterable[Path], *, column: str = "text", validation_share: float = 0.02
) -> Iterator[Record]:
    """Stream the records of ``files`` with a text, in order; white-space-only ones are left out.

    Raises ColadaError as :func:`read_records`, also for what is no text.
    """
    for path in files:
        for part in split_file(path):
            for record in read_records(part, [column], validation_share):
                text = text_of(record.values[0], column, record.origin)
                if text.strip():
                    yield record


def text_of(value: object, column: str, origin: str) -> str:
    """Return a value that must be a string. Raises ColadaError, naming column and origin, if it is none."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise ColadaError(f"{origin}: {column!r} is {kind}, expected a string")
    return value


def read_records(part: Part, columns: Sequence[str], validation_share: Holdout) -> Iterator[Record]:
    """Stream the values of some columns of the records of a part of a file.

    ``.txt``: documents stand between lines that are exactly ``<|endoftext|>``; without such a line the file
    is one document. The line break that ends a document is not part of it. ``.jsonl``: an object a line.
    ``.parquet``: a row a record.

    Where ``part`` has no split, a key or column ``split`` says where a record belongs: ``train``, or
    ``validation`` (also ``valid``, ``val``, ``dev``); ``test`` is left out.
    Without it, a record is validation when the SHA-1 of its text (of its values as JSON, where
    they are not one string), as a fraction of 2**160, is below ``validation_share``: equal texts always land
    in the same split. With a :class:`Cut`, that holds of its pieces, and neighbours in a split stay together.

    Raises ColadaError, naming the file and its line or row, for anything that cannot be read as described.
    """
    readers = {".txt": _text_records, ".jsonl": _jsonl_records, ".parquet": _parquet_records}
    for number, fields in readers[require_kind(Path(part.where)).removesuffix(".gz")](part, columns):
        yield from records_of(fields, part, number, columns, validation_share)


def records_of(
    fields: Mapping[str, object], part: Part, number: int, columns: Sequence[str], validation_share: Holdout
) -> list[Record]:
    """Return a record with its split; none if it belongs to neither, several if it is cut.

    See :func:`read_records`.
    """
    values, origin = tuple(fields[column] for column in columns), f"{part.place}{number}"
    whole = len(values) == 1 and isinstance(values[0], str)
    text = str(values[0]) if whole else json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell one: "\ud800"
        raise ColadaError(
            f"{origin}: {', '.join(map(repr, columns))} holds a lone surrogate {text[error.start]!r}"
            f" at character {error.start}, expected Unicode text"
        ) from None
    if part.split is not None or "split" in fields:
        split = part.split or _named_split(origin, fields["split"])
        if split is None or (split == "train" and fields.get("split") == "test"):
            return []
        return [Record(values, split, number, origin, stated=True)]
    share = validation_share.share if isinstance(validation_share, Cut) else validation_share

    def split_of(piece: str) -> Split:
        return "validation" if fraction(piece) < share else "train"

    if isinstance(validation_share, Cut) and whole:
        runs = groupby(cut(text, validation_share.size), split_of)
        return [Record(("".join(pieces),), split, number, origin) for split, pieces in runs]
    return [Record(values, split_of(text), number, origin)]


def fraction(text: str) -> float:
    """Return the SHA-1 of a text as a fraction of 2**160."""
    return int.from_bytes(sha1(text.encode(), usedforsecurity=False).digest(), "big") / 2**160


def cut(text: str, size: int) -> Iterator[str]:
    """Yield a text in pieces of ``size`` to 1.5 ``size`` characters that end after a line or else a space."""
    begin = 0
    while len(text) - begin > 1.5 * size:
        least, most = begin + size, begin + size + size // 2
        end = text.find("\n", least, most) + 1 or text.find(" ", least, most) + 1 or most
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _named_split(origin: str, value: object) -> Split | None:
    return choose(f"{origin}: split", value, _SPLITS)


# A reader yields (number, fields) per record of a part. ``fields`` always holds the columns, and
# ``split`` where the file has it; their values are as yet unchecked.
_Records = Iterator[tuple[int, Mapping[str, object]]]


def _text_records(part: Part, columns: Sequence[str]) -> _Records:
    first, lines = part.before + 1, list[str]()
    for number, raw in _lines(part):
        line = decode(raw, f"{part.place}{number}")
        if _separates(line):
            yield first, {columns[0]: _join(lines)}
            first, lines = number + 1, []
        else:
            lines.append(line)
    yield first, {columns[0]: _join(lines)}


def _separates(line: str) -> bool:
    return line.rstrip("\r\n") == END_OF_TEXT


def _join(lines: list[str]) -> str:
    return "".join(lines).removesuffix("\n").removesuffix("\r")


def _jsonl_records(part: Part, columns: Sequence[str]) -> _Records:
    for number, line in _lines(part):
        if line.strip():
            fields = parse_object(line, f"{part.place}{number}")
            check_columns(f"{part.place}{number}", columns, list(fields))
            yield number, fields


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its line break) of a file or a range of it, unpacking ``.gz``."""
    at = part.begin
    for number, raw in read_lines(part.where, part.begin, part.before):
        if part.end is not None and at >= part.end:
            return
        at += len(raw)
        yield number, raw


def _parquet_records(part: Part, columns: Sequence[str]) -> _Records:
    number = part.before
    with _open_parquet(part.where, lambda: number) as file:
        names = list(file.schema_arrow.names)
        check_columns(part.where, columns, names)
        column_names = [*columns, *(["split"] if "split" in names and "split" not in columns else [])]
        for name in column_names:
            if names.count(name) > 1:
                raise ColadaError(f"{part.where}: the column {name!r} is there twice")
        groups = range(file.num_row_groups)[part.begin : part.end]
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH, row_groups=groups, columns=column_names):
            # By name: with several columns, the file's order is not that of the asking.
            for cells in zip(*(batch.column(name) for name in column_names), strict=True):
                number += 1
                row = zip(column_names, cells, strict=True)
                yield number, {name: _value(cell, name, f"{part.place}{number}") for name, cell in row}


def _value(cell: Any, column: str, origin: str) -> object:
    """Return a parquet cell as Python has it."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise ColadaError(f"{origin}: not UTF-8 ({error}), expected UTF-8 text") from None
    except Exception as error:  # Dates and time zones that Python lacks each raise an error of their own.
        raise ColadaError(f"{origin}: {column!r} cannot be converted ({reason(error)})") from None


@contextmanager
def _open_parquet(path: str, read: Callable[[], int]) -> Iterator[Any]:
    """Open a parquet file; what fails in it is named with the file and how many rows were ``read`` before."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ColadaError(f"{path}: parquet needs pyarrow, install it with: colada-lm[train]") from error
    require_file(path)
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, RecursionError) as error:
        where = f" after row {read()}" if read() else ""
        raise ColadaError(f"{path}: not a readable parquet file{where} ({reason(error)})") from error


def split_file(path: Path, size: int = sys.maxsize) -> list[Part]:
    """Return a file in parts of about ``size`` bytes, of whole documents; what is packed (.gz) in one.

    Raises ColadaError if it is of no known kind or cannot be read.
    """
    kind = require_kind(path)
    whole = require_file(path).stat().st_size
    if kind == ".parquet":
        return _row_groups(path, whole, size)
    if whole > size and not kind.endswith(".gz"):
        return _line_ranges(path, size, kind == ".txt")
    return [Part(str(path), f"{path}:", size=whole)]


def _row_groups(path: Path, whole: int, size: int) -> list[Part]:
    with _open_parquet(str(path), lambda: 0) as file:
        rows = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    each = max(1, len(rows) * size // max(whole, 1))
    begins = range(0, max(1, len(rows)), each)  # A file without rows has a part too: its columns are checked.
    return [Part(str(path), f"{path}:row ", n, n + each, sum(rows[:n]), whole // len(begins)) for n in begins]


def _line_ranges(path: Path, size: int, text: bool) -> list[Part]:
    """Cut between lines; a text only where one of its documents ends."""
    parts, begin, end, before = list[Part](), 0, 0, 0
    for number, line in read_lines(path):  # Which bounds them: a file without line breaks is one.
        end += len(line)
        if end - begin >= size and (not text or _separates(line.decode("utf-8-sig", "replace"))):
            parts.append(Part(str(path), f"{path}:", begin, end, before, end - begin))
            begin, before = end, number
    if begin < end:
        parts.append(Part(str(path), f"{path}:", begin, end, before, end - begin))
    return parts


def check_columns(where: str, columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise ColadaError if a column is missing, with the nearest name of those that are there."""
    for column in columns:
        if column not in names:
            known = ", ".join(names) or "none"
            raise ColadaError(
                f"{where}: no column {column!r}{nearest(column, names)}, columns there: {known}"
            )
