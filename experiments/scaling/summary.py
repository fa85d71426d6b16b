"""A study's results as points with errors over seeds, and as tables and a record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from colada.errors import ColadaError
from colada.evaluate.statistics import wilson
from colada.evaluate.tasks import Task
from colada.models.base import ARCHITECTURES
from colada.train.ledger import Ledger
from colada.train.plan import scaled
from experiments.scaling.cells import ARCHS, Counts, Result

Verdict = Literal["above", "at", "below"]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, in per cent, and its standard error, None for one seed."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Return the mean of some values, with s / sqrt(n), s² their variance with n - 1."""
        n, mean = len(values), sum(values) / len(values)
        if n == 1:
            return cls(mean, None)
        return cls(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n))

    def __str__(self) -> str:
        return f"{self.value:.1f}" + (f" ± {self.error:.1f}" if self.error is not None else "")


def verdict(share: tuple[float, float], chance: float) -> Verdict:
    """Return where the 95% interval (Wilson's) of a share is: wholly above or below chance, or around it.

    Args:
        share: successes and independent trials, see :func:`~colada.evaluate.statistics.clustered`.
    """
    low, high = wilson(*share)
    return "above" if low > chance else "below" if high < chance else "at"


@dataclass(frozen=True)
class Difference:
    """A difference of shares, and the bounds of its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Counts, second: Counts) -> Difference:
        """Return first minus second, as shares of their items that are correct.

        The interval is made of those of both shares (Newcombe 1998, "Interval estimation for the difference
        between independent proportions", method 10): wider than needed where the items are the same.
        """
        p, q = first.correct / first.items, second.correct / second.items
        (p_low, p_high), (q_low, q_high) = (wilson(*own.score) for own in (first, second))
        below, above = math.hypot(p - p_low, q_high - q), math.hypot(p_high - p, q - q_low)
        return cls(p - q, p - q - below, p - q + above)

    @classmethod
    def mean(cls, parts: Sequence[Difference]) -> Difference:
        """Return the mean of independent differences, its interval made of theirs likewise."""
        n, value = len(parts), sum(part.value for part in parts) / len(parts)
        below = math.hypot(*(part.value - part.low for part in parts)) / n
        above = math.hypot(*(part.high - part.value for part in parts)) / n
        return cls(value, value - below, value + above)

    def __str__(self) -> str:
        value, low, high = (f"{100 * x:+.1f}".replace("-", "−") for x in (self.value, self.low, self.high))
        lead = "**" if self.low > 0 or self.high < 0 else ""
        return f"{lead}{value} ({low} to {high}){lead}"


@dataclass(frozen=True)
class Point:
    """An architecture at a recipe, over its seeds.

    Attributes:
        name: the recipe's.
        arch: which.
        cost: of one model.
        seeds: those with a result.
        scores: by task.
        average: of the tasks, by seed first.
        pooled: by task, the counts of all seeds together.
    """

    name: str
    arch: str
    cost: Ledger
    seeds: tuple[int, ...]
    scores: dict[str, Mean]
    average: Mean
    pooled: dict[str, Counts]

    def to_dict(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Return it for JSON, in per cent."""
        found = {}
        for task in tasks:
            score, pooled = self.scores[task.name], self.pooled[task.name]
            own: dict[str, Any] = {
                "score": score.value,
                "standard_error_over_seeds": score.error,
                "items": pooled.items,
                "correct": pooled.correct,
                "independent_items": pooled.score[1],
                "interval_95": [100 * bound for bound in wilson(*pooled.score)],
            }
            if task.chance is not None:
                own |= {
                    "chance": 100 * task.chance,
                    "is": verdict(pooled.score, task.chance),
                    "named": pooled.named,
                    "named_interval_95": [100 * bound for bound in wilson(*pooled.naming)],
                    "right_among_named": pooled.right,
                    "right_interval_95": [100 * bound for bound in wilson(*pooled.accuracy)],
                    "right_is": verdict(pooled.accuracy, task.chance),
                }
            found[task.name] = own
        return {
            "recipe": self.name,
            "arch": self.arch,
            "seeds": list(self.seeds),
            "parameters": self.cost.total_parameters,
            "flops": self.cost.total_flops,
            "average": {"score": self.average.value, "standard_error_over_seeds": self.average.error},
            "tasks": found,
        }


def points_of(results: Sequence[Result]) -> list[Point]:
    """Return the points of some results, at least one: by architecture, each from the cheapest on.

    Raises:
        ColadaError: if they are not answers to the same items, or models of one point differ in cost.
    """
    first = results[0]
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        name = f"{result.point}/{result.arch}/seed{result.seed}"
        if result.asked != first.asked:
            raise ColadaError(
                f"{name} was asked {result.asked}, and {first.point}/{first.arch}/seed{first.seed}"
                f" {first.asked}: run the study to its end with one of them"
            )
        group = groups.setdefault((result.arch, result.point), [])
        if group and group[0].cost != result.cost:
            raise ColadaError(f"{name}: its ledger is not that of seed {group[0].seed}: another recipe?")
        group.append(result)
    points = []
    for (arch, point), group in groups.items():
        pooled = {task: group[0].counts[task] for task in first.counts}
        for result in group[1:]:
            pooled = {task: counts + result.counts[task] for task, counts in pooled.items()}
        points.append(
            Point(
                point,
                arch,
                group[0].cost,
                tuple(sorted(result.seed for result in group)),
                {task: Mean.of([result.score(task) for result in group]) for task in first.counts},
                Mean.of([result.average for result in group]),
                pooled,
            )
        )
    return sorted(points, key=lambda point: (ARCHS.index(point.arch), point.cost.total_flops))


def largest(points: Sequence[Point]) -> list[Point]:
    """Return each architecture's result at the most expensive point that all of them have.

    While a study is under way there may be none: then the most expensive point of each.
    """
    archs = {point.arch for point in points}
    shared = [
        point.name for point in points if {own.arch for own in points if own.name == point.name} == archs
    ]
    costs = {point.name: point.cost.total_flops for point in points if point.name in shared}
    if not costs:
        return list({point.arch: point for point in points}.values())
    name = max(costs, key=costs.__getitem__)
    return [point for point in points if point.name == name]


# --- tables --------------------------------------------------------------------------------------


def markdown(points: Sequence[Point], tasks: Sequence[Task]) -> str:
    """Return the tables of a study."""
    seeds = sorted({len(point.seeds) for point in points})
    items = max(counts.items // len(points[0].seeds) for counts in points[0].pooled.values())
    counted = " or ".join(map(str, seeds)) + (" seed" if seeds == [1] else " seeds")
    return "\n\n".join(
        (
            "## What was trained",
            "FLOPs are of the whole training run, everything counted; the narrow count is 6 N D, of the"
            " network that generates latents or tokens alone. The share is of Cola DLM's at the same point.",
            _ledger_table(points),
            "## Scores",
            f"Per cent right of up to {items} items a task; mean ± standard error over {counted}. Every score"
            " is of text that the model writes: an output that is no option is wrong, so a score can be below"
            " chance.",
            _score_table(points, tasks),
            *_leads(largest(points), tasks),
            "## Above chance?",
            "The items of all seeds together, seeds that agree on an item counting once, with 95% intervals"
            " (Wilson's): at the most expensive point of each model. An output names an option by its letter"
            " or its text.",
            _chance_table(largest(points), tasks),
        )
    )


def _ledger_table(points: Sequence[Point]) -> str:
    cola = {point.name: point.cost for point in points if point.arch == ARCHS[0]}
    rows = []
    for point in sorted(points, key=_by_name(points)):
        cost, other = point.cost, cola.get(point.name)
        rows.append(
            (
                point.name,
                ARCHITECTURES[point.arch],
                f"{cost.total_parameters:,}",
                f"{cost.total_parameters / other.total_parameters:.3f}" if other else "–",
                scaled(cost.total_flops),
                f"{cost.total_flops / other.total_flops:.3f}" if other else "–",
                scaled(cost.narrow_flops),
                f"{cost.tokens:,}",
                str(len(point.seeds)),
            )
        )
    titles = ("point", "model", "parameters", "share", "FLOPs", "share", "narrow FLOPs", "tokens", "seeds")
    return _table(titles, rows, texts=2)


def _score_table(points: Sequence[Point], tasks: Sequence[Task]) -> str:
    rows = [
        (
            point.name,
            ARCHITECTURES[point.arch],
            *(str(point.scores[task.name]) for task in tasks),
            str(point.average),
        )
        for point in sorted(points, key=_by_name(points))
    ]
    chance = [f"{100 * task.chance:.1f}" if task.chance is not None else "–" for task in tasks]
    rows.append(("", "chance", *chance, ""))
    return _table(("point", "model", *(task.title for task in tasks), "average"), rows, texts=2)


def _leads(points: Sequence[Point], tasks: Sequence[Task]) -> list[str]:
    """Return a section on where the first architecture leads the others, if there are others."""
    first, *others = points
    if not others:
        return []
    parts = {
        other.arch: [Difference.of(first.pooled[task.name], other.pooled[task.name]) for task in tasks]
        for other in others
    }
    rows = [
        (task.title, *(str(parts[other.arch][number]) for other in others))
        for number, task in enumerate(tasks)
    ]
    rows.append(("average", *(str(Difference.mean(parts[other.arch])) for other in others)))
    named = [f"{ARCHITECTURES[other.arch]} ({other.name})" for other in others]
    return [
        f"## Where {ARCHITECTURES[first.arch]} leads",
        f"{ARCHITECTURES[first.arch]} ({first.name}) minus the others, in points of score, with 95% intervals"
        " over the items of all seeds together; bold where the interval is all on one side of 0.",
        _table(("task", *(f"minus {name}" for name in named)), rows, texts=1),
    ]


def _chance_table(points: Sequence[Point], tasks: Sequence[Task]) -> str:
    rows = []
    for task in tasks:
        for point in points:
            pooled = point.pooled[task.name]
            if task.chance is None:
                verdicts = ("–", "–", "–", "–", "–")
            else:
                verdicts = (
                    f"{100 * task.chance:.1f}",
                    verdict(pooled.score, task.chance),
                    _share(pooled.naming),
                    _share(pooled.accuracy),
                    verdict(pooled.accuracy, task.chance) if pooled.named else "–",
                )
            chance, scored, named, right, chosen = verdicts
            model = f"{ARCHITECTURES[point.arch]} ({point.name})"
            score = _share(pooled.score)
            rows.append((task.title, model, score, chance, scored, named, right, chosen))
    titles = ("task", "model", "score", "chance", "is", "names an option", "right among those", "is")
    return _table(titles, rows, texts=2)


def _share(share: tuple[float, float]) -> str:
    """Return a share, successes of independent trials, with its interval, in per cent."""
    successes, trials = share
    if not trials:
        return "–"
    low, high = wilson(successes, trials)
    return f"{100 * successes / trials:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _by_name(points: Sequence[Point]) -> Any:
    """Return a sorting key: points from the cheapest on, the architectures of one together."""
    cost: dict[str, float] = {}
    for point in points:
        cost.setdefault(point.name, point.cost.total_flops)
    return lambda point: (cost[point.name], point.name, ARCHS.index(point.arch))


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """Return a Markdown table whose first ``texts`` columns are aligned left, the others right."""
    rule = [*["---"] * texts, *["---:"] * (len(titles) - texts)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows))
