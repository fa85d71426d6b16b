"""Which files of a folder are data, and which are left out, and why."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from colada.errors import ColadaError, nearest
from colada.files import require_file

KINDS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
# What a training run's directory has in it, once it has begun: the first and one of the others.
_RUN_FILES = ("recipe.yaml", "tokenizer.json", "metrics.jsonl", "checkpoints")


@dataclass(frozen=True)
class Listing:
    """The data files of a folder, sorted, and how many entries were left out, by reason."""

    where: Path
    files: list[Path]
    left_out: Counter[str]

    def __str__(self) -> str:
        files = f"{len(self.files)} file{'s' if len(self.files) != 1 else ''}"
        return f"{self.where}: {files} to read, {_in_words(self.left_out)}"


def _in_words(left_out: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    return f"{left_out.total()} left out" + (f": {reasons}" if reasons else "")


def find_files(where: Path, include: Sequence[str] = ()) -> list[Path]:
    """Return the data files at ``where``; see :func:`list_files`."""
    return list_files(where, include).files


def list_files(where: Path, include: Sequence[str] = ()) -> Listing:
    """Return the data files at ``where``: the file itself, or a folder's files, recursive and sorted.

    Linked folders are read, each real folder once. Names that begin with a dot, and the directories of
    training runs, are no data.

    Args:
        where: a file or a folder.
        include: glob patterns; a file is kept when its name matches any of them.

    Raises:
        ColadaError: when ``where`` is missing, is a training run's directory, or holds no file of a known
            kind; or a pattern matches none of its files.
    """
    left_out = Counter[str]()
    if os.path.isdir(where):
        if _is_run(where):
            raise ColadaError(f"{where} is a training run's directory, expected a folder of text")
        files = sorted(_walk(where, left_out))
        if not files:
            reasons = f" ({_in_words(left_out)})" if left_out else ""
            raise ColadaError(f"{where}: no data files in this folder{reasons}, expected {', '.join(KINDS)}")
    else:
        files = [require_file(where, f"a folder or a file of {', '.join(KINDS)}")]
        require_kind(where)
    for pattern in include:
        if not any(fnmatchcase(path.name, pattern) for path in files):
            guess = nearest(pattern, {path.name for path in files})
            raise ColadaError(f"include pattern {pattern!r} matches no data file in {where}{guess}")
    included = [path for path in files if not include or any(fnmatchcase(path.name, p) for p in include)]
    if len(included) < len(files):
        left_out["not included"] = len(files) - len(included)
    return Listing(where, included, left_out)


def require_kind(path: Path) -> str:
    """Return which of ``KINDS`` a file's name says it is; raises ColadaError if none."""
    for kind in KINDS:
        if path.name.lower().endswith(kind):
            return kind
    raise ColadaError(f"{path}: unknown kind of file, expected {', '.join(KINDS)}")


def _walk(where: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Yield the data files of a folder, in no order, and count what else there is.

    Links are followed last, so that a folder that is also there itself is read there.
    """
    around = {_identity(folder) for folder in where.resolve().parents}
    seen, folders, links = set[tuple[int, int]](), [where], list[Path]()
    while folders or links:
        linked = not folders
        folder = links.pop(0) if linked else folders.pop()
        if _identity(folder) in seen or (linked and _identity(folder) in around):
            left_out["linked folder that is read elsewhere"] += 1
            continue
        seen.add(_identity(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ColadaError(f"{folder}: cannot be read ({error.strerror})") from None
        for entry in entries:
            path = folder / entry.name
            reason = _left_out(path)
            if reason is not None:
                left_out[reason] += 1
            elif path.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            else:
                yield path


def _left_out(path: Path) -> str | None:
    """Return why an entry of a folder is no data, None if it is a data file or a folder to look in."""
    if path.name.startswith("."):
        return "hidden"
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "broken link"
    if stat.S_ISDIR(mode):
        return "directory of a training run" if _is_run(path) else None
    if not stat.S_ISREG(mode):
        return "no regular file"
    return None if path.name.lower().endswith(KINDS) else path.suffix.lower() or "without a suffix"


def _is_run(folder: Path) -> bool:
    first, *others = (os.path.exists(folder / name) for name in _RUN_FILES)
    return first and any(others)


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
