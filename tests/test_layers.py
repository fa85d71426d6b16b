"""Rotary positions, packed attention and the KV cache."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from colada.networks.layers import (
    KVCache,
    append,
    attend,
    gelu_tanh,
    inverse_frequencies,
    rotary_table,
    rotate_half_split,
    rotate_interleaved,
    rotations,
)
from colada.networks.packing import Layout, sees, two_copy_cells
from helpers import assert_close, plain_attention


@pytest.mark.parametrize(("dims", "theta"), [(2, 10000.0), (6, 10000.0), (32, 500000.0)])
def test_frequencies_are_powers_of_theta(dims: int, theta: float) -> None:
    expected = [theta ** (-2 * k / dims) for k in range(dims // 2)]
    assert inverse_frequencies(dims, theta).tolist() == pytest.approx(expected, rel=1e-6)


def _random(positions: int, heads: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(positions, heads, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "dims"), [(8, 8), (8, 6), (16, 2)])
def test_interleaved_rotation_turns_complex_pairs_and_leaves_the_rest(width: int, dims: int) -> None:
    positions = torch.tensor([0, 1, 5, 0, 300])
    x = _random(5, 3, width)
    out = rotate_interleaved(x, rotations(positions, dims, width, 10000.0))
    for n, position in enumerate(positions.tolist()):
        for head in range(3):
            row = x[n, head].tolist()
            for k in range(dims // 2):
                angle = position * 10000.0 ** (-2 * k / dims)
                turned = complex(row[2 * k], row[2 * k + 1]) * cmath.exp(1j * angle)
                assert out[n, head, 2 * k].item() == pytest.approx(turned.real, abs=1e-4)
                assert out[n, head, 2 * k + 1].item() == pytest.approx(turned.imag, abs=1e-4)
            assert out[n, head, dims:].tolist() == row[dims:]


@pytest.mark.parametrize("width", [2, 8, 12])
def test_half_split_rotation_pairs_channel_k_with_k_plus_half(width: int) -> None:
    positions = torch.tensor([0, 1, 5, 0, 300])
    x = _random(5, 3, width)
    out = rotate_half_split(x, rotary_table(positions, inverse_frequencies(width, 500000.0)))
    half = width // 2
    for n, position in enumerate(positions.tolist()):
        for head in range(3):
            row = x[n, head].tolist()
            for k in range(half):
                angle = position * 500000.0 ** (-2 * k / width)
                turned = complex(row[k], row[half + k]) * cmath.exp(1j * angle)
                assert out[n, head, k].item() == pytest.approx(turned.real, abs=1e-4)
                assert out[n, head, half + k].item() == pytest.approx(turned.imag, abs=1e-4)


def rotate(x: torch.Tensor, positions: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "interleaved":
        return rotate_interleaved(x, rotations(positions, 8, 8, 10000.0))
    return rotate_half_split(x, rotary_table(positions, inverse_frequencies(8, 10000.0)))


KINDS = pytest.mark.parametrize("kind", ["interleaved", "half-split"])


@KINDS
def test_scores_of_rotated_vectors_depend_on_the_distance_only(kind: str) -> None:
    q, k = _random(1, 1, 8, 1), _random(1, 1, 8, 2)

    def score(at_q: int, at_k: int) -> float:
        turned_q, turned_k = rotate(q, torch.tensor([at_q]), kind), rotate(k, torch.tensor([at_k]), kind)
        return float((turned_q * turned_k).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


@KINDS
def test_rotation_computes_in_float32_and_returns_the_input_type(kind: str) -> None:
    x = _random(4, 2, 8).bfloat16()
    out = rotate(x, torch.arange(4), kind)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), torch.arange(4), kind).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [0, 1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_through_tiles_are_those_of_one_dense_softmax(
    packed: bool, copies: int, dtype: torch.dtype
) -> None:
    sample = torch.arange(96).repeat(2, 1) // 40 if packed else None
    layout = Layout.rows(2, 96, 4, copies, sample)
    q, k, v, out = (_random(len(layout), 2, 8, seed).to(dtype) for seed in range(4))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    found = attend(q, k, v, layout)
    found_gradients = torch.autograd.grad(found, tensors, out)
    cells = two_copy_cells(96, 4, copies)
    position = cells.position
    visible = sees(cells.at((slice(None), None)), cells).expand(2, -1, -1)
    if sample is not None:
        own = sample[:, position]
        visible = visible & (own[:, :, None] == own[:, None])
    dense = [x.double().unflatten(0, (2, -1)).transpose(1, 2) for x in tensors]
    scores = dense[0] @ dense[1].mT / math.sqrt(8)
    shares = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    expected = (shares @ dense[2]).transpose(1, 2).flatten(0, 1)
    expected_gradients = torch.autograd.grad(expected, tensors, out.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    for ours, theirs in zip([found, *found_gradients], [expected, *expected_gradients], strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def test_compiled_gelu_is_the_tanh_approximation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-9, 9, 4001, dtype=torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(gelu_tanh(x).double(), expected, rtol=1e-5, atol=1e-6)
    turned = rotate(_random(4, 2, 8), torch.arange(4), "interleaved")
    monkeypatch.undo()
    torch.testing.assert_close(turned, rotate(_random(4, 2, 8), torch.arange(4), "interleaved"))


@pytest.mark.parametrize("block", [1, 3, 4])
def test_ragged_attention_with_caches_is_a_softmax_per_sample(block: int) -> None:
    heads, width = 2, 5
    lengths, past = [4, 2, 0, 4, 4, 1], [0, 8, 5, 8, 0, 3]
    layout = Layout(lengths, block, past)
    q, k, v = (_random(sum(lengths), heads, width, seed) for seed in range(3))
    caches: list[KVCache | None] = []
    for sample, positions in enumerate(past):
        cache = KVCache()
        if positions:
            for layer in range(2):  # attend must read layer 1, not 0
                cache.append(
                    layer,
                    _random(positions, heads, width, 100 + 10 * sample + layer),
                    _random(positions, heads, width, 200 + 10 * sample + layer),
                )
        caches.append(cache if positions else None)
    out = attend(q, k, v, layout, caches, layer=1)
    assert out.shape == q.shape
    start = 0
    for length, positions, cache in zip(lengths, past, caches, strict=True):
        mine = slice(start, start + length)
        start += length
        for head in range(heads):
            keys, values = k[mine, head], v[mine, head]
            if cache is not None:
                keys = torch.cat([cache.layers[1][0][:, head], keys])
                values = torch.cat([cache.layers[1][1][:, head], values])
            expected = plain_attention(
                q[mine, head].double().numpy(),
                keys.double().numpy(),
                values.double().numpy(),
                lambda i, j, positions=positions: j // block <= (positions + i) // block,
            )
            if length:
                assert_close(out[mine, head], expected, 1e-5)


def test_attention_scales_by_the_root_of_the_head_width() -> None:
    # Two keys, one query: the log of the ratio of the shares is the scaled difference of the scores.
    width = 9
    q = torch.full((1, 1, width), 0.0)
    q[0, 0, 0] = 1.0
    cache = KVCache()
    keys = torch.zeros(1, 1, width)
    keys[0, 0, 0] = 2.0
    cache.append(0, keys, torch.ones(1, 1, width))
    out = attend(q, torch.zeros(1, 1, width), torch.zeros(1, 1, width), Layout([1], 1, [1]), [cache])
    share = float(out[0, 0, 0])
    assert math.log(share / (1 - share)) == pytest.approx(2.0 / math.sqrt(width), rel=1e-5)


def test_a_cache_appends_in_order_per_layer_and_counts_positions() -> None:
    cache = KVCache()
    assert len(cache) == 0
    first, second = _random(3, 2, 4, 1), _random(2, 2, 4, 2)
    for layer in range(2):
        cache.append(layer, first + layer, first - layer)
    assert len(cache) == 3
    for layer in range(2):
        cache.append(layer, second + layer, second - layer)
    assert len(cache) == 5
    for layer in range(2):
        keys, values = cache.layers[layer]
        assert torch.equal(keys, torch.cat([first + layer, second + layer]))
        assert torch.equal(values, torch.cat([first - layer, second - layer]))


def test_append_gives_each_cache_its_own_samples_positions_and_skips_none() -> None:
    layout = Layout([2, 3, 1], 4)
    keys, values = _random(6, 1, 2, 1), _random(6, 1, 2, 2)
    caches = [KVCache(), None, KVCache()]
    append(caches, 0, keys, values, layout)
    first, last = caches[0], caches[2]
    assert first is not None
    assert last is not None
    assert torch.equal(first.layers[0][0], keys[:2])
    assert torch.equal(first.layers[0][1], values[:2])
    assert torch.equal(last.layers[0][0], keys[5:])


def test_a_cache_keeps_no_more_memory_than_its_own_positions() -> None:
    big = _random(1000, 1, 2)
    cache = KVCache()
    cache.append(0, big[:3], big[3:6])
    keys, values = cache.layers[0]
    assert keys.untyped_storage().nbytes() == 3 * 2 * 4
    assert values.untyped_storage().nbytes() == 3 * 2 * 4
