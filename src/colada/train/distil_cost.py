"""What frozen models cost: a teacher beside its student and before it, answers, and a judge of them.

Counted as in :mod:`colada.train.cost`. A pass of a frozen teacher over a step's rows costs the DiT's forward
pass, guided with an unconditional copy beside each conditional one, whose blocks see themselves only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from colada.flow import evaluations_of
from colada.locate import DECODER_DIR
from colada.models.bound import SETTINGS
from colada.models.load import read_decoder_config
from colada.networks.checkpoint import read_configs
from colada.networks.config import DiTConfig, TextVAEConfig
from colada.networks.dit import DiT
from colada.train.cost import (
    Phase,
    Placement,
    adaln_entries,
    block_causal_pairs,
    decoder_flops,
    encoder_flops,
    networks,
    parameter_counts,
    prior_flops,
    two_copy_pairs,
)
from colada.train.kinds import TaughtSection
from colada.train.recipe import Recipe
from colada.train.trajectories import fine_grid


def teacher_pass(vae: TextVAEConfig, dit: DiTConfig, section: TaughtSection) -> float:
    """Return the FLOPs of a frozen pass over a step's rows."""
    _, prior = networks(vae, dit)
    guided = section.guidance != 1
    blocks, size = section.length // vae.block_tokens, dit.block_size // dit.patch_size
    copies = section.copies * (1 + guided)
    pairs = two_copy_pairs(blocks, size, section.copies) + guided * section.copies * blocks * size**2
    row = prior_flops(prior, (blocks - 1 + copies * blocks) * size, pairs)
    timesteps = section.batch * copies * (blocks if section.timestep_per == "block" else 1) + (blocks > 1)
    return section.batch * row + 2 * timesteps * adaln_entries(prior)


def with_teacher(
    phase: Phase,
    vae: TextVAEConfig,
    dit: DiTConfig,
    section: TaughtSection,
    passes: float,
) -> Phase:
    """Return steps with so many passes of a frozen teacher in each, and the memory that it takes."""
    memory = 4 * parameter_counts(vae, dit)["DiT"] / phase.placement.shards
    parts = {"teacher": passes * teacher_pass(vae, dit, section)} if passes else {}
    return replace(phase, flops={**phase.flops, **parts}, memory={**phase.memory, "teacher": memory})


def writing_flops(prior: DiT, blocks: int, evaluations: int, guided: bool, before: int = 0) -> int:
    """Return the FLOPs of the DiT where the engine writes blocks of a row, after ``before`` others.

    A block takes a row of positions for each evaluation, two where it is guided, and one for the KV cache;
    the modulation is a table.
    """
    size = prior.config.block_size // prior.config.patch_size
    seen = block_causal_pairs(before + blocks, size) - block_causal_pairs(before, size)
    pairs = (evaluations + 1) * seen + evaluations * guided * blocks * size**2
    return prior_flops(prior, blocks * size * (evaluations * (1 + guided) + 1), pairs)


def judge_cost(directory: Path, texts: int, tokens: int) -> tuple[float, float]:
    """Return the FLOPs of a judge's pass over texts, and the bytes of its weights, whole on every rank.

    A baseline reads them once, one for masked tokens as often as its bound has samples. Of a Cola DLM, whose
    bound integrates its flow, weights are counted alone.
    """
    if not (directory / DECODER_DIR).is_dir():
        return 0.0, 4.0 * sum(parameter_counts(*read_configs(directory)).values())
    config = read_decoder_config(directory)
    passes = SETTINGS[config.objective].get("samples", 1)
    return passes * sum(decoder_flops(config, texts, tokens).values()) / 3, 4.0 * config.parameters


def with_trajectories(
    phase: Phase, recipe: Recipe, name: str, section: TaughtSection, vae: TextVAEConfig, dit: DiTConfig
) -> list[Phase]:
    """Return a stage's steps and, if it is the first to use them, what making its trajectories takes."""
    trajectories, trained = section.trajectories, recipe.trained.items()
    users = [
        other
        for other, other_section in trained
        if isinstance(other_section, TaughtSection)
        and other_section.steps
        and other_section.trajectories == trajectories
    ]
    if trajectories is None or name != next(iter(users), None):
        return [phase]
    return [phase, trajectories_phase(f"{name}, trajectories", vae, dit, section, phase.placement)]


def trajectories_phase(
    name: str, vae: TextVAEConfig, dit: DiTConfig, section: TaughtSection, placement: Placement
) -> Phase:
    """Return what the engine computes to make trajectories, each block after its row's clean ones.

    A step is a row; none of its tokens is trained on.
    """
    trajectories, guided = section.trajectories, section.guidance != 1
    assert trajectories is not None
    text, prior = networks(vae, dit)
    grid = fine_grid(trajectories)
    evaluations = len(evaluations_of(trajectories.solver, grid, len(grid) - 1))
    blocks = section.length // vae.block_tokens
    counts = parameter_counts(vae, dit)
    memory = {"frozen networks": 4.0 * counts["Text VAE"], "teacher": 4.0 * counts["DiT"]}
    work = {"evaluations": evaluations, "guided": guided, "length": section.length}
    written = writing_flops(prior, blocks, evaluations, guided)
    flops = {"encoder": float(encoder_flops(vae, text, blocks)), "DiT": float(written)}
    return Phase(name, trajectories.rows, 0, flops, memory, placement, work, 0.0)
