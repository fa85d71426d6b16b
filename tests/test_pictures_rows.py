"""Text and pictures in one network: who sees whom, and losses against one sample, one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.flow import PREDICTIONS, T
from colada.networks.config import DiTConfig
from colada.networks.dit import DiT
from colada.networks.layers import KVCache
from colada.networks.packing import Layout
from colada.networks.pictures import describing_layout, drawing_layout, with_pictures
from colada.train.picture_flow import describing_errors, drawing_errors
from helpers import tiny_dit

PICTURE, WIDTH, BLOCK = 4, 8, 4
GENERATOR = torch.Generator().manual_seed(0)


def unified(seed: int = 0, **over: Any) -> DiT:
    return tiny_dit(seed, **{"img_channels": WIDTH, "img_grid": [2, 2], **over})


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def timesteps(rows: int, length: int) -> Tensor:
    drawn = torch.rand(rows, length // BLOCK, generator=GENERATOR) * T
    return drawn.repeat_interleave(BLOCK, 1)


# --- who sees whom -----------------------------------------------------------------------------

# (kind, block) of each cell, or None for padding; the paper's rules written out.
Cell = tuple[str, int] | None


def may_draw(query: Cell, key: Cell, alone: bool) -> bool:
    if query is None or key is None:
        return False
    (asking, i), (asked, j) = query, key
    rules: dict[str, dict[str, bool]] = {
        "C": {"C": j <= i, "I": False, "N": False},
        "I": {"C": not alone, "I": True, "N": False},
        "N": {"C": j < i, "I": False, "N": j == i},
    }
    return rules[asking][asked]


def may_describe(query: Cell, key: Cell) -> bool:
    if query is None or key is None:
        return False
    (asking, i), (asked, j) = query, key
    rules: dict[str, dict[str, bool]] = {
        "P": {"P": True, "I": True, "C": False, "N": False},
        "I": {"P": True, "I": True, "C": False, "N": False},
        "C": {"P": True, "I": True, "C": j <= i, "N": False},
        "N": {"P": True, "I": True, "C": j < i, "N": j == i},
    }
    return rules[asking][asked]


def text(kind: str, length: int, there: int, block: int) -> list[Cell]:
    return [(kind, n // block) if n < there else None for n in range(length)]


def check(
    layout: Layout, rows: list[list[Cell]], may_see: Callable[[int, Cell, Cell], bool], clean: int
) -> None:
    size = len(rows[0])
    for groups, first in ((layout.groups, 0), (layout.noisy_groups, clean)):
        ((tile,),) = [group.tiles for group in groups]
        assert isinstance(tile.mask, Tensor)
        for row, cells in enumerate(rows):
            expected = [
                [may_see(row, query, key) or i == j for j, key in enumerate(cells)]
                for i, query in enumerate(cells)
                if i >= first
            ]
            assert tile.mask[row, 0].tolist() == expected
        assert tile.keys == ((0, size),)
        assert tile.queries == ((0, size - first),)


@pytest.mark.parametrize("captions", [True, False])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_a_picture_is_drawn_from_all_of_its_caption_and_text_does_not_see_it(
    block: int, captions: bool
) -> None:
    length, lengths, alone = 3 * block, [3 * block, block, 2 * block], [False, False, True]
    layout = drawing_layout(torch.tensor(lengths), length, PICTURE, block, torch.tensor(alone), captions)
    picture: list[Cell] = [("I", 0)] * PICTURE
    rows = [text("C", length, n, block) + picture + text("N", length, n, block) * captions for n in lengths]
    check(layout, rows, lambda row, query, key: may_draw(query, key, alone[row]), length)
    place = list(range(length))
    assert layout.positions.view(3, -1).tolist() == [
        place + [n] * PICTURE + place * captions for n in lengths
    ]
    assert layout.pictures is not None
    assert layout.pictures.view(3, -1).tolist() == [
        [False] * length + [True] * PICTURE + [False] * length * captions for _ in lengths
    ]


@pytest.mark.parametrize("block", [1, 4, 16])
def test_an_answer_sees_prompt_and_picture_which_do_not_see_it(block: int) -> None:
    prompts, prompt, lengths, length = (
        [block, 2 * block, 0],
        2 * block,
        [2 * block, 3 * block, block],
        3 * block,
    )
    layout = describing_layout(torch.tensor(prompts), prompt, torch.tensor(lengths), length, PICTURE, block)
    picture: list[Cell] = [("I", 0)] * PICTURE
    rows = [
        text("P", prompt, p, block)
        + picture
        + text("C", length, n, block)[: length - block]
        + text("N", length, n, block)
        for p, n in zip(prompts, lengths, strict=True)
    ]
    check(layout, rows, lambda row, query, key: may_describe(query, key), prompt + PICTURE + length - block)
    for p, positions in zip(prompts, layout.positions.view(3, -1).tolist(), strict=True):
        answer = [p + block + n for n in range(length)]
        assert positions == [*range(prompt), *[p] * PICTURE, *answer[: length - block], *answer]


def test_one_block_sees_itself_and_its_cache_whatever_else_is_packed() -> None:
    dit = unified()
    first, second = normal(8, WIDTH), normal(4, WIDTH)
    caches = [KVCache(), KVCache()]
    dit(
        torch.cat([first, second]),
        torch.tensor(0.0),
        dit.layout([8, 4], caches),
        caches,
        appending=True,
    )
    new = [normal(PICTURE, WIDTH) for _ in caches]
    where = [torch.full((PICTURE,), 8), torch.full((PICTURE,), 4)]
    pictures = [torch.ones(PICTURE, dtype=torch.bool)] * 2
    layout = Layout.one_block(where, BLOCK, [8, 4], pictures)
    together = dit(torch.cat(new), torch.tensor(500.0), layout, caches)
    for number in (0, 1):
        alone = Layout.one_block(where[number : number + 1], BLOCK, [[8, 4][number]], pictures[:1])
        output = dit(new[number], torch.tensor(500.0), alone, caches[number : number + 1])
        torch.testing.assert_close(together.split(PICTURE)[number], output, rtol=0, atol=1e-5)
    # The order of a picture's latents is told by their places alone.
    time, layout = torch.tensor(500.0), Layout.one_block(where[:1], BLOCK, [8], pictures[:1])
    turned = dit(new[0].flip(0), time, layout, caches[:1])
    assert not torch.allclose(turned.flip(0), together[:PICTURE], atol=1e-4)
    with torch.no_grad():
        dit.img_pos.zero_()
    output, turned = (dit(latents, time, layout, caches[:1]) for latents in (new[0], new[0].flip(0)))
    torch.testing.assert_close(output, turned.flip(0), rtol=0, atol=1e-5)


def test_axial_positions_depend_on_rows_and_columns_apart_alone() -> None:
    """A rotated query and key of a picture meet at an angle of their rows' and columns' distances."""
    dit = unified(img_grid=[3, 2], img_axial=True, rope_dim=8)
    positions, pictures = torch.tensor([0, 1, *[2] * 6, 4]), torch.arange(2, 8)
    table = torch.view_as_complex(dit.rotations(positions, pictures))[:, 0]
    plain = torch.view_as_complex(dit.rotations(positions))[:, 0]
    for row in (0, 1, 8):  # Text is where it was.
        assert torch.equal(table[row], plain[row])
    frequencies = 10000.0 ** (-torch.arange(4) / 4)
    for one in range(6):
        for other in range(6):
            (row, column), (other_row, other_column) = divmod(one, 2), divmod(other, 2)
            apart = torch.tensor([row - other_row, column - other_column] * 2)
            expected = torch.exp(1j * apart * frequencies)
            torch.testing.assert_close(table[2 + one] * table[2 + other].conj(), expected)


# --- losses ------------------------------------------------------------------------------------


def one_error(dit: DiT, z0: Tensor, noise: Tensor, a: float, layout: Layout, cache: KVCache) -> Tensor:
    """The error of one block after a KV cache."""
    z = (1 - a) * z0 + a * noise
    output = dit(z, torch.tensor(T * a), layout, [cache])
    error = PREDICTIONS[dit.config.prediction].error(output, z0, noise, torch.tensor(a))
    return error.square().mean(-1)


def append(dit: DiT, latents: Tensor, layout: Layout, cache: KVCache) -> None:
    dit(latents, torch.tensor(0.0), layout, [cache], appending=True)


def one_block(positions: Tensor, cache: KVCache, picture: Tensor | None = None) -> Layout:
    return Layout.one_block(
        [positions],
        BLOCK,
        [len(cache)],
        [torch.zeros(len(positions)).bool() if picture is None else picture],
    )


@torch.no_grad()
@pytest.mark.parametrize(("prediction", "dual"), [("velocity", 0), ("z0", 0), ("z0", 1), ("z0", 2)])
def test_errors_of_drawing_are_those_of_one_picture_after_its_caption(prediction: str, dual: int) -> None:
    dit = unified(prediction=prediction, dual_layers=dual)
    lengths, alone = [12, 4, 8], [False, False, True]
    captions, pictures = normal(3, 12, WIDTH), normal(3, PICTURE, WIDTH)
    noise, picture_noise = normal(3, 12, WIDTH), normal(3, PICTURE, WIDTH)
    times, picture_times = timesteps(3, 12), torch.tensor([700.0, 30.0, 990.0])
    picture, errors = drawing_errors(
        dit,
        captions,
        torch.tensor(lengths),
        pictures,
        noise,
        picture_noise,
        times,
        picture_times,
        torch.tensor(alone),
    )
    assert errors is not None
    # The picture does not see its noisy caption: without one it is drawn alike.
    given = captions, torch.tensor(lengths), pictures
    rest = None, picture_noise, None, picture_times, torch.tensor(alone)
    without, none = drawing_errors(dit, *given, *rest)
    assert none is None
    torch.testing.assert_close(without, picture, rtol=1e-5, atol=1e-6)
    for row, length in enumerate(lengths):
        cache = KVCache()
        for start in range(0, length, BLOCK):
            part, places = slice(start, start + BLOCK), torch.arange(start, start + BLOCK)
            layout = one_block(places, cache)
            a = float(times[row, start] / T)
            expected = one_error(dit, captions[row, part], noise[row, part], a, layout, cache)
            torch.testing.assert_close(errors[row, part], expected, rtol=1e-4, atol=1e-5)
            append(dit, captions[row, part], layout, cache)
        assert errors[row, length:].tolist() == [0] * (12 - length)
        seen = KVCache() if alone[row] else cache
        layout = one_block(torch.full((PICTURE,), length), seen, torch.ones(PICTURE).bool())
        a = float(picture_times[row] / T)
        expected = one_error(dit, pictures[row], picture_noise[row], a, layout, seen)
        torch.testing.assert_close(picture[row], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("prediction", "dual"), [("velocity", 0), ("z0", 0), ("z0", 1), ("z0", 2)])
def test_errors_of_describing_are_those_of_one_block_after_prompt_and_picture(
    prediction: str, dual: int
) -> None:
    dit = unified(prediction=prediction, dual_layers=dual)
    prompt_lengths, lengths = [4, 8, 0], [12, 4, 8]
    prompts, pictures, answers = normal(3, 8, WIDTH), normal(3, PICTURE, WIDTH), normal(3, 12, WIDTH)
    noise, times = normal(3, 12, WIDTH), timesteps(3, 12)
    errors = describing_errors(
        dit, prompts, torch.tensor(prompt_lengths), pictures, answers, torch.tensor(lengths), noise, times
    )
    for row, (before, length) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        cache = KVCache()
        places = torch.cat([torch.arange(before), torch.full((PICTURE,), before)])
        context = torch.cat([prompts[row, :before], pictures[row]])
        append(dit, context, one_block(places, cache, torch.arange(before + PICTURE) >= before), cache)
        for start in range(0, length, BLOCK):
            part = slice(start, start + BLOCK)
            layout = one_block(before + BLOCK + torch.arange(start, start + BLOCK), cache)
            expected = one_error(
                dit, answers[row, part], noise[row, part], float(times[row, start] / T), layout, cache
            )
            torch.testing.assert_close(errors[row, part], expected, rtol=1e-4, atol=1e-5)
            append(dit, answers[row, part], layout, cache)
        assert errors[row, length:].tolist() == [0] * (12 - length)


def test_losses_reach_pictures_and_clean_cells_carry_no_gradient() -> None:
    dit = unified()
    captions, pictures = normal(2, 8, WIDTH).requires_grad_(), normal(2, PICTURE, WIDTH).requires_grad_()
    lengths, alone = torch.tensor([8, 4]), torch.tensor([False, False])
    noise, times = normal(2, 8, WIDTH), timesteps(2, 8)
    picture, _ = drawing_errors(
        dit,
        captions,
        lengths,
        pictures,
        noise,
        normal(2, PICTURE, WIDTH),
        times,
        torch.tensor([500.0, 300.0]),
        alone,
    )
    picture.mean().backward()
    assert captions.grad is None or float(captions.grad.abs().max()) == 0
    assert pictures.grad is not None
    for name in ("img_in.proj.weight", "img_pos", "img_out.proj.weight"):
        gradient = dict(dit.named_parameters())[name].grad
        assert gradient is not None
        assert float(gradient.abs().sum()) > 0


# --- one network for both ----------------------------------------------------------------------


def text_part(dit: DiT) -> DiT:
    """The network of a model's text alone, with the same weights."""
    text = DiT(replace(dit.config, img_channels=0, img_grid=None, img_axial=False, dual_layers=0))
    state = dit.state_dict()
    text.load_state_dict({name: state[name] for name in text.state_dict()})
    return text


@pytest.mark.parametrize("dual", [0, 1])
def test_text_alone_is_bit_for_bit_what_a_text_network_makes_of_it(dual: int) -> None:
    dit = unified(dual_layers=dual)
    plain = text_part(dit)
    assert plain.config == DiTConfig.from_dict(
        {key: value for key, value in dit.config.to_dict().items() if not key.startswith(("img_", "dual_"))}
    )
    assert not [name for name in plain.state_dict() if name.startswith("img_")]
    latents, times = normal(20, WIDTH), torch.full((20,), 400.0)
    for network_layout in (dit.layout([12, 8]), dit.two_copy_layout(1, 12, 1)):
        count = len(network_layout)
        both = [network(latents[:count], times[:count], network_layout) for network in (dit, plain)]
        assert torch.equal(*both)


@pytest.mark.parametrize("dual", [0, 2])
def test_a_text_network_is_given_pictures_and_its_text_stays(dual: int) -> None:
    plain = tiny_dit()
    dit = with_pictures(plain, unified(dual_layers=dual).config, torch.Generator().manual_seed(0))
    latents, layout = normal(12, WIDTH), plain.layout([12])
    assert torch.equal(dit(latents, torch.tensor(300.0), layout), plain(latents, torch.tensor(300.0), layout))
    back = text_part(dit).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in plain.state_dict().items())
    drawing = Layout.one_block([torch.zeros(PICTURE).long()], BLOCK, [0], [torch.ones(PICTURE).bool()])
    assert float(dit(normal(PICTURE, WIDTH), torch.tensor(500.0), drawing).detach().abs().max()) == 0


def test_dual_layers_of_equal_weights_are_single_layers_and_others_are_not() -> None:
    single = unified(1)
    dual = with_pictures(text_part(single), unified(dual_layers=2).config)
    dual.load_state_dict(single.state_dict(), strict=False)
    layout = drawing_layout(torch.tensor([8, 4]), 8, PICTURE, BLOCK, torch.tensor([False, True]))
    latents, times = normal(len(layout), WIDTH), torch.full((len(layout),), 250.0)
    for noisy_only in (False, True):
        outputs = [network(latents, times, layout, noisy_only=noisy_only) for network in (single, dual)]
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    with torch.no_grad():
        dual.blocks[0].image.mlp.proj_in.weight.mul_(2)
    output = dual(latents, times, layout).view(2, -1, WIDTH)
    changed = (output - single(latents, times, layout).view(2, -1, WIDTH)).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 8 + [True] * PICTURE + [False] * 8  # Text does not see the picture.


def test_a_text_only_configuration_has_no_new_keys_and_no_new_weights() -> None:
    text_only = tiny_dit()
    assert not [name for name in text_only.state_dict() if name.startswith("img_")]
    assert not [key for key in text_only.config.to_dict() if key.startswith("img_")]
    added = sum(p.numel() for p in unified().parameters()) - sum(p.numel() for p in text_only.parameters())
    assert added == (WIDTH * 32 + 32) + 4 * 32 + (32 * WIDTH + WIDTH)


def test_a_fresh_network_draws_nothing_yet() -> None:
    dit = DiT(unified().config)
    dit.init_weights(torch.Generator().manual_seed(0))
    layout = Layout.one_block([torch.zeros(PICTURE).long()], BLOCK, [0], [torch.ones(PICTURE).bool()])
    assert float(dit(normal(PICTURE, WIDTH), torch.tensor(500.0), layout).detach().abs().max()) == 0
    assert 0.01 < float(dit.img_pos.detach().std()) < 0.04


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"img_channels": 9, "img_grid": [2, 2]}, "img_channels=9, expected 0, or at most txt_in_channels=8"),
        ({"img_channels": 8}, "img_grid=None, expected null without img_channels, else two numbers"),
        ({"img_grid": [2, 2]}, r"img_grid=\[2, 2\], expected null without img_channels"),
        ({"img_channels": 8, "img_grid": [2, 0]}, r"img_grid=\[2, 0\], expected two numbers from 1 to 64"),
        ({"img_channels": 8, "img_grid": [2, True]}, "img_grid"),
        ({"img_channels": 8, "img_grid": 4}, "img_grid=4"),
        ({"dual_layers": 1}, "dual_layers=1, expected 0 without img_channels"),
        ({"img_axial": True}, "img_axial=True, expected false without img_channels"),
        ({"img_channels": 8, "img_grid": [2, 2], "dual_layers": 3}, "at most num_layers=2"),
        (
            {"img_channels": 8, "img_grid": [2, 2], "patch_size": 2},
            "patch_size=2, expected 1 with img_channels",
        ),
    ],
)
def test_configurations_that_contradict_themselves(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ColadaError, match=message):
        tiny_dit(**over)


def test_what_does_not_fit_is_refused() -> None:
    layout = Layout.one_block([torch.zeros(PICTURE).long()], BLOCK, [0], [torch.ones(PICTURE).bool()])
    with pytest.raises(ColadaError, match="this model has no pictures: img_channels=0"):
        tiny_dit()(normal(PICTURE, WIDTH), torch.tensor(1.0), layout)
    for lengths in ([3, 8], [12, 8]):
        with pytest.raises(ColadaError, match=r"of at most 8 latents, expected multiples of block_size=4"):
            drawing_layout(torch.tensor(lengths), 8, PICTURE, BLOCK, torch.tensor([False, False]))
