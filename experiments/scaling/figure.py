"""The figure of a study: a panel a task and the average, training FLOPs against score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colada.errors import ColadaError
from colada.evaluate.statistics import wilson
from colada.evaluate.tasks import Task
from colada.files import write_text
from colada.models.base import ARCHITECTURES
from colada.train.checkpoints import disk_errors
from experiments.scaling.cells import ARCHS, Result
from experiments.scaling.summary import Mean, Point, largest, markdown, points_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES, OPTIONS = "scaling", "options"
COLOURS = {"cola": "#2468b4", "ar": "#d2601a", "llada": "#2f8f6b"}
MARKERS = {"cola": "o", "ar": "s", "llada": "^"}

_COLUMNS = 3


def write_figures(out: Path, results: Sequence[Result]) -> list[Path]:
    """Write figures (SVG and PNG), tables and record of some results, and return the files.

    ``scaling.svg`` is the paper's figure, ``options.svg`` how often an option is named at all, and rightly;
    ``scaling.md`` has the tables, ``scaling.json`` all numbers with every cell's record.

    Raises:
        ColadaError: without matplotlib, if the results do not belong together, or for a full disk.
    """
    try:
        import matplotlib
    except ImportError:
        raise ColadaError('a figure needs matplotlib: pip install "colada-lm[train]"') from None
    from colada.report.style import STYLE

    points, tasks = points_of(results), results[0].tasks
    with matplotlib.rc_context(STYLE):
        figures = {SCORES: draw_scores(points, tasks)}
        if any(task.chance is not None for task in tasks):
            figures[OPTIONS] = draw_options(points, tasks)
        files = [out / f"{name}{suffix}" for name in figures for suffix in (".svg", ".png")]
        with disk_errors(out):
            for file in files:
                # Without a date, so that the same results give the same file.
                metadata = {"Date": None} if file.suffix == ".svg" else {}
                figures[file.stem].savefig(file, dpi=160, metadata=metadata)
    record: dict[str, Any] = {
        "asked": results[0].asked,
        "points": [point.to_dict(tasks) for point in points],
        "cells": [result.record for result in results],
    }
    tables, numbers = out / f"{SCORES}.md", out / f"{SCORES}.json"
    write_text(tables, markdown(points, tasks) + "\n")
    write_text(numbers, json.dumps(record, indent=2) + "\n")
    return [*files, tables, numbers]


def draw_scores(points: Sequence[Point], tasks: Sequence[Task]) -> Figure:
    """Return a panel a task, and one of their average: mean and standard error over seeds."""
    from matplotlib.figure import Figure

    rows = -(-(len(tasks) + 1) // _COLUMNS)
    figure = Figure(figsize=(7.6, 0.5 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True).flat
    panels = list(grid)
    for task, axes in zip(tasks, panels, strict=False):
        _panel(axes, task.title, [(point, point.scores[task.name]) for point in points], task.chance)
    average = panels[len(tasks)]
    _panel(average, f"Average of {len(tasks)}", [(point, point.average) for point in points], None)
    for axes in panels[len(tasks) + 1 :]:
        axes.remove()
    for axes in panels[max(0, len(tasks) + 1 - _COLUMNS) : len(tasks) + 1]:
        axes.set_xlabel("training FLOPs (log)")
        axes.tick_params(axis="x", labelbottom=True)
    for axes in panels[: len(tasks) + 1 : _COLUMNS]:
        axes.set_ylabel("score, %")
    handles: dict[str, Any] = {}
    for axes in panels[: len(tasks) + 1]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles))
    return figure


def _panel(axes: Axes, title: str, values: Sequence[tuple[Point, Mean]], chance: float | None) -> None:
    """Draw one line an architecture over training FLOPs."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from colada.report.style import MUTED

    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(_flops)
    axes.xaxis.set_minor_formatter(NullFormatter())
    for arch in ARCHS:
        own = [(point.cost.total_flops, mean) for point, mean in values if point.arch == arch]
        if own:
            axes.errorbar(
                [flops for flops, _ in own],
                [mean.value for _, mean in own],
                yerr=[mean.error or 0.0 for _, mean in own],
                label=ARCHITECTURES[arch],
                color=COLOURS[arch],
                marker=MARKERS[arch],
                markersize=4,
                linewidth=1.4,
                elinewidth=1.1,
                capsize=2.5,
            )
    if chance is not None:
        axes.axhline(100 * chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    every = [point.cost.total_flops for point, _ in values]
    axes.set_xlim(min(every) / 1.25, max(every) * 1.25)
    top = max([mean.value + (mean.error or 0.0) for _, mean in values] + [100 * (chance or 0)])
    axes.set_ylim(0, max(5.0, 1.12 * top))


def _flops(value: float, position: float) -> str:
    """Return FLOPs as people write them: 2e13."""
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}"


def draw_options(points: Sequence[Point], tasks: Sequence[Task]) -> Figure:
    """Return, at each architecture's most expensive point, how often an option is named, and rightly then.

    Items of all seeds together, with 95% intervals.
    """
    from matplotlib.figure import Figure

    from colada.report.style import INK, MUTED

    chosen = [task for task in tasks if task.chance is not None]
    shown = largest(points)
    figure = Figure(figsize=(7.6, 0.9 + 0.17 * len(chosen) * (len(shown) + 1)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title in zip(panels, ("Names an option at all", "Right among those"), strict=True):
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
        axes.set_xlabel("% of outputs" if axes is panels[0] else "% of those that name one")
        axes.set_xlim(0, 100)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    tops = [number * (len(shown) + 1) for number in range(len(chosen))]
    for place, point in enumerate(shown):
        for top, task in zip(tops, chosen, strict=True):
            pooled = point.pooled[task.name]
            for axes, successes, trials in (
                (panels[0], *pooled.naming),
                (panels[1], *pooled.accuracy),
            ):
                if not trials:
                    continue
                share = successes / trials
                low, high = wilson(successes, trials)
                axes.errorbar(
                    [100 * share],
                    [top + place],
                    xerr=[[100 * max(0.0, share - low)], [100 * max(0.0, high - share)]],
                    label=f"{ARCHITECTURES[point.arch]}, {point.name}"
                    if top == 0 and axes is panels[0]
                    else None,
                    color=COLOURS[point.arch],
                    marker=MARKERS[point.arch],
                    markersize=4,
                    linewidth=1.4,
                )
    for top, task in zip(tops, chosen, strict=True):
        assert task.chance is not None
        panels[1].vlines(
            100 * task.chance,
            top - 0.5,
            top + len(shown) - 0.5,
            color=INK,
            linewidth=1,
            linestyle=(0, (4, 3)),
            label="chance" if top == 0 else None,
        )
    panels[0].set_yticks([top + (len(shown) - 1) / 2 for top in tops], [task.title for task in chosen])
    panels[0].invert_yaxis()
    handles, labels = (
        [*one, *other]
        for one, other in zip(*(axes.get_legend_handles_labels() for axes in panels), strict=True)
    )
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), labelcolor=MUTED)
    return figure
