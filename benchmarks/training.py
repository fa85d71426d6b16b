"""How fast training is: beside a naive reference, and by size, noisy copies, precision, compilation and code.

python -m benchmarks.training naive     whole steps of the DiT beside those of a plain implementation
python -m benchmarks.training steps     whole steps of a stage: tokens/s, MFU, memory; variants in turns

Each prints a table and, with --json FILE, writes what it measured (``python -m benchmarks.table`` reads it).
Variants take turns, step by step, so that ratios are of one run and one state of the machine. MFU = useful
FLOPs / (seconds * peak), the useful FLOPs of a step as ``colada train --dry-run`` counts them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.measure import Row, Spread, ratios, seconds_of, show, take_turns, write_record
from benchmarks.models import open_gates
from benchmarks.options import JsonOption
from benchmarks.step import CLIP, LR, Case, StepProcess
from colada.checks import choose
from colada.cli.main import run
from colada.device import find_device
from colada.errors import ColadaError
from colada.flow import T, TimestepLaw, interpolate, target_velocity
from colada.networks.config import DiTConfig
from colada.networks.dit import ROPE_THETA, DiT, DiTBlock
from colada.networks.layers import rotate_interleaved, rotations
from colada.networks.packing import two_copy, two_copy_cells
from colada.train.cost import training_flops
from colada.train.flow_matching import flow_errors
from colada.train.peak import peak_flops

TOLERANCE = 1e-5  # Of gradients in float32, relative to the largest of a parameter's.
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COMPILED = {"no": False, "yes": True}
ROOT = Path(__file__).resolve().parents[1]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


# --- the naive reference -------------------------------------------------------------------------


def naive_flow_loss(dit: DiT, z0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """L_FM the plain way: one dense mask over the packed batch, AdaLN computed at every position.

    Args:
        z0, noise: (B, M, C).
        timestep: (B, M).
    """
    config = dit.config
    rows, length, width = z0.shape
    size = config.block_size
    history = z0[:, : length - size]
    x = torch.cat([history, interpolate(z0, noise, timestep / T)], 1).flatten(0, 1)
    times = torch.cat([timestep.new_zeros(history.shape[:2]), timestep], 1).flatten()
    cells = history.shape[1] + length
    row = torch.arange(rows, device=z0.device).repeat_interleave(cells)
    mask = two_copy(length, size).to(z0.device).repeat(rows, rows) & (row[:, None] == row[None, :])
    positions = two_copy_cells(length, size)[0].to(z0.device).repeat(rows)
    table = rotations(positions, config.rope_dim, config.head_dim, ROPE_THETA)
    x, emb = dit.txt_in(x), dit.emb_in(times)

    def attention(block: DiTBlock, h: Tensor) -> Tensor:
        q, k, v = block.msa.proj_qkv(h).unflatten(-1, (3, config.heads, -1)).unbind(1)
        q = rotate_interleaved(block.msa.norm_q(q), table)
        k = rotate_interleaved(block.msa.norm_k(k), table)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return block.msa.proj_out(out[0].transpose(0, 1).flatten(1))

    def modulated(x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, -1)
        return x * (1 + scale) + shift

    for block in dit.blocks:
        assert isinstance(block, DiTBlock)
        h = F.layer_norm(x, (config.txt_dim,), eps=config.norm_eps)
        x = x + block.ada.msa_out(emb) * attention(block, modulated(h, block.ada.msa_in(emb)))
        h = F.layer_norm(x, (config.txt_dim,), eps=config.norm_eps)
        x = x + block.ada.mlp_out(emb) * block.mlp(modulated(h, block.ada.mlp_in(emb)))
    output = dit.txt_out(modulated(dit.txt_out_norm(x), dit.txt_out_ada["out_in"](emb)))
    output = output.view(rows, cells, width)[:, history.shape[1] :]
    return (output - target_velocity(z0, noise)).square().mean()


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of a gradient, relative to the largest entry of that parameter's."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - other).abs().max() / other.abs().max()) for name, other in theirs.items())


def report(title: str, rows: list[Row], target: Path | None, device: str) -> None:
    """Print rows as a table, and write them."""
    show(title, rows, Console(highlight=False))
    if target is not None:
        write_record(target, title, torch.device(device), rows)


@app.command()
def naive(
    width: Annotated[int, typer.Option(help="txt_dim.")] = 256,
    layers: int = 4,
    batch: int = 16,
    length: int = 128,
    block: int = 16,
    repeats: int = 7,
    warmup: int = 2,
    device: Device = "cpu",
    target: JsonOption = None,
) -> None:
    """Whole training steps of the DiT, float32, beside the naive reference; gradients are compared first."""
    if width < 64 or width % 64:
        raise ColadaError(f"width={width}, expected a multiple of 64, which is a head's")
    config = DiTConfig(
        txt_dim=width,
        emb_dim=width,
        heads=width // 64,
        head_dim=64,
        rope_dim=48,
        num_layers=layers,
        block_size=block,
    )
    ours, plain = DiT(config), DiT(config)
    generator = torch.Generator().manual_seed(0)
    ours.init_weights(generator)
    open_gates(ours, generator)
    plain.load_state_dict(ours.state_dict())
    z0, noise = torch.randn(2, batch, length, config.txt_in_channels, generator=generator).to(device)
    blocks = TimestepLaw().sample((batch, length // block), generator)
    timestep = blocks.repeat_interleave(block, 1).to(device)
    losses: dict[str, Callable[[], Tensor]] = {
        "naive": lambda: naive_flow_loss(plain, z0, noise, timestep),
        "colada": lambda: flow_errors(ours, z0, noise[:, None], timestep[:, None]).mean(),
    }
    gradients, steps = [], {}
    for (name, loss), dit in zip(losses.items(), (plain.to(device), ours.to(device)), strict=True):
        loss().backward()
        gradients.append({n: p.grad for n, p in dit.named_parameters() if p.grad is not None})
        optimiser = torch.optim.AdamW(dit.parameters(), lr=LR, fused=True)

        def step(
            dit: DiT = dit, loss: Callable[[], Tensor] = loss, optimiser: torch.optim.Optimizer = optimiser
        ) -> None:
            optimiser.zero_grad(set_to_none=True)
            loss().backward()
            torch.nn.utils.clip_grad_norm_(dit.parameters(), CLIP)
            optimiser.step()

        steps[name] = partial(seconds_of, step, torch.device(device))
    error = largest_difference(gradients[1], gradients[0])
    seconds = take_turns(steps, repeats, warmup)
    rows: list[Row] = [
        {
            "variant": name,
            "tokens/s": batch * length / statistics.median(turns),
            "s/step": Spread.of(turns),
            "ratio": ratios(seconds["naive"], turns),
        }
        for name, turns in seconds.items()
    ]
    report(
        f"width {width}, {layers} layers, batch {batch}, length {length}, block {block}, float32",
        rows,
        target,
        device,
    )
    print(f"largest relative difference of a parameter's gradient: {error:.1e}")
    if error > TOLERANCE:
        raise typer.Exit(1)


# --- steps of a stage ----------------------------------------------------------------------------


@app.command()
def steps(
    sizes: Annotated[list[str], typer.Option("--size", help="tiny, small or 2.3b.")] = ["tiny"],  # noqa: B006
    blocks: Annotated[list[int], typer.Option("--block", help="Latents in a block.")] = [16],  # noqa: B006
    copies: Annotated[list[int], typer.Option(help="Noisy copies beside one clean copy.")] = [1],  # noqa: B006
    precisions: Annotated[list[str], typer.Option("--precision", help="bfloat16 or float32.")] = ["bfloat16"],  # noqa: B006
    compiled: Annotated[list[str], typer.Option("--compile", help="no or yes.")] = ["no"],  # noqa: B006
    against: Annotated[
        Path | None, typer.Option(help="Another checkout of this repository, whose code takes turns too.")
    ] = None,
    stage: Annotated[int, typer.Option(min=1, max=2)] = 2,
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    layers: Annotated[int | None, typer.Option(help="Of the DiT, in place of the size's.")] = None,
    recomputed: Annotated[bool, typer.Option("--checkpoint-activations")] = False,
    repeats: int = 5,
    warmup: int = 2,
    device: Device = "cpu",
    target: JsonOption = None,
) -> None:
    """Whole optimiser steps: text tokens/s, MFU and peak memory. Options given twice make variants.

    Every variant is a process of its own that waits while the others compute. "noisy tokens/s" counts each
    noisy copy, "ratio" is to the first variant's, turn by turn. "gradients" compares with the first variant
    that computes the same; the command ends with status 1 where they differ by more than 1e-5 in float32.
    """
    if against is not None and not (against / "benchmarks/step.py").is_file():
        raise ColadaError(
            f"--against {against}: no benchmarks/step.py, expected a checkout of this repository"
        )
    checkouts = {"before": against, "now": ROOT} if against else {"now": ROOT}
    axes: list[list[Any]] = [sizes, blocks, copies, precisions, compiled, list(checkouts)]
    cases, useful, where = dict[str, Case](), dict[str, float](), dict[str, Path]()
    for size, block, count, kind, tuned, code in product(*axes):
        case = Case(
            size,
            stage,
            block,
            batch,
            length,
            count,
            kind,
            choose("compile", tuned, COMPILED),
            recomputed,
            device,
            layers,
        )
        words = (size, f"block {block}", f"copies {count}", kind, f"compiled: {tuned}", code)
        varying = [word for word, axis in zip(words, axes, strict=True) if len(axis) > 1]
        name = ", ".join(varying) or size
        cases[name], where[name] = case, checkouts[code]
        useful[name] = sum(training_flops(*case.configs(), case.work()).values())
    types = {kind: choose("precision", kind, PRECISIONS) for kind in precisions}
    peaks = {kind: peak_flops(find_device(device), dtype)[0] for kind, dtype in types.items()}
    processes = {name: StepProcess(case, where[name]) for name, case in cases.items()}
    errors = _gradient_errors(cases, processes)
    seconds = take_turns({name: process.seconds for name, process in processes.items()}, repeats, warmup)
    memory = {name: float(process.ask("peak")) for name, process in processes.items()}
    for process in processes.values():
        process.close()
    first = next(iter(cases))
    rows: list[Row] = []
    for name, case in cases.items():
        turns = seconds[name]
        median = statistics.median(turns)
        share = case.copies / cases[first].copies
        rows.append(
            {
                "variant": name,
                "tokens/s": case.tokens / median,
                "s/step": Spread.of(turns),
                "% MFU": 100 * useful[name] / median / peaks[case.precision],
                "noisy tokens/s": case.copies * case.tokens / median if len(copies) > 1 else None,
                "ratio": ratios([share * then for then in seconds[first]], turns) if len(cases) > 1 else None,
                "gradients": errors.get(name),
                "GB": memory[name] / 1e9,
            }
        )
    title = f"stage {stage}, batch {batch}, length {length}, {repeats} turns"
    report(f"{sizes[0]}, {title}" if len(sizes) == 1 else title, rows, target, device)
    if any(error > TOLERANCE for name, error in errors.items() if cases[name].precision == "float32"):
        raise typer.Exit(1)


def _gradient_errors(cases: dict[str, Case], processes: dict[str, StepProcess]) -> dict[str, float]:
    """Return how far each variant's gradients are from those of the first that computes the same."""
    errors, firsts = {}, dict[tuple[Any, ...], str]()
    with tempfile.TemporaryDirectory() as directory:

        def gradients(name: str) -> dict[str, Tensor]:
            loaded: dict[str, Tensor] = torch.load(processes[name].ask(f"gradients {directory}/gradients"))
            return loaded

        for name, case in cases.items():
            first = firsts.setdefault((case.size, case.block, case.copies, case.precision), name)
            if first != name:
                errors[name] = largest_difference(gradients(name), gradients(first))
    return errors


if __name__ == "__main__":
    sys.exit(run(app, None, "python -m benchmarks.training"))
