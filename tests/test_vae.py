"""The Text VAE against a plain per-position implementation, and its block-by-block decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from colada.errors import ColadaError
from colada.networks.config import TextVAEConfig
from colada.networks.layers import KVCache
from colada.networks.vae import TextVAE
from helpers import (
    Array,
    assert_close,
    plain_attention,
    plain_linear,
    plain_norm,
    plain_silu,
    plain_weights,
    tiny_vae,
    tiny_vae_config,
)

Weights = dict[str, Array]


def _rotate(x: Array, position: int, theta: float) -> Array:
    half, y = len(x) // 2, x.copy()
    for k in range(half):
        angle = position * theta ** (-2 * k / len(x))
        y[k] = x[k] * math.cos(angle) - x[half + k] * math.sin(angle)
        y[half + k] = x[k] * math.sin(angle) + x[half + k] * math.cos(angle)
    return y


def _attention(c: TextVAEConfig, w: Weights, at: str, xs: list[Array]) -> list[Array]:
    width = c.dim // c.num_heads
    heads: list[list[list[Array]]] = [[[], [], []] for _ in range(c.num_heads)]
    for i, x in enumerate(xs):
        qkv = plain_linear(x, w, f"{at}.qkv_proj")
        if c.clip_qkv is not None:
            qkv = np.array([max(-c.clip_qkv, min(c.clip_qkv, value)) for value in qkv])
        q, k, v = qkv[: c.dim], qkv[c.dim : 2 * c.dim], qkv[2 * c.dim :]
        if c.qk_norm:
            q = plain_norm(q, c.layer_norm_eps, w, f"{at}.q_norm")
            k = plain_norm(k, c.layer_norm_eps, w, f"{at}.k_norm")
        for head in range(c.num_heads):
            own = slice(head * width, (head + 1) * width)
            heads[head][0].append(_rotate(q[own], i, c.rope_theta))
            heads[head][1].append(_rotate(k[own], i, c.rope_theta))
            heads[head][2].append(v[own])
    outs = [plain_attention(*head, lambda i, j: j // c.block_size <= i // c.block_size) for head in heads]
    return [
        plain_linear(np.concatenate([out[i] for out in outs]), w, f"{at}.attn_out_proj")
        for i in range(len(xs))
    ]


def _ffn(c: TextVAEConfig, w: Weights, at: str, x: Array) -> Array:
    h = plain_linear(x, w, f"{at}.ffn_proj")
    if c.act == "swiglu":
        h = h[: len(h) // 2] * plain_silu(h[len(h) // 2 :])
    elif c.act == "gelu":
        h = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in h])
    else:
        h = plain_silu(h)
    return plain_linear(h, w, f"{at}.ffn_out")


def _block(c: TextVAEConfig, w: Weights, at: str, xs: list[Array]) -> list[Array]:
    def norm(x: Array, name: str) -> Array:
        return plain_norm(x, c.layer_norm_eps, w, f"{at}.{name}")

    if c.post_norm:
        attended = _attention(c, w, at, xs)
        xs = [norm(x, "norm_attn") + a for x, a in zip(xs, attended, strict=True)]
        return [x + norm(_ffn(c, w, at, x), "norm_ffn") for x in xs]
    attended = _attention(c, w, at, [norm(x, "norm_attn") for x in xs])
    xs = [x + a for x, a in zip(xs, attended, strict=True)]
    return [x + _ffn(c, w, at, norm(x, "norm_ffn")) for x in xs]


def plain_encode(network: TextVAE, ids: Sequence[int]) -> tuple[Array, Array | None]:
    """Mean and log-variance of one sample, from the checkpoint's documentation."""
    c, w = network.config, plain_weights(network)
    kernel, bias = w["encoder.patch_embedder.weight"], w["encoder.patch_embedder.bias"]
    xs = []
    for start in range(0, len(ids), c.patch_size):
        x = bias.copy()
        for p in range(c.patch_size):
            x = x + kernel[:, :, p] @ w["encoder.wte.weight"][ids[start + p]]
        xs.append(x)
    for layer in range(c.encoder_num_blocks):
        xs = _block(c, w, f"encoder.blocks.{layer}", xs)
    outs = [plain_linear(x, w, "encoder.final_layer") for x in xs]
    means = [out[: c.latent_dim] for out in outs]
    logvar = None
    if c.use_variation:
        logvar = np.stack([np.clip(out[c.latent_dim :], -30, 20) for out in outs])
    if c.encoder_last_ln:
        means = [plain_norm(mean, c.layer_norm_eps) for mean in means]
    return np.stack(means), logvar


def plain_decode(network: TextVAE, latents: torch.Tensor) -> Array:
    """Logits (L * patch, V) of one sample, from the checkpoint's documentation."""
    c, w = network.config, plain_weights(network)
    xs = [plain_linear(z, w, "decoder.in_layer") for z in latents.double().numpy()]
    for layer in range(c.decoder_num_blocks):
        xs = _block(c, w, f"decoder.blocks.{layer}", xs)
    rows = []
    for x in xs:
        wide = plain_linear(x, w, "decoder.unpatch_layer")
        for p in range(c.patch_size):
            hidden = np.array([wide[channel * c.patch_size + p] for channel in range(c.dim)])
            hidden = plain_norm(hidden, c.layer_norm_eps, w, "decoder.final_norm")
            rows.append(plain_linear(hidden, w, "decoder.final_layer"))
    return np.stack(rows)


def _ids(count: int, seed: int = 0, below: int = 51) -> torch.Tensor:
    return torch.randint(0, below, (count,), generator=torch.Generator().manual_seed(seed))


def _latents(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"post_norm": False},
    {"qk_norm": False},
    {"qk_norm": False, "post_norm": False, "qk_bias": True},
    {"layer_norm_affine": False},
    {"qk_norm_affine": False},
    {"layer_norm_affine": False, "qk_norm_affine": False, "post_norm": False},
    {"clip_qkv": 0.5},
    {"clip_qkv": 0.5, "qk_norm": False, "qk_bias": True},
    {"act": "gelu", "ffn_dim": 48},
    {"act": "silu", "ffn_dim": 33},
    {"bias": False},
    {"qk_bias": True, "bias": False},
    {"patch_size": 2},
    {"patch_size": 3, "post_norm": False},
    {"use_variation": False},
    {"use_variation": False, "encoder_last_ln": False},
    {"encoder_last_ln": False},
    {"rope_theta": 100.0, "num_heads": 2, "block_size": 3},
    {"layer_norm_eps": 0.1, "block_size": 1},
]


@pytest.mark.parametrize("over", VARIANTS, ids=str)
def test_encoder_is_the_documented_network_on_a_ragged_batch(over: dict[str, Any]) -> None:
    network = tiny_vae(2, **over)
    patch = network.config.patch_size
    lengths = [5 * patch, 0, 9 * patch, 5 * patch]
    ids = _ids(sum(lengths))
    ids[0] = network.config.mask_id
    with torch.no_grad():
        posterior = network.encode(ids, lengths)
    expected = [plain_encode(network, own.tolist()) for own in ids.split(lengths) if len(own)]
    assert posterior.mean.dtype == torch.float32
    assert_close(posterior.mean, np.concatenate([mean for mean, _ in expected]), 1e-5)
    if network.config.use_variation:
        assert posterior.logvar is not None
        assert_close(posterior.logvar, np.concatenate([logvar for _, logvar in expected]), 1e-5)
    else:
        assert posterior.logvar is None


@pytest.mark.parametrize("over", VARIANTS, ids=str)
def test_decoder_is_the_documented_network_on_a_ragged_batch(over: dict[str, Any]) -> None:
    network = tiny_vae(2, **over)
    lengths = [5, 0, 9, 5]
    latents = _latents(sum(lengths))
    with torch.no_grad():
        logits = network.decode(latents, lengths)
    assert logits.dtype == torch.float32
    expected = [plain_decode(network, own) for own in latents.split(lengths) if len(own)]
    assert_close(logits, np.concatenate(expected), 1e-5)


def test_log_variance_is_clamped_to_minus_30_and_20() -> None:
    network = tiny_vae()
    with torch.no_grad():
        network.encoder.final_layer.bias[8:] = torch.tensor([1e3, -1e3] * 4)
        posterior = network.encode(_ids(4), [4])
    assert posterior.logvar is not None
    assert posterior.logvar.tolist() == [[20.0, -30.0] * 4] * 4


@pytest.mark.parametrize("patch", [1, 2])
def test_decoding_block_by_block_with_caches_equals_decoding_the_whole(patch: int) -> None:
    network = tiny_vae(4, patch_size=patch)
    lengths, size = [12, 8, 16], 4
    samples = [_latents(length, seed) for seed, length in enumerate(lengths)]
    caches = [KVCache() for _ in samples]
    pieces: list[list[torch.Tensor]] = [[] for _ in samples]
    with torch.no_grad():
        whole = network.decode(torch.cat(samples), lengths).split([patch * length for length in lengths])
        for start in range(0, max(lengths), size):
            new = [max(0, min(size, length - start)) for length in lengths]
            logits = network.decode(
                torch.cat([sample[start : start + size] for sample in samples]), new, caches
            )
            for own, piece in zip(pieces, logits.split([patch * n for n in new]), strict=True):
                own.append(piece)
    assert [len(cache) for cache in caches] == lengths
    for own, expected in zip(pieces, whole, strict=True):
        assert_close(torch.cat(own), expected.numpy(), 1e-5)


def test_later_blocks_change_nothing_in_earlier_ones_in_both_halves() -> None:
    network = tiny_vae()
    ids, latents = _ids(12, below=49), _latents(12)
    other_ids, other_latents = ids.clone(), latents.clone()
    other_ids[8:] += 1
    other_latents[8:] += 1.0
    with torch.no_grad():
        means = [network.encode(x, [12]).mean for x in (ids, other_ids)]
        logits = [network.decode(x, [12]) for x in (latents, other_latents)]
    for first, second in (means, logits):
        assert torch.equal(first[:8], second[:8])
        assert bool((first[8:] != second[8:]).any(-1).all())


def test_a_sample_does_not_influence_another_in_both_halves() -> None:
    network = tiny_vae()
    lengths = [8, 4, 8]
    ids, latents = _ids(20, below=49), _latents(20)
    other_ids, other_latents = ids.clone(), latents.clone()
    other_ids[8:12] += 1
    other_latents[8:12] += 5.0
    with torch.no_grad():
        means = [network.encode(x, lengths).mean for x in (ids, other_ids)]
        logits = [network.decode(x, lengths) for x in (latents, other_latents)]
    for first, second in (means, logits):
        assert torch.equal(first[:8], second[:8])
        assert torch.equal(first[12:], second[12:])
        assert not torch.equal(first[8:12], second[8:12])


@pytest.mark.parametrize("patch", [1, 2])
def test_samples_of_a_training_row_are_the_documented_network_on_each(patch: int) -> None:
    network = tiny_vae(3, patch_size=patch)
    # Two rows of 12 latents; the last sample of the first is what it is filled up with.
    sizes = [[4, 8], [8, 4]]
    sample = torch.tensor([[0] * 4 + [-1] * 8, [0] * 8 + [1] * 4])
    layout = network.rows_layout(2, 12, sample)
    ids, latents = _ids(24 * patch), _latents(24)
    with torch.no_grad():
        posterior = network.encoder(ids, layout)
        logits = network.decoder.logits(network.decoder(latents, layout))
    lengths = [size for row in sizes for size in row]
    encoded = [plain_encode(network, own.tolist()) for own in ids.split([patch * n for n in lengths])]
    assert_close(posterior.mean, np.concatenate([mean for mean, _ in encoded]), 1e-5)
    assert posterior.logvar is not None
    assert_close(posterior.logvar, np.concatenate([logvar for _, logvar in encoded]), 1e-5)
    assert_close(logits, np.concatenate([plain_decode(network, own) for own in latents.split(lengths)]), 1e-5)


def test_batched_equals_one_by_one() -> None:
    network = tiny_vae()
    lengths = [4, 9, 4, 1]
    ids = _ids(sum(lengths))
    with torch.no_grad():
        batch = network.encode(ids, lengths).mean
        alone = torch.cat([network.encode(own, [len(own)]).mean for own in ids.split(lengths)])
    assert_close(batch, alone.numpy(), 1e-5)


def test_an_empty_batch_encodes_and_decodes_to_nothing() -> None:
    network = tiny_vae()
    with torch.no_grad():
        assert network.encode(torch.zeros(0, dtype=torch.long), [0]).mean.shape == (0, 8)
        assert network.decode(torch.zeros(0, 8), [0, 0]).shape == (0, 50)


def test_normalise_subtracts_the_shift_and_then_scales() -> None:
    network = TextVAE(tiny_vae_config(scaling_factor=2.0, shifting_factor=0.5))
    assert network.normalise(torch.tensor([[0.5, 1.5, -0.5]])).tolist() == [[0.0, 2.0, -2.0]]


def test_lengths_that_do_not_fit_the_ids_or_the_patch_are_refused() -> None:
    network = tiny_vae(patch_size=2)
    with pytest.raises(ColadaError, match=r"3 tokens.*patch_size=2"):
        network.encode(_ids(7), [4, 3])
    with pytest.raises(ColadaError, match=r"add up to 6, but there are 8"):
        network.encode(_ids(8), [4, 2])


def test_the_released_configuration_has_the_documented_number_of_parameters() -> None:
    with torch.device("meta"):
        network = TextVAE(TextVAEConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) == 501_871_574


@pytest.mark.parametrize("over", [{}, {"bias": False, "qk_bias": True}, {"layer_norm_affine": False}])
def test_bias_flags_govern_the_documented_layers(over: dict[str, Any]) -> None:
    names = set(tiny_vae(**over).state_dict())
    config = tiny_vae_config(**over)
    always = ["encoder.patch_embedder", "decoder.unpatch_layer", "decoder.final_norm"]
    governed = ["decoder.in_layer", "decoder.final_layer", "encoder.final_layer"]
    for half in ("encoder", "decoder"):
        at = f"{half}.blocks.1"
        always.append(f"{at}.norm_ffn")
        governed += [f"{at}.attn_out_proj", f"{at}.ffn_proj", f"{at}.ffn_out"]
        assert (f"{at}.qkv_proj.bias" in names) == config.qk_bias
        assert (f"{at}.norm_attn.weight" in names) == config.layer_norm_affine
        assert f"{at}.q_norm.weight" in names
    assert all(f"{name}.bias" in names for name in always)
    assert all((f"{name}.bias" in names) == config.bias for name in governed)


def test_initial_matrices_have_init_std_and_are_cut_off() -> None:
    network = TextVAE(tiny_vae_config(dim=64, ffn_dim=512, init_std=0.05, init_cutoff_factor=2.0))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(float("nan"))
    network.init_weights(torch.Generator().manual_seed(0))
    weight = network.encoder.blocks[0].ffn_proj.weight.detach()
    assert float(weight.abs().max()) <= 0.1
    # A normal cut off at two deviations has 0.8796 of its standard deviation.
    assert float(weight.std()) == pytest.approx(0.05 * 0.8796, rel=0.02)
    for name, parameter in network.named_parameters():
        assert bool(parameter.isfinite().all()), name
        if parameter.ndim == 1:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert bool((parameter == expected).all()), name
