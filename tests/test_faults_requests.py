"""What users ask wrongly, and what fails on the way: each by itself, in one line, with nothing lost.

Rows are named after the faults they guard against.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import colada
from colada.baselines.autoregressive import AutoregressiveLM
from colada.baselines.config import DecoderConfig
from colada.baselines.decoder import Decoder
from colada.baselines.masked import MaskedLM
from colada.errors import ColadaError
from colada.evaluation.measure import measure
from colada.model import ColaDLM
from colada.settings import MOST_TOKENS, TextRequest
from colada.tokenizer import Tokenizer
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
NOT_COUNTS: list[Any] = [0, -1, 2.5, "4", True, [4], HUGE, 10**12, float("nan"), b"4"]
NOT_FUNCTIONS: list[Any] = [5, "print", [print], {}]
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
    "complete": (lambda model, bad: model.complete([TextRequest(bad, 2, {})]), NOT_PROMPTS),
    "encode": (lambda model, bad: model.encode(bad), NOT_PROMPTS),
    "reconstruct": (lambda model, bad: model.reconstruct(bad), [*NOT_PROMPTS, "", []]),
    "infill before": (lambda model, bad: model.infill(bad, "x", 2), NOT_PROMPTS),
    "infill after": (lambda model, bad: model.infill("x", bad, 2), NOT_PROMPTS),
    "measure": (lambda model, bad: measure(model, ["x", bad]), [*NOT_PROMPTS, "", []]),
    "tokens": (lambda model, bad: model.generate("x", bad), [*NOT_COUNTS, None]),
    "stream tokens": (lambda model, bad: model.stream("x", bad), [*NOT_COUNTS, None]),
    "hole": (lambda model, bad: model.infill("x", "x", bad), [*NOT_COUNTS, None]),
    "batch": (lambda model, bad: model.complete([], bad), [*NOT_COUNTS, None]),
    "history": (lambda model, bad: model.session(history=bad), [*NOT_COUNTS, None, 10**15, 2**31 - 1]),
    "slots": (lambda model, bad: model.session(history=64, slots=bad), NOT_COUNTS),
    "samples": (lambda model, bad: measure(model, ["x"], samples=bad), NOT_COUNTS),
    "measure steps": (lambda model, bad: measure(model, ["x"], steps=bad), NOT_COUNTS),
    "measure at": (lambda model, bad: measure(model, ["x"], at=bad), [0, 1, "0.5", None, float("nan"), HUGE]),
    "measure seed": (
        lambda model, bad: measure(model, ["x"], seed=bad),
        [-1, 1.5, "1", [True], 2**63, [1, 2]],
    ),
    "measure texts": (lambda model, bad: measure(model, bad), [None, 5, {"a": 1}, {"a"}, b"x", [None]]),
    "measure given": (lambda model, bad: measure(model, ["x"], bad), [5, {"a": 1}, b"x", [None], ["a", "b"]]),
    "measure model": (lambda model, bad: measure(bad, ["x"]), [None, 5, "model", torch.nn.Linear(1, 1)]),
    "progress": (lambda model, bad: measure(model, ["x"], progress=bad), NOT_FUNCTIONS),
    "complete progress": (lambda model, bad: model.complete_all([], progress=bad), NOT_FUNCTIONS),
    "callback": (lambda model, bad: model.generate("x", 2, callback=bad), NOT_FUNCTIONS),
    "chunks callback": (lambda model, bad: model.session(history=8).chunks(callback=bad), NOT_FUNCTIONS),
    "requests": (lambda model, bad: model.complete(bad), [None, 5, "ab", [5], [("x", 2, {})], {"a": 1}]),
    "request settings": (
        lambda model, bad: model.complete([TextRequest("x", 2, bad)]),
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
