"""What a training step draws of a row, and which latents are pinned: shapes, laws and independence."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from colada.flow import T
from colada.generate.noise import sample_noise
from colada.generate.reference import BlockGenerator
from colada.train.flow_matching import pin
from colada.train.kinds import FlowTerms
from colada.train.losses import (
    rows_layout,
)
from colada.train.noise import StepNoise, draw_noise
from helpers import tiny_dit, tiny_vae, tiny_vae_config
from rows import (
    PAD,
    WEIGHTS,
    given_count,
    noise_for,
    packed_draws,
    packed_rows,
    pins_of,
    same,
    seeded,
    token_rows,
)

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
        tokens = given_count(batch, noise, piece, patch)
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
        tokens = given_count(batch, noise, piece, patch)
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
