"""What users ask wrongly, and what fails on the way: each by itself, in one line, with nothing lost.

Rows are named after the faults they guard against.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

import colada
from colada.checks import MOST_TOKENS
from colada.cli.main import main
from colada.errors import ColadaError
from colada.generate.engine.engine import Engine, cache_bytes
from colada.generate.settings import LONGEST_STOP, MOST_STEPS, TextRequest
from colada.models.autoregressive import AutoregressiveLM
from colada.models.cola import ColaDLM
from colada.models.likelihood import measure
from colada.models.masked import MaskedLM
from colada.networks.decoder import Decoder
from colada.text.tokenizer import Tokenizer
from colada.train.recipe import load_recipe
from faults import BASELINES, TEXTS, decoder, refused

HUGE = 10**400


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
    "submit": (lambda model, bad: model.session(capacity=64).submit(bad, 2), NOT_PROMPTS),
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
    "capacity": (lambda model, bad: model.session(capacity=bad), [*NOT_COUNTS, None, 10**15, 2**31 - 1]),
    "slots": (lambda model, bad: model.session(capacity=64, slots=bad), NOT_COUNTS),
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
    "submit guesses": (lambda model, bad: model.session(capacity=8).submit("x", 2, guesses=bad), NOT_FLAGS),
    "submit confidence": (
        lambda model, bad: model.session(capacity=8).submit("x", 2, confidence=bad),
        NOT_FLAGS,
    ),
    "submit suffix": (lambda model, bad: model.session(capacity=64).submit("x", 2, suffix=bad), NOT_TEXTS),
    "chunks callback": (lambda model, bad: model.session(capacity=8).chunks(callback=bad), NOT_FUNCTIONS),
    "request settings": (
        lambda model, bad: model.generate([TextRequest("x", 2, bad)]),
        [None, 5, [1], {"stepz": 1}, {5: 1}],
    ),
    "cancel": (lambda model, bad: model.session(capacity=8).cancel(bad), [None, 0, -1, "0", 1.5, True, HUGE]),
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
    assert refused(lambda: speaker.session(capacity=64).submit("x", 2, **settings)) == said
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
    assert cache_bytes(model.vae, model.dit, 100) == engine.cache_bytes
    with pytest.raises(ColadaError, match=r"a KV cache of .* GiB of memory, expected at most the "):
        model.session(capacity=10**9)
    monkeypatch.setattr("colada.device.memory_of", lambda device: 2**20)
    with pytest.raises(ColadaError, match=r"a prompt of 9000 tokens takes .* GiB of memory"):
        model.generate([[1] * 9000], 2)
    with pytest.raises(ColadaError, match="a KV cache of 131076 latents"):
        model.generate([[1]], MOST_TOKENS)
    with pytest.raises(ColadaError, match="a KV cache of 131074 tokens"):
        AutoregressiveLM(decoder("ar")).generate([[1]], MOST_TOKENS)
    with pytest.raises(ColadaError, match="passes over 131073 tokens"):
        MaskedLM(decoder("llada")).generate([[1]], MOST_TOKENS)
