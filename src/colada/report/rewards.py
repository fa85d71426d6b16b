"""Rewards of a model's answers for people: tables, the best of K, drift by time, and answers as they come."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Return a row a task and split, and one of the other model's answers below it."""
    table = Table(
        ("Task", "prompts", "reward, %", "95%", "wins, %", "95%", "ended, %", "tokens", "distinct-2", "judge")
    )
    for point in result["tasks"]:
        table.row(point["name"], str(point["reward"]["prompts"]), *_row(point))
        if "against" in point:
            table.row("  the other model", "", *_row(point["against"]))
    return table


def _row(point: Mapping[str, Any]) -> list[str]:
    wins = point.get("wins")
    judge = point.get("judge")
    return [
        f"{100 * point['reward']['mean']:.1f}",
        _interval(point["reward"]),
        "" if wins is None else f"{100 * wins['mean']:.1f}",
        "" if wins is None else _interval(wins),
        f"{100 * point['ended']:.1f}",
        f"{point['tokens']:.1f}",
        f"{point['distinct_2']:.3f}",
        "–" if judge is None else f"{judge:.2f}",
    ]


def _interval(share: Mapping[str, Any]) -> str:
    low, high = share["interval"]
    return f"{100 * low:.1f}–{100 * high:.1f}"


def flow_table(flows: Mapping[str, Any]) -> Table:
    """Return how far the flow has gone from the other model's, and what it is on texts of both."""
    table = Table(("Flow on", "samples", "drift, %", "flow", "the other's", "change, %"))
    for name, own in flows.items():
        change = 100 * (own["flow"] / own["base_flow"] - 1)
        values = (
            f"{100 * own['drift']:.2f}",
            f"{own['flow']:.4f}",
            f"{own['base_flow']:.4f}",
            f"{change:+.2f}",
        )
        table.row(name, f"{own['samples']:,}", *values)
    return table


def draw_best_of(result: Mapping[str, Any]) -> Figure:
    """Return the expected best reward over the number of answers, a line a task, the other model's dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="answers, K", ylabel="expected best reward")
    axes.set_title("Best of K")
    axes.set_xscale("log", base=2)
    for colour, (name, own) in zip(SERIES * 3, result["best_of"].items(), strict=False):
        for one, style in ((own, "o-"), (own.get("against"), "s--")):
            if one is not None:
                at = [int(k) for k in one["curve"]]
                label = name if style == "o-" else None
                axes.plot(at, list(one["curve"].values()), style, color=colour, label=label, markersize=3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_drift(flows: Mapping[str, Any]) -> Figure:
    """Return the drift over the timestep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="timestep t (0: data, 1000: noise)", ylabel="drift, % of the flow's error"
    )
    axes.set_title("Drift by time")
    for colour, (name, own) in zip(SERIES, flows.items(), strict=False):
        size = T / len(own["by_time"])
        at = [(n + 0.5) * size for n in range(len(own["by_time"]))]
        axes.plot(at, [100 * x for x in own["by_time"]], "o-", color=colour, label=name, markersize=3)
    axes.legend()
    return figure


def write_rewards_page(
    path: Path, title: str, result: Mapping[str, Any], flows: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write everything as one page; raises ColadaError if that fails."""
    page = Page(title, "rewards")
    page.section(
        "Rewards",
        "Of answers to prompts that were kept from training, by rules. A rule that was trained on shows that"
        " training worked, not that answers are good: the judge's perplexity and the answers below stand"
        " beside it.",
    ).table(rewards_table(result))
    if flows:
        page.section("The flow", "How far it has gone from the other model's, at the same noise.")
        page.table(flow_table(flows))
    with styled():
        if result["best_of"]:
            page.figure(draw_best_of(result), "best_of", "Unbiased; the other model's dashed.")
        if flows:
            page.figure(draw_drift(flows), "drift")
    step = max(1, len(result["conversations"]) // SHOWN)
    some = result["conversations"][::step][:SHOWN]
    page.section("Answers, unselected")
    page.texts(
        [(f"{one['prompt']} (reward {one['reward']:.2f})", one["answer"] or "(nothing)") for one in some]
    )
    page.provenance(facts)
    page.write(path)
