"""How fast generation is, and what levers cost: ``python -m benchmarks.generation speed`` and ``levers``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from colada.checks import MOST_TOKENS, require_count
from colada.cli.main import Commands, run
from colada.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    QuantiseOption,
    RevisionOption,
    load_cola,
)
from colada.errors import ColadaError, nearest
from colada.generate.settings import check_settings

if TYPE_CHECKING:
    from benchmarks.generation.contestants import Contestant
    from colada.models.cola import ColaDLM

bench_app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

MOST_TURNS = 10_000
"""Turns of a contestant, and prompts or requests of a measurement."""
OPPONENTS = ("plain", "reference", "ar")


@bench_app.callback()
def bench() -> None:
    """Measure speed against the machine's limits and against opponents."""


@bench_app.command("speed")
def generate(
    model: ModelOption = None,
    revision: RevisionOption = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In place of --model: random weights; tiny, small or 2.3b."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Of the DiT, in place of the size's (tiny if none is named).")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the DiT, likewise.")] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Latents in a block of random weights. Default: 16.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Samples generated together.")] = "1,8",
    context: Annotated[str, typer.Option(metavar="N,...", help="Tokens of the prompts.")] = "128",
    steps: Annotated[str, typer.Option(metavar="N,...", help="Solver steps per block.")] = "16",
    guidance: Annotated[float, typer.Option("--guidance", "-g", help="Guidance scale; 1 is off.")] = 7.0,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", "-n", min=1, help="Generated for each prompt.")
    ] = 64,
    opponents: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="plain: straightforward PyTorch; reference: this package's readable loop; ar: a decoder of"
            " equal size; or none.",
        ),
    ] = "plain,reference,ar",
    mixed: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Serve so many requests of mixed lengths too, with --batch slots."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each contestant that count.")] = 5,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="Turns that come before.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, prompts and noise.")] = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    quantise: QuantiseOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the tokens per second: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Measure generation: tokens/s, time to the first block, latency per block, against limit and opponents.

    Contestants take turns, and each point of the sweep batch x context x steps gives medians and ranges.
    """
    require_count("new_tokens", new_tokens, MOST_TOKENS)
    check_settings({"guidance": guidance, "seed": seed})
    _check_turns(repeats=repeats, warm_up=warm_up or None, mixed=mixed)

    from rich.console import Console

    from benchmarks.generation.machine import measure_rates
    from benchmarks.generation.mixed import engine_serve, measure_mixed, mixed_requests
    from benchmarks.generation.report import (
        Setting,
        check_plot,
        print_cell,
        print_memory,
        print_mixed,
        print_setting,
        to_dict,
        write_plot,
    )
    from benchmarks.generation.run import measure_cell, sweep

    batches, lengths = _numbers("--batch", batch, 1), _numbers("--context", context, 0)
    jobs = list(sweep(batches, lengths, _numbers("--steps", steps, 1), new_tokens, guidance != 1))
    names = _opponents(opponents)
    if plot is not None:
        check_plot(plot)
    random = {"--size": size, "--layers": layers, "--width": width, "--block-size": block_size}
    given = [name for name, value in random.items() if value is not None]
    for name, value in (("--model", model), ("--revision", revision)):
        if value is not None and given:
            raise ColadaError(f"{name} {value} and {given[0]} {random[given[0]]}, expected one of them")
    if given:
        network = _random_model(size or "tiny", block_size or 16, layers, width, dtype, device, seed)
    else:
        network = load_cola(model, revision, dtype, device)
    if quantise is not None:
        network.quantise(quantise)
    contestants = _contestants(network, names, guidance, seed)
    console = Console(highlight=False, quiet=as_json)
    config, weight = network.dit.config, network.dit.txt_in.proj.weight
    # Conditional and unconditional rows share a pass.
    rows = [2 * count * config.block_size // config.patch_size for count in batches]
    rates = measure_rates(network.device, weight.dtype, rows, config.txt_dim)
    setting = Setting.of(network, rates, guidance=guidance, seed=seed, repeats=repeats, warm_up=warm_up)
    print_setting(setting, console)
    cells, served = [], []
    for job in jobs:
        cells.append(
            measure_cell(network, contestants, job, rates, repeats=repeats, warm_up=warm_up, seed=seed)
        )
        print_cell(cells[-1], console)
        if mixed is not None:
            vocab = network.vae.config.vocab_size
            served.append(
                measure_mixed(
                    engine_serve(network, job.steps, guidance, seed),
                    mixed_requests(mixed, job.context, new_tokens, vocab, seed),
                    job.batch,
                    network.device,
                    vocab_size=vocab,
                    repeats=repeats,
                    warm_up=warm_up,
                    seed=seed,
                )
            )
            print_mixed(served[-1], console)
    print_memory(network.device, console)
    if as_json:
        print(json.dumps(to_dict(setting, cells, served), indent=2))
    if plot is not None:
        write_plot(plot, setting, cells)
        if not as_json:
            print(f"wrote {plot}")


@bench_app.command("levers")
def levers(
    model: ModelOption = None,
    revision: RevisionOption = None,
    prompts: Annotated[int, typer.Option(min=2, help="Texts that the model begins by itself.")] = 256,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each lever that count.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and noise.")] = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Price the levers that change the result: solver, grid, steps, guidance's interval, bfloat16, int8.

    Each generates the block after the same prompts from the same noise; the flow in 256 steps is exact.
    """
    check_settings({"seed": seed})
    require_count("context", context, MOST_TOKENS)
    _check_turns(repeats=repeats, prompts=prompts)

    import dataclasses
    import importlib.util

    from rich.console import Console

    from benchmarks.generation.levers import levers as all_levers
    from benchmarks.generation.levers import measure_levers
    from benchmarks.generation.machine import machine_name
    from benchmarks.generation.report import print_levers
    from colada.device import find_device
    from colada.train.provenance import provenance

    def make() -> ColaDLM:
        return load_cola(model, revision, dtype, device)

    chosen = all_levers(importlib.util.find_spec("torchao") is not None)
    prices = measure_levers(make, chosen, count=prompts, context=context, repeats=repeats, seed=seed)
    place = find_device(device)
    if as_json:
        made = {"made_with": provenance(place), "machine": machine_name(place), "seed": seed}
        made |= {"prompts": prompts, "context": context, "model": model or "bundled"}
        print(json.dumps({**made, "levers": [dataclasses.asdict(price) for price in prices]}, indent=2))
    else:
        console = Console(highlight=False)
        console.print(f"{machine_name(place)}, {prompts} prompts of {context} tokens, seed {seed}")
        print_levers(prices, console)


def _check_turns(**counts: int | None) -> None:
    """Raise ColadaError for more turns or prompts than anybody waits for; None is none."""
    for name, value in counts.items():
        if value is not None:
            require_count(name, value, MOST_TURNS)


def _numbers(option: str, text: str, least: int) -> list[int]:
    """Return whole numbers of at least ``least`` and fewer than ten digits, separated by commas."""
    numbers = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", part) or int(part) < least:
            expected = f"whole numbers of at least {least} and at most 999,999,999"
            raise ColadaError(f"{option} {text[:60]}: {part[:60]!r}, expected {expected}")
        numbers.append(int(part))
    return numbers


def _opponents(text: str) -> list[str]:
    if text == "none":
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in OPPONENTS:
            known = [*OPPONENTS, "none"]
            raise ColadaError(
                f"--opponents {text}: {name!r}, expected some of {', '.join(known)}{nearest(name, known)}"
            )
        if names.count(name) > 1:
            raise ColadaError(f"--opponents {text}: {name!r} is there twice")
    return names


def _random_model(
    size: str,
    block_size: int,
    layers: int | None,
    width: int | None,
    dtype: str | None,
    device: str,
    seed: int,
) -> ColaDLM:
    import torch

    from benchmarks.generation.models import random_model, size_configs
    from colada.device import find_device
    from colada.flow import choose

    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    wanted = choose("dtype", dtype or "float32", dtypes)
    vae, dit = size_configs(size, block_size, layers, width)
    return random_model(vae, dit, find_device(device), wanted, seed)


def _contestants(
    model: ColaDLM, opponents: Sequence[str], guidance: float, seed: int
) -> dict[str, Contestant]:
    """Return who takes part, in the order of their turns."""
    from benchmarks.generation import ar, contestants

    makers: dict[str, Callable[[ColaDLM, float, int], Contestant]] = {
        "engine": contestants.engine,
        "plain": contestants.plain,
        "reference": contestants.reference,
        "ar": ar.ar,
    }
    return {name: makers[name](model, guidance, seed) for name in [contestants.ENGINE, *opponents]}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run(bench_app, args, "python -m benchmarks.generation")


if __name__ == "__main__":
    sys.exit(main())
