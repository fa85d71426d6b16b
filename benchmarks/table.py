"""What benchmarks measured, for readers: tables of the records that they write with ``--json``.

python -m benchmarks.table RECORD... prints Markdown: medians with ranges, and what each was measured on; with
--page FILE it writes a page instead, with a figure of generation's tokens per second.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.measure import table
from colada.errors import ColadaError
from colada.files import read_json_object
from colada.report.page import Page
from colada.report.style import SERIES, Series, draw_intervals, label_log_axis, require_matplotlib, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


def read_record(path: Path) -> Record:
    """Read a record. Raises ColadaError if it is none."""
    record = read_json_object(path)
    if not record.get("rows"):
        raise ColadaError(f"{path}: no rows, expected a file that a benchmark wrote with --json")
    return record


def draw_rates(rows: list[Record]) -> Figure:
    """Return a figure of each peer's tokens per second at each point of a sweep, and of the limit."""
    from matplotlib.figure import Figure

    points: dict[str, dict[str, Any]] = {}
    for row in rows:
        point = f"batch {row['batch']}, context {row['context']}, {row['steps']} steps"
        points.setdefault(point, {})[row["peer"]] = row["tokens/s"]
    names = list(dict.fromkeys(row["peer"] for row in rows if row["peer"] != "limit"))
    figure = Figure(figsize=(5.6, 1.2 + 0.18 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    series = []
    for name, colour in zip(names, SERIES, strict=False):
        spreads = [rates.get(name) for rates in points.values()]
        intervals = [s and (s["median"], s["least"], s["most"]) for s in spreads]
        series.append(Series(name, colour, intervals))
    draw_intervals(axes, list(points), series, [rates["limit"] for rates in points.values()], "limit")
    axes.set_xscale("log")
    label_log_axis(axes.xaxis)
    axes.set_xlabel("tokens per second (log)")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def write_page(records: list[Record], path: Path) -> None:
    """Write a page of records. Raises ColadaError if it cannot be written."""
    require_matplotlib("a page")
    page = Page("Benchmarks", "speed")
    for number, record in enumerate(records):
        page.section(record["title"]).facts(record["made_with"])
        if "peer" in record["rows"][0]:
            with styled():
                page.figure(
                    draw_rates(record["rows"]),
                    f"rates{number}",
                    "Medians and ranges; the limit is of Cola DLM's work.",
                )
        page.table(table(record["rows"]))
    page.write(path)


def main(
    files: Annotated[list[Path], typer.Argument(metavar="RECORD...")],
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page of them.")] = None,
) -> None:
    """Print records as tables, in their order, or write a page of them."""
    try:
        records = [read_record(path) for path in files]
        if page is not None:
            write_page(records, page)
            return
    except ColadaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    for record in records:
        made = ", ".join(f"{name} {value}" for name, value in record["made_with"].items())
        print(f"{record['title']}\n\n{table(record['rows']).markdown()}\n\n({made})\n")


if __name__ == "__main__":
    typer.run(main)
