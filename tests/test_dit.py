"""The DiT against a plain per-position implementation, and what its passes may and may not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from colada.errors import ColadaError
from colada.networks.config import DiTConfig
from colada.networks.dit import DiT, Timesteps, timestep_features
from colada.networks.layers import KVCache
from helpers import (
    Array,
    assert_close,
    plain_attention,
    plain_linear,
    plain_norm,
    plain_silu,
    plain_weights,
    tiny_dit,
    tiny_dit_config,
)


def _rotate(x: Array, position: int, dims: int) -> Array:
    y = x.copy()
    for k in range(dims // 2):
        angle = position * 10000.0 ** (-2 * k / dims)
        y[2 * k] = x[2 * k] * math.cos(angle) - x[2 * k + 1] * math.sin(angle)
        y[2 * k + 1] = x[2 * k] * math.sin(angle) + x[2 * k + 1] * math.cos(angle)
    return y


def plain_dit(
    network: DiT,
    latents: torch.Tensor,
    timesteps: Sequence[float],
    positions: Sequence[int] | None = None,
    visible: Callable[[int, int], bool] | None = None,
) -> Array:
    """One sample, one patch at a time, from the checkpoint's documentation; timesteps are per latent."""
    c, w = network.config, plain_weights(network)
    patch, block = c.patch_size, c.block_size // c.patch_size
    n = len(latents) // patch
    positions = positions if positions is not None else range(n)
    visible = visible or (lambda i, j: j // block <= i // block)

    def ada(emb: Array, name: str) -> Array:
        return plain_linear(plain_silu(emb), w, f"{name}.1")

    def modulated(x: Array, emb: Array, name: str, norm: Array) -> Array:
        both = ada(emb, name)
        shift, scale = both[: c.txt_dim], both[c.txt_dim :]
        return norm * (1 + scale) + shift

    xs, embs = [], []
    for i in range(n):
        pieces = latents[i * patch : (i + 1) * patch].double().numpy()
        xs.append(plain_linear(np.concatenate(list(pieces)), w, "txt_in.proj"))
        t = timesteps[i * patch + patch - 1]
        angles = [t * math.exp(-math.log(10000.0) * k / 128) for k in range(128)]
        features = np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        hidden = plain_silu(plain_linear(features, w, "emb_in.proj_in"))
        hidden = plain_silu(plain_linear(hidden, w, "emb_in.proj_hid"))
        embs.append(plain_linear(hidden, w, "emb_in.proj_out"))
    for layer in range(c.num_layers):
        at = f"blocks.{layer}"
        heads: list[list[list[Array]]] = [
            [[], [], []] for _ in range(c.heads)
        ]  # head -> q, k, v -> positions
        for i in range(n):
            h = modulated(xs[i], embs[i], f"{at}.ada.msa_in", plain_norm(xs[i], c.norm_eps))
            qkv = plain_linear(h, w, f"{at}.msa.proj_qkv").reshape(3, c.heads, c.head_dim)
            for head in range(c.heads):
                q = plain_norm(qkv[0, head], c.norm_eps, w, f"{at}.msa.norm_q")
                k = plain_norm(qkv[1, head], c.norm_eps, w, f"{at}.msa.norm_k")
                heads[head][0].append(_rotate(q, positions[i], c.rope_dim))
                heads[head][1].append(_rotate(k, positions[i], c.rope_dim))
                heads[head][2].append(qkv[2, head])
        outs = [plain_attention(q, k, v, visible) for q, k, v in heads]
        for i in range(n):
            attended = np.concatenate([outs[head][i] for head in range(c.heads)])
            gate = ada(embs[i], f"{at}.ada.msa_out")
            xs[i] = xs[i] + gate * plain_linear(attended, w, f"{at}.msa.proj_out")
            h = modulated(xs[i], embs[i], f"{at}.ada.mlp_in", plain_norm(xs[i], c.norm_eps))
            h = plain_linear(h, w, f"{at}.mlp.proj_in")
            h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            xs[i] = xs[i] + ada(embs[i], f"{at}.ada.mlp_out") * plain_linear(h, w, f"{at}.mlp.proj_out")
    rows = []
    for i in range(n):
        h = modulated(xs[i], embs[i], "txt_out_ada.out_in", plain_norm(xs[i], c.norm_eps, w, "txt_out_norm"))
        rows.extend(plain_linear(h, w, "txt_out.proj").reshape(patch, c.txt_out_channels))
    return np.stack(rows)


def _latents(count: int, seed: int = 0, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def _timesteps(count: int, patch: int = 1, seed: int = 0) -> torch.Tensor:
    """A timestep per latent, a few of them clean; equal within a patch."""
    t = 1000 * torch.rand(count // patch, generator=torch.Generator().manual_seed(seed))
    t[:: max(1, len(t) // 3)] = 0.0
    return t.repeat_interleave(patch)


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"qk_bias": True},
        {"patch_size": 2},
        {"patch_size": 4, "qk_bias": True},
        {"head_dim": 8, "rope_dim": 8, "heads": 3},
        {"head_dim": 16, "rope_dim": 2, "heads": 2},
        {"head_dim": 10, "rope_dim": 4, "heads": 1, "num_layers": 1},
        {"block_size": 1},
        {"norm_eps": 0.1, "expand_ratio": 3, "block_size": 16},
    ],
    ids=str,
)
def test_forward_is_the_documented_network_on_a_ragged_batch(over: dict[str, Any]) -> None:
    network = tiny_dit(3, **over)
    patch = network.config.patch_size
    lengths = [4 * patch, 0, 3 * patch, 9 * patch]
    latents, t = _latents(sum(lengths)), _timesteps(sum(lengths), patch)
    with torch.no_grad():
        out = network(latents, t, network.layout(lengths))
    assert out.dtype == torch.float32
    expected = [
        plain_dit(network, own, times.tolist())
        for own, times in zip(latents.split(lengths), t.split(lengths), strict=True)
        if len(own)
    ]
    assert_close(out, np.concatenate(expected), 1e-5)


def test_a_patch_takes_the_timestep_of_its_last_latent() -> None:
    network = tiny_dit(3, patch_size=2)
    latents, t = _latents(8), torch.tensor([0.0, 500.0, 7.0, 7.0, 300.0, 0.0, 900.0, 100.0])
    with torch.no_grad():
        out = network(latents, t, network.layout([8]))
    assert_close(out, plain_dit(network, latents, t.tolist()), 1e-5)


def test_timestep_features_are_sines_then_cosines_of_unscaled_t() -> None:
    features = timestep_features(torch.tensor([0.0, 1.0, 62.5, 1000.0]))
    for row, t in zip(features.tolist(), [0.0, 1.0, 62.5, 1000.0], strict=True):
        for k in range(128):
            angle = t * 10000.0 ** (-k / 128)
            assert row[k] == pytest.approx(math.sin(angle), abs=2e-4)
            assert row[128 + k] == pytest.approx(math.cos(angle), abs=2e-4)


@pytest.mark.parametrize("patch", [1, 2])
def test_block_by_block_with_appending_equals_one_whole_pass(patch: int) -> None:
    network = tiny_dit(5, patch_size=patch)
    lengths, size = [12, 8, 16], 4
    samples = [_latents(length, seed) for seed, length in enumerate(lengths)]
    times = [_timesteps(length, patch, seed) for seed, length in enumerate(lengths)]
    with torch.no_grad():
        whole = network(torch.cat(samples), torch.cat(times), network.layout(lengths)).split(lengths)
        caches = [KVCache() for _ in samples]
        pieces: list[list[torch.Tensor]] = [[] for _ in samples]
        for start in range(0, max(lengths), size):
            new = [max(0, min(size, length - start)) for length in lengths]
            layout = network.layout(new, caches)
            out = network(
                torch.cat([sample[start : start + size] for sample in samples]),
                torch.cat([time[start : start + size] for time in times]),
                layout,
                caches,
                appending=True,
            )
            for own, piece in zip(pieces, out.split(new), strict=True):
                own.append(piece)
    assert [len(cache) for cache in caches] == [length // patch for length in lengths]
    for own, expected in zip(pieces, whole, strict=True):
        assert_close(torch.cat(own), expected.numpy(), 1e-5)


def test_a_pass_without_appending_leaves_the_caches_alone() -> None:
    network = tiny_dit()
    caches = [KVCache()]
    with torch.no_grad():
        network(_latents(4), torch.tensor(0.0), network.layout([4], caches), caches, appending=True)
        before = [(k.clone(), v.clone()) for k, v in caches[0].layers]
        network(_latents(4, 1), torch.tensor(500.0), network.layout([4], caches), caches)
    assert len(caches[0]) == 4
    for (k, v), (old_k, old_v) in zip(caches[0].layers, before, strict=True):
        assert torch.equal(k, old_k)
        assert torch.equal(v, old_v)


def test_batched_equals_one_by_one_with_and_without_a_cache() -> None:
    network = tiny_dit(6)
    past, lengths = [8, 0, 4, 8], [4, 8, 4, 4]
    caches: list[KVCache | None] = []
    latents = [_latents(length, 50 + seed) for seed, length in enumerate(lengths)]
    times = [_timesteps(length, 1, seed) for seed, length in enumerate(lengths)]
    with torch.no_grad():
        for seed, length in enumerate(past):
            cache = KVCache()
            if length:
                network(
                    _latents(length, seed),
                    torch.tensor(0.0),
                    network.layout([length]),
                    [cache],
                    appending=True,
                )
            caches.append(cache if length else None)
        batch = network(torch.cat(latents), torch.cat(times), network.layout(lengths, caches), caches)
        alone = [
            network(x, t, network.layout([len(x)], [cache]), [cache])
            for x, t, cache in zip(latents, times, caches, strict=True)
        ]
    assert_close(batch, torch.cat(alone).numpy(), 1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_noisy_blocks_of_a_two_copy_pass_equal_plain_passes_with_clean_history(patch: int) -> None:
    network = tiny_dit(7, patch_size=patch)
    rows, length, size = 2, 12, 4
    clean = [_latents(length, row) for row in range(rows)]
    noisy = [_latents(length, 10 + row) for row in range(rows)]
    t = _timesteps(rows * length, patch, 3).split(length)
    packed = torch.cat([part for c, z in zip(clean, noisy, strict=True) for part in (c[:-size], z)])
    times = torch.cat([part for own in t for part in (torch.zeros(length - size), own)])
    with torch.no_grad():
        out = network(packed, times, network.two_copy_layout(rows, length))
        for row, own in enumerate(out.split(2 * length - size)):
            for start in range(0, length, size):
                caches = [KVCache()]
                if start:
                    network(
                        clean[row][:start],
                        torch.tensor(0.0),
                        network.layout([start]),
                        caches,
                        appending=True,
                    )
                block = network(
                    noisy[row][start : start + size],
                    t[row][start : start + size],
                    network.layout([size], caches),
                    caches,
                )
                at = length - size + start
                assert_close(own[at : at + size], block.numpy(), 1e-5)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("sample", [None, [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
def test_two_copy_pass_is_the_documented_network_under_the_two_copy_mask(
    sample: list[int] | None, copies: int
) -> None:
    network = tiny_dit(8)
    length, size = 12, 4
    latents = _latents((1 + copies) * length - size)
    t = torch.cat([torch.zeros(length - size), *[_timesteps(length, 1, 2 + k) for k in range(copies)]])
    cells = [(0, p) for p in range(length - size)]
    cells += [(1 + copy, p) for copy in range(copies) for p in range(length)]

    def visible(i: int, j: int) -> bool:
        (query_copy, query), (key_copy, key) = cells[i], cells[j]
        if sample is not None and sample[query] != sample[key]:
            return False
        if key_copy > 0:
            return query_copy == key_copy and query // size == key // size
        return key // size < query // size or (query_copy == 0 and key // size == query // size)

    with torch.no_grad():
        own = None if sample is None else torch.tensor([sample])
        out = network(latents, t, network.two_copy_layout(1, length, copies, own))
    assert_close(out, plain_dit(network, latents, t.tolist(), [p for _, p in cells], visible), 1e-5)


def test_a_later_block_changes_nothing_in_earlier_ones_and_an_earlier_one_does() -> None:
    network = tiny_dit()
    latents, layout = _latents(12), network.layout([12])
    later, earlier = latents.clone(), latents.clone()
    later[8:] += 1.0
    earlier[0] += 1.0
    with torch.no_grad():
        t = torch.tensor(400.0)
        out, changed, touched = (network(z, t, layout) for z in (latents, later, earlier))
    assert torch.equal(out[:8], changed[:8])
    assert bool((out[8:] != changed[8:]).any(-1).all())
    # Within a block every position sees every other; later blocks see it all.
    assert bool((out != touched).any(-1).all())


def test_a_sample_does_not_influence_another() -> None:
    network = tiny_dit()
    latents, layout = _latents(20), network.layout([8, 4, 8])
    changed = latents.clone()
    changed[8:12] = 100.0
    with torch.no_grad():
        out, other = (network(z, torch.tensor(400.0), layout) for z in (latents, changed))
    assert torch.equal(out[:8], other[:8])
    assert torch.equal(out[12:], other[12:])
    assert not torch.equal(out[8:12], other[8:12])


@pytest.mark.parametrize(
    ("timestep", "rows"),
    [
        (torch.tensor(500.0), 1),
        (torch.tensor([0.0] * 4 + [250.0] * 8), 2),
        (torch.tensor([0.0, 250.0, 500.0] * 4), 3),
        (torch.arange(12.0), 12),
    ],
)
def test_adaln_computes_one_row_per_distinct_timestep(timestep: torch.Tensor, rows: int) -> None:
    network = tiny_dit()
    seen: list[int] = []
    for name in ("msa_in", "msa_out", "mlp_in", "mlp_out"):
        module = network.blocks[0].ada.get_submodule(name)
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[0]))
    network.txt_out_ada["out_in"].register_forward_hook(lambda *call: seen.append(call[2].shape[0]))
    with torch.no_grad():
        network(_latents(12), timestep, network.layout([8, 4]))
    assert seen == [rows] * 5


@pytest.mark.parametrize("patch", [1, 2])
def test_a_table_of_timesteps_equals_one_a_position_with_its_gradients(patch: int) -> None:
    network = tiny_dit(patch_size=patch)
    # Neither sorted nor distinct, and one row that no position has.
    values = torch.tensor([700.0, 0.0, 250.0, 900.0, 0.0])
    row = torch.tensor([1, 0, 4, 2, 0, 1]).repeat_interleave(2 * patch)
    latents, layout = _latents(len(row)), network.layout([8 * patch, 4 * patch])
    found = []
    for timestep in (Timesteps(values, row), values[row]):
        out = network(latents, timestep, layout)
        weights = [weight for name, weight in network.named_parameters() if "ada" in name or "emb_in" in name]
        found.append([out, *torch.autograd.grad(out.square().mean(), weights)])
    assert float(found[0][1].abs().max()) > 0
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain.detach().numpy(), 1e-5)


def test_a_table_of_timesteps_costs_its_rows() -> None:
    network = tiny_dit()
    seen: list[int] = []
    for module in (network.emb_in, network.blocks[0].ada.msa_in, network.blocks[1].ada.mlp_out):
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[0]))
    table = Timesteps(torch.tensor([0.0, 250.0, 250.0]), torch.arange(3).repeat_interleave(4))
    with torch.no_grad():
        network(_latents(12), table, network.layout([12]))
    assert seen == [3, 3, 3]


def test_a_scalar_timestep_equals_the_same_one_everywhere() -> None:
    network = tiny_dit()
    layout = network.layout([8])
    with torch.no_grad():
        scalar = network(_latents(8), torch.tensor(300.0), layout)
        everywhere = network(_latents(8), torch.full((8,), 300.0), layout)
        another = network(_latents(8), torch.tensor(310.0), layout)
    assert torch.equal(scalar, everywhere)
    assert not torch.allclose(scalar, another, rtol=1e-3)


def test_velocity_of_a_network_that_predicts_z0_is_the_slope_to_its_guess() -> None:
    network = tiny_dit(prediction="z0")
    latents, layout = _latents(8), network.layout([8])
    t = torch.tensor([0.0, 0.0, 100.0, 250.0, 500.0, 750.0, 999.0, 1000.0])
    with torch.no_grad():
        guess, velocity = network(latents, t, layout), network.velocity(latents, t, layout)
    for i, a in enumerate((t / 1000).tolist()):
        if a == 0:
            assert velocity[i].tolist() == [0.0] * 8
        else:
            expected = [(z - z0) / a for z, z0 in zip(latents[i].tolist(), guess[i].tolist(), strict=True)]
            assert velocity[i].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_velocity_of_a_network_that_predicts_velocity_is_its_output() -> None:
    network = tiny_dit()
    layout = network.layout([8])
    with torch.no_grad():
        t = torch.tensor(300.0)
        assert torch.equal(network.velocity(_latents(8), t, layout), network(_latents(8), t, layout))


def test_the_two_predictions_have_the_same_tensors() -> None:
    shapes = [
        {name: tensor.shape for name, tensor in tiny_dit(prediction=kind).state_dict().items()}
        for kind in ("velocity", "z0")
    ]
    assert shapes[0] == shapes[1]


def test_the_released_configuration_has_the_documented_number_of_parameters() -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_829_875_728


def test_the_released_configuration_has_the_documented_tensors() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in DiT(DiTConfig()).state_dict().items()}
    expected = {
        "txt_in.proj": (2048, 16),
        "emb_in.proj_in": (2048, 256),
        "emb_in.proj_hid": (2048, 2048),
        "emb_in.proj_out": (2048, 2048),
        "txt_out_ada.out_in.1": (4096, 2048),
        "txt_out.proj": (16, 2048),
    }
    for i in range(24):
        expected |= {
            f"blocks.{i}.mlp.proj_in": (8192, 2048),
            f"blocks.{i}.mlp.proj_out": (2048, 8192),
            f"blocks.{i}.ada.msa_in.1": (4096, 2048),
            f"blocks.{i}.ada.mlp_in.1": (4096, 2048),
            f"blocks.{i}.ada.msa_out.1": (2048, 2048),
            f"blocks.{i}.ada.mlp_out.1": (2048, 2048),
        }
    tensors: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    tensors |= {"txt_out_norm.weight": (2048,), "txt_out_norm.bias": (2048,)}
    for i in range(24):
        tensors |= {
            f"blocks.{i}.msa.proj_qkv.weight": (6144, 2048),
            f"blocks.{i}.msa.proj_out.weight": (2048, 2048),
            f"blocks.{i}.msa.rope.rope.freqs": (48,),
        }
        for norm in ("norm_q", "norm_k"):
            tensors |= {f"blocks.{i}.msa.{norm}.{kind}": (128,) for kind in ("weight", "bias")}
    assert shapes == tensors


def test_a_freshly_initialised_network_outputs_zero_and_every_parameter_is_finite() -> None:
    network = DiT(tiny_dit_config())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(float("nan"))
        network.init_weights(torch.Generator().manual_seed(0))
        out = network(_latents(8), torch.tensor(500.0), network.layout([8]))
    assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())
    assert out.tolist() == [[0.0] * 8] * 8


def test_initialisation_follows_its_generator() -> None:
    first, same, other = (DiT(tiny_dit_config()) for _ in range(3))
    for network, seed in ((first, 1), (same, 1), (other, 2)):
        network.init_weights(torch.Generator().manual_seed(seed))
    states = [network.state_dict() for network in (first, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_length_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(ColadaError, match=r"3 latents.*patch_size=2"):
        tiny_dit(patch_size=2).layout([4, 3])


def test_a_batch_of_empty_samples_gives_an_empty_output() -> None:
    network = tiny_dit()
    with torch.no_grad():
        assert network(_latents(0), torch.tensor(0.0), network.layout([0, 0])).shape == (0, 8)


def test_bfloat16_weights_give_float32_output_near_that_of_float32_with_a_cache_too() -> None:
    network, half = tiny_dit(), tiny_dit().bfloat16()
    outputs = []
    with torch.no_grad():
        for one in (network, half):
            caches = [KVCache()]
            one(_latents(4), torch.tensor(0.0), one.layout([4], caches), caches, appending=True)
            layout = one.layout([4], caches)
            outputs.append(one.velocity(_latents(4, 1), torch.tensor(500.0), layout, caches))
    assert outputs[1].dtype == torch.float32
    assert_close(outputs[1], outputs[0].numpy(), 0.1)
