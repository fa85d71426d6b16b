"""How fast training is: against a naive reference and other code, by noisy copies, and at the released size.

python -m benchmarks.training naive     the tokens/s of this package over those of a plain implementation
python -m benchmarks.training turns     compiled or not, by precision and block, against another checkout
python -m benchmarks.training copies    1, 2 and 4 noisy copies that share one clean copy
python -m benchmarks.training sizes     tokens/s, MFU and peak memory of tiny, small and 2.3b

Each prints a table and, with --json FILE, writes what it measured. Variants take turns, step by step, so that
ratios are of one run and one machine state. MFU = useful FLOPs / (seconds * peak), the useful FLOPs of a
step as in colada.train.plan, which states the formulas.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import machine_name
from benchmarks.step import CLIP, LR, Case, Elsewhere, Step, open_gates, peak_bytes, synchronise
from colada.flow import T, TimestepLaw, interpolate, target_velocity
from colada.networks.config import DiTConfig
from colada.networks.dit import ROPE_THETA, DiT
from colada.networks.layers import rotate_interleaved, rotations
from colada.networks.packing import two_copy, two_copy_cells
from colada.train.flow_matching import flow_errors
from colada.train.plan import peak_flops, training_flops
from colada.train.provenance import provenance

TOLERANCE = 1e-5  # Of gradients in float32, relative to the largest of a parameter's.

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Json = Annotated[Path | None, typer.Option("--json", help="Write the measurements here.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


# --- the naive reference -----------------------------------------------------------------------


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
    z_t = interpolate(z0, noise, timestep / T)
    x = torch.cat([history, z_t], 1).flatten(0, 1)
    times = torch.cat([timestep.new_zeros(history.shape[:2]), timestep], 1).flatten()
    cells = history.shape[1] + length
    row = torch.arange(rows, device=z0.device).repeat_interleave(cells)
    own = two_copy(length, size).to(z0.device).repeat(rows, rows)
    mask = own & (row[:, None] == row[None, :])
    positions = two_copy_cells(length, size).position.to(z0.device).repeat(rows)
    table = rotations(positions, config.rope_dim, config.head_dim, ROPE_THETA)
    x, emb = dit.txt_in(x), dit.emb_in(times)

    def attention(block: Any, h: Tensor) -> Tensor:
        q, k, v = block.msa.proj_qkv(h).unflatten(-1, (3, config.heads, -1)).unbind(1)
        q = rotate_interleaved(block.msa.norm_q(q), table)
        k = rotate_interleaved(block.msa.norm_k(k), table)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return block.msa.proj_out(out[0].transpose(0, 1).flatten(1))

    for block in dit.blocks:
        shift, scale = block.ada.msa_in(emb).chunk(2, -1)
        h = F.layer_norm(x, (config.txt_dim,), eps=config.norm_eps) * (1 + scale) + shift
        x = x + block.ada.msa_out(emb) * attention(block, h)
        shift, scale = block.ada.mlp_in(emb).chunk(2, -1)
        h = F.layer_norm(x, (config.txt_dim,), eps=config.norm_eps) * (1 + scale) + shift
        x = x + block.ada.mlp_out(emb) * block.mlp(h)
    shift, scale = dit.txt_out_ada["out_in"](emb).chunk(2, -1)
    output = dit.txt_out(dit.txt_out_norm(x) * (1 + scale) + shift).view(rows, cells, width)
    return (output[:, history.shape[1] :] - target_velocity(z0, noise)).square().mean()


# --- measuring ---------------------------------------------------------------------------------


def take_turns(
    steps: Mapping[str, Callable[[], None]], repeats: int, warmup: int, device: str
) -> dict[str, list[float]]:
    """Return the seconds of each variant's steps, which alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + repeats):
        for name, step in steps.items():
            synchronise(device)
            begin = time.perf_counter()
            step()
            synchronise(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, least and largest of some values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def hardware(device: str) -> dict[str, Any]:
    """Return what the figures depend on."""
    made_with = provenance(torch.device(device))
    return {**made_with, "device": machine_name(torch.device(device))}


def readable(value: Any) -> str:
    """Return a cell of a table: four digits, and the range of a spread below its median."""
    if isinstance(value, dict):
        return f"{value['median']:,.4g}\n{value['least']:,.4g}–{value['most']:,.4g}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def report(title: str, rows: Sequence[dict[str, Any]], target: Path | None, device: str) -> None:
    """Print rows as a table, and write them."""
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(readable, row.values()))
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in hardware(device).items()))
    if target is not None:
        target.write_text(json.dumps({"title": title, **hardware(device), "rows": list(rows)}, indent=2))


def speed(case: Case, seconds: Sequence[float], peak: float) -> dict[str, Any]:
    """Return tokens/s, the seconds of a step and MFU."""
    median = statistics.median(seconds)
    useful = sum(training_flops(*case.configs(), case.work()).values())
    return {"tokens/s": case.tokens / median, "s/step": spread(seconds), "MFU": useful / median / peak}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of a gradient, relative to the largest entry of that parameter's."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - own).abs().max() / own.abs().max()) for name, own in theirs.items())


def training_step(dit: DiT, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a whole optimiser step: loss, gradients, clipping, fused AdamW."""
    optimiser = torch.optim.AdamW(dit.parameters(), lr=LR, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), CLIP)
        optimiser.step()

    return step


# --- the commands ------------------------------------------------------------------------------


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
    target: Json = None,
) -> None:
    """Whole training steps of the DiT, float32, beside the naive reference; gradients are compared first."""
    torch.manual_seed(0)
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
    ours.init_weights(torch.Generator().manual_seed(0))
    open_gates(ours)
    ours.to(device)
    plain.load_state_dict(ours.state_dict())
    plain.to(device)
    shape = (batch, length, config.txt_in_channels)
    z0, noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
    blocks = TimestepLaw().sample((batch, length // block), torch.Generator().manual_seed(0))
    timestep = blocks.repeat_interleave(block, 1).to(device)

    def our_loss() -> Tensor:
        return flow_errors(ours, z0, noise[:, None], timestep[:, None]).mean()

    def plain_loss() -> Tensor:
        return naive_flow_loss(plain, z0, noise, timestep)

    our_loss().backward()
    plain_loss().backward()
    found = [{n: p.grad for n, p in dit.named_parameters() if p.grad is not None} for dit in (ours, plain)]
    error = largest_difference(*found)
    seconds = take_turns(
        {"naive": training_step(plain, plain_loss), "colada": training_step(ours, our_loss)},
        repeats,
        warmup,
        device,
    )
    ratios = [a / b for a, b in zip(seconds["naive"], seconds["colada"], strict=True)]
    rows = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(seconds["naive"], own, strict=True)]
        tokens = batch * length / statistics.median(own)
        rows.append({"variant": name, "tokens/s": tokens, "s/step": spread(own), "ratio": spread(ratios)})
    title = f"width {width}, {layers} layers, batch {batch}, length {length}, block {block}, float32"
    report(title, rows, target, device)
    print(f"largest relative difference of a parameter's gradient: {error:.1e}")
    if error > TOLERANCE:
        raise typer.Exit(1)


@app.command()
def copies(
    size: Annotated[str, typer.Option(help="tiny, small or 2.3b.")] = "tiny",
    batch: int = 8,
    length: int = 128,
    repeats: int = 5,
    warmup: int = 1,
    device: Device = "cpu",
    compiled: Annotated[bool, typer.Option("--compile")] = False,
    target: Json = None,
) -> None:
    """Steps of the frozen stage 2 in bfloat16 with 1, 2 and 4 noisy copies: what each further one costs."""
    base = Case(size, batch=batch, length=length, device=device, compiled=compiled)
    steps = {number: Step(dataclasses.replace(base, copies=number)) for number in (1, 2, 4)}
    seconds = take_turns({str(number): step for number, step in steps.items()}, repeats, warmup, device)
    alone = statistics.median(seconds["1"])
    rows = []
    for name, own in seconds.items():
        median = statistics.median(own)
        rows.append(
            {
                "noisy copies": name,
                "s/step": spread(own),
                "noisy tokens/s": int(name) * base.tokens / median,
                "ratio to 1": int(name) * alone / median,
            }
        )
    report(f"{size}: batch {batch}, length {length}, bfloat16", rows, target, device)


@app.command()
def sizes(
    which: Annotated[list[str] | None, typer.Option("--size", help="tiny, small, 2.3b; all.")] = None,
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 8,
    length: int = 512,
    stage: Annotated[int, typer.Option(min=1, max=2)] = 2,
    layers: Annotated[int | None, typer.Option(help="Of the DiT, in place of the size's.")] = None,
    repeats: int = 5,
    warmup: int = 2,
    device: Device = "cpu",
    compiled: Annotated[bool, typer.Option("--compile")] = False,
    recomputed: Annotated[bool, typer.Option("--checkpoint-activations")] = False,
    target: Json = None,
) -> None:
    """Whole steps in bfloat16: text tokens/s, MFU and peak memory."""
    peak, origin = peak_flops(torch.device(device), torch.bfloat16)
    rows = []
    for size in which or ["tiny", "small", "2.3b"]:
        case = Case(
            size, stage, batch=batch, length=length, device=device, layers=layers,
            compiled=compiled, recomputed=recomputed,
        )  # fmt: skip
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = Step(case)
        own = take_turns({size: step}, repeats, warmup, device)[size]
        rows.append({"size": size, **speed(case, own, peak), "GB": peak_bytes(device) / 1e9})
        del step
    title = f"stage {stage}, batch {batch}, length {length}, bfloat16; "
    report(title + f"peak {peak / 1e12:.3g} TFLOP/s ({origin})", rows, target, device)


@app.command()
def turns(
    against: Annotated[
        Path | None, typer.Option(help="Another checkout of this repository, to take turns with.")
    ] = None,
    size: Annotated[str, typer.Option(help="tiny (the size of recipes/tiny.yaml), small or 2.3b.")] = "tiny",
    stage: Annotated[int, typer.Option(min=1, max=2)] = 2,
    block: Annotated[list[int] | None, typer.Option(help="Latents in a block; 4 and 16.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="bfloat16, float32; both.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compiled variants too.")] = True,
    batch: int = 16,
    length: int = 128,
    layers: Annotated[int | None, typer.Option(help="Of the DiT, in place of the size's.")] = None,
    repeats: int = 9,
    warmup: int = 2,
    device: Device = "cpu",
    target: Json = None,
) -> None:
    """Whole steps, compiled and not, in turns; with --against also those of another checkout's code.

    Every variant is a process of its own that waits while the others compute. Ratios are to the other
    checkout, uncompiled (without one to this code, uncompiled), turn by turn; so are the differences of the
    gradients, which end the command with status 1 where they exceed 1e-5 in float32.
    """
    here, peaks, rows, apart = Path(__file__).resolve().parents[1], dict[str, float](), [], False
    for kind, width in itertools.product(precision or ["bfloat16", "float32"], block or [4, 16]):
        case = Case(size, stage, width, batch, length, precision=kind, device=device, layers=layers)
        who = {"before": (case, against)} if against is not None else {}
        who["now"] = (case, here)
        if compiled:
            tuned = dataclasses.replace(case, compiled=True)
            who |= {"now, compiled": (tuned, here)}
            if against is not None:
                who["before, compiled"] = (tuned, against)
        processes = {name: Elsewhere(own, Path(where or here)) for name, (own, where) in who.items()}
        base = next(iter(processes))
        with tempfile.TemporaryDirectory() as directory:
            found = {
                name: torch.load(process.ask(f"gradients {Path(directory) / str(number)}"))
                for number, (name, process) in enumerate(processes.items())
            }
        seconds: dict[str, list[float]] = {name: [] for name in processes}
        for number in range(warmup + repeats):
            for name, process in processes.items():
                taken = process.seconds()
                if number >= warmup:
                    seconds[name].append(taken)
        memory = {name: process.ask("peak") for name, process in processes.items()}
        for process in processes.values():
            process.close()
        if kind not in peaks:
            peaks[kind] = peak_flops(torch.device(device), getattr(torch, kind))[0]
        for name, own in seconds.items():
            ratios = [then / now for then, now in zip(seconds[base], own, strict=True)]
            error = largest_difference(found[name], found[base])
            apart |= kind == "float32" and error > TOLERANCE
            rows.append(
                {
                    "variant": f"{kind}, block {width}, {name}",
                    **speed(who[name][0], own, peaks[kind]),
                    "ratio": spread(ratios),
                    "gradients": error,
                    "GB": memory[name] / 1e9,
                }
            )
    other = "" if against is None else f"; before: {commit(against)}"
    title = f"{size}, stage {stage}, batch {batch}, length {length}, {repeats} turns{other}"
    report(title, rows, target, device)
    if apart:
        raise typer.Exit(1)


def commit(checkout: Path) -> str:
    """Return the commit of a checkout, with "+" where its source differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "src") else "")


if __name__ == "__main__":
    app()
