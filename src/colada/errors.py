"""The one exception users are meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ColadaError(Exception):
    """Something the user can mend: bad input, a bad file, a bad setting.

    The message is one line that names the value and what was expected. The
    command line prints it and exits with status 2; library users may catch it.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
