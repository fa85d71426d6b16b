"""Levers of training, against plain code: consistency, timesteps that adapt, dropout, a decoder alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from colada.data.rows import Batch
from colada.errors import ColadaError
from colada.flow import TimestepLaw
from colada.networks.dit import DiT
from colada.networks.dropout import Dropout, Masks
from colada.train.flow_matching import (
    Consistency,
    FlowStep,
    Pinned,
    consistency_errors,
    flow_latents,
    flow_matching,
    noisy_pass,
    predict,
)
from colada.train.kinds import FlowTerms, PriorTerms
from colada.train.losses import encode, rows_layout
from colada.train.noise import count, draw_noise
from colada.train.timesteps import BINS, adapted, bin_of, density, new_memory, remember
from colada.train.trainer import Trainer
from helpers import tiny_dit, tiny_vae
from runs import final_state, metrics, recipe

SIZE = 4


def example(rows: int = 2, blocks: int = 3, copies: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents (B, M, C), noisy copies (B, K, M, C) and timesteps (B, K, M), some on the grid."""
    g = torch.Generator().manual_seed(3)
    clean = torch.randn(rows, blocks * SIZE, 8, generator=g)
    timestep = 1000 * torch.rand(rows, copies, blocks, generator=g)
    timestep[0, 0, 1], timestep[0, 0, 2], timestep[1, 0, 0] = 250.0, 1000.0, 90.0
    return (
        clean,
        torch.randn(rows, copies, blocks * SIZE, 8, generator=g),
        timestep.repeat_interleave(SIZE, 2),
    )


# --- consistency --------------------------------------------------------------------------------


def plain_guess(dit: DiT, history: Tensor, z: Tensor, t: float, guess: Tensor | None) -> Tensor:
    """The guess of z0 (block, C) of one block after its history, in a pass of its own."""
    times = torch.tensor([0.0] * len(history) + [t] * len(z))
    seen = None if guess is None else torch.cat([0 * history, guess])
    output = dit(torch.cat([history, z]), times, dit.layout([len(times)]), guess=seen)[len(history) :]
    return output if dit.config.prediction == "z0" else z - t / 1000 * output


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
@pytest.mark.parametrize("guesses", [False, True])
def test_consistency_is_the_change_of_a_guess_along_its_own_step(prediction: str, guesses: bool) -> None:
    dit = tiny_dit(1, prediction=prediction, self_conditioning=guesses)
    teacher = tiny_dit(2, prediction=prediction, self_conditioning=guesses)
    clean, z, timestep = example()
    alone = torch.tensor([[[True, False, True]] * 2] * 2)
    consistency = Consistency(teacher, 1.0, steps=4)
    output = noisy_pass(dit, z, timestep, clean, None, None, alone, guesses)
    errors = consistency_errors(dit, consistency, z, output, timestep, clean, None, None, alone, guesses)
    ends = 0
    for row in range(2):
        for copy in range(2):
            for block in range(3):
                at = slice(block * SIZE, (block + 1) * SIZE)
                history, now, t = (
                    clean[row, : block * SIZE],
                    z[row, copy, at],
                    float(timestep[row, copy, at][0]),
                )
                if alone[row, copy, block]:
                    # Where a block without history stands changes nothing: positions are relative.
                    history = history[:0]
                first = plain_guess(dit, history, now, t, torch.zeros_like(now)) if guesses else None
                guess = plain_guess(dit, history, now, t, first)
                later = max(s for s in (0, 250, 500, 750) if s < t)
                there = guess + later / t * (now - guess)
                target = (
                    plain_guess(teacher, history, there, later, guess if guesses else None)
                    if later
                    else there
                )
                ends += later == 0
                expected = (guess - target).square().mean(-1)
                torch.testing.assert_close(errors[row, copy, at], expected, rtol=1e-4, atol=1e-5)
    assert ends
    errors.sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert float(dit.txt_in.proj.weight.grad.abs().max()) > 0  # type: ignore[union-attr]


def test_consistency_has_no_error_where_latents_are_pinned_and_adds_to_the_loss() -> None:
    vae, dit, teacher = tiny_vae(), tiny_dit(1), tiny_dit(2)
    clean, z, timestep = example()
    pinned = Pinned(torch.arange(12).expand(2, -1) == 5, clean)
    z = torch.where(pinned.where[:, None, :, None], clean[:, None], z)
    output = noisy_pass(dit, z, timestep, clean, pinned)
    errors = consistency_errors(dit, Consistency(teacher, 1.0, 4), z, output, timestep, clean, pinned)
    assert not bool(errors[:, :, 5].any())

    batch = Batch(torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1)))
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    noise = draw_noise(generators, vae.config, 16, flow=FlowTerms())
    layout = rows_layout(vae, batch)
    z0, counts = encode(vae, batch.ids, layout).mean, count(batch, noise, vae.config)
    latents = flow_latents(vae, batch, noise, z0, layout, 0)
    plain, _ = flow_matching(dit, latents, noise, counts)
    step = FlowStep(consistency=Consistency(teacher, 0.3, 4))
    total, terms = flow_matching(dit, latents, noise, counts, step)
    torch.testing.assert_close(total, plain + 0.3 * terms["consistency"])
    assert float(terms["consistency"].detach()) > 0


def test_consistency_needs_averaged_weights_and_its_weight_rises(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=r"consistency=1 with ema=0, expected averaged weights"):
        recipe("stages.prior.consistency=1", "stages.prior.ema=0")
    weights = ["stages.prior.ema=0.5", "stages.prior.consistency=2", "stages.prior.consistency_ramp=0.5"]
    Trainer(recipe(*weights), tmp_path).run()
    records = [own for own in metrics(tmp_path) if own["stage"] == "prior" and own["split"] == "train"]
    added = [own["loss"] - own["flow"] for own in records]
    ramp = [0, 2 / 3, 4 / 3, 2, 2, 2]
    assert added == pytest.approx(
        [weight * own["consistency"] for weight, own in zip(ramp, records, strict=True)], abs=1e-6
    )
    assert added[-1] > 1e-5


# --- timesteps that adapt -----------------------------------------------------------------------

LAW = TimestepLaw(1.69, 0.8)


def test_a_laws_quantiles_are_those_of_its_draws() -> None:
    timesteps = LAW.sample((200_000,), torch.Generator().manual_seed(0))
    logits = np.log(timesteps.double().numpy() / (1000 - timesteps.double().numpy()))
    expected = [0.5 * (1 + math.erf((x - 1.69) / 0.8 / math.sqrt(2))) for x in logits[:2000]]
    np.testing.assert_allclose(LAW.quantile(timesteps.double()[:2000]).numpy(), expected, rtol=0, atol=1e-4)
    shares = torch.histc(LAW.quantile(timesteps), 20, 0, 1) / len(timesteps)
    torch.testing.assert_close(shares, torch.full((20,), 0.05), rtol=0, atol=3e-3)
    torch.testing.assert_close(
        LAW.at(LAW.quantile(timesteps.double())), timesteps.double(), rtol=1e-4, atol=1e-2
    )


def test_timesteps_are_drawn_in_proportion_to_the_fall_of_the_loss() -> None:
    memory, rng = new_memory(), np.random.default_rng(0)
    timesteps = LAW.sample((400_000,), torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapted(LAW, memory, timesteps), timesteps, rtol=1e-4, atol=1e-2)
    losses = 2 - np.tanh(np.linspace(-3, 3, BINS))
    kept, weight = np.zeros(BINS), np.zeros(BINS)
    for step in range(40):
        numbers = rng.integers(0, 3, BINS) if step else np.ones(BINS)
        noisy = losses + 0.01 * rng.standard_normal(BINS)
        remember(memory, torch.tensor(noisy * numbers), torch.tensor(numbers))
        kept = np.where(numbers > 0, 0.99 * kept + 0.01 * noisy, kept)
        weight = np.where(numbers > 0, 0.99 * weight + 0.01, weight)
    slope = np.abs(np.gradient(kept / weight))
    expected = 0.8 * slope / slope.sum() + 0.2 / BINS
    np.testing.assert_allclose(density(memory).numpy(), expected, rtol=1e-9)
    bins = bin_of(LAW, adapted(LAW, memory, timesteps))
    np.testing.assert_allclose(
        np.bincount(bins.numpy(), minlength=BINS) / len(timesteps), expected, atol=3e-3
    )
    assert expected.max() > 5 * expected.min()


def test_a_flat_loss_leaves_the_law_as_it_is() -> None:
    memory = new_memory()
    remember(memory, torch.ones(BINS), torch.ones(BINS))
    assert torch.equal(density(memory), torch.full((BINS,), 1 / BINS, dtype=torch.float64))


def test_a_run_remembers_the_errors_of_its_steps_by_quantile(tmp_path: Path) -> None:
    Trainer(recipe("stages.prior.adaptive_timesteps=true"), tmp_path).run()
    sums, weights = final_state(tmp_path)["memory"]["timesteps"]
    assert float(weights.max()) == pytest.approx(1 - 0.99**6)
    assert bool((sums[weights > 0] > 0).all())


# --- dropout ------------------------------------------------------------------------------------


def test_masks_are_independent_draws_of_the_share_asked_for() -> None:
    masks = Dropout(torch.arange(16, dtype=torch.int32), 0.3).masks(16 * 50)
    kept = torch.stack([masks(torch.ones(800, 64), site) for site in range(4)])
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    zeros = (kept == 0).double().view(4, 16, 50, 64)
    assert float(zeros.mean()) == pytest.approx(0.3, abs=0.003)
    for axis in range(4):  # Of each site, row, position and channel; and none follows from its neighbour.
        others = [other for other in range(4) if other != axis]
        means = zeros.mean(others)
        deviation = (0.21 / (zeros.numel() / len(means))) ** 0.5
        assert float((means - 0.3).abs().max()) < 5 * deviation
        one, other = (
            zeros.narrow(axis, 0, zeros.shape[axis] - 1),
            zeros.narrow(axis, 1, zeros.shape[axis] - 1),
        )
        correlation = float(((one - 0.3) * (other - 0.3)).mean() / 0.21)
        assert abs(correlation) < 5 / one.numel() ** 0.5


def test_a_row_has_its_own_dropout_in_any_batch() -> None:
    dit = tiny_dit()
    clean, z, timestep = example()
    seeds = torch.tensor([5, 6], dtype=torch.int32)
    both = predict(dit, z, timestep, clean, dropout=Dropout(seeds, 0.2))
    alone = predict(dit, z[1:], timestep[1:], clean[1:], dropout=Dropout(seeds[1:], 0.2))
    torch.testing.assert_close(both[1:], alone)
    other = predict(dit, z[1:], timestep[1:], clean[1:], dropout=Dropout(seeds[:1], 0.2))
    assert not torch.allclose(alone, other, rtol=1e-2)
    without = predict(dit, z[1:], timestep[1:], clean[1:])
    assert not torch.allclose(alone, without, rtol=1e-2)


def test_dropout_is_on_what_attention_and_mlp_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all of it dropped, what goes in comes out: only the residual stream is left."""
    dit, seen = tiny_dit(), list[tuple[int, int]]()

    def nothing(masks: Masks, x: Tensor, site: int) -> Tensor:
        seen.append((site, len(x)))
        return 0 * x

    monkeypatch.setattr(Masks, "__call__", nothing)
    clean, z, timestep = example()
    dropped = predict(dit, z, timestep, clean, dropout=Dropout(torch.zeros(2, dtype=torch.int32), 0.5))
    # Of two rows: 8 clean latents and two copies of 12; the last layer's are the noisy ones.
    assert seen == [(0, 64), (1, 64), (2, 48), (3, 48)]
    other = predict(dit, z, timestep, 2 * clean, dropout=Dropout(torch.zeros(2, dtype=torch.int32), 0.5))
    assert torch.equal(dropped, other)  # Nobody looks at the history.


def test_dropout_is_for_training_alone() -> None:
    vae, dit = tiny_vae(), tiny_dit(1)
    batch = Batch(torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1)))
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    settings = PriorTerms(dropout=0.4)
    noise = draw_noise(generators, vae.config, 16, flow=settings)
    layout = rows_layout(vae, batch)
    z0, counts = encode(vae, batch.ids, layout).mean.detach(), count(batch, noise, vae.config)
    latents = flow_latents(vae, batch, noise, z0, layout, 0)

    def flow(dropout: float) -> float:
        own = noise if dropout else replace(noise, dropout=None)
        total, _ = flow_matching(dit, latents, own, counts, FlowStep(dropout=dropout))
        return float(total)

    assert flow(0.4) != pytest.approx(flow(0), rel=1e-3)
    with torch.no_grad():
        assert flow(0.4) == flow(0)


# --- a decoder alone ----------------------------------------------------------------------------


def test_the_last_steps_of_a_text_vae_may_be_its_decoders(tmp_path: Path) -> None:
    whole = [
        "stages.prior.steps=0",
        "stages.vae.schedule=wsd",
        "stages.vae.ema=0",
        "run.keep_last=20",
        "run.save_every=1",
    ]
    Trainer(recipe(*whole, "stages.vae.decoder_only=0.5"), tmp_path).run()
    middle, end = (final_state_at(tmp_path, step) for step in (3, 6))
    moved = {name for name in end if not torch.equal(middle[name], end[name])}
    assert all(name.startswith("decoder.") for name in moved)
    assert {"decoder.in_layer.weight", "decoder.final_layer.weight"} <= moved
    records = [own for own in metrics(tmp_path) if own["split"] == "train"]
    assert [("masked" in own) for own in records] == [True] * 3 + [False] * 3
    assert [own["loss"] == pytest.approx(own["nll"], rel=1e-6) for own in records[3:]] == [True] * 3
    assert not recipe("stages.vae.decoder_only=1").stages["vae"].whole_steps  # type: ignore[attr-defined]


def final_state_at(out: Path, step: int) -> dict[str, Tensor]:
    """The Text VAE of a checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = out / "whole.pt"
    dcp_to_torch_save(out / f"checkpoints/vae-{step:08d}", file)
    return dict(torch.load(file, weights_only=False)["vae"])
