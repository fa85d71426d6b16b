"""The engine where it went wrong: state shared by two users, weights that change, long prompts, shapes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from colada.generate.engine import kernels, slots
from colada.generate.engine.engine import Engine
from colada.generate.engine.kernels import packed_weight
from colada.generate.engine.memory import Memory, PaddedRows, Span, ViewRows
from colada.generate.engine.slots import LatentSlot, shares
from colada.generate.engine.transport import round_steps
from colada.generate.settings import TextRequest
from colada.generate.writer import Request
from colada.models.cola import ColaDLM
from colada.networks.vae import TextVAE
from helpers import reference, request, tiny_dit, tiny_model

PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture
def model() -> ColaDLM:
    return tiny_model()


@pytest.fixture
def bucketed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines as they are on a GPU, kept between calls, but nothing is captured."""
    monkeypatch.setattr("colada.models.cola.Engine", partial(Engine, bucket=32))


# --- an engine has one user ---------------------------------------------------------------------


def test_sessions_and_calls_in_any_order_never_share_an_engine(bucketed: None) -> None:
    model = tiny_model()
    expected = [tiny_model().generate(PROMPT, 9, steps=2, seed=seed)[0].tokens for seed in range(3)]
    model.generate(PROMPT, 9, steps=2)  # leaves an engine to be kept
    one, other = model.session(capacity=64), model.session(capacity=64)
    one.submit(PROMPT, 9, steps=2, seed=0)
    stream = model.stream(PROMPT, 9, steps=2, seed=2)
    first = next(stream)
    other.submit(PROMPT, 9, steps=2, seed=1)
    assert model.generate(PROMPT, 9, steps=2, seed=1)[0].tokens == expected[1]
    for session, tokens in ((one, expected[0]), (other, expected[1])):
        chunks = [chunk for chunk in session.chunks() if chunk.step is None]
        assert sum((chunk.tokens for chunk in chunks), ()) == tokens
    assert first.tokens + sum((chunk.tokens for chunk in stream), ()) == expected[2]
    idle = model.session(capacity=64)
    assert model.generate(PROMPT, 9, steps=2, seed=0)[0].tokens == expected[0]
    idle.submit(PROMPT, 9, steps=2, seed=1)
    assert sum((chunk.tokens for chunk in idle.chunks()), ()) == expected[1]


# --- weights may change between calls -----------------------------------------------------------


def _step_of_an_optimiser(model: ColaDLM) -> None:
    optimiser = torch.optim.AdamW(model.dit.parameters(), lr=0.1)
    for parameter in model.dit.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()


def _other_weights(model: ColaDLM) -> None:
    model.dit.load_state_dict(tiny_dit(seed=5).state_dict())


def _merged_adapter(model: ColaDLM) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in model.dit.modules():
        if isinstance(module, nn.Linear):
            down = torch.randn(2, module.in_features, generator=generator)
            up = torch.randn(module.out_features, 2, generator=generator)
            module.weight.data += 0.1 * up @ down


def _pruned_row(model: ColaDLM) -> None:
    for block in model.dit.blocks:
        block.mlp.proj_in.weight.data[7] = 5.0  # type: ignore[union-attr, operator, index]


def _moved_weights(model: ColaDLM) -> None:
    for parameter in model.dit.parameters():
        parameter.data = -parameter.data


def _scaled_modulation(model: ColaDLM) -> None:
    with torch.inference_mode():
        for name, parameter in model.dit.named_parameters():
            if ".ada." in name:
                parameter.mul_(3)


CHANGES = [
    _step_of_an_optimiser,
    _other_weights,
    _merged_adapter,
    _pruned_row,
    _moved_weights,
    _scaled_modulation,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("kept", [False, True], ids=["new engine", "kept engine"])
def test_weights_that_change_are_those_that_write(
    change: Callable[[ColaDLM], None], kept: bool, request: pytest.FixtureRequest
) -> None:
    if kept:
        request.getfixturevalue("bucketed")

    def latents(model: ColaDLM) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        model.generate(PROMPT, 5, steps=2, callback=lambda step: seen.append(step.latents))
        return seen[-1]

    model, never_asked = tiny_model(), tiny_model()
    session = model.session(capacity=64)
    session.submit(PROMPT, 5, steps=2)
    before = latents(model)
    list(session.chunks())
    for own in (model, never_asked):
        change(own)
    expected = latents(never_asked)
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(latents(model), expected)
    session.submit(PROMPT, 5, steps=2)
    seen: list[torch.Tensor] = []
    list(session.chunks(callback=lambda step: seen.append(step.latents)))
    torch.testing.assert_close(seen[-1], expected)


@pytest.fixture
def reorders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the weights of which packed copies were made."""
    if not kernels.ONEDNN:
        pytest.skip("no oneDNN here")
    made: list[int] = []

    def count(layer: nn.Linear) -> torch.Tensor:
        before = kernels._PACKED.get(layer)
        packed = packed_weight(layer)
        if before is None or kernels._PACKED[layer] is not before:
            made.append(layer.weight.nbytes)
        return packed

    monkeypatch.setattr(kernels, "packed_weight", count)
    return made


def test_packed_weights_are_made_once_a_model_and_go_with_it(reorders: list[int]) -> None:
    model = tiny_model()
    for _ in range(3):
        model.generate(PROMPT, 5, steps=1)
    matrices = 4 * model.dit.config.num_layers + 1  # and the vocabulary head
    assert len(reorders) == matrices
    with torch.no_grad():
        model.dit.blocks[1].mlp.proj_out.weight[3, 3] += 1  # type: ignore[union-attr, operator, index]
    model.generate(PROMPT, 5, steps=1)
    assert len(reorders) == matrices + 1
    alive = len(kernels._PACKED)
    del model
    assert len(kernels._PACKED) <= alive - matrices


def test_packed_weights_of_many_models_are_bounded_in_bytes(
    reorders: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels._PACKED.clear()  # Models of other tests may be alive.
    models = [tiny_model(seed=seed) for seed in range(4)]
    models[0].generate(PROMPT, 5, steps=1)
    bound = int(2.5 * sum(reorders))
    monkeypatch.setattr(kernels, "PACKED_BYTES", bound)
    for model in models:
        model.generate(PROMPT, 5, steps=1)
        assert sum(own.bytes for own in kernels._PACKED.values()) <= bound


# --- a GPU's passes, on a CPU -------------------------------------------------------------------


def _requests(model: ColaDLM, count: int, seed: int, most: int = 100) -> list[Request]:
    rng = random.Random(seed)
    return [
        request(
            model,
            [rng.randrange(50) for _ in range(rng.randrange(most))],
            rng.randrange(1, 30),
            number,
            guidance=rng.choice([1.0, 3.0]),
            guidance_interval=rng.choice([(0.0, 1.0), (0.4, 1.0)]),
            steps=rng.choice([2, 3]),
        )
        for number in range(count)
    ]


def _serve(engine: Engine, requests: list[Request]) -> Iterator[list[LatentSlot]]:
    """Serve requests, yielding the slots that have a new block after each."""
    for own in requests:
        engine.submit(own)
    while engine.busy:
        for _ in engine.next_block():
            pass
        yield engine.news
        for slot in engine.news:
            if slot.done:
                engine.leave(slot)


def test_captures_depend_on_the_rows_and_padded_caches_only() -> None:
    model = tiny_model()
    engine = Engine(model.vae, model.dit, capacity=1024, slots=8, bucket=32)
    blocks = sum(len(slots) for slots in _serve(engine, _requests(model, 50, seed=0)))
    assert blocks > 200
    assert engine.graphs is not None
    # 1, 2, 4 or 8 rows; with and without guided ones; with and without an append; 32, 64 or 128 latents.
    assert engine.graphs.captures <= 4 * 2 * 2 * 3
    before = engine.graphs.captures
    for _ in _serve(engine, _requests(model, 50, seed=1)):
        pass
    assert engine.graphs.captures <= before + 6


class _HostWaits(TorchDispatchMode):
    """Counts what waits for a GPU: values brought to the host, shapes that depend on values, new tensors."""

    waiting = ("_local_scalar_dense", "nonzero", "lift_fresh", "item", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if any(name.startswith(part) for part in self.waiting):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_nothing_waits_for_the_host_between_the_solver_steps(prediction: str) -> None:
    model = tiny_model(dit={"prediction": prediction})
    engine = Engine(model.vae, model.dit, capacity=1024, bucket=32)
    for own in _requests(model, 8, seed=3):
        engine.submit(own)
    for _ in range(3):
        steps = engine.next_block()
        first = next(steps)  # Whatever is prepared for the block is prepared now.
        with _HostWaits() as waits:
            for _ in range(first.steps - first.step):
                next(steps)
        assert waits.seen == []
        for _ in steps:
            pass
    with _HostWaits() as waits:
        torch.tensor([1.0])[torch.tensor([True])].tolist()
    assert waits.seen


@pytest.mark.parametrize("count", [2, 7])
def test_a_padded_pass_attends_once_a_layer_however_many_samples_there_are(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    engine = Engine(model.vae, model.dit, capacity=1024, bucket=32)
    for own in _requests(model, count, seed=4):
        changed = replace(own.settings, guidance=3.0, guidance_interval=(0.0, 1.0), steps=3)
        engine.submit(replace(own, settings=changed))
    for _ in engine.next_block():
        pass
    steps = engine.next_block()
    calls: list[int] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(q: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
        calls.append(len(q))
        return real(q, *others, **settings)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", counted)
    layers = model.dit.config.num_layers
    for _ in range(3):
        next(steps)
        assert len(calls) == 2 * layers  # Those with a KV cache, and the unconditional ones.
        calls.clear()
    list(steps)
    assert len(calls) == model.vae.config.decoder_num_blocks


def _dense(
    plan: ViewRows | PaddedRows,
    spans: list[Span],
    rows: list[int],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """Attention of a plan's rows under one mask over the memory and the blocks alone, (N, K, D).

    ``rows`` are those of the pass that the spans have, in order; the last ones are alone.
    """
    size, memory = plan.size, plan.memory
    keys, values = memory.keys[0].clone(), memory.values[0].clone()
    alone = plan.alone * size
    seen = torch.zeros(len(rows) + alone, len(keys) + alone, dtype=torch.bool)
    at = 0
    for span in spans:
        own = span.blocks * size
        pack = rows[at : at + own]
        keys[span.end - own : span.end], values[span.end - own : span.end] = k[pack], v[pack]
        for number in range(own):
            seen[at + number, span.start : span.end - own + (number // size + 1) * size] = True
        at += own
    for number in range(alone):
        first = len(keys) + number // size * size
        seen[at + number, first : first + size] = True
    last = list(range(len(q) - alone, len(q)))
    all_keys, all_values = torch.cat([keys, k[last]]), torch.cat([values, v[last]])
    scores = torch.einsum("qkd,pkd->kqp", q[[*rows, *last]], all_keys) / q.shape[-1] ** 0.5
    return torch.einsum("kqp,pkd->qkd", scores.masked_fill(~seen, -torch.inf).softmax(-1), all_values)


def test_spans_of_several_blocks_attend_as_a_dense_mask_does() -> None:
    memory = _random_memory(40)
    clean = [Span(0, 2), Span(0, 8, 3), Span(20, 24, 2), Span(20, 28, 2)]
    noisy = [Span(0, 10), Span(20, 30)]
    plan = ViewRows(memory, clean, noisy, [False], 2)
    assert plan.positions.tolist() == [0, 1, *range(2, 8), *range(4), *range(4, 8), 8, 9, 8, 9, 0, 1]
    q, k, v = torch.randn(3, len(plan), 3, 4, generator=torch.Generator().manual_seed(1)).unbind()
    expected = _dense(plan, [*clean, *noisy], list(range(plan.written_rows)), q, k, v)
    torch.testing.assert_close(plan.attend(q, k, v, 0), expected)
    late = plan.clean_rows
    torch.testing.assert_close(plan.attend(q[late:], k, v, 0, late), expected[late:])


def test_padded_plans_attend_as_a_dense_mask_does_and_read_nothing_of_others() -> None:
    memory = _random_memory(40, spare=3)
    clean, noisy = [Span(0, 4)], [Span(0, 6), Span(10, 14), Span(20, 30)]
    plan = PaddedRows(memory, clean, noisy, [False] * 2, 2, 2, 4, 16)
    assert plan.shape == (4, 12, 2, 2, 16)
    q, k, v = torch.randn(3, len(plan), 3, 4, generator=torch.Generator().manual_seed(1)).unbind()
    rows = [0, 1, *range(4, 10)]
    expected = _dense(plan, [*clean, *noisy], rows, q, k, v)
    both = [*rows, *range(12, 16)]
    memory.keys[:, 14:20] = memory.values[:, 14:20] = torch.nan  # of a sample that failed
    torch.testing.assert_close(plan.attend(q, k, v, 0)[both], expected)
    torch.testing.assert_close(plan.attend(q[4:], k, v, 0, 4)[[row - 4 for row in both[2:]]], expected[2:])


def _random_memory(positions: int, spare: int = 0) -> Memory:
    memory = Memory(1, positions, 3, 4, torch.float32, torch.device("cpu"), spare)
    generator = torch.Generator().manual_seed(0)
    memory.keys[:, :positions] = torch.randn(1, positions, 3, 4, generator=generator)
    memory.values[:, :positions] = torch.randn(1, positions, 3, 4, generator=generator)
    return memory


# --- long prompts -------------------------------------------------------------------------------


def test_a_long_prompt_asks_in_large_groups_and_remembers_nothing_of_the_square_of_its_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    calls, masks = [0], [0]
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(q: torch.Tensor, k: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
        calls[0] += 1
        masks[0] = max(masks[0], q.shape[2] * k.shape[2])
        return real(q, k, *others, **settings)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", counted)
    length = 4096
    prompt = [number % 50 for number in range(length)]
    (long,) = model.generate([prompt], 4, steps=1, guidance=1.0)
    layers = 2 + 2 + 2  # of the encoder, the prior and the decoder
    assert calls[0] <= layers * (length // 256 + 2)
    assert masks[0] <= 512 * (length + 4)
    monkeypatch.undo()
    (short,) = model.generate([prompt[:64]], 4, steps=1, guidance=1.0)
    assert short.tokens != long.tokens


# --- a long prompt joins in parts -----------------------------------------------------------------


def _in_turn(engine: Engine, requests: dict[int, list[Request]]) -> list[list[tuple[Request, list[int]]]]:
    """What each block brings, where requests are submitted before the block of that number."""
    rounds: list[list[tuple[Request, list[int]]]] = []
    while engine.busy or len(rounds) <= max(requests):
        for own in requests.get(len(rounds), []):
            engine.submit(own)
        for _ in engine.next_block():
            pass
        rounds.append([])
        for slot in engine.news:
            assert slot.error is None
            assert slot.block is not None
            rounds[-1].append((slot.request, slot.block.ids))
            if slot.done:
                engine.leave(slot)
    return rounds


@pytest.mark.parametrize("kinds", [{}, {"vae": {"patch_size": 2}}, {"dit": {"patch_size": 2}}], ids=str)
@pytest.mark.parametrize("bucket", [None, 16])
def test_a_long_prompt_joins_in_parts_and_says_what_it_says_alone(
    kinds: dict[str, Any], bucket: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colada.generate.engine.engine.JOINING_LATENTS", 16)
    model = tiny_model(**kinds)
    engine = Engine(model.vae, model.dit, capacity=400, bucket=bucket)
    read: list[int] = []
    model.vae.encoder.final_layer.register_forward_hook(lambda _, args, out: read.append(len(out)))
    short, long, late = (
        request(model, [number % 50 for number in range(length)], 40, length, steps=2, guidance=1.0)
        for length in (5, 70 * model.vae.config.patch_size, 6)
    )
    rounds = _in_turn(engine, {0: [short], 1: [long], 2: [late]})
    started = {
        id(own): min(number for number, brought in enumerate(rounds) if own in [who for who, _ in brought])
        for own in (short, long, late)
    }
    # Its 18 blocks of 4 latents are read in parts of 16, or of 8 where a short one behind it joins at once.
    assert (started[id(short)], started[id(late)]) == (0, 2)
    assert started[id(long)] == 5
    assert max(read) <= 16
    read.clear()
    for own in (short, long, late):
        ids = [ids for brought in rounds for who, ids in brought if who is own]
        assert ids == [ids for _, ids in reference(model, own)]
    assert engine.regions.free == engine.regions.capacity


def test_a_request_that_joins_can_be_taken_back(model: ColaDLM) -> None:
    session = model.session(capacity=1200)
    first = session.submit(PROMPT, 24, steps=2)
    chunks = session.chunks()
    next(chunks)
    long = session.submit([1] * 1000, 4, steps=2)
    next(chunks)
    assert session.engine.joining
    session.cancel(long)
    assert {chunk.index for chunk in chunks} == {first}
    assert session.engine.regions.free == session.engine.regions.capacity


@pytest.mark.parametrize("where", ["encoder", "prior"])
def test_a_request_that_fails_while_it_joins_fails_alone(
    where: str, model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate([PROMPT, [2] * 700], 24, steps=2, seed=[0, 5])
    session = model.session(capacity=4000)
    first = session.submit(PROMPT, 24, steps=2, seed=0)
    chunks = session.chunks()
    found = [next(chunks)]
    bad = session.submit([49] * 700, 24, steps=2, seed=3)
    good = session.submit([2] * 700, 24, steps=2, seed=5)
    engine, tried = session.engine, [0]
    real_encode, real_append = slots.encode, engine._transport.append

    def encode(vae: TextVAE, prompts: list[list[int]], *rest: Any) -> list[torch.Tensor]:
        if any(49 in ids for ids in prompts):
            tried[0] += 1
            raise RuntimeError("a fault of its own")
        return real_encode(vae, prompts, *rest)

    def append(parts: list[tuple[int, int, torch.Tensor]]) -> None:
        if {start for start, _, _ in parts} & {one.start for one in engine.joining if 49 in one.request.ids}:
            tried[0] += 1
            raise RuntimeError("a fault of its own")
        real_append(parts)

    if where == "encoder":
        monkeypatch.setattr(slots, "encode", encode)
    else:
        monkeypatch.setattr(engine._transport, "append", append)
    found += list(chunks)
    assert tried == [2]  # With the good one, and alone.
    error = next(chunk.error for chunk in found if chunk.index == bad)
    assert error is not None
    assert "a fault of its own" in error
    for index, done in ((first, expected[0]), (good, expected[1])):
        assert sum((chunk.tokens for chunk in found if chunk.index == index), ()) == done.tokens
    assert session.engine.regions.free == session.engine.regions.capacity


def test_parts_go_to_the_first_and_to_short_ones() -> None:
    assert shares([100, 8, 8], 32, 4) == [16, 8, 8]
    assert shares([100], 32, 4) == [32]
    assert shares([100, 100, 100, 100, 4], 16, 4) == [8, 4, 4, 0, 0]
    assert shares([0, 12], 4, 8) == [0, 0]


# --- nobody waits for the longest grid ------------------------------------------------------------


def test_short_grids_bring_blocks_while_long_ones_are_under_way(model: ColaDLM) -> None:
    rows: list[int] = []
    model.dit.txt_out.register_forward_hook(lambda _, args, out: rows.append(len(out) // 4))
    engine = Engine(model.vae, model.dit, capacity=200)
    fast = request(model, PROMPT, 28, 1, steps=4, guidance=3.0)
    slow = request(model, PROMPT, 9, 2, steps=16, solver="ab2", guidance=1.0)
    brought = _in_turn(engine, {0: [fast, slow]})
    assert [len(blocks) for blocks in brought[:5]] == [1, 1, 1, 2, 1]
    assert all(who is fast for blocks in brought[:3] for who, _ in blocks)
    # As many rows as both take alone, eight guided blocks in 4 steps and three others in 16.
    assert sum(rows) == 8 * 4 * 2 + 3 * 16
    for own in (fast, slow):
        ids = [ids for blocks in brought for who, ids in blocks if who is own]
        assert ids == [ids for _, ids in reference(model, own)]


@pytest.mark.parametrize(
    ("grids", "steps"),
    [
        ((16,), 16),
        ((1,), 4),
        ((16, 16, 16), 16),
        ((8, 64), 8),
        ((16, 17), 17),
        ((1, 16), 4),
        ((8, 12), 8),
        ((10_000,), 63),
        ((100,), 50),
    ],
)
def test_a_round_is_as_long_as_makes_the_least_waiting(
    grids: tuple[int, ...], steps: int, model: ColaDLM
) -> None:
    device = torch.device("cpu")
    asked = [request(model, [], 1, 0, steps=own) for own in grids]
    slots = [LatentSlot.of(own, 0, 4, model.vae, device) for own in asked]
    assert round_steps(slots) == steps


def test_guesses_count_the_steps_of_their_own_grid(model: ColaDLM) -> None:
    session = model.session(capacity=64)
    for seed, steps in enumerate((4, 10, 2)):
        session.submit(PROMPT, 5, steps=steps, seed=seed, guesses=True)
    seen: dict[tuple[int, int], list[int]] = {}
    for chunk in session.chunks():
        if chunk.step is not None:
            assert chunk.steps == (4, 10, 2)[chunk.index]
            seen.setdefault((chunk.index, chunk.block), []).append(chunk.step)
    assert seen == {
        (index, block): list(range(1, steps + 1))
        for index, steps in enumerate((4, 10, 2))
        for block in range(2)
    }


def test_a_request_in_the_middle_of_a_block_can_be_taken_back(model: ColaDLM) -> None:
    session = model.session(capacity=64)
    fast = session.submit(PROMPT, 24, steps=4, seed=1)
    slow = session.submit(PROMPT, 24, steps=32, seed=2)
    chunks = session.chunks()
    found = [next(chunks)]
    session.cancel(slow)
    late = session.submit(PROMPT, 9, steps=4, seed=3)
    found += list(chunks)
    for index, count, seed in ((fast, 24, 1), (late, 9, 3)):
        tokens = sum((chunk.tokens for chunk in found if chunk.index == index), ())
        assert tokens == model.generate(PROMPT, count, steps=4, seed=seed)[0].tokens
    assert {chunk.index for chunk in found} == {fast, late}


@pytest.mark.parametrize(
    ("solver", "steps", "evaluations", "round_length"), [("ab2", 150, 150, 50), ("heun", 40, 79, 40)]
)
def test_a_very_long_grid_takes_no_more_memory_than_a_short_one(
    model: ColaDLM, solver: str, steps: int, evaluations: int, round_length: int
) -> None:
    """And is the same where a round ends, for Heun in the middle of a step."""
    own = request(model, PROMPT, 3, 1, steps=steps, solver=solver, guidance=3.0)
    engine = Engine(model.vae, model.dit, capacity=16)
    engine.submit(own)
    seen: list[tuple[int, int]] = []
    lengths: list[int] = []
    while not engine.under_way or not engine.under_way[0].done:
        seen += [(step.step, step.steps) for step in engine.next_block()]
        lengths.append(len(seen) - sum(lengths))
    assert seen == [(number, evaluations) for number in range(1, evaluations + 1)]
    assert lengths[0] == round_length
    assert len(engine._transport._prior.modulation._output) == 64
    block = engine.under_way[0].block
    assert block is not None
    torch.testing.assert_close(block.latents, reference(model, own)[0][0], rtol=1e-5, atol=2e-5)


def test_solvers_of_every_kind_share_rounds_and_write_as_alone(model: ColaDLM) -> None:
    solvers = [("euler", 4), ("heun", 3), ("ab2", 6), ("heun", 9)]
    alone = [model.generate([PROMPT], 9, steps=n, solver=own, seed=3)[0] for own, n in solvers]
    asked = [TextRequest(PROMPT, 9, {"steps": n, "solver": own, "seed": 3}) for own, n in solvers]
    assert model.generate(asked) == alone
    steps = {chunk.steps for chunk in model.stream(asked, guesses=True) if chunk.step is not None}
    assert steps == {4, 5, 6, 17}
