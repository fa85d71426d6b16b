"""The scaling study: every recipe, architecture and seed trained on the same data and asked the same items.

Each cell has its own directory, ``OUT/<recipe>/<arch>/seed<k>/``: ``training/`` (a run of the trainer),
``evaluation/`` (its outputs) and, once it is done, ``cell.json``. Processes that share ``OUT`` take
different cells. Whatever is stopped goes on where it was: between cells, within a run, within a task.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from colada.device import find_device
from colada.errors import ColadaError
from colada.evaluate.data import Benchmark, load_benchmark
from colada.evaluate.run import MAX_NEW_TOKENS, evaluate
from colada.evaluate.statistics import judge
from colada.evaluate.tasks import find_task
from colada.files import write_text
from colada.models.load import KINDS, load
from colada.train.checkpoints import RECIPE, disk_errors
from colada.train.display import Display
from colada.train.plan import Cost, plan_run, resolve
from colada.train.recipe import Recipe, difference, load_recipe
from colada.train.trainer import MODEL, Trainer
from experiments.scaling.cells import CELL_FILE, read_result
from experiments.scaling.likelihood import measured, validation_texts

TRAINING, OUTPUTS = "training", "evaluation"
TRAINED_FILE = "trained"
ITEMS_SEED = 0  # Of which items are asked: the same ones in every cell.


@dataclass(frozen=True)
class Asked:
    """What every model is asked.

    Attributes:
        tasks: by name.
        limit: items of each, drawn at random but the same for all; None for all.
        shots: demonstrations in each prompt; None for the release's.
        max_new_tokens: of an item.
        text_bytes: of validation text, whose bits per byte are measured; 0 for none.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = 0
    max_new_tokens: int = MAX_NEW_TOKENS
    text_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "tasks": list(self.tasks)}

    def benchmarks(self, data: Path) -> list[Benchmark]:
        """Return the items, of the records in a directory. Raises ColadaError for what is wrong with them."""
        return [
            load_benchmark(
                find_task(name), data, shots=self.shots, seed=ITEMS_SEED, limit=self.limit, order="random"
            )
            for name in self.tasks
        ]


@dataclass(frozen=True)
class Cell:
    """One model of the study.

    Attributes:
        point: its recipe's name.
        arch, seed: its own.
        recipe: with both in it.
        cost: what the recipe says that it will be.
    """

    point: str
    arch: str
    seed: int
    recipe: Recipe
    cost: Cost

    @property
    def name(self) -> str:
        """Its directory, below the study's."""
        return f"{self.point}/{self.arch}/seed{self.seed}"


@dataclass
class Progress:
    """What a process did.

    Attributes:
        made, kept: cells that it finished, and that were finished before.
        elsewhere: cells that another process is at.
        failed: why, by cell.
    """

    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def plan_cells(recipes: Sequence[Path], archs: Sequence[str], seeds: int, device: str) -> list[Cell]:
    """Return the cells in the order of work: seed by seed, from the cheapest recipe on.

    Raises:
        ColadaError: for a recipe that is none or cannot be of an architecture, two of one name, recipes
            whose data or tokenizer differ, settings of generation that a model does not have.
    """
    if seeds < 1:
        raise ColadaError(f"--seeds {seeds}, expected at least 1")
    points: dict[str, Path] = {}
    for path in recipes:
        if path.stem in points:
            raise ColadaError(f"{points[path.stem]} and {path}: recipes of one name, and it names the point")
        points[path.stem] = path
    first = load_recipe(recipes[0])
    for path in recipes[1:]:
        other = load_recipe(path)
        same_data = first.model_copy(update={"data": other.data, "tokenizer": other.tokenizer})
        changed = difference(first, same_data)
        if changed is not None:
            raise ColadaError(f"{path}: {changed}, from {recipes[0]}: the points must share their data")
    costs = {
        (point, arch): plan_run(_recipe(path, arch, 0, device)).cost
        for point, path in points.items()
        for arch in archs
    }
    order = sorted(points, key=lambda point: costs[point, archs[0]].total_flops)
    return [
        Cell(point, arch, seed, _recipe(points[point], arch, seed, device), costs[point, arch])
        for seed in range(seeds)
        for point in order
        for arch in archs
    ]


def _recipe(path: Path, arch: str, seed: int, device: str) -> Recipe:
    recipe = load_recipe(path, [f"model.arch={arch}", f"seed={seed}", f"run.device={device}"])
    KINDS[arch].check(recipe.own_generation, f"{path}: generation")
    return resolve(recipe)


def run_study(
    cells: Sequence[Cell], asked: Asked, benchmarks: Sequence[Benchmark], out: Path, display: Display
) -> Progress:
    """Train and evaluate the cells that are not finished and no other process is at.

    A cell that fails is reported, and the others go on.

    Raises:
        training.trainer.Interrupted: after SIGINT or SIGTERM in training, once the state is saved.
    """
    progress = Progress()
    for number, cell in enumerate(cells, 1):
        directory = out / cell.name
        try:
            with disk_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
            with FileLock(directory / "lock", timeout=0):
                if _finished(cell, asked, directory):
                    progress.kept.append(cell.name)
                    continue
                display.say(f"cell {number} of {len(cells)}: {cell.name}")
                run_cell(cell, asked, benchmarks, directory, display)
                progress.made.append(cell.name)
        except Timeout:
            display.say(f"{cell.name}: another process is at it")
            progress.elsewhere.append(cell.name)
        except ColadaError as error:
            display.say(f"{cell.name} failed: {error}")
            progress.failed[cell.name] = str(error)
    return progress


def _finished(cell: Cell, asked: Asked, directory: Path) -> bool:
    """Return whether a cell has the result that is asked for; outputs of fewer items or tasks are kept.

    Raises:
        ColadaError: if it is damaged, or was trained with another recipe.
    """
    trained = directory / TRAINING / RECIPE
    if (directory / TRAINED_FILE).is_file():
        changed = difference(load_recipe(trained), cell.recipe)
        if changed is not None:
            raise ColadaError(f"{trained} is another recipe: {changed}; give another --out")
    path = directory / CELL_FILE
    return path.is_file() and read_result(path).asked == asked.to_dict()


def run_cell(
    cell: Cell, asked: Asked, benchmarks: Sequence[Benchmark], directory: Path, display: Display
) -> None:
    """Train a cell's model unless it is trained, measure and evaluate it, and write ``cell.json``.

    Raises:
        ColadaError: as the trainer and the evaluation do.
        training.trainer.Interrupted: likewise.
    """
    run, trained = directory / TRAINING, directory / TRAINED_FILE
    if not trained.is_file():
        Trainer(cell.recipe, run, display).run()
        trained.touch()
    model = load(run / MODEL, device=find_device(cell.recipe.run.device))
    likelihood = None
    if asked.text_bytes:
        texts = validation_texts(cell.recipe, asked.text_bytes)
        likelihood = measured(model, texts, cell.seed, directory)
    settings = {**model.chosen({}), "temperature": 0.0}
    del settings["seed"]  # Every item has its own.
    results = evaluate(
        model,
        benchmarks,
        directory / OUTPUTS,
        seed=cell.seed,
        max_new_tokens=asked.max_new_tokens,
        display=display,
        **settings,
    )
    assert results is not None  # It is the only rank.
    record = results.record
    write_text(
        directory / CELL_FILE,
        json.dumps(
            {
                "cell": {"recipe": cell.point, "arch": cell.arch, "seed": cell.seed},
                "cost": cell.cost.to_dict(),
                "asked": asked.to_dict(),
                "likelihood": likelihood,
                "scores": {name: record[name] for name in ("average", "standard_error", "tasks")},
                "outcomes": {
                    task: {
                        item: [int(one.correct), int(one.named is not None), int(one.right)]
                        for item, one in judge(find_task(task), outputs).items()
                    }
                    for task, outputs in results.outputs.items()
                },
                "settings": record["settings"],
                "data": record["data"],
                "made_with": record["made_with"],
                "recipe": cell.recipe.model_dump(mode="json"),
            },
            indent=2,
        )
        + "\n",
    )
    display.say(f"{cell.name}: average {record['average']:.2f} ± {record['standard_error']:.2f} %")
