"""Build the 2.3B configuration with random weights, and measure loading and one generated block on a CPU.

python -m benchmarks.release_size DIR [--dtype bfloat16] writes a checkpoint of the released size to DIR
(4.7 GB in bfloat16, 9.3 GB in float32) unless one is there. Then a fresh process loads it and touches every
weight, and another generates one block; each prints a line of JSON: weights, peak resident memory, seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measure import peak_bytes
from benchmarks.models import random_model, size_configs
from colada.models.load import load_cola

CPU = torch.device("cpu")
PROMPT = list(range(1000, 1020))


def measure(directory: Path, what: str, dtype: str) -> None:
    """Load the checkpoint, touch every weight or generate a block, and print what it took."""
    started = time.perf_counter()
    model = load_cola(directory, dtype=getattr(torch, dtype))
    loaded, after_load = time.perf_counter() - started, peak_bytes(CPU)
    started = time.perf_counter()
    tensors = [*model.vae.state_dict().values(), *model.dit.state_dict().values()]
    if what == "touch":
        _ = sum(float(tensor.flatten()[::512].float().sum()) for tensor in tensors)
    else:
        model.generate([PROMPT], 12, guidance=7.0, steps=16)
    size = sum(tensor.nbytes for tensor in tensors)
    line = {"what": what, "dtype": dtype, "weight_bytes": size, "peak_after_load": after_load}
    line |= {"peak": peak_bytes(CPU), "peak_over_weights": peak_bytes(CPU) / size}
    print(json.dumps({**line, "load_s": loaded, "work_s": time.perf_counter() - started}), flush=True)


def main(
    directory: Path,
    dtype: Annotated[str, typer.Option(help="Type of the stored weights.")] = "bfloat16",
    load_as: Annotated[str, typer.Option(help="Type to load and compute in.")] = "bfloat16",
    what: Annotated[str | None, typer.Option(help="Only this, in this process: touch or generate.")] = None,
) -> None:
    """Write the checkpoint if need be, then measure."""
    if what is not None:
        return measure(directory, what, load_as)
    if not directory.is_dir():
        random_model(*size_configs("2.3b"), CPU, getattr(torch, dtype), 0).save(directory)
    for step in ("touch", "generate"):
        command = [sys.executable, "-m", "benchmarks.release_size", str(directory), "--load-as", load_as]
        subprocess.run([*command, "--what", step], check=True)


if __name__ == "__main__":
    typer.run(main)
