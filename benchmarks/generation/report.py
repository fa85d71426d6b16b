"""What was measured, as tables on a terminal, as JSON, and as a plot."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.generation.contestants import AR, ENGINE
from benchmarks.generation.levers import Price
from benchmarks.generation.machine import Rates, machine_name
from benchmarks.generation.mixed import Mixed
from benchmarks.generation.run import Cell, Result, Spread
from benchmarks.generation.work import history_bytes
from colada.errors import ColadaError
from colada.files import require_file
from colada.models.cola import ColaDLM
from colada.train.plan import parameter_counts, scaled
from colada.train.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {ENGINE: "#2468b4", "plain": "#d2601a", "reference": "#66717e", AR: "#2f8f6b"}
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run share.

    Attributes:
        model: its origin or size.
        machine: and the torch that ran on it.
        dtype: of the weights.
        guidance, seed, repeats, warm_up: as asked for.
        rates: of the machine, measured.
        parameters: of each network.
        history_bytes: per latent.
        made_with: versions, commit, device.
    """

    model: str
    machine: str
    dtype: str
    guidance: float
    seed: int
    repeats: int
    warm_up: int
    rates: Rates
    parameters: dict[str, int]
    history_bytes: float
    made_with: dict[str, str]

    @classmethod
    def of(
        cls, model: ColaDLM, rates: Rates, *, guidance: float, seed: int, repeats: int, warm_up: int
    ) -> Setting:
        """Describe a model on the machine that it is on."""
        dtype = model.dit.txt_in.proj.weight.dtype
        return cls(
            model.origin,
            machine_name(model.device),
            str(dtype).removeprefix("torch."),
            guidance,
            seed,
            repeats,
            warm_up,
            rates,
            parameter_counts(model.vae.config, model.dit.config),
            history_bytes(model.vae.config, model.dit.config, dtype.itemsize),
            provenance(model.device),
        )


# --- JSON ----------------------------------------------------------------------------------------


def peak_resident_bytes() -> int:
    """Return the greatest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def to_dict(setting: Setting, cells: Sequence[Cell], mixed: Sequence[Mixed]) -> dict[str, Any]:
    """Return all that was measured as JSON values: seconds, tokens per second, bytes, FLOPs, shares."""
    return {
        **dataclasses.asdict(setting),
        "peak_resident_bytes": peak_resident_bytes(),
        "cells": [_cell_dict(cell) for cell in cells],
        "mixed": [dataclasses.asdict(one) for one in mixed],
    }


def _cell_dict(cell: Cell) -> dict[str, Any]:
    per_token = 1 / cell.job.tokens
    return {
        **dataclasses.asdict(cell),
        "flops_per_token": cell.total.flops * per_token,
        "bytes_per_token": cell.total.bytes * per_token,
        "limit_tokens_per_second": cell.job.tokens / cell.least_seconds,
    }


# --- terminal ------------------------------------------------------------------------------------


def print_setting(setting: Setting, console: Console) -> None:
    """Print what all measurements share: the machine, the model, and the machine's measured rates."""
    made = setting.made_with
    console.print(f"{setting.machine}, torch {made['torch']}, {setting.dtype}, seed {setting.seed}")
    sizes = ", ".join(f"{name} {scaled(count)}" for name, count in setting.parameters.items())
    console.print(setting.model)
    console.print(f"{sizes}; history {scaled(setting.history_bytes, 'B')} a latent")
    rates = setting.rates
    console.print(
        f"measured: copies {rates.bandwidth / 1e9:,.1f} GB/s, products {scaled(rates.matmul, 'FLOP')}/s"
    )


def print_cell(cell: Cell, console: Console) -> None:
    """Print one point of the sweep: medians, and the range of what matters most."""
    job, total = cell.job, cell.total
    console.print(f"\n[bold]batch {job.batch}, context {job.context}, {job.steps} steps[/]")
    per_token = f"{scaled(total.flops / job.tokens, 'FLOP')} and {scaled(total.bytes / job.tokens, 'B')}"
    console.print(f"{per_token} a token: at most {_number(job.tokens / cell.least_seconds)} tokens/s")
    with_memory = any(result.memory is not None for result in cell.results.values())
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    titles = ["tokens/s", "range", "first", "block", "limit", f"{ENGINE} is"]
    for title in [*titles, "GB"] if with_memory else titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name, result in cell.results.items():
        table.add_row(name, *_row(result, cell.speedups.get(name), with_memory))
    for name in cell.out_of_memory:
        table.add_row(name, "out of memory")
    console.print(table)


def _row(result: Result, speedup: Spread | None, with_memory: bool) -> list[str]:
    row = [
        _number(result.rate.median),
        f"{_number(result.rate.least)}–{_number(result.rate.most)}",
        _seconds(result.first.median),
        _seconds(result.block.median) if result.block is not None else "",
        f"{result.of_limit.median:.0%}" if result.of_limit is not None else "",
        f"{_number(speedup.median)}x ({_number(speedup.least)}–{_number(speedup.most)})" if speedup else "",
    ]
    if with_memory:
        row.append(f"{result.memory / 1e9:.2f}" if result.memory is not None else "")
    return row


def print_mixed(mixed: Mixed, console: Console) -> None:
    """Print how continuous batching did on mixed lengths."""
    share = mixed.share
    console.print(
        f"\n[bold]{mixed.requests} mixed requests, {mixed.slots} at once[/]: "
        f"{_number(mixed.tokens / mixed.seconds.median)} tokens/s, {share.median:.0%} "
        f"({share.least:.0%}–{share.most:.0%}) of the ideal"
    )


def print_levers(prices: Sequence[Price], console: Console) -> None:
    """Print what each lever costs and saves."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for title in ("passes", "time", "error", "same tokens", "entropy", "pairs"):
        table.add_column(title, justify="right", no_wrap=True)
    for price in prices:
        table.add_row(
            price.name,
            str(price.passes),
            _seconds(price.seconds.median),
            f"{price.error:.3f}",
            f"{price.agreement:.1%} ± {price.agreement_error:.1%}",
            f"{price.entropy:.2f}",
            f"{price.distinct:.0%}",
        )
    console.print(table)


def print_memory(device: torch.device, console: Console) -> None:
    """Print the most memory the process had on a CPU, which is that of all contestants together."""
    if device.type == "cpu":
        console.print(f"\npeak resident memory {peak_resident_bytes() / 1e9:.2f} GB, of the whole run")


def _number(value: float) -> str:
    """Return a number in three digits, or all before the point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def _seconds(value: float) -> str:
    return f"{_number(value)} s" if value >= 1 else f"{_number(1e3 * value)} ms"


# --- plot ----------------------------------------------------------------------------------------


def check_plot(path: Path) -> None:
    """Raise ColadaError if no plot could be written to a file of this name."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ColadaError('a plot needs matplotlib: pip install "colada-lm[train]"') from None
    if path.suffix not in PLOT_SUFFIXES:
        raise ColadaError(f"{path}: suffix {path.suffix!r}, expected one of {', '.join(PLOT_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ColadaError(f"{path}: there is no directory {path.parent}")
    if path.exists():
        require_file(path, "a regular file, or none")  # A named pipe would wait for who reads it.


def write_plot(path: Path, setting: Setting, cells: Sequence[Cell]) -> None:
    """Write the plot of :func:`draw`; the file's suffix says of which kind.

    Raises:
        ColadaError: see :func:`check_plot`; or if the file cannot be written.
    """
    check_plot(path)
    import matplotlib

    from colada.report.style import STYLE

    with matplotlib.rc_context(STYLE):
        figure = draw(setting, cells)
        try:
            figure.savefig(path, dpi=160)
        except OSError as error:
            raise ColadaError(f"{path}: {error.strerror or error}") from None


def draw(setting: Setting, cells: Sequence[Cell]) -> Figure:
    """Return the plot: median and range of each cell's contestants, and what the machine could do at best."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    from colada.report.style import INK

    names = list(dict.fromkeys(name for cell in cells for name in cell.results))
    figure = Figure(figsize=(5.6, 1.2 + 0.18 * len(cells) * (len(names) + 1)), layout="constrained")
    axes = figure.add_subplot()
    tops = [number * (len(names) + 1) for number in range(len(cells))]
    for place, name in enumerate(names):
        mine = [
            (top + place, cell.results[name].rate)
            for top, cell in zip(tops, cells, strict=True)
            if name in cell.results
        ]
        rates = [rate for _, rate in mine]
        below = [rate.median - rate.least for rate in rates]
        above = [rate.most - rate.median for rate in rates]
        axes.errorbar(
            [rate.median for rate in rates],
            [y for y, _ in mine],
            xerr=[below, above],
            label=name,
            color=COLOURS[name],
            fmt="o",
            markersize=4,
            linewidth=1.6,
        )
    limits = [cell.job.tokens / cell.least_seconds for cell in cells]
    axes.vlines(
        limits,
        [top - 0.5 for top in tops],
        [top + len(names) - 0.5 for top in tops],
        color=INK,
        linewidth=1.2,
        label="limit",
    )
    jobs = [cell.job for cell in cells]
    labels = [f"batch {job.batch}, context {job.context}, {job.steps} steps" for job in jobs]
    axes.set_yticks([top + (len(names) - 1) / 2 for top in tops], labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.4g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens per second (log)")
    # Over the whole figure: a title of the axes has no room for a long name.
    figure.suptitle(f"{setting.model}, {setting.dtype}", x=0.01, ha="left", fontsize=10, fontweight="bold")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.3, borderpad=0)
    return figure
