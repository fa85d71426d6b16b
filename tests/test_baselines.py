"""The autoregressive baseline against plain arithmetic, and its cache against none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.generate.settings import Settings
from colada.models.autoregressive import AutoregressiveLM
from colada.networks.config import DecoderConfig, matched_config
from colada.networks.decoder import Decoder
from colada.networks.packing import Layout

PROMPTS = [[3, 1, 4, 1, 5], [], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


def tiny_decoder(seed: int = 0) -> Decoder:
    config = DecoderConfig(vocab_size=50, dim=32, num_layers=2, num_heads=4, ffn_dim=48, init_std=0.3)
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    decoder.init_weights(generator)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return decoder


@torch.no_grad()
def plain_logits(decoder: Decoder, ids: Sequence[int]) -> Tensor:
    """The textbook's decoder on one sample in float64, position by position."""
    config, weights = decoder.config, {k: v.double() for k, v in decoder.state_dict().items()}
    heads, width = config.num_heads, config.dim // config.num_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + config.norm_eps).sqrt() * weights[name]

    def turn(x: Tensor, position: int) -> Tensor:
        out = x.clone()
        for head in range(heads):
            for k in range(width // 2):
                angle = position * config.rope_theta ** (-2 * k / width)
                a, b = x[head, k], x[head, k + width // 2]
                out[head, k] = a * math.cos(angle) - b * math.sin(angle)
                out[head, k + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    rows = [weights["wte.weight"][token] for token in ids]
    for layer in range(config.num_layers):
        own = f"blocks.{layer}."
        keys: list[Tensor] = []
        values: list[Tensor] = []
        after = []
        for position, x in enumerate(rows):
            qkv = weights[own + "qkv_proj.weight"] @ norm(x, own + "norm_attn.weight")
            q, k, v = qkv.view(3, heads, width)
            keys.append(turn(k, position))
            values.append(v)
            q = turn(q, position)
            mixed = []
            for head in range(heads):
                scores = torch.stack([q[head] @ key[head] for key in keys]) / math.sqrt(width)
                shares = scores.softmax(0)
                mixed.append(sum(s * value[head] for s, value in zip(shares, values, strict=True)))
            x = x + weights[own + "attn_out_proj.weight"] @ torch.cat(mixed)
            value, gate = (weights[own + "ffn_proj.weight"] @ norm(x, own + "norm_ffn.weight")).chunk(2)
            after.append(x + weights[own + "ffn_out.weight"] @ (value * gate / (1 + torch.exp(-gate))))
        rows = after
    return torch.stack([weights["lm_head.weight"] @ norm(x, "final_norm.weight") for x in rows])


def test_packed_logits_equal_plain_arithmetic_on_each_sample() -> None:
    decoder = tiny_decoder()
    samples = [ids for ids in PROMPTS if ids]
    packed = torch.tensor([token for ids in samples for token in ids])
    with torch.no_grad():
        found = decoder(packed, Layout([len(ids) for ids in samples], 1))
    expected = torch.cat([plain_logits(decoder, ids) for ids in samples]).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def uncached(decoder: Decoder, prompt: Sequence[int], tokens: int) -> list[int]:
    ids = [0, *prompt]  # what every text follows
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(decoder(torch.tensor(ids), Layout([len(ids)], 1))[-1].argmax()))
    return ids[-tokens:]


def test_cached_generation_in_a_ragged_batch_equals_whole_passes_one_by_one() -> None:
    decoder = tiny_decoder()
    made = AutoregressiveLM(decoder).generate(PROMPTS, 9)
    assert [list(own.tokens) for own in made] == [uncached(decoder, prompt, 9) for prompt in PROMPTS]
    assert len({own.tokens for own in made}) > 1
    assert {own.finish_reason for own in made} == {"length"}


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"repetition_penalty": 1.5}])
def test_a_sample_does_not_depend_on_its_batch(sampling: Settings) -> None:
    model = AutoregressiveLM(tiny_decoder())
    seeds = [5, 6, 7, 8]
    together = model.generate(PROMPTS, 24, seed=seeds, **sampling)
    for prompt, seed, own in zip(PROMPTS, seeds, together, strict=True):
        assert model.generate([prompt], 24, seed=[seed], **sampling) == [own]
    greedy = model.generate(PROMPTS, 24)
    assert [own.tokens for own in greedy] != [own.tokens for own in together]


@torch.no_grad()
def test_in_bfloat16_prompts_of_all_lengths_are_continued() -> None:
    """And by the likeliest token of a whole pass in bfloat16, up to its rounding."""
    decoder = tiny_decoder().bfloat16()
    prompts = [[], [3], [5, 6, 7, 8, 9]]
    made = AutoregressiveLM(decoder).generate(prompts, 6)
    for prompt, completion in zip(prompts, made, strict=True):
        assert len(completion.tokens) == 6
        ids = [decoder.config.bos_token_id, *prompt]
        logits = decoder(torch.tensor(ids), decoder.layout([len(ids)]))[-1]
        assert float(logits.max() - logits[completion.tokens[0]]) < 0.05


def test_who_ends_leaves_and_the_others_go_on() -> None:
    model = AutoregressiveLM(tiny_decoder())
    free = model.generate(PROMPTS, 12)
    end = free[0].tokens[2]
    cut = model.generate(PROMPTS, 12, end_ids=[end])
    for whole, own in zip(free, cut, strict=True):
        expected = whole.tokens[: whole.tokens.index(end)] if end in whole.tokens else whole.tokens
        assert own.tokens == expected
        assert own.finish_reason == ("end" if end in whole.tokens else "length")
    chunks = list(model.stream(PROMPTS, 12, end_ids=[end]))
    assert tuple(t for chunk in chunks if chunk.index == 3 for t in chunk.tokens) == cut[3].tokens


def test_bad_arguments_are_named() -> None:
    model = AutoregressiveLM(tiny_decoder())
    with pytest.raises(ColadaError, match="max_new_tokens=0, expected a whole number of at least 1"):
        model.generate(PROMPTS, 0)
    with pytest.raises(ColadaError, match="1 values of seed for 4 prompts"):
        model.generate(PROMPTS, 2, seed=[1])
    with pytest.raises(ColadaError, match="dim=30, expected a multiple of num_heads=4"):
        DecoderConfig(dim=30, num_heads=4)


@pytest.mark.parametrize("wanted", [2_000_000, 8_000_000, 120_000_000, 2_330_000_000])
def test_a_matched_network_has_the_parameters_it_says(wanted: int) -> None:
    config = matched_config(wanted, 8192 if wanted < 1e9 else 100278)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == config.parameters
    assert abs(config.parameters - wanted) <= 0.03 * wanted
    with pytest.raises(ColadaError, match="no decoder with vocab_size=8192 has 1,000 parameters"):
        matched_config(1000, 8192)
