"""The commands around benchmarks and texts: ``colada eval``."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
TRANSFORMERS = "hf:"
"""What the name of a judge from ``transformers`` begins with."""


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
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many items of each task. Default: all.")
    ] = None,
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
    steps: Annotated[
        int | None, typer.Option(help="Solver steps per block. Default: the model's own.")
    ] = None,
    guidance: Annotated[
        float | None, number_option("--guidance", "-g", help="Guidance scale. Default: the model's own.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Items generated together; changes no output.")] = 16,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    quantise: QuantiseOption = None,
    rank: Annotated[
        int | None, typer.Option(help="Which of --world processes this is, from 0. Default: torchrun's.")
    ] = None,
    world: Annotated[
        int | None, typer.Option(help="How many processes share the items. Default: torchrun's, or 1.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Generate the answers of the benchmarks, greedily, and score them: OUT/results.json, OUT/report.html.

    Stopped at any moment, the same command goes on where it was.
    """
    _check_counts(limit=limit, batch=batch)
    require_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
    check_settings({"steps": steps, "guidance": guidance, "seed": seed})
    check_model_options(model, revision, dtype, device, quantise)
    chosen = chosen_tasks(tasks)

    from rich.console import Console

    from colada.evaluate.run import Part, evaluate
    from colada.report.evaluation import print_tables, write_page
    from colada.train.display import Display

    part = Part(*_place(rank, world))
    benchmarks = [_benchmark(task, data, prompts, shots, seed, limit, sample) for task in chosen]
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun's processes take a GPU each.
    network = load_model(model, revision, dtype, device, quantise)
    given = {"steps": steps, "guidance": guidance}
    settings = {**network.chosen(given), "temperature": 0.0}
    del settings["seed"]  # Every item has its own.
    display = Display(Console(stderr=True, quiet=quiet or part.rank > 0))
    results = evaluate(
        network,
        benchmarks,
        out,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch=batch,
        part=part,
        display=display,
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
        list[Path],
        typer.Argument(metavar="FILE...", help="Files of outputs, or directories of <task>.jsonl(.gz)."),
    ],
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of one FILE. Default: what its name begins with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots.")] = None,
) -> None:
    """Score existing outputs, by the release's rules."""
    from rich.console import Console

    from colada.evaluate.outputs import read_outputs
    from colada.evaluate.statistics import score as score_outputs
    from colada.evaluate.statistics import summary
    from colada.report.evaluation import print_tables, write_page

    found = _files(files, task)
    outputs = {own.name: read_outputs(path, own) for own, path in found}
    scores = [score_outputs(own, outputs[own.name]) for own, _ in found]
    if as_json:
        print(json.dumps(summary(scores), indent=2))
    else:
        print_tables(scores, Console(highlight=False))
    if html is not None:
        facts = {own.title: str(path) for own, path in found}
        write_page(html, ", ".join(map(str, files)), scores, outputs, facts)
        if not as_json:
            print(f"wrote {html}")


@eval_app.command("likelihood")
def likelihood(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Texts: .txt, .jsonl or .parquet, or folders of them."),
    ],
    model: ModelOption = None,
    revision: RevisionOption = None,
    field: Annotated[str, typer.Option(help="Key or column of the text.")] = "text",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many texts. Default: all.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="K of a bound. Default: 1 for Cola DLM, 32 for LLaDA.")
    ] = None,
    at: Annotated[
        float | None, number_option(help="a = t / T of the latents that the bound is over. Default: 0.6.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Solver steps to the noise, and half as many to the data. Default: 16.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of noise and probes.")] = 0,
    batch: Annotated[int, typer.Option(help="Texts computed together; changes no result.")] = 8,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON, a record a text.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Measure texts in bits per byte; of Cola DLM an upper bound, from a lower bound on log p(x)."""
    from dataclasses import asdict

    from colada.models.bound import check_bound

    _check_counts(limit=limit, batch=batch)
    check_bound(samples, at, steps)
    check_settings({"seed": seed})
    check_model_options(model, revision, dtype, device)

    from rich.console import Console

    from colada.evaluate.texts import read_texts, summarise
    from colada.files import write_text
    from colada.models.likelihood import bound_settings, kind, measure
    from colada.train.display import Display
    from colada.train.provenance import provenance

    display = Display(Console(stderr=True, quiet=quiet))
    texts = read_texts(files, field, limit, display.say)
    network = load_model(model, revision, dtype, device)
    bound = bound_settings(network, samples=samples, at=at, steps=steps)
    with display.task("likelihood", total=1, unit="tokens"):
        found = measure(
            network,
            [text.text for text in texts],
            seed=seed,
            batch=batch,
            progress=display.advance,
            **bound,
        )
        settings: dict[str, Any] = {**bound, "seed": seed, "dtype": dtype, "device": device}
    result = summarise(found, kind(network))
    error = result["standard_error"]
    spread = f" ± {error:.3f}" if error is not None else " (one text, so no standard error)"
    bound = result["kind"] == "bound"
    first, last = ("at most ", ": a bound, not the likelihood") if bound else ("", "")
    print(f"{first}{result['bits_per_byte']:.3f}{spread} bits per byte{last}")
    counted = "1 text" if result["texts"] == 1 else f"{result['texts']:,} texts"
    print(f"{counted}, {result['tokens']:,} tokens, {result['bytes']:,} bytes")
    if result["parts_per_token"]:
        print("nats per token: " + ", ".join(f"{k} {v:.3f}" for k, v in result["parts_per_token"].items()))
    print(", ".join(f"{name} {value}" for name, value in settings.items() if value is not None))
    if out is not None:
        record = {
            **result,
            "model": network.origin,
            "settings": settings,
            "made_with": provenance(network.device),
            "records": [
                {"origin": text.origin, **asdict(own)} for text, own in zip(texts, found, strict=True)
            ],
        }
        write_text(out, json.dumps(record, indent=2) + "\n")
        print(f"wrote {out}")


@eval_app.command("generative")
def generative(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Real texts: .txt, .jsonl or .parquet, or folders of them."),
    ],
    judge: Annotated[
        str,
        typer.Option(metavar="WHERE", help="The judge: a model directory or hub id; hf:ID of transformers."),
    ],
    model: ModelOption = None,
    revision: RevisionOption = None,
    field: Annotated[str, typer.Option(help="Key or column of the text.")] = "text",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many texts. Default: all.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of each text, as prompt; 0 writes from nothing.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a continuation.")] = 64,
    temperature: Annotated[
        float | None, number_option(help="Of the tokens. Default: the model's own.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep so many tokens; 0 all.")] = None,
    top_p: Annotated[float | None, number_option(help="Keep the likeliest up to this share.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Solver steps per block. Default: the model's own.")
    ] = None,
    guidance: Annotated[
        float | None, number_option("--guidance", "-g", help="Guidance scale. Default: the model's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of continuations, and of the judge's noise.")] = 0,
    batch: Annotated[int, typer.Option(help="Texts computed together; changes no result.")] = 16,
    judge_samples: Annotated[
        int | None, typer.Option(help="K of a judge's bound. Default: 1 for Cola DLM, 32 for LLaDA.")
    ] = None,
    judge_at: Annotated[
        float | None, number_option(help="a = t / T of a judge's bound. Default: 0.6.")
    ] = None,
    judge_steps: Annotated[
        int | None, typer.Option(help="Solver steps of a judge's bound. Default: 16.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON, a record a text.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Perplexity of generated text under a judge, beside its entropy and distinct-n, and real text's own."""
    from colada.evaluate.texts import check_lengths
    from colada.models.bound import check_bound

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "steps": steps, "guidance": guidance}
    _check_counts(limit=limit, batch=batch)
    check_lengths(prompt_tokens, new_tokens)
    check_settings({**given, "seed": seed})
    check_bound(judge_samples, judge_at, judge_steps)
    check_model_options(model, revision, dtype, device)
    if not judge.startswith(TRANSFORMERS):
        check_model_options(judge, None, dtype, device)
    elif find_spec("transformers") is None:
        raise ColadaError(f"judge {judge} needs transformers: pip install transformers")

    from rich.console import Console

    from colada.device import find_device
    from colada.evaluate import generative as room
    from colada.evaluate.run import require_tokenizer
    from colada.evaluate.texts import read_texts
    from colada.files import write_text
    from colada.models.likelihood import bound_settings
    from colada.report.evaluation import print_generative
    from colada.train.display import Display
    from colada.train.provenance import provenance

    display = Display(Console(stderr=True, quiet=quiet))
    texts = read_texts(files, field, limit, display.say)
    network = load_model(model, revision, dtype, device)
    chosen: room.Judge
    if judge.startswith(TRANSFORMERS):
        chosen = room.TransformersJudge(judge.removeprefix(TRANSFORMERS), find_device(device))
    else:
        reader = load_model(judge, None, dtype, device)
        bound = bound_settings(reader, samples=judge_samples, at=judge_at, steps=judge_steps)
        chosen = room.ModelJudge(reader, require_tokenizer(network), **bound, seed=seed, batch=batch)
    named: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "seed": seed}
    with display.task("generative", total=len(texts)):
        result = room.read_generated(
            network,
            texts,
            chosen,
            **lengths,
            batch=batch,
            writing=display.advance,
            judging=display.advance,
            **named,
        )
    settings = {**network.chosen(named), **lengths, "dtype": dtype, "device": device}
    print_generative(result, chosen.origin, Console(highlight=False))
    print(", ".join(f"{name} {value}" for name, value in settings.items() if value is not None))
    if out is not None:
        record = {
            "model": network.origin,
            "judge": chosen.origin,
            "settings": settings,
            "judge_settings": chosen.settings,
            "files": [str(file) for file in files],
            "made_with": provenance(network.device),
            **result,
        }
        write_text(out, json.dumps(record, indent=2) + "\n")
        print(f"wrote {out}")


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


def _check_counts(**counts: int | None) -> None:
    """Raise ColadaError for a count that is out of bounds; None is none."""
    for name, value in counts.items():
        if value is not None:
            require_count(name, value)


def chosen_tasks(names: str | None) -> list[Task]:
    """Return the tasks that an option names, the eight by default.

    Raises:
        ColadaError: for an unknown task, or one that is there twice.
    """
    from colada.evaluate.tasks import THE_EIGHT, find_task

    wanted = list(THE_EIGHT) if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if wanted.count(name) > 1:
            raise ColadaError(f"--tasks {names}: {name!r} is there twice")
    return [find_task(name) for name in wanted]


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


def _files(files: list[Path], name: str | None) -> list[tuple[Task, Path]]:
    """Return files of outputs with their tasks; of directories, those whose name is a task's."""
    from colada.evaluate.tasks import TASKS, find_task

    found: list[tuple[Task, Path]] = []
    for path in files:
        if not path.is_dir():
            found.append((find_task(name) if name is not None else _task_of(path), path))
            continue
        names = [path / f"{task}{suffix}" for task in TASKS for suffix in (".jsonl", ".jsonl.gz")]
        there = [(_task_of(file), file) for file in names if file.is_file()]
        if not there:
            raise ColadaError(f"{path}: no <task>.jsonl or <task>.jsonl.gz in this directory")
        found += there
    if name is not None and len(found) > 1:
        raise ColadaError(f"--task {name} with {len(found)} files, expected one")
    for task, _ in found:
        twice = [str(other) for own, other in found if own is task]
        if len(twice) > 1:
            raise ColadaError(f"{' and '.join(twice)}: both are outputs of {task.name}, expected one of them")
    return found


def _task_of(path: Path) -> Task:
    """Return the task that a file's name begins with."""
    from colada.evaluate.tasks import find_task

    try:
        return find_task(path.name.partition(".")[0])
    except ColadaError as error:
        raise ColadaError(f"{path}: {error}; or give --task") from None
