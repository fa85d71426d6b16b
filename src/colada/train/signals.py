"""Asked to stop, a run saves first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def graceful_stop(ask: Callable[[], None]) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a call."""
    old = {which: signal.signal(which, lambda *_: ask()) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for which, handler in old.items():
            signal.signal(which, handler)
