"""What all benchmarks share: turns, medians and ranges, what the figures depend on, and their record."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from benchmarks.machine import machine_name, synchronise
from colada.files import write_json
from colada.report.table import Table
from colada.train.provenance import provenance

Result = TypeVar("Result")
Row = Mapping[str, Any]
"""What was measured of one variant: numbers, :class:`Spread`, texts; None where there is nothing."""


@dataclass(frozen=True)
class Spread:
    """The median, least and greatest of repeated measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


def take_turns(
    variants: Mapping[str, Callable[[], Result]], repeats: int, warm_up: int
) -> dict[str, list[Result]]:
    """Return the results of each variant's turns, which alternate: what slows the machine down meets all.

    A variant that wants more memory than the GPU has takes no further turn, and is left out.

    Args:
        variants: by name; each is called for one turn.
        repeats, warm_up: turns of each that count, and that come before.
    """
    results: dict[str, list[Result]] = {name: [] for name in variants}
    for number in range(warm_up + repeats):
        for name in list(results):
            try:
                result = variants[name]()
            except torch.OutOfMemoryError:
                del results[name]
                torch.cuda.empty_cache()
                continue
            if number >= warm_up:
                results[name].append(result)
    return results


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return how long a call took, the device being waited for before and after."""
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begin


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the spread of the ratios turn by turn."""
    return Spread.of(above / below for above, below in zip(numerators, denominators, strict=True))


def peak_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of this process on a CPU, allocated by torch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def made_with(device: torch.device) -> dict[str, str]:
    """Return what figures depend on: versions, commit, and the machine with its threads."""
    return {**provenance(device), "device": machine_name(device)}


# --- what is shown and kept ----------------------------------------------------------------------


def number(value: float) -> str:
    """Return a number in three digits, or all before the point; very small ones as 1.2e-07."""
    size = abs(value)
    if 0 < size < 0.001:
        return f"{value:.1e}"
    return f"{value:,.{0 if size >= 100 or not size else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def cell(value: Any, form: str) -> str:
    """Return a cell of a table; ``form`` puts a spread's median {0} and range {1} together."""
    if isinstance(value, dict):  # As a record has it.
        value = Spread(**value)
    if isinstance(value, Spread):
        return form.format(number(value.median), f"{number(value.least)}–{number(value.most)}")
    if value is None:
        return ""
    return number(value) if isinstance(value, float) else str(value)


def table(rows: Sequence[Row], form: str = "{0} ({1})") -> Table:
    """Return rows as a table, without the columns that are empty; ``form`` as in :func:`cell`."""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return Table(columns, [[cell(row[name], form) for name in columns] for row in rows])


def show(title: str, rows: Sequence[Row], console: Console) -> None:
    """Print rows as a table: medians, and their ranges below them."""
    console.print(f"\n[bold]{title}[/]")
    table(rows, "{0}\n{1}").print(console)


def write_record(path: Path, title: str, device: torch.device, rows: Sequence[Row], **others: Any) -> None:
    """Write a benchmark's record: its title, what it was made with, its rows, and whatever else it has.

    ``python -m benchmarks.table`` reads it.
    """
    record = {"title": title, "made_with": made_with(device), **others, "rows": rows}
    write_json(path, record, sort=False)
