"""What the outputs of a task amount to: the score, its error, and what the score hides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from colada.evaluate.outputs import Output
from colada.evaluate.scoring import answer_option, is_correct, named_option
from colada.evaluate.tasks import Task

Z95 = 1.959963984540054
"""Half the width of a 95% interval of the normal distribution, in standard deviations."""


@dataclass(frozen=True)
class Judgement:
    """How one output did.

    Attributes:
        correct: whether it gives the answer.
        named: which option it names, None if it names none or there are none.
        right: whether that is the right one.
    """

    correct: bool
    named: int | None = None
    right: bool = False


def judge(task: Task, outputs: Sequence[Output]) -> dict[str, Judgement]:
    """Return the judgement of each item's output."""
    return {output.id: _judgement(task, output) for output in outputs}


def _judgement(task: Task, output: Output) -> Judgement:
    correct = is_correct(task.rule, output.generate, output.ground_truth, output.choices)
    named = named_option(output.generate, output.choices) if task.options else None
    # As the score does: of options that are equal once normalised, both count as the first.
    right = named is not None and named == answer_option(output.ground_truth, output.choices)
    return Judgement(correct, named, right)


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
        record: dict[str, Any] = {
            "items": self.items,
            "correct": self.correct,
            "score": 100 * self.share,
            "standard_error": 100 * self.error,
            "interval_95": _percent(self.interval),
            "published": self.task.published,
        }
        if self.naming is not None:
            naming = self.naming
            record["naming"] = {
                "named": naming.named,
                "right": naming.right,
                "picked": list(naming.picked),
                "truth": list(naming.truth),
                "share_named": 100 * naming.named / self.items,
                "accuracy": 100 * naming.accuracy if naming.named else None,
                "interval_95": _percent(naming.interval),
                "chance": 100 * naming.chance,
            }
        return record


def _percent(interval: tuple[float, float]) -> list[float]:
    return [100 * bound for bound in interval]


def score(task: Task, outputs: Sequence[Output]) -> Score:
    """Return the result of some outputs, at least one, of a task."""
    judgements = judge(task, outputs).values()
    naming = None
    if task.chance is not None:
        picked = Counter(one.named for one in judgements if one.named is not None)
        truth = Counter(output.choices.index(output.ground_truth) for output in outputs)
        naming = Naming(
            picked.total(),
            sum(one.right for one in judgements),
            tuple(picked[place] for place in range(task.options)),
            tuple(truth[place] for place in range(task.options)),
            task.chance,
        )
    return Score(task, len(outputs), sum(one.correct for one in judgements), naming)


def average(scores: Sequence[Score]) -> tuple[float, float]:
    """Return the mean of the tasks' shares, each task counting once, and its standard error."""
    mean = sum(score.share for score in scores) / len(scores)
    return mean, math.sqrt(sum(score.error**2 for score in scores)) / len(scores)


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Return scores for JSON: each task's, and their average; in per cent."""
    mean, error = average(scores)
    return {
        "average": 100 * mean,
        "standard_error": 100 * error,
        "tasks": {score.task.name: score.to_dict() for score in scores},
    }


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
    residuals = sum((value - rate * part) ** 2 for value, part in zip(values, sizes, strict=True))
    return math.sqrt(residuals * count / (count - 1)) / size
