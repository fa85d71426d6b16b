"""LLaDA and the likelihoods of both baselines, against enumeration and loops written plainly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

import colada
from colada.data.rows import FILLING, Batch
from colada.errors import ColadaError
from colada.models.autoregressive import AutoregressiveLM
from colada.models.base import LanguageModel
from colada.models.likelihood import kind, measure
from colada.models.masked import MaskedLM, transfers
from colada.networks.config import DecoderConfig, matched_config
from colada.networks.decoder import Decoder
from colada.networks.packing import Layout
from colada.train.decoder_losses import MaskNoise, decoder_loss, draw_masks, first_tokens


def nats(
    model: LanguageModel, contexts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], **settings: int
) -> list[float]:
    """Log-likelihoods of texts after contexts."""
    return [own.log_likelihood for own in measure(model, texts, contexts, **settings)]


PROMPTS = [[3, 1, 4, 1], [], [2, 0], [5, 3, 5, 4, 2, 1, 0]]


def tiny(objective: str, vocab_size: int = 6, init_std: float = 0.5, **over: int) -> Decoder:
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "block_size": 4, **over}
    decoder = Decoder(DecoderConfig(objective=objective, vocab_size=vocab_size, init_std=init_std, **shape))
    decoder.init_weights(torch.Generator().manual_seed(1))
    return decoder.eval()


@torch.no_grad()
def read(decoder: Decoder, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (L, V) of one sample that sees all of itself, or causally."""
    block = 1 if decoder.config.objective == "ar" else len(ids)
    return decoder(torch.tensor(list(ids)), Layout([len(ids)], block)).double().log_softmax(-1)


# --- generation ----------------------------------------------------------------------------------


def plainly(decoder: Decoder, prompt: Sequence[int], tokens: int, steps: int | None) -> list[int]:
    """Low-confidence remasking in blocks from left to right, greedily, written as one reads it."""
    mask, size = decoder.config.mask_id, decoder.config.block_size
    ids = [*prompt, *[mask] * tokens]
    for begin in range(len(prompt), len(ids), size):
        block = range(begin, min(begin + size, len(ids)))
        left = len(block)
        passes = min(steps or len(block), len(block))
        for step in range(passes):
            log_p = read(decoder, ids)
            masked = [at for at in block if ids[at] == mask]
            masked.sort(key=lambda at: 1e-5 * (at - begin) - float(log_p[at].max().exp()))
            count = math.ceil(left / (passes - step))
            left -= count
            for at in masked[:count]:
                ids[at] = int(log_p[at].argmax())
    return ids[len(prompt) :]


@pytest.mark.parametrize("steps", [None, 1, 2, 3])
def test_generation_in_a_ragged_batch_is_the_plain_loop_one_by_one(steps: int | None) -> None:
    decoder = tiny("llada")
    made = MaskedLM(decoder).generate(PROMPTS, 10, steps=steps)
    assert [list(own.tokens) for own in made] == [plainly(decoder, own, 10, steps) for own in PROMPTS]
    assert len({own.tokens for own in made}) > 1


def test_steps_share_the_tokens_as_evenly_as_can_be() -> None:
    assert transfers(16, 16) == [1] * 16
    assert transfers(10, 4) == [3, 3, 2, 2]
    assert sum(transfers(7, 3)) == 7


def test_sampling_depends_on_the_samples_own_seed_alone() -> None:
    model = MaskedLM(tiny("llada", vocab_size=30))
    together = model.generate(PROMPTS, 9, seed=[4, 5, 6, 7], temperature=1.0)
    for prompt, seed, own in zip(PROMPTS, (4, 5, 6, 7), together, strict=True):
        assert model.generate([prompt], 9, seed=[seed], temperature=1.0) == [own]
    again = model.generate(PROMPTS, 9, seed=[5, 5, 6, 7], temperature=1.0)
    assert again[0].tokens != together[0].tokens
    assert again[1:] == together[1:]


def test_an_end_token_ends_a_text_and_not_the_others() -> None:
    model = MaskedLM(tiny("llada", vocab_size=30))
    free = model.generate(PROMPTS, 12)
    end = free[0].tokens[1]
    cut = model.generate(PROMPTS, 12, end_ids=[end])
    assert cut[0].tokens == free[0].tokens[:1]
    for whole, own in zip(free, cut, strict=True):
        ended = end in whole.tokens
        assert own.tokens == (whole.tokens[: whole.tokens.index(end)] if ended else whole.tokens)


def test_settings_that_a_baseline_does_not_have_are_refused_by_name() -> None:
    with pytest.raises(ColadaError, match=r"guidance=3.0, but LLaDA has no guidance"):
        MaskedLM(tiny("llada")).generate(PROMPTS, 4, guidance=3.0)
    with pytest.raises(ColadaError, match=r"steps=4, but AR has no steps"):
        AutoregressiveLM(tiny("ar")).generate(PROMPTS, 4, steps=4)
    with pytest.raises(ColadaError, match="steps=5, expected at most the 4 tokens of a block"):
        MaskedLM(tiny("llada")).generate(PROMPTS, 4, steps=5)
    with pytest.raises(ColadaError, match="objective='ar', expected 'llada'"):
        MaskedLM(tiny("ar"))


@pytest.mark.parametrize("kind", [AutoregressiveLM, MaskedLM])
def test_logits_that_are_not_finite_are_no_text(kind: type[AutoregressiveLM] | type[MaskedLM]) -> None:
    model = kind(tiny(kind.arch), origin="broken")
    with torch.no_grad():
        model.decoder.lm_head.weight[2] = torch.nan
    with pytest.raises(ColadaError, match="broken: logits that are not finite"):
        model.generate(PROMPTS, 4)


@pytest.mark.parametrize("kind", [AutoregressiveLM, MaskedLM])
def test_a_saved_baseline_is_loaded_as_it_was(
    tmp_path: Path, kind: type[AutoregressiveLM] | type[MaskedLM]
) -> None:
    model = kind(tiny(kind.arch), generation={"temperature": 0.0, "top_k": 3})
    model.save(tmp_path / "model")
    loaded = colada.load(tmp_path / "model")
    assert isinstance(loaded, kind)
    assert loaded.arch == kind.arch
    assert loaded.generation == model.generation
    assert loaded.generate(PROMPTS, 6) == model.generate(PROMPTS, 6)
    (tmp_path / "model" / "decoder" / "model.safetensors").unlink()
    with pytest.raises(ColadaError, match=r"model.safetensors: no such file"):
        colada.load(tmp_path / "model")


def test_a_masked_network_of_matched_size_counts_its_mask() -> None:
    config = matched_config(500_000, 1000, objective="llada")
    assert sum(parameter.numel() for parameter in Decoder(config).parameters()) == config.parameters
    assert config.embeddings == 1001


# --- likelihood ----------------------------------------------------------------------------------


def test_the_probabilities_of_all_texts_after_a_context_add_up_to_one() -> None:
    model = AutoregressiveLM(tiny("ar", vocab_size=4))
    texts = [list(text) for text in product(range(4), repeat=3)]
    for context in ([], [3, 2]):
        found = nats(model, [context] * len(texts), texts, batch=7)
        assert sum(math.exp(own) for own in found) == pytest.approx(1, abs=1e-6)
        bos = model.decoder.config.bos_token_id
        for text, own in zip(texts[5:60:11], found[5:60:11], strict=True):
            log_p = read(model.decoder, [bos, *context, *text])[len(context) :]
            assert own == pytest.approx(sum(float(log_p[i][t]) for i, t in enumerate(text)), abs=1e-5)


def enumerated_bound(decoder: Decoder, context: Sequence[int], text: Sequence[int]) -> tuple[float, float]:
    """The mean of the bound over every number of masks and every set of them, and its variance."""
    mask, length = decoder.config.mask_id, len(text)
    mean = square = 0.0
    for count in range(1, length + 1):
        sets = list(combinations(range(length), count))
        for where in sets:
            ids = [*context, *(mask if i in where else t for i, t in enumerate(text))]
            log_p = read(decoder, ids)[len(context) :]
            value = length / count * sum(float(log_p[i][text[i]]) for i in where)
            mean += value / len(sets) / length
            square += value**2 / len(sets) / length
    return mean, square - mean**2


@pytest.mark.parametrize("context", [[], [3, 2]])
def test_lladas_bound_is_the_mean_over_all_masks(context: list[int]) -> None:
    model = MaskedLM(tiny("llada", vocab_size=4))
    texts, samples = [[1, 2, 3, 0], [0, 0, 1], [2]], 400
    found = nats(model, [context] * 3, texts, samples=samples, batch=2)
    for own, text in zip(found, texts, strict=True):
        mean, variance = enumerated_bound(model.decoder, context, text)
        assert abs(own - mean) < 4 * math.sqrt(variance / samples) + 1e-6
    # A bound: no more than one over all texts of a length.
    everything = [enumerated_bound(model.decoder, context, text)[0] for text in product(range(4), repeat=2)]
    assert 0.01 < sum(math.exp(own) for own in everything) <= 1


def test_lladas_bound_does_not_depend_on_the_batch() -> None:
    model = MaskedLM(tiny("llada", vocab_size=30))
    texts = [[1, 2, 3, 4, 5], [9, 8], [7, 7, 7, 7, 1, 2]]
    contexts = [[4], [], [5, 6]]
    one, all_at_once = (nats(model, contexts, texts, samples=3, batch=size) for size in (1, 3))
    assert one == pytest.approx(all_at_once, abs=1e-5)
    with pytest.raises(ColadaError, match="text 1 has no tokens"):
        nats(model, contexts[:2], [[1], []])
    with pytest.raises(ColadaError, match="samples=0, expected a whole number of at least 1"):
        nats(model, contexts, texts, samples=0)


def test_every_kind_of_model_is_measured_by_one_function() -> None:
    ar, llada = AutoregressiveLM(tiny("ar")), MaskedLM(tiny("llada"))
    texts, given = [[1, 2], [3]], [[4], []]
    assert (kind(ar), kind(llada)) == ("exact", "bound")
    for model in (ar, llada):
        found = [own.log_likelihood for own in measure(model, texts, given)]
        assert found == nats(model, given, texts, samples=32)
        each = [own.log_likelihood for own in measure(model, texts, given, seed=[3, 4])]
        alone = [
            measure(model, [text], [own], seed=[seed])[0]
            for text, own, seed in zip(texts, given, (3, 4), strict=True)
        ]
        assert each == pytest.approx([own.log_likelihood for own in alone], abs=1e-5)


# --- objectives ----------------------------------------------------------------------------------


def test_the_ar_loss_is_exact_likelihood_per_token() -> None:
    decoder = tiny("ar", vocab_size=30)
    ids = torch.randint(30, (3, 7), generator=torch.Generator().manual_seed(2))
    loss = decoder_loss(decoder, Batch(ids), MaskNoise())
    exact = nats(AutoregressiveLM(decoder), [[]] * 3, ids.tolist())
    assert float(loss.total.detach()) == pytest.approx(-sum(exact) / ids.numel(), rel=1e-5)


def test_samples_of_a_row_and_what_is_given_are_kept_apart() -> None:
    decoder = tiny("ar", vocab_size=30)
    ids = torch.tensor([[5, 6, 7, 8, 9, 1, 0, 0]])
    sample = torch.tensor([[0, 0, 0, 1, 1, 1, FILLING, FILLING]])
    trained = torch.tensor([[False, True, True, True, True, True, False, False]])
    assert first_tokens(Batch(ids, sample)).tolist() == [
        [True, False, False, True, False, False, True, False]
    ]
    loss = decoder_loss(decoder, Batch(ids, sample, trained), MaskNoise())
    model = AutoregressiveLM(decoder)
    exact = nats(model, [[5], []], [[6, 7], [8, 9, 1]])
    assert float(loss.total.detach()) == pytest.approx(-sum(exact) / 5, rel=1e-5)


def test_the_masked_loss_by_hand() -> None:
    decoder = tiny("llada", vocab_size=30)
    ids = torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(3))
    trained = torch.ones_like(ids, dtype=torch.bool)
    trained[0, :2] = False  # a prompt: never masked
    order = torch.tensor([[0.0, 0.1, 0.2, 0.9, 0.8, 0.3], [0.5, 0.1, 0.6, 0.7, 0.2, 0.0]])
    share, length = torch.tensor([0.4, 0.3]), torch.tensor([6, 5])
    loss = decoder_loss(decoder, Batch(ids, None, trained), MaskNoise(share, order, length))
    mask, expected = decoder.config.mask_id, 0.0
    # Two of four tokens: ceil(0.4 * 4). Two of five, the last being cut off: ceil(0.3 * 5).
    first = [ids[0, 0], ids[0, 1], mask, ids[0, 3], ids[0, 4], mask]
    second = [ids[1, 0], mask, ids[1, 2], ids[1, 3], mask]
    for number, row, where, weight in ((0, first, (2, 5), 4 / 2), (1, second, (1, 4), 5 / 2)):
        log_p = read(decoder, [int(own) for own in row])
        expected -= weight * sum(float(log_p[at][ids[number, at]]) for at in where)
    assert float(loss.total.detach()) == pytest.approx(expected / (4 + 5), rel=1e-5)


def test_the_masked_losss_mean_is_the_bound_per_token() -> None:
    decoder, text = tiny("llada", vocab_size=4), [1, 2, 3, 0, 2]
    rows = 2000
    noise = draw_masks([torch.Generator().manual_seed(row) for row in range(rows)], len(text), 0.0)
    loss = decoder_loss(decoder, Batch(torch.tensor([text] * rows)), noise)
    mean, variance = enumerated_bound(decoder, [], text)
    error = math.sqrt(variance / rows) / len(text)
    assert abs(float(loss.total.detach()) + mean / len(text)) < 4 * error


def test_draws_depend_on_the_row_alone_and_have_the_stated_shares() -> None:
    def generators(rows: Sequence[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in rows]

    several, one = draw_masks(generators(range(400)), 64, 0.25), draw_masks(generators([7]), 64, 0.25)
    for part in ("share", "order", "length"):
        assert torch.equal(getattr(several, part)[7:8], getattr(one, part))
    assert several.share is not None
    assert several.length is not None
    assert float(several.share.mean()) == pytest.approx(0.5, abs=0.06)
    assert float((several.length < 64).float().mean()) == pytest.approx(0.25, abs=0.07)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ar", "llada"])
def test_training_learns_what_can_be_predicted(objective: str) -> None:
    decoder = tiny(objective, vocab_size=12, init_std=0.15, dim=32, num_heads=4, ffn_dim=64)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    generators = [torch.Generator().manual_seed(i) for i in range(16)]
    starts = torch.Generator().manual_seed(0)
    for _ in range(150 if objective == "ar" else 1000):
        ids = (torch.randint(12, (16, 1), generator=starts) + 5 * torch.arange(12)) % 12
        noise = draw_masks(generators, 12, 0.0) if objective == "llada" else MaskNoise()
        optimiser.zero_grad()
        decoder_loss(decoder, Batch(ids), noise).total.backward()
        optimiser.step()
    kind = MaskedLM if objective == "llada" else AutoregressiveLM
    (made,) = kind(decoder.eval()).generate([[0, 5, 10, 3]], 8)
    assert list(made.tokens) == [8, 1, 6, 11, 4, 9, 2, 7]
