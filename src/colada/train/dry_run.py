"""What a recipe will compute and need, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import torch

from colada.device import memory_of
from colada.errors import ColadaError
from colada.locate import DECODER_DIR, locate
from colada.models.base import ARCHITECTURES
from colada.models.cola import KINDS
from colada.models.load_decoder import read_decoder_config
from colada.networks.checkpoint import read_configs
from colada.networks.config import DiTConfig, TextVAEConfig
from colada.networks.decoder_config import DecoderConfig, matched_config
from colada.train.decoder_plan import decoder_flops, decoder_parameters, decoder_phase
from colada.train.environment import ranks_here
from colada.train.parallel import Ranks
from colada.train.plan import Phase, Placement, Plan, Work, cola_phase, parameter_counts, scaled
from colada.train.recipe import Recipe, vocab_size
from colada.train.sections import OptimiserSection

_SHAPE = ("dim", "num_layers", "num_heads", "ffn_dim")
"""Keys of ``model.decoder`` that decide a baseline's parameters."""


def step_work(recipe: Recipe, stage: int, vae: TextVAEConfig, joint: bool = False) -> Work:
    """Return what a step of a stage computes; ``joint`` says whether the Text VAE learns in stage 2."""
    section, two = recipe.stage1 if stage == 1 else recipe.stage2, recipe.stage2
    masked = recipe.stage1.mask > 0
    if stage == 1:
        return Work(1, section.batch, section.length, masked=masked)
    # Rows encoded once more for what is clean inside a block: drawn prefixes, or the ends of prompts.
    conversations = any(source.format != "text" for source in recipe.data.sources)
    prefixes = 1.0 if conversations else min(1.0, two.prefix_share * section.length / vae.block_tokens)
    per_block = two.timestep_per == "block"
    return Work(2, section.batch, section.length, two.copies, joint, masked, prefixes, per_block)


def plan_run(recipe: Recipe, ranks: int) -> Plan:
    """Return the plan of a run on so many ranks.

    Raises:
        ColadaError: for settings that do not fit each other, or a model to continue from that is not there.
    """
    recipe = resolve(recipe)
    KINDS[recipe.model.arch].check(recipe.own_generation, "recipe: generation")
    if recipe.model.arch == "cola":
        vae, dit = configs_of(recipe)
        return Plan(parameter_counts(vae, dit), tuple(_cola_phases(recipe, vae, dit, ranks)))
    config, section = decoder_config_of(recipe), recipe.baseline
    placement = _placement(recipe, section, ranks)
    phase = decoder_phase(config, section.steps, section.batch, section.length, placement)
    return Plan(decoder_parameters(config), (phase,))


def planned(recipe: Recipe, plan: Plan, ranks: Ranks, out: Path) -> list[str]:
    """Return what is going to be trained, on what, and for how long, in lines of a terminal's width."""
    where = str(ranks.device)
    if ranks.device.type == "cuda":
        where = torch.cuda.get_device_name(ranks.device)
    elif ranks.device.type == "cpu":
        threads = torch.get_num_threads()
        where = f"cpu with {threads} thread{'s' if threads > 1 else ''}"
    if ranks.size > 1:
        where += f", {ranks.size} ranks"
    parts = " + ".join(f"{name} {scaled(number)}" for name, number in plan.parameters.items())
    steps = " + ".join(f"{phase.steps:,}" for phase in plan.phases) or "0"
    return [
        f"training {ARCHITECTURES[recipe.model.arch]} in {out}: {parts} parameters",
        f"on {where}, {recipe.run.precision}; {steps} steps, {scaled(plan.tokens)} tokens",
    ]


def check_memory(plan: Plan, device: torch.device) -> None:
    """Raise ColadaError if a rank needs more memory than its device has."""
    there = memory_of(device)
    ranks = ranks_here() if device.type == "cpu" else 1
    for phase in plan.phases:
        needed = ranks * sum(phase.memory.values())
        if there is not None and needed > there:
            raise ColadaError(
                f"{phase.name} would take about {scaled(needed, 'B')} of memory, but {device} has "
                f"{scaled(there, 'B')}: expected a smaller batch or micro_batch, length, vocabulary or model"
            )


def _cola_phases(recipe: Recipe, vae: TextVAEConfig, dit: DiTConfig, ranks: int) -> list[Phase]:
    phases = []
    for number, section in ((1, recipe.stage1), (2, recipe.stage2)):
        placement = _placement(recipe, section, ranks)
        joint = recipe.stage2.joint_steps
        parts = [("stage 1", section.steps, False)]
        if number == 2:
            parts = [
                ("stage 2, joint", joint, True),
                ("stage 2, frozen Text VAE", section.steps - joint, False),
            ]
        for name, steps, learns in parts:
            if steps:
                work = step_work(recipe, number, vae, learns)
                phases.append(cola_phase(name, steps, vae, dit, work, placement))
    return phases


def _placement(recipe: Recipe, section: OptimiserSection, ranks: int) -> Placement:
    return Placement(
        micro_batch=section.micro_batch or max(1, section.batch // ranks),
        shards=max(1, ranks // recipe.run.replicas) if recipe.run.shard else 1,
        checkpointing=recipe.run.checkpoint_activations,
        bfloat16=recipe.run.precision == "bfloat16",
        muon=section.optimiser == "muon",
        ema=section.ema > 0,
    )


def resolve(recipe: Recipe) -> Recipe:
    """Return a recipe in which the baseline's section has what follows from Cola DLM's filled in.

    What that section leaves out of rows and optimiser is as in stage 2. Without a shape in
    ``model.decoder`` (and without ``model.init``) a baseline has as many parameters as Text VAE and DiT
    together, and first weights of spread dim^-1/2; without ``baseline.steps``, as many steps as
    take the FLOPs of both stages, everything counted.

    Raises:
        ColadaError: for settings that do not fit each other.
    """
    given = recipe.baseline.model_fields_set
    same = {
        name: getattr(recipe.stage2, name)
        for name in OptimiserSection.model_fields
        if name not in given and name != "steps"
    }
    if same:
        section = recipe.baseline.model_copy(update=same)
        recipe = recipe.model_copy(update={"baseline": section})
    if recipe.model.arch == "cola":
        return recipe
    if recipe.model.init is None and not set(_SHAPE) & recipe.model.decoder.keys():
        total = sum(parameter_counts(*_cola_configs(recipe)).values())
        config = matched_config(total, vocab_size(recipe), objective=recipe.model.arch)
        decoder = {name: getattr(config, name) for name in _SHAPE}
        decoder["init_std"] = round(config.dim**-0.5, 4)  # 0.02 at the width it is usual for
        decoder |= recipe.model.decoder
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"decoder": decoder})})
    section = recipe.baseline
    if recipe.model.arch == "llada" and section.llada_lr is not None:
        section = section.model_copy(update={"lr": section.llada_lr, "llada_lr": None})
        recipe = recipe.model_copy(update={"baseline": section})
    if section.steps == 0:
        if recipe.model.init is not None:
            raise ColadaError("recipe: baseline.steps=0 with model.init, expected a number of steps")
        vae, dit = _cola_configs(recipe)
        wanted = sum(phase.steps * sum(phase.flops.values()) for phase in _cola_phases(recipe, vae, dit, 1))
        if wanted == 0:
            raise ColadaError("recipe: baseline.steps=0 with no steps of stage1 and stage2 to match")
        each = sum(decoder_flops(decoder_config_of(recipe), section.batch, section.length).values())
        steps = max(1, round(wanted / each))
        recipe = recipe.model_copy(update={"baseline": section.model_copy(update={"steps": steps})})
    return recipe


def configs_of(recipe: Recipe) -> tuple[TextVAEConfig, DiTConfig]:
    """Return both configurations of a recipe, without its data.

    Raises:
        ColadaError: for settings that do not fit each other, or a model to continue from that is not there.
    """
    if recipe.model.init is None:
        return _cola_configs(recipe)
    vae, dit = read_configs(locate(recipe.model.init))
    own = recipe.tokenizer.file is None
    recipe.check_configs(vae, dit, vae.vocab_size if own else vocab_size(recipe))
    return vae, dit


def decoder_config_of(recipe: Recipe) -> DecoderConfig:
    """Return the configuration of a resolved baseline's recipe, without its data; raises as above."""
    init = recipe.model.init
    if init is None:
        return recipe.decoder_config(vocab_size(recipe), bos_id=0)  # Which id it is changes no size.
    directory = locate(init)
    if not (directory / DECODER_DIR).is_dir():
        raise ColadaError(f"model.init={init} is no baseline, expected one for arch={recipe.model.arch!r}")
    return read_decoder_config(directory)


def _cola_configs(recipe: Recipe) -> tuple[TextVAEConfig, DiTConfig]:
    size = vocab_size(recipe)
    return recipe.configs(size, pad_id=size - 1)  # Which id it is changes no size.
