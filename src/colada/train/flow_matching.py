"""Flow matching over all blocks of rows at once: the error of the predicted velocity, L_FM.

The flow term is the squared velocity error per latent number. Rows are (B, M, C) latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colada.data.rows import Batch
from colada.flow import LOSS_SPACES, MIN_A, PREDICTIONS, T, interpolate, z0_from_velocity
from colada.networks.dit import DiT, Timesteps
from colada.networks.packing import Layout
from colada.networks.vae import TextVAE
from colada.train.noise import Counts, Draws, given_tokens, pinned_latents, sample_of_latents

TIME_BINS = 10  # Equal bins of [0, T) for the flow loss by timestep.


@dataclass(frozen=True)
class Pinned:
    """Clean latents of noisy copies: where (B, M) bool, and their values (B, M, C), without gradient."""

    where: Tensor
    latents: Tensor


def flow_errors(
    dit: DiT,
    z0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    pinned: Pinned | None = None,
    sample: Tensor | None = None,
    alone: Tensor | None = None,
    self_conditioned: bool = False,
) -> Tensor:
    """Return the error ||v_psi(z_t^b, t; z0^<b) - (z1 - z0)||^2 per latent number, all blocks at once.

    One pass over ``[clean | noisy 1 | ... | noisy K]``. The clean copy (history) and the target
    carry no gradient: z0 is reached through z_t only. Pinned positions are clean (t = 0)
    and have no error. A network that predicts z0 has its error divided by max(a, 0.1), which makes it
    the velocity's (:data:`colada.flow.PREDICTIONS`).

    Args:
        z0: (B, M, C) normalised latents.
        noise: (B, K, M, C), z1 of each copy.
        timestep: (B, K, M), constant within a block.
        pinned: the same in every copy.
        sample: (B, M), the sample of its row that a latent belongs to; samples do not see each other.
        alone: bool (B, K, M / block_size), noisy blocks that see no clean cell; none by default.
        self_conditioned: let a first pass without gradient guess z0, and the second one take that guess
            (arXiv:2208.04202).

    Returns: (B, K, M), 0 at pinned positions.
    """
    rows, copies, length, width = noise.shape
    size = dit.config.block_size
    clean = z0.detach()
    z_t = interpolate(z0[:, None], noise, timestep / T)
    # One table row for t = 0, then one per block of each copy.
    times = torch.cat([timestep.new_zeros(1), timestep[..., ::size].flatten()])
    row = torch.arange(1, len(times), device=times.device).view(rows, copies, -1).repeat_interleave(size, 2)
    if pinned is not None:
        where = pinned.where[:, None]
        z_t = torch.where(where[..., None], pinned.latents[:, None], z_t)
        row = row.masked_fill(where, 0)
    history = clean[:, : length - size]
    packed = torch.cat([history, z_t.flatten(1, 2)], 1).flatten(0, 1)
    row = torch.cat([row.new_zeros(history.shape[:2]), row.flatten(1)], 1).flatten()
    layout = dit.two_copy_layout(rows, length, copies, sample, alone=alone)
    prediction, guess = PREDICTIONS[dit.config.prediction], None
    if self_conditioned:
        with torch.no_grad():
            output = dit(packed, Timesteps(times, row), layout, noisy_only=True)
            a = times[row.view(rows, -1)[:, history.shape[1] :].flatten()] / T
            noisy = z_t.detach().flatten(0, 2)
            guessed = z0_from_velocity(noisy, prediction.velocity(noisy, output, a), a)
            guess = torch.cat([torch.zeros_like(history), guessed.view(rows, -1, width)], 1).flatten(0, 1)
    output = dit(packed, Timesteps(times, row), layout, noisy_only=True, guess=guess)
    error = prediction.error(output.view_as(noise), clean[:, None], noise, timestep / T)
    squared = error.square().mean(-1)
    return squared if pinned is None else squared.masked_fill(pinned.where[:, None], 0.0)


@torch.no_grad()
def pin(vae: TextVAE, batch: Batch, draws: Draws, layout: Layout, pad_id: int) -> Pinned | None:
    """Return the pinned latents of a batch, None if it cannot have any.

    The clean part of a block is encoded as a prompt that ends there: with
    padding to the end of its block, as the posterior mean. Encoded with the tokens that
    follow, it would tell the DiT about them.
    """
    if draws.prefix is None and batch.trained is None:
        return None
    block, patch = vae.config.block_tokens, vae.config.patch_size
    given = given_tokens(batch, draws, patch)
    follows = given.unflatten(1, (-1, block)).any(-1).repeat_interleave(block, 1) & ~given
    # Encoded even if nothing follows in any block, so that all ranks of a sharded network run alike.
    mean = vae.normalise(vae.encoder(batch.ids.masked_fill(follows, pad_id).flatten(), layout).mean)
    return Pinned(pinned_latents(given, patch), mean.view(len(batch), -1, vae.config.latent_dim))


def flow_matching(
    vae: TextVAE,
    dit: DiT,
    batch: Batch,
    draws: Draws,
    z0: Tensor,
    layout: Layout,
    pad_id: int,
    counts: Counts,
    space: str = "velocity",
    self_conditioned: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return L_FM of a batch, and its terms by name, which are of the velocity in any space.

    Args:
        z0: (B * M, C) as sampled, not normalised.
        space: a name in :data:`colada.flow.LOSS_SPACES`.
        self_conditioned: see :func:`flow_errors`.
    """
    assert draws.timestep is not None
    assert draws.noise is not None
    z0 = vae.normalise(z0).view(len(batch), -1, vae.config.latent_dim)
    pinned = pin(vae, batch, draws, layout, pad_id)
    sample = sample_of_latents(batch, vae.config.patch_size)
    errors = flow_errors(dit, z0, draws.noise, draws.timestep, pinned, sample, draws.alone, self_conditioned)
    weight = (draws.timestep / T).clamp_min(MIN_A) ** LOSS_SPACES[space]
    total, flow = (errors * weight).sum() / counts.noisy, errors.detach().sum() / counts.noisy
    free = torch.ones_like(errors) if pinned is None else (~pinned.where[:, None]).expand_as(errors).float()
    bins = (draws.timestep * (TIME_BINS / T)).long().clamp_max(TIME_BINS - 1).flatten()
    zeros = errors.new_zeros(TIME_BINS)
    sums = zeros.index_add(0, bins, errors.detach().flatten())
    return total, {"flow": flow, "flow_sums": sums, "flow_counts": zeros.index_add(0, bins, free.flatten())}
