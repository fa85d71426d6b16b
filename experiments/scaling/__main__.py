"""The scaling study: ``python -m experiments.scaling run``, ``figure`` and ``data``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from colada.cli.main import Commands, run
from colada.cli.options import DeviceOption
from colada.errors import ColadaError
from colada.report.style import require_matplotlib

study_app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    help="Train several models on the same data, and compare them.",
)


@study_app.command("run")
def scaling(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="One for each compute point, named by its file.")
    ],
    benchmarks: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of <task>.<split>.jsonl(.gz) records.")
    ],
    out: Annotated[
        Path, typer.Option(help="Directory of the study; what it has already is not made again.")
    ] = Path("runs/scaling"),
    archs: Annotated[
        str, typer.Option(metavar="NAME,...", help="Which of cola, ar, llada.")
    ] = "cola,ar,llada",
    seeds: Annotated[int, typer.Option(min=1, help="How many models of each kind and point.")] = 2,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Which tasks. Default: the eight.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many items of each task, drawn once for all. Default: all."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Demonstrations in each prompt.")] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Of an item.")] = 32,
    text_bytes: Annotated[
        int,
        typer.Option(min=0, help="Of validation text, whose bits per byte are measured; 0: none."),
    ] = 2**14,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of this process. Default: one a core.")
    ] = None,
    device: DeviceOption = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Train each recipe as each model, ask all of them the same items, and draw score over training FLOPs.

    Beside the scores stand bits per byte of held-out text of the sources.

    OUT/scaling.svg, .png, .md and .json; OUT/options.svg and .png. Stopped at any
    moment, the same command goes on. Started several times, the processes share the work.
    """
    from colada.checks import MOST_COUNT, MOST_TOKENS, require_count

    for name, value, most in (
        ("seeds", seeds, 1000),
        ("limit", limit, MOST_COUNT),
        ("max_new_tokens", max_new_tokens, MOST_TOKENS),
        ("threads", threads, 1024),
    ):
        if value is not None:
            require_count(name, value, most)
    require_matplotlib("a study's figure")

    from colada.cli.train import training_extra
    from colada.evaluate.tasks import find_tasks

    chosen = tuple(task.name for task in find_tasks(tasks))
    with training_extra():
        from colada.data.sources import check_sources
        from colada.train.recipe import load_recipe
    # What is wrong most often, before torch is waited for.
    for recipe in recipes:
        check_sources(load_recipe(recipe).data.sources)

    from rich.console import Console

    from colada.models.base import find_archs

    with training_extra():
        from colada.train.display import Display
        from colada.train.preflight import preflight
        from colada.train.trainer import Interrupted
        from experiments.scaling.cells import read_results
        from experiments.scaling.figure import write_figures
        from experiments.scaling.likelihood import validation_texts
        from experiments.scaling.run import Asked, plan_cells, run_study

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    # All that can be wrong is found before anything is trained.
    asked = Asked(chosen, limit, shots, max_new_tokens, text_bytes)
    cells = plan_cells(recipes, find_archs(archs), seeds, device)
    items = asked.benchmarks(benchmarks)
    for cell in cells:
        preflight(cell.recipe, out / cell.name)
    if text_bytes:
        validation_texts(cells[0].recipe, text_bytes)
    try:
        progress = run_study(cells, asked, items, out, Display(Console(stderr=True, quiet=quiet)))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(130) from None
    finished = set(progress.made + progress.kept)
    print(f"{len(finished)} of {len(cells)} cells are finished, {len(progress.made)} of them by this process")
    if progress.elsewhere:
        print(f"other processes are at {', '.join(progress.elsewhere)}; the last to end draws all")
    if finished:
        there = read_results(out, but=progress.failed)
        results = [result for result in there if result.asked == asked.to_dict()]
        if len(results) < len(there):
            print(f"left out: {len(there) - len(results)} cells that were asked other items")
        for path in write_figures(out, results):
            print(f"wrote {path}")
    if progress.failed:
        name, why = next(iter(progress.failed.items()))
        raise ColadaError(f"{len(progress.failed)} of {len(cells)} cells failed, first {name}: {why}")


@study_app.command("figure")
def figure(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of a study, finished or not.")],
) -> None:
    """Draw what a study has so far: its figures, tables and record."""
    from experiments.scaling.cells import read_results
    from experiments.scaling.figure import write_figures

    for path in write_figures(out, read_results(out)):
        print(f"wrote {path}")


@study_app.command("data")
def data(
    benchmarks: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Directory of <task>.<split>.jsonl(.gz) records, training and scored."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the documents.")],
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Which tasks. Default: all that have a training split."),
    ] = None,
    letters: Annotated[
        bool, typer.Option("--letters", help="Put an option's letter before its text in the answers.")
    ] = False,
) -> None:
    """Write benchmarks' training splits as text: each question as the evaluation asks it, and its answer.

    Records that a task is scored on are left out. Prints what each licence allows.
    """
    from colada.evaluate.tasks import find_tasks
    from experiments.scaling.data import LICENCES, write_documents

    chosen = list(LICENCES) if tasks is None else [task.name for task in find_tasks(tasks)]
    write_documents(benchmarks, out, chosen, print, letters)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run(study_app, args, "python -m experiments.scaling")


if __name__ == "__main__":
    sys.exit(main())
