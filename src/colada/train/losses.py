"""The losses of both training stages, in the order of the equations they implement.

Units: likelihood, KL and entropy terms are nats per token; the flow term is
the squared velocity error per latent number. Rows all have the same length:
a batch is (B, L) tokens and (B, M, C) latents, M = L / patch_size.

A loss is a plain function of networks, batch and noise (:mod:`colada.train.noise`). What it sums over is
divided by counts of the whole step: contributions of micro-batches and ranks add up to the loss of the
undivided batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from colada.data.rows import Batch
from colada.networks.dit import DiT
from colada.networks.packing import Layout
from colada.networks.vae import Posterior, TextVAE
from colada.train.flow_matching import PLAIN, FlowLatents, FlowStep, flow_latents, flow_matching
from colada.train.kinds import JointSection, TextVAETerms
from colada.train.noise import Counts, StepNoise, count, sample_of_latents

LOGITS_AT_ONCE = 2**26
"""Logits held at once, 268 MB: those of a batch of the released size are 4.5 GB, and their gradient too."""


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


def add_terms(sums: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
    """Add a batch's terms to sums by name, in place."""
    for name, term in terms.items():
        sums[name] = sums[name] + term if name in sums else term


def readable(terms: Mapping[str, Tensor]) -> dict[str, float | list[float | None]]:
    """Return summed terms as logged: log_snr = log(E mu^2 / E sigma^2), flow_by_t as means by bin of t.

    What is told apart by quantile is for :mod:`colada.train.timesteps` alone.
    """
    values: dict[str, Any] = {
        name: term.double().tolist() for name, term in terms.items() if not name.startswith("quantile_")
    }
    if "mean2" in values:
        signal, noise = values.pop("mean2"), values.pop("variance")
        values["log_snr"] = math.log(signal / noise) if signal > 0 and noise > 0 else math.inf
    if "flow_sums" in values:
        pairs = zip(values.pop("flow_sums"), values.pop("flow_counts"), strict=True)
        values["flow_by_t"] = [total / number if number else None for total, number in pairs]
    return values


# --- the Text VAE's terms ----------------------------------------------------------------------


def rows_layout(vae: TextVAE, batch: Batch) -> Layout:
    """Return how the Text VAE sees a batch."""
    rows, length = batch.ids.shape
    patch = vae.config.patch_size
    return vae.rows_layout(rows, length // patch, sample_of_latents(batch, patch))


def encode(vae: TextVAE, ids: Tensor, layout: Layout) -> Posterior:
    """Return q_phi(z0 | x) of rows (B, L), packed (B * M, C)."""
    posterior: Posterior = vae.encoder(ids.flatten(), layout)
    return posterior


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
    whole = len(hidden) <= rows or not torch.is_grad_enabled()
    spelled = [
        _spell(vae, *part) if whole else checkpoint(_spell, vae, *part, use_reentrant=False) for part in parts
    ]
    nll, right = (torch.cat(parts_of) for parts_of in zip(*spelled, strict=True))
    return within(batch, nll), within(batch, right)


def _spell(vae: TextVAE, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p of tokens (n,) given the decoder's hidden states, and where they are the likeliest."""
    logits = vae.decoder.logits(hidden)
    return F.cross_entropy(logits, ids, reduction="none"), (logits.argmax(-1) == ids).float()


def masked_reconstruction(vae: TextVAE, batch: Batch, layout: Layout, noise: StepNoise) -> Tensor:
    """Return L_mask, summed over tokens: -log p_theta(x | z0 of partly masked tokens); no KL here."""
    assert noise.masked is not None
    assert noise.masked_posterior is not None
    posterior = encode(vae, batch.ids.masked_fill(noise.masked, vae.config.mask_id), layout)
    return reconstruction(vae, draw(posterior, noise.masked_posterior), batch, layout)[0]


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


def decoder_loss(vae: TextVAE, batch: Batch, noise: StepNoise, counts: Counts | None = None) -> Loss:
    """L = -E log p_theta(x | z0) under a frozen encoder; arguments as :func:`vae_loss`."""
    counts = counts or count(batch, noise, vae.config)
    layout = rows_layout(vae, batch)
    with torch.no_grad():
        q = encode(vae, batch.ids, layout)
        z0 = draw(q, noise.posterior)
    nll, right = reconstruction(vae, z0, batch, layout)
    terms = {"nll": nll / counts.tokens, "kl": within(batch, kl_standard_normal(q)) / counts.tokens}
    terms |= {"accuracy": right / counts.tokens, **log_snr_terms(q, batch, counts)}
    return Loss(terms["nll"], _detached(terms))


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}


def vae_loss(
    vae: TextVAE, batch: Batch, noise: StepNoise, weights: TextVAETerms, counts: Counts | None = None
) -> Loss:
    """L = -E log p_theta(x | z0) + beta KL(q_phi(z0 | x) || N(0, I)) + lambda_mask L_mask.

    Args:
        batch: rows of L tokens, L a multiple of patch_size * block_size.
        counts: of the whole step; None where the batch is the step.
    """
    counts = counts or count(batch, noise, vae.config)
    layout = rows_layout(vae, batch)
    q = encode(vae, batch.ids, layout)
    nll, right = reconstruction(vae, draw(q, noise.posterior), batch, layout)
    terms = {"nll": nll / counts.tokens, "kl": within(batch, kl_standard_normal(q)) / counts.tokens}
    total = terms["nll"] + weights.beta * terms["kl"]
    if weights.mask > 0:
        terms["masked"] = masked_reconstruction(vae, batch, layout, noise) / counts.tokens
        total = total + weights.mask * terms["masked"]
    terms |= {"accuracy": right / counts.tokens, **log_snr_terms(q, batch, counts)}
    return Loss(total, _detached(terms))


# --- stage 2 -----------------------------------------------------------------------------------


@torch.no_grad()
def frozen_latents(
    vae: TextVAE, batch: Batch, noise: StepNoise, pad_id: int, means: bool = False
) -> tuple[Posterior, FlowLatents]:
    """Return q_phi(z0 | x) of a batch under a frozen Text VAE, and latents drawn from it, or its means."""
    layout = rows_layout(vae, batch)
    q = encode(vae, batch.ids, layout)
    z0 = q.mean if means else draw(q, noise.posterior)
    return q, flow_latents(vae, batch, noise, z0, layout, pad_id)


def prior_loss(
    vae: TextVAE,
    dit: DiT,
    batch: Batch,
    noise: StepNoise,
    pad_id: int,
    counts: Counts | None = None,
    step: FlowStep = PLAIN,
) -> Loss:
    """L = L_FM over the latents of a frozen Text VAE; see :func:`flow_matching`."""
    counts = counts or count(batch, noise, vae.config)
    q, latents = frozen_latents(vae, batch, noise, pad_id)
    flow, terms = flow_matching(dit, latents, noise, counts, step)
    return Loss(flow, _detached(terms | log_snr_terms(q, batch, counts)))


def joint_loss(
    vae: TextVAE,
    dit: DiT,
    reference: TextVAE,
    batch: Batch,
    noise: StepNoise,
    weights: JointSection,
    pad_id: int,
    counts: Counts | None = None,
    step: FlowStep = PLAIN,
) -> Loss:
    """The joint loss of stage 2.

    L = lambda_vae (-E log p_theta(x | z0) + beta E log q_phi(z0 | x) + lambda_mask L_mask)
        + lambda_fm L_FM + lambda_ref KL(q_phi(z0 | x) || q_ref(z0 | x)), q_ref the frozen stage-1 encoder.
    """
    counts = counts or count(batch, noise, vae.config)
    layout = rows_layout(vae, batch)
    q = encode(vae, batch.ids, layout)
    z0 = draw(q, noise.posterior)
    nll, right = reconstruction(vae, z0, batch, layout)
    log_q = within(batch, expected_log_q(q)) / counts.tokens
    latents = flow_latents(vae, batch, noise, z0, layout, pad_id)
    flow, terms = flow_matching(dit, latents, noise, counts, step)
    with torch.no_grad():
        q_ref = encode(reference, batch.ids, layout)
    kl_ref = within(batch, kl_between(q, q_ref)) / counts.tokens
    terms |= {"nll": nll / counts.tokens, "log_q": log_q, "kl_ref": kl_ref}
    of_vae = terms["nll"] + weights.beta * log_q
    if weights.mask > 0:
        terms["masked"] = masked_reconstruction(vae, batch, layout, noise) / counts.tokens
        of_vae = of_vae + weights.mask * terms["masked"]
    total = weights.lambda_vae * of_vae + weights.lambda_fm * flow + weights.lambda_ref * kl_ref
    terms |= {"accuracy": right / counts.tokens, **log_snr_terms(q, batch, counts)}
    return Loss(total, _detached(terms))
