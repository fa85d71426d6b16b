"""The report of a run: one HTML file with every curve, readable offline, and the same plots as files.

Everything comes from the run's directory: metrics.jsonl, and samples.jsonl, recipe.yaml
and the last checkpoint if they are there. What was not recorded is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from colada.errors import ColadaError, reason
from colada.files import read_text
from colada.flow import T
from colada.report.page import Page
from colada.report.style import (
    BLUE,
    MUTED,
    ORANGE,
    PAPER,
    SHADES,
    compact,
    label_log_axis,
    require_matplotlib,
    save_figure,
    styled,
)
from colada.report.table import Table
from colada.strict_yaml import read_yaml
from colada.train.checkpoints import RECIPE, find, read_state
from colada.train.logs import (
    DRAWINGS_DIR,
    METRICS_FILE,
    NOT_MEASURED,
    SAMPLES_FILE,
    read_records,
    read_samples,
    require_metrics,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHEETS = 6
"""Of drawings, spread over a run."""
REPORT_DIR, REPORT_FILE = "report", "report.html"

MetricsRecord = dict[str, Any]


class Quantity(NamedTuple):
    """How a number of a record is shown: its plot's title and unit, and what it is multiplied by for that.

    ``noisy``: whether its moving average says more than its values.
    """

    title: str
    unit: str
    factor: float = 1.0
    noisy: bool = True


QUANTITIES = {
    "loss": Quantity("Loss", "weighted sum of the terms"),
    "nll": Quantity("Reconstruction, −log p(x | z0)", "nats per token"),
    "masked": Quantity("Masked reconstruction", "nats per token"),
    "kl": Quantity("KL(q ‖ N(0, I))", "nats per token"),
    "log_q": Quantity("Negative entropy, E log q(z0 | x)", "nats per token"),
    "kl_ref": Quantity("KL(q ‖ q_ref)", "nats per token"),
    "flow": Quantity("Flow loss", "mean squared velocity error"),
    "log_snr": Quantity("Log-SNR of the latents", "log(E μ² / E σ²)"),
    "accuracy": Quantity("Reconstruction accuracy", "% of tokens", 100),
    "reward": Quantity("Reward of answers", "mean of a round"),
    "preferred": Quantity("Implicit accuracy: the chosen answer gained more", "% of pairs", 100),
    "margin": Quantity("Margin: what the chosen answer gained more", "flow error"),
    "chosen": Quantity("Chosen answers, against the first weights", "flow error"),
    "rejected": Quantity("Rejected answers, against the first weights", "flow error"),
    "drift": Quantity("Drift from the first weights", "mean squared velocity"),
    "grad_norm": Quantity("Gradient norm", "L2 norm before clipping"),
    "lr": Quantity("Learning rate", "learning rate", noisy=False),
    "tokens_per_s": Quantity("Throughput", "tokens/s"),
    "mfu": Quantity("Model FLOPs utilisation", "% of the device's peak", 100),
    "memory_gb": Quantity("Memory", "GB, largest so far", noisy=False),
}
"""The known numbers, in the order of the report; any other follows under its own name."""

BY_T = "flow_by_t"
STATED = NOT_MEASURED | {BY_T, "tokens", "skipped"}  # Said in words, or drawn in another way.


# --- curves --------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """One quantity over one split of a stage: (S,) steps and values in its unit; NaN where not finite."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, records: Sequence[MetricsRecord], name: str, factor: float) -> Curve:
        """Return the curve of the records that have the number."""
        points = [record for record in records if name in record]
        values = [math.nan if record[name] is None else record[name] * factor for record in points]
        return cls(np.array([record["step"] for record in points]), np.array(values, dtype=float))

    @property
    def finite(self) -> np.ndarray:
        """The finite values."""
        return self.values[np.isfinite(self.values)]

    def last(self, share: float = 0.0) -> float:
        """Return the mean of the last share of the finite values, at least one; NaN if there is none."""
        finite = self.finite
        return float(finite[-max(1, int(share * len(finite))) :].mean()) if len(finite) else math.nan


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the exponential moving average of (S,) values, each over about the last S / 30 of them.

    It is a weighted mean of the values so far, so it starts at the first one; NaNs have no weight.
    """
    decay, averaged, total, weight = math.exp(-30 / max(30, len(values))), [], 0.0, 0.0
    for value in values.tolist():
        finite = math.isfinite(value)
        total, weight = decay * total + (value if finite else 0.0), decay * weight + finite
        averaged.append(total / weight if weight else math.nan)
    return np.array(averaged)


# --- plots ---------------------------------------------------------------------------------------

TRAIN, VALIDATION = BLUE, ORANGE
POINTS: dict[str, Any] = {
    **{"linestyle": "none", "marker": "o", "markersize": 4},
    **{"markeredgecolor": PAPER, "markeredgewidth": 0.6, "color": VALIDATION},
}


def plot_curves(quantity: Quantity, train: Curve, validation: Curve) -> Figure:
    """Return a plot over steps: train values thin under their moving average, validation as points."""
    figure, axes = _figure(quantity.title, "step", quantity.unit, above=24)
    plain: dict[str, Any] = {"color": TRAIN, "linewidth": 1.6}
    if len(train.finite) and not quantity.noisy:
        axes.plot(*train, **plain, label="train")
    elif len(train.finite):
        axes.plot(*train, color=TRAIN, alpha=0.4, linewidth=0.8, label="train")
        axes.plot(train.steps, smooth(train.values), **plain, label="train, smoothed")
    if len(train.steps) == 1:  # One point makes no line.
        axes.lines[-1].set_marker("o")
    if len(validation.finite):
        axes.plot(*validation, label="validation", **POINTS)
    finite = np.concatenate([train.finite, validation.finite])
    if finite.min() > 0 and finite.max() > 30 * finite.min():
        axes.set_yscale("log")
        axes.set_ylabel(f"{quantity.unit} (log)")
        label_log_axis(axes.yaxis, subs=(1, 2, 5) if finite.max() < 1000 * finite.min() else (1,))
    # A row between the title and the plot, where no curve is.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.3, borderpad=0)
    return figure


def plot_flow_by_t(train: Sequence[MetricsRecord], validation: Sequence[MetricsRecord]) -> Figure:
    """Return the flow loss over the timestep: means over each fifth of the stage, and the last validation."""
    across = "timestep t (0: data, 1000: noise)"
    figure, axes = _figure("Flow loss by timestep", across, QUANTITIES["flow"].unit, above=10)
    groups = np.array_split(np.arange(len(train)), min(len(SHADES), len(train)))
    for group, colour in zip(groups, SHADES[-len(groups) :], strict=True):
        values = _bin_means([train[index][BY_T] for index in group])
        steps = f"{compact(train[group[0]]['step'])}–{compact(train[group[-1]]['step'])}"
        axes.plot(_bin_centres(values), values, "o-", color=colour, label=steps, linewidth=1.6, markersize=3)
    if validation:
        values = _bin_means([validation[-1][BY_T]])
        axes.plot(_bin_centres(values), values, label="validation, last", **POINTS)
    axes.set_xlim(0, T)
    axes.set_xticks(np.linspace(0, T, 6))
    # Curves may be anywhere in the plot, so their names are beside it.
    names = axes.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), title="train, steps", title_fontsize=8, alignment="left"
    )
    names.get_title().set_color(MUTED)
    return figure


def _figure(title: str, across: str, up: str, above: float) -> tuple[Figure, Axes]:
    """Return empty axes with a title ``above`` them by so many points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    axes = figure.add_subplot(xlabel=across, ylabel=up)
    axes.set_title(title, pad=above)
    axes.xaxis.set_major_formatter(compact)
    axes.yaxis.set_major_formatter(compact)
    return figure, axes


def _bin_means(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Return the mean of each bin over the records that have it; NaN for a bin that none has."""
    table = np.array(rows, dtype=float)
    counts = np.isfinite(table).sum(0)
    return np.where(counts > 0, np.nansum(table, 0) / np.maximum(counts, 1), math.nan)


def _bin_centres(values: np.ndarray) -> np.ndarray:
    return (np.arange(len(values)) + 0.5) * T / len(values)


def draw_plots(records: Sequence[MetricsRecord]) -> dict[str, Figure]:
    """Return the plots of the records of one stage, by name, in the order of the report.

    A number that is in no record, or finite in none, has no plot.
    """
    figures = {
        name: plot_curves(quantity, train, validation)
        for name, (quantity, train, validation) in _curves(records).items()
        if len(train.finite) or len(validation.finite)
    }
    binned = [record for record in records if any(value is not None for value in record.get(BY_T) or ())]
    train, validation = _splits(binned)
    if train:
        figures[BY_T] = plot_flow_by_t(train, validation)
    return figures


def _splits(records: Sequence[MetricsRecord]) -> tuple[list[MetricsRecord], list[MetricsRecord]]:
    train = [record for record in records if record["split"] == "train"]
    return train, [record for record in records if record["split"] == "validation"]


def _curves(records: Sequence[MetricsRecord]) -> dict[str, tuple[Quantity, Curve, Curve]]:
    """Return the curves of some records, by name: the known ones in their order, then the others."""
    items = (item for record in records for item in record.items())
    names = dict.fromkeys(name for name, value in items if name not in STATED and not isinstance(value, list))
    quantities = {name: quantity for name, quantity in QUANTITIES.items() if name in names}
    quantities |= {name: Quantity(name, name) for name in names if name not in QUANTITIES}
    train, validation = _splits(records)
    return {
        name: (quantity, Curve.of(train, name, quantity.factor), Curve.of(validation, name, quantity.factor))
        for name, quantity in quantities.items()
    }


# --- the page ------------------------------------------------------------------------------------


def write_report(out: Path) -> Path:
    """Write the report of the run in ``out`` and return its path, ``out/report/report.html``.

    The plots are in the page, and beside it as ``vae_nll.svg`` and so on.

    Raises:
        ColadaError: without matplotlib or records, for a damaged file (naming the line), or a full disk.
    """
    require_matplotlib("a report")
    records = read_records(require_metrics(out))
    if not records:
        raise ColadaError(f"{out / METRICS_FILE} holds no record yet")
    samples = read_samples(out / SAMPLES_FILE) if (out / SAMPLES_FILE).is_file() else []
    page = Page(out.resolve().name, "training report").facts(_facts(records, out))
    directory = out / REPORT_DIR
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise ColadaError(f"cannot write to {directory}: {reason(error)}") from None
    with styled():
        for stage in dict.fromkeys(record["stage"] for record in records):
            _add_stage(page, stage, [record for record in records if record["stage"] == stage], directory)
    sheets = sorted((out / DRAWINGS_DIR).glob("*.png"))
    if sheets:
        page.section("Drawings", "Of the same validation captions and seeds through training.")
        for number in np.unique(np.linspace(0, len(sheets) - 1, SHEETS).round().astype(int)):
            name, _, steps = sheets[number].stem.rpartition("-")
            page.picture(sheets[number].read_bytes(), f"{name}, step {int(steps):,}")
    if samples:
        stage, step = samples[-1]["stage"], samples[-1]["step"]
        last = [one for one in samples if (one["stage"], one["step"]) == (stage, step)]
        page.section(f"Samples at step {step:,} of {stage}")
        page.texts([(one["title"], one["text"]) for one in last])
    if (out / RECIPE).is_file():
        page.texts([("", read_text(out / RECIPE))], fold="Recipe")
    checkpoint = find(out, "auto")
    if checkpoint is not None:
        page.provenance(read_state(checkpoint).get("made_with", {}))
    page.write(directory / REPORT_FILE)
    return directory / REPORT_FILE


def _facts(records: Sequence[MetricsRecord], out: Path) -> dict[str, str]:
    """Return what is true of the whole run: terms and values."""
    times = [record["time"] for record in records]
    clock = timedelta(seconds=round(max(times) - min(times)))
    facts = {"Wall clock, first to last record": f"{clock} hours"}
    tokens = {record["stage"]: record["tokens"] for record in records if record.get("tokens") is not None}
    if tokens:
        facts["Tokens"] = f"{sum(tokens.values()):,.0f}"
    recipe = read_yaml(out / RECIPE) if (out / RECIPE).is_file() else {}
    if not isinstance(recipe, dict):
        what = type(recipe).__name__
        raise ColadaError(f"{out / RECIPE} holds a {what}, expected sections such as 'data:'")
    return facts | ({"Seed": str(recipe["seed"])} if "seed" in recipe else {})


def _add_stage(page: Page, stage: str, records: Sequence[MetricsRecord], directory: Path) -> None:
    """Add a stage's table and plots to the page, and write the plots into a directory."""
    sentence = f"{max(record['step'] for record in records):,} steps"
    skipped = [record["skipped"] for record in records if record.get("skipped") is not None]
    if skipped:
        sentence += f", {skipped[-1] or 'none'} of them skipped"
    table = Table(("", "unit", "train, first", "train, last tenth", "validation, last"), texts=2)
    for quantity, train, validation in _curves(records).values():
        first = next(iter(train.finite), math.nan)
        values = map(_number, (first, train.last(0.1), validation.last()))
        table.row(quantity.title, quantity.unit, *values)
    page.section(f"Stage {stage}", f"{sentence}.").table(table)
    for name, figure in draw_plots(records).items():
        stem = f"{stage}_" + re.sub(r"\W", "_", name)
        page.figure(figure, stem)
        save_figure(figure, directory / f"{stem}.svg")


def _number(value: float) -> str:
    """Return a value of the table to four digits, and a dash for none."""
    if not math.isfinite(value):
        return "–"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "−")
