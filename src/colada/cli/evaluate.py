"""The commands around benchmarks and texts: ``colada eval``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from colada.checks import MOST_TOKENS, require_count
from colada.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    QuantiseOption,
    RevisionOption,
    check_model_options,
    load_model,
    number_option,
)
from colada.errors import ColadaError
from colada.generate.settings import check_settings
from colada.train.environment import rank_of_world

if TYPE_CHECKING:
    from colada.evaluate.data import Benchmark
    from colada.evaluate.tasks import Task

eval_app = typer.Typer(help="Run benchmarks, score outputs, measure texts.")

REPORT_FILE = "report.html"

LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Only so many texts, or items of a task. Default: all.")
]
BatchOption = Annotated[int, typer.Option(help="What is computed together; changes no result.")]
StepsOption = Annotated[int | None, typer.Option(help="Solver steps per block. Default: the model's own.")]
PageOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


@eval_app.command("run")
def run(
    out: Annotated[
        Path, typer.Option(help="Directory of the outputs; what it has already is not generated again.")
    ],
    model: ModelOption = None,
    revision: RevisionOption = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Which tasks. Default: the eight.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Directory of <task>.<split>.jsonl(.gz) records, or hub."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="In place of --data: <task>.jsonl(.gz) records with their own few_shot_prefix and prompt,"
            " such as the release's outputs.",
        ),
    ] = None,
    limit: LimitOption = None,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample",
            help="Take the items in a random order of the seed, MMLU's subjects in turn, not the file's.",
        ),
    ] = False,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Demonstrations in each prompt. Default: the release's 2, 1 or 0."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Every item has a seed of its own, made of this one.")] = 0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Of an item, cut at the first newline after a word.")
    ] = 32,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None, number_option("--guidance", "-g", help="Guidance scale. Default: the model's own.")
    ] = None,
    batch: BatchOption = 16,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    quantise: QuantiseOption = None,
    rank: Annotated[
        int | None, typer.Option(help="Which of --world processes this is, from 0. Default: torchrun's.")
    ] = None,
    world: Annotated[
        int | None, typer.Option(help="How many processes share the items. Default: torchrun's, or 1.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Generate the answers of the benchmarks, greedily, and score them: OUT/results.json, OUT/report.html.

    Stopped at any moment, the same command goes on where it was.
    """
    from colada.evaluate.tasks import find_tasks
    from colada.report.style import require_matplotlib

    check_counts(limit=limit, batch=batch)
    require_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
    check_settings({"steps": steps, "guidance": guidance, "seed": seed})
    check_model_options(model, revision, dtype, device, quantise)
    require_matplotlib("the report")
    place = _place(rank, world)
    benchmarks = [_benchmark(task, data, prompts, shots, seed, limit, sample) for task in find_tasks(tasks)]

    from rich.console import Console

    from colada.evaluate.run import EvaluationRank, evaluate
    from colada.report.evaluation import print_tables, write_page
    from colada.train.display import Display

    part = EvaluationRank(*place)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun's processes take a GPU each.
    network = load_model(model, revision, dtype, device, quantise)
    settings = {**network.chosen({"steps": steps, "guidance": guidance}), "temperature": 0.0}
    del settings["seed"]  # Every item has its own.
    results = evaluate(
        network,
        benchmarks,
        out,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch=batch,
        part=part,
        display=Display(Console(stderr=True, quiet=quiet or part.rank > 0)),
        **settings,
    )
    if results is None:
        return
    print_tables(results.scores, Console(highlight=False))
    record = results.record
    facts = {"model": record["model"], **record["settings"], **record["data"], **record["made_with"]}
    write_page(out / REPORT_FILE, network.origin, results.scores, results.outputs, facts)
    print(f"wrote {out / REPORT_FILE}")


@eval_app.command("score")
def score(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Files of outputs, or directories of <task>.jsonl(.gz)."),
    ],
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of one FILE. Default: what its name begins with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: PageOption = None,
) -> None:
    """Score existing outputs, by the release's rules."""
    from rich.console import Console

    from colada.evaluate.outputs import find_outputs, read_outputs
    from colada.evaluate.statistics import score as score_outputs
    from colada.evaluate.statistics import summary
    from colada.report.evaluation import print_tables, write_page
    from colada.report.style import require_matplotlib

    if html is not None:
        require_matplotlib("a page")
    chosen = find_outputs(existing_paths(files), task)
    outputs = {scored.name: read_outputs(path, scored) for scored, path in chosen}
    scores = [score_outputs(scored, outputs[scored.name]) for scored, _ in chosen]
    if as_json:
        print(json.dumps(summary(scores), indent=2))
    else:
        print_tables(scores, Console(highlight=False))
    if html is not None:
        facts = {scored.title: str(path) for scored, path in chosen}
        write_page(html, ", ".join(files), scores, outputs, facts)
        if not as_json:
            print(f"wrote {html}")


@eval_app.command(
    "harness",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def harness(context: typer.Context) -> None:
    """Run the lm-evaluation-harness (extra eval); its arguments, with --model_args model=DIR,...

    All arguments are those of the harness's own lm-eval run; --help shows them.
    """
    try:
        from colada.evaluate.harness import run_harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ColadaError("eval harness needs lm_eval: pip install 'colada-lm[eval]'") from None
    run_harness(context.args)


# --- what they are given -------------------------------------------------------------------------


def check_counts(**counts: int | None) -> None:
    """Raise ColadaError for a count that is out of bounds; None is none."""
    for name, value in counts.items():
        if value is not None:
            require_count(name, value)


def existing_paths(names: Sequence[str]) -> list[Path]:
    """Return files or folders by name. Raises ColadaError for one that is empty, or not there."""
    for name in names:
        if not name or not os.path.lexists(name):
            raise ColadaError(f"{name!r}: no such file or directory")
    return [Path(name) for name in names]


def _benchmark(
    task: Task,
    data: str | None,
    prompts: Path | None,
    shots: int | None,
    seed: int,
    limit: int | None,
    sample: bool,
) -> Benchmark:
    from colada.evaluate.data import load_benchmark, load_prompts

    if data is None and prompts is None:
        raise ColadaError("where are the records? give --data or --prompts")
    if data is not None and prompts is not None:
        raise ColadaError(f"--data {data} and --prompts {prompts}, expected one of them")
    if prompts is not None:
        for name, value in (("--shots", shots), ("--sample", sample or None)):
            if value is not None:
                raise ColadaError(f"{name} with --prompts: those prompts are taken as they are")
        return load_prompts(task, prompts, limit=limit)
    assert data is not None
    return load_benchmark(
        task, data, shots=shots, seed=seed, limit=limit, order="random" if sample else "file"
    )


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    """Return rank and world: the options, or what torchrun set, or one process."""
    if (rank is None) != (world is None):
        raise ColadaError(f"--rank {rank} and --world {world}, expected both or neither")
    if rank is not None and world is not None:
        return rank, world
    return rank_of_world()
