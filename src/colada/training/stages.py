"""The two stages: which networks learn, with which optimisers, and what a step draws and minimises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from colada.data.rows import Batch
from colada.dit import DiT
from colada.objectives import (
    Counts,
    Draws,
    Loss,
    draw_randomness,
    stage1_loss,
    stage2_frozen_loss,
    stage2_joint_loss,
)
from colada.training.optimisation import make_optimisers
from colada.training.recipe import OptimiserSection, Recipe
from colada.vae import TextVAE


def row_generator(seed: int, stage: int, row: int) -> torch.Generator:
    """Return the CPU generator of one row: the same in any batch, on any rank, resumed or not."""
    state = np.random.SeedSequence([seed, stage, row]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def initialise(seed: int, vae: TextVAE, dit: DiT) -> None:
    """Give both networks the first weights of a run with this seed."""
    vae.init_weights(row_generator(seed, 0, 0))
    dit.init_weights(row_generator(seed, 0, 1))


@dataclass
class Stage:
    """A stage of a run.

    Attributes:
        number: 1 or 2.
        recipe, pad_id: what it depends on.
        networks: those that learn, "vae" or "dit" or both.
        optimisers: theirs.
        vae: the Text VAE, learning or not.
        reference: a joint stage 2's q_ref.
    """

    number: int
    recipe: Recipe
    pad_id: int
    networks: nn.ModuleDict
    optimisers: list[torch.optim.Optimizer]
    vae: TextVAE
    reference: TextVAE | None = None

    @property
    def section(self) -> OptimiserSection:
        """Its section of the recipe."""
        return self.recipe.stage(self.number)

    def draw(self, rows: Sequence[int]) -> Draws:
        """Return what the loss of rows with these numbers draws; B is their number."""
        generators = [row_generator(self.recipe.seed, self.number, row) for row in rows]
        config, weights = self.vae.config, self.recipe.vae_weights()
        flow = self.recipe.flow_settings(config.latent_dim) if self.number == 2 else None
        masked = self.number == 1 or self.recipe.stage2.vae != "frozen"
        return draw_randomness(generators, config, self.section.length, weights, flow, masked)

    def loss(self, networks: nn.ModuleDict, rows: Batch, draws: Draws, counts: Counts, step: int) -> Loss:
        """Return the loss of rows in a step, with the networks that learn or their average."""
        weights = self.recipe.vae_weights()
        vae = networks["vae"] if "vae" in networks else self.vae  # noqa: SIM401 - it has no get()
        assert isinstance(vae, TextVAE)
        if self.number == 1:
            return stage1_loss(vae, rows, draws, weights, counts)
        dit = networks["dit"]
        assert isinstance(dit, DiT)
        if not self.recipe.stage2.joint_at(step):
            return stage2_frozen_loss(vae, dit, rows, draws, weights, self.pad_id, counts)
        assert self.reference is not None
        joint = self.recipe.joint_weights()
        return stage2_joint_loss(vae, dit, self.reference, rows, draws, weights, joint, self.pad_id, counts)


def first_stage(recipe: Recipe, pad_id: int, vae: TextVAE) -> Stage:
    """Return stage 1."""
    optimisers = make_optimisers(vae, recipe.stage1, recipe.stage1.lr)
    return Stage(1, recipe, pad_id, nn.ModuleDict({"vae": vae}), optimisers, vae)


def second_stage(recipe: Recipe, pad_id: int, vae: TextVAE, dit: DiT, reference: TextVAE | None) -> Stage:
    """Return stage 2, in which the Text VAE stops learning or goes on, with a learning rate of its own."""
    section = recipe.stage2
    networks, optimisers = nn.ModuleDict({"dit": dit}), make_optimisers(dit, section, section.lr)
    if section.vae == "frozen":
        vae.requires_grad_(False)
    else:
        networks["vae"] = vae
        optimisers += make_optimisers(vae, section, section.lr * section.vae_lr)
    return Stage(2, recipe, pad_id, networks, optimisers, vae, reference)
