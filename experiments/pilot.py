"""The pilot: which levers of a recipe are worth their cost, and what shortcuts of generation cost, by lines.

python -m experiments.pilot run recipes/tiny.yaml --init VAE --judge JUDGE     train and measure, write a page
python -m experiments.pilot shortcuts MODEL --judge JUDGE                      the same of ways to generate

Every variant changes the stage `prior` of the recipe, and takes as many FLOPs as the base takes in --steps
steps, everything counted: equal time, but for what no FLOP counts. What has been trained or measured is left
out when the command is started again. All continue the same validation documents at each guidance scale; the
page has the lines of a judge's perplexity over distinct-2, the JSON beside it the nats a token at equal
distinct-2.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from colada.cli.main import run as run_app
from colada.data.documents import read_documents
from colada.data.listing import find_files
from colada.errors import ColadaError
from colada.evaluate.texts import Text
from colada.evaluate.variety import words
from colada.files import read_json_object, write_json, write_text
from colada.models.base import LanguageModel
from colada.models.load import load
from colada.report.frontier import draw_frontier, frontier_table, write_frontier_page
from colada.report.style import save_figure, styled
from colada.report.table import Table
from colada.train.checkpoints import RECIPE
from colada.train.display import Display
from colada.train.plan import plan_run, resolve
from colada.train.recipe import Recipe, difference, load_recipe
from colada.train.trainer import MODEL, Trainer
from experiments import common
from experiments.common import line, numbers, some_of

HISTORY, SELF = "stages.prior.history_dropout=0.1", "stages.prior.self_conditioning=0.5"
VARIANTS: dict[str, list[str]] = {
    "base": ["stages.prior.history_dropout=0"],
    "history dropout": [HISTORY],
    "self-conditioning": ["stages.prior.history_dropout=0", SELF],
    "both": [HISTORY, SELF],
    # The rest beside history dropout, which recipes/tiny.yaml has.
    "loss in z0": [HISTORY, "stages.prior.space=z0"],
    "loss halfway": [HISTORY, "stages.prior.space=half"],
    "one copy": [HISTORY, "stages.prior.copies=1", "stages.prior.batch=16"],
    "adaptive timesteps": [HISTORY, "stages.prior.adaptive_timesteps=true"],
    "consistency": [HISTORY, "stages.prior.consistency=1"],
    "Muon 1e-3": [HISTORY, "stages.prior.optimiser=muon", "stages.prior.lr=1e-3"],
    "Muon 4e-3": [HISTORY, "stages.prior.optimiser=muon", "stages.prior.lr=4e-3"],
    "AdamW 5e-4": [HISTORY, "stages.prior.optimiser=adamw", "stages.prior.lr=5e-4"],
    "AdamW 2e-3": [HISTORY, "stages.prior.optimiser=adamw", "stages.prior.lr=2e-3"],
}
SHORTCUTS: dict[str, dict[str, Any]] = {
    "as stored": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantise": "int8"},
    "8 steps": {"settings": {"steps": 8}},
    "against the block": {"settings": {"guidance_against": "block"}},
    "guided above 0.7": {"settings": {"guidance_interval": [0.7, 1.0]}},
    "4 candidates of 8 steps": {"settings": {"steps": 8, "candidates": 4}},
}
VARIETY = (0.4, 0.5, 0.6)
"""Values of distinct-2 at which lines are compared."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

JudgeOption = Annotated[str, typer.Option(help="The judge: recipes/judge.yaml trains one.")]
DataOption = Annotated[Path, typer.Option(help="Folder of the training corpora.")]
IncludeOption = Annotated[list[str], typer.Option(help="File name patterns.")]
DocumentsOption = Annotated[int, typer.Option(help="Validation documents that are continued.")]
BesideOption = Annotated[list[str], typer.Option(help="Further models as points, such as an AR model.")]
EVERYTHING = ["*"]


def held_out(data: Path, include: Sequence[str]) -> tuple[list[Text], set[str]]:
    """Return the validation documents of a folder, and all words of its training documents."""
    texts, vocabulary = list[Text](), set[str]()
    for number, document in enumerate(read_documents(find_files(data, tuple(include)))):
        if document.split == "validation":
            texts.append(Text(document.text, str(number)))
        else:
            vocabulary.update(words(document.text))
    return texts, vocabulary


def nats_at(points: Sequence[Mapping[str, Any]], variety: float) -> float | None:
    """Return a line's nats a token where its distinct-2 is this, between two points; None outside it."""
    ordered = sorted((point["distinct_2"], point["nats_per_token"]) for point in points)
    for (low, one), (high, other) in pairwise(ordered):
        if low <= variety <= high:
            return float(one + (other - one) * (variety - low) / (high - low) if high > low else one)
    return None


def error_of(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean over seeds; None of fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def compared(lines: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """Return each variant's nats a token at equal variety: the mean over its seeds, and standard errors."""
    table: dict[str, dict[str, Any]] = {}
    for name, seeds in lines.items():
        table[name] = {}
        for variety in VARIETY:
            values = [value for points in seeds if (value := nats_at(points, variety)) is not None]
            error = error_of(values)
            mean = statistics.mean(values) if values else None
            table[name][f"{variety:g}"] = {"nats": mean, "standard_error": error, "seeds": len(values)}
    return table


def averaged(name: str, seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a variant's line: the mean over its seeds at each guidance scale, and its standard error."""
    line = []
    for points in zip(*seeds, strict=True):
        nats = [point["nats_per_token"] for point in points]
        perplexity = math.exp(statistics.mean(nats))
        error = error_of(nats)
        own = {
            "model": name,
            "perplexity": perplexity,
            "standard_error": None if error is None else perplexity * error,
            "distinct_2": statistics.mean(point["distinct_2"] for point in points),
        }
        line.append({**own, "settings": points[0]["settings"]})
    return line


def report(out: Path, results: Mapping[str, Sequence[Mapping[str, Any]]], judge: str) -> None:
    """Write the page, the JSON and the figure (means over seeds) of all lines, and print their comparison."""
    everyone = [
        {**point, "model": name if len(seeds) == 1 else f"{name}, {seed}"}
        for name, seeds in results.items()
        for seed, result in enumerate(seeds)
        for point in result["points"]
    ]
    first = next(iter(results.values()))[0]
    whole = {"kind": first["kind"], "real": first["real"], "points": everyone}
    table = compared({name: [own["points"] for own in seeds] for name, seeds in results.items()})
    facts = {"judge": judge, "documents": first["real"]["texts"], "new tokens": common.NEW_TOKENS}
    write_frontier_page(out / "pilot.html", whole, judge, facts)
    means = [
        point for name, seeds in results.items() for point in averaged(name, [own["points"] for own in seeds])
    ]
    with styled():
        save_figure(draw_frontier({"real": first["real"], "points": means}), out / "pilot.svg")
    bare = [{key: value for key, value in point.items() if key != "records"} for point in everyone]
    real = {key: value for key, value in first["real"].items() if key != "records"}
    record = {**facts, "real": real, "points": bare, "nats_at_equal_distinct_2": table}
    write_json(out / "pilot.json", record, sort=False)
    frontier_table(whole).print(Console(highlight=False))
    shown = Table(("nats a token at distinct-2", *(f"{variety:g}" for variety in VARIETY)))
    for name, row in table.items():
        cells = []
        for value in row.values():
            error = "" if value["standard_error"] is None else f" ± {value['standard_error']:.3f}"
            cells.append("–" if value["nats"] is None else f"{value['nats']:.3f}{error}")
        shown.row(name, *cells)
    print(shown.markdown())


def measured(
    file: Path, asked: Mapping[str, Any], model: Callable[[], LanguageModel], *arguments: Any, **options: Any
) -> dict[str, Any]:
    """Return what :func:`line` finds of the model that a function loads, kept in a file.

    Args:
        asked: what it depends on, for JSON; what the file says of the same is not measured again.
    """
    result = read_json_object(file) if file.is_file() else {}
    if result.get("asked") != asked:
        result = {"asked": asked, **line(model(), *arguments, **options)}
        write_text(file, json.dumps(result) + "\n")
    return result


def trained(
    recipe: Path, out: Path, steps: int, seed: int, common: Sequence[str], variant: Sequence[str]
) -> Path:
    """Train a variant, or what is left of it, and return its model.

    Raises:
        ColadaError: if there is one already, of another recipe.
    """

    def made(*overrides: str) -> Recipe:
        return load_recipe(recipe, [f"seed={seed}", *common, *overrides])

    def flops(*overrides: str) -> float:
        return sum(sum(phase.flops.values()) for phase in plan_run(made(*overrides)).phases)

    one = "stages.prior.steps=1"
    count = max(1, round(steps * flops(*VARIANTS["base"], one) / flops(*variant, one)))
    wanted = made(*variant, f"stages.prior.steps={count}", f"stages.prior.warmup={max(1, count // 8)}")
    if not (out / MODEL).is_dir():
        Trainer(wanted, out, Display(Console(stderr=True))).run()
    elif changed := difference(load_recipe(out / RECIPE), resolve(wanted)):
        raise ColadaError(f"{out} is of another recipe: {changed}; give another --out")
    return out / MODEL


@app.command()
def run(
    recipe: Path,
    judge: JudgeOption,
    init: Annotated[
        str, typer.Option(help="Model whose Text VAE all share: train the recipe's stage vae first.")
    ],
    data: DataOption = Path("data/corpora"),
    include: IncludeOption = EVERYTHING,
    out: Annotated[Path, typer.Option(help="Directory of all runs.")] = Path("runs/pilot"),
    steps: Annotated[int, typer.Option(min=1, help="Of the base.")] = 800,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 2,
    documents: DocumentsOption = 200,
    only: Annotated[list[str] | None, typer.Option(help="Variants by name; all if left out.")] = None,
    beside: BesideOption = [],  # noqa: B006
    overrides: Annotated[list[str], typer.Option("--set", help="Of every variant, key=value.")] = [],  # noqa: B006
) -> None:
    """Train and measure every variant with every seed."""
    names, base = some_of(only, VARIANTS), load_recipe(recipe)
    texts, vocabulary = held_out(data, include)
    reader = load(judge)
    asked = {"judge": judge, "data": str(data), "include": list(include), "documents": documents}
    others = [f"stages.{name}.steps=0" for name in base.trained if name != "prior"]
    decay = ["stages.prior.schedule=wsd", "stages.prior.ema=0.99"]
    common = [f"model={{init: {init}}}", *others, *decay, *overrides]
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for name in names:
            place = out / f"{list(VARIANTS).index(name)}-{seed}"
            model = trained(recipe, place, steps, seed, common, VARIANTS[name])
            found = measured(
                *(place / "line.json", {"model": str(model), **asked}, partial(load, model)),
                *(reader, texts, vocabulary, documents, {}),
            )
            results.setdefault(name, []).append(found)
    for number, other in enumerate(beside):
        file = out / f"beside-{number}.json"
        question = {"model": other, **asked}
        found = measured(file, question, partial(load, other), reader, texts, vocabulary, documents, {})
        results[other] = [found]
    report(out, results, judge)


@app.command()
def shortcuts(
    model: Annotated[str, typer.Argument(help="Directory or hub id.")],
    judge: JudgeOption,
    data: DataOption = Path("data/corpora"),
    include: IncludeOption = EVERYTHING,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("runs/shortcuts"),
    documents: DocumentsOption = 200,
    only: Annotated[list[str] | None, typer.Option(help="Shortcuts by name; all if left out.")] = None,
    guidance: Annotated[str, typer.Option(help="Scales, with commas between.")] = "1,1.5,2,3,5,7",
    beside: BesideOption = [],  # noqa: B006
) -> None:
    """Measure what ways to generate faster, or more carefully, change of a model's line."""
    names, scales = some_of(only, SHORTCUTS), numbers(guidance, "--guidance", float)
    texts, vocabulary = held_out(data, include)
    reader = load(judge)
    asked = {"judge": judge, "data": str(data), "include": list(include), "documents": documents}
    asked["guidance"] = scales
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}

    def opened(where: str, way: Mapping[str, Any]) -> LanguageModel:
        made: Any = load(where, dtype=way.get("dtype", torch.float32))
        return made.quantise(way["quantise"]) if "quantise" in way else made

    ways = {name: (model, SHORTCUTS[name]) for name in names}
    for number, (name, (where, way)) in enumerate({**ways, **{own: (own, {}) for own in beside}}.items()):
        results[name] = [
            measured(
                out / f"line-{number}-{name.replace(' ', '-').replace('/', '-')}.json",
                {"model": where, "way": name, **asked},
                partial(opened, where, way),
                *(reader, texts, vocabulary, documents, way.get("settings", {})),
                guidance=scales,
            )
        ]
    report(out, results, judge)


if __name__ == "__main__":
    sys.exit(run_app(app, None, "python -m experiments.pilot"))
