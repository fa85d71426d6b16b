"""What fails, fails alone, and a call leaves nothing behind: not in a session, nor in torch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import colada
from colada.errors import ColadaError
from colada.generate import noise as noise_rules
from colada.generate.engine import engine as engine_room
from colada.generate.engine import slots
from colada.generate.engine.engine import Engine
from colada.generate.noise import NOISE_RULES, sample_noise
from colada.generate.reference import BlockGenerator
from colada.generate.writer import Request
from colada.models.cola import ColaDLM
from colada.models.likelihood import measure
from colada.text.transcript import Chunk, Completion, GenerationError, Transcript
from faults import BASELINES, decoder, refused
from helpers import tiny_model

# --- A9, A10, A13: what fails, fails alone --------------------------------------------------------


def with_nan(model: ColaDLM, token: int | None = None) -> ColaDLM:
    """Let the logits of a token, or of the blocks whose noise has a mark, be NaN."""
    with torch.no_grad():
        model.vae.decoder.final_layer.bias[token] = torch.nan
    return model


def test_a9_nan_in_the_decoder_is_no_text() -> None:
    model = with_nan(tiny_model(generation={"steps": 2}), 7)
    with pytest.raises(GenerationError, match="block 0 has no tokens: logits that are not finite"):
        model.generate([[1, 2], [3]], 9)
    with pytest.raises(ColadaError, match="the decoder's logits are not finite"):
        model.reconstruct([1, 2, 3])
    chunks = list(model.stream([[1]], 9, guesses=True))
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "error"]


def overflowing(model: ColaDLM, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Let the second block of a seed's samples have finite latents of which the decoder makes NaN."""
    model.vae.decoder.in_layer.register_forward_hook(
        lambda _, given, out: torch.where(given[0].abs().amax(-1, keepdim=True) > 1e4, torch.nan, out)
    )
    real = sample_noise

    def noise(own: int, shape: tuple[int, int], device: torch.device) -> Any:
        draw = real(own, shape, device)
        return lambda block, k: draw(block, k) * (1e8 if (own, block) == (seed, 1) else 1)

    monkeypatch.setitem(noise_rules.NOISE_RULES, "per-sample", noise)


def test_a9_a_sample_whose_logits_are_nan_fails_alone_in_the_engine_and_in_the_readable_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(generation={"steps": 2, "guidance": 1.0})
    prompts: list[list[int]] = [[1, 2, 3], [5], [4] * 9]
    alone = [model.generate([own], 14, seed=seed)[0] for seed, own in enumerate(prompts)]
    overflowing(model, monkeypatch, seed=1)
    with pytest.raises(GenerationError, match="number 1: block 1 has no tokens") as caught:
        model.generate(prompts, 14, seed=[0, 1, 2])
    assert caught.value.completions == (alone[0], None, alone[2])

    loop = BlockGenerator(model.vae, model.dit, steps=2)
    noises = [NOISE_RULES["per-sample"](seed, (4, 8), model.device) for seed in range(3)]
    samples = loop.start(prompts, noises, range(3), [1.0] * 3, 0)
    ids: list[list[int]] = [[], [], []]
    for _ in range(5):
        for _ in loop.next_block(samples):
            pass
        for sample, own in zip(samples, ids, strict=True):
            if sample.error is None and sample.block is not None:
                own += sample.block.ids
    assert [str(sample.error) for sample in samples if sample.error] == [
        "block 1 has no tokens: logits that are not finite"
    ]
    assert tuple(ids[0][3:17]) == alone[0].tokens
    assert tuple(ids[2][1:15]) == alone[2].tokens


def test_a9_latents_that_are_no_numbers_are_not_decoded(model: ColaDLM) -> None:
    latents = model.encode([1, 2, 3]).clone()
    latents[1, 2] = torch.nan
    refused(lambda: model.decode(latents))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def fault(function: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Register something that goes wrong for the request of seed 13 alone."""
    FAULTS[function.__name__] = function
    return function


def failing(real: Callable[..., Any], is_bad: Callable[..., bool]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_bad(*args, **kwargs):
            raise RuntimeError("of its own\nmaking")
        return real(*args, **kwargs)

    return call


@fault
def in_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    room = engine_room
    monkeypatch.setattr(room, "pick", failing(room.pick, lambda logits, own, *rest: own.top_k == 13))


@fault
def in_the_transcript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transcript, "add", failing(Transcript.add, lambda own, ids: own.limit == 13))


@fault
def in_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(seed: int, shape: tuple[int, int], device: torch.device) -> Any:
        return failing(sample_noise(seed, shape, device), lambda block, k: (seed, block) == (13, 1))

    monkeypatch.setitem(noise_rules.NOISE_RULES, "per-sample", noise)


@fault
def in_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = failing(slots.encode, lambda vae, prompts, *rest: any(13 in ids for ids in prompts))
    monkeypatch.setattr(slots, "encode", bad)


@pytest.mark.parametrize("kind", FAULTS)
def test_a10_a13_a_failure_of_ones_own_is_told_once_and_nobody_else_loses_a_block(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(generation={"steps": 2, "temperature": 0.5})
    good: list[tuple[list[int], int]] = [([1, 2, 3], 0), ([], 1), ([4] * 9, 2)]
    alone = {seed: model.generate([own], 14, seed=seed)[0] for own, seed in good}
    FAULTS[kind](monkeypatch)
    session = model.session(capacity=200)
    submitted = [session.submit(own, 14, seed=seed) for own, seed in good[:1]]
    bad = session.submit([13], 13, seed=13, top_k=13)
    submitted += [session.submit(own, 14, seed=seed) for own, seed in good[1:]]
    chunks = list(session.chunks())
    (last,) = [chunk for chunk in chunks if chunk.index == bad and chunk.finish_reason is not None]
    assert last.finish_reason == "error"
    assert last.error is not None
    assert last.error.endswith("of its own making")
    assert last.completion is not None
    assert last.completion.error == last.error
    for index, (_, seed) in zip(submitted, good, strict=True):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert [chunk.block for chunk in own] == list(range(len(own)))
        assert own[-1].completion == alone[seed]
        assert tuple(token for chunk in own for token in chunk.tokens) == alone[seed].tokens
    assert session.engine.regions.free == session.engine.regions.capacity
    assert not session.engine.busy


def test_a10_a_block_that_cannot_be_computed_fails_those_under_way_and_not_those_to_come(
    model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate([[2]], 6, seed=5)[0]
    session = model.session(capacity=64)
    first = session.submit([1], 6)
    real, calls = Engine.next_block, []

    def next_block(engine: Engine) -> Iterator[Any]:
        calls.append(engine)
        if len(calls) == 1:
            engine.admit()
            raise RuntimeError("out of memory")
        yield from real(engine)

    monkeypatch.setattr(Engine, "next_block", next_block)
    (chunk,) = session.chunks()
    assert (chunk.index, chunk.finish_reason) == (first, "error")
    assert "out of memory" in str(chunk.error)
    session.submit([2], 6, seed=5)
    assert [own.completion for own in session.chunks()][-1] == expected


@pytest.mark.parametrize("guesses", [False, True])
def test_a10_whoever_stops_taking_chunks_goes_on_where_that_was(model: ColaDLM, guesses: bool) -> None:
    prompts: list[list[int]] = [[1], [2, 3], [4] * 6]
    whole = [model.generate([own], 9, seed=seed)[0] for seed, own in enumerate(prompts)]
    session = model.session(capacity=64)
    for seed, own in enumerate(prompts):
        session.submit(own, 9, seed=seed, guesses=guesses)
    taken: list[Chunk] = []
    while chunk := next(session.chunks(), None):
        taken.append(chunk)
    finished = [chunk for chunk in taken if chunk.step is None]
    assert [chunk.completion for chunk in finished if chunk.completion] == whole
    for index, completion in enumerate(whole):
        tokens = [token for chunk in finished if chunk.index == index for token in chunk.tokens]
        assert tuple(tokens) == completion.tokens
    if guesses:
        assert [chunk.step for chunk in taken if chunk.index == 0] == [1, 2, None] * 3


@pytest.mark.parametrize("arch", ["ar", "llada"])
def test_a9_a_baselines_sample_without_numbers_fails_alone(arch: str) -> None:
    network = decoder(arch)
    model = BASELINES[arch](network, origin="broken")
    prompts = [[1, 2], [3, 7, 3], [4]]
    alone = [model.generate([own], 6, seed=seed)[0] for seed, own in enumerate(prompts)]
    with torch.no_grad():
        assert not any(7 in own.tokens for own in alone), "the broken token is read, and never written"
        network.wte.weight[7] = torch.nan
    with pytest.raises(GenerationError, match="number 1: broken: logits that are not finite") as caught:
        model.generate(prompts, 6, seed=[0, 1, 2])
    assert caught.value.completions == (alone[0], None, alone[2])
    chunks = list(model.stream(prompts, 6, seed=[0, 1, 2], batch=2))
    reasons = {chunk.index: chunk.finish_reason for chunk in chunks if chunk.completion is not None}
    assert reasons == {0: "length", 1: "error", 2: "length"}
    assert chunks[-1].completion is not None


# --- A14: what a session keeps ---------------------------------------------------------------------


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())  # isinstance() wakes lazy modules up.


def test_a14_what_is_finished_or_cancelled_is_forgotten(model: ColaDLM) -> None:
    before = alive(Transcript), alive(Request), alive(Completion)
    session = model.session(capacity=64)
    seeds = []
    for number in range(5000):
        session.submit([1], 2, steps=1, seed=number)
        if number % 3 == 0:
            session.cancel(number)
        if number % 16 == 15:
            seeds += [chunk.completion.seed for chunk in session.chunks() if chunk.completion is not None]
    assert len(list(session.chunks())) == 5  # Of 4992 to 4999, those that were not cancelled.
    assert (alive(Transcript), alive(Request), alive(Completion)) == before
    assert seeds == [number for number in range(4992) if number % 3]
    assert not session.busy
    assert session.engine.regions.free == session.engine.regions.capacity


# --- B13: torch's state around a call --------------------------------------------------------------


class _Default:
    """Another default type, as a context."""

    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": _Default,
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "deterministic": nullcontext,
}


@pytest.fixture(scope="module")
def stored(speaker: ColaDLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored")
    speaker.save(directory / "cola")
    for arch, kind in BASELINES.items():
        kind(decoder(arch)).save(directory / arch)
    return directory


def everything(directory: Path) -> list[Any]:
    """Return what the public calls of models give, loaded anew."""
    model, ar, llada = (colada.load(directory / kind) for kind in ("cola", "ar", "llada"))
    assert isinstance(model, ColaDLM)
    session = model.session(capacity=64)
    session.submit("The fox", 9, temperature=1.0)
    latents = model.encode("The fox saw")
    results = [
        model.generate(["The fox", ""], 9, temperature=0.9, top_p=0.8, solver="ab2"),
        list(model.stream("The owl", 9, guesses=True)),
        [chunk.completion for chunk in session.chunks()],
        latents.tolist(),
        model.decode(latents),
        model.reconstruct("The fox"),
        model.infill("The ", " saw", 5),
        measure(model, ["The fox saw the owl"], steps=2),
        ar.generate([[1, 2]], 5, temperature=1.0),
        llada.generate([[1, 2]], 5, temperature=1.0),
        measure(ar, [[1, 2, 3]]),
        measure(llada, [[1, 2, 3]], samples=2),
    ]
    return [repr(result) for result in results]


@pytest.mark.parametrize("state", STATES)
def test_b13_torchs_state_around_a_call_changes_no_result_and_stays(stored: Path, state: str) -> None:
    expected = everything(stored)
    with STATES[state]():
        before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        assert everything(stored) == expected
        assert before == (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
        )


def test_b13_whoever_takes_chunks_computes_with_gradients_as_before(speaker: ColaDLM) -> None:
    steps = []
    for _ in speaker.stream("The fox", 9, callback=steps.append):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert steps


# --- D8: what one asks for, others do not pay ------------------------------------------------------


def test_d8_guesses_are_decoded_for_those_who_ask(model: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [model.generate([own], 9, seed=seed)[0] for seed, own in enumerate(([1], [2, 3]))]
    rows: list[int] = []
    real = Engine._hidden

    def hidden(engine: Engine, slots: Any, latents: torch.Tensor) -> torch.Tensor:
        rows.append(len(latents))
        return real(engine, slots, latents)

    monkeypatch.setattr(Engine, "_hidden", hidden)
    session = model.session(capacity=64)
    session.submit([1], 9, seed=0)
    asks = session.submit([2, 3], 9, seed=1, guesses=True)
    chunks = list(session.chunks())
    assert {chunk.index for chunk in chunks if chunk.step is not None} == {asks}
    assert [chunk.completion for chunk in chunks if chunk.completion] == plain
    assert rows == [1, 1, 2] * 3
