"""The one exception users are meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ColadaError(Exception):
    """Something the user can mend: bad input, a bad file, a bad setting.

    The message is one line that names the value and what was expected. The
    command line prints it and exits with status 2; library users may catch it.
    What a message quotes may be anything: it is shown in printable characters, and its middle left out where
    it is longer than a page.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_shown(message))


_LONGEST = 1000  # Characters.


def _shown(message: str) -> str:
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 3 :]}"
    if not message.isprintable():
        words = " ".join(message.split())
        message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return message


class ColadaWarning(UserWarning):
    """Something that works, but may not be what the user wants. The command line prints it as a note."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest known name, or an empty string."""
    if not isinstance(name, str):
        return ""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def one_of(known: Iterable[object], value: object = None) -> str:
    """Return ``"expected one of 'a', 'b' (did you mean 'b'?)"``: what a message says of an unknown value."""
    listed = list(known)
    return f"expected one of {', '.join(map(repr, listed))}{nearest(value, map(str, listed))}"


def shown(value: Any, most: int = 60) -> str:
    """Return a value as an error message shows it: on one line, and short whatever it is."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"  # Python does not print the longest.
    if isinstance(value, str | bytes):
        value = value[: most + 1]
    elif isinstance(value, list | tuple) and len(value) > most:
        value = value[:most]
    try:
        text = " ".join(repr(value).split())
    except Exception:  # repr() is the value's own, and may raise anything.
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def reason(error: BaseException) -> str:
    """Return an error's cause, without a file's name."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "integer string conversion" in str(error):
        return "a whole number has thousands of digits"
    return " ".join(str(error).split()) or type(error).__name__


def failure(what: str, error: Exception) -> ColadaError:
    """Return what has failed, for whatever reason, as one line."""
    return ColadaError(f"{what}: {reason(error)}")
