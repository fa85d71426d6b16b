"""The commands around training runs: train, report, export, recipe, cost."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from colada.cli.options import JsonOption, ModelOption, loading
from colada.errors import ColadaError
from colada.locate import BUNDLED, CHAT_TEMPLATE_FILE, local
from colada.train.logs import require_metrics

if TYPE_CHECKING:
    from colada.train.recipe import Recipe


RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
OutOption = Annotated[
    Path | None, typer.Option(help="Directory of the run. Default: runs/ and the recipe's name.")
]
DataOption = Annotated[
    Path | None, typer.Option(help="File or folder of text, in place of the recipe's data.sources.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe; may be repeated."),
]
ResumeOption = Annotated[
    str,
    typer.Option(
        metavar="WHICH", help="Go on from: auto (the last checkpoint of --out), a step, or a directory."
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print parameters, memory, tokens and FLOPs, and do not train.")
]
RanksOption = Annotated[
    int | None, typer.Option(min=1, help="With --dry-run: plan for so many. Default: torchrun's, or 1.")
]
PlanJsonOption = Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def distil(
    recipe: RecipeArgument,
    model: ModelOption = None,
    out: OutOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    resume: ResumeOption = "auto",
    dry_run: DryRunOption = False,
    ranks: RanksOption = None,
    as_json: PlanJsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Distil a model: a few evaluations a block and no guidance; 'colada train' with model.init.

    Ctrl-C and SIGTERM save the state; running again resumes it.
    """
    changes = [f"model.init={model or BUNDLED}", *(overrides or [])]
    train(recipe, out, None, data, changes, resume, dry_run, ranks, as_json, quiet)


def train(
    recipe: RecipeArgument,
    out: OutOption = None,
    arch: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cola, ar or llada, in place of the recipe's model.arch."),
    ] = None,
    data: DataOption = None,
    overrides: SetOption = None,
    resume: ResumeOption = "auto",
    dry_run: DryRunOption = False,
    ranks: RanksOption = None,
    as_json: PlanJsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model from text, stage by stage, or a baseline of equal size; under torchrun on several ranks.

    Ctrl-C and SIGTERM save the state; running again resumes it.
    """
    with training_extra():
        from colada.train.environment import world_size
        from colada.train.preflight import preflight
        from colada.train.recipe import load_recipe

    replaced = {} if data is None else {"data.sources": [{"path": str(data)}]}
    archs = [] if arch is None else [f"model.arch={arch}"]
    settings = load_recipe(recipe, [*archs, *(overrides or [])], replaced)
    if out is None:
        kind = settings.model.arch
        out = Path("runs") / (recipe.stem if kind == "cola" else f"{recipe.stem}-{kind}")
    for name, value in (("--ranks", ranks), ("--json", as_json or None)):
        if value is not None and not dry_run:
            raise ColadaError(f"{name} without --dry-run: it says what a run would take")
    # Before torch is imported, which takes seconds.
    notes = preflight(settings, out)
    if dry_run:
        _plan(settings, ranks or world_size(), as_json, notes)
        return
    with loading(f"torch for {recipe}"):
        from rich.console import Console

        from colada.train.display import Display
        from colada.train.parallel import joined
        from colada.train.trainer import MODEL, Interrupted, Trainer
    run = settings.run
    with joined(run.device, run.shard, run.replicas) as group:
        display = Display(Console(stderr=True, quiet=quiet or not group.first))
        try:
            Trainer(settings, out, display, resume, group).run()
            if group.first and run.report and find_spec("matplotlib") is not None:
                from colada.report.training import write_report

                display.say(f"wrote {write_report(out)}")
        except Interrupted as stopped:
            if group.first:
                print(stopped, file=sys.stderr)
            raise typer.Exit(130) from None
    if group.first:
        print(f"the model is in {out / MODEL}; try it:")
        prompt = next(iter(run.sample_prompts), "Once upon a time")
        chat = ["--chat"] if (out / MODEL / CHAT_TEMPLATE_FILE).exists() else []
        print(shlex.join(["colada", "generate", "--model", str(out / MODEL), *chat, prompt]))


def _plan(recipe: Recipe, ranks: int, as_json: bool, notes: list[str]) -> None:
    """Print what a run will take, and what its data holds."""
    from colada.train.plan import plan_run, resolve
    from colada.train.survey import survey

    recipe = resolve(recipe)
    plan, surveys = plan_run(recipe, ranks), survey(recipe)
    if as_json:
        print(json.dumps({**plan.to_dict(), "data": [asdict(entry) for entry in surveys]}, indent=2))
        return
    for name, value in plan.lines():
        print(f"{name:<32}{value:>14}")
    for entry in surveys:
        print(f"data {entry.name}: {entry}")
    tokens = [entry.tokens for entry in surveys if entry.tokens is not None]
    # Captions and answers are no text of the data's.
    read = sum(phase.steps * phase.tokens for phase in plan.phases if "task" not in phase.work)
    if read and sum(tokens) and len(tokens) == len(surveys):
        print(f"{'passes over the data':<32}{read / sum(tokens):>14,.1f}")
    for note in notes:
        print(note)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, finished or not.")],
) -> None:
    """Draw a run's metrics: RUN/report/report.html, with its plots beside it."""
    require_metrics(run)
    with training_extra():
        from colada.report.training import write_report

    print(f"wrote {write_report(run)}")


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A directory below checkpoints/ of a run; or a model, to write anew."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="MODEL", help="The model directory to write.")],
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Store matrices as int8 by row: half of bfloat16's bytes."),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Write only what CHECKPOINT differs by from this model, 'bundled' say, which it loads with:"
            " products of low rank, or with --int8 the whole difference.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With --base: of the products. Default: 16.")
    ] = None,
) -> None:
    """Write a checkpoint of a run as a model in the released format, with averaged weights if it has them."""
    if rank is not None and (base is None or int8):
        why = "without --base: it is of the difference to that model" if base is None else "with --int8"
        raise ColadaError(f"--rank {rank} {why}")
    if base is not None:
        local(base)
    trained = (checkpoint / "state.json").exists()
    if not trained:
        _require_model(checkpoint)
    from colada.models.difference import save_difference
    from colada.models.load import load, load_cola

    with TemporaryDirectory() as folder:
        model, words = checkpoint, str(checkpoint)
        if trained:
            with training_extra():
                from colada.train.export import export as write
            model = Path(folder) / "model" if base is not None or int8 else out
            words = write(checkpoint, model)
        if base is not None:
            left_out = save_difference(
                load_cola(model), load_cola(base), base, out, None if int8 else rank or 16
            )
            words = f"the difference to {base}, without {100 * left_out:.2g}% of its square"
        elif int8 or not trained:
            load(model).save(out, int8)
    print(f"wrote {out}: {words}")


def _require_model(path: Path) -> None:
    """Raise ColadaError for what is no model, with a hint at the last checkpoint of a run."""
    runs = (path / "checkpoints", path, path.parent)
    candidates = [file.parent for run in runs for file in sorted(run.glob("*-*/state.json"))]
    if candidates:
        reason = "is neither a checkpoint, which has a state.json, nor a model"
        raise ColadaError(f"{path} {reason} (did you mean {candidates[-1]}?)")
    local(path)


def recipe(
    start: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="Default: no key is set.")] = None,
    overrides: SetOption = None,
) -> None:
    """Print a recipe with every key there is, each with its meaning and its value."""
    with training_extra():
        from colada.train.recipe import commented, load_recipe

    whole = load_recipe(start, overrides or [])
    whole.check_networks()
    print(commented(whole), end="")


def cost(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes, YAML files.")],
    archs: Annotated[
        str, typer.Option(metavar="NAME,...", help="What each is trained as; the baselines are matched.")
    ] = "cola,ar,llada",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count what models cost: parameters and training FLOPs, everything counted, and 6 N D beside it.

    Nothing is trained.
    """
    with training_extra():
        from colada.data.sources import check_sources
        from colada.train.recipe import load_recipe
    for path in recipes:
        settings = load_recipe(path, overrides or [])
        try:
            check_sources(settings.data.sources)
        except ColadaError as error:  # Counting needs no text, but whoever counts is about to train.
            print(f"{path}: {error} (counted from the recipe alone)", file=sys.stderr)
    from rich.console import Console

    from colada.models.base import ARCHITECTURES, find_archs
    from colada.report.table import Table
    from colada.train.cost import scaled
    from colada.train.plan import plan_run

    names = find_archs(archs)
    costs = [
        (path, plan_run(load_recipe(path, [*(overrides or []), f"model.arch={name}"])).cost)
        for path in recipes
        for name in names
    ]
    if as_json:
        print(json.dumps([{"recipe": str(path), **run_cost.to_dict()} for path, run_cost in costs], indent=2))
        return
    table = Table(("Recipe, model", "Parameters", "Tokens", "FLOPs", "6 N D"))
    for path, run_cost in costs:
        flops, narrow = scaled(run_cost.total_flops, "FLOP"), scaled(run_cost.narrow_flops, "FLOP")
        model = f"{path.stem}, {ARCHITECTURES[run_cost.arch]}"
        table.row(model, f"{run_cost.total_parameters:,}", f"{run_cost.tokens:,}", flops, narrow)
        for part, value in run_cost.flops.items():
            table.row(f"  {part}", "", "", f"{100 * value / run_cost.total_flops:.1f}%", "")
    table.print(Console(highlight=False))


@contextmanager
def training_extra() -> Iterator[None]:
    """Name the extra to install where a package is missing that only training needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("pydantic", "yaml", "pyarrow", "filelock", "matplotlib"):
            raise
        raise ColadaError(f'training needs {error.name}: pip install "colada-lm[train]"') from None
