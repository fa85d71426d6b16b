"""A study's cells: a recipe, an architecture and a seed each, and the result that each leaves in its file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from colada.checks import require_choice
from colada.errors import ColadaError
from colada.evaluate.tasks import Task, find_task
from colada.files import read_json_object
from colada.models.base import ARCHITECTURES
from colada.models.bound import LikelihoodKind
from colada.train.plan import Cost

ARCHS = tuple(ARCHITECTURES)

CELL_FILE = "cell.json"

Trials = tuple[float, float]
"""Successes, and independent trials."""


def clustered(parts: Sequence[tuple[int, int]]) -> Trials:
    """Return successes and trials as many as independent ones that are as informative as these clusters.

    Answers of several models to one item are no independent trials: where all of them are right or wrong
    together, they tell no more than one does. The variance of the share over clusters, that of a ratio,
    over the binomial one says how many trials stand for one (Kish's design effect); no fewer than one, and
    where no variance can be seen, as many as a cluster has.

    Args:
        parts: successes and trials of each cluster; those without trials do not count.
    """
    parts = [part for part in parts if part[1]]
    successes, trials = (sum(part[place] for part in parts) for place in (0, 1))
    if len(parts) < 2 or trials == len(parts):
        effect = trials / max(1, len(parts))
    elif successes in (0, trials):
        effect = sum(tried**2 for _, tried in parts) / trials
    else:
        share, count = successes / trials, len(parts)
        square = sum((right - share * tried) ** 2 for right, tried in parts) * count / (count - 1)
        effect = max(1.0, square / (share * (1 - share) * trials))
    return (successes / effect, trials / effect) if trials else (0.0, 0.0)


@dataclass(frozen=True)
class Counts:
    """How the answers to a task's items did, of one model or several.

    Attributes:
        by_item: of each item's answers: how many there are, are correct, name an option at all, and the right
            one; the last two are 0 for a task without options.
    """

    by_item: Mapping[str, tuple[int, int, int, int]]

    def __post_init__(self) -> None:
        for item, (answers, correct, named, right) in self.by_item.items():
            if not (0 <= right <= named <= answers and 0 <= correct <= answers > 0):
                raise ValueError(f"impossible counts of item {item!r}")

    def __add__(self, other: Counts) -> Counts:
        none = (0, 0, 0, 0)
        pairs = {
            item: zip(self.by_item.get(item, none), other.by_item.get(item, none), strict=True)
            for item in {**self.by_item, **other.by_item}
        }
        return Counts({item: tuple(map(sum, pair)) for item, pair in pairs.items()})  # type: ignore[misc]

    def _total(self, place: int) -> int:
        return sum(counts[place] for counts in self.by_item.values())

    @property
    def items(self) -> int:
        """How many answers there are."""
        return self._total(0)

    @property
    def share(self) -> float:
        """The share of correct ones."""
        return self._total(1) / self.items

    @property
    def score(self) -> Trials:
        """Those correct, of as many independent items as these tell as much as."""
        return clustered([(correct, answers) for answers, correct, _, _ in self.by_item.values()])

    @property
    def naming(self) -> Trials:
        """Those that name an option, likewise."""
        return clustered([(named, answers) for answers, _, named, _ in self.by_item.values()])

    @property
    def accuracy(self) -> Trials:
        """Those right of those that name an option, likewise."""
        return clustered([(right, named) for _, _, named, right in self.by_item.values()])

    def to_dict(self) -> dict[str, int]:
        """Return the sums over items, for JSON."""
        return {name: self._total(place) for place, name in enumerate(("items", "correct", "named", "right"))}


@dataclass(frozen=True)
class Likelihood:
    """How well validation text is predicted.

    Attributes:
        bits_per_byte: at most so many, of a bound.
        kind: "exact" or "bound".
        fingerprint: of the texts.
    """

    bits_per_byte: float
    kind: LikelihoodKind
    fingerprint: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Likelihood:
        """Return what a record says. Raises KeyError, TypeError or ValueError for what is none."""
        bits, kind = float(record["bits_per_byte"]), record["kind"]
        if not math.isfinite(bits) or kind not in get_args(LikelihoodKind):
            raise ValueError(f"bits_per_byte={bits}, kind={kind!r}, expected a number, and exact or bound")
        return cls(bits, kind, str(record["fingerprint"]))


@dataclass(frozen=True)
class Result:
    """What became of a cell.

    Attributes:
        point, arch, seed: which cell; the point is its recipe's name.
        cost: of the model.
        asked: what the evaluation was asked for.
        counts: by task, in their order.
        likelihood: of validation text; None if it was not asked for.
        record: all that its file holds, with settings, data, versions and commit.
    """

    point: str
    arch: str
    seed: int
    cost: Cost
    asked: dict[str, Any]
    counts: dict[str, Counts]
    likelihood: Likelihood | None
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """Its directory, below the study's."""
        return f"{self.point}/{self.arch}/seed{self.seed}"

    @property
    def tasks(self) -> list[Task]:
        """The tasks, in their order."""
        return [find_task(name) for name in self.counts]


def _counts(correct: int, named: int, right: int) -> tuple[int, int, int, int]:
    return 1, int(correct), int(named), int(right)


def read_result(path: Path) -> Result:
    """Return the result that a cell's file holds.

    Raises:
        ColadaError: naming the file, if it is damaged.
    """
    try:
        record = read_json_object(path)
        cell, cost = record["cell"], record["cost"]
        require_choice("arch", cell["arch"], ARCHS)
        counts = {
            find_task(task).name: Counts({item: _counts(*own) for item, own in by_item.items()})
            for task, by_item in record["outcomes"].items()
        }
        if not all(own.by_item for own in counts.values()) or not counts:
            raise ValueError("no tasks, or one without items")
        parameters, flops = (
            {name: value + 0 for name, value in cost[key].items() if name != "total"}
            for key in ("parameters", "flops")
        )
        counted = Cost(str(cost["arch"]), parameters, flops, int(cost["tokens"]), float(cost["narrow_flops"]))
        where = str(cell["recipe"]), cell["arch"], int(cell["seed"])
        asked = dict(record["asked"])
        # Cells of before were not asked for it.
        likelihood = Likelihood.of(record["likelihood"]) if asked.get("text_bytes") else None
        return Result(*where, counted, asked, counts, likelihood, record)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, ColadaError) as error:
        advice = "delete it, and the study makes it again from the outputs beside it"
        raise ColadaError(f"{path}: not a cell's result ({error!r}); {advice}") from None


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
