"""A study's cells: a recipe, an architecture and a seed each, and the result that each leaves in its file."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colada.errors import ColadaError
from colada.evaluation.tasks import Task, find_task
from colada.files import write_text
from colada.language_model import ARCHITECTURES
from colada.training.ledger import Ledger

ARCHS = tuple(ARCHITECTURES)

CELL_FILE = "cell.json"


@dataclass(frozen=True)
class Counts:
    """How the outputs for a task's items did.

    Attributes:
        items, correct: how many.
        named, right: how many name an option at all, and the right one; both 0 for a task without options.
    """

    items: int
    correct: int
    named: int = 0
    right: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.named <= self.items or not 0 <= self.correct <= self.items > 0:
            raise ValueError(f"impossible counts {self}")

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.items + other.items,
            self.correct + other.correct,
            self.named + other.named,
            self.right + other.right,
        )


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
        record = json.loads(path.read_text(encoding="utf-8"))
        cell = record["cell"]
        if cell["arch"] not in ARCHS:
            raise ValueError(f"arch {cell['arch']!r}, expected one of {', '.join(ARCHS)}")
        counts = {find_task(name).name: _counts(score) for name, score in record["scores"]["tasks"].items()}
        if not counts:
            raise ValueError("no tasks")
        cost, asked = _ledger(record["ledger"]), dict(record["asked"])
        return Result(str(cell["recipe"]), cell["arch"], int(cell["seed"]), cost, asked, counts, record)
    except OSError as error:
        raise ColadaError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, ColadaError) as error:
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


def _counts(score: Mapping[str, Any]) -> Counts:
    naming = score.get("naming") or {"named": 0, "right": 0}
    return Counts(int(score["items"]), int(score["correct"]), int(naming["named"]), int(naming["right"]))


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
