"""The project's command lines: ``colada``, and those of the clone, behind ``bench`` and ``study``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

PROGRAMS = {"bench": "benchmarks.generation", "study": "experiments.scaling"}


def main(args: Sequence[str]) -> int:
    """Run a command in this process and return its exit status."""
    program = PROGRAMS.get(args[0]) if args else None
    run: Callable[[Sequence[str]], int]
    run = import_module(f"{program}.__main__" if program else "colada.cli.main").main
    return run(args[1:] if program else args)


def command_line(args: Sequence[str]) -> list[str]:
    """Return the words that run a command in a process of its own."""
    program = PROGRAMS.get(args[0]) if args else None
    return [sys.executable, "-m", program or "colada", *(args[1:] if program else args)]
