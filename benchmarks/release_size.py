"""Build the 2.3B configuration with random weights, and measure loading and one generated block on a CPU.

python -m benchmarks.release_size DIR [--dtype bfloat16] writes a checkpoint of the
released size to DIR (4.7 GB in bfloat16, 9.3 GB in float32) unless one is there,
then, in a fresh process each, loads it and generates one block from it. Prints one JSON
line: parameters, bytes of the weights, peak resident memory, seconds.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from colada import ColaDLM, DiT, DiTConfig, TextVAE, TextVAEConfig, load
from colada.networks.dit import ROPE_THETA
from colada.networks.layers import inverse_frequencies

app = typer.Typer()
PROMPT = list(range(1000, 1020))


def peak_bytes() -> int:
    """Return the peak resident memory of this process, mapped file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_model(dtype: torch.dtype) -> ColaDLM:
    """Return the released configuration with cheap random weights, made in the given type."""
    with torch.device("meta"):
        vae = TextVAE(TextVAEConfig(block_size=16, pad_token_id=100277))
        dit = DiT(DiTConfig(block_size=16))
    for network in (vae, dit):
        network.to(dtype).to_empty(device="cpu")
        for parameter in network.parameters():
            parameter.data.uniform_(-0.02, 0.02)
    for buffer in dit.buffers():
        buffer.copy_(inverse_frequencies(dit.config.rope_dim, ROPE_THETA))
    return ColaDLM(vae, dit)


@app.command()
def measure(directory: Path, what: str, dtype: str) -> None:
    """Load the checkpoint, touch every weight or generate a block, and print what it took."""
    started = time.perf_counter()
    model = load(directory, dtype=getattr(torch, dtype))
    loaded, after_load = time.perf_counter() - started, peak_bytes()
    started = time.perf_counter()
    networks = (model.vae, model.dit)
    size = sum(t.numel() * t.element_size() for net in networks for t in net.state_dict().values())
    count = sum(p.numel() for net in networks for p in net.parameters())
    if what == "touch":
        _ = sum(
            float(t.flatten()[::512].float().sum()) for net in networks for t in net.state_dict().values()
        )
    else:
        model.generate([PROMPT], 12, guidance=7.0, steps=16)
    line = {"what": what, "dtype": dtype, "parameters": count, "weight_bytes": size}
    line |= {"peak_after_load": after_load, "peak": peak_bytes(), "peak_over_weights": peak_bytes() / size}
    line |= {"load_s": loaded, "work_s": time.perf_counter() - started}
    print(json.dumps(line))


@app.command()
def run(
    directory: Path,
    dtype: Annotated[str, typer.Option(help="Type of the stored weights.")] = "bfloat16",
    load_as: Annotated[str, typer.Option(help="Type to load and compute in.")] = "bfloat16",
) -> None:
    """Write the checkpoint if need be, then measure."""
    if not directory.is_dir():
        random_model(getattr(torch, dtype)).save(directory)
    for what in ("touch", "generate"):
        command = [sys.executable, "-m", "benchmarks.release_size", "measure", str(directory), what, load_as]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    app()
