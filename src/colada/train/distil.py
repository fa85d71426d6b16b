"""Distillation as a stage: a student that needs no unconditional pass, and few evaluations where asked.

See :mod:`colada.train.distillation` for what is taught.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from colada.data.rows import Batch
from colada.flow import T, interpolate
from colada.networks.dit import DiT
from colada.train.cola import PriorStage, flow_settings
from colada.train.distillation import Guided, distillation_errors, landing, target_of
from colada.train.flow_matching import pin, place, weighed
from colada.train.kinds import DistilSection
from colada.train.losses import Loss, draw, encode, log_snr_terms, rows_layout
from colada.train.noise import Counts, Draws, sample_of_latents
from colada.train.stages import LayOut, System, row_generator


class DistilStage(PriorStage):
    """The DiT under a frozen, guided copy of itself or of another model's."""

    teachers = {"teacher": "dit"}  # noqa: RUF012 - the base class says that it is the class's
    section: DistilSection  # type: ignore[assignment]

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        super().__init__(system, name, lay_out)
        section, dit = self.section, system.networks["dit"]
        assert isinstance(dit, DiT)
        inside: dict[str, Any] = {"guidance": section.guidance, "guidance_cap": section.guidance_cap}
        inside |= {"guidance_rescale": section.guidance_rescale}
        inside |= {"grid": None if section.grid is None else list(section.grid)}
        dit.config = dataclasses.replace(dit.config, distilled=inside)

    def loss(self, networks: nn.ModuleDict, rows: Batch, draws: Draws, counts: Counts, step: int) -> Loss:
        """Return the loss of rows in a step, with the network that learns or its average."""
        student, teacher, section = networks["dit"], self.frozen["teacher"], self.section
        assert isinstance(student, DiT)
        assert isinstance(teacher, DiT)
        assert draws.timestep is not None
        assert draws.noise is not None
        cap = section.guidance_cap or math.inf
        guided = Guided(teacher, section.guidance, cap, section.guidance_rescale)
        with torch.no_grad():
            layout = rows_layout(self.vae, rows)
            q = encode(self.vae, rows.ids, layout, self.vae.config.log_snr)
            z0 = self.vae.normalise(draw(q, draws.posterior))
            clean = z0.view(len(rows), -1, self.vae.config.latent_dim)
            pinned = pin(self.vae, rows, draws, layout, self.system.pad_id)
            sample = sample_of_latents(rows, self.vae.config.patch_size)
            timestep, end = self._interval(draws.timestep)
            if self._on_trajectory(step):
                noise, begin = place(draws.noise, pinned), torch.full_like(timestep, T)
                z = landing(guided, noise, begin, timestep, clean, pinned, sample, section.rollout)
            else:
                z = place(interpolate(clean[:, None], draws.noise, timestep / T), pinned)
            if section.grid is None:
                target = guided.guess(z, timestep, clean, pinned, sample)
            else:
                landed = landing(guided, z, timestep, end, clean, pinned, sample, section.substeps)
                target = target_of(z, landed, timestep, end)
        errors = distillation_errors(student, z, target, timestep, clean, pinned, sample)
        total, terms = weighed(errors, timestep, pinned, counts, section.space)
        terms |= log_snr_terms(q, rows, counts)
        return Loss(total, {name: term.detach() for name, term in terms.items()})

    def _interval(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return drawn timesteps (B, K, M) and 0; with a grid, where their intervals begin and end.

        Each interval is as likely as another: the law's own quantile chooses.
        """
        grid = self.section.grid
        if grid is None:
            return timestep, torch.zeros_like(timestep)
        loc, scale = self._law
        quantile = torch.special.ndtr((torch.logit(timestep / T, 1e-6) - loc) / scale)
        number = (quantile * (len(grid) - 1)).long().clamp(0, len(grid) - 2)
        ends = T * torch.tensor(grid, dtype=timestep.dtype, device=timestep.device)
        return ends[number], ends[number + 1]

    @property
    def _law(self) -> tuple[float, float]:
        law = flow_settings(self.section, self.vae.config.latent_dim).law
        return law.loc, law.scale

    def _on_trajectory(self, step: int) -> bool:
        """Return whether a step's states are the teacher's own; in a validation, never."""
        if not torch.is_grad_enabled():
            return False
        # A number that no row has, see the draws of self-conditioning.
        generator = row_generator(self.recipe.seed, self.number, 2**42 + step)
        return bool(torch.rand((), generator=generator) < self.section.trajectory)
