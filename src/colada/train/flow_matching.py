"""Flow matching over all blocks of rows at once: the error of the predicted velocity, L_FM.

The flow term is the squared velocity error per latent number. Rows are (B, M, C) latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from colada.data.rows import Batch
from colada.flow import LOSS_SPACES, MIN_A, PREDICTIONS, T, TimestepLaw, interpolate, z0_from_velocity
from colada.networks.dit import DiT, Timesteps
from colada.networks.dropout import Dropout
from colada.networks.packing import Layout
from colada.networks.vae import TextVAE
from colada.train.noise import Counts, StepNoise, given_tokens, pinned_latents, sample_of_latents
from colada.train.timesteps import BINS, bin_of

TIME_BINS = 10  # Equal bins of [0, T) for the flow loss by timestep.


@dataclass(frozen=True)
class Pinned:
    """Clean latents of noisy copies: where (B, M) bool, and their values (B, M, C), without gradient."""

    where: Tensor
    latents: Tensor


class FlowLatents(NamedTuple):
    """Rows as the flow is learnt on them.

    Attributes:
        clean: normalised latents (B, M, C), with a gradient where the Text VAE learns.
        pinned: those that noisy copies have in their places too; None: there cannot be any.
        sample: (B, M), the sample of its row that a latent belongs to; None where every row is one.
    """

    clean: Tensor
    pinned: Pinned | None
    sample: Tensor | None


@dataclass(frozen=True)
class Consistency:
    """Self-trajectory consistency (arXiv:2608.02602): a guess should not change along its own path.

    Attributes:
        teacher: averaged weights of the network that learns.
        weight: of its term.
        steps: of the uniform grid, to the next point of which a guess moves a block.
    """

    teacher: DiT
    weight: float
    steps: int


@dataclass(frozen=True)
class FlowStep:
    """How a step of flow matching makes and counts its errors.

    Attributes:
        space: a name in :data:`colada.flow.LOSS_SPACES`.
        self_conditioned: the DiT takes its own guess of z0 as a second input; see :func:`noisy_pass`.
        dropout: share of what attention and MLP add that is dropped, where gradients are wanted.
        consistency: a further term, or None.
        law: of the timesteps, whose quantiles are told apart in the terms; None: they are not.
    """

    space: str = "velocity"
    self_conditioned: bool = False
    dropout: float = 0.0
    consistency: Consistency | None = None
    law: TimestepLaw | None = None


PLAIN = FlowStep()


def place(z: Tensor, pinned: Pinned | None) -> Tensor:
    """Return noisy copies (B, K, M, C) with the pinned latents in their places."""
    return z if pinned is None else torch.where(pinned.where[:, None, :, None], pinned.latents[:, None], z)


def predict(
    dit: DiT,
    z: Tensor,
    timestep: Tensor,
    clean: Tensor,
    pinned: Pinned | None = None,
    sample: Tensor | None = None,
    alone: Tensor | None = None,
    guess: Tensor | None = None,
    end: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Return the network's output (B, K, M, C) for noisy copies of rows, all blocks at once.

    One pass over ``[clean | noisy 1 | ... | noisy K]``: every noisy block follows the clean blocks before it.
    The output of a block that is wholly pinned is not wanted, and may be 0.

    Args:
        z: (B, K, M, C), pinned latents in place, see :func:`place`.
        timestep: (B, K, M), constant within a block; pinned latents are passed as t = 0 whatever it says.
        clean: (B, M, C) normalised latents, the history of later blocks.
        pinned: where, the same in every copy.
        sample: (B, M), the sample of its row that a latent belongs to; samples do not see each other.
        alone: bool (B, K, M / block_size), noisy blocks that see no clean cell; none by default.
        guess: (B, K, M, C), the second input of a network with self-conditioning.
        end: (B, K, M), constant within a block: where its step ends, which a network with landing times sees.
        dropout: of the rows.
    """
    rows, copies, length, _ = z.shape
    size = dit.config.block_size
    # One table row for t = 0, then one per block of each copy.
    at = [None if moments is None else moments[..., ::size].flatten() for moments in (timestep, end)]
    times, ends = (None if moments is None else torch.cat([moments.new_zeros(1), moments]) for moments in at)
    assert times is not None
    row = torch.arange(1, len(times), device=times.device).view(rows, copies, -1).repeat_interleave(size, 2)
    if pinned is not None:
        row = row.masked_fill(pinned.where[:, None], 0)
    history = clean[:, : length - size]
    needed = None
    if pinned is not None and dropout is None:
        needed = dit.needed_layout(~pinned.where.unflatten(1, (-1, size)).all(2), copies, sample, alone)
    layout, cells_needed = needed or (dit.two_copy_layout(rows, length, copies, sample, alone=alone), None)

    def packed(of_clean: Tensor, of_noisy: Tensor) -> Tensor:
        cells = torch.cat([of_clean, of_noisy.flatten(1, 2)], 1)
        return cells.flatten(0, 1) if cells_needed is None else cells[cells_needed]

    steps = Timesteps(times, packed(row.new_zeros(history.shape[:2]), row), ends)
    seen = None if guess is None else packed(torch.zeros_like(history), guess)
    output: Tensor = dit(packed(history, z), steps, layout, noisy_only=True, guess=seen, dropout=dropout)
    if cells_needed is not None:
        where = cells_needed[:, history.shape[1] :].flatten().nonzero().flatten()
        output = output.new_zeros(rows * copies * length, output.shape[1]).index_copy(0, where, output)
    return output.view_as(z)


def guess_of_z0(dit: DiT, z: Tensor, output: Tensor, timestep: Tensor, pinned: Pinned | None) -> Tensor:
    """Return the z0 (B, K, M, C) that an output points at: pinned latents at themselves."""
    a = timestep / T if pinned is None else (timestep / T).masked_fill(pinned.where[:, None], 0.0)
    z, output, a = z.flatten(0, 2), output.flatten(0, 2), a.flatten()
    velocity = PREDICTIONS[dit.config.prediction].velocity(z, output, a)
    return z0_from_velocity(z, velocity, a).view(*timestep.shape, -1)


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

    The clean copy (history) and the target carry no gradient: z0 is reached through z_t only. Pinned
    positions are clean (t = 0) and have no error. A network that predicts z0 has its error divided by
    max(a, 0.1), which makes it the velocity's (:data:`colada.flow.PREDICTIONS`).

    Args:
        z0: (B, M, C) normalised latents.
        noise: (B, K, M, C), z1 of each copy.
        timestep, pinned, sample, alone: see :func:`predict`.
        self_conditioned: let a first pass without gradient guess z0, and the second one take that guess
            (arXiv:2208.04202).

    Returns: (B, K, M), 0 at pinned positions.
    """
    z_t = place(interpolate(z0[:, None], noise, timestep / T), pinned)
    output = noisy_pass(dit, z_t, timestep, z0.detach(), pinned, sample, alone, self_conditioned)
    return _errors(dit, output, z0.detach()[:, None], noise, timestep, pinned)


def noisy_pass(
    dit: DiT,
    z: Tensor,
    timestep: Tensor,
    clean: Tensor,
    pinned: Pinned | None = None,
    sample: Tensor | None = None,
    alone: Tensor | None = None,
    self_conditioned: bool = False,
    dropout: Dropout | None = None,
) -> Tensor:
    """Return the output of :func:`predict`; self-conditioned, one that has seen the guess of a first pass."""
    guess = None
    if self_conditioned:
        with torch.no_grad():
            output = predict(dit, z, timestep, clean, pinned, sample, alone)
            guess = guess_of_z0(dit, z, output, timestep, pinned)
    return predict(dit, z, timestep, clean, pinned, sample, alone, guess, dropout=dropout)


def _errors(
    dit: DiT, output: Tensor, z0: Tensor, noise: Tensor, timestep: Tensor, pinned: Pinned | None
) -> Tensor:
    error = PREDICTIONS[dit.config.prediction].error(output, z0, noise, timestep / T)
    return _free(error.square().mean(-1), pinned)


def guess_errors(
    dit: DiT, output: Tensor, z: Tensor, guess: Tensor, timestep: Tensor, pinned: Pinned | None
) -> Tensor:
    """Return the error (B, K, M) of an output for z whose guess of z0 should be ``guess``, as a velocity's.

    The noise is what lies at the other end of the line from the guess through z.
    """
    a = timestep / T
    noise = guess + (z - guess) / a.clamp_min(MIN_A * 1e-2)[..., None]
    return _errors(dit, output, guess, noise, timestep, pinned)


def _free(values: Tensor, pinned: Pinned | None) -> Tensor:
    """Return values (B, K, M), 0 at pinned positions."""
    return values if pinned is None else values.masked_fill(pinned.where[:, None], 0.0)


def consistency_errors(
    dit: DiT,
    consistency: Consistency,
    z: Tensor,
    output: Tensor,
    timestep: Tensor,
    clean: Tensor,
    pinned: Pinned | None = None,
    sample: Tensor | None = None,
    alone: Tensor | None = None,
    self_conditioned: bool = False,
) -> Tensor:
    """Return ||x(z, t) - sg x_teacher(z', t')||^2 per latent number, (B, K, M), x the guess of z0.

    t' is the next point of the grid below t, and z' where a step along the network's own guess leads:
    z' = x + t'/t (z - x). At t' = 0 that is the guess itself, and the error 0.

    Args:
        z, output: (B, K, M, C), see :func:`noisy_pass`.
        timestep, clean, pinned, sample, alone: see :func:`predict`.
        self_conditioned: the teacher is given the guess, as it would be in generation.
    """
    guess, steps = guess_of_z0(dit, z, output, timestep, pinned), consistency.steps
    with torch.no_grad():
        below = (torch.ceil(timestep / T * steps) - 1).clamp_min(0) * (T / steps)
        ratio = (below / timestep.clamp_min(1e-6))[..., None]
        stepped, seen = place(torch.lerp(guess, z, ratio), pinned), guess if self_conditioned else None
        later = predict(consistency.teacher, stepped, below, clean, pinned, sample, alone, seen)
        target = guess_of_z0(consistency.teacher, stepped, later, below, pinned)
    return _free((guess - target).square().mean(-1), pinned)


@torch.no_grad()
def pin(vae: TextVAE, batch: Batch, noise: StepNoise, layout: Layout, pad_id: int) -> Pinned | None:
    """Return the pinned latents of a batch, None if it cannot have any.

    The clean part of a block is encoded as a prompt that ends there: with
    padding to the end of its block, as the posterior mean. Encoded with the tokens that
    follow, it would tell the DiT about them.
    """
    if noise.prefix is None and batch.trained is None:
        return None
    block, patch = vae.config.block_tokens, vae.config.patch_size
    given_mask = given_tokens(batch, noise, patch)
    follows = given_mask.unflatten(1, (-1, block)).any(-1).repeat_interleave(block, 1) & ~given_mask
    # Encoded even if nothing follows in any block, so that all ranks of a sharded network run alike.
    mean = vae.normalise(vae.encoder(batch.ids.masked_fill(follows, pad_id).flatten(), layout).mean)
    return Pinned(pinned_latents(given_mask, patch), mean.view(len(batch), -1, vae.config.latent_dim))


def flow_latents(
    vae: TextVAE, batch: Batch, noise: StepNoise, z0: Tensor, layout: Layout, pad_id: int
) -> FlowLatents:
    """Return the latents of a batch, of which z0 (B * M, C) is drawn and not normalised."""
    clean = vae.normalise(z0).view(len(batch), -1, vae.config.latent_dim)
    pinned = pin(vae, batch, noise, layout, pad_id)
    return FlowLatents(clean, pinned, sample_of_latents(batch, vae.config.patch_size))


def flow_matching(
    dit: DiT, latents: FlowLatents, noise: StepNoise, counts: Counts, step: FlowStep = PLAIN
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return L_FM of a batch, and its terms by name, which are of the velocity in any space."""
    assert noise.timestep is not None
    assert noise.z1 is not None
    z1, timestep, alone = noise.z1, noise.timestep, noise.alone
    z0, pinned, sample = latents
    z, clean = place(interpolate(z0[:, None], z1, timestep / T), pinned), z0.detach()
    guesses = step.self_conditioned
    dropout = None
    if noise.dropout is not None and torch.is_grad_enabled():
        dropout = Dropout(noise.dropout, step.dropout)
    output = noisy_pass(dit, z, timestep, clean, pinned, sample, alone, guesses, dropout)
    errors = _errors(dit, output, clean[:, None], z1, timestep, pinned)
    total, terms = weighed(errors, timestep, pinned, counts, step.space)
    if step.consistency is not None:
        seen = (timestep, clean, pinned, sample, alone, guesses)
        changes = consistency_errors(dit, step.consistency, z.detach(), output, *seen)
        terms["consistency"] = changes.sum() / counts.noisy
        total = total + step.consistency.weight * terms["consistency"]
    if step.law is not None:
        sums, numbers = _by_bin(errors, pinned, bin_of(step.law, timestep), BINS)
        terms |= {"quantile_sums": sums, "quantile_counts": numbers}
    return total, terms


def weighed(
    errors: Tensor, timestep: Tensor, pinned: Pinned | None, counts: Counts, space: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss that errors of the velocity (B, K, M) come to, and its terms, not weighed."""
    weight = (timestep / T).clamp_min(MIN_A) ** LOSS_SPACES[space]
    total, flow = (errors * weight).sum() / counts.noisy, errors.detach().sum() / counts.noisy
    bins = (timestep * (TIME_BINS / T)).long().clamp_max(TIME_BINS - 1)
    sums, numbers = _by_bin(errors, pinned, bins, TIME_BINS)
    return total, {"flow": flow, "flow_sums": sums, "flow_counts": numbers}


def _by_bin(errors: Tensor, pinned: Pinned | None, bins: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the sums (count,) of errors (B, K, M) by bin, and of how many latents each is."""
    free, zeros = _free(torch.ones_like(errors), pinned).float(), errors.new_zeros(count)
    sums = zeros.index_add(0, bins.flatten(), errors.detach().flatten())
    return sums, zeros.index_add(0, bins.flatten(), free.flatten())
