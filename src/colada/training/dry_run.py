"""What a recipe will compute and need, before anything is trained."""

from __future__ import annotations

from colada.checkpoint import locate, read_configs
from colada.config import DiTConfig, TextVAEConfig
from colada.tokenizer import Tokenizer
from colada.training.plan import Phase, Placement, Plan, Work
from colada.training.recipe import Recipe


def step_work(recipe: Recipe, stage: int, vae: TextVAEConfig, joint: bool = False) -> Work:
    """Return what a step of a stage computes; ``joint`` says whether the Text VAE learns in stage 2."""
    section, two = recipe.stage(stage), recipe.stage2
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
    vae, dit = configs_of(recipe)
    phases = []
    for number in (1, 2):
        section = recipe.stage(number)
        placement = Placement(
            micro_batch=section.micro_batch or max(1, section.batch // ranks),
            shards=ranks // recipe.run.replicas if recipe.run.shard else 1,
            checkpointing=recipe.run.checkpoint_activations,
            bfloat16=recipe.run.precision == "bfloat16",
            muon=section.optimiser == "muon",
            ema=section.ema > 0,
        )
        joint = sum(recipe.stage2.joint_at(step) for step in range(section.steps)) if number == 2 else 0
        parts = [("stage 1", section.steps, False)]
        if number == 2:
            parts = [
                ("stage 2, joint", joint, True),
                ("stage 2, frozen Text VAE", section.steps - joint, False),
            ]
        for name, steps, learns in parts:
            if steps:
                phases.append(Phase(name, steps, step_work(recipe, number, vae, learns), placement))
    return Plan(vae, dit, tuple(phases))


def configs_of(recipe: Recipe) -> tuple[TextVAEConfig, DiTConfig]:
    """Return both configurations of a recipe, without its data.

    Raises:
        ColadaError: for settings that do not fit each other, or a model to continue from that is not there.
    """
    file, init = recipe.tokenizer.file, recipe.model.init
    size = recipe.tokenizer.vocab_size if file is None else Tokenizer.from_file(file).vocab_size
    if init is None:
        return recipe.configs(size, pad_id=size - 1)  # Which id it is changes no size.
    vae, dit = read_configs(locate(init))
    recipe.check_configs(vae, dit, vae.vocab_size if file is None else size)
    return vae, dit
