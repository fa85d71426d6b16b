"""Rewards of a model's answers for people: tables, the best of K, drift by time, and answers as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colada.flow import T
from colada.report.page import Page
from colada.report.style import SERIES, styled
from colada.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10
"""Conversations on the page, unselected."""


def rewards_table(result: Mapping[str, Any]) -> Table:
    """Return a row for each task, split and model."""
    titles = ("reward, %", "95%", "wins, %", "95%", "ended, %", "tokens", "distinct-2", "judge")
    table = Table(("Task", "model", "prompts", *titles), texts=2)
    for point in result["tasks"]:
        for place, (name, measured) in enumerate(point["models"].items()):
            table.row(
                "" if place else point["name"], name, str(measured["reward"]["prompts"]), *_row(measured)
            )
    return table


def _row(measured: Mapping[str, Any]) -> list[str]:
    wins, judge = measured.get("wins"), measured.get("judge")
    return [
        f"{100 * measured['reward']['mean']:.1f}",
        _interval(measured["reward"]),
        "" if wins is None else f"{100 * wins['mean']:.1f}",
        "" if wins is None else _interval(wins),
        f"{100 * measured['ended']:.1f}",
        f"{measured['tokens']:.1f}",
        f"{measured['distinct_2']:.3f}",
        "–" if judge is None else f"{judge:.2f}",
    ]


def _interval(share: Mapping[str, Any]) -> str:
    low, high = share["interval"]
    return f"{100 * low:.1f}–{100 * high:.1f}"


def variety_table(result: Mapping[str, Any]) -> Table:
    """Return how varied each model's answers to one prompt are, and its best of K: means over tasks."""
    tasks = list(result["best_of"].values())
    counts = list(next(iter(tasks[0].values()))["curve"])
    best = [f"best of {k}, %" for k in counts]
    table = Table(("Answers to one prompt", "distinct-2", "shared tokens, %", "entropy, bits", *best))
    for name in tasks[0]:
        of_tasks = [task[name] for task in tasks]
        values = (_mean([one[key] for one in of_tasks]) for key in ("distinct_2", "overlap", "entropy"))
        curve = [f"{100 * _mean([one['curve'][k] for one in of_tasks]):.1f}" for k in counts]
        distinct, overlap, entropy = values
        table.row(name, f"{distinct:.3f}", f"{100 * overlap:.1f}", f"{entropy:.2f}", *curve)
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def flow_table(flows: Mapping[str, Any]) -> Table:
    """Return flows on texts of each kind, and of each model what it differs by from those before it."""
    table = Table(("Flow on", "model", "flow", "before it", "change, %", "drift, %"), texts=2)
    for kind, flow in flows.items():
        names = list(flow["flow"])
        for place, name in enumerate(names):
            cells = (kind if place == 0 else "", name, f"{flow['flow'][name]:.4f}")
            if place == 0:
                table.row(*cells, "", "", "")
            for number, other in enumerate(names[:place]):
                change = 100 * (flow["flow"][name] / flow["flow"][other] - 1)
                gone = 100 * flow["drift"][name][other]["drift"]
                labels = ("", "", "") if number else cells
                table.row(*labels, other, f"{change:+.2f}", f"{gone:.2f}")
    return table


def draw_best_of(result: Mapping[str, Any]) -> Figure:
    """Return the expected best reward over the number of answers, a line a model, the mean over tasks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="answers, K", ylabel="expected best reward")
    axes.set_title("Best of K")
    axes.set_xscale("log", base=2)
    tasks = list(result["best_of"].values())
    for colour, name in zip(SERIES * 3, tasks[0], strict=False):
        counts = list(tasks[0][name]["curve"])
        means = [_mean([task[name]["curve"][k] for task in tasks]) for k in counts]
        axes.plot([int(k) for k in counts], means, "o-", color=colour, label=name, markersize=3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_drift(flows: Mapping[str, Any], reference: str) -> Figure:
    """Return each model's drift from another over the timestep, on texts of each kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="timestep t (0: data, 1000: noise)", ylabel="drift, % of the flow's error"
    )
    axes.set_title(f"Drift from {reference}")
    for (kind, flow), style in zip(flows.items(), ("o-", "s--"), strict=True):
        models = [(name, drift[reference]) for name, drift in flow["drift"].items() if reference in drift]
        for colour, (name, drift) in zip(SERIES * 3, models, strict=False):
            size = T / len(drift["by_time"])
            at = [(n + 0.5) * size for n in range(len(drift["by_time"]))]
            values = [100 * x for x in drift["by_time"]]
            axes.plot(at, values, style, color=colour, label=f"{name}, {kind}", markersize=3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def write_rewards_page(
    path: Path, title: str, result: Mapping[str, Any], flows: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write everything as one page; raises ColadaError if that fails."""
    page = Page(title, "rewards")
    reference = facts["reference"]
    against = (
        "" if reference is None else f" Wins are against {reference}, by answers of other seeds, ties half."
    )
    page.section(
        "Rewards",
        "Of answers to prompts that were kept from training, by rules. A rule that was trained on shows that"
        " training worked, not that answers are good: the judge's perplexity and the answers below stand"
        f" beside it.{against}",
    ).table(rewards_table(result))
    if result["best_of"]:
        page.section("Variety", "Means over the tasks whose prompts were kept from training.")
        page.table(variety_table(result))
    if flows:
        page.section(
            "The flow",
            "Its error at the same noise, by how much it is over that of the models named before, and how far"
            " it has gone from theirs. On plain stories it says what was forgotten.",
        )
        page.table(flow_table(flows))
    with styled():
        if result["best_of"]:
            page.figure(draw_best_of(result), "best_of", "Unbiased; the mean over tasks.")
        for kind in list(flows)[:1]:
            names = list(flows[kind]["flow"])
            page.figure(draw_drift(flows, reference if reference in names else names[0]), "drift")
    step = max(1, len(result["conversations"]) // SHOWN)
    page.section("Answers, unselected")
    for one in result["conversations"][::step][:SHOWN]:
        answers = [
            f"{name} ({answer['reward']:.2f}): {answer['answer']}" for name, answer in one["answers"].items()
        ]
        page.texts([(one["prompt"], "\n".join(answers))])
    page.provenance(facts)
    page.write(path)
