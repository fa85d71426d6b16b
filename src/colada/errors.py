"""The one exception users are meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
