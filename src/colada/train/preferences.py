"""Preferences between answers as a stage: Flow-DPO on pairs of rows; the loss is in ``posttraining``.

A pair is two rows, the chosen answer before the rejected one, with the same noise: equal blocks of the two
have equal timesteps and noise, under the network that learns and under the first weights alike. Latents are
drawn from the Text VAE's posterior, where what the model writes lies; the history of each answer is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from colada.data.rows import Batch, batch
from colada.errors import ColadaError
from colada.networks.dit import DiT
from colada.train.cola import ColaStage
from colada.train.cost import Phase, Placement
from colada.train.flow_matching import flow_errors
from colada.train.kinds import PreferencesSection
from colada.train.losses import Loss, frozen_latents
from colada.train.noise import (
    Counts,
    StepNoise,
    count,
    given_tokens,
    pinned_latents,
)
from colada.train.parallel import added_up
from colada.train.posttraining import calibrated_beta, mean_error, preference_loss
from colada.train.recipe import Recipe
from colada.train.stages import Beginning, Configs, LayOut, System, network_of

PAIR = 2


@dataclass(frozen=True)
class PairNoise(StepNoise):
    """Noise of rows, two a pair, and the pair's number in the stage (B,)."""

    pair: Tensor | None = None


class PreferencesStage(ColaStage):
    """The DiT on pairs of answers, under its own first weights."""

    learns, uses = ("dit",), ("vae",)
    section: PreferencesSection

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        super().__init__(system, name, lay_out)
        section = self.section
        pairs = section.steps * section.batch
        if section.reference == "recomputed":
            self.frozen["reference"] = system.frozen_copy("dit", lay_out)
        else:
            self.memory["reference"] = torch.full((pairs, PAIR), float("nan"))
        if section.beta is None:
            self.memory["gains"] = torch.zeros(min(section.calibration, section.steps) * section.batch)

    def begin(self, beginning: Beginning) -> None:
        """Store the errors of the first weights, where they are to be stored and are not yet."""
        stored = self.memory.get("reference")
        if stored is None or not bool(stored.isnan().any()):
            return
        dit, section = network_of(self.networks, "dit", DiT), self.section
        rows = beginning.rows(self.recipe.seed + self.number)
        device = self.vae.encoder.wte.weight.device
        size = max(1, (section.micro_batch or section.batch) // beginning.ranks.size)
        pair_numbers = list(beginning.ranks.share(len(stored)))
        errors = torch.zeros_like(stored)
        with torch.no_grad(), beginning.display.task("errors of the first weights", len(pair_numbers)):
            for start in range(0, len(pair_numbers), size):
                numbers = pair_numbers[start : start + size]
                some, noise = batch(rows, numbers).to(device), self.draw(numbers).to(device)
                with self.system.autocast(device):  # As in the steps: what is learnt is a small difference.
                    errors[numbers] = self._errors(dit, some, noise)[0].view(-1, PAIR).float().cpu()
                beginning.display.advance(start + len(numbers), len(pair_numbers))
        stored.copy_(added_up(errors))

    def draw(self, rows: Sequence[int]) -> PairNoise:
        """Return the noise of pairs by number, the same for both rows of each."""
        once = super().draw(rows).map(lambda x: x.repeat_interleave(PAIR, 0))
        values = {field.name: getattr(once, field.name) for field in fields(StepNoise)}
        return PairNoise(**values, pair=torch.tensor(rows).repeat_interleave(PAIR))

    def count(self, rows: Batch, noise: StepNoise) -> Counts:
        """Return tokens and latents, and in place of noisy latents how many pairs there are."""
        return replace(count(rows, noise, self.vae.config), noisy=len(rows) / PAIR)

    def _errors(self, dit: DiT, rows: Batch, noise: PairNoise) -> tuple[Tensor, Tensor]:
        """Return the mean flow error of each row (B,), and of how many latents it is."""
        assert noise.timestep is not None
        assert noise.z1 is not None
        means, patch = self.section.latents == "mean", self.vae.config.patch_size
        _, (z0, pinned, sample) = frozen_latents(self.vae, rows, noise, self.system.pad_id, means)
        errors = flow_errors(dit, z0, noise.z1, noise.timestep, pinned, sample, noise.alone)
        free = ~pinned_latents(given_tokens(rows, noise, patch), patch)
        return mean_error(errors, free), free.sum(1)

    def loss(self, networks: nn.ModuleDict, rows: Batch, noise: PairNoise, counts: Counts, step: int) -> Loss:
        """Return the loss of pairs in a step, with the network that learns or its average."""
        assert noise.pair is not None
        errors, lengths = self._errors(network_of(networks, "dit", DiT), rows, noise)
        learns = torch.is_grad_enabled()
        reference = self._reference(rows, noise)
        pairs = errors.view(-1, PAIR)
        known = reference if reference is not None else pairs.detach()
        beta = self._beta(step)
        anchor = self.section.anchor
        total, terms = preference_loss(
            *(pairs[:, 0], pairs[:, 1], known[:, 0], known[:, 1]), beta=beta, anchor=anchor
        )
        if learns and "gains" in self.memory and (step + 1) * self.section.batch <= len(self.memory["gains"]):
            gains = ((known[:, 0] - known[:, 1]) - (pairs[:, 0] - pairs[:, 1])).detach().cpu()
            new = torch.zeros_like(self.memory["gains"])
            new[noise.pair[::PAIR].cpu()] = gains
            self.memory["gains"] += added_up(new)
        terms |= {"beta": beta * errors.new_tensor(len(pairs))}
        sizes = lengths.view(-1, PAIR).float()
        terms |= {"chosen_length": sizes[:, 0].sum(), "rejected_length": sizes[:, 1].sum()}
        if reference is None:
            terms = {"flow": terms["flow"]}
        return Loss(total / counts.noisy, {name: term / counts.noisy for name, term in terms.items()})

    def _reference(self, rows: Batch, noise: PairNoise) -> Tensor | None:
        """Return the first weights' errors of pairs (P, 2), None for those that none are stored of."""
        assert noise.pair is not None
        stored = self.memory.get("reference")
        if stored is None:
            dit = network_of(self.frozen, "reference", DiT)
            with torch.no_grad():
                return self._errors(dit, rows, noise)[0].view(-1, PAIR)
        numbers = noise.pair[::PAIR].cpu()
        if int(numbers.max()) >= len(stored):
            return None
        return stored[numbers].to(rows.ids.device)

    def _beta(self, step: int) -> float:
        """Return beta of a step: that of the recipe, or 0 until what was gained has set it."""
        if self.section.beta is not None:
            return self.section.beta
        gains = self.memory["gains"]
        if step * self.section.batch < len(gains):
            return 0.0
        try:
            return calibrated_beta(gains)
        except ValueError as error:
            raise ColadaError(f"stages.{self.name}: beta cannot be set by {error}; give beta") from None

    @classmethod
    def phases(
        cls, recipe: Recipe, name: str, section: PreferencesSection, configs: Configs, placement: Placement
    ) -> list[Phase]:
        """Return the steps, with the passes of the first weights and, unless stored, their copy."""
        placement = replace(placement, micro_batch=PAIR * placement.micro_batch)
        (phase,) = super().phases(recipe, name, section, configs, placement)
        forward = (phase.flops["DiT"] + phase.flops["AdaLN"]) / 3
        flops = {**phase.flops, "reference": forward}
        memory = dict(phase.memory)
        if section.reference == "recomputed":
            memory["reference"] = phase.memory["weights"]
        return [replace(phase, flops=flops, memory=memory)]
