"""A session driven step by step: what each step brings, who joins and leaves, what a failure takes along."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from colada.errors import ColadaError
from colada.generate import noise as noise_rules
from colada.generate.engine.engine import Engine
from colada.generate.reference import BlockGenerator
from colada.generate.settings import Settings, TextRequest
from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.models.likelihood import measure
from colada.models.load import MODELS
from colada.networks.config import DecoderConfig
from colada.networks.decoder import Decoder
from colada.text.transcript import Chunk
from helpers import tiny_model

PROMPT = [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return tiny_model(generation={"steps": 3})


def driven(session: Any) -> list[list[Chunk]]:
    """The chunks of every step, until none is left."""
    steps = []
    while session.busy:
        steps.append(session.step())
    return steps


def test_a_step_is_one_solver_step_or_the_end_of_a_round(model: ColaDLM) -> None:
    session = model.session(capacity=64)
    assert not session.busy
    assert session.step() == []
    session.submit(PROMPT, 9, seed=1)
    (whole,) = model.generate([PROMPT], 9, seed=1)
    steps = driven(session)
    # 6 + 9 tokens: the prompt's second block and two more, of three solver steps each.
    assert [len(chunks) for chunks in steps] == [0, 0, 0, 1] * 3
    assert steps[-1][0].completion == whole
    assert session.step() == []


def test_who_is_submitted_between_two_steps_joins_at_the_next_block_and_writes_as_alone(
    model: ColaDLM,
) -> None:
    session = model.session(capacity=64)
    first = session.submit(PROMPT, 9, seed=1)
    session.step()
    second = session.submit([7, 8], 5, seed=2, steps=2, guidance=1.0)
    chunks = [chunk for step in driven(session) for chunk in step]
    done = {chunk.index: chunk.completion for chunk in chunks if chunk.completion is not None}
    assert done[first] == model.generate(PROMPT, 9, seed=1)[0]
    assert done[second] == model.generate([7, 8], 5, seed=2, steps=2, guidance=1.0)[0]


def test_a_suffix_is_filled_in_a_session_as_alone(model: ColaDLM) -> None:
    session = model.session(capacity=64)
    session.submit(PROMPT, 9, seed=1)
    hole = session.submit([1, 2, 3], 6, suffix=[4, 5, 6], seed=2)
    done = {chunk.index: chunk.completion for step in driven(session) for chunk in step if chunk.completion}
    assert done[hole] == model.infill([1, 2, 3], [4, 5, 6], 6, seed=2)
    assert done[hole].finish_reason == "length"
    assert len(done[hole].tokens) == 6


def test_stop_strings_are_refused_with_a_suffix_and_the_models_own_do_not_apply(model: ColaDLM) -> None:
    with pytest.raises(ColadaError, match="stop='x' with a suffix, expected none"):
        model.session(capacity=64).submit([1], 2, suffix=[2], stop="x")


def test_guesses_and_blocks_say_how_likely_their_tokens_are(model: ColaDLM) -> None:
    session = model.session(capacity=64)
    plain = session.submit(PROMPT, 9, seed=1)
    asks = session.submit(PROMPT, 9, seed=2, temperature=1.0, confidence=True)
    watches = session.submit(PROMPT, 9, seed=3, guesses=True)
    chunks = [chunk for step in driven(session) for chunk in step]
    assert all(chunk.confidence is None and chunk.latents is None for chunk in chunks if chunk.index == plain)
    guesses = [chunk for chunk in chunks if chunk.step is not None]
    assert {chunk.index for chunk in guesses} == {watches}
    assert [(chunk.step, chunk.steps) for chunk in guesses] == [(1, 3), (2, 3), (3, 3)] * 3
    for chunk in guesses:
        assert chunk.confidence is not None
        assert len(chunk.confidence) == len(chunk.tokens)
        assert chunk.latents is not None
        assert chunk.latents.shape == (4, 8)
    # Against the readable loop's decoder, whose logits come without an engine.
    generator = BlockGenerator(model.vae, model.dit, steps=3)
    noise = noise_rules.sample_noise(2, (4, 8), torch.device("cpu"))
    with torch.inference_mode():
        (sample,) = generator.start([PROMPT], [noise], [2], [7.0], 0)
        finished = [chunk for chunk in chunks if chunk.index == asks]
        for number, chunk in enumerate(finished):
            for _ in generator.next_block([sample]):
                pass
            assert sample.block is not None
            assert sample.block.logits is not None
            # Latents do not depend on which tokens are picked.
            skipped = 2 if number == 0 else 0
            rows = sample.block.logits[skipped : skipped + len(chunk.tokens)].double()
            expected = [
                float(row[token].exp() / row.exp().sum())
                for row, token in zip(rows, chunk.tokens, strict=True)
            ]
            assert chunk.confidence == pytest.approx(expected, rel=1e-4)


def test_what_a_cancelled_request_has_ready_is_not_told(model: ColaDLM) -> None:
    session = model.session(capacity=64)
    one, other = (session.submit(PROMPT, 9, seed=seed) for seed in range(2))
    chunks = session.chunks()
    assert next(chunks).index == one
    session.cancel(other)  # Its block came with the same step.
    assert {chunk.index for chunk in chunks} == {one}
    session.cancel(other)
    session.cancel(one)


def test_the_last_one_cancelled_leaves_at_once(model: ColaDLM) -> None:
    session = model.session(capacity=64)
    only = session.submit(PROMPT, 9)
    session.step()
    session.cancel(only)
    assert not session.busy
    assert not session.engine.busy
    assert session.engine.regions.free == session.engine.regions.capacity


def test_an_error_nobody_is_to_blame_for_is_raised_and_the_next_step_goes_on(
    model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session(capacity=64)
    session.submit(PROMPT, 9, seed=1)
    admit = Engine.admit

    def fails(engine: Engine) -> Any:
        monkeypatch.setattr(Engine, "admit", admit)
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Engine, "admit", fails)
    with pytest.raises(RuntimeError, match="the device is gone"):
        session.step()
    assert session.busy
    last = [chunk for step in driven(session) for chunk in step][-1]
    assert last.completion == model.generate([PROMPT], 9, seed=1)[0]


def test_a_noise_rule_that_raises_while_guesses_are_told_fails_its_own_request_alone(
    model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate([PROMPT], 9, seed=1)[0]
    real = noise_rules.sample_noise

    def noise(seed: int, shape: tuple[int, int], device: torch.device) -> Any:
        draw = real(seed, shape, device)

        def drawn(block: int, candidate: int) -> torch.Tensor:
            if (seed, block) == (2, 1):
                raise RuntimeError("no noise left")
            return draw(block, candidate)

        return drawn

    monkeypatch.setitem(noise_rules.NOISE_RULES, "per-sample", noise)
    session = model.session(capacity=64)
    # First in line, so that rows would be told to the wrong request if those of the failed one were counted.
    bad = session.submit(PROMPT, 9, seed=2, guesses=True)
    good = session.submit(PROMPT, 9, seed=1, guesses=True)
    chunks = [chunk for step in driven(session) for chunk in step]
    (error,) = [chunk for chunk in chunks if chunk.index == bad and chunk.block == 1]
    assert error.error is not None
    assert error.error.endswith("no noise left")
    told = [chunk for chunk in chunks if chunk.index == good]
    assert told[-1].completion == expected
    # A block's last guess is the likeliest reading of what is then decoded.
    for guess, block in zip(told[2::4], told[3::4], strict=True):
        assert guess.tokens == block.tokens


# --- models of every kind --------------------------------------------------------------------------


def baseline(arch: str) -> LanguageModel:
    config = DecoderConfig(
        objective=arch,
        vocab_size=30,
        dim=32,
        num_layers=2,
        num_heads=4,
        ffn_dim=48,
        block_size=4,
        init_std=0.3,
    )
    network = Decoder(config)
    network.init_weights(torch.Generator().manual_seed(3))
    return MODELS[arch](network)


@pytest.mark.parametrize("arch", ["ar", "llada"])
def test_a_baselines_requests_join_leave_and_are_cancelled_as_any(arch: str) -> None:
    model = baseline(arch)
    sampled: Settings = {"temperature": 1.0}
    asked = {0: ([1, 2, 3], 6), 1: ([], 13), 3: ([4] * 7, 9), 4: ([5], 3)}
    alone = {seed: model.generate([ids], new, seed=seed, **sampled)[0] for seed, (ids, new) in asked.items()}
    session = model.session(capacity=48, slots=3)
    numbers = {seed: session.submit(*asked[seed], seed=seed, **sampled) for seed in (0, 1)}
    bad = session.submit([9, 9], 12, seed=2)
    chunks = session.step()
    session.cancel(bad)
    numbers |= {seed: session.submit(*asked[seed], seed=seed, confidence=True, **sampled) for seed in (3, 4)}
    chunks += [chunk for step in driven(session) for chunk in step]
    done = {chunk.index: chunk.completion for chunk in chunks if chunk.completion is not None}
    assert done == {numbers[seed]: completion for seed, completion in alone.items()}
    assert not session.engine.busy
    for chunk in chunks:
        assert (chunk.confidence is not None) == (chunk.index in (numbers[3], numbers[4]))
        assert chunk.confidence is None or all(0 < share <= 1 for share in chunk.confidence)
        assert chunk.confidence is None or len(chunk.confidence) == len(chunk.tokens)


def test_an_ar_models_confidence_is_the_probability_that_its_likelihood_has() -> None:
    model = baseline("ar")
    chunks = []
    session = model.session(capacity=48)
    session.submit([1, 2, 3], 6, seed=1, temperature=1.0, confidence=True)
    for step in driven(session):
        chunks += step
    tokens = [token for chunk in chunks for token in chunk.tokens]
    total = sum(math.log(share) for chunk in chunks for share in chunk.confidence or ())
    assert total == pytest.approx(measure(model, [tokens], [[1, 2, 3]])[0].log_likelihood, abs=1e-4)


def test_a_baseline_refuses_a_suffix_and_more_than_its_cache_by_name() -> None:
    session = baseline("ar").session(capacity=20)
    with pytest.raises(ColadaError, match=r"suffix=\[1\], but AR fills no holes"):
        session.submit([1], 2, suffix=[1])
    with pytest.raises(ColadaError, match="a request of 24 tokens, expected at most 20: the KV cache's room"):
        session.submit([1] * 3, 20)


def test_prompts_of_their_own_settings_among_others_take_turns() -> None:
    model = tiny_model()
    prompts = [PROMPT, TextRequest([7], 5, {"steps": 2, "seed": 9}), [8, 9]]
    made = model.generate(prompts, 9, batch=2, steps=3, seed=4)
    assert made[0] == model.generate(PROMPT, 9, steps=3, seed=4)[0]
    assert made[1] == model.generate([7], 5, steps=2, seed=9)[0]
    assert made[2] == model.generate([8, 9], 9, steps=3, seed=6)[0]
