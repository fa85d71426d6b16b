"""One training step at a named size, in this process or in one that runs another checkout's code.

``python -m benchmarks.step CASE`` is that other process: it answers each line "step", "gradients FILE" or
"peak" with one line of JSON. What this file imports from the package has been there, under these names, since
the commit it is compared with, so that ``PYTHONPATH=OTHER/src`` is all that changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import peak_bytes, seconds_of
from benchmarks.models import open_gates, size_configs
from colada import device
from colada.data.rows import Batch
from colada.networks.config import DiTConfig, TextVAEConfig
from colada.networks.dit import DiT
from colada.networks.vae import TextVAE
from colada.train.cost import Work
from colada.train.kinds import FlowTerms, TextVAETerms
from colada.train.losses import prior_loss, vae_loss
from colada.train.noise import draw_noise
from colada.train.parallel import compile_blocks, recompute

LR, CLIP = 1e-4, 1.0

SPINS = "10000"  # As the command line has it; other checkouts may not.


@dataclass(frozen=True)
class Case:
    """What a step computes.

    Attributes:
        size: tiny, small or 2.3b; tiny is the size of recipes/tiny.yaml.
        stage: 1, the Text VAE, or 2, the DiT over a frozen Text VAE.
        block: latents in a block.
        batch, length: rows, and tokens a row.
        copies: noisy copies that share one clean copy.
        precision: bfloat16 (autocast of matrix products) or float32.
        compiled: compile each transformer block of the DiT.
        recomputed: compute the DiT's blocks again in the backward pass.
        device: cpu or cuda.
        layers: of the DiT, in place of the size's.
    """

    size: str = "tiny"
    stage: int = 2
    block: int = 16
    batch: int = 8
    length: int = 128
    copies: int = 1
    precision: str = "bfloat16"
    compiled: bool = False
    recomputed: bool = False
    device: str = "cpu"
    layers: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of text in a step."""
        return self.batch * self.length

    def configs(self) -> tuple[TextVAEConfig, DiTConfig]:
        """Return the configurations of both networks."""
        return size_configs(self.size, self.block, self.layers)

    def work(self) -> Work:
        """Return the step as the plan counts it."""
        vae = self.configs()[0]
        prefixes = min(1.0, FlowTerms().prefix_share * self.length / vae.block_tokens)
        if self.stage == 1:
            return Work("vae", self.batch, self.length)
        return Work("dit", self.batch, self.length, self.copies, masked=False, prefixes=prefixes)


class Step:
    """Networks with random weights, one batch, and an optimiser: everything that a step needs.

    Raises:
        ColadaError: for an unknown size.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        # As a run does; other checkouts may not have it.
        if case.device == "cpu" and hasattr(device, "keep_freed_memory"):
            device.keep_freed_memory()
        vae_config, dit_config = case.configs()
        with self.device:
            self.vae, self.dit = TextVAE(vae_config), DiT(dit_config)
        for network in (self.vae, self.dit):
            network.init_weights(torch.Generator(self.device).manual_seed(0))
            open_gates(network, torch.Generator(self.device).manual_seed(1))
        self.learns: nn.Module = self.vae if case.stage == 1 else self.dit
        if case.stage == 2:
            self.vae.requires_grad_(False)
        if case.recomputed:
            recompute(self.dit)
        if case.compiled:
            compile_blocks(self.dit)
        self.weights = TextVAETerms()
        rows = [torch.Generator().manual_seed(row) for row in range(case.batch)]
        self.noise = draw_noise(
            rows,
            vae_config,
            case.length,
            self.weights if case.stage == 1 else None,
            FlowTerms(copies=case.copies) if case.stage == 2 else None,
        )
        ids = torch.randint(0, vae_config.vocab_size - 1, (case.batch, case.length), generator=rows[0])
        self.batch = Batch(ids)
        self.optimiser = torch.optim.AdamW(self.learns.parameters(), lr=LR, fused=True)

    def loss(self) -> Tensor:
        """Return the loss of the batch; it is copied to the device, as in a run."""
        rows, noise = self.batch.to(self.device), self.noise.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.precision == "bfloat16"):
            if self.case.stage == 1:
                return vae_loss(self.vae, rows, noise, self.weights).total
            return prior_loss(self.vae, self.dit, rows, noise, 0).total

    def __call__(self) -> None:
        """Take one optimiser step: loss, gradients, clipping, fused AdamW."""
        self.optimiser.zero_grad(set_to_none=True)
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.learns.parameters(), CLIP)
        self.optimiser.step()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of every parameter that learns, by name, on the CPU."""
        self.optimiser.zero_grad(set_to_none=True)
        self.loss().backward()
        named = self.learns.named_parameters()
        return {name: parameter.grad.cpu() for name, parameter in named if parameter.grad is not None}


class StepProcess:
    """A step in a process of its own, which waits while others take their turns.

    Args:
        case: what to compute.
        checkout: whose code computes it: a directory with ``src/colada`` and its own ``benchmarks``.

    Raises:
        RuntimeError: if the process fails; what it said stands on standard error.
    """

    def __init__(self, case: Case, checkout: Path) -> None:
        there = checkout.resolve()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((f"{there}/src", str(there)))}
        if "OMP_WAIT_POLICY" not in environment:
            environment.setdefault("GOMP_SPINCOUNT", SPINS)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step", json.dumps(asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=there,
            env=environment,
            text=True,
        )
        self.made_with: dict[str, Any] = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with status {self._process.wait()}")
        return json.loads(line)

    def ask(self, line: str) -> Any:
        """Return the process's answer to a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def seconds(self) -> float:
        """Take a step, and return how long it took."""
        return float(self.ask("step"))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _serve(case: Case) -> None:
    import colada

    step = Step(case)
    answer: Any = {"colada": str(Path(colada.__file__).parents[2]), "torch": torch.__version__}
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "step":
            answer = seconds_of(step, step.device)
        elif word == "gradients":
            torch.save(step.gradients(), rest)
            answer = rest
        elif word == "peak":
            answer = peak_bytes(step.device)
        else:
            raise ValueError(f"{word!r}, expected step, gradients or peak")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: python -m benchmarks.step CASE\n\n{__doc__}")
    else:
        _serve(Case(**json.loads(sys.argv[1])))
