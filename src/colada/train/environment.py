"""What the environment says of the ranks of a run. Nothing here waits for torch."""

from __future__ import annotations

import os
import re

from colada.errors import ColadaError

MOST_RANKS = 2**20


def world_size() -> int:
    """Return how many ranks ``torchrun`` (or who sets the same variables) started, 1 without it.

    Raises:
        ColadaError: naming the variable that is missing, or what it says.
    """
    size = _number("WORLD_SIZE", 1, MOST_RANKS) if "WORLD_SIZE" in os.environ else 1
    if size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name, "").strip():
                raise ColadaError(
                    f"WORLD_SIZE={size} without {name}: start the ranks with torchrun, or set it"
                )
        _number("MASTER_PORT", 1, 65535)
    if "RANK" in os.environ:
        _number("RANK", 0, size - 1)
    return size


def rank_of_world() -> tuple[int, int]:
    """Return this process's rank and how many there are, for those that need not talk to each other.

    Raises:
        ColadaError: as :func:`world_size`.
    """
    size = _number("WORLD_SIZE", 1, MOST_RANKS) if "WORLD_SIZE" in os.environ else 1
    return (_number("RANK", 0, size - 1) if "RANK" in os.environ or size > 1 else 0), size


def local_rank(devices: int) -> int:
    """Return this rank's number on its machine, of so many devices.

    Raises:
        ColadaError: as :func:`world_size`.
    """
    return _number("LOCAL_RANK", 0, devices - 1)


def ranks_here() -> int:
    """Return how many ranks share this machine; raises :class:`ColadaError` as :func:`world_size`."""
    return _number("LOCAL_WORLD_SIZE", 1, MOST_RANKS) if "LOCAL_WORLD_SIZE" in os.environ else 1


def _number(name: str, low: int, high: int) -> int:
    text = os.environ.get(name)
    if text is None or not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        expected = f"a whole number from {low} to {high}" if high > low else str(low)
        raise ColadaError(f"the environment has {name}={text!r}, expected {expected}, as torchrun sets it")
    return int(text)
