"""Results for people: tables in a terminal, and one page with plots.

Plots are rows of SVG whose positions are in per cent, so they fit any width and their texts keep their size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rich.console import Console
from rich.table import Table

from colada.evaluate.outputs import Output
from colada.evaluate.statistics import Naming, Score, average, correct, wilson
from colada.evaluate.tasks import THE_EIGHT
from colada.files import write_text
from colada.report.page import PAGE, STYLE

PUBLISHED_AVERAGE = 26.75
"""The released 2.3B model's mean over the eight tasks."""

_EXAMPLES = 2  # of right and of wrong outputs, each, of a task
_SHOWN_PROMPT = 1200  # characters, from its end

# --- terminal ------------------------------------------------------------------------------------


def print_tables(scores: Sequence[Score], console: Console) -> None:
    """Print the scores, and how outputs choose among options; in per cent."""
    table = _table("Task", "Items", "Score", "±", "Chance", "Released")
    for score in scores:
        chance = _percent(score.task.chance) if score.task.chance is not None else "–"
        values = str(score.items), _percent(score.share), _percent(score.error), chance
        table.add_row(score.task.title, *values, f"{score.task.published:.2f}")
    mean, error = average(scores)
    published = f"{PUBLISHED_AVERAGE:.2f}" if _are_the_eight(scores) else "–"
    table.add_section()
    table.add_row("Average", "", _percent(mean), _percent(error), "", published)
    console.print(table)
    chosen = [(score, score.naming) for score in scores if score.naming is not None]
    if not chosen:
        return
    table = _table("Options", "Named", "Right", "95%", "Chance", "Picks A B …", "Truth A B …")
    for score, naming in chosen:
        low, high = naming.interval
        table.add_row(
            score.task.title,
            _percent(naming.named / score.items, 1),
            _percent(naming.accuracy, 1) if naming.named else "–",
            f"{_percent(low, 1)} to {_percent(high, 1)}" if naming.named else "–",
            _percent(naming.chance, 1),
            _positions(naming.picked),
            _positions(naming.truth),
        )
    console.print()
    console.print(table)


def print_generative(result: Mapping[str, Any], judge: str, console: Console) -> None:
    """Print what :func:`colada.evaluate.generative.read_generated` returns, with its judge's name."""
    bound = result["kind"] == "bound"
    table = _table(f"Judge: {judge}", "Generated", "Real")
    columns = result["generated"], result["real"]
    table.add_row("perplexity, at most" if bound else "perplexity", *map(_perplexity, columns))
    table.add_row("entropy of a text, bits", *(f"{own['entropy']:.3f}" for own in columns))
    table.add_row("entropy of all, bits", *(f"{own['entropy_together']:.3f}" for own in columns))
    for name in [name for name in columns[0] if name.startswith("distinct_")]:
        table.add_row(name.replace("_", "-"), *(f"{own[name]:.3f}" for own in columns))
    for name in ("texts", "tokens"):
        table.add_row(name, *(f"{own[name]:,}" for own in columns))
    console.print(table)
    console.print(
        f"{result['left_out']} texts too short, {result['empty']} without a continuation,"
        f" {result['ended']} ended early"
    )


def _perplexity(own: Mapping[str, Any]) -> str:
    error = own["standard_error"]
    return f"{own['perplexity']:.2f}" + ("" if error is None else f" ± {error:.2f}")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _positions(counts: Sequence[int]) -> str:
    total = sum(counts)
    return " ".join(f"{100 * count / total:.0f}" for count in counts) if total else "–"


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}"


def _are_the_eight(scores: Sequence[Score]) -> bool:
    return sorted(score.task.name for score in scores) == sorted(THE_EIGHT)


# --- the page ------------------------------------------------------------------------------------


def write_page(
    path: Path,
    title: str,
    scores: Sequence[Score],
    outputs: Mapping[str, Sequence[Output]],
    facts: Mapping[str, Any],
) -> None:
    """Write the report, one self-contained HTML file.

    Args:
        path: the file, replaced if it exists.
        title: what was evaluated.
        scores: of the tasks.
        outputs: of each task, by its name; examples of them are shown.
        facts: settings, versions and the like, at the end of the page.

    Raises:
        ColadaError: if it cannot be written.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        _headline(scores),
        _scores_section(scores),
        _naming_section([score for score in scores if score.naming is not None]),
        _samples_section(scores, outputs),
        _facts_section(facts),
    ]
    write_text(path, PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, body))))


def _headline(scores: Sequence[Score]) -> str:
    mean, error = average(scores)
    facts = {
        f"Average of {len(scores)} task{'s' * (len(scores) > 1)}": f"{_percent(mean)} ± {_percent(error)} %",
        "Items": f"{sum(score.items for score in scores):,}",
    }
    if _are_the_eight(scores):
        facts["Released Cola 2.3B"] = f"{PUBLISHED_AVERAGE} %"
    return f'<dl class="big">{_terms(facts)}</dl>'


def _terms(facts: Mapping[str, str]) -> str:
    return "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>" for term, value in facts.items()
    )


def _scores_section(scores: Sequence[Score]) -> str:
    highest = max(
        max(score.interval[1], score.task.published / 100, score.task.chance or 0) for score in scores
    )
    scale = _Scale(highest)
    rows = [
        _row(
            score.task.title,
            scale,
            f"{_percent(score.share)} <small>± {_percent(score.error)}</small>",
            scale.chance(score.task.chance)
            + scale.published(score.task.published / 100)
            + scale.estimate(score.share, score.interval),
        )
        for score in scores
    ]
    return (
        "<section><h2>Scores</h2><p>Per cent of items whose output is the answer. The model writes text,"
        " nothing is ranked by likelihood, so a score can be far below chance: an output that is no option"
        " is wrong. Values with their standard errors; bars are 95% intervals. The released model's scores"
        " are of its own prompts and items.</p>"
        f"{_card(_legend('score', 'released Cola 2.3B', 'chance'), *rows, scale.axis())}</section>"
    )


def _naming_section(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    whole, named_rows, right_rows, cards = _Scale(1.0), [], [], []
    for score in scores:
        naming = score.naming
        assert naming is not None
        share = naming.named / score.items
        named_rows.append(
            _row(
                score.task.title,
                whole,
                f"{_percent(share, 1)} <small>of {score.items:,}</small>",
                whole.estimate(share, wilson(naming.named, score.items)),
            )
        )
        accuracy = whole.estimate(naming.accuracy, naming.interval) if naming.named else ""
        value = _percent(naming.accuracy, 1) if naming.named else "–"
        right_rows.append(
            _row(
                score.task.title,
                whole,
                f"{value} <small>of {naming.named:,}</small>",
                whole.chance(naming.chance) + accuracy,
            )
        )
        cards.append(_positions_card(score.task.title, naming))
    axis = whole.axis()
    return (
        "<section><h2>How often an option is named at all</h2><p>An output names an option by its letter, by"
        " its text, by containing that of no other, or by text at least 90% like it.</p>"
        f"{_card(_legend('outputs that name an option'), *named_rows, axis)}</section>"
        "<section><h2>How often the named option is right</h2><p>Among the outputs that name an option. Where"
        " the interval holds chance, the model does no better than picking one blindly.</p>"
        f"{_card(_legend('right among those', 'chance'), *right_rows, axis)}</section>"
        "<section><h2>Which position is picked</h2><p>Share of the named options at each position, beside"
        " where the right one is in all items.</p>"
        f'{_legend("picked", "truth")}<div class="cards">{"".join(cards)}</div></section>'
    )


def _positions_card(title: str, naming: Naming) -> str:
    picked = [count / max(1, naming.named) for count in naming.picked]
    truth = [count / sum(naming.truth) for count in naming.truth]
    widest = max(*picked, *truth)
    bars = "".join(
        f'<div class="bar"><span>{letter}</span><svg height="22" role="img" aria-label="{escape(title)},'
        f' {letter}: picked {_percent(ours, 1)}, truth {_percent(theirs, 1)}">'
        f'<rect class="ours" y="3" height="8" rx="2" width="{_percent(ours / widest)}%"/>'
        f'<rect class="truth" y="12" height="6" rx="2" width="{_percent(theirs / widest)}%"/></svg>'
        f'<span class="value">{_percent(ours, 1)} / {_percent(theirs, 1)}</span></div>'
        for letter, ours, theirs in zip(ascii_uppercase, picked, truth, strict=False)
    )
    return f'<div class="card"><h3>{escape(title)}</h3>{bars}</div>'


class _Scale:
    """A horizontal axis from 0 to a round share not below the highest that is drawn."""

    def __init__(self, highest: float) -> None:
        self.step = 0.25 if highest > 0.75 else 0.2 if highest > 0.4 else 0.1 if highest > 0.15 else 0.05
        self.ticks = [self.step * n for n in range(int(highest / self.step - 1e-9) + 2)]

    def x(self, share: float) -> str:
        """Return where a share is drawn."""
        return f"{100 * share / self.ticks[-1]:.2f}%"

    def grid(self) -> str:
        """Return the lines of the ticks."""
        return "".join(
            f'<line class="gridline" x1="{self.x(tick)}" x2="{self.x(tick)}" y1="0" y2="100%"/>'
            for tick in self.ticks
        )

    def axis(self) -> str:
        """Return the row with the ticks' numbers, in per cent."""
        labels = (
            f'<text class="axis" x="{self.x(tick)}" y="12" text-anchor="middle">{100 * tick:.0f}</text>'
            for tick in self.ticks
        )
        return (
            '<div class="plot"><span class="name"></span><span class="track">'
            f'<svg height="16" aria-hidden="true">{"".join(labels)}</svg></span>'
            '<span class="value"></span></div>'
        )

    def estimate(self, share: float, interval: tuple[float, float]) -> str:
        """Return a value with its interval."""
        low, high = map(self.x, interval)
        return (
            f'<line class="ours" x1="{low}" x2="{high}" y1="50%" y2="50%" stroke-width="3"'
            f' stroke-opacity="0.5"/><circle class="ours dot" cx="{self.x(share)}" cy="50%" r="5"/>'
        )

    def published(self, share: float) -> str:
        """Return the released model's value."""
        return f'<circle class="published" cx="{self.x(share)}" cy="50%" r="8" stroke-width="2"/>'

    def chance(self, share: float | None) -> str:
        """Return the line of what picking any option gives."""
        if share is None:
            return ""
        x = self.x(share)
        return f'<line class="chance" x1="{x}" x2="{x}" y1="3" y2="27" stroke-width="1.5"/>'


def _row(name: str, scale: _Scale, value: str, marks: str) -> str:
    return (
        f'<div class="plot"><span class="name">{escape(name)}</span><span class="track">'
        f'<svg height="30" role="img" aria-label="{escape(name)}">{scale.grid()}{marks}</svg></span>'
        f'<span class="value">{value}</span></div>'
    )


def _card(*parts: str) -> str:
    return f'<div class="card">{"".join(parts)}</div>'


_MARKS = {
    "chance": '<line class="chance" x1="8" x2="8" y1="0" y2="16" stroke-width="1.5"/>',
    "released Cola 2.3B": '<circle class="published" cx="8" cy="8" r="7" stroke-width="2"/>',
    "truth": '<rect class="truth" y="4" width="16" height="8" rx="2"/>',
    "picked": '<rect class="ours dot" y="4" width="16" height="8" rx="2"/>',
}
_OWN_MARK = '<circle class="ours dot" cx="8" cy="8" r="5"/>'


def _legend(*names: str) -> str:
    marks = "".join(
        f'<span><svg width="16" height="16" aria-hidden="true">{_MARKS.get(name, _OWN_MARK)}</svg>'
        f"{escape(name)}</span>"
        for name in names
    )
    return f'<div class="legend">{marks}</div>'


def _samples_section(scores: Sequence[Score], outputs: Mapping[str, Sequence[Output]]) -> str:
    parts = []
    for score in scores:
        own = outputs[score.task.name]
        right = correct(score.task, own)
        examples = [
            [output for output in own if right[output.id] is wanted][:_EXAMPLES] for wanted in (True, False)
        ]
        samples = "".join(_sample(output, right[output.id]) for some in examples for output in some)
        parts.append(f"<details><summary>{escape(score.task.title)}</summary>{samples}</details>")
    return f"<section><h2>Outputs</h2><p>The first right and wrong ones.</p>{''.join(parts)}</section>"


def _sample(output: Output, right: bool) -> str:
    prompt = output.prompt if len(output.prompt) <= _SHOWN_PROMPT else f"… {output.prompt[-_SHOWN_PROMPT:]}"
    verdict = "right" if right else "wrong"
    terms = {"written": output.generate.strip() or "(nothing)", "answer": output.ground_truth}
    return (
        f'<div class="card sample"><pre>{escape(prompt)}</pre><dl><div><dt>item {escape(output.id)}</dt>'
        f'<dd class="{verdict}">{verdict}</dd></div>{_terms(terms)}</dl></div>'
    )


def _facts_section(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td class="text">{escape(_said(value))}</td></tr>'
        for name, value in facts.items()
    )
    table = f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>How it was made</h2>{table}</section>" if facts else ""


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    return value if isinstance(value, str) else json.dumps(value)
