"""The losses of both stages against plain computations: one token, one block, one sample at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from colada.data.rows import FILLING, Batch
from colada.flow import T
from colada.generate.noise import sample_noise
from colada.generate.reference import BlockGenerator
from colada.networks.dit import DiT, Timesteps
from colada.networks.layers import History
from colada.networks.vae import Posterior, TextVAE
from colada.train import losses as objectives
from colada.train.flow_matching import FlowStep, Pinned, flow_errors, pin
from colada.train.kinds import FlowTerms, JointSection, TextVAETerms
from colada.train.losses import (
    Loss,
    encode,
    joint_loss,
    prior_loss,
    readable,
    rows_layout,
    vae_loss,
)
from colada.train.noise import Counts, StepNoise, count, draw_noise
from helpers import tiny_dit, tiny_dit_config, tiny_vae, tiny_vae_config

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
    """Draws with a prefix in a document (row 0) and one in a sample that has a prompt (row 1)."""
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


def plain_nll(vae: TextVAE, z0: Tensor, row: Tensor) -> Tensor:
    """The sum over one row's tokens of -log p(x | z0), token by token."""
    seen = (z0 - vae.config.shifting_factor) * vae.config.scaling_factor
    logits = vae.decode(seen, [len(seen)])
    return -torch.stack([F.log_softmax(own, -1)[token] for own, token in zip(logits, row, strict=True)]).sum()


@pytest.mark.parametrize("patch", [1, 2])
def test_stage1_terms_equal_a_per_token_computation(patch: int) -> None:
    vae = tiny_vae(patch_size=patch, scaling_factor=1.7, shifting_factor=0.2)
    batch = token_rows(3, 16)
    noise = noise_for(vae, batch)
    loss = vae_loss(vae, batch, noise, WEIGHTS)
    assert noise.masked is not None
    assert noise.masked_posterior is not None
    nll = kl = mask = torch.zeros(())
    right = 0
    for row, e, hidden, masked_e in zip(
        batch.ids, noise.posterior, noise.masked, noise.masked_posterior, strict=True
    ):
        q = posterior_of(vae, row)
        z0 = q.mean + q.stddev * e
        nll = nll + plain_nll(vae, z0, row)
        kl = kl + kl_divergence(q, Normal(0.0, 1.0)).sum()
        seen = (z0 - 0.2) * 1.7
        right += int((vae.decode(seen, [len(seen)]).argmax(-1) == row).sum())
        q = posterior_of(vae, torch.tensor([50 if h else int(t) for t, h in zip(row, hidden, strict=True)]))
        mask = mask + plain_nll(vae, q.mean + q.stddev * masked_e, row)
    assert 0 < noise.masked.sum() < 48
    for name, plain in (("nll", nll), ("kl", kl), ("masked", mask)):
        same(loss.terms[name], plain.detach() / 48)
    same(loss.total, (nll + 0.3 * kl + 0.7 * mask) / 48)
    assert float(loss.terms["accuracy"]) == pytest.approx(right / 48)


def test_without_a_mask_weight_nothing_is_masked() -> None:
    vae, batch, weights = tiny_vae(), token_rows(2, 8), TextVAETerms(beta=0.5, mask=0.0)
    noise = noise_for(vae, batch, weights=weights)
    loss = vae_loss(vae, batch, noise, weights)
    assert "masked" not in loss.terms
    assert noise.masked is noise.masked_posterior is None
    torch.testing.assert_close(loss.total.detach(), loss.terms["nll"] + 0.5 * loss.terms["kl"])


def random_posterior(seed: int) -> Posterior:
    mean, logvar = torch.randn(2, 12, 8, generator=seeded(seed))
    return Posterior(mean, logvar)


def test_kl_and_entropy_are_those_of_the_distributions() -> None:
    q, other = random_posterior(0), random_posterior(5)
    p, r = as_normal(q), as_normal(other)
    same(objectives.kl_standard_normal(q), kl_divergence(p, Normal(0.0, 1.0)).sum(-1))
    same(objectives.kl_between(q, other), kl_divergence(p, r).sum(-1))
    same(objectives.expected_log_q(q), -p.entropy().sum(-1))


def test_a_deterministic_encoder_has_no_kl_no_entropy_and_infinite_snr() -> None:
    vae, reference = (tiny_vae(seed, use_variation=False) for seed in (0, 5))
    batch = token_rows(3, 8)
    noise = noise_for(vae, batch, SETTINGS)
    terms = vae_loss(vae, batch, noise, WEIGHTS).terms
    assert float(terms["kl"]) == 0
    assert readable(terms)["log_snr"] == math.inf
    redrawn = replace(noise, posterior=noise.posterior + 1)
    assert torch.equal(vae_loss(vae, batch, redrawn, WEIGHTS).terms["nll"], terms["nll"])
    terms = joint_loss(vae, tiny_dit(), reference, batch, noise, joint_weights(), PAD).terms
    assert float(terms["log_q"]) == 0
    means = [
        torch.stack([net.encode(row, [8]).mean for row in batch.ids]).detach() for net in (vae, reference)
    ]
    same(terms["kl_ref"], 0.5 * (means[0] - means[1]).square().sum() / 24)


@pytest.mark.parametrize("wanted", [-1.0, 1.5, 4.5])
def test_a_fixed_log_snr_is_exactly_that_of_every_latent(wanted: float) -> None:
    vae, batch = tiny_vae(encoder_last_ln=False).requires_grad_(False), token_rows(2, 16)
    layout = rows_layout(vae, batch)
    fixed = tiny_vae(encoder_last_ln=False, log_snr=wanted).requires_grad_(False)
    q, free = encode(fixed, batch.ids, layout), encode(vae, batch.ids, layout)
    assert q.logvar is not None
    ratio = (q.mean**2).mean(-1) / q.logvar.exp().mean(-1)
    torch.testing.assert_close(ratio.log(), torch.full((32,), wanted), rtol=0, atol=1e-5)
    torch.testing.assert_close(q.mean, free.mean)
    terms = vae_loss(fixed, batch, noise_for(vae, batch), WEIGHTS).terms
    assert readable(terms)["log_snr"] == pytest.approx(wanted, abs=1e-5)
    terms = vae_loss(vae, batch, noise_for(vae, batch), WEIGHTS).terms
    assert readable(terms)["log_snr"] != pytest.approx(wanted, abs=0.1)


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
    """The errors (M,) of one sample and copy: a pass a block, after committing the clean blocks before it.

    With ``guessing`` two passes: the second one is given what the first pointed at.
    """
    size = dit.config.block_size
    history, errors = History(), []
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
                first = dit(z_t, t, dit.layout([size], [history]), [history])
            guess = first if dit.config.prediction == "z0" else z_t.detach() - a * first
            guess = torch.where(free[:, None], guess, z_t.detach())
        velocity = dit(z_t, t, dit.layout([size], [history]), [history], guess=guess)
        if dit.config.prediction == "z0":
            # What the guess implies, with the z_t that it starts from taken as given.
            velocity = (z_t.detach() - velocity) / a
        error = (velocity - (z1 - clean.detach())).square().mean(-1)
        errors.append(error * free)
        dit(clean.detach(), torch.zeros(()), dit.layout([size], [history]), [history], committing=True)
    return torch.cat(errors)


def flow_example(
    rows: int = 2, blocks: int = 3, copies: int = 1, size: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, M, C), noise (B, K, M, C) and timesteps (B, K, M)."""
    g = seeded(seed)
    timestep = 100 + 900 * torch.rand(rows, copies, blocks, generator=g).repeat_interleave(size, 2)
    z0 = torch.randn(rows, blocks * size, 8, generator=g)
    return z0, torch.randn(rows, copies, blocks * size, 8, generator=g), timestep


def example_pins(where: list[tuple[int, int]], shape: torch.Size) -> Pinned:
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    for row, position in where:
        mask[row, position] = True
    return Pinned(mask, torch.randn(shape, generator=seeded(9)))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("dit_patch", [1, 2])
@pytest.mark.parametrize("pins", [[], [(0, 0), (1, 4), (1, 5), (1, 6)], [(0, 8), (0, 9)]])
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_all_blocks_at_once_equal_one_block_at_a_time(
    prediction: str, pins: list[tuple[int, int]], dit_patch: int, copies: int
) -> None:
    dit = tiny_dit(prediction=prediction, patch_size=dit_patch)
    z0, noise, timestep = flow_example(copies=copies)
    pinned = example_pins(pins, z0.shape)
    with torch.no_grad():
        errors = flow_errors(dit, z0, noise, timestep, pinned if pins else None)
        plain = [
            block_by_block(dit, z0[r], noise[r, k], timestep[r, k], pinned.where[r], pinned.latents[r])
            for r in range(2)
            for k in range(copies)
        ]
    same(errors, torch.stack(plain).view(2, copies, 12))


@pytest.mark.parametrize("dit_patch", [1, 2])
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_self_conditioning_is_a_second_pass_that_is_given_the_guess_of_the_first(
    dit_patch: int, prediction: str
) -> None:
    dit = tiny_dit(patch_size=dit_patch, prediction=prediction, self_conditioning=True)
    z0, noise, timestep = flow_example(copies=2)
    pinned = example_pins([(0, 0), (1, 4), (1, 5), (1, 6)], z0.shape)
    errors = flow_errors(dit, z0, noise, timestep, pinned, self_conditioned=True)
    plain = [
        block_by_block(dit, z0[r], noise[r, k], timestep[r, k], pinned.where[r], pinned.latents[r], True)
        for r in range(2)
        for k in range(2)
    ]
    same(errors, torch.stack(plain).view(2, 2, 12))
    same_gradients(gradients(errors.sum(), dit), gradients(torch.cat(plain).sum(), dit))
    assert not torch.allclose(errors, flow_errors(dit, z0, noise, timestep, pinned), rtol=1e-2)


def test_a_new_networks_second_input_changes_nothing_and_learns() -> None:
    dit = tiny_dit(self_conditioning=True)
    torch.nn.init.zeros_(dit.sc_in.proj.weight)  # as in a new network
    plain = tiny_dit()
    plain.load_state_dict({name: value for name, value in dit.state_dict().items() if "sc_in" not in name})
    z0, noise, timestep = flow_example()
    errors = flow_errors(dit, z0, noise, timestep, self_conditioned=True)
    assert torch.equal(errors, flow_errors(plain, z0, noise, timestep))
    errors.sum().backward()
    assert float(dit.sc_in.proj.weight.grad.abs().max()) > 0
    fresh = DiT(tiny_dit_config(self_conditioning=True))
    fresh.init_weights(seeded(0))
    assert not bool(fresh.sc_in.proj.weight.any())


@pytest.mark.parametrize(("space", "power"), [("velocity", 0), ("half", 1), ("z0", 2)])
def test_a_loss_space_weighs_the_errors_of_the_velocity_by_a_power_of_a(space: str, power: int) -> None:
    vae, dit = tiny_vae(), tiny_dit()
    batch, pieces = packed_rows()
    noise = packed_draws(vae, batch, SETTINGS.model_copy(update={"loc": -1.0, "scale": 2.0}))
    loss = prior_loss(vae, dit, batch, noise, PAD, step=FlowStep(space))
    times, errors = brute_force_flow(vae, dit, batch, noise, pieces)
    a = times.numpy() / 1000
    assert (a < 0.1).any()
    weights = np.where(a < 0.1, 0.1, a) ** power
    assert float(loss.total.detach()) == pytest.approx(
        float((errors.detach().numpy() * weights).mean()), rel=1e-5
    )
    assert float(loss.terms["flow"]) == pytest.approx(float(errors.detach().mean()), rel=1e-5)


@pytest.mark.parametrize("dit_patch", [1, 2])
def test_samples_of_a_row_have_the_errors_of_rows_of_their_own(dit_patch: int) -> None:
    dit = tiny_dit(patch_size=dit_patch)
    z0, noise, timestep = flow_example(blocks=5, copies=2)
    # Neither the order of the numbers nor -1 means anything to the DiT.
    sizes = [[(0, 4, 7), (4, 16, 2), (16, 20, -1)], [(0, 20, 0)]]
    sample = torch.stack([torch.cat([torch.full((e - b,), n) for b, e, n in row]) for row in sizes])
    with torch.no_grad():
        errors = flow_errors(dit, z0, noise, timestep, sample=sample)
        for r, row in enumerate(sizes):
            for begin, end, _ in row:
                at = slice(begin, end)
                for k in range(2):
                    plain = block_by_block(dit, z0[r, at], noise[r, k, at], timestep[r, k, at])
                    same(errors[r, k, at], plain)


def test_a_row_of_a_single_block_has_no_history() -> None:
    dit = tiny_dit()
    z0, noise, timestep = flow_example(rows=1, blocks=1)
    plain = block_by_block(dit, z0[0], noise[0, 0], timestep[0, 0])
    same(flow_errors(dit, z0, noise, timestep)[0, 0], plain)


def test_below_a_tenth_the_z0_error_is_divided_by_a_tenth() -> None:
    dit = tiny_dit(prediction="z0")
    z0, noise, _ = flow_example(rows=1, blocks=1)
    for a, divisor in ((0.02, 0.1), (0.1, 0.1), (0.4, 0.4)):
        timestep = torch.full((1, 1, 4), a * T)
        z_t = (1 - a) * z0[0] + a * noise[0, 0]
        guess = dit(z_t, timestep[0, 0], dit.layout([4]))
        expected = ((guess - z0[0]) / divisor).square().mean(-1)
        torch.testing.assert_close(flow_errors(dit, z0, noise, timestep)[0, 0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_the_gradient_reaches_z0_through_the_noisy_copies_alone(prediction: str) -> None:
    dit = tiny_dit(prediction=prediction)
    z0, noise, timestep = flow_example(copies=2)
    leaf, by_hand = z0.clone().requires_grad_(), z0.clone().requires_grad_()
    flow_errors(dit, leaf, noise, timestep).sum().backward()
    for r in range(2):
        for k in range(2):
            block_by_block(dit, by_hand[r], noise[r, k], timestep[r, k]).sum().backward()
    assert leaf.grad is not None
    assert by_hand.grad is not None
    assert float(leaf.grad.abs().min()) > 0
    torch.testing.assert_close(leaf.grad, by_hand.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_at_pure_noise_z0_gets_no_gradient_as_history_or_target(prediction: str) -> None:
    dit = tiny_dit(prediction=prediction)
    z0, noise, timestep = flow_example(copies=2)
    leaf, pure = z0.requires_grad_(), torch.full_like(timestep, T)
    loss = flow_errors(dit, leaf, noise, pure).sum()
    loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    # Yet the loss does depend on it, as history and as target.
    assert not torch.equal(flow_errors(dit, z0 + 1, noise, pure).sum(), loss)


def test_pinned_positions_have_no_loss() -> None:
    dit = tiny_dit()
    z0, noise, timestep = flow_example(copies=2)
    # In the last block, which is nobody's history: neither z0 nor noise of pinned positions may matter.
    pinned = example_pins([(0, 8), (0, 9), (1, 8)], z0.shape)
    errors = flow_errors(dit, z0, noise, timestep, pinned)
    assert torch.equal(errors == 0, pinned.where[:, None].expand(2, 2, 12))
    where = pinned.where[..., None]
    elsewhere, redrawn = torch.where(where, z0 + 3, z0), torch.where(where[:, None], noise - 5, noise)
    assert torch.equal(errors, flow_errors(dit, elsewhere, redrawn, timestep, pinned))
    assert not torch.equal(errors, flow_errors(dit, z0, noise, timestep))
    others = Pinned(pinned.where, torch.where(where, pinned.latents + 1, pinned.latents))
    assert not torch.equal(errors, flow_errors(dit, z0, noise, timestep, others))


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_that_lose_sight_of_their_history_have_the_errors_of_isolated_blocks(packed: bool) -> None:
    dit, g = tiny_dit(), seeded(3)
    rows, copies, blocks, size = 2, 2, 3, dit.config.block_size
    length, width = blocks * size, dit.config.txt_in_channels
    z0 = torch.randn(rows, length, width, generator=g)
    noise = torch.randn(rows, copies, length, width, generator=g)
    timestep = (1000 * torch.rand(rows, copies, blocks, generator=g)).repeat_interleave(size, 2)
    sample = (torch.arange(length) // (2 * size)).expand(rows, -1) if packed else None
    alone = torch.rand(rows, copies, blocks, generator=g) < 0.5
    alone[:, 0, 1], alone[:, 1, 1] = True, False
    some = flow_errors(dit, z0, noise, timestep, None, sample, alone)
    seeing = flow_errors(dit, z0, noise, timestep, None, sample)
    # Each block as a row of its own: nothing before it, at its own positions.
    isolated = torch.empty_like(some)
    for block in range(blocks):
        at = slice(block * size, (block + 1) * size)
        part = flow_errors_at(dit, z0[:, at], noise[:, :, at], timestep[:, :, at], block * size)
        isolated[:, :, at] = part
    expected = torch.where(alone.repeat_interleave(size, 2), isolated, seeing)
    torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seeing, expected, rtol=1e-3)


def flow_errors_at(dit: DiT, z0: Tensor, noise: Tensor, timestep: Tensor, start: int) -> Tensor:
    """Errors (B, K, block) of one block without history at positions from ``start`` on, written plainly."""
    rows, copies, size, width = noise.shape
    a = (timestep / T)[..., None]
    z_t = (1 - a) * z0[:, None] + a * noise
    layout = dit.layout([size] * (rows * copies))
    layout.positions = layout.positions + start
    velocity = dit.velocity(z_t.view(-1, width), timestep.flatten(), layout).view_as(noise)
    error = velocity - (noise - z0[:, None])
    if dit.config.prediction == "z0":
        error = error * a / a.clamp_min(0.1)
    return error.square().mean(-1)


def test_history_dropout_is_drawn_block_by_block_and_leaves_the_other_draws_alone() -> None:
    config = tiny_vae_config()
    without, dropped = (
        draw_noise(
            [seeded(row) for row in range(200)],
            config,
            64,
            WEIGHTS,
            FlowTerms(copies=2, history_dropout=probability),
        )
        for probability in (0.0, 0.25)
    )
    assert without.alone is None
    assert dropped.alone is not None
    assert dropped.alone.shape == (200, 2, 64 // config.block_tokens)
    assert float(dropped.alone.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(without.z1, dropped.z1)  # type: ignore[arg-type]
    assert torch.equal(without.timestep, dropped.timestep)  # type: ignore[arg-type]


class ExactPrior:
    """The conditional expectation where z0^1 ~ N(0, 1) and then z0^b ~ N(rho z0^(b-1), 1 - rho^2)."""

    def __init__(self, prediction: str, rho: float, blocks: int, size: int) -> None:
        self.config = SimpleNamespace(block_size=size, prediction=prediction)
        self.rho, self.blocks, self.size = rho, blocks, size

    def two_copy_layout(
        self, rows: int, length: int, copies: int, sample: Tensor | None, alone: Tensor | None
    ) -> tuple[int, int]:
        return rows, copies

    def moments(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the share of the history (blocks, 1, 1), and variances of z0 and z_t given it."""
        share = torch.full((self.blocks, 1, 1), self.rho)
        share[0] = 0.0
        variance = 1 - share**2
        return share, variance, (1 - a) ** 2 * variance + a**2

    def __call__(
        self,
        packed: Tensor,
        timesteps: Timesteps,
        shape: tuple[int, int],
        noisy_only: bool,
        guess: None,
        dropout: None,
    ) -> Tensor:
        assert noisy_only
        assert guess is None
        assert dropout is None
        rows, copies = shape
        clean = (self.blocks - 1) * self.size
        packed = packed.view(rows, -1, packed.shape[-1])
        times = timesteps.values[timesteps.row].view(rows, -1)
        assert not bool(times[:, :clean].any())
        blocks = (rows, copies, self.blocks, self.size, -1)
        history = F.pad(packed[:, :clean], (0, 0, self.size, 0)).view(rows, 1, *blocks[2:])
        z_t, a = packed[:, clean:].view(blocks), times[:, clean:].view(blocks) / T
        share, variance, spread = self.moments(a)
        surprise = (z_t - (1 - a) * share * history) / spread
        z0 = share * history + (1 - a) * variance * surprise
        z1 = a * surprise
        answer = (z1 - z0 if self.config.prediction == "velocity" else z0).expand(blocks).flatten(1, 3)
        return answer.flatten(0, 1)


def test_logits_in_parts_give_the_loss_and_gradients_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_vae()
    ids = torch.randint(0, vae.config.vocab_size, (3, 16), generator=seeded(0))
    batch, weights = Batch(ids), TextVAETerms()
    noise = draw_noise([seeded(row) for row in range(3)], vae.config, 16, weights)

    def outcome() -> tuple[float, list[Tensor]]:
        vae.zero_grad()
        loss = vae_loss(vae, batch, noise, weights)
        loss.total.backward()
        return float(loss.total.detach()), [p.grad.clone() for p in vae.parameters() if p.grad is not None]

    whole, gradients = outcome()
    monkeypatch.setattr(objectives, "LOGITS_AT_ONCE", 5 * vae.config.vocab_size)
    parts, by_parts = outcome()
    assert parts == pytest.approx(whole, rel=1e-6)
    for one, other in zip(by_parts, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_the_exact_prior_of_a_gaussian_chain_has_its_closed_form_loss(prediction: str) -> None:
    rows, copies, blocks, size, width, rho = 64, 2, 4, 4, 64, 0.9
    g = seeded(0)
    z0 = torch.randn(rows, blocks, size, width, generator=g)
    for b in range(1, blocks):
        z0[:, b] = rho * z0[:, b - 1] + math.sqrt(1 - rho**2) * z0[:, b]
    noise = torch.randn(rows, copies, blocks, size, width, generator=g)
    timestep = 150 + 850 * torch.rand(rows, copies, blocks, 1, generator=g).expand(-1, -1, -1, size)
    prior = ExactPrior(prediction, rho, blocks, size)
    errors = flow_errors(
        prior,  # type: ignore[arg-type]
        z0.flatten(1, 2),
        noise.flatten(2, 3),
        timestep.flatten(2),
    )
    a = timestep[..., None] / T
    _, variance, spread = prior.moments(a)
    # What z_t and the history leave of the variance of z1 - z0: 1 + s^2 - (a - (1 - a) s^2)^2 / Var(z_t).
    expected = (1 + variance - (a - (1 - a) * variance) ** 2 / spread).mean()
    assert float(errors.mean()) == pytest.approx(float(expected), rel=0.02)
    # Without the history it could do no better than 1 / ((1 - a)^2 + a^2), which is well above.
    assert float((1 / ((1 - a) ** 2 + a**2)).mean()) > 1.2 * float(expected)


# --- what is drawn -------------------------------------------------------------------------------


def assert_same_draws(ours: StepNoise, theirs: StepNoise) -> None:
    for field in fields(StepNoise):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert (mine is None) == (other is None), field.name
        assert mine is None or torch.equal(mine, other), field.name


def test_the_draws_of_a_row_do_not_depend_on_its_batch() -> None:
    config, settings = tiny_vae_config(), FlowTerms(copies=3, prefix_share=0.2)

    def draw(seeds: list[int]) -> StepNoise:
        return draw_noise([seeded(seed) for seed in seeds], config, 16, WEIGHTS, settings)

    whole = draw([3, 5, 8, 13])
    assert_same_draws(whole.rows(1, 3), draw([5, 8]))
    assert_same_draws(whole.rows(0, 1), draw([3]))
    assert_same_draws(draw([8, 3]).rows(1, 2), draw([3]))
    assert not torch.equal(draw([3]).posterior, draw([5]).posterior)


def test_the_draws_of_a_stage_have_its_shapes() -> None:
    config = tiny_vae_config(patch_size=2)
    generators = [seeded(0), seeded(1)]
    first = draw_noise(generators, config, 16, WEIGHTS)
    assert first.posterior.shape == (2, 8, 8)
    assert first.masked is not None
    assert first.masked.shape == (2, 16)
    assert first.timestep is first.z1 is first.prefix is None
    frozen = draw_noise(generators, config, 16, None, FlowTerms(copies=3))
    assert frozen.masked is frozen.masked_posterior is None
    assert frozen.timestep is not None
    assert frozen.z1 is not None
    assert frozen.prefix is not None
    assert frozen.timestep.shape == (2, 3, 8)
    assert frozen.z1.shape == (2, 3, 8, 8)
    assert frozen.prefix.shape == (2, 8)


def test_noise_is_standard_normal_of_its_own_everywhere_and_tokens_are_masked_by_their_ratio() -> None:
    noise = draw_noise(
        [seeded(row) for row in range(50)], tiny_vae_config(), 64, WEIGHTS, FlowTerms(copies=2)
    )
    assert noise.z1 is not None
    assert noise.masked is not None
    assert noise.masked_posterior is not None
    parts = [noise.posterior, noise.masked_posterior, noise.z1[:, 0], noise.z1[:, 1]]
    numbers = torch.stack([part.flatten() for part in parts]).double()
    error = 4 / math.sqrt(numbers.shape[1])
    assert float(numbers.mean(1).abs().max()) < error
    assert torch.allclose(numbers.corrcoef(), torch.eye(4, dtype=torch.float64), atol=error)
    assert torch.allclose(numbers.std(1), torch.ones(4, dtype=torch.float64), atol=error)
    share = float(noise.masked.double().mean())
    assert share == pytest.approx(0.4, abs=4 * math.sqrt(0.4 * 0.6 / noise.masked.numel()))


@pytest.mark.parametrize("per_block", [True, False])
def test_timesteps_are_shared_within_a_block_or_a_row_and_not_by_copies(per_block: bool) -> None:
    settings = FlowTerms(timestep_per="block" if per_block else "row", copies=2)
    drawn = draw_noise([seeded(row) for row in range(50)], tiny_vae_config(), 12, WEIGHTS, settings).timestep
    assert drawn is not None
    shared = drawn.view(50, 2, 3, 4) if per_block else drawn.view(50, 2, 1, 12)
    assert torch.equal(shared, shared[..., :1].expand_as(shared))
    assert len(shared[..., 0].unique()) == (300 if per_block else 100)


@pytest.mark.parametrize(("loc", "scale"), [(1.0, 1.0), (2.0, 0.5)])
def test_the_law_of_timesteps_reaches_the_loss(loc: float, scale: float) -> None:
    settings = FlowTerms(loc=loc, scale=scale, copies=2)
    drawn = draw_noise(
        [seeded(row) for row in range(1000)], tiny_vae_config(), 16, WEIGHTS, settings
    ).timestep
    assert drawn is not None
    t = drawn[..., ::4].flatten().double() / T
    logits = (t / (1 - t)).log()
    error = 4 / math.sqrt(len(t))
    assert float(logits.mean()) == pytest.approx(loc, abs=scale * error)
    assert float(logits.std()) == pytest.approx(scale, abs=scale * error)
    for deviations in (-2, -1, 0, 1, 2):
        below = 1 / (1 + math.exp(-(loc + scale * deviations)))
        share = 0.5 * (1 + math.erf(deviations / math.sqrt(2)))
        assert float((t < below).double().mean()) == pytest.approx(share, abs=0.5 * error)


def drawn_prefixes(rows: int, share: float, **over: int) -> Tensor | None:
    generators = [seeded(row) for row in range(rows)]
    settings = FlowTerms(prefix_share=share)
    return draw_noise(generators, tiny_vae_config(**over), 8, WEIGHTS, settings).prefix


def test_the_share_of_blocks_with_a_prefix_is_the_one_asked_for() -> None:
    prefix = drawn_prefixes(6000, 0.05)
    assert prefix is not None
    blocks = prefix.view(6000, 2, 4)
    sizes = blocks.sum(-1)
    # A prefix is the beginning of its block, and a row has at most one.
    assert torch.equal(blocks, torch.arange(4) < sizes[..., None])
    assert int((sizes > 0).sum(1).max()) == 1
    # Binomial: 12,000 blocks, a standard deviation of 0.002.
    assert float((sizes > 0).float().mean()) == pytest.approx(0.05, abs=0.008)
    counts = [int((sizes == n).sum()) for n in range(5)]
    assert counts[4] == 0
    assert min(counts[1:4]) > 0.2 * sum(counts[1:4])
    assert float((sizes[:, 0] > 0).sum() / (sizes > 0).sum()) == pytest.approx(0.5, abs=0.1)


def test_no_share_or_blocks_of_one_latent_mean_no_prefixes() -> None:
    assert drawn_prefixes(8, 0.0) is None
    single = drawn_prefixes(8, 1.0, block_size=1)
    assert single is not None
    assert not bool(single.any())


# --- pinned latents ------------------------------------------------------------------------------


def pins_of(vae: TextVAE, batch: Batch, noise: StepNoise) -> Pinned:
    pinned = pin(vae, batch, noise, rows_layout(vae, batch), PAD)
    assert pinned is not None
    return pinned


def given(batch: Batch, noise: StepNoise, piece: Piece, patch: int) -> int:
    """How many of a sample's tokens come before what the flow generates in a partly given block, if any."""
    latents = slice(piece.tokens.start // patch, piece.tokens.stop // patch)
    if piece.prompt or noise.prefix is None or not bool(noise.prefix[piece.row, latents].any()):
        return piece.prompt
    return patch * (int(noise.prefix[piece.row, latents].nonzero().max()) + 1)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_clean_prefix_is_encoded_as_a_prompt_that_ends_there(patch: int) -> None:
    vae, dit = tiny_vae(patch_size=patch, scaling_factor=1.3), tiny_dit()
    batch = token_rows(24, 12 * patch)
    noise = noise_for(vae, batch, FlowTerms(prefix_share=0.2))
    pinned = pins_of(vae, batch, noise)
    assert noise.prefix is not None
    assert torch.equal(pinned.where, noise.prefix)
    assert 0 < int(pinned.where.any(1).sum()) < 24
    for row in range(24):
        where = pinned.where[row].nonzero().flatten().tolist()
        if where:
            start, end = where[0], where[-1] + 1
            prompt = batch.ids[row, : end * patch].tolist()
            same(pinned.latents[row, start:end], BlockGenerator(vae, dit).encode([prompt], PAD)[0][start:end])


@pytest.mark.parametrize("patch", [1, 2])
def test_a_block_that_is_part_prompt_is_conditioned_as_in_generation(patch: int) -> None:
    vae, dit = tiny_vae(patch_size=patch, scaling_factor=1.3), tiny_dit()
    batch, pieces = packed_rows(patch)
    noise = packed_draws(vae, batch)
    pinned = pins_of(vae, batch, noise)
    engine = BlockGenerator(vae, dit)
    for piece in pieces:
        first = piece.tokens.start // patch
        own = slice(first, piece.tokens.stop // patch)
        tokens = given(batch, noise, piece, patch)
        kept = -(-tokens // patch)
        if not kept:
            assert not bool(pinned.where[piece.row, own].any())
            continue
        # Generation starts with whole blocks of the prompt as history, and pins the rest of it.
        prompt = batch.ids[piece.row, piece.tokens][:tokens].tolist()
        (sample,) = engine.start([prompt], [sample_noise(0, (4, 8), engine.device)], [0], [1.0], PAD)
        where, latents = sample.pinned_block(4)
        assert bool(where.any())
        at = slice(first + kept // 4 * 4, first + kept // 4 * 4 + 4)
        assert torch.equal(pinned.where[piece.row, at], where)
        same(pinned.latents[piece.row, at][where], latents[where])
        # Of the others, those of a prompt have no loss, and those after it have.
        whole = pinned.where[piece.row, own].clone()
        whole[kept // 4 * 4 :][:4] = False
        assert torch.equal(whole, (torch.arange(len(whole)) < kept // 4 * 4) & bool(piece.prompt))


@pytest.mark.parametrize("patch", [1, 2])
def test_pinned_latents_know_nothing_of_what_follows_them(patch: int) -> None:
    vae = tiny_vae(patch_size=patch)
    batch, pieces = packed_rows(patch)
    noise = packed_draws(vae, batch)
    pinned = pins_of(vae, batch, noise)
    for piece in pieces:
        tokens = given(batch, noise, piece, patch)
        if not tokens:
            continue
        begin, end = piece.tokens.start, piece.tokens.stop
        latents = slice(begin // patch, begin // patch - (-tokens // patch))
        ids = batch.ids.clone()
        ids[piece.row, begin + tokens : end] = 49 - ids[piece.row, begin + tokens : end]
        other = pins_of(vae, replace(batch, ids=ids), noise)
        assert torch.equal(other.where, pinned.where)
        assert torch.equal(other.latents[piece.row, latents], pinned.latents[piece.row, latents])
        # They do depend on the prompt's last token.
        ids[piece.row, begin + tokens - 1] = 49 - ids[piece.row, begin + tokens - 1]
        third = pins_of(vae, replace(batch, ids=ids), noise).latents[piece.row, latents]
        assert not torch.equal(third[-1], pinned.latents[piece.row, latents][-1])


def test_batches_without_prompts_or_prefixes_have_no_pins() -> None:
    vae, batch = tiny_vae(), token_rows(2, 8)
    noise = noise_for(vae, batch, FlowTerms(prefix_share=0.0))
    assert pin(vae, batch, noise, rows_layout(vae, batch), PAD) is None


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
        tokens = given(batch, noise, piece, patch)
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


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_the_flow_loss_of_conversations_equals_brute_force(prediction: str, patch: int) -> None:
    vae = tiny_vae(patch_size=patch, scaling_factor=0.5, shifting_factor=-1.0)
    dit = tiny_dit(prediction=prediction)
    batch, pieces = packed_rows(patch)
    noise = packed_draws(vae, batch, SETTINGS.model_copy(update={"loc": 2.0, "scale": 0.5}))
    loss = prior_loss(vae, dit, batch, noise, PAD)
    times, errors = brute_force_flow(vae, dit, batch, noise, pieces)
    assert float(times.min()) > 100
    assert count(batch, noise, vae.config) == Counts(44 * patch, 44, len(errors))
    same(loss.total, errors.mean())
    same_gradients(gradients(loss.total, dit), gradients(errors.mean(), dit))


def test_the_joint_loss_of_conversations_has_the_gradients_of_brute_force() -> None:
    vae, dit = tiny_vae(), tiny_dit()
    batch, pieces = packed_rows()
    noise = packed_draws(vae, batch)
    weights = joint_weights(lambda_vae=0.0, lambda_fm=1.0, lambda_ref=0.0)
    loss = joint_loss(vae, dit, tiny_vae(5), batch, noise, weights, PAD).total
    _, errors = brute_force_flow(vae, dit, batch, noise, pieces)
    same(loss, errors.mean())
    same_gradients(gradients(loss, vae, dit), gradients(errors.mean(), vae, dit))


def test_flow_by_t_is_the_mean_error_of_equal_bins_of_t() -> None:
    vae, dit = tiny_vae(), tiny_dit()
    batch, pieces = packed_rows()
    noise = packed_draws(vae, batch, SETTINGS.model_copy(update={"loc": 0.0, "scale": 1.0}))
    assert noise.timestep is not None
    noise.timestep[0, 0, 8:12] = T  # the end of the path belongs to the last bin
    values = readable(prior_loss(vae, dit, batch, noise, PAD).terms)
    times, errors = (x.detach().numpy() for x in brute_force_flow(vae, dit, batch, noise, pieces))
    by_bin = [[] for _ in range(10)]
    for t, error in zip(times, errors, strict=True):
        by_bin[min(9, math.floor(t / 100))].append(error)
    bins = values["flow_by_t"]
    assert isinstance(bins, list)
    assert any(not own for own in by_bin)
    assert len(by_bin[9]) >= 4
    for ours, own in zip(bins, by_bin, strict=True):
        assert (ours is None) == (not own)
        assert ours is None or ours == pytest.approx(np.mean(own), rel=1e-5)


Compute = Callable[[TextVAE, DiT, Batch, StepNoise, Counts | None], Loss]


@lru_cache
def _reference(patch: int, last_ln: bool) -> TextVAE:
    return tiny_vae(5, patch_size=patch, encoder_last_ln=last_ln)


def _joint(vae: TextVAE, dit: DiT, batch: Batch, noise: StepNoise, counts: Counts | None = None) -> Loss:
    weights = joint_weights(lambda_vae=0.6, lambda_fm=1.9, lambda_ref=0.25)
    reference = _reference(vae.config.patch_size, vae.config.encoder_last_ln)
    return joint_loss(vae, dit, reference, batch, noise, weights, PAD, counts)


def _fixed_snr(vae: TextVAE, dit: DiT, batch: Batch, noise: StepNoise, counts: Counts | None = None) -> Loss:
    vae.encoder.config = replace(vae.encoder.config, log_snr=1.0)
    return vae_loss(vae, batch, noise, WEIGHTS, counts)


LOSSES: dict[str, Compute] = {
    "stage 1": lambda vae, dit, batch, noise, counts=None: vae_loss(vae, batch, noise, WEIGHTS, counts),
    "stage 1, fixed SNR": _fixed_snr,
    "frozen": lambda vae, dit, batch, noise, counts=None: prior_loss(vae, dit, batch, noise, PAD, counts),
    "joint": _joint,
}
every_loss = pytest.mark.parametrize("compute", LOSSES.values(), ids=LOSSES.keys())


def summed(parts: Iterator[Loss] | list[Loss]) -> Loss:
    """Contributions added up, as the trainer does."""
    losses = list(parts)
    terms = {name: torch.stack([loss.terms[name] for loss in losses]).sum(0) for name in losses[0].terms}
    return Loss(torch.stack([loss.total for loss in losses]).sum(), terms)


def same_loss(ours: Loss, theirs: Loss) -> None:
    same(ours.total, theirs.total)
    assert ours.terms.keys() == theirs.terms.keys()
    for name, term in ours.terms.items():
        torch.testing.assert_close(
            term, theirs.terms[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@every_loss
@pytest.mark.parametrize("patch", [1, 2])
def test_samples_of_a_row_add_up_to_its_loss(compute: Compute, patch: int) -> None:
    vae, dit = tiny_vae(patch_size=patch, encoder_last_ln=False), tiny_dit()
    batch, pieces = packed_rows(patch)
    noise = packed_draws(vae, batch)
    counts = count(batch, noise, vae.config)
    whole = compute(vae, dit, batch, noise, None)
    samples = [alone(batch, noise, piece, patch) for piece in pieces]
    parts = summed([compute(vae, dit, *sample, counts) for sample in samples])
    same_loss(whole, parts)
    own = [count(*sample, vae.config) for sample in samples]
    assert sum(own[1:], own[0]) == counts
    same_gradients(gradients(whole.total, vae, dit), gradients(parts.total, vae, dit))


@every_loss
def test_what_rows_are_filled_up_with_changes_nothing(compute: Compute) -> None:
    vae, dit = tiny_vae(encoder_last_ln=False), tiny_dit()
    batch, _ = packed_rows()
    noise = packed_draws(vae, batch)
    assert batch.sample is not None
    filling = batch.sample == FILLING
    assert bool(filling.any())
    other = replace(batch, ids=torch.where(filling, 49 - batch.ids, batch.ids))
    losses = [compute(vae, dit, rows, noise, None) for rows in (batch, other)]
    same_loss(*losses)
    same_gradients(*(gradients(loss.total, vae, dit) for loss in losses))


@every_loss
def test_micro_batches_add_up_to_the_loss_of_the_step(compute: Compute) -> None:
    vae, dit = tiny_vae(), tiny_dit()
    rows = [packed_rows(seed=seed)[0] for seed in (0, 1)]
    assert all(row.sample is not None and row.trained is not None for row in rows)
    batch = Batch(*(torch.cat([getattr(row, name) for row in rows]) for name in ("ids", "sample", "trained")))
    noise = noise_for(vae, batch, FlowTerms(copies=2, prefix_share=0.2))
    counts = count(batch, noise, vae.config)
    cuts = [(0, 1), (1, 3), (3, 4)]
    parts = [(batch.rows(b, e), noise.rows(b, e)) for b, e in cuts]
    own = [count(*part, vae.config) for part in parts]
    assert len({each.noisy for each in own}) > 1
    assert own[0] + own[1] + own[2] == counts
    whole = compute(vae, dit, batch, noise, None)
    added = summed([compute(vae, dit, *part, counts) for part in parts])
    same_loss(whole, added)
    same_gradients(gradients(whole.total, vae, dit), gradients(added.total, vae, dit))
    ours, theirs = readable(whole.terms), readable(added.terms)
    assert ours.keys() == theirs.keys()
    assert not ours.keys() & {"mean2", "variance", "flow_sums", "flow_counts"}
    assert ours["log_snr"] == pytest.approx(theirs["log_snr"], rel=1e-5)


def test_the_log_snr_that_is_logged_is_that_of_all_samples() -> None:
    vae = tiny_vae(encoder_last_ln=False)
    batch, pieces = packed_rows()
    terms = vae_loss(vae, batch, noise_for(vae, batch), WEIGHTS).terms
    posteriors = [posterior_of(vae, batch.ids[piece.row, piece.tokens]) for piece in pieces]
    mean, variance = (
        torch.cat([getattr(q, name) for q in posteriors]).detach().double().numpy()
        for name in ("mean", "variance")
    )
    assert readable(terms)["log_snr"] == pytest.approx(math.log((mean**2).mean() / variance.mean()), abs=1e-5)


@pytest.mark.parametrize("compute", [LOSSES["frozen"], LOSSES["joint"]], ids=["frozen", "joint"])
def test_the_loss_of_several_copies_is_the_mean_over_single_ones(compute: Compute) -> None:
    vae, dit = tiny_vae(), tiny_dit()
    batch, _ = packed_rows()
    noise = packed_draws(vae, batch, SETTINGS.model_copy(update={"copies": 3}))
    assert noise.timestep is not None
    assert noise.z1 is not None
    together = compute(vae, dit, batch, noise, None).total
    single = [
        compute(
            vae,
            dit,
            batch,
            replace(noise, timestep=noise.timestep[:, k : k + 1], z1=noise.z1[:, k : k + 1]),
            None,
        ).total
        for k in range(3)
    ]
    mean = torch.stack(single).mean()
    torch.testing.assert_close(together, mean, rtol=1e-6, atol=1e-6)
    assert float(torch.stack(single).detach().std()) > 1e-3
    same_gradients(gradients(together, vae, dit), gradients(mean, vae, dit))


def joint(vae: TextVAE, dit: DiT, reference: TextVAE, weights: JointSection, seed: int = 0) -> Loss:
    batch = token_rows(3, 12)
    noise = noise_for(vae, batch, SETTINGS, seed)
    return joint_loss(vae, dit, reference, batch, noise, weights, PAD)


def test_the_joint_loss_is_the_weighted_sum_of_its_terms() -> None:
    loss = joint(
        tiny_vae(0), tiny_dit(), tiny_vae(5), joint_weights(lambda_vae=0.6, lambda_fm=1.9, lambda_ref=0.25)
    )
    t = loss.terms
    total = 0.6 * (t["nll"] + 0.3 * t["log_q"] + 0.7 * t["masked"]) + 1.9 * t["flow"] + 0.25 * t["kl_ref"]
    torch.testing.assert_close(loss.total.detach(), total)
    assert all(not term.requires_grad for term in t.values())
    assert all(float(t[name].abs()) > 1e-3 for name in ("nll", "log_q", "masked", "flow", "kl_ref"))


def test_the_joint_terms_equal_those_of_the_distributions() -> None:
    vae, reference, batch = tiny_vae(0), tiny_vae(5), token_rows(3, 12)
    terms = joint(vae, tiny_dit(), reference, joint_weights()).terms
    entropy = kl = torch.zeros(())
    for row in batch.ids:
        q = posterior_of(vae, row)
        entropy = entropy + q.entropy().sum()
        kl = kl + kl_divergence(q, posterior_of(reference, row)).sum()
    same(terms["log_q"], -entropy.detach() / 36)
    same(terms["kl_ref"], kl.detach() / 36)
    # What the Text VAE's terms have in common with stage 1.
    first = vae_loss(vae, batch, noise_for(vae, batch, SETTINGS), WEIGHTS).terms
    for name in ("nll", "masked", "accuracy"):
        torch.testing.assert_close(terms[name], first[name])


def test_an_unchanged_encoder_has_no_kl_to_its_reference() -> None:
    terms = joint(tiny_vae(0), tiny_dit(), tiny_vae(0), joint_weights()).terms
    assert float(terms["kl_ref"]) == pytest.approx(0, abs=1e-6)


def test_the_reference_encoder_gets_no_gradient() -> None:
    vae, reference = tiny_vae(0), tiny_vae(5)
    joint(vae, tiny_dit(), reference, joint_weights()).total.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert moved(vae.encoder)
    assert moved(vae.decoder)


def test_the_flow_term_trains_the_encoder_and_not_the_decoder() -> None:
    vae, dit = tiny_vae(), tiny_dit()
    joint(
        vae, dit, tiny_vae(5), joint_weights(lambda_vae=0.0, lambda_fm=1.0, lambda_ref=0.0)
    ).total.backward()
    assert moved(vae.encoder)
    assert moved(dit)
    assert not moved(vae.decoder)


def test_a_frozen_vae_gets_no_gradient() -> None:
    vae, dit = tiny_vae(), tiny_dit()
    batch = token_rows(3, 12)
    loss = prior_loss(vae, dit, batch, noise_for(vae, batch, SETTINGS), PAD)
    loss.total.backward()
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert moved(dit)
    torch.testing.assert_close(loss.total.detach(), loss.terms["flow"])


@every_loss
def test_a_loss_is_a_pure_function_of_networks_batch_and_draws(compute: Compute) -> None:
    vae, dit, batch = tiny_vae(), tiny_dit(), token_rows(4, 12)

    def once(seed: int) -> Tensor:
        return compute(vae, dit, batch, noise_for(vae, batch, SETTINGS, seed), None).total

    torch.manual_seed(0)
    first = once(7)
    state = torch.random.get_rng_state()
    again = once(7)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, once(8))


# --- overfitting ---------------------------------------------------------------------------------

# A fixed SNR keeps the encoder from escaping L_FM by ever larger variances.
SMALL = TextVAETerms(beta=1e-4)


def overfit(networks: list[torch.nn.Module], loss: Callable[[], Loss]) -> tuple[Loss, Loss]:
    """Return the losses before and after 120 steps on one batch with fixed noise."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=5e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, 120)
    first = loss()
    for _ in range(120):
        optimiser.zero_grad()
        loss().total.backward()
        optimiser.step()
        schedule.step()
    return first, loss()


def test_stage_1_overfits_a_batch() -> None:
    vae, batch = tiny_vae(log_snr=2.0), packed_rows()[0]
    noise = noise_for(vae, batch, weights=SMALL)
    before, after = overfit([vae], lambda: vae_loss(vae, batch, noise, SMALL))
    assert float(before.terms["nll"]) > 3
    assert float(after.terms["nll"]) < 0.02
    assert float(after.terms["accuracy"]) == pytest.approx(1)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_stage_2_overfits_a_batch(prediction: str) -> None:
    vae, dit = tiny_vae(log_snr=2.0), tiny_dit(prediction=prediction)
    batch, _ = packed_rows()
    noise = packed_draws(vae, batch)
    before, after = overfit([dit], lambda: prior_loss(vae, dit, batch, noise, PAD))
    assert float(before.terms["flow"]) > 1
    assert float(after.terms["flow"]) < 0.05 * float(before.terms["flow"])


def test_joint_training_overfits_a_batch() -> None:
    vae, dit, reference = tiny_vae(log_snr=2.0), tiny_dit(), tiny_vae(log_snr=2.0)
    batch, _ = packed_rows()
    noise, weights = packed_draws(vae, batch), JointSection(beta=1e-4, lambda_ref=1e-3)
    before, after = overfit(
        [vae, dit],
        lambda: joint_loss(vae, dit, reference, batch, noise, weights, PAD),
    )
    assert float(before.terms["nll"]) > 3
    assert float(after.terms["nll"]) < 0.02
    assert float(after.terms["flow"]) < 0.01 * float(before.terms["flow"])
