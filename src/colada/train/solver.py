"""A learnt solver as a stage: where a teacher's many evaluations end, in few; no network changes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from colada.data.rows import Batch
from colada.flow import T
from colada.generate.settings import UNGUIDED
from colada.networks.dit import DiT
from colada.networks.solver import LearntSolver
from colada.train.cost import Phase, Placement
from colada.train.distil_cost import teacher_pass, with_trajectories
from colada.train.distillation import Guided
from colada.train.flow_matching import Pinned, place
from colada.train.kinds import SolverSection
from colada.train.losses import Loss, frozen_latents
from colada.train.noise import Counts, StepNoise
from colada.train.recipe import Recipe
from colada.train.stages import Configs, LayOut, System, network_of
from colada.train.taught import TaughtNoise, TaughtStage

_HELD = 8
"""One of so many kept rows is for validation."""


def integrate(
    solver: LearntSolver,
    guided: Guided,
    noise: Tensor,
    clean: Tensor,
    pinned: Pinned | None = None,
    sample: Tensor | None = None,
) -> Tensor:
    """Return where a solver takes noise (B, K, M, C); other arguments as :func:`predict`."""
    grid, alpha, beta = solver()
    z, guesses = place(noise, pinned), list[Tensor]()
    for a, z_factor, weights in zip(grid, alpha, beta, strict=True):
        timestep = (T * a).expand(z.shape[:-1])
        guesses.append(guided.guess(z, timestep, clean, pinned, sample))
        moved = z_factor * z
        for weight, guess in zip(weights, guesses, strict=True):
            moved = moved + weight * guess
        z = place(moved, pinned)
    return z


class SolverStage(TaughtStage):
    """The numbers of a solver under the ends of a teacher's trajectories."""

    learns, uses = ("solver",), ("vae", "dit")
    section: SolverSection

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        super().__init__(system, name, lay_out)
        section, solver = self.section, network_of(self.networks, "solver", LearntSolver)
        dit = network_of(system.networks, "dit", DiT)
        # A network with guidance built in is not guided; any other one as its teacher is.
        alone = dit.config.distilled is not None
        solver.fitted.fill_(True)
        solver.learn_under({**section.guided, **(UNGUIDED if alone else {})})

    def _numbers(self, number: Tensor) -> list[int]:
        """Return kept rows: of the last ones in a validation, else of the others."""
        assert self._kept is not None
        held = max(1, self._kept.rows // _HELD)
        rest = max(1, self._kept.rows - held)
        if not torch.is_grad_enabled():
            return [self._kept.rows - held + row % held for row in number.tolist()]
        return [row % rest for row in number.tolist()]

    def count(self, rows: Batch, noise: StepNoise) -> Counts:
        """Return a batch's share in the counts of its step; in a validation, that of the kept rows."""
        assert isinstance(noise, TaughtNoise)
        if noise.states is None:
            rows, noise = self.rollouts(0, rows, noise)
        return super().count(rows, noise)

    def loss(
        self,
        networks: nn.ModuleDict,
        rows: Batch,
        noise: TaughtNoise,  # type: ignore[override]
        counts: Counts,
        step: int,
    ) -> Loss:
        """Return E||z_N - z_teacher||^2 per latent number that is free."""
        solver, dit = network_of(networks, "solver", LearntSolver), network_of(self.frozen, "dit", DiT)
        if noise.states is None:  # In a validation.
            device = rows.ids.device
            rows, noise = self.rollouts(step, rows, noise)
            rows, noise = rows.to(device), noise.to(device)
        assert noise.states is not None
        _, latents = frozen_latents(self.vae, rows, noise, self.system.pad_id)
        z1, goal = noise.states[:, None, :, 0], noise.states[:, None, :, -1]
        guided = Guided.of(dit, solver.guided)
        errors = (integrate(solver, guided, z1, *latents) - goal).square().mean(-1)
        if latents.pinned is not None:
            errors = errors.masked_fill(latents.pinned.where[:, None], 0.0)
        total = errors.sum() / counts.noisy
        return Loss(total, {"distance": total.detach()})

    @classmethod
    def phases(
        cls, recipe: Recipe, name: str, section: SolverSection, configs: Configs, placement: Placement
    ) -> list[Phase]:
        """Return the steps: forward and backward through all evaluations, without gradients of weights."""
        (phase,) = super().phases(recipe, name, section, configs, placement)
        vae, dit = configs["vae"], configs["dit"]
        flops = {part: value for part, value in phase.flops.items() if part in ("encoder", "prefixes")}
        flops["evaluations"] = 2 * section.evaluations * teacher_pass(vae, dit, section)
        frozen = phase.memory["frozen networks"] + 2 * phase.memory["weights"]
        activations = section.evaluations * phase.memory["activations"]
        memory = {"frozen networks": frozen, "activations": activations}
        phase = replace(phase, flops=flops, memory=memory, narrow_flops=0.0)
        return with_trajectories(phase, recipe, name, section, vae, dit)
