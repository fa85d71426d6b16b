"""Cola DLM in a run: which networks learn in either stage, and what a step draws and minimises."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from colada.data.rows import Batch
from colada.errors import ColadaError
from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.networks.dit import DiT
from colada.networks.vae import TextVAE
from colada.text.tokenizer import Tokenizer
from colada.train.dry_run import step_work
from colada.train.losses import Loss, stage1_loss, stage2_frozen_loss, stage2_joint_loss
from colada.train.noise import Counts, Draws, count, draw_randomness
from colada.train.optimisation import make_optimisers
from colada.train.parallel import compile_blocks
from colada.train.parallel import recompute as recompute_blocks
from colada.train.plan import training_flops
from colada.train.recipe import Recipe
from colada.train.stages import LayOut, Stage, System, copied, drawn, row_generator


class ColaStage(Stage):
    """Stage 1, the Text VAE alone, or stage 2, the DiT with the Text VAE learning or not.

    Attributes:
        vae, dit: the networks.
        reference: a joint stage 2's q_ref.
        pad_id: fills up what is encoded apart.
    """

    def __init__(
        self,
        number: int,
        recipe: Recipe,
        pad_id: int,
        vae: TextVAE,
        dit: DiT,
        reference: TextVAE | None = None,
    ) -> None:
        self.vae, self.dit, self.reference, self.pad_id = vae, dit, reference, pad_id
        resting: dict[str, nn.Module] = {} if reference is None else {"reference": reference}
        one, two = recipe.stage1, recipe.stage2
        if number == 1:
            networks, optimisers = nn.ModuleDict({"vae": vae}), make_optimisers(vae, one, one.lr)
        else:
            networks, optimisers = nn.ModuleDict({"dit": dit}), make_optimisers(dit, two, two.lr)
            if two.vae == "frozen":
                vae.requires_grad_(False)
                resting["vae"] = vae
            else:
                networks["vae"] = vae
                optimisers += make_optimisers(vae, two, two.lr * two.vae_lr)
        super().__init__(number, recipe, networks, optimisers, resting)

    def draw(self, rows: Sequence[int]) -> Draws:
        """Return what the loss of rows with these numbers draws; B is their number."""
        generators = [row_generator(self.recipe.seed, self.number, row) for row in rows]
        config, weights = self.vae.config, self.recipe.vae_weights()
        flow = self.recipe.flow_settings(config.latent_dim) if self.number == 2 else None
        masked = self.number == 1 or self.recipe.stage2.vae != "frozen"
        return draw_randomness(generators, config, self.section.length, weights, flow, masked)

    def count(self, rows: Batch, draws: Draws) -> Counts:
        """Return a batch's share in the counts of its step."""
        return count(rows, draws, self.vae.config)

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

    def flops(self, step: int) -> float:
        """Return the useful FLOPs of a step."""
        joint = self.number == 2 and self.recipe.stage2.joint_at(step)
        work = step_work(self.recipe, self.number, self.vae.config, joint)
        return sum(training_flops(self.vae.config, self.dit.config, work).values())


class ColaSystem(System):
    """Text VAE and DiT, new ones or those of a model to continue from.

    Raises:
        ColadaError: if they do not fit the recipe.
    """

    numbers = (1, 2)

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, start: LanguageModel | None, whole: bool = True
    ) -> None:
        super().__init__(recipe, whole)
        self._pad_id = tokenizer.pad_id
        if start is None:
            vae_config, dit_config = recipe.configs(tokenizer.vocab_size, tokenizer.pad_id)
        elif isinstance(start, ColaDLM):
            vae_config, dit_config = start.vae.config, start.dit.config
            if recipe.stage1.log_snr is not None:
                vae_config = dataclasses.replace(vae_config, log_snr=recipe.stage1.log_snr)
            recipe.check_configs(vae_config, dit_config, tokenizer.vocab_size)
        else:
            raise ColadaError(f"model.init={recipe.model.init} is {start.arch}, model.arch is 'cola'")
        self.vae, self.dit = self._made(lambda: TextVAE(vae_config)), self._made(lambda: DiT(dit_config))
        if start is None:
            generators = [row_generator(recipe.seed, 0, number) for number in (0, 1)]
            first = {"vae": drawn(self.vae, generators[0]), "dit": drawn(self.dit, generators[1])}
        else:
            first = {"vae": copied(start.vae), "dit": copied(start.dit)}
        self._begin({"vae": self.vae, "dit": self.dit}, first)
        self.block_tokens = self.vae.config.block_tokens

    def prepare(self, lay_out: LayOut, recompute: bool, compiled: bool) -> None:
        """Lay out the Text VAE: stage 1 has the memory for itself."""
        if recompute:
            recompute_blocks(self.dit)
        if compiled:
            compile_blocks(self.dit)
        self._laid_out("vae", lay_out)

    def stage(self, number: int, lay_out: LayOut) -> ColaStage:
        """Return a stage over these networks; stage 2 takes the Text VAE as it is now."""
        if number == 1:
            return ColaStage(1, self.recipe, self._pad_id, self.vae, self.dit)
        self._laid_out("dit", lay_out)
        reference = None
        if self.recipe.stage2.vae != "frozen":
            reference = self._made(lambda: TextVAE(self.vae.config))
            lay_out({"reference": reference})
            reference.requires_grad_(False).load_state_dict(self.vae.state_dict())
        return ColaStage(2, self.recipe, self._pad_id, self.vae, self.dit, reference)

    def model(self, networks: Mapping[str, nn.Module], **parts: Any) -> ColaDLM:
        """Return networks, by name, as a model."""
        vae, dit = networks["vae"], networks["dit"]
        assert isinstance(vae, TextVAE)
        assert isinstance(dit, DiT)
        return ColaDLM(vae, dit, **parts)
