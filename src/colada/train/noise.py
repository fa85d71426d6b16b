"""What a training step draws of a batch, and what the sums of its loss are divided by.

Everything random is drawn first, row by row, each from a generator of its own (:func:`draw_noise`), so
that a loss is a plain function of networks, batch and noise, and a row's noise depends neither on the batch
it is in nor on the device. B rows of L tokens are (B, M, C) latents, M = L / patch_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from colada.data.rows import Batch, RowTensors
from colada.flow import TimestepLaw, calibrated_loc
from colada.networks.config import TextVAEConfig
from colada.train.kinds import FlowTerms, PriorTerms, TextVAETerms


def timestep_law(flow: FlowTerms, latent_dim: int) -> TimestepLaw:
    """Return the law of the training timesteps; an unset loc is the paper's for this latent width."""
    return TimestepLaw(calibrated_loc(latent_dim) if flow.loc is None else flow.loc, flow.scale)


@dataclass(frozen=True)
class StepNoise(RowTensors):
    """Everything random in the loss of a batch; K is the number of noisy copies.

    Attributes:
        posterior: (B, M, C), standard normal noise of z0 ~ q.
        masked: bool (B, L), encoder input tokens that L_mask hides; None without that term.
        masked_posterior: (B, M, C), noise of that stream.
        timestep: (B, K, M) in 0..1000, constant within a block; None where no DiT learns.
        z1: (B, K, M, C), the end of each copy's path.
        prefix: bool (B, M), latents that stay clean at the beginning of a block.
        alone: bool (B, K, M / block_size), noisy blocks that lose sight of all clean cells; None without
            history dropout.
        dropout: int32 (B,), seeds of its masks; None without.
    """

    posterior: Tensor
    masked: Tensor | None = None
    masked_posterior: Tensor | None = None
    timestep: Tensor | None = None
    z1: Tensor | None = None
    prefix: Tensor | None = None
    alone: Tensor | None = None
    dropout: Tensor | None = None


def draw_noise(
    generators: Sequence[torch.Generator],
    config: TextVAEConfig,
    length: int,
    terms: TextVAETerms | None = None,
    flow: FlowTerms | None = None,
) -> StepNoise:
    """Draw what the loss of a batch needs, each row from a CPU generator of its own.

    A row's noise therefore depends neither on the batch it is in nor on the device.

    Args:
        generators: one a row.
        length: tokens a row.
        terms: for a Text VAE that learns; L_mask has noise if it has a weight.
        flow: for a DiT that learns. At most one block a row keeps a clean prefix, so no more than 1 in
            M / block_size, and none in samples with a prompt of their own.
    """
    latents, block = length // config.patch_size, config.block_size
    shape = (latents, config.latent_dim)
    law = timestep_law(flow or FlowTerms(), config.latent_dim)
    drawn: dict[str, list[Tensor]] = {f.name: [] for f in fields(StepNoise)}
    for generator in generators:
        drawn["posterior"].append(torch.randn(shape, generator=generator))
        if terms is not None and terms.mask > 0:
            drawn["masked"].append(torch.rand(length, generator=generator) < terms.mask_ratio)
            drawn["masked_posterior"].append(torch.randn(shape, generator=generator))
        if flow is not None:
            times = law.sample(
                (flow.copies, latents // block if flow.timestep_per == "block" else 1), generator
            )
            times = times.expand(flow.copies, latents // block)
            drawn["timestep"].append(times.repeat_interleave(block, 1))
            drawn["z1"].append(torch.randn((flow.copies, *shape), generator=generator))
            if flow.prefix_share > 0:
                drawn["prefix"].append(_draw_prefix(latents, block, flow.prefix_share, generator))
            if flow.history_dropout > 0:
                chances = torch.rand(flow.copies, latents // block, generator=generator)
                drawn["alone"].append(chances < flow.history_dropout)
            if isinstance(flow, PriorTerms) and flow.dropout > 0:
                drawn["dropout"].append(torch.randint(2**31, (), generator=generator, dtype=torch.int32))
    return StepNoise(**{name: torch.stack(parts) for name, parts in drawn.items() if parts})


def _draw_prefix(latents: int, block: int, share: float, generator: torch.Generator) -> Tensor:
    """Choose the clean prefix of at most one block of a row: bool (M,)."""
    blocks, position = latents // block, torch.arange(latents)
    chosen = torch.rand((), generator=generator) < share * blocks
    at = torch.randint(blocks, (), generator=generator) * block
    size = torch.randint(1, max(block, 2), (), generator=generator)
    return (position >= at) & (position < at + size) & chosen & (block > 1)


@dataclass(frozen=True)
class Counts:
    """What the sums of a step's loss are divided by: whole step, all micro-batches and ranks.

    Attributes:
        tokens: those of samples, not what rows are filled up with.
        latents: likewise.
        noisy: noisy latents with a loss, over all copies.
        pictures: noisy latents of pictures; pictures, where a codec learns.
        captions, answers: noisy latents of these.
    """

    tokens: float
    latents: float
    noisy: float
    pictures: float = 0.0
    captions: float = 0.0
    answers: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


def count(batch: Batch, noise: StepNoise, config: TextVAEConfig) -> Counts:
    """Return a batch's share in the counts of its step."""
    free = ~pinned_latents(given_tokens(batch, noise, config.patch_size), config.patch_size)
    copies = 0 if noise.timestep is None else noise.timestep.shape[1]
    tokens = batch.ids.numel() if batch.sample is None else int((batch.sample >= 0).sum())
    return Counts(tokens, tokens / config.patch_size, int(free.sum()) * copies)


def given_tokens(batch: Batch, noise: StepNoise, patch: int) -> Tensor:
    """Return which tokens are not the flow's to generate: prompts, filling, drawn prefixes; bool (B, L).

    A prefix in a sample with a prompt is left out: it would be encoded after the prompt's padding.
    """
    given_mask = torch.zeros_like(batch.ids, dtype=torch.bool) if batch.trained is None else ~batch.trained
    if noise.prefix is None:
        return given_mask
    prefix = noise.prefix.repeat_interleave(patch, 1)
    if batch.trained is not None:
        sample = torch.zeros_like(batch.ids) if batch.sample is None else batch.sample
        around = sample == sample.gather(1, prefix.int().argmax(1, keepdim=True))
        prefix = prefix & ~(given_mask & around).any(1, keepdim=True)
    return given_mask | prefix


def pinned_latents(given_mask: Tensor, patch: int) -> Tensor:
    """Return which latents are clean and have no flow loss, bool (B, M): those with a given token."""
    return given_mask.unflatten(1, (-1, patch)).any(-1)


def sample_of_latents(batch: Batch, patch: int) -> Tensor | None:
    """Return which sample each latent (B, M) belongs to; None where every row is one sample."""
    return None if batch.sample is None else batch.sample[:, patch - 1 :: patch]
