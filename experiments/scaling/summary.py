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
from colada.report.table import Table
from colada.train.cost import scaled
from colada.train.plan import Cost
from experiments.scaling.cells import ARCHS, Counts, Result, Trials

Verdict = Literal["above", "at", "below"]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and its standard error, None for one seed."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Return the mean of some values, with s / sqrt(n), s² their variance with n - 1."""
        n, mean = len(values), sum(values) / len(values)
        if n == 1:
            return cls(mean, None)
        return cls(mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n))

    def shown(self, digits: int = 1) -> str:
        """Return it with so many digits after the point."""
        return f"{self.value:.{digits}f}" + (f" ± {self.error:.{digits}f}" if self.error is not None else "")


def verdict(share: Trials, chance: float) -> Verdict:
    """Return where the 95% interval (Wilson's) of a share is: wholly above or below chance, or around it."""
    low, high = wilson(*share)
    return "above" if low > chance else "below" if high < chance else "at"


@dataclass(frozen=True)
class Difference:
    """A difference of shares, and the bounds of its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Trials, second: Trials) -> Difference:
        """Return the first share minus the second.

        The interval is made of those of both shares (Newcombe 1998, "Interval estimation for the difference
        between independent proportions", method 10): wider than needed where the items are the same.
        """
        p, q = (successes / trials for successes, trials in (first, second))
        (p_low, p_high), (q_low, q_high) = wilson(*first), wilson(*second)
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
        scores: by task, in per cent.
        average: of the tasks, by seed first.
        bits: per byte of validation text, None if that was not asked for.
        bound: whether the bits are at most so many.
        pooled: by task, the counts of all seeds together.
    """

    name: str
    arch: str
    cost: Cost
    seeds: tuple[int, ...]
    scores: dict[str, Mean]
    average: Mean
    bits: Mean | None
    bound: bool
    pooled: dict[str, Counts]

    @property
    def title(self) -> str:
        """The architecture, and the point that it is at."""
        return f"{ARCHITECTURES[self.arch]} ({self.name})"

    def to_dict(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Return it for JSON, scores in per cent."""
        records: dict[str, dict[str, Any]] = {}
        for task in tasks:
            score, pooled = self.scores[task.name], self.pooled[task.name]
            records[task.name] = {
                "score": score.value,
                "standard_error_over_seeds": score.error,
                **pooled.to_dict(),
                "independent_items": pooled.score[1],
                "interval_95": [100 * bound for bound in wilson(*pooled.score)],
            }
            if task.chance is not None:
                records[task.name] |= {
                    "chance": 100 * task.chance,
                    "is": verdict(pooled.score, task.chance),
                    "named_interval_95": [100 * bound for bound in wilson(*pooled.naming)],
                    "right_interval_95": [100 * bound for bound in wilson(*pooled.accuracy)],
                    "right_is": verdict(pooled.accuracy, task.chance),
                }
        bits = None
        if self.bits is not None:
            bits = {
                "value": self.bits.value,
                "standard_error_over_seeds": self.bits.error,
                "bound": self.bound,
            }
        return {
            "recipe": self.name,
            "arch": self.arch,
            "seeds": list(self.seeds),
            "parameters": self.cost.total_parameters,
            "flops": self.cost.total_flops,
            "average": {"score": self.average.value, "standard_error_over_seeds": self.average.error},
            "bits_per_byte": bits,
            "tasks": records,
        }


def points_of(results: Sequence[Result]) -> list[Point]:
    """Return the points of some results, at least one: by architecture, each from the cheapest on.

    Raises:
        ColadaError: if they are not answers to the same items, or of the same text, or models of one point
            differ in cost.
    """
    first = results[0]
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.asked != first.asked:
            raise ColadaError(
                f"{result.name} was asked {result.asked}, and {first.name} {first.asked}: run the study to"
                " its end with one of them"
            )
        texts = {own.likelihood.fingerprint for own in (first, result) if own.likelihood is not None}
        if len(texts) > 1:
            raise ColadaError(f"{result.name}: its validation text is not that of {first.name}")
        group = groups.setdefault((result.arch, result.point), [])
        if group and group[0].cost != result.cost:
            raise ColadaError(f"{result.name}: its cost is not that of seed {group[0].seed}: another recipe?")
        group.append(result)
    points = []
    for (arch, name), group in groups.items():
        shares = {task: [100 * result.counts[task].share for result in group] for task in first.counts}
        pooled = {task: sum((r.counts[task] for r in group), Counts({})) for task in first.counts}
        averages = [sum(each) / len(each) for each in zip(*shares.values(), strict=True)]
        likelihoods = [result.likelihood for result in group if result.likelihood]
        points.append(
            Point(
                name,
                arch,
                group[0].cost,
                tuple(sorted(result.seed for result in group)),
                {task: Mean.of(values) for task, values in shares.items()},
                Mean.of(averages),
                Mean.of([own.bits_per_byte for own in likelihoods]) if likelihoods else None,
                any(own.kind == "bound" for own in likelihoods),
                pooled,
            )
        )
    return sorted(points, key=lambda point: (ARCHS.index(point.arch), point.cost.total_flops))


def largest(points: Sequence[Point]) -> list[Point]:
    """Return each architecture's result at the most expensive point that all of them have.

    While a study is under way there may be none: then the most expensive point of each.
    """
    archs = {point.arch for point in points}
    complete = [p for p in points if {other.arch for other in points if other.name == p.name} == archs]
    if not complete:
        return list({point.arch: point for point in points}.values())
    name = max(complete, key=lambda point: point.cost.total_flops).name
    return [point for point in points if point.name == name]


# --- tables --------------------------------------------------------------------------------------


def markdown(points: Sequence[Point], tasks: Sequence[Task]) -> str:
    """Return the tables of a study."""
    cost: dict[str, float] = {}
    for point in points:
        cost.setdefault(point.name, point.cost.total_flops)
    by_name = sorted(points, key=lambda point: (cost[point.name], point.name, ARCHS.index(point.arch)))
    first, *others = largest(points)
    seeds = sorted({len(point.seeds) for point in points})
    items = max(counts.items // len(points[0].seeds) for counts in points[0].pooled.values())
    counted = " or ".join(map(str, seeds)) + (" seed" if seeds == [1] else " seeds")
    leads = (
        f"## Where {ARCHITECTURES[first.arch]} leads",
        f"{first.title} minus the others, in points of score, with 95% intervals over the items of all seeds"
        " together; bold where the interval is all on one side of 0.",
        _lead_table(first, others, tasks).markdown(),
    )
    return "\n\n".join(
        (
            "## What was trained",
            "FLOPs are of the whole training run, everything counted; the narrow count is 6 N D, of the"
            " network that generates latents or tokens alone. The share is of Cola DLM's at the same point.",
            _cost_table(by_name).markdown(),
            "## Scores",
            f"Per cent right of up to {items} items a task; mean ± standard error over {counted}. Every score"
            " is of text that the model writes: an output that is no option is wrong, so a score can be below"
            " chance."
            + (
                " Bits per byte are of held-out text of the sources that were trained on; ≤ marks an upper"
                " bound, beside AR's exact ones: of two bounds, the looser may be of the better model."
                if points[0].bits is not None
                else ""
            ),
            _score_table(by_name, tasks).markdown(),
            *(leads if others else ()),
            "## Above chance?",
            "The items of all seeds together, seeds that agree on an item counting once, with 95% intervals"
            " (Wilson's): at the most expensive point of each model. An output names an option by its letter"
            " or its text.",
            _chance_table([first, *others], tasks).markdown(),
        )
    )


def _cost_table(points: Sequence[Point]) -> Table:
    cola = {point.name: point.cost for point in points if point.arch == ARCHS[0]}
    titles = ("point", "model", "parameters", "share", "FLOPs", "share", "narrow FLOPs", "tokens", "seeds")
    table = Table(titles, texts=2)
    for point in points:
        cost, other = point.cost, cola.get(point.name)
        table.row(
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
    return table


def _score_table(points: Sequence[Point], tasks: Sequence[Task]) -> Table:
    measured = ("bits per byte",) if points[0].bits is not None else ()
    table = Table(("point", "model", *(task.title for task in tasks), "average", *measured), texts=2)
    for point in points:
        scores = (point.scores[task.name].shown() for task in tasks)
        bits = () if point.bits is None else (("≤ " if point.bound else "") + point.bits.shown(3),)
        table.row(point.name, ARCHITECTURES[point.arch], *scores, point.average.shown(), *bits)
    chance = [f"{100 * task.chance:.1f}" if task.chance is not None else "–" for task in tasks]
    return table.row("", "chance", *chance, "", *("" for _ in measured))


def _lead_table(first: Point, others: Sequence[Point], tasks: Sequence[Task]) -> Table:
    """Return where the first point leads the others."""
    table = Table(("task", *(f"minus {other.title}" for other in others)))
    columns = [
        [Difference.of(first.pooled[task.name].score, other.pooled[task.name].score) for task in tasks]
        for other in others
    ]
    for task, *differences in zip(tasks, *columns, strict=True):
        table.row(task.title, *map(str, differences))
    return table.row("average", *(str(Difference.mean(column)) for column in columns))


def _chance_table(points: Sequence[Point], tasks: Sequence[Task]) -> Table:
    titles = ("task", "model", "score", "chance", "is", "names an option", "right among those", "is")
    table = Table(titles, texts=2)
    for task in tasks:
        for point in points:
            pooled = point.pooled[task.name]
            cells = ["–"] * 5
            if task.chance is not None:
                cells = [
                    f"{100 * task.chance:.1f}",
                    verdict(pooled.score, task.chance),
                    _share(pooled.naming),
                    _share(pooled.accuracy),
                    verdict(pooled.accuracy, task.chance) if pooled.accuracy[1] else "–",
                ]
            table.row(task.title, point.title, _share(pooled.score), *cells)
    return table


def _share(share: Trials) -> str:
    """Return a share with its interval, in per cent."""
    successes, trials = share
    if not trials:
        return "–"
    low, high = wilson(successes, trials)
    return f"{100 * successes / trials:.1f} ({100 * low:.1f} to {100 * high:.1f})"
