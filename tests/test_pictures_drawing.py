"""Drawing and describing in the readable loop: against plain Euler steps of one sample, batched as alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.flow import T
from colada.generate.pictures import append_block, describe_block, draw_latents, show
from colada.generate.settings import RequestSettings
from colada.networks.dit import DiT
from colada.networks.layers import KVCache
from colada.networks.packing import Layout
from colada.networks.pictures import with_pictures
from colada.train.picture_flow import drawing_errors
from helpers import tiny_dit

PICTURE, WIDTH, STEPS = 4, 8, 5
GENERATOR = torch.Generator().manual_seed(0)
SETTINGS = RequestSettings(steps=STEPS)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


CAPTIONS, NOISE = [normal(8, WIDTH), normal(0, WIDTH), normal(4, WIDTH)], normal(3, PICTURE, WIDTH)


def network(dual: int = 0) -> DiT:
    return tiny_dit(img_channels=WIDTH, img_grid=[2, 2], dual_layers=dual, prediction="z0")


def euler(dit: DiT, noise: Tensor, cache: KVCache, places: Tensor, picture: bool, scale: float) -> Tensor:
    """Euler steps of v = u + s (c - u), with v = (z - z0) / a: one block, two passes a step."""
    kind, z = torch.full((len(noise),), picture), noise
    for step in range(STEPS):
        a, a_next = 1 - step / STEPS, 1 - (step + 1) / STEPS
        velocities = []
        for seen in (cache, KVCache()):
            layout = Layout.one_block([places], 4, [len(seen)], [kind])
            velocities.append((z - dit(z, torch.tensor(T * a), layout, [seen])) / a)
        conditional, unconditional = velocities
        z = z + (a_next - a) * (unconditional + scale * (conditional - unconditional))
    return z


def drawn_by_hand(dit: DiT, caption: Tensor, noise: Tensor, scale: float) -> Tensor:
    cache = KVCache()
    if len(caption):
        dit(caption, torch.tensor(0.0), dit.layout([len(caption)], [cache]), [cache], appending=True)
    return euler(dit, noise, cache, torch.full((PICTURE,), len(caption)), True, scale)


@torch.no_grad()
@pytest.mark.parametrize("dual", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_drawing_is_plain_euler_steps_after_the_caption(scale: float, dual: int) -> None:
    dit = network(dual)
    steps = list(draw_latents(dit, CAPTIONS, NOISE, [scale] * 3, SETTINGS))
    assert len(steps) == STEPS
    for number in range(3):
        expected = drawn_by_hand(dit, CAPTIONS[number], NOISE[number], scale)
        torch.testing.assert_close(steps[-1][0][number], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(*steps[-1])  # At the end, z is the z0 that it points at.


@torch.no_grad()
@pytest.mark.parametrize("dual", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_describing_is_plain_euler_steps_after_prompt_picture_and_finished_blocks(
    scale: float, dual: int
) -> None:
    dit, pictures, noises = network(dual), normal(3, PICTURE, WIDTH), normal(2, 3, 4, WIDTH)
    contexts = show(dit, CAPTIONS, pictures)
    blocks = []
    for noise in noises:
        blocks.append(list(describe_block(dit, contexts, noise, [scale] * 3, SETTINGS))[-1][0])
        append_block(dit, contexts, blocks[-1])
    for number, prompt in enumerate(CAPTIONS):
        before, cache, clean = len(prompt), KVCache(), torch.tensor(0.0)
        places = torch.tensor([*range(before), *[before] * PICTURE])
        kind = torch.tensor([False] * before + [True] * PICTURE)
        layout = Layout.one_block([places], 4, [0], [kind])
        dit(torch.cat([prompt, pictures[number]]), clean, layout, [cache], appending=True)
        for block, noise in enumerate(noises):
            places = before + 4 + 4 * block + torch.arange(4)
            expected = euler(dit, noise[number], cache, places, False, scale)
            torch.testing.assert_close(blocks[block][number], expected, rtol=1e-4, atol=1e-3)
            layout = Layout.one_block([places], 4, [len(cache)], [torch.zeros(4).bool()])
            dit(blocks[block][number], clean, layout, [cache], appending=True)


@torch.no_grad()
def test_a_picture_is_the_same_in_any_company() -> None:
    dit, scales = network(), [3.0, 1.0, 1.5]
    together = list(draw_latents(dit, CAPTIONS, NOISE, scales, SETTINGS))[-1][0]
    for number in range(3):
        (*_, (alone, _)) = draw_latents(
            dit,
            CAPTIONS[number : number + 1],
            NOISE[number : number + 1],
            scales[number : number + 1],
            SETTINGS,
        )
        torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-5)


def test_a_network_that_has_learnt_two_pictures_draws_the_one_that_is_named() -> None:
    plain = tiny_dit(prediction="z0")
    dit = with_pictures(plain, network().config, torch.Generator().manual_seed(0)).train()
    captions, pictures = normal(2, 4, WIDTH), normal(2, PICTURE, WIDTH)
    optimiser, half = torch.optim.Adam(dit.parameters(), 5e-3), 8
    lengths, alone = torch.full((2 * half,), 4), torch.zeros(2 * half, dtype=torch.bool)
    torch.manual_seed(0)
    for _ in range(250):
        rows = torch.arange(2).repeat(half)
        times, picture_times = torch.rand(2 * half, 1) * T, torch.rand(2 * half) * T
        noise = torch.randn(2 * half, 4, WIDTH), torch.randn(2 * half, PICTURE, WIDTH)
        picture, text = drawing_errors(
            dit, captions[rows], lengths, pictures[rows], *noise, times.expand(-1, 4), picture_times, alone
        )
        optimiser.zero_grad()
        (picture.mean() + text.mean()).backward()
        optimiser.step()
    with torch.no_grad():
        named = [0, 1] * 4
        noises = normal(8, PICTURE, WIDTH)
        steps = draw_latents(dit.eval(), [captions[n] for n in named], noises, [1.0] * 8, SETTINGS)
        drawn = list(steps)[-1][0]
    distance = (drawn[:, None] - pictures).square().mean((2, 3))
    assert distance.argmin(1).tolist() == named
    assert distance.min(1).values.max() < 0.3


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ColadaError, match="this model has no pictures: img_channels=0"):
        next(draw_latents(tiny_dit(), CAPTIONS, NOISE, [1.0] * 3, SETTINGS))
    with pytest.raises(ColadaError, match="a text of 3 latents, expected a multiple of block_size=4"):
        next(draw_latents(network(), [normal(3, WIDTH)], NOISE[:1], [1.0], SETTINGS))
    with pytest.raises(ColadaError, match="this model has no pictures: img_channels=0"):
        show(tiny_dit(), CAPTIONS, NOISE)
