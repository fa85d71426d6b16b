"""What users ask wrongly, and what fails on the way: each by itself, in one line, with nothing lost.

Rows are named after the faults they guard against.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models

import colada
from colada.checks import MOST_TOKENS
from colada.cli.main import main
from colada.errors import ColadaError, ColadaWarning
from colada.generate import noise as noise_rules
from colada.generate.engine import engine as engine_room
from colada.generate.engine import slots
from colada.generate.engine.engine import Engine, history_bytes
from colada.generate.noise import NOISE_RULES, sample_noise
from colada.generate.reference import BlockGenerator
from colada.generate.settings import LONGEST_STOP, MOST_STEPS, TextRequest
from colada.generate.writer import Request
from colada.models.autoregressive import AutoregressiveLM
from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.models.likelihood import measure
from colada.models.masked import MaskedLM
from colada.networks.config import DecoderConfig
from colada.networks.decoder import Decoder
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Chunk, Completion, GenerationError, Transcript
from colada.train.recipe import load_recipe
from helpers import tiny_dit, tiny_model, tiny_vae

TEXTS = ["The fox saw the owl. The owl saw the fox, and the fox ran off to look under the bridge. é"] * 9
HUGE = 10**400


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 290)


@pytest.fixture(scope="module")
def speaker(tokenizer: Tokenizer) -> ColaDLM:
    return ColaDLM(
        tiny_vae(3, vocab_size=290), tiny_dit(4), tokenizer, generation={"steps": 2, "guidance": 2.0}
    )


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return tiny_model(generation={"steps": 2})


def decoder(objective: str, seed: int = 0) -> Decoder:
    network = Decoder(
        DecoderConfig(
            vocab_size=50,
            dim=16,
            num_layers=1,
            num_heads=2,
            ffn_dim=32,
            objective=objective,
            block_size=4,
        )
    )
    network.init_weights(torch.Generator().manual_seed(seed))
    return network


BASELINES: dict[str, type[AutoregressiveLM] | type[MaskedLM]] = {"ar": AutoregressiveLM, "llada": MaskedLM}


# --- B5: arguments of the wrong type or content --------------------------------------------------


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no")


NOT_PROMPTS: list[Any] = [
    None,
    5,
    2.5,
    True,
    [True],
    [1.5],
    [None],
    [[None]],
    [[1], None],
    ["a", 5],
    [1, [2]],
    {"a": 1},
    {1, 2},
    b"abc",
    [b"abc"],
    object(),
    Unprintable(),
    [Unprintable()],
    iter([1]),
    int,
    [-1],
    [10**6],
    [HUGE],
    [2**63],
    float("nan"),
    "a\ud800",
    "x" * 2**21,
    [0] * (MOST_TOKENS + 1),
    np.array([1.5]),
    np.array([True]),
    np.array(3),
    np.zeros((2, 2, 2), int),
    np.array([None]),
    torch.tensor([0.5]),
    torch.tensor([True]),
    torch.tensor(3),
    torch.zeros(2, dtype=torch.long, device="meta"),
    torch.eye(2).to_sparse(),
]
NOT_TEXTS = [bad for bad in NOT_PROMPTS if bad is not None]
NOT_COUNTS: list[Any] = [0, -1, 2.5, "4", True, [4], HUGE, 10**12, float("nan"), b"4"]
NOT_FUNCTIONS: list[Any] = [5, "print", [print], {}]
NOT_FLAGS: list[Any] = [
    None,
    0,
    1,
    "no",
    [],
    [True],
    np.array([True, False]),
    torch.tensor([]),
    Unprintable(),
]
NOT_MESSAGES: list[Any] = [
    None,
    5,
    "hello",
    [],
    {},
    [None],
    ["hello"],
    [{}],
    [{"role": "user"}],
    [{"role": 5, "content": "x"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "wizard", "content": "x"}],
    [{"role": "user", "content": "<|im_end|>"}],
    [{"role": "user", "content": "\ud800"}],
]
NOT_LATENTS: list[Any] = [
    None,
    [[0.0] * 8],
    "latents",
    np.zeros((2, 8)),
    torch.zeros(8),
    torch.zeros(2, 7),
    torch.zeros(1, 2, 8),
    torch.zeros(2, 8, dtype=torch.long),
    torch.zeros(2, 8, dtype=torch.complex64),
    torch.zeros(2, 8, device="meta"),
    torch.eye(8).to_sparse(),
    torch.full((2, 8), torch.nan),
    torch.full((2, 8), torch.inf),
]
NOT_DEVICES: list[Any] = ["nonsense", "meta", "", 5, ["cpu"], "cuda:99", torch.device("meta"), b"cpu"]
NOT_TYPES: list[Any] = [torch.int8, "float32", 32, float, torch.complex64, [torch.float32]]
NOT_PATHS: list[Any] = [5, 2.5, True, ["x"], b"x", "\0", "", "no/such/model/here", object()]

# What is called, as a user would; the last argument is what is wrong.
CALLS: dict[str, tuple[Callable[[ColaDLM, Any], Any], list[Any]]] = {
    "generate": (lambda model, bad: model.generate(bad, 2), NOT_PROMPTS),
    "stream": (lambda model, bad: model.stream(bad, 2), NOT_PROMPTS),
    "submit": (lambda model, bad: model.session(history=64).submit(bad, 2), NOT_PROMPTS),
    "request": (lambda model, bad: model.generate([TextRequest(bad, 2, {})]), NOT_PROMPTS),
    "request tokens": (lambda model, bad: model.stream([TextRequest("x", bad, {})]), [*NOT_COUNTS, None]),
    "encode": (lambda model, bad: model.encode(bad), NOT_PROMPTS),
    "reconstruct": (lambda model, bad: model.reconstruct(bad), [*NOT_PROMPTS, "", []]),
    "infill before": (lambda model, bad: model.infill(bad, "x", 2), NOT_PROMPTS),
    "infill after": (lambda model, bad: model.infill("x", bad, 2), NOT_PROMPTS),
    "measure": (lambda model, bad: measure(model, ["x", bad]), [*NOT_PROMPTS, "", []]),
    "tokens": (lambda model, bad: model.generate("x", bad), [*NOT_COUNTS, None]),
    "stream tokens": (lambda model, bad: model.stream("x", bad), [*NOT_COUNTS, None]),
    "hole": (lambda model, bad: model.infill("x", "x", bad), [*NOT_COUNTS, None]),
    "batch": (lambda model, bad: model.generate([], batch=bad), [*NOT_COUNTS, None]),
    "history": (lambda model, bad: model.session(history=bad), [*NOT_COUNTS, None, 10**15, 2**31 - 1]),
    "slots": (lambda model, bad: model.session(history=64, slots=bad), NOT_COUNTS),
    "samples": (lambda model, bad: measure(model, ["x"], samples=bad), NOT_COUNTS),
    "measure steps": (lambda model, bad: measure(model, ["x"], steps=bad), NOT_COUNTS),
    "measure at": (
        lambda model, bad: measure(model, ["x"], at=bad),
        [0, 1, "0.5", [0.5], float("nan"), HUGE],
    ),
    "measure seed": (
        lambda model, bad: measure(model, ["x"], seed=bad),
        [-1, 1.5, "1", [True], 2**63, [1, 2]],
    ),
    "measure texts": (lambda model, bad: measure(model, bad), [None, 5, {"a": 1}, {"a"}, b"x", [None]]),
    "measure given": (lambda model, bad: measure(model, ["x"], bad), [5, {"a": 1}, b"x", [None], ["a", "b"]]),
    "measure model": (lambda model, bad: measure(bad, ["x"]), [None, 5, "model", torch.nn.Linear(1, 1)]),
    "progress": (lambda model, bad: measure(model, ["x"], progress=bad), NOT_FUNCTIONS),
    "generate progress": (lambda model, bad: model.generate([], progress=bad), NOT_FUNCTIONS),
    "callback": (lambda model, bad: model.generate("x", 2, callback=bad), NOT_FUNCTIONS),
    "guesses": (lambda model, bad: model.stream("x", 2, guesses=bad), NOT_FLAGS),
    "submit guesses": (lambda model, bad: model.session(history=8).submit("x", 2, guesses=bad), NOT_FLAGS),
    "submit confidence": (
        lambda model, bad: model.session(history=8).submit("x", 2, confidence=bad),
        NOT_FLAGS,
    ),
    "submit suffix": (lambda model, bad: model.session(history=64).submit("x", 2, suffix=bad), NOT_TEXTS),
    "chunks callback": (lambda model, bad: model.session(history=8).chunks(callback=bad), NOT_FUNCTIONS),
    "request settings": (
        lambda model, bad: model.generate([TextRequest("x", 2, bad)]),
        [None, 5, [1], {"stepz": 1}, {5: 1}],
    ),
    "cancel": (lambda model, bad: model.session(history=8).cancel(bad), [None, 0, -1, "0", 1.5, True, HUGE]),
    "chat": (lambda model, bad: model.chat(bad, 2), NOT_MESSAGES),
    "decode": (lambda model, bad: model.decode(bad), NOT_LATENTS),
    "to device": (lambda model, bad: model.to(bad), NOT_DEVICES),
    "to dtype": (lambda model, bad: model.to(dtype=bad), NOT_TYPES),
    "load": (lambda model, bad: colada.load(bad), NOT_PATHS),
    "load device": (lambda model, bad: colada.load(device=bad), NOT_DEVICES),
    "load dtype": (lambda model, bad: colada.load(dtype=bad), NOT_TYPES),
    "load revision": (lambda model, bad: colada.load("owner/name", revision=bad), [5, True, b"main"]),
    "save": (lambda model, bad: model.save(bad), [None, 5, True, ["x"], b"x", "\0", "\ud800", "x" * 5000]),
    "quantise": (lambda model, bad: model.quantise(bad), [None, 5, "int4", [], {}]),
    "push": (lambda model, bad: model.push_to_hub(bad), [None, 5, "name", "a/b/c", "../x", "a b/c", ""]),
    "vae": (lambda model, bad: ColaDLM(bad, model.dit), [None, 5, "vae"]),
    "dit": (lambda model, bad: ColaDLM(model.vae, bad), [None, 5, "dit"]),
    "tokenizer": (lambda model, bad: ColaDLM(model.vae, model.dit, bad), [5, "tokenizer.json"]),
    "settings": (
        lambda model, bad: ColaDLM(model.vae, model.dit, generation=bad),
        [5, [], "steps", {"steps": 0}, {"stepz": 1}, {5: 5}, {"stop": [5]}],
    ),
    "template": (lambda model, bad: ColaDLM(model.vae, model.dit, chat_template=bad), [5, ["x"], b"x"]),
    "end_ids": (
        lambda model, bad: model.generate("x", 2, end_ids=bad),
        [["a"], 5, "1", [1.5], [True], [-1], [290], [HUGE], {1}],
    ),
    "tokenizer encode": (lambda model, bad: tok(model).encode(bad), [None, 5, b"x", ["x"], "\ud800"]),
    "tokenizer encode_batch": (
        lambda model, bad: tok(model).encode_batch(bad),
        [None, 5, "ab", [5], [None], ["\ud800"]],
    ),
    "tokenizer decode": (
        lambda model, bad: tok(model).decode(bad),
        [None, 5, "ab", [-1], ["a"], [1.5], [2**32], [None], [[1]]],
    ),
    "a network's configuration": (
        lambda model, bad: colada.DiT(bad),
        [None, 5, "config", {}, [1], Unprintable(), np.zeros(3), colada.TextVAEConfig],
    ),
    "a Text VAE's configuration": (lambda model, bad: colada.TextVAE(bad), [None, 5, {}, Unprintable()]),
    "a decoder's configuration": (lambda model, bad: Decoder(bad), [None, 5, {}, Unprintable()]),
    "a configuration": (
        lambda model, bad: colada.DiTConfig.from_dict(bad),
        [None, 5, "x", [1], {5: 5}, {"model_type": [1]}, {"heads": Unprintable()}, {"heads": HUGE}],
    ),
    "tokenizer skip_special": (lambda model, bad: tok(model).decode([1], bad), NOT_FLAGS),
    "tokenizer of": (lambda model, bad: Tokenizer(bad), [None, 5, "tokenizer.json", [], tokenizers]),
    "tokenizer id_of": (lambda model, bad: tok(model).id_of(bad), [None, 5, b"x", ["x"]]),
    "tokenizer train": (
        lambda model, bad: Tokenizer.train(bad, 280),
        [None, 5, "ab", [5], [None], ["\ud800"]],
    ),
    "tokenizer vocab": (
        lambda model, bad: Tokenizer.train(TEXTS, bad),
        [None, 259, -1, 2.5, "300", True, HUGE, 10**12],
    ),
    "tokenizer file": (lambda model, bad: Tokenizer.from_file(bad), NOT_PATHS),
    "tokenizer save": (
        lambda model, bad: tok(model).save(bad),
        [None, 5, True, b"x", "\0", "\ud800", "x" * 5000],
    ),
}


def tok(model: ColaDLM) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer


def refused(call: Callable[[], Any]) -> str:
    """Return the one line with which a call is refused."""
    with pytest.raises(ColadaError) as caught:
        call()
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, (_, bad) in CALLS.items() for number in range(len(bad))]
)
def test_b5_an_argument_of_the_wrong_type_or_content_is_refused_in_one_line(
    speaker: ColaDLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, number: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speaker, "chat_template", "{{ messages[0]['content'] }}")
    call, bad = CALLS[name]
    refused(lambda: call(speaker, bad[number]))


@pytest.mark.parametrize("arch", ["ar", "llada"])
@pytest.mark.parametrize("number", range(len(NOT_PROMPTS)))
def test_b5_the_baselines_refuse_what_is_no_prompt(arch: str, number: int) -> None:
    model = BASELINES[arch](decoder(arch))
    refused(lambda: model.generate(NOT_PROMPTS[number], 2))
    refused(lambda: measure(model, [[1], NOT_PROMPTS[number]]))


def test_b5_ids_of_numpy_and_torch_are_taken(model: ColaDLM) -> None:
    expected = model.generate([[1, 2, 3], [4, 5, 6]], 5, seed=[1, 2])
    rows = [[1, 2, 3], [4, 5, 6]]
    for prompts in (
        np.array(rows),
        torch.tensor(rows),
        [np.array(rows[0]), torch.tensor(rows[1], dtype=torch.int16)],
        [[np.int64(1), torch.tensor(2), 3], (4, 5, 6)],
    ):
        assert model.generate(prompts, np.int64(5), seed=np.array([1, 2])) == expected  # type: ignore[arg-type]
    assert model.generate(torch.tensor(rows[0]), 5, seed=1) == expected[:1]  # type: ignore[arg-type]
    assert measure(model, np.array(rows))[0] == measure(model, rows)[0]  # type: ignore[arg-type]


# --- A8, B1, B8: one check of settings, within bounds ---------------------------------------------

BAD_SETTINGS: list[dict[str, Any]] = [
    {"steps": 0},
    {"steps": MOST_STEPS + 1},
    {"solver": "x"},
    {"schedule": "cosine"},
    {"noise": "pink"},
    {"temperature": 1e-46},
    {"top_p": 1e-300},
    {"top_k": -1},
    {"repetition_penalty": 1e-300},
    {"guidance": "x"},
    {"guidance": 1e39},
    {"guidance_interval": [0.9, 0.1]},
    {"seed": 2**63},
    {"stop": [5]},
    {"stop": "x" * (LONGEST_STOP + 1)},
    {"end_ids": ["a"]},
    {"stepz": 3},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=lambda settings: next(iter(settings)))
def test_a8_recipe_file_python_and_session_refuse_a_setting_alike(
    speaker: ColaDLM, tmp_path: Path, settings: dict[str, Any]
) -> None:
    said = refused(lambda: speaker.generate("x", 2, **settings))
    assert refused(lambda: speaker.session(history=64).submit("x", 2, **settings)) == said
    assert refused(lambda: speaker.generate([TextRequest("x", 2, settings)])) == said  # type: ignore[arg-type]
    assert refused(lambda: ColaDLM(speaker.vae, speaker.dit, generation=settings)).endswith(said)
    speaker.save(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    assert refused(lambda: colada.load(tmp_path / "model")).endswith(said)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{sources: [{{path: x}}]}}\ngeneration: {json.dumps(settings)}\n")
    assert said in refused(lambda: load_recipe(recipe))


@pytest.mark.parametrize(
    "flags",
    [
        ["-n", "1000000000000"],
        ["-n", str(MOST_TOKENS + 1)],
        ["--steps", "1" + "0" * 23],
        ["--temperature", "1e-46"],
        ["--temperature", "1e400"],
        ["--top-p", "1e-300"],
        ["--top-k", "1" + "0" * 30],
        ["--repetition-penalty", "1e-300"],
        ["--guidance", "nan"],
        ["--seed", str(2**63)],
        ["--stop", ""],
        ["--stop", "x" * (LONGEST_STOP + 1)],
        ["--noise", "released", "--seed", str(2**64)],
    ],
    ids=lambda flags: "=".join(flags[:2])[:30],
)
def test_b1_a_flag_out_of_its_bounds_ends_with_status_2(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert main(["generate", "x", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_b1_memory_is_compared_before_it_is_taken(model: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model.vae, model.dit, capacity=100)
    assert history_bytes(model.vae, model.dit, 100) == engine.history_bytes
    with pytest.raises(ColadaError, match=r"a history of .* GiB of memory, expected at most the "):
        model.session(history=10**9)
    monkeypatch.setattr("colada.device.memory_of", lambda device: 2**20)
    with pytest.raises(ColadaError, match=r"a prompt of 9000 tokens takes .* GiB of memory"):
        model.generate([[1] * 9000], 2)
    with pytest.raises(ColadaError, match="a history of 131076 latents"):
        model.generate([[1]], MOST_TOKENS)
    with pytest.raises(ColadaError, match="a history of 131074 tokens"):
        AutoregressiveLM(decoder("ar")).generate([[1]], MOST_TOKENS)
    with pytest.raises(ColadaError, match="passes over 131073 tokens"):
        MaskedLM(decoder("llada")).generate([[1]], MOST_TOKENS)


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
    session = model.session(history=200)
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
    session = model.session(history=64)
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
    session = model.session(history=64)
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
    session = model.session(history=64)
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
    session = model.session(history=64)
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


# --- B14: tokenizers whose decoders look at what stands before -----------------------------------


def wrapped(tokens: list[str], decoder: Any) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", "<|pad|>", *tokens])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", "<|pad|>")])
    inner.decoder = decoder
    return Tokenizer(inner)


BYTES = [f"<0x{byte:02X}>" for byte in "é🙂€a".encode()]
TOKENIZERS: dict[str, Tokenizer] = {
    "metaspace": wrapped(["▁the", "▁fox", "es", "▁", ".", "é"], decoders.Metaspace()),
    "strip": wrapped(
        ["▁the", "▁fox", "es", "▁", ".", *dict.fromkeys(BYTES)],
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    ),
    "wordpiece": wrapped(["the", "fox", "##es", ".", "don", "'", "t"], decoders.WordPiece()),
    "suffix": wrapped(["the</w>", "fox", "es</w>", ".</w>", "f"], decoders.BPEDecoder()),
    "bytes": Tokenizer.train(TEXTS, 290),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(4))
def test_b14_text_in_blocks_reads_as_the_whole_does(kind: str, seed: int) -> None:
    tokenizer, generator = TOKENIZERS[kind], np.random.default_rng(seed)
    for _ in range(60):
        first = 2 if kind != "bytes" else 0
        ids = generator.integers(first, tokenizer.vocab_size, generator.integers(1, 24)).tolist()
        split = int(generator.integers(0, len(ids)))
        before, after = ids[:split], ids[split:]
        transcript = Transcript(tokenizer, 0, len(after), (), (), before)
        pieces: list[str] = []
        while after:
            size = int(generator.integers(1, 6))
            pieces.append(transcript.add(after[:size])[0])
            after = after[size:]
        whole = tokenizer.decode(ids)
        prefix = tokenizer.decode(before)
        assert "".join(pieces) == transcript.text
        if not prefix.endswith("\ufffd") and whole.startswith(prefix):
            assert prefix + transcript.text == whole, ids


def test_b14_the_first_words_space_is_shown_after_a_prompt() -> None:
    tokenizer = TOKENIZERS["metaspace"]
    the, fox = (tokenizer.id_of(token) for token in ("▁the", "▁fox"))
    assert the is not None
    assert fox is not None
    assert tokenizer.decode([fox]) == "fox"
    transcript = Transcript(tokenizer, 0, 9, (), (), [the])
    assert [transcript.add([own])[0] for own in (fox, the)] == [" fox", " the"]
    assert Transcript(tokenizer, 0, 9, (), ()).add([fox])[0] == "fox"


# --- B16: a quantised model ------------------------------------------------------------------------


def test_b16_a_quantised_model_is_measured_or_refused_in_one_line() -> None:
    pytest.importorskip("torchao")
    model = tiny_model().quantise("int8")
    score = measure(model, [[1, 2, 3, 4, 5]], steps=2)[0]
    exact = measure(tiny_model(), [[1, 2, 3, 4, 5]], steps=2)[0]
    assert abs(score.log_likelihood - exact.log_likelihood) < 0.05 * abs(exact.log_likelihood)


# --- D6, the hub -----------------------------------------------------------------------------------


class Hub:
    """A stand-in for the hub: repositories in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, Any]] = []

    def api(self, token: str | None = None) -> Any:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(("create", (repo_id, private)))

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.calls.append(("branch", branch))

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str
    ) -> Any:
        import shutil

        shutil.copytree(folder_path, self.root / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, name: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        return str(self.root / name)


@pytest.mark.parametrize("kind", ["cola", "ar"])
def test_a_model_pushed_to_the_hub_is_loaded_by_its_id(
    kind: str, speaker: ColaDLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", hub.api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path / "..")
    model: LanguageModel = speaker if kind == "cola" else AutoregressiveLM(decoder("ar"))
    prompts = ["The fox"] if kind == "cola" else [[1, 2]]
    url = model.push_to_hub("someone/mine", private=True, revision="v1", token="secret")
    assert url == "https://hub/someone/mine/commit/1"
    assert hub.calls == [("token", "secret"), ("create", ("someone/mine", True)), ("branch", "v1")]
    loaded = colada.load("someone/mine")
    assert loaded.generate(prompts, 6) == model.generate(prompts, 6)


def test_a_hub_that_refuses_is_one_line(speaker: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def api(token: str | None = None) -> Any:
        raise RuntimeError("401\nUnauthorised")

    monkeypatch.setattr("huggingface_hub.HfApi", api)
    said = refused(lambda: speaker.push_to_hub("someone/mine"))
    assert said == "someone/mine cannot be written to the hub: 401 Unauthorised"


def test_d6_the_hubs_library_is_imported_for_hub_ids_alone() -> None:
    code = (
        "import colada, sys; colada.load().generate('x', 4, steps=1); exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


# --- D8: what one asks for, others do not pay ------------------------------------------------------


def test_d8_guesses_are_decoded_for_those_who_ask(model: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [model.generate([own], 9, seed=seed)[0] for seed, own in enumerate(([1], [2, 3]))]
    rows: list[int] = []
    real = Engine._hidden

    def hidden(engine: Engine, slots: Any, latents: torch.Tensor) -> torch.Tensor:
        rows.append(len(latents))
        return real(engine, slots, latents)

    monkeypatch.setattr(Engine, "_hidden", hidden)
    session = model.session(history=64)
    session.submit([1], 9, seed=0)
    asks = session.submit([2, 3], 9, seed=1, guesses=True)
    chunks = list(session.chunks())
    assert {chunk.index for chunk in chunks if chunk.step is not None} == {asks}
    assert [chunk.completion for chunk in chunks if chunk.completion] == plain
    assert rows == [1, 1, 2] * 3


def test_d8_a_stop_string_costs_its_length_once() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("The fox saw the owl, and the ")
    reads: list[int] = []

    class Counted(str):
        def __getitem__(self, key: Any) -> str:
            reads.append(1)
            return super().__getitem__(key)

    costs = []
    for length in (200, 4000):
        transcript = Transcript(tokenizer, 0, 10**4, [Counted("The fox" + "x" * length)], ())
        reads.clear()
        for _ in range(50):
            transcript.add(ids)
        costs.append(len(reads))
    # Twenty times the length, and no more work: two looks a character at most, on average.
    assert costs[0] == costs[1] <= 3 * 50 * len(tokenizer.decode(ids))


def test_d8_a_long_generation_decodes_each_token_a_few_times() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("The fox saw the owl, and the ")
    decoded: list[int] = []

    class Counting:
        bytes_at_end = staticmethod(lambda ids: 0)

        def decode(self, own: list[int], skip_special: bool = True) -> str:
            decoded.append(len(own))
            return tokenizer.decode(own)

    transcript = Transcript(Counting(), 0, 10**5, ["nowhere"], ())  # type: ignore[arg-type]
    for _ in range(400):
        transcript.add(ids)
    assert transcript.text == tokenizer.decode(ids * 400)
    assert sum(decoded) < 400 * 6 * (len(ids) + 8)


# --- a prompt longer than the training rows ---------------------------------------------------------


@pytest.mark.parametrize("arch", ["cola", "ar"])
def test_a_prompt_longer_than_the_training_rows_is_noted_once(
    arch: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model: LanguageModel = tiny_model() if arch == "cola" else AutoregressiveLM(decoder(arch))
    model.save(tmp_path / "unknown")
    folder = "cola_dit" if arch == "cola" else "decoder"
    assert "training_length" not in (tmp_path / "unknown" / folder / "config.json").read_text()
    model.generate([[1] * 30], 2)
    assert not recwarn
    model.training_length = 8
    model.save(tmp_path / "model")
    loaded = colada.load(tmp_path / "model")
    loaded.generate([[1] * 8], 2)
    assert not recwarn
    for _ in range(2):
        loaded.generate([[1] * 9, [1] * 10], 2)
    (note,) = recwarn
    assert note.category is ColadaWarning
    assert "a prompt of 9 tokens" in str(note.message)
    assert "rows of 8 tokens" in str(note.message)


@pytest.mark.filterwarnings("default::colada.errors.ColadaWarning")
def test_the_command_line_shows_it_as_a_note(
    speaker: ColaDLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speaker, "training_length", 4)
    speaker.save(tmp_path / "model")
    speaker.training_length = None
    assert main(["generate", "The fox saw the owl", "-n", "4", "-m", str(tmp_path / "model")]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("note: a prompt of ")
    assert len(captured.err.splitlines()) == 1
