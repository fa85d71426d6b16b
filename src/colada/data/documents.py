"""Files to documents."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha1
from pathlib import Path
from typing import Literal

from colada.errors import ColadaError, nearest
from colada.tokenizer import END_OF_TEXT

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
class Document:
    """One text, the split it belongs to, and where it came from (file and line or row, from 1)."""

    text: str
    split: Split
    origin: str


def find_files(where: Path, include: Sequence[str] = ()) -> list[Path]:
    """Return the data files at ``where``: the file itself, or a folder's files, recursive and sorted.

    ``include`` holds glob patterns; a file is kept when its name matches any of them.

    Raises ColadaError when ``where`` is missing, holds no file of a known kind,
    or a pattern matches none of its files.
    """
    if where.is_dir():
        files = sorted(path for path in where.rglob("*") if _reader(path) and path.is_file())
        if not files:
            raise ColadaError(f"{where}: no data files in this folder, expected {_kinds()}")
    elif not where.exists():
        raise ColadaError(f"{where}: no such file or folder, expected a folder or file of {_kinds()}")
    elif _reader(where) is None:
        raise ColadaError(f"{where}: unknown kind of file, expected {_kinds()}")
    else:
        files = [where]
    for pattern in include:
        if not any(fnmatchcase(path.name, pattern) for path in files):
            guess = nearest(pattern, {path.name for path in files})
            raise ColadaError(f"include pattern {pattern!r} matches no data file in {where}{guess}")
    return [path for path in files if not include or any(fnmatchcase(path.name, p) for p in include)]


def read_documents(
    files: Iterable[Path], *, column: str = "text", validation_share: float = 0.02
) -> Iterator[Document]:
    """Stream the documents of ``files``, in order; white-space-only ones are left out.

    ``.txt``: documents stand between lines that are exactly ``<|endoftext|>``;
    without such a line the file is one document. The line break that ends a
    document is not part of it. ``.jsonl``: one object per line, its text under
    ``column``. ``.parquet``: one row per document, likewise.

    A key or column ``split`` says where a document belongs: ``train``, or
    ``validation`` (also ``valid``, ``val``, ``dev``); ``test`` is left out.
    Without it, a document is validation when the SHA-1 of its text, as a
    fraction of 2**160, is below ``validation_share``: equal texts always land
    in the same split.

    Raises ColadaError, naming the file and its line or row, for anything that
    cannot be read as described; and at once when ``validation_share`` is not
    within 0 to 1.
    """
    if not 0 <= validation_share <= 1:
        raise ColadaError(f"validation_share is {validation_share}, expected 0 to 1")
    return _read_documents(files, column, validation_share)


def _read_documents(files: Iterable[Path], column: str, validation_share: float) -> Iterator[Document]:
    for path in files:
        reader = _reader(path)
        if reader is None:
            raise ColadaError(f"{path}: unknown kind of file, expected {_kinds()}")
        for origin, fields in reader(path, column):
            text = fields[column]
            if not isinstance(text, str):
                raise ColadaError(f"{origin}: {column!r} is {_kind_of(text)}, expected a string")
            try:
                encoded = text.encode()
            except UnicodeEncodeError as error:  # JSON can spell one: "\ud800"
                raise ColadaError(
                    f"{origin}: {column!r} holds a lone surrogate {text[error.start]!r}"
                    f" at character {error.start}, expected Unicode text"
                ) from None
            split: Split | None
            if "split" in fields:
                split = _named_split(origin, fields["split"])
            else:
                fraction = int.from_bytes(sha1(encoded, usedforsecurity=False).digest(), "big")
                split = "validation" if fraction < validation_share * 2**160 else "train"
            if split is not None and text.strip():
                yield Document(text, split, origin)


def _named_split(origin: str, value: object) -> Split | None:
    if not isinstance(value, str) or value not in _SPLITS:
        guess = nearest(value, _SPLITS) if isinstance(value, str) else ""
        raise ColadaError(f"{origin}: split is {value!r}{guess}, expected one of {', '.join(_SPLITS)}")
    return _SPLITS[value]


# A reader yields (origin, fields) per document. ``fields`` always holds the text column, and
# ``split`` where the file has it; their values are as yet unchecked.
_Records = Iterator[tuple[str, Mapping[str, object]]]


def _text_records(path: Path, column: str) -> _Records:
    first, lines = 1, list[str]()
    for number, line in _lines(path):
        if line.rstrip("\r\n") == END_OF_TEXT:
            yield f"{path}:{first}", {column: _join(lines)}
            first, lines = number + 1, []
        else:
            lines.append(line)
    yield f"{path}:{first}", {column: _join(lines)}


def _join(lines: list[str]) -> str:
    return "".join(lines).removesuffix("\n").removesuffix("\r")


def _jsonl_records(path: Path, column: str) -> _Records:
    for number, line in _lines(path):
        if line.isspace():
            continue
        origin = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ColadaError(f"{origin}: not JSON ({error}), expected one object per line") from error
        if not isinstance(fields, dict):
            raise ColadaError(f"{origin}: {_kind_of(fields)}, expected a JSON object")
        _check_column(origin, column, list(fields))
        yield origin, fields


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its line break) of a UTF-8 file, unpacking ``.gz``."""
    packed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode()
                except UnicodeDecodeError as error:
                    raise ColadaError(
                        f"{path}:{number}: byte 0x{raw[error.start]:02x} at offset {error.start} of the line"
                        f" is not UTF-8 ({error.reason}), expected UTF-8 text"
                    ) from error
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise ColadaError(f"{path}: cannot be read ({error})") from error


def _parquet_records(path: Path, column: str) -> _Records:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ColadaError(f"{path}: parquet needs pyarrow, install it with: colada-lm[train]") from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            _check_column(str(path), column, names)
            wanted = [column, "split"] if "split" in names and column != "split" else [column]
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=wanted):
                for cells in zip(*(batch.column(name) for name in wanted), strict=True):
                    number += 1
                    origin = f"{path}:row {number}"
                    try:
                        values = [cell.as_py() for cell in cells]
                    except UnicodeDecodeError as error:
                        raise ColadaError(f"{origin}: not UTF-8 ({error}), expected UTF-8 text") from error
                    yield origin, dict(zip(wanted, values, strict=True))
    except (pa.ArrowException, OSError) as error:
        where = f" after row {number}" if number else ""
        raise ColadaError(f"{path}: not a readable parquet file{where} ({_one_line(error)})") from error


_READERS: Mapping[str, Callable[[Path, str], _Records]] = {
    ".txt": _text_records,
    ".txt.gz": _text_records,
    ".jsonl": _jsonl_records,
    ".jsonl.gz": _jsonl_records,
    ".parquet": _parquet_records,
}


def _reader(path: Path) -> Callable[[Path, str], _Records] | None:
    name = path.name.lower()
    return next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), None)


def _kinds() -> str:
    return ", ".join(_READERS)


def _check_column(where: str, column: str, names: Sequence[str]) -> None:
    if column not in names:
        there = ", ".join(names) or "none"
        raise ColadaError(f"{where}: no column {column!r}{nearest(column, names)}, columns there: {there}")


def _kind_of(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
