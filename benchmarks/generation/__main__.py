"""How fast generation is, and what levers cost: ``python -m benchmarks.generation speed`` and ``levers``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.options import JsonOption
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
from colada.errors import ColadaError
from colada.generate.settings import check_settings

if TYPE_CHECKING:
    from colada.models.cola import ColaDLM

bench_app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

MOST_TURNS = 10_000
"""Turns of a peer, and prompts or requests of a measurement."""


@bench_app.callback()
def bench() -> None:
    """Measure generation against the machine's limits and against peers."""


@bench_app.command("speed")
def speed(
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
    peers: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="readable: this package's readable loop; ar: its AR decoder of equal size; transformers,"
            " ctranslate2, onnxruntime-genai: the same decoder there (benchmarks/requirements.txt); or none.",
        ),
    ] = "readable,ar",
    distilled: Annotated[
        str | None,
        typer.Option(metavar="WHERE", help="A model distilled from it, as a row in its own steps."),
    ] = None,
    mixed: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Serve so many requests of mixed lengths too, with --batch slots."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each peer that count.")] = 5,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="Turns that come before.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, prompts and noise.")] = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    quantise: QuantiseOption = None,
    json: JsonOption = None,
) -> None:
    """Measure generation: tokens/s, time to the first block, latency per block, against limit and peers.

    Peers take turns, and each point of the sweep batch x context x steps gives medians and ranges.
    """
    require_count("new_tokens", new_tokens, MOST_TOKENS)
    check_settings({"guidance": guidance, "seed": seed})
    _check_turns(repeats=repeats, warm_up=warm_up or None, mixed=mixed)
    batches, lengths = _numbers("--batch", batch, 1), _numbers("--context", context, 0)
    grids = _numbers("--steps", steps, 1)
    random = {"--size": size, "--layers": layers, "--width": width, "--block-size": block_size}
    named = [name for name, value in random.items() if value is not None]
    for name, value in (("--model", model), ("--revision", revision)):
        if value is not None and named:
            raise ColadaError(f"{name} {value} and {named[0]} {random[named[0]]}, expected one of them")

    from rich.console import Console

    from benchmarks import machine, measure
    from benchmarks.generation.apart import Apart
    from benchmarks.generation.peers import check_peers, make_peers
    from benchmarks.generation.run import engine_serve, measure_cell, measure_mixed, mixed_requests, sweep
    from colada.generate.engine.engine import cache_bytes
    from colada.train.cost import parameter_counts, scaled

    names = check_peers(peers)
    if named:
        network = _random_model(size or "tiny", block_size or 16, layers, width, dtype, device, seed)
    else:
        network = load_cola(model, revision, dtype, device)
    if quantise is not None:
        network.quantise(quantise)
    rivals = make_peers(network, names, guidance, seed, distilled)
    vae, dit, weight = network.vae.config, network.dit.config, network.dit.txt_in.proj.weight
    # Conditional and unconditional rows share a pass.
    rows = [2 * count * dit.block_size // dit.patch_size for count in batches]
    rates = machine.measure_rates(network.device, weight.dtype, rows, dit.txt_dim)
    kind = str(weight.dtype).removeprefix("torch.")
    parameters = parameter_counts(vae, dit)
    latent_bytes = cache_bytes(network.vae, network.dit, 1)

    console = Console(highlight=False)
    console.print(f"{machine.machine_name(network.device)}, {kind}, seed {seed}\n{network.origin}")
    sizes = ", ".join(f"{name} {scaled(count)}" for name, count in parameters.items())
    console.print(f"{sizes}; KV cache {scaled(latent_bytes, 'B')} a latent")
    console.print(
        f"measured: copies {rates.bandwidth / 1e9:,.1f} GB/s, products {scaled(rates.matmul, 'FLOP')}/s"
    )
    cells, served, left_out = [], [], ("batch", "context", "steps", "% products")
    turns = {"repeats": repeats, "warm_up": warm_up, "seed": seed}
    for job in sweep(batches, lengths, grids, new_tokens, guidance != 1):
        cells.append(measure_cell(network, rivals, job, rates, **turns))
        shown = [
            {name: value for name, value in row.items() if name not in left_out} for row in cells[-1].rows()
        ]
        measure.show(f"batch {job.batch}, context {job.context}, {job.steps} steps", shown, console)
        for name in cells[-1].out_of_memory:
            console.print(f"{name}: out of memory")
        if mixed is not None:
            requests = mixed_requests(mixed, job, vae.vocab_size, seed)
            serve = engine_serve(network, job.steps, guidance, seed)
            vocab = vae.vocab_size
            served.append(
                measure_mixed(serve, requests, job.batch, network.device, vocab_size=vocab, **turns)
            )
            measure.show(f"{mixed} mixed requests, {job.batch} at once", served[-1:], console)
    for rival in rivals.values():
        if isinstance(rival, Apart):
            rival.close()
    if network.device.type == "cpu":
        peak = measure.peak_bytes(network.device)
        console.print(f"\npeak resident memory {scaled(peak, 'B')}, of the whole run")
    if json is not None:
        measure.write_record(
            json,
            f"{network.origin}, {kind}",
            network.device,
            [row for cell in cells for row in cell.rows()],
            settings={"guidance": guidance, "new_tokens": new_tokens, "dtype": kind, **turns},
            parameters=parameters,
            cache_bytes=latent_bytes,
            rates=rates,
            peak_bytes=measure.peak_bytes(network.device),
            cells=cells,
            mixed=served,
        )


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
    json: JsonOption = None,
) -> None:
    """Price the levers that change the result: solver, grid, steps, guidance's interval, bfloat16, int8.

    Each generates the block after the same prompts from the same noise; the flow in 256 steps is exact.
    """
    check_settings({"seed": seed})
    require_count("context", context, MOST_TOKENS)
    _check_turns(repeats=repeats, prompts=prompts)

    import importlib.util

    from rich.console import Console

    from benchmarks.generation.levers import levers as all_levers
    from benchmarks.generation.levers import measure_levers
    from benchmarks.measure import show, write_record
    from colada.device import find_device

    def make() -> ColaDLM:
        return load_cola(model, revision, dtype, device)

    chosen = all_levers(importlib.util.find_spec("torchao") is not None)
    rows = measure_levers(make, chosen, count=prompts, context=context, repeats=repeats, seed=seed)
    title = f"{model or 'bundled'}: {prompts} prompts of {context} tokens, seed {seed}"
    show(title, rows, Console(highlight=False))
    if json is not None:
        write_record(json, title, find_device(device), rows)


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

    from benchmarks.models import random_model, size_configs
    from colada.checks import choose
    from colada.device import find_device

    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    wanted = choose("dtype", dtype or "float32", dtypes)
    vae, dit = size_configs(size, block_size, layers, width)
    return random_model(vae, dit, find_device(device), wanted, seed)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run(bench_app, args, "python -m benchmarks.generation")


if __name__ == "__main__":
    sys.exit(main())
