"""Results of benchmarks for people: tables in a terminal, and one page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from colada.evaluate.outputs import Output
from colada.evaluate.statistics import Naming, Score, average, judge, wilson
from colada.evaluate.tasks import THE_EIGHT
from colada.report.page import Page
from colada.report.style import BLUE, ORANGE, Series, draw_intervals, styled
from colada.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED_AVERAGE = 26.75
"""The released 2.3B model's mean over the eight tasks."""

_EXAMPLES = 2  # of right and of wrong outputs, each, of a task
_SHOWN_PROMPT = 1200  # characters, from its end


def score_table(scores: Sequence[Score]) -> Table:
    """Return the scores of some tasks and their average, in per cent."""
    table = Table(("Task", "Items", "Score", "±", "95%", "Chance", "Released"))
    for score in scores:
        chance = _percent(score.task.chance) if score.task.chance is not None else "–"
        values = _percent(score.share), _percent(score.error), _interval(score.interval), chance
        published = "–" if score.task.published is None else f"{score.task.published:.2f}"
        table.row(score.task.title, f"{score.items:,}", *values, published)
    mean, error = average(scores)
    published = f"{PUBLISHED_AVERAGE:.2f}" if _are_the_eight(scores) else "–"
    return table.row("Average", "", _percent(mean), _percent(error), "", "", published)


def naming_table(scores: Sequence[Score]) -> Table:
    """Return how the outputs of tasks with options choose among these, in per cent."""
    table = Table(("Options", "Named", "Right", "95%", "Chance", "Picks A B …", "Truth A B …"))
    for score, naming in _with_options(scores):
        table.row(
            score.task.title,
            _percent(naming.named / score.items, 1),
            _percent(naming.accuracy, 1) if naming.named else "–",
            _interval(naming.interval) if naming.named else "–",
            _percent(naming.chance, 1),
            _positions(naming.picked),
            _positions(naming.truth),
        )
    return table


def print_tables(scores: Sequence[Score], console: Console) -> None:
    """Print the scores, and how outputs choose among options."""
    score_table(scores).print(console)
    if _with_options(scores):
        console.print()
        naming_table(scores).print(console)


def _with_options(scores: Sequence[Score]) -> list[tuple[Score, Naming]]:
    return [(score, score.naming) for score in scores if score.naming is not None]


def _positions(counts: Sequence[int]) -> str:
    total = sum(counts)
    return " ".join(f"{100 * count / total:.0f}" for count in counts) if total else "–"


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}"


def _interval(interval: tuple[float, float]) -> str:
    return " to ".join(_percent(bound, 1) for bound in interval)


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
    mean, error = average(scores)
    headline = {
        f"Average of {len(scores)} task{'s' * (len(scores) > 1)}": f"{_percent(mean)} ± {_percent(error)} %",
        "Items": f"{sum(score.items for score in scores):,}",
    }
    if _are_the_eight(scores):
        headline["Released Cola 2.3B"] = f"{PUBLISHED_AVERAGE} %"
    page = Page(title, "evaluation").facts(headline, large=True)
    with styled():
        page.section(
            "Scores",
            "Per cent of items whose output is the answer. The model writes text, nothing is ranked by"
            " likelihood, so a score can be far below chance: an output that is no option is wrong. Values"
            " with their standard errors; bars are 95% intervals (Wilson's). The released model's scores are"
            " of its own prompts and items.",
        )
        page.table(score_table(scores)).figure(draw_scores(scores), "scores")
        if _with_options(scores):
            page.section(
                "How options are chosen",
                "An output names an option by its letter, by its text, by containing that of no other, or by"
                " text at least 90% like it. Where the interval of the right ones among those holds chance,"
                " the model does no better than picking one blindly.",
            )
            page.table(naming_table(scores)).figure(draw_naming(scores), "options")
    page.section("Outputs", "The first right and wrong ones.")
    for score in scores:
        page.texts(_examples(score, outputs[score.task.name]), fold=score.task.title)
    page.provenance(facts).write(path)


def draw_scores(scores: Sequence[Score]) -> Figure:
    """Return each task's score, the released model's, and chance."""
    from matplotlib.figure import Figure

    percentages = [_bar(score.correct, score.items) for score in scores]
    released = [None if score.task.published is None else (score.task.published,) * 3 for score in scores]
    chance = [None if score.task.chance is None else 100 * score.task.chance for score in scores]
    figure = Figure(figsize=(5.6, 0.9 + 0.4 * len(scores)), layout="constrained")
    axes = figure.add_subplot(xlabel="score, %")
    series = Series("score", BLUE, percentages), Series("released Cola 2.3B", ORANGE, released, "D")
    draw_intervals(axes, [score.task.title for score in scores], series, chance, "chance")
    axes.set_xlim(left=0)
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def draw_naming(scores: Sequence[Score]) -> Figure:
    """Return how often an option is named, and how often the named one is right, beside chance."""
    from matplotlib.figure import Figure

    chosen = _with_options(scores)
    named = [_bar(naming.named, score.items) for score, naming in chosen]
    right = [_bar(naming.right, naming.named) for _, naming in chosen]
    figure = Figure(figsize=(5.6, 0.9 + 0.4 * len(chosen)), layout="constrained")
    axes = figure.add_subplot(xlabel="%")
    series = Series("name an option", BLUE, named), Series("right among those", ORANGE, right, "D")
    chance = [100 * naming.chance for _, naming in chosen]
    draw_intervals(axes, [score.task.title for score, _ in chosen], series, chance, "chance")
    axes.set_xlim(0, 100)
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _bar(successes: int, trials: int) -> tuple[float, float, float] | None:
    """Return a share and its 95% interval in per cent; None without trials."""
    if not trials:
        return None
    low, high = wilson(successes, trials)
    return 100 * successes / trials, 100 * low, 100 * high


def _examples(score: Score, outputs: Sequence[Output]) -> list[tuple[str, str]]:
    """Return some right and some wrong outputs: what is said of each, and its text."""
    judgements = judge(score.task, outputs)
    examples = []
    for is_right in (True, False):
        for output in [output for output in outputs if judgements[output.id].correct is is_right][:_EXAMPLES]:
            prompt = output.prompt
            if len(prompt) > _SHOWN_PROMPT:
                prompt = f"… {prompt[-_SHOWN_PROMPT:]}"
            written = output.generate.strip() or "(nothing)"
            text = f"{prompt}\n\nwritten: {written}\nanswer: {output.ground_truth}"
            examples.append((f"item {output.id}: {'right' if is_right else 'wrong'}", text))
    return examples
