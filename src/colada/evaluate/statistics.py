"""What the outputs of a task amount to: the score, its error, and what the score hides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colada.evaluate.outputs import Output
from colada.evaluate.scoring import answer_option, is_correct, named_option
from colada.evaluate.tasks import Task

Z95 = 1.959963984540054
"""Half the width of a 95% interval of the normal distribution, in standard deviations."""


@dataclass(frozen=True)
class Naming:
    """How the outputs of a multiple-choice task choose among the options.

    An output names an option if the letter and text rules of :mod:`colada.evaluate.scoring` find one
    in it. That is laxer than the score of hellaswag and story_cloze, which asks for the exact text.

    Attributes:
        named: how many outputs name an option.
        right: how many of those name the right one.
        picked: how often each position is named.
        truth: how often each position is the right one, in all items.
        chance: the share of right ones that picking any option gives.
    """

    named: int
    right: int
    picked: tuple[int, ...]
    truth: tuple[int, ...]
    chance: float

    @property
    def accuracy(self) -> float:
        """The share of right ones among those that name an option, NaN if none does."""
        return self.right / self.named if self.named else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of :attr:`accuracy`."""
        return wilson(self.right, self.named)


@dataclass(frozen=True)
class Score:
    """The result of a task.

    Attributes:
        task: which.
        items, correct: how many.
        naming: None for a task without options.
    """

    task: Task
    items: int
    correct: int
    naming: Naming | None

    @property
    def share(self) -> float:
        """The score: correct / items."""
        return self.correct / self.items

    @property
    def error(self) -> float:
        """The binomial standard error of :attr:`share`, sqrt(p (1 - p) / items)."""
        return math.sqrt(self.share * (1 - self.share) / self.items)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of :attr:`share`."""
        return wilson(self.correct, self.items)

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON; scores, errors and intervals are in per cent."""
        found: dict[str, Any] = {
            "items": self.items,
            "correct": self.correct,
            "score": 100 * self.share,
            "standard_error": 100 * self.error,
            "interval_95": _percent(self.interval),
            "published": self.task.published,
        }
        if self.naming is not None:
            own = self.naming
            found["naming"] = {
                "named": own.named,
                "right": own.right,
                "picked": list(own.picked),
                "truth": list(own.truth),
                "share_named": 100 * own.named / self.items,
                "accuracy": 100 * own.accuracy if own.named else None,
                "interval_95": _percent(own.interval),
                "chance": 100 * own.chance,
            }
        return found


def _percent(interval: tuple[float, float]) -> list[float]:
    return [100 * bound for bound in interval]


def score(task: Task, outputs: Sequence[Output]) -> Score:
    """Return the result of some outputs, at least one, of a task."""
    return Score(task, len(outputs), sum(correct(task, outputs).values()), _naming(task, outputs))


def correct(task: Task, outputs: Sequence[Output]) -> dict[str, bool]:
    """Return for each item whether its output is correct."""
    return {
        output.id: is_correct(task.rule, output.generate, output.ground_truth, output.choices)
        for output in outputs
    }


@dataclass(frozen=True)
class Outcome:
    """How the answers to one item did, of one model or several.

    Attributes:
        answers: how many.
        correct: how many of them are.
        named, right: how many name an option, and the right one.
    """

    answers: int
    correct: int
    named: int = 0
    right: int = 0

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.answers + other.answers,
            self.correct + other.correct,
            self.named + other.named,
            self.right + other.right,
        )


def outcomes(task: Task, outputs: Sequence[Output]) -> dict[str, Outcome]:
    """Return the outcome of each item."""
    is_right = correct(task, outputs)
    found = {}
    for output in outputs:
        named = named_option(output.generate, output.choices) if task.chance is not None else None
        # As the score does: of options that are equal once normalised, both count as the first.
        right = named is not None and named == answer_option(output.ground_truth, output.choices)
        found[output.id] = Outcome(1, int(is_right[output.id]), int(named is not None), int(right))
    return found


def clustered(parts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Return successes and trials as many as independent ones that are as informative as these clusters.

    Answers of several models to one item are no independent trials: where all of them are right or wrong
    together, they tell no more than one does. The variance of the share over clusters, that of a ratio,
    over the binomial one says how many trials stand for one (Kish's design effect); no fewer than one, and
    where no variance can be seen, as many as a cluster has.

    Args:
        parts: successes and trials of each cluster; those without trials do not count.
    """
    parts = [own for own in parts if own[1]]
    successes, trials = (sum(own[place] for own in parts) for place in (0, 1))
    if len(parts) < 2 or trials == len(parts):
        effect = trials / max(1, len(parts))
    elif successes in (0, trials):
        effect = sum(own**2 for _, own in parts) / trials
    else:
        share, count = successes / trials, len(parts)
        square = sum((own - share * tried) ** 2 for own, tried in parts) * count / (count - 1)
        effect = max(1.0, square / (share * (1 - share) * trials))
    return (successes / effect, trials / effect) if trials else (0.0, 0.0)


def _naming(task: Task, outputs: Sequence[Output]) -> Naming | None:
    if task.chance is None:
        return None
    picked, truth, right = [0] * task.options, [0] * task.options, 0
    for output in outputs:
        truth[output.choices.index(output.ground_truth)] += 1
        named = named_option(output.generate, output.choices)
        if named is not None:
            picked[named] += 1
            # As the score does: of options that are equal once normalised, both count as the first.
            right += named == answer_option(output.ground_truth, output.choices)
    return Naming(sum(picked), right, tuple(picked), tuple(truth), task.chance)


def average(scores: Sequence[Score]) -> tuple[float, float]:
    """Return the mean of the tasks' shares, each task counting once, and its standard error."""
    mean = sum(score.share for score in scores) / len(scores)
    return mean, math.sqrt(sum(score.error**2 for score in scores)) / len(scores)


def wilson(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's interval of a share s/n: all p with |s/n - p| <= z sqrt(p (1 - p) / n).

    Without trials it is (0, 1). Trials that are not independent count as fewer, with as large a share.
    """
    if not trials:
        return 0.0, 1.0
    p, spread = successes / trials, z * z / trials
    centre = (p + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (p * (1 - p) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def ratio_error(values: Sequence[float], sizes: Sequence[float]) -> float | None:
    """Return the standard error of sum(values) / sum(sizes) over independent pairs, None for a single one."""
    count, size = len(values), sum(sizes)
    if count < 2:
        return None
    rate = sum(values) / size
    residuals = sum((value - rate * own) ** 2 for value, own in zip(values, sizes, strict=True))
    return math.sqrt(residuals * count / (count - 1)) / size


@dataclass(frozen=True)
class Comparison:
    """Two sets of outputs for the same items, item by item.

    Attributes:
        items: how many both have.
        only_first, only_second: how many of them only one gets right.
    """

    items: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """Second minus first, as a share of the items."""
        return (self.only_second - self.only_first) / self.items

    @property
    def error(self) -> float:
        """The standard error of :attr:`difference`, that of a mean of paired differences."""
        mean_square = (self.only_first + self.only_second) / self.items
        return math.sqrt((mean_square - self.difference**2) / self.items)

    @property
    def p_value(self) -> float:
        """McNemar's exact two-sided test: how likely so uneven a split is if either way were as likely."""
        decided = self.only_first + self.only_second
        tail = sum(math.comb(decided, k) for k in range(min(self.only_first, self.only_second) + 1))
        return min(1.0, 2 * tail / 2**decided)


def compare(first: Mapping[str, bool], second: Mapping[str, bool]) -> Comparison:
    """Return how two results of :func:`correct` differ on the items that both have, at least one."""
    both = first.keys() & second.keys()
    return Comparison(
        len(both),
        sum(first[item] and not second[item] for item in both),
        sum(second[item] and not first[item] for item in both),
    )
