"""The losses of both training stages, in the order of the equations they implement.

Units: likelihood, KL and entropy terms are nats per token; the flow term is
the squared velocity error per latent number. Rows all have the same length, so
a batch is (B, L) tokens and (B, M, C) latents, M = L / patch_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from colada.dit import DiT
from colada.flow import T, TimestepLaw, interpolate, target_velocity
from colada.vae import Posterior, TextVAE

Z0_MIN_A = 0.1  # Where z0 is predicted, its error counts as a velocity error at no smaller a than this.


@dataclass
class Loss:
    """A loss to minimise, and its terms as they are logged (detached, by name)."""

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class VAEWeights:
    """Weights of the Text VAE's terms.

    Attributes:
        beta: weight of KL(q || N(0, I)) in stage 1, of E log q in stage 2.
        mask: lambda_mask.
        mask_ratio: share of encoder input tokens replaced by the mask id.
        log_snr: fix log(E mu^2 / E sigma^2) to this; None learns it.
    """

    beta: float = 1e-3
    mask: float = 0.5
    mask_ratio: float = 0.15
    log_snr: float | None = None


@dataclass(frozen=True)
class FlowSettings:
    """How flow matching draws its examples.

    Attributes:
        law: of the training timesteps.
        per_block: one timestep per block, else one per row.
        prefix_share: share of blocks that keep a clean prefix inside, as when a prompt ends in a
            block; at most one a row, so no more than 1 in M / block_size.
    """

    law: TimestepLaw = field(default_factory=TimestepLaw)
    per_block: bool = True
    prefix_share: float = 0.05


# --- the Text VAE's terms ----------------------------------------------------------------------


def encode(vae: TextVAE, ids: Tensor, log_snr: float | None = None) -> Posterior:
    """Return q_phi(z0 | x) of rows (B, L), packed (B * M, C), with its log-SNR fixed if asked."""
    posterior = vae.encode(ids.flatten(), [ids.shape[1]] * ids.shape[0])
    if log_snr is None or posterior.logvar is None:
        return posterior
    variance = posterior.mean.detach().square().mean() * math.exp(-log_snr)
    return Posterior(posterior.mean, variance.log().expand_as(posterior.mean))


def reconstruction(vae: TextVAE, z0: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p_theta(x | z0) in nats per token, and the share of tokens the decoder gets right.

    The decoder sees normalised latents, as it does in generation.
    """
    lengths = [ids.shape[1] // vae.config.patch_size] * ids.shape[0]
    logits = vae.decode(vae.normalise(z0), lengths)
    accuracy = (logits.argmax(-1) == ids.flatten()).float().mean()
    return F.cross_entropy(logits, ids.flatten()), accuracy


def masked_reconstruction(
    vae: TextVAE, ids: Tensor, weights: VAEWeights, generator: torch.Generator
) -> Tensor:
    """Return L_mask, nats per token: -log p_theta(x | z0 of partly masked tokens); no KL here."""
    masked = torch.rand(ids.shape, generator=generator).to(ids.device) < weights.mask_ratio
    posterior = encode(vae, ids.masked_fill(masked, vae.config.mask_id), weights.log_snr)
    return reconstruction(vae, draw(posterior, generator), ids)[0]


def draw(posterior: Posterior, generator: torch.Generator) -> Tensor:
    """Draw z0 ~ q by reparametrisation, with noise from a CPU generator whatever the device."""
    if posterior.logvar is None:
        return posterior.mean
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean.device)
    return posterior.mean + (0.5 * posterior.logvar).exp() * noise


def kl_standard_normal(q: Posterior, tokens: int) -> Tensor:
    """Return KL(q || N(0, I)) in nats per token; a deterministic encoder has none (0)."""
    if q.logvar is None:
        return q.mean.new_zeros(())
    return 0.5 * (q.mean.square() + q.logvar.exp() - 1 - q.logvar).sum() / tokens


def kl_between(q: Posterior, reference: Posterior, tokens: int) -> Tensor:
    """Return KL(q || q_ref) in nats per token; for deterministic encoders half the squared distance."""
    if q.logvar is None or reference.logvar is None:
        return 0.5 * (q.mean - reference.mean).square().sum() / tokens
    ratio = (q.logvar - reference.logvar).exp()
    distance = (q.mean - reference.mean).square() / reference.logvar.exp()
    return 0.5 * (ratio + distance - 1 - q.logvar + reference.logvar).sum() / tokens


def expected_log_q(q: Posterior, tokens: int) -> Tensor:
    """Return E_q[log q(z0 | x)], the negative entropy, in nats per token (0 for a deterministic encoder)."""
    if q.logvar is None:
        return q.mean.new_zeros(())
    return -0.5 * (1 + math.log(2 * math.pi) + q.logvar).sum() / tokens


def log_snr(q: Posterior) -> Tensor:
    """Return log(E mu^2 / E sigma^2); infinite for a deterministic encoder."""
    if q.logvar is None:
        return q.mean.new_full((), math.inf)
    return (q.mean.square().mean() / q.logvar.exp().mean()).log()


def stage1_loss(vae: TextVAE, ids: Tensor, weights: VAEWeights, generator: torch.Generator) -> Loss:
    """L = -E log p_theta(x | z0) + beta KL(q_phi(z0 | x) || N(0, I)) + lambda_mask L_mask.

    Args:
        ids: int64 (B, L), L a multiple of patch_size * block_size.
        generator: a CPU generator; the loss is a pure function of its state and the batch.
    """
    q = encode(vae, ids, weights.log_snr)
    nll, accuracy = reconstruction(vae, draw(q, generator), ids)
    kl = kl_standard_normal(q, ids.numel())
    total = nll + weights.beta * kl
    terms = {"nll": nll, "kl": kl, "log_snr": log_snr(q), "accuracy": accuracy}
    if weights.mask > 0:
        terms["masked"] = masked_reconstruction(vae, ids, weights, generator)
        total = total + weights.mask * terms["masked"]
    return Loss(total, {name: term.detach() for name, term in terms.items()})


# --- flow matching -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pinned:
    """Clean latents inside noisy blocks: where (B, M) bool, and their values (B, M, C), without gradient."""

    where: Tensor
    latents: Tensor


def flow_loss(dit: DiT, z0: Tensor, noise: Tensor, timestep: Tensor, pinned: Pinned | None = None) -> Tensor:
    """L_FM: the mean of ||v_psi(z_t^b, t; z0^<b) - (z1 - z0)||^2 per latent number, all blocks at once.

    One pass over ``[clean | noisy]`` copies. The clean copy (history) and the
    target carry no gradient: z0 is reached through z_t only. Pinned positions
    are clean (t = 0) and have no loss. A network that predicts z0 has its error
    divided by max(a, 0.1), which makes it the velocity's.

    Args:
        z0: (B, M, C) normalised latents.
        noise: (B, M, C), z1.
        timestep: (B, M), constant within a block.
    """
    rows, length, width = z0.shape
    clean = z0.detach()
    z_t = interpolate(z0.flatten(0, 1), noise.flatten(0, 1), timestep.flatten() / T).view_as(z0)
    if pinned is not None:
        z_t = torch.where(pinned.where[..., None], pinned.latents, z_t)
        timestep = timestep.masked_fill(pinned.where, 0.0)
    history = clean[:, : length - dit.config.block_size]
    copies = torch.cat([history, z_t], 1).flatten(0, 1)
    times = torch.cat([timestep.new_zeros(history.shape[:2]), timestep], 1).flatten()
    output = dit(copies, times, dit.two_copy_layout(rows, length))
    output = output.view(rows, -1, width)[:, history.shape[1] :]
    if dit.config.prediction == "velocity":
        error = output - target_velocity(clean, noise)
    else:
        error = (output - clean) / (timestep / T).clamp_min(Z0_MIN_A)[..., None]
    squared = error.square().mean(-1)
    if pinned is None:
        return squared.mean()
    return squared.masked_fill(pinned.where, 0.0).sum() / (~pinned.where).sum()


def draw_timesteps(
    rows: int, length: int, block_size: int, settings: FlowSettings, generator: torch.Generator
) -> Tensor:
    """Draw timesteps (B, M): one per block, or one per row."""
    blocks = length // block_size
    drawn = settings.law.sample((rows, blocks if settings.per_block else 1), generator)
    return drawn.expand(rows, blocks).repeat_interleave(block_size, 1)


@torch.no_grad()
def draw_prefixes(
    vae: TextVAE, ids: Tensor, pad_id: int, settings: FlowSettings, generator: torch.Generator
) -> Pinned | None:
    """Keep a clean prefix in ``prefix_share`` of the blocks, at most one a row, None if there is none.

    The prefix is encoded as a prompt that ends there: with padding to the end
    of its block, as the posterior mean. Encoded with the tokens that follow, it
    would tell the DiT about them.
    """
    rows = ids.shape[0]
    block, patch = vae.config.block_size, vae.config.patch_size
    length = ids.shape[1] // patch
    blocks = length // block
    chosen = torch.rand(rows, generator=generator) < settings.prefix_share * blocks
    at = torch.randint(blocks, (rows,), generator=generator) * block
    size = torch.randint(1, max(block, 2), (rows,), generator=generator)
    if block == 1 or not bool(chosen.any()):
        return None
    position = torch.arange(length)
    inside = (position >= at[:, None]) & (position < (at + block)[:, None]) & chosen[:, None]
    kept = inside & (position < (at + size)[:, None])
    padded = (inside & ~kept).repeat_interleave(patch, 1).to(ids.device)
    mean = vae.normalise(encode(vae, ids.masked_fill(padded, pad_id)[chosen]).mean)
    latents = mean.new_zeros(rows, length, vae.config.latent_dim)
    latents[chosen] = mean.view(-1, length, vae.config.latent_dim)
    return Pinned(kept.to(ids.device), latents)


def flow_matching(
    vae: TextVAE,
    dit: DiT,
    ids: Tensor,
    z0: Tensor,
    pad_id: int,
    settings: FlowSettings,
    generator: torch.Generator,
) -> Tensor:
    """Return L_FM of drawn timesteps, noise and prefixes; z0 (B * M, C) as sampled, not normalised."""
    z0 = vae.normalise(z0).view(ids.shape[0], -1, vae.config.latent_dim)
    timestep = draw_timesteps(z0.shape[0], z0.shape[1], dit.config.block_size, settings, generator)
    noise = torch.randn(z0.shape, generator=generator).to(z0.device)
    pinned = draw_prefixes(vae, ids, pad_id, settings, generator)
    return flow_loss(dit, z0, noise, timestep.to(z0.device), pinned)


# --- stage 2 -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointWeights:
    """Weights of the joint loss: lambda_vae, lambda_fm and lambda_ref."""

    vae: float = 1.0
    flow: float = 1.0
    reference: float = 0.1


def stage2_frozen_loss(
    vae: TextVAE,
    dit: DiT,
    ids: Tensor,
    pad_id: int,
    settings: FlowSettings,
    weights: VAEWeights,
    generator: torch.Generator,
) -> Loss:
    """L = L_FM over the latents of a frozen Text VAE."""
    with torch.no_grad():
        q = encode(vae, ids, weights.log_snr)
        z0 = draw(q, generator)
    flow = flow_matching(vae, dit, ids, z0, pad_id, settings, generator)
    return Loss(flow, {"flow": flow.detach(), "log_snr": log_snr(q)})


def stage2_joint_loss(
    vae: TextVAE,
    dit: DiT,
    reference: TextVAE,
    ids: Tensor,
    pad_id: int,
    settings: FlowSettings,
    weights: VAEWeights,
    joint: JointWeights,
    generator: torch.Generator,
) -> Loss:
    """The joint loss of stage 2.

    L = lambda_vae (-E log p_theta(x | z0) + beta E log q_phi(z0 | x) + lambda_mask L_mask)
        + lambda_fm L_FM + lambda_ref KL(q_phi(z0 | x) || q_ref(z0 | x)), q_ref the frozen stage-1 encoder.
    """
    q = encode(vae, ids, weights.log_snr)
    z0 = draw(q, generator)
    nll, accuracy = reconstruction(vae, z0, ids)
    log_q = expected_log_q(q, ids.numel())
    flow = flow_matching(vae, dit, ids, z0, pad_id, settings, generator)
    with torch.no_grad():
        q_ref = encode(reference, ids, weights.log_snr)
    kl_ref = kl_between(q, q_ref, ids.numel())
    vae_loss = nll + weights.beta * log_q
    terms = {"nll": nll, "log_q": log_q, "flow": flow, "kl_ref": kl_ref}
    terms |= {"log_snr": log_snr(q), "accuracy": accuracy}
    if weights.mask > 0:
        terms["masked"] = masked_reconstruction(vae, ids, weights, generator)
        vae_loss = vae_loss + weights.mask * terms["masked"]
    total = joint.vae * vae_loss + joint.flow * flow + joint.reference * kl_ref
    return Loss(total, {name: term.detach() for name, term in terms.items()})
