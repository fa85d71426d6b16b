"""What a judge makes of generated texts, for people: perplexity over variety, real text's point beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colada.report.page import Page
from colada.report.style import INK, SERIES, styled
from colada.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXAMPLES = 3  # of each point, on the page
_LINES = "-", "--", ":"  # when colours come again


def frontier_table(result: Mapping[str, Any], full: bool = False) -> Table:
    """Return a row a model and guidance, or temperature, and one of real text; ``full``: for a wide page.

    Args:
        result: of :func:`colada.evaluate.generative.frontier`.
        full: whether to show every figure.
    """

    def plain(name: str, factor: float = 1.0, form: str = ".3f") -> Callable[[Mapping[str, Any]], str]:
        return lambda point: "–" if point.get(name) is None else format(factor * point[name], form)

    columns = {
        "at most" if result["kind"] == "bound" else "perplexity": _perplexity,
        "distinct-2": plain("distinct_2"),
        "real's": plain("real_distinct_2"),
        "repeats": plain("repeated_words", 100, ".2f"),
        "known": plain("known_words", 100, ".1f"),
        "overlap": plain("overlap"),
        "ended": plain("ended", 1, ",d"),
    }
    if full:
        columns |= {
            "distinct-1": plain("distinct_1"),
            "distinct-3": plain("distinct_3"),
            "entropy": plain("entropy"),
            "entropy of all": plain("entropy_together"),
            "tokens": plain("tokens", 1, ",d"),
        }
    table = Table(("", "s", *columns))
    for point in (result["real"], *result["points"]):
        cells = (column(point) for column in columns.values())
        table.row(point.get("model", "real text"), _place(point) or "–", *cells)
    return table


def _place(point: Mapping[str, Any]) -> str:
    """Return what moves a point along its model's line: guidance scale, else temperature; or nothing."""
    settings = point.get("settings", {})
    if settings.get("guidance") is not None:
        return f"{settings['guidance']:g}"
    return f"T {settings['temperature']:g}" if settings.get("temperature") else ""


def _perplexity(point: Mapping[str, Any]) -> str:
    error = point["standard_error"]
    return f"{point['perplexity']:.2f}" + ("" if error is None else f" ± {error:.2f}")


def draw_frontier(result: Mapping[str, Any]) -> Figure:
    """Return perplexity over distinct-2: a line a model, with guidance or temperature beside each point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.add_subplot(xlabel="distinct-2", ylabel="judge's perplexity (log)", yscale="log")
    models = list(dict.fromkeys(point["model"] for point in result["points"]))
    for number, model in enumerate(models):
        points = [point for point in result["points"] if point["model"] == model]
        axes.errorbar(
            [point["distinct_2"] for point in points],
            [point["perplexity"] for point in points],
            yerr=[point["standard_error"] or 0.0 for point in points],
            label=model,
            color=SERIES[number % len(SERIES)],
            marker="o",
            markersize=4,
            linewidth=1.4,
            linestyle=_LINES[number // len(SERIES) % len(_LINES)],
        )
        for point in points:
            place = point["distinct_2"], point["perplexity"]
            axes.annotate(_place(point), place, xytext=(4, 4), textcoords="offset points", fontsize=7.5)
    real = result["real"]
    axes.plot(real["distinct_2"], real["perplexity"], "*", color=INK, markersize=9, label="real text")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.5)))  # none over many decades
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def write_frontier_page(path: Path, result: Mapping[str, Any], judge: str, facts: Mapping[str, Any]) -> None:
    """Write the table, the figure and some texts as one page. Raises ColadaError if that fails."""
    page = Page(f"Generated text before {judge}", "evaluation")
    page.section(
        "Perplexity over variety",
        "Guidance moves a model along its line, towards likelier and more repetitive text; a better model has"
        " a line nearer to real text. Compare lines, never single points. s: guidance, or T, a temperature;"
        " real's: distinct-2 of the real texts cut to as many tokens; repeats and known: per cent of words.",
    )
    page.table(frontier_table(result, full=True))
    with styled():
        page.figure(
            draw_frontier(result),
            "frontier",
            "Numbers are guidance scales, or temperatures (T); bars are standard errors.",
        )
    page.section("Texts", "The first of each.")
    for point in (result["real"], *result["points"]):
        title = point.get("model", "real text") + (f", s: {_place(point)}" if _place(point) else "")
        texts = [(record["origin"], f"{record['prompt']}|{record['text']}") for record in point["records"]]
        page.texts(texts[:_EXAMPLES], fold=title)
    page.provenance(facts).write(path)
