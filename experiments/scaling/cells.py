"""A study's cells: a recipe, an architecture and a seed each, and the result that each leaves in its file."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colada.errors import ColadaError
from colada.evaluate.statistics import Outcome, clustered
from colada.evaluate.tasks import Task, find_task
from colada.files import read_json_object, write_text
from colada.models.base import ARCHITECTURES
from colada.train.ledger import Ledger

ARCHS = tuple(ARCHITECTURES)

CELL_FILE = "cell.json"


@dataclass(frozen=True)
class Counts:
    """How the outputs for a task's items did, of one model or several.

    Attributes:
        items, correct: how many.
        named, right: how many name an option at all, and the right one; both 0 for a task without options.
        models: of how many.
        outcomes: by item; empty where the file does not have them.
    """

    items: int
    correct: int
    named: int = 0
    right: int = 0
    models: int = 1
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.named <= self.items or not 0 <= self.correct <= self.items > 0:
            raise ValueError(f"impossible counts of {self.items} items")
        whole = (self.items, self.correct, self.named, self.right)
        each = self.outcomes.values()
        if each and whole != tuple(
            sum(own) for own in zip(*((o.answers, o.correct, o.named, o.right) for o in each), strict=True)
        ):
            raise ValueError(f"the outcomes of {len(each)} items do not add up to their counts")

    def __add__(self, other: Counts) -> Counts:
        outcomes: dict[str, Outcome] = {}
        if self.outcomes and other.outcomes:
            outcomes = dict(self.outcomes)
            for item, own in other.outcomes.items():
                outcomes[item] = outcomes[item] + own if item in outcomes else own
        return Counts(
            self.items + other.items,
            self.correct + other.correct,
            self.named + other.named,
            self.right + other.right,
            self.models + other.models,
            outcomes,
        )

    @property
    def score(self) -> tuple[float, float]:
        """Those correct, of as many independent items as these tell as much as."""
        return self._independent("correct", "answers", self.correct, self.items)

    @property
    def naming(self) -> tuple[float, float]:
        """Those that name an option, likewise."""
        return self._independent("named", "answers", self.named, self.items)

    @property
    def accuracy(self) -> tuple[float, float]:
        """Those right of those that name an option, likewise."""
        return self._independent("right", "named", self.right, self.named)

    def _independent(self, part: str, whole: str, successes: int, trials: int) -> tuple[float, float]:
        if self.outcomes:
            each = self.outcomes.values()
            return clustered([(getattr(own, part), getattr(own, whole)) for own in each])
        # What is not known is taken to be the worst: that all models do alike.
        return successes / self.models, trials / self.models


@dataclass(frozen=True)
class Result:
    """What became of a cell.

    Attributes:
        point, arch, seed: which cell; the point is its recipe's name.
        cost: of the model.
        asked: what the evaluation was asked for.
        counts: by task, in their order.
        record: all that its file holds, with settings, data, versions and commit.
    """

    point: str
    arch: str
    seed: int
    cost: Ledger
    asked: dict[str, Any]
    counts: dict[str, Counts]
    record: dict[str, Any]

    @property
    def tasks(self) -> list[Task]:
        """The tasks, in their order."""
        return [find_task(name) for name in self.counts]

    def score(self, task: str) -> float:
        """Return the score of a task, in per cent of its items."""
        return 100 * self.counts[task].correct / self.counts[task].items

    @property
    def average(self) -> float:
        """The mean of the tasks' scores, in per cent."""
        return sum(map(self.score, self.counts)) / len(self.counts)


def read_result(path: Path) -> Result:
    """Return the result that a cell's file holds.

    Raises:
        ColadaError: naming the file, if it is damaged.
    """
    try:
        record = read_json_object(path)
        cell = record["cell"]
        if cell["arch"] not in ARCHS:
            raise ValueError(f"arch {cell['arch']!r}, expected one of {', '.join(ARCHS)}")
        outcomes = record.get("outcomes") or {}
        counts = {
            find_task(name).name: _counts(score, outcomes.get(name) or {})
            for name, score in record["scores"]["tasks"].items()
        }
        if not counts:
            raise ValueError("no tasks")
        cost, asked = _ledger(record["ledger"]), dict(record["asked"])
        return Result(str(cell["recipe"]), cell["arch"], int(cell["seed"]), cost, asked, counts, record)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, ColadaError) as error:
        advice = "delete it, and the study makes it again from the outputs beside it"
        raise ColadaError(f"{path}: not a cell's result ({error!r}); {advice}") from None


def _ledger(fields: Mapping[str, Any]) -> Ledger:
    """Return the ledger that was written; totals are added up again."""
    parameters, flops = (
        {name: value + 0 for name, value in fields[key].items() if name != "total"}
        for key in ("parameters", "flops")
    )
    return Ledger(
        str(fields["arch"]), parameters, flops, int(fields["tokens"]), float(fields["narrow_flops"])
    )


def _counts(score: Mapping[str, Any], outcomes: Mapping[str, Sequence[int]]) -> Counts:
    naming = score.get("naming") or {"named": 0, "right": 0}
    found = {item: Outcome(1, *map(int, own)) for item, own in outcomes.items()}
    items, right, named, right_named = map(
        int, (score["items"], score["correct"], naming["named"], naming["right"])
    )
    return Counts(items, right, named, right_named, outcomes=found)


def write_result(path: Path, record: Mapping[str, Any]) -> None:
    """Write a cell's file at once. Raises ColadaError if that fails."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def read_results(out: Path, but: Collection[str] = ()) -> list[Result]:
    """Return the results that there are in a study's directory, but for some cells' by name.

    Raises:
        ColadaError: naming a damaged file; if there is no result.
    """
    paths = sorted(out.glob(f"*/*/seed*/{CELL_FILE}"))
    results = [read_result(path) for path in paths if path.parent.relative_to(out).as_posix() not in but]
    if not results:
        raise ColadaError(f"{out} holds no <recipe>/<arch>/seed<k>/{CELL_FILE} yet: not begun, or no study")
    return results
