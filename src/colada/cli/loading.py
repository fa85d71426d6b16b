"""What a terminal shows while torch and a model are loaded; rich itself would keep it waiting."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say on a terminal's standard error what is being loaded, and take it away once that is done."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    try:
        width = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        width = 0
    # One row: what is wrapped cannot be taken away.
    text = f"loading {what} ..."[: max(1, (width or 80) - 1)]
    print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"\r{' ' * len(text)}\r", end="", file=sys.stderr, flush=True)
