"""The losses of both stages against plain computations: one token, one block, one sample at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from colada.data.rows import FILLING, Batch
from colada.flow import T
from colada.networks.dit import DiT
from colada.networks.vae import Posterior, TextVAE
from colada.train import losses as objectives
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
from helpers import tiny_dit, tiny_vae
from rows import (
    PAD,
    SETTINGS,
    WEIGHTS,
    alone,
    as_normal,
    brute_force_flow,
    gradients,
    joint_weights,
    moved,
    noise_for,
    packed_draws,
    packed_rows,
    posterior_of,
    same,
    same_gradients,
    seeded,
    token_rows,
)


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


# --- stage 2 -------------------------------------------------------------------------------------


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
