"""What a judge makes of generated texts, for people: perplexity over variety, real text's point beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colada.report.page import Page
from colada.report.style import INK, SERIES, styled
from colada.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXAMPLES = 3  # of each point, on the page


def frontier_table(result: Mapping[str, Any], judge: str) -> Table:
    """Return a row a model and guidance, and one of real text.

    Args:
        result: of :func:`colada.evaluate.generative.frontier`.
        judge: its name.
    """
    bound = "at most, " if result["kind"] == "bound" else ""
    columns = {
        f"perplexity ({bound}{judge})": _perplexity,
        "distinct-1": lambda own: f"{own['distinct_1']:.3f}",
        "distinct-2": lambda own: f"{own['distinct_2']:.3f}",
        "distinct-3": lambda own: f"{own['distinct_3']:.3f}",
        "real's 2": lambda own: f"{own['real_distinct_2']:.3f}" if "real_distinct_2" in own else "",
        "entropy": lambda own: f"{own['entropy']:.3f}",
        "of all": lambda own: f"{own['entropy_together']:.3f}",
        "repeats, %": lambda own: f"{100 * own['repeated_words']:.2f}",
        "known, %": lambda own: f"{100 * own['known_words']:.2f}",
        "overlap": lambda own: "–" if own["overlap"] is None else f"{own['overlap']:.3f}",
        "tokens": lambda own: f"{own['tokens']:,}",
        "ended": lambda own: f"{own['ended']:,}" if "ended" in own else "",
    }
    table = Table(("model", "guidance", *columns))
    table.row("real text", "", *(shown(result["real"]) for shown in columns.values()))
    for point in result["points"]:
        guidance = point["settings"].get("guidance")
        cells = (shown(point) for shown in columns.values())
        table.row(point["model"], "–" if guidance is None else f"{guidance:g}", *cells)
    return table


def _perplexity(own: Mapping[str, Any]) -> str:
    error = own["standard_error"]
    return f"{own['perplexity']:.2f}" + ("" if error is None else f" ± {error:.2f}")


def draw_frontier(result: Mapping[str, Any]) -> Figure:
    """Return perplexity over distinct-2: a line a model, with the guidance beside each point."""
    from matplotlib.figure import Figure

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
        )
        for point in points:
            if point["settings"].get("guidance") is not None:
                place = point["distinct_2"], point["perplexity"]
                text = f"{point['settings']['guidance']:g}"
                axes.annotate(text, place, xytext=(4, 4), textcoords="offset points", fontsize=7.5)
    real = result["real"]
    axes.plot(real["distinct_2"], real["perplexity"], "*", color=INK, markersize=9, label="real text")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def write_frontier_page(path: Path, result: Mapping[str, Any], judge: str, facts: Mapping[str, Any]) -> None:
    """Write the table, the figure and some texts as one page. Raises ColadaError if that fails."""
    page = Page("Generated text before a judge", "evaluation")
    page.section(
        "Perplexity over variety",
        "Guidance moves a model along its line, towards likelier and more repetitive text; a better model has"
        " a line nearer to real text. Compare lines, never single points.",
    )
    page.table(frontier_table(result, judge))
    with styled():
        page.figure(
            draw_frontier(result), "frontier", "Numbers are guidance scales; bars are standard errors."
        )
    page.section("Texts", "The first of each.")
    for own in (result["real"], *result["points"]):
        guidance = own.get("settings", {}).get("guidance")
        title = own.get("model", "real text") + ("" if guidance is None else f", guidance {guidance:g}")
        texts = [(record["origin"], f"{record['prompt']}|{record['text']}") for record in own["records"]]
        page.texts(texts[:_EXAMPLES], fold=title)
    page.provenance(facts).write(path)
