"""The losses of both training stages, in the order of the equations they implement.

Units: likelihood, KL and entropy terms are nats per token; the flow term is
the squared velocity error per latent number. Rows all have the same length:
a batch is (B, L) tokens and (B, M, C) latents, M = L / patch_size.

Everything random is drawn first, row by row (:func:`draw_randomness`), so that
a loss is a plain function of networks, batch and draws. What a loss sums over is
divided by counts of the whole step (:func:`count`): contributions of
micro-batches and ranks add up to the loss of the undivided batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from colada.data.rows import Batch
from colada.flow import T, TimestepLaw, interpolate, target_velocity
from colada.networks.config import TextVAEConfig
from colada.networks.dit import DiT, Timesteps
from colada.networks.packing import Layout
from colada.networks.vae import Posterior, TextVAE

Z0_MIN_A = 0.1  # Where z0 is predicted, its error counts as a velocity error at no smaller a than this.
LOGITS_AT_ONCE = 2**26
"""Logits held at once, 268 MB: those of a batch of the released size are 4.5 GB, and their gradient too."""
TIME_BINS = 10  # Equal bins of [0, T) for the flow loss by timestep.


@dataclass
class Loss:
    """A loss to minimise, and what is logged of it.

    Attributes:
        total: the batch's contribution to the step's loss.
        terms: contributions by name (detached); they add up over micro-batches and ranks, and
            :func:`readable` turns the sums into what people read.
    """

    total: Tensor
    terms: dict[str, Tensor]


def readable(terms: Mapping[str, Tensor]) -> dict[str, float | list[float | None]]:
    """Return summed terms as logged: log_snr = log(E mu^2 / E sigma^2), flow_by_t as means by bin of t."""
    values: dict[str, Any] = {name: term.double().tolist() for name, term in terms.items()}
    if "mean2" in values:
        signal, noise = values.pop("mean2"), values.pop("variance")
        values["log_snr"] = math.log(signal / noise) if signal > 0 and noise > 0 else math.inf
    if "flow_sums" in values:
        pairs = zip(values.pop("flow_sums"), values.pop("flow_counts"), strict=True)
        values["flow_by_t"] = [total / number if number else None for total, number in pairs]
    return values


@dataclass(frozen=True)
class VAEWeights:
    """Weights of the Text VAE's terms.

    Attributes:
        beta: weight of KL(q || N(0, I)) in stage 1, of E log q in stage 2.
        mask: lambda_mask.
        mask_ratio: share of encoder input tokens replaced by the mask id.
        log_snr: fix log(E mu^2 / E sigma^2) of each latent to this; None learns it.
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
        copies: noisy copies of each row, which share one clean copy.
        prefix_share: share of blocks that keep a clean prefix inside, as when a prompt ends in a
            block; at most one a row, so no more than 1 in M / block_size, and none in samples with a
            prompt of their own.
        history_dropout: probability with which a noisy block sees no clean cell, each block by itself:
            what guidance calls unconditional is then trained in the middle of texts too.
    """

    law: TimestepLaw = field(default_factory=TimestepLaw)
    per_block: bool = True
    copies: int = 1
    prefix_share: float = 0.05
    history_dropout: float = 0.0


# --- what a step draws and counts ---------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """Everything random in the loss of a batch; K is the number of noisy copies.

    Attributes:
        posterior: (B, M, C), standard normal noise of z0 ~ q.
        masked: bool (B, L), encoder input tokens that L_mask hides; None without that term.
        masked_posterior: (B, M, C), noise of that stream.
        timestep: (B, K, M) in 0..1000, constant within a block; None in stage 1.
        noise: (B, K, M, C), z1.
        prefix: bool (B, M), latents that stay clean at the beginning of a block.
        alone: bool (B, K, M / block_size), noisy blocks that lose sight of all clean cells; None without
            history dropout.
    """

    posterior: Tensor
    masked: Tensor | None = None
    masked_posterior: Tensor | None = None
    timestep: Tensor | None = None
    noise: Tensor | None = None
    prefix: Tensor | None = None
    alone: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Draws:
        """Return the draws with a function applied to each."""
        there = {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}
        return Draws(**{name: function(x) for name, x in there.items()})

    def to(self, device: torch.device) -> Draws:
        """Return the draws on a device."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def rows(self, begin: int, end: int) -> Draws:
        """Return the draws of some rows, for a micro-batch."""
        return self.map(lambda x: x[begin:end])


def draw_randomness(
    generators: Sequence[torch.Generator],
    config: TextVAEConfig,
    length: int,
    weights: VAEWeights,
    flow: FlowSettings | None = None,
    masked: bool = True,
) -> Draws:
    """Draw what the loss of a batch needs, each row from a CPU generator of its own.

    A row's draws therefore depend neither on the batch it is in nor on the device.

    Args:
        generators: one a row.
        length: tokens a row.
        flow: for stage 2; None draws for stage 1.
        masked: draw for L_mask too, if it has a weight.
    """
    latents, block = length // config.patch_size, config.block_size
    shape = (latents, config.latent_dim)
    drawn: dict[str, list[Tensor]] = {f.name: [] for f in fields(Draws)}
    for own in generators:
        drawn["posterior"].append(torch.randn(shape, generator=own))
        if masked and weights.mask > 0:
            drawn["masked"].append(torch.rand(length, generator=own) < weights.mask_ratio)
            drawn["masked_posterior"].append(torch.randn(shape, generator=own))
        if flow is not None:
            times = flow.law.sample((flow.copies, latents // block if flow.per_block else 1), own)
            times = times.expand(flow.copies, latents // block)
            drawn["timestep"].append(times.repeat_interleave(block, 1))
            drawn["noise"].append(torch.randn((flow.copies, *shape), generator=own))
            if flow.prefix_share > 0:
                drawn["prefix"].append(_draw_prefix(latents, block, flow.prefix_share, own))
            if flow.history_dropout > 0:
                chances = torch.rand(flow.copies, latents // block, generator=own)
                drawn["alone"].append(chances < flow.history_dropout)
    return Draws(**{name: torch.stack(parts) for name, parts in drawn.items() if parts})


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
    """

    tokens: float
    latents: float
    noisy: float

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.latents + other.latents, self.noisy + other.noisy)


def count(batch: Batch, draws: Draws, config: TextVAEConfig) -> Counts:
    """Return a batch's share in the counts of its step."""
    free = ~pinned_latents(given_tokens(batch, draws, config.patch_size), config.patch_size)
    copies = 0 if draws.timestep is None else draws.timestep.shape[1]
    tokens = batch.ids.numel() if batch.sample is None else int((batch.sample >= 0).sum())
    return Counts(tokens, tokens / config.patch_size, int(free.sum()) * copies)


def given_tokens(batch: Batch, draws: Draws, patch: int) -> Tensor:
    """Return which tokens are not the flow's to generate: prompts, filling, drawn prefixes; bool (B, L).

    A prefix in a sample with a prompt is left out: it would be encoded after the prompt's padding.
    """
    given = torch.zeros_like(batch.ids, dtype=torch.bool) if batch.trained is None else ~batch.trained
    if draws.prefix is None:
        return given
    prefix = draws.prefix.repeat_interleave(patch, 1)
    if batch.trained is not None:
        sample = torch.zeros_like(batch.ids) if batch.sample is None else batch.sample
        around = sample == sample.gather(1, prefix.int().argmax(1, keepdim=True))
        prefix = prefix & ~(given & around).any(1, keepdim=True)
    return given | prefix


def pinned_latents(given: Tensor, patch: int) -> Tensor:
    """Return which latents are clean and have no flow loss, bool (B, M): those with a given token."""
    return given.unflatten(1, (-1, patch)).any(-1)


def sample_of_latents(batch: Batch, patch: int) -> Tensor | None:
    """Return which sample each latent (B, M) belongs to; None where every row is one sample."""
    return None if batch.sample is None else batch.sample[:, patch - 1 :: patch]


def rows_layout(vae: TextVAE, batch: Batch) -> Layout:
    """Return how the Text VAE sees a batch."""
    rows, length = batch.ids.shape
    patch = vae.config.patch_size
    return vae.rows_layout(rows, length // patch, sample_of_latents(batch, patch))


# --- the Text VAE's terms ----------------------------------------------------------------------


def encode(vae: TextVAE, ids: Tensor, layout: Layout, log_snr: float | None = None) -> Posterior:
    """Return q_phi(z0 | x) of rows (B, L), packed (B * M, C), each latent's log-SNR fixed if asked."""
    posterior: Posterior = vae.encoder(ids.flatten(), layout)
    return posterior.at_log_snr(log_snr)


def draw(posterior: Posterior, noise: Tensor) -> Tensor:
    """Return z0 ~ q by reparametrisation of standard normal noise (B, M, C): packed (B * M, C)."""
    if posterior.logvar is None:
        return posterior.mean
    return posterior.mean + (0.5 * posterior.logvar).exp() * noise.flatten(0, 1)


def within(batch: Batch, values: Tensor) -> Tensor:
    """Return the sum of values over the samples of a batch, without what rows are filled up with.

    Args:
        values: per token or per latent, flat.
    """
    if batch.sample is None:
        return values.sum()
    inside = (batch.sample >= 0).flatten()
    return (values * inside[:: inside.numel() // values.numel()]).sum()


def reconstruction(vae: TextVAE, z0: Tensor, batch: Batch, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the sum over tokens of -log p_theta(x | z0) in nats, and how many the decoder gets right.

    The decoder sees normalised latents, as it does in generation.
    """
    hidden = vae.decoder(vae.normalise(z0), layout)
    rows = max(LOGITS_AT_ONCE // vae.config.vocab_size, 1)
    parts = zip(hidden.split(rows), batch.ids.flatten().split(rows), strict=True)
    # Where the logits are many, the backward pass makes them again, a part at a time.
    kept = len(hidden) <= rows or not torch.is_grad_enabled()
    spelled = [
        _spell(vae, *part) if kept else checkpoint(_spell, vae, *part, use_reentrant=False) for part in parts
    ]
    nll, right = (torch.cat(own) for own in zip(*spelled, strict=True))
    return within(batch, nll), within(batch, right)


def _spell(vae: TextVAE, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p of tokens (n,) given the decoder's hidden states, and where they are the likeliest."""
    logits = vae.decoder.logits(hidden)
    return F.cross_entropy(logits, ids, reduction="none"), (logits.argmax(-1) == ids).float()


def masked_reconstruction(
    vae: TextVAE, batch: Batch, layout: Layout, weights: VAEWeights, draws: Draws
) -> Tensor:
    """Return L_mask, summed over tokens: -log p_theta(x | z0 of partly masked tokens); no KL here."""
    assert draws.masked is not None
    assert draws.masked_posterior is not None
    posterior = encode(vae, batch.ids.masked_fill(draws.masked, vae.config.mask_id), layout, weights.log_snr)
    return reconstruction(vae, draw(posterior, draws.masked_posterior), batch, layout)[0]


def kl_standard_normal(q: Posterior) -> Tensor:
    """Return KL(q || N(0, I)) in nats of each latent (N,); a deterministic encoder has none (0)."""
    if q.logvar is None:
        return q.mean.new_zeros(len(q.mean))
    return 0.5 * (q.mean.square() + q.logvar.exp() - 1 - q.logvar).sum(-1)


def kl_between(q: Posterior, reference: Posterior) -> Tensor:
    """Return KL(q || q_ref) of each latent (N,); for deterministic encoders half the squared distance."""
    if q.logvar is None or reference.logvar is None:
        return 0.5 * (q.mean - reference.mean).square().sum(-1)
    ratio = (q.logvar - reference.logvar).exp()
    distance = (q.mean - reference.mean).square() / reference.logvar.exp()
    return 0.5 * (ratio + distance - 1 - q.logvar + reference.logvar).sum(-1)


def expected_log_q(q: Posterior) -> Tensor:
    """Return E_q[log q(z0 | x)], the negative entropy, of each latent (N,); 0 for a deterministic encoder."""
    if q.logvar is None:
        return q.mean.new_zeros(len(q.mean))
    return -0.5 * (1 + math.log(2 * math.pi) + q.logvar).sum(-1)


def log_snr_terms(q: Posterior, batch: Batch, counts: Counts) -> dict[str, Tensor]:
    """Return the contributions to E mu^2 and E sigma^2, whose log ratio is the log-SNR."""
    variance = torch.zeros_like(q.mean) if q.logvar is None else q.logvar.exp()
    mean2 = within(batch, q.mean.square().mean(-1)) / counts.latents
    return {"mean2": mean2, "variance": within(batch, variance.mean(-1)) / counts.latents}


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}


def stage1_loss(
    vae: TextVAE, batch: Batch, draws: Draws, weights: VAEWeights, counts: Counts | None = None
) -> Loss:
    """L = -E log p_theta(x | z0) + beta KL(q_phi(z0 | x) || N(0, I)) + lambda_mask L_mask.

    Args:
        batch: rows of L tokens, L a multiple of patch_size * block_size.
        counts: of the whole step; None where the batch is the step.
    """
    counts = counts or count(batch, draws, vae.config)
    layout = rows_layout(vae, batch)
    q = encode(vae, batch.ids, layout, weights.log_snr)
    nll, right = reconstruction(vae, draw(q, draws.posterior), batch, layout)
    terms = {"nll": nll / counts.tokens, "kl": within(batch, kl_standard_normal(q)) / counts.tokens}
    total = terms["nll"] + weights.beta * terms["kl"]
    if weights.mask > 0:
        terms["masked"] = masked_reconstruction(vae, batch, layout, weights, draws) / counts.tokens
        total = total + weights.mask * terms["masked"]
    terms |= {"accuracy": right / counts.tokens, **log_snr_terms(q, batch, counts)}
    return Loss(total, _detached(terms))


# --- flow matching -----------------------------------------------------------------------------


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
) -> Tensor:
    """Return the error ||v_psi(z_t^b, t; z0^<b) - (z1 - z0)||^2 per latent number, all blocks at once.

    One pass over ``[clean | noisy 1 | ... | noisy K]``. The clean copy (history) and the target
    carry no gradient: z0 is reached through z_t only. Pinned positions are clean (t = 0)
    and have no error. A network that predicts z0 has its error divided by max(a, 0.1), which makes it
    the velocity's.

    Args:
        z0: (B, M, C) normalised latents.
        noise: (B, K, M, C), z1 of each copy.
        timestep: (B, K, M), constant within a block.
        pinned: the same in every copy.
        sample: (B, M), the sample of its row that a latent belongs to; samples do not see each other.
        alone: bool (B, K, M / block_size), noisy blocks that see no clean cell; none by default.

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
    output = dit(packed, Timesteps(times, row), layout, noisy_only=True).view(rows, copies, length, width)
    if dit.config.prediction == "velocity":
        error = output - target_velocity(clean[:, None], noise)
    else:
        error = (output - clean[:, None]) / (timestep / T).clamp_min(Z0_MIN_A)[..., None]
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return L_FM of a batch, and its terms by name; z0 (B * M, C) as sampled, not normalised."""
    assert draws.timestep is not None
    assert draws.noise is not None
    z0 = vae.normalise(z0).view(len(batch), -1, vae.config.latent_dim)
    pinned = pin(vae, batch, draws, layout, pad_id)
    sample = sample_of_latents(batch, vae.config.patch_size)
    errors = flow_errors(dit, z0, draws.noise, draws.timestep, pinned, sample, draws.alone)
    flow = errors.sum() / counts.noisy
    free = torch.ones_like(errors) if pinned is None else (~pinned.where[:, None]).expand_as(errors).float()
    bins = (draws.timestep * (TIME_BINS / T)).long().clamp_max(TIME_BINS - 1).flatten()
    zeros = errors.new_zeros(TIME_BINS)
    sums = zeros.index_add(0, bins, errors.detach().flatten())
    return flow, {"flow": flow, "flow_sums": sums, "flow_counts": zeros.index_add(0, bins, free.flatten())}


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
    batch: Batch,
    draws: Draws,
    weights: VAEWeights,
    pad_id: int,
    counts: Counts | None = None,
) -> Loss:
    """L = L_FM over the latents of a frozen Text VAE."""
    counts = counts or count(batch, draws, vae.config)
    with torch.no_grad():
        layout = rows_layout(vae, batch)
        q = encode(vae, batch.ids, layout, weights.log_snr)
        z0 = draw(q, draws.posterior)
    flow, terms = flow_matching(vae, dit, batch, draws, z0, layout, pad_id, counts)
    return Loss(flow, _detached(terms | log_snr_terms(q, batch, counts)))


def stage2_joint_loss(
    vae: TextVAE,
    dit: DiT,
    reference: TextVAE,
    batch: Batch,
    draws: Draws,
    weights: VAEWeights,
    joint: JointWeights,
    pad_id: int,
    counts: Counts | None = None,
) -> Loss:
    """The joint loss of stage 2.

    L = lambda_vae (-E log p_theta(x | z0) + beta E log q_phi(z0 | x) + lambda_mask L_mask)
        + lambda_fm L_FM + lambda_ref KL(q_phi(z0 | x) || q_ref(z0 | x)), q_ref the frozen stage-1 encoder.
    """
    counts = counts or count(batch, draws, vae.config)
    layout = rows_layout(vae, batch)
    q = encode(vae, batch.ids, layout, weights.log_snr)
    z0 = draw(q, draws.posterior)
    nll, right = reconstruction(vae, z0, batch, layout)
    log_q = within(batch, expected_log_q(q)) / counts.tokens
    flow, terms = flow_matching(vae, dit, batch, draws, z0, layout, pad_id, counts)
    with torch.no_grad():
        q_ref = encode(reference, batch.ids, layout, weights.log_snr)
    kl_ref = within(batch, kl_between(q, q_ref)) / counts.tokens
    terms |= {"nll": nll / counts.tokens, "log_q": log_q, "kl_ref": kl_ref}
    vae_loss = terms["nll"] + weights.beta * log_q
    if weights.mask > 0:
        terms["masked"] = masked_reconstruction(vae, batch, layout, weights, draws) / counts.tokens
        vae_loss = vae_loss + weights.mask * terms["masked"]
    total = joint.vae * vae_loss + joint.flow * flow + joint.reference * kl_ref
    terms |= {"accuracy": right / counts.tokens, **log_snr_terms(q, batch, counts)}
    return Loss(total, _detached(terms))
