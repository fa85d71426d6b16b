"""Every file that users give is read here, and every file that must not be half written is written here.

What cannot be read, whatever its parser makes of it, is one line that names the file and the place.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import gzip
import itertools
import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from colada.errors import ColadaError, reason, shown

if TYPE_CHECKING:
    from filelock import FileLock

MOST_TEXT = 2**30
"""Bytes of a text that is read whole."""
MOST_JSON = 2**28
"""Bytes of a JSON file; the largest tokenizers have a tenth of it."""
MOST_LINE = 2**30
"""Bytes of one line of a file that is read line by line."""
DEEPEST = 100
"""Lists and objects within one another; printing deeper ones fails."""

_SPECIAL = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def as_path(place: str | Path, name: str = "path") -> Path:
    """Return where a file or directory is or will be. Raises ColadaError for what is no path at all."""
    try:
        if not isinstance(place, str | Path) or b"\0" in os.fsencode(place):
            raise ValueError(place)
    except ValueError:  # Also of a lone surrogate, which no file system has.
        raise ColadaError(f"{name}={shown(place)}, expected a path") from None
    return Path(place)


# --- reading -----------------------------------------------------------------------------------


def require_file(path: str | Path, expected: str = "a regular file") -> Path:
    """Return a path once it is sure that a regular file (or a link to one) is there.

    Raises:
        ColadaError: if nothing is there, or a directory, a named pipe, a device or a socket is: reading
            those would fail, wait or never end.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ColadaError(f"{path}: no such file, expected {expected}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise ColadaError(f"{path!s}: cannot be read ({reason(error)}), expected {expected}") from None
    for holds, name in _SPECIAL:
        if holds(mode):
            raise ColadaError(f"{path} is {name}, no regular file; expected {expected}")
    return Path(path)


@contextmanager
def open_file(path: str | Path, expected: str = "a regular file") -> Iterator[IO[bytes]]:
    """Open a regular file for reading bytes; ``.gz`` is unpacked.

    Raises:
        ColadaError: if it cannot be opened, or what is done with it within fails for the disk's sake.
    """
    require_file(path, expected)
    try:
        packed = str(path).lower().endswith(".gz")
        with cast(IO[bytes], gzip.open(path, "rb") if packed else open(path, "rb")) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise ColadaError(f"{path}: cannot be read ({reason(error)})") from None


def read_lines(path: str | Path, begin: int = 0, before: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line with its line break) of a file, unpacking ``.gz``; see :func:`decode`.

    Args:
        begin: the byte to begin at.
        before: how many lines come before that.

    Raises:
        ColadaError: if it cannot be read, or a line has more than ``MOST_LINE`` bytes.
    """
    with open_file(path) as file:
        file.seek(begin)
        for number in itertools.count(before + 1):
            line = file.readline(MOST_LINE)
            if not line:
                return
            if len(line) == MOST_LINE and not line.endswith(b"\n"):
                raise ColadaError(f"{path}:{number}: a line of {MOST_LINE} bytes or more, expected fewer")
            yield number, line


def decode(data: bytes, where: str) -> str:
    """Return UTF-8 as text, without a byte order mark at its beginning: of a file, or of one of its lines.

    Raises:
        ColadaError: naming the byte that is not UTF-8.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ColadaError(
            f"{where}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8"
            f" ({error.reason}), expected UTF-8 text"
        ) from None


def read_text(path: str | Path, expected: str = "a text file", most: int = MOST_TEXT) -> str:
    """Return the text of a UTF-8 file, without a byte order mark; line breaks stay as they are.

    Raises:
        ColadaError: if it is no regular file, cannot be read, is no UTF-8 or has more than ``most`` bytes.
    """
    with open_file(path, expected) as file:
        # Before it is read: files can be larger than memory, and sparse ones than the disk.
        large = os.stat(path).st_size > most
        data = b"" if large else file.read(most + 1)
    if large or len(data) > most:
        raise ColadaError(f"{path} has more than {most} bytes, expected {expected}")
    return decode(data, str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ColadaError: naming ``where``, if it is no JSON, spells a key twice, or holds an integer or a
            nesting that no file of ours needs.
    """
    if isinstance(text, bytes):
        text = decode(text, where)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names if len(set(names)) < len(names) else ():
            if names.count(name) > 1:
                raise ColadaError(f"{where}: the key {name!r} is there twice")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ColadaError(f"{where} is not valid JSON: {reason(error)}") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value, where)
    return value


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(DEEPEST):
        outer = [part for part in level if isinstance(part, dict | list)]
        level = [inner for part in outer for inner in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return
    raise ColadaError(f"{where} has more than {DEEPEST} lists or objects within one another")


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds; see :func:`parse_json` and :func:`read_text`."""
    return parse_json(read_text(path, "a JSON file", MOST_JSON), str(path))


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises ColadaError also if it holds anything else."""
    return as_object(read_json(path), str(path))


def as_object(value: Any, where: str) -> dict[str, Any]:
    """Return a JSON value that must be an object; raises ColadaError naming ``where``."""
    if not isinstance(value, dict):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise ColadaError(f"{where} holds {kind}, expected a JSON object")
    return value


# --- writing -----------------------------------------------------------------------------------

_counter = itertools.count()


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a file at once: its readers, even after a power cut, find the old one or the new one, whole.

    What is written goes to a temporary file beside it, which takes its place once all is on disk. A link's
    target is replaced, not the link. A character device, such as /dev/null, is written to as it is.

    Raises:
        ColadaError: if the place is no regular file, or cannot be written (no space, no permission).
    """
    try:
        mode = os.stat(path).st_mode if os.path.exists(as_path(path)) else None
        target = Path(os.path.realpath(path))
        partial = target.with_name(f".{target.name[:50]}.{os.getpid()}-{next(_counter)}.partial")
        if mode is not None and stat.S_ISCHR(mode):
            with open(path, "wb") as file:
                yield file
            return
        for holds, name in _SPECIAL:
            if mode is not None and holds(mode):
                raise ColadaError(f"{path} is {name}, expected a place for a file")
        try:
            with open(partial, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                os.chmod(partial, stat.S_IMODE(mode))
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync(target.parent)
    except OSError as error:
        raise ColadaError(f"{path}: cannot be written ({reason(error)})") from None


def write_text(path: str | Path, text: str) -> None:
    r"""Write a UTF-8 file at once, see :func:`atomic_writer`; lone surrogates become ``\udc80``."""
    # The escape is JSON's own, so that JSON stays JSON.
    data = text.encode("utf-8", "backslashreplace")
    with atomic_writer(path) as file:
        file.write(data)


def write_json(path: str | Path, values: Mapping[str, Any], *, sort: bool = True) -> None:
    """Write an indented JSON object at once, dataclasses as objects.

    Args:
        sort: keys by name; else they stay in their order.
    """
    write_text(path, json.dumps(dict(values), indent=2, sort_keys=sort, default=asdict) + "\n")


def locked(path: Path, busy: str, wait: Callable[[str], None] | None = None) -> FileLock:
    """Return a lock file, held until it is released; the system frees it however its holder ends.

    Args:
        busy: what is said where another process holds it.
        wait: told so; the lock is then waited for. None: it is an error.

    Raises:
        ColadaError: if another process holds it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if wait is None:
            raise ColadaError(busy) from None
        wait(busy)
        lock.acquire()
    except OSError as error:
        raise ColadaError(f"{path}: cannot be written ({reason(error)})") from None
    return lock


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Make a directory at once: yields an empty one beside it, which takes its name once all is on disk.

    What had the name before is removed then; what a killed process left beside it, before.

    Raises:
        OSError: if it cannot be written.
    """
    beginning = f".{final.name[:50]}."
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(f"{glob.escape(beginning)}*-*.partial"):
        if not _runs(leftover.name.removeprefix(beginning).partition("-")[0]):
            shutil.rmtree(leftover)
    partial = final.with_name(f"{beginning}{os.getpid()}-{next(_counter)}.partial")
    partial.mkdir()
    try:
        yield partial
        for folder, _, names in os.walk(partial):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        replace_directory(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _runs(number: str) -> bool:
    """Whether a process of this machine has the number."""
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # It is someone else's.
        return True
    return True


def replace_directory(partial: Path, final: Path) -> None:
    """Give a complete directory its name, and remove what had that name before.

    Both change names in one step where the system can (Linux); elsewhere the old one is renamed first, so
    that nothing half removed ever stands under ``final``.

    Raises:
        OSError: as renaming does.
    """
    if not os.path.lexists(final):
        os.rename(partial, final)
    else:
        old = partial
        if not _exchange(partial, final):
            old = final.with_name(f".{final.name[:50]}.{os.getpid()}-{next(_counter)}.old")
            os.rename(final, old)
            os.rename(partial, final)
        _sync(final.parent)
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    _sync(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change names in one step; return whether the system could."""
    rename: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _sync(path: Path) -> None:
    """Write a file, or a directory's names, through to the disk; a link has nothing of its own."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
