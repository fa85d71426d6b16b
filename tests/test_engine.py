"""The engine against the readable loop, in any company; its memory; and requests that fail alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.generate import noise as noise_rules
from colada.generate.engine import kernels
from colada.generate.engine.engine import Engine
from colada.generate.engine.memory import Memory, Regions, Span, ViewRows
from colada.generate.engine.passes import Modulation
from colada.generate.engine.slots import room_of
from colada.generate.noise import sample_noise
from colada.generate.writer import Request
from colada.models.cola import ColaDLM
from colada.models.load import load
from colada.text.transcript import Chunk, GenerationError
from helpers import Blocks, reference, request, tiny_model


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return tiny_model()


def serve(engine: Engine, requests: Sequence[Request]) -> list[Blocks]:
    """All requests through one engine, each leaving when it has its blocks."""
    made: dict[int, Blocks] = {id(own): [] for own in requests}
    for own in requests:
        engine.submit(own)
    while engine.busy:
        for _ in engine.next_block():
            pass
        for slot in engine.news:
            if slot.error is None:
                assert slot.block is not None
                made[id(slot.request)].append((slot.block.latents, slot.block.ids))
            if slot.done:
                engine.leave(slot)
    return [made[id(own)] for own in requests]


def same(found: Blocks, expected: Blocks, tolerance: float = 2e-5) -> None:
    assert len(found) == len(expected)
    for (latents, ids), (their_latents, their_ids) in zip(found, expected, strict=True):
        torch.testing.assert_close(latents, their_latents, rtol=1e-5, atol=tolerance)
        assert ids == their_ids


def mixed_requests(model: ColaDLM, seed: int, count: int = 9) -> list[Request]:
    """Requests that differ in everything a request may differ in."""
    rng = random.Random(seed)
    return [
        request(
            model,
            [rng.randrange(50) for _ in range(rng.choice([0, 1, 3, 4, 5, 8, 13]))],
            rng.randrange(1, 14),
            rng.randrange(1000),
            guidance=rng.choice([1.0, 0.0, 3.0]),
            guidance_interval=rng.choice([(0.0, 1.0), (0.3, 0.8)]),
            steps=rng.choice([1, 2, 3, 5]),
            solver=rng.choice(["euler", "ab2", "heun"]),
            schedule=rng.choice(["uniform", "front-loaded"]),
            guidance_cap=rng.choice([0.0, 0.7]),
            guidance_rescale=rng.choice([0.0, 0.6]),
            early_end=rng.choice([0.0, 0.5]),
            guidance_against=rng.choice(["block", "latents"]),
            candidates=rng.choice([1, 1, 3]),
            **rng.choice([{}, {"temperature": 1.3, "top_k": 7}, {"repetition_penalty": 1.7}]),
        )
        for _ in range(count)
    ]


# --- equal to the readable loop -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("vae", "dit"),
    [
        ({}, {}),
        ({"patch_size": 2, "scaling_factor": 0.7, "shifting_factor": -0.3}, {}),
        ({}, {"prediction": "z0"}),
        ({}, {"self_conditioning": True}),
        ({"patch_size": 2}, {"self_conditioning": True, "prediction": "z0", "patch_size": 2}),
        ({"patch_size": 2}, {"patch_size": 2}),
        ({"block_size": 3, "post_norm": False, "qk_norm": False}, {"block_size": 3, "qk_bias": True}),
        ({"clip_qkv": 0.1}, {"rope_dim": 2}),
    ],
    ids=[
        "released",
        "vae-patches",
        "z0",
        "guesses",
        "z0-guesses-patches",
        "both-patches",
        "pre-norm",
        "clipped",
    ],
)
@pytest.mark.parametrize("slots", [None, 3, 1])
def test_any_mix_of_requests_gives_what_each_gives_alone_in_the_readable_loop(
    vae: dict[str, Any], dit: dict[str, Any], slots: int | None
) -> None:
    model = tiny_model(vae=vae, dit=dit)
    requests = mixed_requests(model, seed=1)
    found = serve(Engine(model.vae, model.dit, capacity=200, slots=slots), requests)
    for own, blocks in zip(requests, found, strict=True):
        same(blocks, reference(model, own), 2e-4 if dit.get("prediction") == "z0" else 2e-5)


def test_one_velocity_without_guidance_equals_the_readable_one_to_a_millionth() -> None:
    model = tiny_model()
    own = [request(model, range(number), 4, number, guidance=1.0, steps=1) for number in (0, 5, 8, 9)]
    for blocks, alone in zip(serve(Engine(model.vae, model.dit, capacity=64), own), own, strict=True):
        same(blocks, reference(model, alone), 1e-6)


def test_the_bundled_model_says_the_same_in_any_company() -> None:
    model = load()
    texts = [
        "Once upon a time, there was a little",
        "The dog",
        "",
        "One day Tom and his mother went to the park.",
    ]
    settings = {key: value for key, value in model.generation.items() if key != "guidance"}
    requests = [
        request(model, model.ids(text), 24, seed, guidance=scale, **settings)
        for seed, (text, scale) in enumerate(zip(texts, (7.0, 1.0, 7.0, 3.0), strict=True))
    ]
    together = serve(Engine(model.vae, model.dit, capacity=512, slots=3, pad_id=model.pad_id), requests)
    for own, blocks in zip(requests, together, strict=True):
        same(blocks, reference(model, own, model.pad_id), 5e-5)


def test_bfloat16_stays_near_float32() -> None:
    model = tiny_model()
    own = request(model, range(6), 8, 3, steps=4, guidance=3.0)
    exact = torch.cat([latents for latents, _ in reference(model, own)])
    model.to(dtype=torch.bfloat16)
    rounded = torch.cat([z for z, _ in serve(Engine(model.vae, model.dit, capacity=64), [own])[0]])
    assert rounded.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.05


def test_steps_show_all_rows_in_the_order_of_arrival(model: ColaDLM) -> None:
    requests = [request(model, range(n), 4, n, steps=steps) for n, steps in ((9, 1), (0, 4), (5, 2))]
    engine = Engine(model.vae, model.dit, capacity=200)
    for own in requests:
        engine.submit(own)
    steps = list(engine.next_block())
    assert [(step.step, step.steps) for step in steps] == [(n, 4) for n in (1, 2, 3, 4)]
    for row, own in enumerate(requests):
        expected = reference(model, own)[0][0]
        torch.testing.assert_close(steps[-1].latents[row], expected, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(steps[own.settings.steps - 1].latents[row], expected, rtol=1e-5, atol=2e-5)


def test_a_block_begun_and_left_is_begun_again(model: ColaDLM) -> None:
    own = request(model, range(9), 7, 2, steps=3)
    engine = Engine(model.vae, model.dit, capacity=40)
    engine.submit(own)
    found: Blocks = []
    for _ in range(2):
        for number, step in enumerate(engine.next_block()):
            assert len(engine.guesses(step, engine.under_way)) == 1
            if number == 1:
                break
        for _ in engine.next_block():
            pass
        block = engine.under_way[0].block
        assert block is not None
        found.append((block.latents, block.ids))
    same(found, reference(model, own))


# --- passes of equal shape ----------------------------------------------------------------------


@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize(
    ("vae", "dit"),
    [
        ({}, {}),
        ({}, {"prediction": "z0", "patch_size": 2}),
        ({}, {"self_conditioning": True}),
        ({"block_size": 3, "patch_size": 2}, {"block_size": 3}),
    ],
    ids=["released", "z0-patches", "guesses", "blocks-of-3"],
)
def test_padded_passes_change_nothing(vae: dict[str, Any], dit: dict[str, Any], slots: int | None) -> None:
    model = tiny_model(vae=vae, dit=dit)
    requests = mixed_requests(model, seed=2)
    bucket = 4 * model.vae.config.block_size
    found = serve(Engine(model.vae, model.dit, capacity=200, slots=slots, bucket=bucket), requests)
    for own, blocks in zip(requests, found, strict=True):
        same(blocks, reference(model, own), 2e-4 if "prediction" in dit else 2e-5)


def test_passes_of_equal_shape_are_replayed(model: ColaDLM) -> None:
    requests = [request(model, range(5), 20, seed, steps=3, guidance=3.0) for seed in range(2)]
    engine = Engine(model.vae, model.dit, capacity=64, bucket=32)
    found = serve(engine, requests)
    # Six blocks: each first step appends the block before, the others do not.
    assert len(engine.graphs) == 2
    for own, blocks in zip(requests, found, strict=True):
        same(blocks, reference(model, own))


def test_what_a_failed_sample_leaves_does_not_reach_the_next(
    model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = replace(
        request(model, range(6), 20, 1, steps=2), noise=lambda block, k: torch.full((4, 8), torch.nan)
    )
    good = request(model, range(3), 9, 2, steps=2)
    engine = Engine(model.vae, model.dit, capacity=32, bucket=32)
    none, found = serve(engine, [bad, good])
    assert none == []
    same(found, reference(model, good))


def test_an_engine_that_replays_is_kept_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    first = model.generate([[1, 2, 3, 4, 5]], 20, steps=2, guidance=3.0)
    assert model._kept == []
    monkeypatch.setattr("colada.models.cola.Engine", partial(Engine, bucket=32))
    assert model.generate([[1, 2, 3, 4, 5]], 20, steps=2, guidance=3.0) == first
    (kept,) = model._kept
    assert model.generate([[1, 2, 3, 4, 5]], 20, steps=2, guidance=3.0) == first
    assert model._kept == [kept]
    next(model.stream([[1]], 20))  # left under way: busy for ever
    assert model._kept == []
    model.generate([[1]], 20)
    assert kept not in model._kept
    model.to(dtype=torch.float32)
    assert model._kept == []


def test_a_bucket_holds_whole_blocks(model: ColaDLM) -> None:
    with pytest.raises(ColadaError, match="bucket=10, expected a multiple of the block of 4 latents"):
        Engine(model.vae, model.dit, capacity=32, bucket=10)


# --- less work ----------------------------------------------------------------------------------


def test_a_pass_has_no_row_too_many(model: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    entering: list[int] = []
    leaving: list[int] = []
    for part, counts in ((model.dit.txt_in, entering), (model.dit.txt_out, leaving)):
        real = part.forward

        def count(x: Tensor, real: Any = real, counts: list[int] = counts) -> Tensor:
            counts.append(len(x) // 4)
            return real(x)

        monkeypatch.setattr(part, "forward", count)
    own = request(model, range(8), 8, 0, steps=3, guidance=2.0, guidance_interval=(0.5, 1.0))
    serve(Engine(model.vae, model.dit, capacity=40), [own])
    # Two blocks of prefix, then one finished block, share the first pass; a = 1, 2/3 are guided, 1/3 is not.
    assert entering == [2 + 2, 2, 1, 1 + 2, 2, 1]
    assert leaving == [2, 2, 1, 2, 2, 1]


def test_modulation_is_computed_once_a_timestep(model: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[float]] = []
    real = model.dit.emb_in.forward

    def count(timestep: Tensor) -> Tensor:
        asked.append(timestep.tolist())
        return real(timestep)

    monkeypatch.setattr(model.dit.emb_in, "forward", count)
    serve(
        Engine(model.vae, model.dit, capacity=80),
        [request(model, range(n), 13, n, steps=2) for n in (1, 5, 9)],
    )
    assert asked == [[0.0, 500.0, 1000.0]]


def test_the_modulation_table_forgets_when_it_is_full(model: ColaDLM) -> None:
    modulation = Modulation(model.dit)
    with torch.no_grad():
        before = [part.clone() for part in modulation.at(modulation.rows([0.0, 250.0])[250.0], 0)]
        for timestep in range(1, 200):
            assert len(modulation.rows([0.0, float(timestep)])) <= 64
        after = modulation.at(modulation.rows([250.0])[250.0], 0)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_a_long_prefix_is_appended_in_parts(model: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("transport", "engine"):
        monkeypatch.setattr(f"colada.generate.engine.{room}.APPENDED_ROWS", 8)
    widths: list[int] = []
    real = model.dit.txt_in.forward

    def count(x: Tensor) -> Tensor:
        widths.append(len(x) // 4)
        return real(x)

    monkeypatch.setattr(model.dit.txt_in, "forward", count)
    requests = [request(model, range(n), 8, n, steps=2, guidance=3.0) for n in (22, 5, 16)]
    found = serve(Engine(model.vae, model.dit, capacity=120), requests)
    # 5 + 1 + 4 blocks of prefix, two at a time; the last shares the first step of 3 guided samples.
    assert widths[:7] == [1, 2, 2, 2, 2, 1 + 6, 6]
    monkeypatch.undo()
    for own, blocks in zip(requests, found, strict=True):
        same(blocks, reference(model, own))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_products_are_those_of_the_layer(
    rows: int, packed: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Linear(24, 40, dtype=dtype)
    x = torch.randn(rows, 24, dtype=dtype)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    curved = torch.nn.functional.gelu(exact, approximate="tanh")
    for available in (kernels.ONEDNN, False):  # oneDNN's own call, and the layer's
        monkeypatch.setattr(kernels, "ONEDNN", available)
        out = kernels.product(layer, packed=packed)(x)
        torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
        out = kernels.product(layer, gelu=True, packed=packed)(x)
        torch.testing.assert_close(out.double(), curved, atol=tolerance, rtol=tolerance)


def test_weights_too_large_to_be_packed_are_used_as_stored(
    model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def noted(layer: torch.nn.Linear, *, gelu: bool = False, packed: bool = False) -> kernels.Product:
        asked.append(packed)
        return kernels.product(layer, gelu=gelu, packed=packed)

    monkeypatch.setattr("colada.generate.engine.passes.product", noted)
    own = request(model, range(9), 12, 0)
    for most, packed in ((2**29, True), (1000, False)):
        monkeypatch.setattr(kernels, "PACKED_BYTES", most)
        same(serve(Engine(model.vae, model.dit, capacity=64), [own])[0], reference(model, own))
        assert set(asked) == {packed}
        asked.clear()


def test_each_call_uses_the_weights_as_they_are_then() -> None:
    model = tiny_model()
    before = model.generate([[1, 2, 3]], 12, seed=3)[0].tokens
    for block in model.dit.blocks:
        block.mlp.proj_out.weight.data.mul_(-3)  # type: ignore[union-attr, operator]
    after = model.generate([[1, 2, 3]], 12, seed=3)[0].tokens
    anew = ColaDLM(copy.deepcopy(model.vae), copy.deepcopy(model.dit))
    assert before != after == anew.generate([[1, 2, 3]], 12, seed=3)[0].tokens


# --- memory -------------------------------------------------------------------------------------


def test_regions_never_overlap_and_all_come_back() -> None:
    rng = random.Random(0)
    regions, held = Regions(64), list[tuple[int, int]]()
    refused = 0
    for _ in range(500):
        if held and rng.random() < 0.5:
            regions.give_back(*held.pop(rng.randrange(len(held))))
        else:
            length = rng.randrange(1, 24)
            start = regions.take(length)
            if start is None:
                refused += 1
            else:
                held.append((start, length))
        taken = [place for start, length in held for place in range(start, start + length)]
        assert len(taken) == len(set(taken)) == 64 - regions.free
        assert all(0 <= place < 64 for place in taken)
    assert refused > 10
    for start, length in held:
        regions.give_back(start, length)
    assert regions.take(64) == 0


def test_a_plan_attends_as_a_dense_mask_does() -> None:
    size, generator = 2, torch.Generator().manual_seed(0)
    memory = Memory(1, 40, 3, 4, torch.float32, torch.device("cpu"))
    memory.keys.normal_(generator=generator)
    memory.values.normal_(generator=generator)
    clean, noisy = (
        [Span(0, 2), Span(0, 4), Span(30, 36)],
        [Span(0, 6), Span(10, 16), Span(20, 26), Span(30, 38)],
    )
    plan = ViewRows(memory, clean, noisy, [False] * 2, size)
    q, k, v = torch.randn(3, len(plan), 3, 4, generator=generator).unbind()
    assert plan.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 0, 1, 0, 1]

    keys, values = memory.keys[0].clone(), memory.values[0].clone()
    spans = [*clean, *noisy]
    for number, span in enumerate(spans):
        rows = slice(number * size, (number + 1) * size)
        keys[span.end - size : span.end], values[span.end - size : span.end] = k[rows], v[rows]
    seen = torch.zeros(len(plan), 40 + 2 * size, dtype=torch.bool)
    for number, span in enumerate(spans):
        seen[number * size : (number + 1) * size, span.start : span.end] = True
    for number in range(2):
        rows = slice((len(spans) + number) * size, (len(spans) + number + 1) * size)
        seen[rows, 40 + number * size : 40 + (number + 1) * size] = True
    all_keys, all_values = torch.cat([keys, k[-4:]]), torch.cat([values, v[-4:]])
    scores = torch.einsum("qkd,pkd->kqp", q, all_keys) / 2
    expected = torch.einsum("kqp,pkd->qkd", scores.masked_fill(~seen, -torch.inf).softmax(-1), all_values)

    torch.testing.assert_close(plan.attend(q, k, v, 0), expected)
    late = plan.attend(q[plan.clean_rows :], k, v, 0, plan.clean_rows)
    torch.testing.assert_close(late, expected[plan.clean_rows :])
    torch.testing.assert_close(memory.keys[0], keys)


def test_the_cache_costs_what_its_keys_and_values_take(model: ColaDLM) -> None:
    dit, vae = model.dit.config, model.vae.config
    per_latent = 2 * 4 * (dit.num_layers * dit.heads * dit.head_dim + vae.decoder_num_blocks * vae.dim)
    assert Engine(model.vae, model.dit, capacity=103).cache_bytes == 100 * per_latent


def test_admission_waits_for_room_and_never_takes_more(model: ColaDLM) -> None:
    requests = mixed_requests(model, seed=4, count=12)
    rooms = [room_of(own, 1, 4) for own in requests]
    engine = Engine(model.vae, model.dit, capacity=max(rooms) + 4)
    waited = 0
    order: list[Request] = []
    for own in requests:
        engine.submit(own)
    while engine.busy:
        for _ in engine.next_block():
            pass
        order += [own.request for own in engine.under_way if own.request not in order]
        assert sum(slot.length for slot in engine.under_way) == engine.regions.capacity - engine.regions.free
        waited += len(engine.under_way) < len(requests)
        for slot in list(engine.under_way):
            if slot.done:
                engine.leave(slot)
    assert waited
    assert order == requests
    assert engine.regions.free == engine.regions.capacity


# --- failing alone ------------------------------------------------------------------------------


def test_a_request_larger_than_the_cache_is_refused_and_the_others_are_not(model: ColaDLM) -> None:
    session = model.session(capacity=32)
    first = session.submit([1, 2, 3, 4, 5], 9, seed=3, steps=2)
    with pytest.raises(ColadaError, match="a request of 56 latents, expected at most 32"):
        session.submit(list(range(40)), 16, steps=2)
    with pytest.raises(ColadaError, match="steps=0, expected a whole number of at least 1"):
        session.submit([1], 4, steps=0)
    with pytest.raises(ColadaError, match=r"temperature=-1\.0"):
        session.submit([1], 4, temperature=-1.0)
    with pytest.raises(ColadaError, match=r"guidance_interval=\[0.5\], expected"):
        session.submit([1], 4, guidance_interval=[0.5])
    second = session.submit([7], 5, seed=9, steps=3)
    assert (first, second) == (0, 1)
    tokens = tokens_of(session.chunks())
    assert tokens[first] == model.generate([[1, 2, 3, 4, 5]], 9, seed=3, steps=2)[0].tokens
    assert tokens[second] == model.generate([[7]], 5, seed=9, steps=3)[0].tokens


def tokens_of(chunks: Any) -> dict[int, tuple[int, ...]]:
    tokens: dict[int, tuple[int, ...]] = {}
    for chunk in chunks:
        tokens[chunk.index] = tokens.get(chunk.index, ()) + chunk.tokens
    return tokens


def poisoned(model: ColaDLM, monkeypatch: pytest.MonkeyPatch, seed: int, block: int) -> None:
    """Let the noise of one seed and block be NaN."""
    real = sample_noise

    def noise(own: int, shape: tuple[int, int], device: torch.device) -> Any:
        draw = real(own, shape, device)
        return lambda b, k: draw(b, k) * torch.nan if (own, b) == (seed, block) else draw(b, k)

    monkeypatch.setitem(noise_rules.NOISE_RULES, "per-sample", noise)


def test_a_sample_that_is_not_finite_fails_alone(model: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[int]] = [[1, 2, 3], [], [4] * 9]
    alone = [model.generate([own], 14, steps=2, seed=seed)[0] for seed, own in enumerate(prompts)]
    poisoned(model, monkeypatch, seed=1, block=1)
    with pytest.raises(
        GenerationError, match="1 of 3 samples failed, the first is number 1: block 1"
    ) as caught:
        model.generate(prompts, 14, steps=2, seed=[0, 1, 2])
    assert caught.value.completions == (alone[0], None, alone[2])

    chunks = list(model.stream(prompts, 14, steps=2, seed=[0, 1, 2]))
    (failed,) = [chunk for chunk in chunks if chunk.error]
    assert (failed.index, failed.block, failed.finish_reason) == (1, 1, "error")
    assert "not finite" in str(failed.error)
    tokens = tokens_of(chunk for chunk in chunks if chunk.index != 1)
    assert tokens == {0: alone[0].tokens, 2: alone[2].tokens}


def test_the_room_of_a_failed_sample_serves_the_next(model: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.generate([[5] * 6], 6, steps=2, seed=4)[0].tokens
    poisoned(model, monkeypatch, seed=1, block=0)
    session = model.session(capacity=12)
    for seed, own in ((1, [1] * 6), (4, [5] * 6)):
        session.submit(own, 6, steps=2, seed=seed)
    assert tokens_of(session.chunks())[1] == expected


@pytest.mark.parametrize("guesses", [False, True])
def test_a_cancelled_request_says_no_more_and_the_others_go_on(model: ColaDLM, guesses: bool) -> None:
    expected = [model.generate([own], 14, steps=2, seed=seed)[0].tokens for seed, own in ((0, [1]), (2, [3]))]
    session = model.session(capacity=64, slots=2)
    for seed in range(3):
        session.submit([seed + 1], 14, steps=2, seed=seed, guesses=guesses)
    chunks: list[Chunk] = []
    for chunk in session.chunks():
        chunks.append(chunk)
        if chunk.index == 1 and chunk.block == 1:
            session.cancel(1)
            position = len(chunks)
    assert all(chunk.index != 1 for chunk in chunks[position:])
    tokens = tokens_of(chunk for chunk in chunks if chunk.step is None)
    assert [tokens[0], tokens[2]] == expected
    with pytest.raises(ColadaError, match="request 3, expected one of the 3 submitted"):
        session.cancel(3)


def test_requests_join_while_others_are_under_way(model: ColaDLM) -> None:
    session = model.session(capacity=64)
    session.submit([1, 2], 14, steps=2, seed=0)
    late: list[int] = []
    tokens: dict[int, tuple[int, ...]] = {}
    for chunk in session.chunks():
        tokens[chunk.index] = tokens.get(chunk.index, ()) + chunk.tokens
        if not late:
            late.append(session.submit([9] * 5, 6, steps=4, guidance=1.0, seed=8))
    assert tokens[late[0]] == model.generate([[9] * 5], 6, steps=4, guidance=1.0, seed=8)[0].tokens
    assert tokens[0] == model.generate([[1, 2]], 14, steps=2, seed=0)[0].tokens


def test_a_request_taken_back_before_it_is_admitted_never_starts(model: ColaDLM) -> None:
    session = model.session(capacity=64, slots=1)
    for seed in range(2):
        session.submit([1], 4, steps=1, seed=seed)
    session.cancel(1)
    assert set(tokens_of(session.chunks())) == {0}
