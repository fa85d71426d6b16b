"""The one style of every figure: colours that have a light and a dark value on a page, reproducible files.

Everything is drawn within :func:`styled`, which leaves matplotlib as it was.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colada.errors import ColadaError, reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1d2733", "#66717e", "#e3e7ec", "#ffffff"
SERIES = BLUE, ORANGE, GREEN, PURPLE, RED, TEAL = (
    *("#2468b4", "#d2601a", "#2f8f6b"),
    *("#7b55b8", "#b3362b", "#2a8a9b"),
)
"""Colours of what is compared, in order."""
SHADES = ("#b9cfe6", "#8db3d9", "#5f95cb", "#2f74b8", "#0d4a86")
"""Colours of the parts of one thing, in order."""

COLOURS = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    **{colour: f"series{number}" for number, colour in enumerate(SERIES)},
    **{colour: f"shade{number}" for number, colour in enumerate(SHADES)},
}
"""Colour of a figure -> the page's name for it, see ``page.html``."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "colada",
    "savefig.dpi": 160,
    "path.simplify_threshold": 0.3,  # Of long curves, files hold what can be seen.
    "text.parse_math": False,
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": MUTED,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
}


def require_matplotlib(what: str) -> None:
    """Raise ColadaError, naming what is to be drawn, if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ColadaError(f'{what} needs matplotlib: pip install "colada-lm[train]"')


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save in this style."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file whose suffix says of which kind; the same figure gives the same file.

    Raises:
        ColadaError: if it cannot be written.
    """
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    try:
        figure.savefig(path, metadata=metadata)
    except OSError as error:
        raise ColadaError(f"cannot write to {path.parent}: {reason(error)}") from None


def inline_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element whose colours and font are the page's.

    Nothing in it points outside the page, and its ids begin with ``name``, so that many fit on one page.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(url\(|href=")#', rf"\1#{name}-", rest)
    rest = re.sub("|".join(COLOURS), lambda colour: f"var(--{COLOURS[colour[0]]})", rest)
    rest = re.sub(r"font-family: [^;\"]*", "font-family: inherit", rest)
    return f'<svg {view[0]} role="img" aria-label="{escape(name)}">{rest}'


# --- axes ----------------------------------------------------------------------------------------


def compact(value: float, position: float = 0) -> str:
    """Return an axis's number as people write it: 0.0005, 1.5, 200, 12k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.4g}{letter}".replace("-", "−")
    return f"{value:.5g}".replace("-", "−")


def label_log_axis(axis: Axis, form: Any = compact, subs: Sequence[int] = (1, 2, 5)) -> None:
    """Label a logarithmic axis at some multiples of each power of ten, and nowhere else."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(form)
    axis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True)
class Series:
    """One of the things that are compared, with a value and its interval at each place; None for no value."""

    name: str
    colour: str
    values: Sequence[tuple[float, float, float] | None]
    marker: str = "o"


def draw_intervals(
    axes: Axes,
    places: Sequence[str],
    series: Sequence[Series],
    marks: Sequence[float | None] = (),
    mark: str = "",
) -> None:
    """Draw places from top to bottom, at each a row a series: a value (value, low, high) and its interval.

    Args:
        axes: where; each series, and the marks, has its name there for a legend.
        places: their labels, on the vertical axis.
        series: see :class:`Series`.
        marks: at each place a value that all are held against; none for None.
        mark: what that is.
    """
    tops = [number * (len(series) + 1) for number in range(len(places))]
    for row, one in enumerate(series):
        points = [
            (value, low, high, top + row)
            for top, interval in zip(tops, one.values, strict=True)
            if interval is not None
            for value, low, high in [interval]
        ]
        axes.errorbar(
            [value for value, *_ in points],
            [y for *_, y in points],
            xerr=[
                [max(0.0, value - low) for value, low, *_ in points],
                [max(0.0, high - value) for value, _, high, _ in points],
            ],
            label=one.name,
            color=one.colour,
            fmt=one.marker,
            markersize=4,
            linewidth=1.6,
        )
    marked = [(value, top) for value, top in zip(marks, tops, strict=False) if value is not None]
    if marked:
        values, above = [value for value, _ in marked], [top - 0.5 for _, top in marked]
        below = [y + len(series) for y in above]
        axes.vlines(values, above, below, color=INK, linewidth=1.2, label=mark)
    axes.set_yticks([top + (len(series) - 1) / 2 for top in tops], places)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(tops[-1] + len(series) - 0.3, -0.7)
