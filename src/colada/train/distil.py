"""Distillation as a stage: a student that needs no unconditional pass, and few evaluations where asked.

See :mod:`colada.train.distillation` for what is taught, :mod:`colada.train.trajectories` for what is kept of
the teacher.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from colada.data.rows import Batch
from colada.flow import T, interpolate
from colada.networks.dit import DiT
from colada.randomness import generator_of
from colada.train.cost import Phase, Placement
from colada.train.distil_cost import with_teacher, with_trajectories
from colada.train.distillation import Guided, distillation_errors, landing, target_of
from colada.train.flow_matching import place, weighed
from colada.train.kinds import DistilSection
from colada.train.losses import Loss, frozen_latents, log_snr_terms
from colada.train.noise import Counts, timestep_law
from colada.train.recipe import Recipe
from colada.train.stages import Configs, LayOut, System, network_of
from colada.train.taught import TaughtNoise, TaughtStage


class Interval(NamedTuple):
    """A step of a student: from a to a, in how many of its teacher, and how often it is drawn."""

    begin: float
    end: float
    substeps: int
    share: float


def intervals(section: DistilSection) -> list[Interval]:
    """Return the steps of a student's grids."""
    grids = section.grids or ()
    shares = section.shares or (1.0,) * len(grids)
    return [
        Interval(
            *ends,
            max(1, round(section.teacher_steps / (len(grid) - 1))),
            share / sum(shares) / (len(grid) - 1),
        )
        for grid, share in zip(grids, shares, strict=True)
        for ends in pairwise(grid)
    ]


class DistilStage(TaughtStage):
    """The DiT under a frozen, guided copy of itself or of another model's."""

    section: DistilSection

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        super().__init__(system, name, lay_out)
        self._intervals = intervals(self.section)

    def loss(
        self,
        networks: nn.ModuleDict,
        rows: Batch,
        noise: TaughtNoise,  # type: ignore[override]
        counts: Counts,
        step: int,
    ) -> Loss:
        """Return the loss of rows in a step, with the network that learns or its average."""
        section, student = self.section, network_of(networks, "dit", DiT)
        teacher = network_of(self.frozen, "teacher", DiT)
        assert noise.timestep is not None
        assert noise.z1 is not None
        guided = Guided.of(teacher, section.guided)
        q, latents = frozen_latents(self.vae, rows, noise, self.system.pad_id)
        clean, pinned, _ = latents
        with torch.no_grad():
            timestep, end, substeps = self._drawn(noise.timestep)
            if noise.states is not None:
                z, landed = (place(self._at(noise.states, at), pinned) for at in (timestep, end))
                target = target_of(z, landed, timestep, end)
            else:
                if self._on_trajectory(step):
                    z1, begin = place(noise.z1, pinned), torch.full_like(timestep, T)
                    z = landing(guided, z1, begin, timestep, *latents, section.rollout)
                else:
                    z = place(interpolate(clean[:, None], noise.z1, timestep / T), pinned)
                if section.grids is None:
                    target = guided.guess(z, timestep, *latents)
                else:
                    landed = landing(guided, z, timestep, end, *latents, substeps)
                    target = target_of(z, landed, timestep, end)
        landing_time = None if section.grids is None else end
        errors = distillation_errors(student, z, target, timestep, *latents, landing_time)
        total, terms = weighed(errors, timestep, pinned, counts, section.space)
        terms |= log_snr_terms(q, rows, counts)
        return Loss(total, {name: term.detach() for name, term in terms.items()})

    def _drawn(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return drawn timesteps (B, K, M), 0, and 1; with grids, where steps begin and end, and substeps.

        The law's own quantile chooses a grid by its share, and each of its intervals alike.
        """
        if not self._intervals:
            return timestep, torch.zeros_like(timestep), torch.ones_like(timestep)
        law = timestep_law(self.section, self.vae.config.latent_dim)
        quantile = law.quantile(timestep)
        table = torch.tensor(self._intervals, dtype=timestep.dtype, device=timestep.device)
        edges = table[:, 3].cumsum(0)[:-1]
        begin, end, substeps, _ = table[torch.bucketize(quantile, edges, right=True)].unbind(-1)
        return T * begin, T * end, substeps

    def _on_trajectory(self, step: int) -> bool:
        """Return whether a step's states are the teacher's own; in a validation, never."""
        if not torch.is_grad_enabled():
            return False
        # A number that no row has, see self-conditioning.
        generator = generator_of(self.recipe.seed, self.number, 2**42 + step)
        return bool(torch.rand((), generator=generator) < self.section.trajectory)

    @classmethod
    def phases(
        cls, recipe: Recipe, name: str, section: DistilSection, configs: Configs, placement: Placement
    ) -> list[Phase]:
        """Return the steps, with the teacher's passes, and what making the trajectories takes."""
        (phase,) = super().phases(recipe, name, section, configs, placement)
        vae, dit, trajectories = configs["vae"], configs["dit"], section.trajectories
        passes = float(max((step.substeps for step in intervals(section) if step.share), default=1))
        if trajectories is None:
            passes += section.trajectory * section.rollout
        else:
            passes *= 1 - section.trajectory
        phase = with_teacher(phase, vae, dit, section, passes)
        return with_trajectories(phase, recipe, name, section, vae, dit)
