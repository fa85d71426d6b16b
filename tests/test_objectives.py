import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from colada import objectives
from colada.dit import DiT
from colada.flow import T, TimestepLaw
from colada.generation import BlockGenerator
from colada.layers import History
from colada.objectives import (
    FlowSettings,
    JointWeights,
    Pinned,
    VAEWeights,
    draw_prefixes,
    draw_timesteps,
    encode,
    flow_loss,
    flow_matching,
    stage1_loss,
    stage2_frozen_loss,
    stage2_joint_loss,
)
from colada.vae import Posterior, TextVAE
from helpers import tiny_dit, tiny_vae

PAD = 0
WEIGHTS = VAEWeights(beta=0.3, mask=0.7, mask_ratio=0.4)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def token_rows(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 50, (rows, length), generator=seeded(seed))


def gradients(network: torch.nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]


# --- the Text VAE's terms ----------------------------------------------------------------------


def posterior_of(vae: TextVAE, row: Tensor) -> Normal:
    """One row alone, as a distribution."""
    q = vae.encode(row, [len(row)])
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
    ids = token_rows(3, 16)
    loss = stage1_loss(vae, ids, WEIGHTS, seeded(1))

    # The draws in the order of the equation: z0's noise, then what is masked, then that stream's noise.
    generator = seeded(1)
    latents = (3, 16 // patch, 8)
    noise = torch.randn(latents, generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < WEIGHTS.mask_ratio
    masked_noise = torch.randn(latents, generator=generator)
    nll = kl = mask = torch.zeros(())
    right = 0
    for row, e, hidden, masked_e in zip(ids, noise, masked, masked_noise, strict=True):
        q = posterior_of(vae, row)
        z0 = q.mean + q.stddev * e
        nll = nll + plain_nll(vae, z0, row)
        kl = kl + kl_divergence(q, Normal(0.0, 1.0)).sum()
        seen = (z0 - 0.2) * 1.7
        right += int((vae.decode(seen, [len(seen)]).argmax(-1) == row).sum())
        q = posterior_of(vae, torch.tensor([50 if h else int(t) for t, h in zip(row, hidden, strict=True)]))
        mask = mask + plain_nll(vae, q.mean + q.stddev * masked_e, row)
    tokens = ids.numel()
    assert 0 < masked.sum() < tokens
    for name, plain in (("nll", nll), ("kl", kl), ("masked", mask)):
        torch.testing.assert_close(loss.terms[name], plain.detach() / tokens, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.total, (nll + 0.3 * kl + 0.7 * mask) / tokens, rtol=1e-5, atol=1e-6)
    assert float(loss.terms["accuracy"]) == pytest.approx(right / tokens)


def test_without_a_mask_weight_nothing_is_masked() -> None:
    loss = stage1_loss(tiny_vae(), token_rows(2, 8), VAEWeights(beta=0.5, mask=0.0), seeded(0))
    assert "masked" not in loss.terms
    torch.testing.assert_close(loss.total.detach(), loss.terms["nll"] + 0.5 * loss.terms["kl"])


def random_posterior(seed: int) -> Posterior:
    mean, logvar = torch.randn(2, 12, 8, generator=seeded(seed))
    return Posterior(mean, logvar)


def as_normal(q: Posterior) -> Normal:
    assert q.logvar is not None
    return Normal(q.mean, q.logvar.exp().sqrt())


def test_kl_entropy_and_log_snr_are_those_of_the_distributions() -> None:
    q, other = random_posterior(0), random_posterior(5)
    tokens = 24
    p, r = as_normal(q), as_normal(other)
    torch.testing.assert_close(
        objectives.kl_standard_normal(q, tokens), kl_divergence(p, Normal(0.0, 1.0)).sum() / tokens
    )
    torch.testing.assert_close(objectives.kl_between(q, other, tokens), kl_divergence(p, r).sum() / tokens)
    torch.testing.assert_close(objectives.expected_log_q(q, tokens), -p.entropy().sum() / tokens)
    torch.testing.assert_close(objectives.log_snr(q), ((p.mean**2).mean() / p.variance.mean()).log())


@pytest.mark.parametrize("wanted", [-1.0, 1.5, 4.5])
def test_a_fixed_log_snr_is_exactly_that(wanted: float) -> None:
    vae, ids = tiny_vae(encoder_last_ln=False).requires_grad_(False), token_rows(2, 16)
    q = encode(vae, ids, wanted)
    assert q.logvar is not None
    assert math.log(float((q.mean**2).mean() / q.logvar.exp().mean())) == pytest.approx(wanted, abs=1e-5)
    loss = stage1_loss(vae, ids, VAEWeights(log_snr=wanted), seeded(0))
    assert float(loss.terms["log_snr"]) == pytest.approx(wanted, abs=1e-5)
    free = encode(vae, ids)
    torch.testing.assert_close(q.mean, free.mean)
    assert abs(float(objectives.log_snr(free)) - wanted) > 0.1


# --- flow matching -----------------------------------------------------------------------------


def block_by_block(
    dit: DiT, z0: Tensor, noise: Tensor, timestep: Tensor, pinned: Pinned | None = None
) -> Tensor:
    """L_FM with one pass per block, after committing the clean blocks before it."""
    size = dit.config.block_size
    total, count = torch.zeros(()), 0
    for r in range(len(z0)):
        history = History()
        for start in range(0, z0.shape[1], size):
            block = slice(start, start + size)
            clean, z1, t = z0[r, block], noise[r, block], timestep[r, block].clone()
            a = t[:, None] / T
            z_t = (1 - a) * clean + a * z1
            free = torch.ones(size, dtype=torch.bool)
            if pinned is not None:
                free = ~pinned.where[r, block]
                z_t = torch.where(free[:, None], z_t, pinned.latents[r, block])
                t[~free] = 0.0
            velocity = dit(z_t, t, dit.layout([size], [history]), [history])
            if dit.config.prediction == "z0":
                # What the guess implies, with the z_t that it starts from taken as given.
                velocity = (z_t.detach() - velocity) / a
            error = velocity - (z1 - clean.detach())
            total = total + error[free].square().sum()
            count += int(free.sum()) * z0.shape[-1]
            dit(clean.detach(), torch.zeros(()), dit.layout([size], [history]), [history], committing=True)
    return total / count


def flow_example(
    seed: int = 0, rows: int = 2, blocks: int = 3, size: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    g = seeded(seed)
    shape = (rows, blocks * size, 8)
    timestep = 100 + 900 * torch.rand(rows, blocks, generator=g).repeat_interleave(size, 1)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g), timestep


def example_pins(where: list[tuple[int, int]], shape: torch.Size) -> Pinned:
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    for row, position in where:
        mask[row, position] = True
    return Pinned(mask, torch.randn(shape, generator=seeded(9)))


@pytest.mark.parametrize("dit_patch", [1, 2])
@pytest.mark.parametrize("pins", [[], [(0, 0), (1, 4), (1, 5), (1, 6)], [(0, 8), (0, 9)]])
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_two_copies_at_once_equal_one_block_at_a_time(
    prediction: str, pins: list[tuple[int, int]], dit_patch: int
) -> None:
    dit = tiny_dit(prediction=prediction, patch_size=dit_patch)
    z0, noise, timestep = flow_example()
    pinned = example_pins(pins, z0.shape) if pins else None
    packed = flow_loss(dit, z0, noise, timestep, pinned)
    torch.testing.assert_close(packed, block_by_block(dit, z0, noise, timestep, pinned), rtol=1e-5, atol=1e-6)


def test_a_row_of_a_single_block_has_no_history() -> None:
    dit = tiny_dit()
    z0, noise, timestep = flow_example(blocks=1)
    torch.testing.assert_close(
        flow_loss(dit, z0, noise, timestep), block_by_block(dit, z0, noise, timestep), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("patch", [1, 2])
def test_the_drawn_flow_loss_is_that_of_normalised_latents(
    patch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, dit = tiny_vae(patch_size=patch, scaling_factor=0.5, shifting_factor=-1.0), tiny_dit()
    ids = token_rows(3, 12 * patch)
    z0 = torch.randn(3 * 12, 8, generator=seeded(4))
    drawn: list[Any] = []
    real = flow_loss

    def spy(*args: Any) -> Tensor:
        drawn.extend(args)
        return real(*args)

    monkeypatch.setattr(objectives, "flow_loss", spy)
    settings = FlowSettings(prefix_share=1.0)
    loss = flow_matching(vae, dit, ids, z0, PAD, settings, seeded(2))
    _, used, noise, timestep, pinned = drawn
    torch.testing.assert_close(used, ((z0 + 1.0) * 0.5).view(3, 12, 8))
    assert pinned is not None
    assert bool(pinned.where.any(1).all())
    free = block_by_block(dit, used, noise, timestep, pinned)
    torch.testing.assert_close(loss, free, rtol=1e-5, atol=1e-6)


def test_below_a_tenth_the_z0_error_is_divided_by_a_tenth() -> None:
    dit = tiny_dit(prediction="z0")
    z0, noise, _ = flow_example(rows=1, blocks=1)
    for a, divisor in ((0.02, 0.1), (0.1, 0.1), (0.4, 0.4)):
        timestep = torch.full(z0.shape[:2], a * T)
        z_t = (1 - a) * z0[0] + a * noise[0]
        guess = dit(z_t, timestep[0], dit.layout([4]))
        expected = ((guess - z0[0]) / divisor).square().mean()
        torch.testing.assert_close(flow_loss(dit, z0, noise, timestep), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_the_gradient_reaches_z0_through_the_noisy_copy_alone(prediction: str) -> None:
    dit = tiny_dit(prediction=prediction)
    z0, noise, timestep = flow_example()
    leaf, by_hand = z0.clone().requires_grad_(), z0.clone().requires_grad_()
    flow_loss(dit, leaf, noise, timestep).backward()
    block_by_block(dit, by_hand, noise, timestep).backward()
    assert leaf.grad is not None
    assert by_hand.grad is not None
    assert float(leaf.grad.abs().min()) > 0
    torch.testing.assert_close(leaf.grad, by_hand.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_at_pure_noise_z0_gets_no_gradient_as_history_or_target(prediction: str) -> None:
    dit = tiny_dit(prediction=prediction)
    z0, noise, _ = flow_example()
    leaf = z0.requires_grad_()
    loss = flow_loss(dit, leaf, noise, torch.full(z0.shape[:2], T))
    loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    # Yet the loss does depend on it, as history and as target.
    assert not torch.equal(flow_loss(dit, z0 + 1, noise, torch.full(z0.shape[:2], T)), loss)


def test_pinned_positions_have_no_loss() -> None:
    dit = tiny_dit()
    z0, noise, timestep = flow_example()
    # In the last block, which is nobody's history: neither z0 nor noise of pinned positions may matter.
    pinned = example_pins([(0, 8), (0, 9), (1, 8)], z0.shape)
    loss = flow_loss(dit, z0, noise, timestep, pinned)
    where = pinned.where[..., None]
    moved, redrawn = torch.where(where, z0 + 3, z0), torch.where(where, noise - 5, noise)
    other = flow_loss(dit, moved, redrawn, timestep, pinned)
    assert torch.equal(loss, other)
    assert not torch.equal(loss, flow_loss(dit, z0, noise, timestep))
    latents = torch.where(where, pinned.latents + 1, pinned.latents)
    assert not torch.equal(loss, flow_loss(dit, z0, noise, timestep, Pinned(pinned.where, latents)))


class ExactPrior:
    """The conditional expectation where z0^1 ~ N(0, 1) and then z0^b ~ N(rho z0^(b-1), 1 - rho^2)."""

    def __init__(self, prediction: str, rho: float, blocks: int, size: int) -> None:
        self.config = SimpleNamespace(block_size=size, prediction=prediction)
        self.rho, self.blocks, self.size = rho, blocks, size

    def two_copy_layout(self, rows: int, length: int) -> int:
        return rows

    def moments(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the share of the history (blocks, 1, 1), and variances of z0 and z_t given it."""
        share = torch.full((self.blocks, 1, 1), self.rho)
        share[0] = 0.0
        variance = 1 - share**2
        return share, variance, (1 - a) ** 2 * variance + a**2

    def __call__(self, copies: Tensor, times: Tensor, rows: int) -> Tensor:
        clean = (self.blocks - 1) * self.size
        copies, times = copies.view(rows, -1, copies.shape[-1]), times.view(rows, -1)
        assert not bool(times[:, :clean].any())
        blocks = (rows, self.blocks, self.size, -1)
        history = F.pad(copies[:, :clean], (0, 0, self.size, 0)).view(blocks)
        z_t, a = copies[:, clean:].view(blocks), times[:, clean:].view(blocks) / T
        share, variance, spread = self.moments(a)
        surprise = (z_t - (1 - a) * share * history) / spread
        z0 = share * history + (1 - a) * variance * surprise
        z1 = a * surprise
        answer = z1 - z0 if self.config.prediction == "velocity" else z0
        return torch.cat([torch.zeros_like(copies[:, :clean]), answer.flatten(1, 2)], 1).flatten(0, 1)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_the_exact_prior_of_a_gaussian_chain_has_its_closed_form_loss(prediction: str) -> None:
    rows, blocks, size, width, rho = 128, 4, 4, 64, 0.9
    g = seeded(0)
    z0 = torch.randn(rows, blocks, size, width, generator=g)
    for b in range(1, blocks):
        z0[:, b] = rho * z0[:, b - 1] + math.sqrt(1 - rho**2) * z0[:, b]
    noise = torch.randn(z0.shape, generator=g)
    timestep = 150 + 850 * torch.rand(rows, blocks, 1, generator=g).expand(rows, blocks, size)
    prior = ExactPrior(prediction, rho, blocks, size)
    loss = flow_loss(
        prior,  # type: ignore[arg-type]
        z0.flatten(1, 2),
        noise.flatten(1, 2),
        timestep.flatten(1),
    )
    a = timestep[..., None] / T
    _, variance, spread = prior.moments(a)
    # What z_t and the history leave of the variance of z1 - z0: 1 + s^2 - (a - (1 - a) s^2)^2 / Var(z_t).
    expected = (1 + variance - (a - (1 - a) * variance) ** 2 / spread).mean()
    assert float(loss) == pytest.approx(float(expected), rel=0.02)
    # Without the history it could do no better than 1 / ((1 - a)^2 + a^2), which is well above.
    assert float((1 / ((1 - a) ** 2 + a**2)).mean()) > 1.2 * float(expected)


def test_timesteps_are_shared_within_a_block_or_a_row() -> None:
    per_block = draw_timesteps(50, 12, 4, FlowSettings(), seeded(0)).view(50, 3, 4)
    assert torch.equal(per_block, per_block[..., :1].expand_as(per_block))
    assert len(per_block[..., 0].unique()) == 150
    per_row = draw_timesteps(50, 12, 4, FlowSettings(per_block=False), seeded(0))
    assert torch.equal(per_row, per_row[:, :1].expand_as(per_row))
    assert len(per_row[:, 0].unique()) == 50


def test_the_law_of_timesteps_reaches_the_loss() -> None:
    settings = FlowSettings(TimestepLaw(loc=2.0, scale=0.5))
    drawn = draw_timesteps(4000, 4, 4, settings, seeded(0))[:, 0] / T
    logits = (drawn / (1 - drawn)).log()
    assert float(logits.mean()) == pytest.approx(2.0, abs=0.05)
    assert float(logits.std()) == pytest.approx(0.5, abs=0.05)


# --- clean prefixes ----------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2])
def test_a_clean_prefix_is_encoded_as_a_prompt_that_ends_there(patch: int) -> None:
    vae, dit = tiny_vae(patch_size=patch, scaling_factor=1.3), tiny_dit()
    ids = token_rows(24, 12 * patch)
    pinned = draw_prefixes(vae, ids, PAD, FlowSettings(prefix_share=0.2), seeded(3))
    assert pinned is not None
    chosen = pinned.where.any(1)
    assert 0 < int(chosen.sum()) < 24
    for row in range(24):
        where = pinned.where[row].nonzero().flatten().tolist()
        if not where:
            continue
        start, end = where[0], where[-1] + 1
        assert where == list(range(start, end))
        assert start % 4 == 0
        assert 1 <= end - start <= 3
        prompt = ids[row, : end * patch].tolist()
        latents = BlockGenerator(vae, dit).encode([prompt], PAD)[0]
        torch.testing.assert_close(pinned.latents[row, start:end], latents[start:end], rtol=1e-5, atol=1e-6)


def test_the_share_of_blocks_with_a_prefix_is_the_one_asked_for() -> None:
    vae, ids = tiny_vae(), token_rows(6000, 8)
    pinned = draw_prefixes(vae, ids, PAD, FlowSettings(prefix_share=0.05), seeded(0))
    assert pinned is not None
    sizes = pinned.where.view(6000, 2, 4).sum(-1)
    # Binomial: 12,000 blocks, a standard deviation of 0.002.
    assert float((sizes > 0).float().mean()) == pytest.approx(0.05, abs=0.008)
    counts = [int((sizes == n).sum()) for n in range(5)]
    assert counts[4] == 0
    assert min(counts[1:4]) > 0.2 * sum(counts[1:4])
    assert float((sizes[:, 0] > 0).sum() / (sizes > 0).sum()) == pytest.approx(0.5, abs=0.1)


def test_no_share_means_no_prefixes() -> None:
    assert draw_prefixes(tiny_vae(), token_rows(8, 8), PAD, FlowSettings(prefix_share=0.0), seeded(0)) is None


# --- stage 2 -----------------------------------------------------------------------------------

SETTINGS = FlowSettings(prefix_share=0.1)


def joint(
    vae: TextVAE, dit: DiT, reference: TextVAE, weights: JointWeights, seed: int = 0
) -> objectives.Loss:
    ids = token_rows(3, 12)
    return stage2_joint_loss(vae, dit, reference, ids, PAD, SETTINGS, WEIGHTS, weights, seeded(seed))


def test_the_joint_loss_is_the_weighted_sum_of_its_terms() -> None:
    loss = joint(tiny_vae(0), tiny_dit(), tiny_vae(5), JointWeights(vae=0.6, flow=1.9, reference=0.25))
    t = loss.terms
    total = 0.6 * (t["nll"] + 0.3 * t["log_q"] + 0.7 * t["masked"]) + 1.9 * t["flow"] + 0.25 * t["kl_ref"]
    torch.testing.assert_close(loss.total.detach(), total)
    assert all(not term.requires_grad for term in t.values())
    assert all(float(t[name].abs()) > 1e-3 for name in ("nll", "log_q", "masked", "flow", "kl_ref"))


def test_the_joint_terms_equal_those_of_the_distributions() -> None:
    vae, reference, ids = tiny_vae(0), tiny_vae(5), token_rows(3, 12)
    terms = joint(vae, tiny_dit(), reference, JointWeights()).terms
    entropy = kl = torch.zeros(())
    for row in ids:
        q = posterior_of(vae, row)
        entropy = entropy + q.entropy().sum()
        kl = kl + kl_divergence(q, posterior_of(reference, row)).sum()
    torch.testing.assert_close(terms["log_q"], -entropy.detach() / 36, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["kl_ref"], kl.detach() / 36, rtol=1e-5, atol=1e-6)


def test_an_unchanged_encoder_has_no_kl_to_its_reference() -> None:
    terms = joint(tiny_vae(0), tiny_dit(), tiny_vae(0), JointWeights()).terms
    assert float(terms["kl_ref"]) == pytest.approx(0, abs=1e-6)


def test_the_reference_encoder_gets_no_gradient() -> None:
    vae, reference = tiny_vae(0), tiny_vae(5)
    joint(vae, tiny_dit(), reference, JointWeights()).total.backward()
    assert not gradients(reference)
    assert gradients(vae.encoder)
    assert gradients(vae.decoder)


def test_the_flow_term_trains_the_encoder_and_not_the_decoder() -> None:
    vae, dit = tiny_vae(), tiny_dit()
    joint(vae, dit, tiny_vae(5), JointWeights(vae=0.0, flow=1.0, reference=0.0)).total.backward()
    assert gradients(vae.encoder)
    assert gradients(dit)
    assert not gradients(vae.decoder)


def test_a_frozen_vae_gets_no_gradient() -> None:
    vae, dit = tiny_vae(), tiny_dit()
    loss = stage2_frozen_loss(vae, dit, token_rows(3, 12), PAD, SETTINGS, WEIGHTS, seeded(0))
    loss.total.backward()
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert gradients(dit)
    torch.testing.assert_close(loss.total.detach(), loss.terms["flow"])


@pytest.mark.parametrize("which", ["stage1", "frozen", "joint"])
def test_a_loss_is_a_pure_function_of_the_generator(which: str) -> None:
    vae, dit, reference, ids = tiny_vae(), tiny_dit(), tiny_vae(5), token_rows(4, 12)

    def once(seed: int) -> Tensor:
        if which == "stage1":
            return stage1_loss(vae, ids, WEIGHTS, seeded(seed)).total
        if which == "frozen":
            return stage2_frozen_loss(vae, dit, ids, PAD, SETTINGS, WEIGHTS, seeded(seed)).total
        return joint(vae, dit, reference, JointWeights(), seed).total

    torch.manual_seed(0)
    first = once(7)
    state = torch.random.get_rng_state()
    again = once(7)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, once(8))
