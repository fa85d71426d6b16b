"""Cola DLM in a run: its networks, and its kinds of stages: Text VAE, prior, and both together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from colada.data.rows import Batch
from colada.errors import ColadaError
from colada.generate.settings import with_built_in
from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.networks.config import TextVAEConfig
from colada.networks.dit import DiT
from colada.networks.pictures import with_pictures
from colada.networks.solver import LearntSolver
from colada.networks.vae import TextVAE
from colada.pictures.codec import Codec, PatchPCA, fit, new_codec
from colada.pictures.config import MOST_WORDS
from colada.randomness import generator_of
from colada.text.tokenizer import Tokenizer
from colada.train.cost import Phase, Placement, Work, cola_phase
from colada.train.flow_matching import Consistency, FlowStep
from colada.train.kinds import (
    FlowTerms,
    InstructSection,
    JointSection,
    PriorSection,
    PriorTerms,
    SolverSection,
    TextVAESection,
    TextVAETerms,
)
from colada.train.lineage import built_in
from colada.train.losses import Loss, decoder_loss, joint_loss, prior_loss, vae_loss
from colada.train.noise import Counts, StepNoise, count, draw_noise, timestep_law
from colada.train.pairs import open_pairs
from colada.train.recipe import Recipe
from colada.train.stages import Configs, LayOut, Stage, System, copied, drawn, network_of
from colada.train.timesteps import adapted, new_memory, remember

_FITTED_AT_ONCE = 1000


class ColaSystem(System):
    """Text VAE, DiT and, with pictures, their codec: new ones or those of a model to continue from.

    A linear codec is fitted when it is first needed, to the first pictures that are trained on.

    Raises:
        ColadaError: if they do not fit the recipe.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, start: LanguageModel | None, whole: bool = True
    ) -> None:
        super().__init__(recipe, tokenizer.pad_id, whole)
        if start is None:
            vae_config, dit_config = recipe.configs(tokenizer.vocab_size, tokenizer.pad_id)
        elif isinstance(start, ColaDLM):
            vae_config, dit_config = start.vae.config, start.dit.config
            dit_config = recipe.check_configs(vae_config, dit_config, tokenizer.vocab_size)
        else:
            raise ColadaError(f"model.init={recipe.model.init} is {start.arch}, model.arch is 'cola'")
        vae, dit = self.made(lambda: TextVAE(vae_config)), self.made(lambda: DiT(dit_config))
        networks: dict[str, nn.Module] = {"vae": vae, "dit": dit}
        generators = [generator_of(recipe.seed, 0, number) for number in range(3)]
        if start is None:
            first = {"vae": drawn(vae, generators[0]), "dit": drawn(dit, generators[1])}
        else:
            first = {"vae": copied(start.vae), "dit": copied(start.dit, drawn(dit, generators[1]))}
            if dit_config.img_channels and not start.dit.config.img_channels:
                first["dit"] = copied(with_pictures(start.dit, dit_config, generators[1]))
        image = recipe.image_config(vae_config)
        if isinstance(start, ColaDLM) and start.image is not None:
            image = start.image.config
        self.tokenizer, self._fits = tokenizer, False
        if image is not None:
            codec = self.made(lambda: new_codec(image))
            networks["image"], first["image"] = codec, drawn(codec, generators[2])
            if isinstance(start, ColaDLM) and start.image is not None:
                first["image"] = copied(start.image)
                for name, buffer in codec.named_buffers():
                    buffer.copy_(start.image.get_buffer(name))
            else:
                self._fits = isinstance(codec, PatchPCA)
        for section in recipe.trained.values():
            if isinstance(section, SolverSection) and section.steps:
                networks["solver"] = solver = LearntSolver(section.evaluations)
                first["solver"] = solver.first_value
        self._begin(networks, first)
        self.distilled = dit_config.distilled
        self.block_tokens = vae_config.block_tokens

    def ready(self, name: str, lay_out: LayOut) -> nn.Module:
        """Return a network, laid over the ranks with its weights; a linear codec is then fitted."""
        network = super().ready(name, lay_out)
        splits = open_pairs(self.recipe) if name == "image" else None
        if splits is None:
            return network
        assert isinstance(network, Codec)
        words = splits.words.union(network.config.words or ())
        known_words = sorted(words) if len(words) <= MOST_WORDS else None
        network.config = dataclasses.replace(network.config, words=known_words)
        if self._fits:
            assert isinstance(network, PatchPCA)
            pictures = (pair.picture for pair in splits.training.pairs(self.recipe.data.fitted_on))
            batches = iter(lambda: list(islice(pictures, _FITTED_AT_ONCE)), [])
            network.load_state_dict(fit(map(np.stack, batches), network.config).state_dict())
            self._fits = False
        return network

    def model(self, networks: Mapping[str, nn.Module], **parts: Any) -> ColaDLM:
        """Return networks, by name, as a model."""
        vae, dit = network_of(networks, "vae", TextVAE), network_of(networks, "dit", DiT)
        if dit.config.distilled is not None:
            parts["generation"] = _stored(dit.config.distilled, parts.get("generation") or {})
        solver = networks.get("solver", self.networks.get("solver"))
        if isinstance(solver, LearntSolver) and bool(solver.fitted):
            parts["generation"] = {**(parts.get("generation") or {}), **solver.settings()}
        image = networks.get("image")
        assert image is None or isinstance(image, Codec)
        return ColaDLM(vae, dit, image=image if dit.config.img_channels else None, **parts)


def _stored(built_in: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings stored with a distilled model: its teacher's, as far as they are still true."""
    defaults = ColaDLM.defaults
    chosen = with_built_in({**defaults, **settings}, {}, built_in)
    stored_names = {"steps", "guidance", "solver", "schedule"}
    return {name: value for name, value in chosen.items() if name in stored_names or value != defaults[name]}


def codec_of(system: System) -> Codec:
    """Return the picture codec of a run."""
    codec = system.networks["image"]
    assert isinstance(codec, Codec)
    return codec


class ColaStage(Stage):
    """What the kinds of Cola DLM's stages have in common."""

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        super().__init__(system, name, lay_out)
        dit = network_of(system.networks, "dit", DiT)
        inside = built_in(self.recipe, name, system.distilled)
        dit.config = dataclasses.replace(dit.config, distilled=inside)

    @property
    def vae(self) -> TextVAE:
        """The Text VAE, which may not be the average of what learns."""
        return network_of(self.system.networks, "vae", TextVAE)

    def draw(self, rows: Sequence[int]) -> StepNoise:
        section = self.section
        terms = section if isinstance(section, TextVAETerms) else None
        flow = section if isinstance(section, FlowTerms) else None
        return draw_noise(self.generators(rows), self.vae.config, section.length, terms, flow)

    def count(self, rows: Batch, noise: StepNoise) -> Counts:
        return count(rows, noise, self.vae.config)

    @classmethod
    def works(
        cls, recipe: Recipe, name: str, section: Any, vae: TextVAEConfig
    ) -> list[tuple[str, int, Work]]:
        """Return the steps that compute the same: what they are called, how many, and what each does."""
        return [(name, section.steps, _prior_work(recipe, section, vae, "dit", masked=False))]

    @classmethod
    def phases(
        cls, recipe: Recipe, name: str, section: Any, configs: Configs, placement: Placement
    ) -> list[Phase]:
        vae, dit = configs["vae"], configs["dit"]
        works = cls.works(recipe, name, section, vae)
        return [cola_phase(title, steps, vae, dit, work, placement) for title, steps, work in works]


class TextVAEStage(ColaStage):
    """The Text VAE alone."""

    learns = ("vae",)
    writes = False
    section: TextVAESection

    def loss(self, networks: nn.ModuleDict, rows: Batch, noise: StepNoise, counts: Counts, step: int) -> Loss:
        vae = network_of(networks, "vae", TextVAE)
        if self.phase_of(step):
            return decoder_loss(vae, rows, noise, counts)
        return vae_loss(vae, rows, noise, self.section, counts)

    def phase_of(self, step: int) -> int:
        """Return 1 where the decoder learns alone, else 0."""
        return int(step >= self.section.whole_steps)

    @classmethod
    def works(
        cls, recipe: Recipe, name: str, section: TextVAESection, vae: TextVAEConfig
    ) -> list[tuple[str, int, Work]]:
        whole = Work("vae", section.batch, section.length, masked=section.mask > 0)
        alone = Work("decoder", section.batch, section.length, masked=False)
        rest = section.steps - section.whole_steps
        return [(name, section.whole_steps, whole), (f"{name}, decoder only", rest, alone)]


class FlowStage(ColaStage):
    """What the kinds have in common in which the DiT learns by flow matching."""

    section: Any

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        super().__init__(system, name, lay_out)
        self._law = timestep_law(self.section, self.vae.config.latent_dim)
        self._adapts = isinstance(self.section, PriorTerms) and self.section.adaptive_timesteps
        if self._adapts:
            self.memory["timesteps"] = new_memory()

    def flow_step(self, step: int) -> FlowStep:
        """Return how a step makes and counts its errors."""
        section, consistency, learns = self.section, None, torch.is_grad_enabled()
        if section.consistency:
            teacher = network_of(self.best, "dit", DiT)
            ramp = section.consistency_ramp * section.steps
            weight = section.consistency * min(1.0, step / ramp if ramp else 1.0)
            consistency = Consistency(teacher, weight, section.consistency_steps)
        guesses, law = _guesses(self, section, step), self._law if self._adapts and learns else None
        return FlowStep(section.space, guesses, section.dropout, consistency, law)

    def rollouts(self, step: int, rows: Batch, noise: Any) -> tuple[Batch, Any]:
        """Return rows and noise, with timesteps where the steps before have found most to learn."""
        if not self._adapts:
            return rows, noise
        assert noise.timestep is not None
        timestep = adapted(self._law, self.memory["timesteps"], noise.timestep)
        return rows, replace(noise, timestep=timestep)

    def learnt(self, step: int, terms: Mapping[str, Tensor], add_up: Callable[[Tensor], Tensor]) -> None:
        """Remember the errors by quantile of the timestep law."""
        if self._adapts:
            sums, counts = (add_up(terms[f"quantile_{name}"].double()) for name in ("sums", "counts"))
            remember(self.memory["timesteps"], sums, counts)


class PriorStage(FlowStage):
    """The DiT over the latents of a frozen Text VAE."""

    learns: ClassVar[tuple[str, ...]] = ("dit",)
    uses: ClassVar[tuple[str, ...]] = ("vae",)
    section: PriorSection | InstructSection

    def loss(self, networks: nn.ModuleDict, rows: Batch, noise: StepNoise, counts: Counts, step: int) -> Loss:
        dit, flow = network_of(networks, "dit", DiT), self.flow_step(step)
        return prior_loss(self.vae, dit, rows, noise, self.system.pad_id, counts, flow)


class JointStage(FlowStage):
    """The DiT, and the Text VAE along with it, always or in intervals."""

    learns = ("dit", "vae")
    teachers = {"reference": "vae"}  # noqa: RUF012 - the base class says that it is the class's
    section: JointSection

    def rate(self, network: str) -> float:
        return self.section.lr * (self.section.vae_lr if network == "vae" else 1.0)

    def loss(self, networks: nn.ModuleDict, rows: Batch, noise: StepNoise, counts: Counts, step: int) -> Loss:
        vae, dit = network_of(networks, "vae", TextVAE), network_of(networks, "dit", DiT)
        section, pad_id = self.section, self.system.pad_id
        flow = self.flow_step(step)
        if not section.joint_at(step):
            return prior_loss(vae, dit, rows, noise, pad_id, counts, flow)
        reference = network_of(self.frozen, "reference", TextVAE)
        return joint_loss(vae, dit, reference, rows, noise, section, pad_id, counts, flow)

    @classmethod
    def works(
        cls, recipe: Recipe, name: str, section: JointSection, vae: TextVAEConfig
    ) -> list[tuple[str, int, Work]]:
        """Return what the joint steps do, and the frozen ones where they take turns."""
        joint = _prior_work(recipe, section, vae, "both", masked=section.mask > 0)
        if section.interval is None:
            return [(name, section.steps, joint)]
        frozen = _prior_work(recipe, section, vae, "dit", masked=False)
        return [
            (f"{name}, joint", section.joint_steps, joint),
            (f"{name}, frozen Text VAE", section.steps - section.joint_steps, frozen),
        ]

    def phase_of(self, step: int) -> int:
        """Return 0 for a joint step, 1 for one with a frozen Text VAE."""
        return 0 if self.section.joint_at(step) else 1


def _guesses(stage: Stage, section: FlowTerms, step: int) -> bool:
    """Return whether the DiT takes its own guess of z0 in a step; in a validation, if it ever does."""
    share = section.self_conditioning
    if share == 0 or not torch.is_grad_enabled():
        return share > 0
    # A number that no row has: a step's draw is not one of its rows'.
    generator = generator_of(stage.recipe.seed, stage.number, 2**41 + step)
    return bool(torch.rand((), generator=generator) < share)


def _prior_work(recipe: Recipe, section: Any, vae: TextVAEConfig, learns: Any, masked: bool) -> Work:
    """Return what a step in which the DiT learns computes."""
    # Rows encoded once more for what is clean inside a block: drawn prefixes, or the ends of prompts.
    conversations = any(source.format != "text" for source in recipe.data.sources)
    prefixes = 1.0 if conversations else min(1.0, section.prefix_share * section.length / vae.block_tokens)
    further = section if isinstance(section, PriorTerms) else None
    return Work(
        learns,
        section.rows,
        section.length,
        section.copies,
        masked,
        prefixes,
        per_block=section.timestep_per == "block",
        guesses=section.self_conditioning,
        consistency=further is not None and further.consistency > 0,
        dropout=further is not None and further.dropout > 0,
    )
