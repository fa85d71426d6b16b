"""The figure of a study: a panel a task and the average, training FLOPs against score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colada.evaluate.statistics import wilson
from colada.evaluate.tasks import Task
from colada.files import write_json, write_text
from colada.models.base import ARCHITECTURES
from colada.report.style import (
    MUTED,
    SERIES,
    Series,
    draw_intervals,
    label_log_axis,
    require_matplotlib,
    save_figure,
    styled,
)
from experiments.scaling.cells import ARCHS, Result, Trials
from experiments.scaling.summary import Mean, Point, largest, markdown, points_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES, OPTIONS = "scaling", "options"
COLOURS, MARKERS = dict(zip(ARCHS, SERIES, strict=False)), dict(zip(ARCHS, "os^", strict=True))

_COLUMNS = 3


def write_figures(out: Path, results: Sequence[Result]) -> list[Path]:
    """Write figures (SVG and PNG), tables and record of some results, and return the files.

    ``scaling.svg`` is the paper's figure, ``options.svg`` how often an option is named at all, and rightly;
    ``scaling.md`` has the tables, ``scaling.json`` all numbers with every cell's record.

    Raises:
        ColadaError: without matplotlib, if the results do not belong together, or for a full disk.
    """
    require_matplotlib("a study's figure")
    points, tasks = points_of(results), results[0].tasks
    with styled():
        figures = {SCORES: draw_scores(points, tasks)}
        if any(task.chance is not None for task in tasks):
            figures[OPTIONS] = draw_options(points, tasks)
        files = [out / f"{name}{suffix}" for name in figures for suffix in (".svg", ".png")]
        for file in files:
            save_figure(figures[file.stem], file)
    record: dict[str, Any] = {
        "asked": results[0].asked,
        "points": [point.to_dict(tasks) for point in points],
        "cells": [result.record for result in results],
    }
    tables, numbers = out / f"{SCORES}.md", out / f"{SCORES}.json"
    write_text(tables, markdown(points, tasks) + "\n")
    write_json(numbers, record, sort=False)
    return [*files, tables, numbers]


def draw_scores(points: Sequence[Point], tasks: Sequence[Task]) -> Figure:
    """Return a panel a task, and one of their average: mean and standard error over seeds."""
    from matplotlib.figure import Figure

    panels = [(task.title, [point.scores[task.name] for point in points], task.chance) for task in tasks]
    panels.append((f"Average of {len(tasks)}", [point.average for point in points], None))
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(7.6, 0.5 + 2.1 * rows), layout="constrained")
    grid = list(figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True).flat)
    for axes in grid[len(panels) :]:
        axes.remove()
    handles: dict[str, Any] = {}
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        _draw_panel(axes, points, *panel)
        if number + _COLUMNS >= len(panels):
            axes.set_xlabel("training FLOPs (log)")
            axes.tick_params(axis="x", labelbottom=True)
        if number % _COLUMNS == 0:
            axes.set_ylabel("score, %")
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles))
    return figure


def _draw_panel(
    axes: Axes, points: Sequence[Point], title: str, means: Sequence[Mean], chance: float | None
) -> None:
    """Draw one line an architecture over training FLOPs."""
    axes.set_title(title, fontsize=9)
    axes.set_xscale("log")
    label_log_axis(axes.xaxis, _flops)
    for arch in dict.fromkeys(point.arch for point in points):
        line = [(p.cost.total_flops, m) for p, m in zip(points, means, strict=True) if p.arch == arch]
        axes.errorbar(
            [flops for flops, _ in line],
            [mean.value for _, mean in line],
            yerr=[mean.error or 0.0 for _, mean in line],
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
    every = [point.cost.total_flops for point in points]
    axes.set_xlim(min(every) / 1.25, max(every) * 1.25)
    top = max([mean.value + (mean.error or 0.0) for mean in means] + [100 * (chance or 0)])
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

    chosen, shown = [task for task in tasks if task.chance is not None], largest(points)
    titles, chance = [task.title for task in chosen], [100 * task.chance for task in chosen if task.chance]
    figure = Figure(figsize=(7.6, 0.9 + 0.17 * len(chosen) * (len(shown) + 1)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(title="Names an option at all", xlabel="% of outputs")
    right.set(title="Right among those", xlabel="% of those that name one")
    for axes, kind in ((left, "naming"), (right, "accuracy")):
        series = [
            Series(
                f"{ARCHITECTURES[point.arch]}, {point.name}",
                COLOURS[point.arch],
                [_interval(getattr(point.pooled[task.name], kind)) for task in chosen],
                MARKERS[point.arch],
            )
            for point in shown
        ]
        draw_intervals(axes, titles, series, chance if axes is right else (), "chance")
        axes.set_xlim(0, 100)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _interval(share: Trials) -> tuple[float, float, float] | None:
    """Return a share and its 95% interval, in per cent; None of nothing."""
    successes, trials = share
    low, high = wilson(successes, trials)
    return (100 * successes / trials, 100 * low, 100 * high) if trials else None
