"""Rows of texts and of samples, their noise, and losses block by block to compare with."""

from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from colada.data.rows import FILLING, Batch
from colada.flow import T
from colada.generate.reference import BlockGenerator
from colada.networks.dit import DiT
from colada.networks.layers import KVCache
from colada.networks.vae import Posterior, TextVAE
from colada.train.flow_matching import Pinned, pin
from colada.train.kinds import FlowTerms, JointSection, TextVAETerms
from colada.train.losses import (
    rows_layout,
)
from colada.train.noise import StepNoise, draw_noise

PAD = 0
WEIGHTS = TextVAETerms(beta=0.3, mask=0.7, mask_ratio=0.4)
SETTINGS = FlowTerms(copies=2, prefix_share=0.1)


def joint_weights(**over: float) -> JointSection:
    return JointSection(**{**WEIGHTS.model_dump(), **over})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def token_rows(rows: int, length: int, seed: int = 0) -> Batch:
    return Batch(torch.randint(1, 50, (rows, length), generator=seeded(seed)))


def noise_for(
    vae: TextVAE,
    batch: Batch,
    flow: FlowTerms | None = None,
    seed: int = 0,
    weights: TextVAETerms = WEIGHTS,
) -> StepNoise:
    generators = [seeded(1000 * seed + row) for row in range(len(batch))]
    return draw_noise(generators, vae.config, batch.ids.shape[1], weights, flow)


def same(ours: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=5e-6)


def moved(network: torch.nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]


def gradients(total: Tensor, *networks: torch.nn.Module) -> list[Tensor]:
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))


def same_gradients(ours: list[Tensor], plain: list[Tensor]) -> None:
    """Equal up to float32's rounding of sums as large as the largest gradient."""
    largest = max(float(gradient.abs().max()) for gradient in plain)
    assert largest > 0
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * largest)


# --- rows of several samples ---------------------------------------------------------------------


class Piece(NamedTuple):
    """One sample of a row: which row, its tokens there, and how many of its first tokens are a prompt."""

    row: int
    tokens: slice
    prompt: int


def packed_rows(patch: int = 1, seed: int = 0) -> tuple[Batch, list[Piece]]:
    """Two rows of 24 latents: samples with a prompt that ends in a block, documents, and some filling."""
    # (latents, prompt in latents); where a latent holds several tokens the prompt ends inside one.
    plan = [[(12, 6), (8, 0)], [(16, 0), (8, 3)]]
    ids = token_rows(2, 24 * patch, seed).ids
    sample = torch.full_like(ids, FILLING)
    trained = torch.zeros_like(ids, dtype=torch.bool)
    pieces = []
    for row, samples in enumerate(plan):
        end = 0
        for number, (latents, prompt) in enumerate(samples):
            begin, end = end, end + patch * latents
            tokens = max(0, patch * prompt - (patch - 1))
            sample[row, begin:end] = number
            trained[row, begin + tokens : end] = True
            pieces.append(Piece(row, slice(begin, end), tokens))
    return Batch(ids, sample, trained), pieces


def packed_draws(vae: TextVAE, batch: Batch, settings: FlowTerms = SETTINGS, seed: int = 0) -> StepNoise:
    """Noise with a prefix in a document (row 0) and one in a sample that has a prompt (row 1)."""
    prefix = torch.zeros(2, 24, dtype=torch.bool)
    prefix[0, 16:18] = prefix[1, 20:22] = True
    return replace(noise_for(vae, batch, settings, seed), prefix=prefix)


def alone(batch: Batch, noise: StepNoise, piece: Piece, patch: int) -> tuple[Batch, StepNoise]:
    """Return one sample as a row of its own."""
    row, tokens = slice(piece.row, piece.row + 1), piece.tokens
    latents = slice(tokens.start // patch, tokens.stop // patch)

    def own(name: str) -> Tensor | None:
        value = getattr(noise, name)
        if value is None:
            return None
        at = tokens if name == "masked" else latents
        return value[row, :, at] if name in ("timestep", "z1") else value[row, at]

    assert batch.trained is not None
    return Batch(batch.ids[row, tokens], None, batch.trained[row, tokens]), StepNoise(
        **{field.name: own(field.name) for field in fields(StepNoise)}
    )


# --- the Text VAE's terms ------------------------------------------------------------------------


def posterior_of(vae: TextVAE, ids: Tensor) -> Normal:
    """One sample alone, as a distribution."""
    return as_normal(vae.encode(ids, [len(ids)]))


def as_normal(q: Posterior) -> Normal:
    assert q.logvar is not None
    return Normal(q.mean, q.logvar.exp().sqrt())


# --- flow matching -------------------------------------------------------------------------------


def block_by_block(
    dit: DiT,
    z0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    where: Tensor | None = None,
    values: Tensor | None = None,
    guessing: bool = False,
) -> Tensor:
    """The errors (M,) of one sample and copy: a pass a block, after appending the clean blocks before it.

    With ``guessing`` two passes: the second one is given what the first pointed at.
    """
    size = dit.config.block_size
    cache, errors = KVCache(), []
    for start in range(0, len(z0), size):
        block = slice(start, start + size)
        clean, z1, t = z0[block], noise[block], timestep[block].clone()
        a = t[:, None] / T
        z_t = (1 - a) * clean + a * z1
        free = torch.ones(size, dtype=torch.bool)
        if where is not None and values is not None:
            free = ~where[block]
            z_t = torch.where(free[:, None], z_t, values[block])
            t[~free] = 0.0
        guess = None
        if guessing:
            with torch.no_grad():
                first = dit(z_t, t, dit.layout([size], [cache]), [cache])
            guess = first if dit.config.prediction == "z0" else z_t.detach() - a * first
            guess = torch.where(free[:, None], guess, z_t.detach())
        velocity = dit(z_t, t, dit.layout([size], [cache]), [cache], guess=guess)
        if dit.config.prediction == "z0":
            # What the guess implies, with the z_t that it starts from taken as given.
            velocity = (z_t.detach() - velocity) / a
        error = (velocity - (z1 - clean.detach())).square().mean(-1)
        errors.append(error * free)
        dit(clean.detach(), torch.zeros(()), dit.layout([size], [cache]), [cache], appending=True)
    return torch.cat(errors)


# --- pinned latents ------------------------------------------------------------------------------


def pins_of(vae: TextVAE, batch: Batch, noise: StepNoise) -> Pinned:
    pinned = pin(vae, batch, noise, rows_layout(vae, batch), PAD)
    assert pinned is not None
    return pinned


def given_count(batch: Batch, noise: StepNoise, piece: Piece, patch: int) -> int:
    """How many of a sample's tokens come before what the flow generates in a partly given block, if any."""
    latents = slice(piece.tokens.start // patch, piece.tokens.stop // patch)
    if piece.prompt or noise.prefix is None or not bool(noise.prefix[piece.row, latents].any()):
        return piece.prompt
    return patch * (int(noise.prefix[piece.row, latents].nonzero().max()) + 1)


# --- stage 2 -------------------------------------------------------------------------------------


def brute_force_flow(
    vae: TextVAE, dit: DiT, batch: Batch, noise: StepNoise, pieces: list[Piece]
) -> tuple[Tensor, Tensor]:
    """Timestep and error (n,) of every noisy latent that has a loss: a sample, a copy, a block at a time."""
    patch = vae.config.patch_size
    assert noise.timestep is not None
    assert noise.z1 is not None
    times, errors = [], []
    for piece in pieces:
        row, ids = piece.row, batch.ids[piece.row, piece.tokens]
        latents = slice(piece.tokens.start // patch, piece.tokens.stop // patch)
        q = posterior_of(vae, ids)
        z0 = q.mean + q.stddev * noise.posterior[row, latents]
        z0 = (z0 - vae.config.shifting_factor) * vae.config.scaling_factor
        tokens = given_count(batch, noise, piece, patch)
        kept = -(-tokens // patch)
        where = torch.arange(len(z0)) < kept
        values = torch.zeros_like(z0)
        if tokens:
            encoded = BlockGenerator(vae, dit).encode([ids[:tokens].tolist()], PAD)[0]
            values[:kept] = encoded[:kept].detach()
        if not piece.prompt:
            where &= torch.arange(len(z0)) >= kept // 4 * 4  # a prefix is of its block alone
        for k in range(noise.timestep.shape[1]):
            t = noise.timestep[row, k, latents]
            found = block_by_block(dit, z0, noise.z1[row, k, latents], t, where, values)
            times.append(t[~where])
            errors.append(found[~where])
    return torch.cat(times), torch.cat(errors)
