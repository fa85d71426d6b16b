"""How fast the DiT trains (stage 2): against a naive reference, by noisy copies, and at the released size.

python benchmarks/training.py naive     the tokens/s of this package over those of a plain implementation
python benchmarks/training.py copies    1, 2 and 4 noisy copies that share one clean copy
python benchmarks/training.py sizes     tokens/s, MFU and peak memory of tiny, small and 2.3b

Each prints a table and, with --json FILE, writes what it measured. Variants take turns, step by step, so that
ratios are of one run and one machine state. MFU = useful FLOPs / (seconds * peak), the useful FLOPs of a
step as in colada.training.plan, which states the formulas.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from colada.config import DiTConfig, TextVAEConfig
from colada.data.rows import Batch
from colada.dit import ROPE_THETA, DiT, modulate
from colada.flow import T, TimestepLaw, calibrated_loc, interpolate, target_velocity
from colada.layers import inverse_frequencies, rotary_table, rotate_interleaved
from colada.objectives import FlowSettings, VAEWeights, draw_randomness, flow_errors, stage2_frozen_loss
from colada.packing import two_copy, two_copy_cells
from colada.training.parallel import compile_blocks, recompute
from colada.training.plan import Work, peak_flops, training_flops
from colada.vae import TextVAE

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Json = Annotated[Path | None, typer.Option("--json", help="Write the measurements here.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]

# The DiT of each size; the Text VAE beside it is the released one's shape at 2.3b.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {"txt_dim": 256, "emb_dim": 256, "heads": 4, "head_dim": 64, "rope_dim": 48, "num_layers": 6},
        {"dim": 128, "ffn_dim": 512, "num_heads": 4, "encoder_num_blocks": 2, "decoder_num_blocks": 2},
    ),
    "small": (
        {"txt_dim": 768, "emb_dim": 768, "heads": 12, "head_dim": 64, "rope_dim": 48, "num_layers": 12},
        {"dim": 512, "ffn_dim": 2048, "num_heads": 8, "encoder_num_blocks": 4, "decoder_num_blocks": 4},
    ),
    "2.3b": ({}, {}),
}


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
    positions = two_copy_cells(length, size)[0].to(z0.device).repeat(rows)
    table = rotary_table(positions, inverse_frequencies(config.rope_dim, ROPE_THETA))
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
        h = modulate(F.layer_norm(x, (config.txt_dim,), eps=config.norm_eps), shift, scale)
        x = x + block.ada.msa_out(emb) * attention(block, h)
        shift, scale = block.ada.mlp_in(emb).chunk(2, -1)
        h = modulate(F.layer_norm(x, (config.txt_dim,), eps=config.norm_eps), shift, scale)
        x = x + block.ada.mlp_out(emb) * block.mlp(h)
    shift, scale = dit.txt_out_ada["out_in"](emb).chunk(2, -1)
    output = dit.txt_out(modulate(dit.txt_out_norm(x), shift, scale)).view(rows, cells, width)
    return (output[:, history.shape[1] :] - target_velocity(z0, noise)).square().mean()


# --- measuring ---------------------------------------------------------------------------------


def open_gates(dit: DiT) -> DiT:
    """Give random values to what is initialised with zeros, so that gradients reach every parameter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in dit.parameters():
        if not bool(parameter.detach().any()):
            parameter.data.normal_(std=0.02, generator=generator)
    return dit


def take_turns(steps: dict[str, Callable[[], None]], repeats: int, warmup: int) -> dict[str, list[float]]:
    """Return the seconds of each variant's steps, which alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + repeats):
        for name, step in steps.items():
            synchronise()
            begin = time.perf_counter()
            step()
            synchronise()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, least and largest of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def hardware(device: str) -> dict[str, Any]:
    """Return what the figures depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def report(title: str, rows: Sequence[dict[str, Any]], target: Path | None, device: str) -> None:
    """Print rows as a table, and write them."""
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(
            *(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values())
        )
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in hardware(device).items()))
    if target is not None:
        target.write_text(json.dumps({"title": title, **hardware(device), "rows": list(rows)}, indent=2))


def training_step(dit: DiT, loss: Callable[[], Tensor], clip: float = 1.0) -> Callable[[], None]:
    """Return a whole optimiser step: loss, gradients, clipping, fused AdamW."""
    optimiser = torch.optim.AdamW(dit.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), clip)
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
    open_gates(ours).to(device)
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
    error = max(
        float((a.grad - b.grad).abs().max() / b.grad.abs().max())
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    )
    seconds = take_turns(
        {"naive": training_step(plain, plain_loss), "colada": training_step(ours, our_loss)}, repeats, warmup
    )
    ratios = [a / b for a, b in zip(seconds["naive"], seconds["colada"], strict=True)]
    rows = [
        {
            "variant": name,
            "tokens/s": batch * length / statistics.median(own),
            "s/step": spread(own)["median"],
            "least": min(own),
            "most": max(own),
        }
        for name, own in seconds.items()
    ]
    title = f"width {width}, {layers} layers, batch {batch}, length {length}, block {block}, float32"
    rows.append(
        {
            "variant": "ratio",
            "tokens/s": statistics.median(ratios),
            "s/step": math.nan,
            "least": min(ratios),
            "most": max(ratios),
        }
    )
    report(title, rows, target, device)
    print(f"largest relative difference of a parameter's gradient: {error:.1e}")
    if error > 1e-5:
        raise typer.Exit(1)


def _case(
    size: str, batch: int, length: int, copies: int, device: str, compiled: bool, recomputed: bool
) -> tuple[Callable[[], None], Work, TextVAEConfig, DiTConfig]:
    dit_keys, vae_keys = SIZES[size]
    latent = 16 if size == "2.3b" else 64
    vae_config = TextVAEConfig.from_dict(
        {"latent_dim": latent, "block_size": 16, "vocab_size": 100278 if size == "2.3b" else 8192, **vae_keys}
    )
    dit_config = DiTConfig.from_dict(
        {"txt_in_channels": latent, "txt_out_channels": latent, "block_size": 16, **dit_keys}
    )
    with torch.device(device):
        vae, dit = TextVAE(vae_config).requires_grad_(False), DiT(dit_config)
    vae.init_weights(torch.Generator(device).manual_seed(0))
    dit.init_weights(torch.Generator(device).manual_seed(0))
    if recomputed:
        recompute(dit)
    if compiled:
        compile_blocks(dit)
    weights = VAEWeights()
    settings = FlowSettings(TimestepLaw(calibrated_loc(latent)), copies=copies)
    generators = [torch.Generator().manual_seed(row) for row in range(batch)]
    draws = draw_randomness(generators, vae_config, length, weights, settings, masked=False)
    rows = Batch(torch.randint(0, 8000, (batch, length), generator=generators[0]))
    place = torch.device(device)

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return stage2_frozen_loss(vae, dit, rows.to(place), draws.to(place), weights, 0).total

    prefixes = min(1.0, settings.prefix_share * length / vae_config.block_tokens)
    work = Work(2, batch, length, copies, masked=False, prefixes=prefixes)
    return training_step(dit, loss), work, vae_config, dit_config


@app.command()
def copies(
    size: Annotated[str, typer.Option(help=", ".join(SIZES))] = "tiny",
    batch: int = 8,
    length: int = 128,
    repeats: int = 5,
    warmup: int = 1,
    device: Device = "cpu",
    compiled: Annotated[bool, typer.Option("--compile")] = False,
    target: Json = None,
) -> None:
    """Steps of the frozen stage 2 in bfloat16 with 1, 2 and 4 noisy copies: what each further one costs."""
    steps = {}
    for number in (1, 2, 4):
        steps[str(number)] = _case(size, batch, length, number, device, compiled, False)[0]
    seconds = take_turns(steps, repeats, warmup)
    alone = statistics.median(seconds["1"])
    rows = []
    for name, own in seconds.items():
        median = statistics.median(own)
        rows.append(
            {
                "noisy copies": name,
                "s/step": median,
                "least": min(own),
                "most": max(own),
                "noisy tokens/s": int(name) * batch * length / median,
                "ratio to 1": int(name) * alone / median,
            }
        )
    report(f"{size}: batch {batch}, length {length}, bfloat16", rows, target, device)


@app.command()
def sizes(
    which: Annotated[list[str] | None, typer.Option("--size", help=", ".join(SIZES))] = None,
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 8,
    length: int = 512,
    repeats: int = 5,
    warmup: int = 2,
    device: Device = "cpu",
    compiled: Annotated[bool, typer.Option("--compile")] = False,
    recomputed: Annotated[bool, typer.Option("--checkpoint-activations")] = False,
    target: Json = None,
) -> None:
    """Whole steps of the frozen stage 2 in bfloat16: text tokens/s, MFU and peak memory."""
    peak, origin = peak_flops(torch.device(device), torch.bfloat16)
    rows = []
    for size in which or list(SIZES):
        step, work, vae, dit = _case(size, batch, length, 1, device, compiled, recomputed)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        own = take_turns({size: step}, repeats, warmup)[size]
        median = statistics.median(own)
        used = (
            torch.cuda.max_memory_allocated()
            if device == "cuda"
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        rows.append(
            {
                "size": size,
                "tokens/s": batch * length / median,
                "s/step": median,
                "least": min(own),
                "most": max(own),
                "MFU": sum(training_flops(vae, dit, work).values()) / median / peak,
                "GB": used / 1e9,
            }
        )
        del step
    title = f"batch {batch}, length {length}, bfloat16; peak {peak / 1e12:.3g} TFLOP/s ({origin})"
    report(title, rows, target, device)


if __name__ == "__main__":
    app()
