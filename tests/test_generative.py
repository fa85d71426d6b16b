"""Generated text before a judge: every figure against one counted or computed by hand."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import colada
from colada.cli.main import app
from colada.errors import ColadaError
from colada.evaluate.generative import (
    ModelJudge,
    Passage,
    TransformersJudge,
    distinct,
    entropy,
    figures,
    read_generated,
)
from colada.evaluate.texts import Text
from colada.models.bound import TextScore
from colada.models.cola import ColaDLM
from colada.models.likelihood import measure
from colada.text.tokenizer import Tokenizer

TEXTS = [
    Text("Once upon a time there was a little girl named Lily. She liked to play in the park.", "a:1"),
    Text("The dog ran home.", "a:2"),
    Text("Tom had a small boat. He wanted to sail it on the pond near his house with his mom.", "a:3"),
]


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return colada.load()


# --- figures --------------------------------------------------------------------------------------


def test_entropy_by_hand() -> None:
    assert entropy([1, 1, 2, 2]) == 1.0
    assert entropy("aaab") == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert entropy([7, 7, 7]) == 0.0
    assert entropy([]) == 0.0
    assert entropy(range(8)) == 3.0


def test_distinct_by_hand() -> None:
    texts = [["a", "b", "a", "b"], ["a", "b"]]
    assert distinct(texts, 1) == 2 / 6
    assert distinct(texts, 2) == 2 / 4  # ab, ba, ab, ab; none across texts
    assert distinct(texts, 3) == 1.0  # aba, bab
    assert distinct(texts, 5) == 0.0


def passage(*ids: int) -> Passage:
    return Passage("", "x" * len(ids), (), ids)


def test_figures_by_hand() -> None:
    passages = [passage(1, 1, 2, 2), passage(3, 3)]
    scores = [TextScore(5, 0, -5 * math.log(8), {}), TextScore(3, 0, -3 * math.log(8), {})]
    found = figures(passages, scores)
    assert found["perplexity"] == pytest.approx(8.0)
    assert found["standard_error"] == pytest.approx(0.0, abs=1e-9)
    assert found["entropy"] == pytest.approx((1.0 + 0.0) / 2)
    assert found["entropy_together"] == pytest.approx(math.log2(3))
    assert (found["distinct_1"], found["distinct_2"], found["distinct_3"]) == (3 / 6, 4 / 4, 2 / 2)
    assert (found["texts"], found["tokens"], found["judge_tokens"]) == (2, 6, 8)
    uneven = figures(passages, [TextScore(4, 0, -4.0, {}), TextScore(2, 0, -8.0, {})])
    # Two nats a token over all; the texts are 4 - 2 * 4 = -4 and 8 - 2 * 2 = 4 nats off that.
    error = math.sqrt((16 + 16) * 2 / 1) / 6
    assert uneven["perplexity"] == pytest.approx(math.exp(2.0))
    assert uneven["standard_error"] == pytest.approx(math.exp(2.0) * error)
    assert figures(passages[:1], scores[:1])["standard_error"] is None


# --- judging --------------------------------------------------------------------------------------


class CountingJudge:
    """Says that every character costs a nat; keeps what it was given."""

    origin, kind, settings = "counter", "exact", {}  # type: ignore[var-annotated]

    def __init__(self) -> None:
        self.seen: list[Passage] = []

    def score(self, passages: Sequence[Passage], progress: Any = None) -> list[TextScore]:
        self.seen = list(passages)
        return [TextScore(len(own.ids), 0, -float(len(own.text)), {}) for own in passages]


def test_generated_and_real_follow_the_same_prompts_for_as_long(model: ColaDLM) -> None:
    judge = CountingJudge()
    found = read_generated(model, TEXTS, judge, prompt_tokens=4, new_tokens=8, seed=5, steps=2)
    assert (found["left_out"], found["empty"], found["kind"]) == (1, 0, "exact")
    ids = [model.ids(TEXTS[number].text) for number in (0, 2)]
    done = model.generate([own[:4] for own in ids], 8, seed=[5, 6], steps=2)
    generated, real = judge.seen[:2], judge.seen[2:]
    assert [own.ids for own in generated] == [own.tokens for own in done]
    assert [own.text for own in generated] == [own.text for own in done]
    for own, other, whole in zip(generated, real, ids, strict=True):
        assert own.prompt_ids == other.prompt_ids == tuple(whole[:4])
        assert other.ids == tuple(whole[4 : 4 + len(own.ids)])
    characters = sum(len(own.text) for own in real)
    tokens = sum(len(own.ids) for own in real)
    assert found["real"]["perplexity"] == pytest.approx(math.exp(characters / tokens))
    assert [record["origin"] for record in found["records"]] == ["a:1", "a:3"]
    apart = read_generated(
        model, TEXTS, CountingJudge(), prompt_tokens=4, new_tokens=8, seed=5, batch=1, steps=2
    )
    assert apart["records"] == found["records"]


def test_where_the_model_ends_early_the_real_text_is_cut(
    model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from colada.text.transcript import Completion

    lengths = {0: 3, 1: 0}
    monkeypatch.setattr(
        model,
        "complete",
        lambda requests, batch: (
            (n, Completion("", (1,) * lengths[n], "end", n)) for n in range(len(requests))
        ),
    )
    judge = CountingJudge()
    found = read_generated(model, TEXTS, judge, prompt_tokens=0, new_tokens=8)
    assert [len(own.ids) for own in judge.seen] == [3, 3]
    assert judge.seen[1].ids == tuple(model.ids(TEXTS[0].text)[:3])
    assert judge.seen[1].prompt_ids == ()
    assert (found["empty"], found["ended"], found["generated"]["texts"]) == (1, 2, 1)
    lengths[0] = 0
    with pytest.raises(ColadaError, match="ended every one of 2 texts"):
        read_generated(model, TEXTS, judge, prompt_tokens=0, new_tokens=8)


def test_a_judge_with_the_same_tokenizer_reads_tokens(model: ColaDLM) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = model.ids(TEXTS[0].text)
    own = Passage("not read", "nor this", tuple(ids[:4]), tuple(ids[4:9]))
    (score,) = ModelJudge(model, tokenizer, steps=2, seed=3).score([own])
    (bound,) = measure(model, [ids[4:9]], [ids[:4]], steps=2, seed=3)
    assert score.log_likelihood == pytest.approx(bound.log_likelihood, rel=1e-5)
    assert score.tokens == 5


def test_a_judge_with_another_tokenizer_reads_text(model: ColaDLM) -> None:
    stranger = Tokenizer.train(["a few words, no more than that"], 262)
    own = Passage("The dog", " ran home.", (1, 2), (3, 4))
    (score,) = ModelJudge(model, stranger, steps=2, seed=3).score([own])
    (bound,) = measure(model, [" ran home."], ["The dog"], steps=2, seed=3)
    assert score.log_likelihood == pytest.approx(bound.log_likelihood, rel=1e-5)
    assert score.tokens == len(model.ids(" ran home."))


class Bigrams:
    """A causal model of three tokens in the other library's manner: the next is of a table's row."""

    table = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0], [0.5, 0.5, 0.5]])

    def to(self, device: torch.device) -> "Bigrams":
        return self

    def eval(self) -> "Bigrams":
        return self

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


class Letters:
    bos_token_id: int | None = 2

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return ["abc".index(letter) for letter in text]


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the judge uses of that library; the real one is no dependency of the tests."""
    module = ModuleType("transformers")
    for name, value in (("AutoTokenizer", Letters()), ("AutoModelForCausalLM", Bigrams())):

        def load(where: str, value: Any = value) -> Any:
            if where != "there":
                raise OSError("not there")
            return value

        setattr(module, name, SimpleNamespace(from_pretrained=load))
    module.__version__ = "0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", module)


@pytest.mark.usefixtures("transformers")
def test_a_judge_of_another_library_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = TransformersJudge("there", torch.device("cpu"))
    after, alone = judge.score([Passage("ab", "ba", (), ()), Passage("", "c", (), ())])
    rows = [[math.exp(value) for value in row] for row in Bigrams.table.tolist()]
    # b after b, a after b; c after the first token, which is c.
    expected = math.log(rows[1][1] / sum(rows[1])) + math.log(rows[1][0] / sum(rows[1]))
    assert after.log_likelihood == pytest.approx(expected)
    assert alone.log_likelihood == pytest.approx(math.log(1 / 3))
    assert (after.tokens, after.bytes, judge.kind) == (2, 2, "exact")
    monkeypatch.setattr(Letters, "bos_token_id", None)
    with pytest.raises(ColadaError, match="give the texts a prompt"):
        judge.score([Passage("", "c", (), ())])
    with pytest.raises(ColadaError, match="hf:nowhere cannot be loaded"):
        TransformersJudge("nowhere", torch.device("cpu"))


def test_a_judge_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ColadaError, match="pip install transformers"):
        TransformersJudge("gpt2", torch.device("cpu"))


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ({"prompt_tokens": -1, "new_tokens": 4}, "prompt_tokens=-1"),
        ({"prompt_tokens": 4, "new_tokens": 0}, "new_tokens=0"),
        ({"prompt_tokens": 4, "new_tokens": 400}, "none of 3 texts has the 404 tokens"),
        ({"prompt_tokens": 4, "new_tokens": 4, "batch": 0}, "batch=0"),
        ({"prompt_tokens": 4, "new_tokens": 4, "temprature": 1.0}, "temprature"),
    ],
)
def test_bad_input(model: ColaDLM, lengths: dict[str, Any], words: str) -> None:
    with pytest.raises(ColadaError, match=words):
        read_generated(model, TEXTS, CountingJudge(), **lengths)


def test_the_command(tmp_path: Path) -> None:
    data, out = tmp_path / "real.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps({"text": text.text}) + "\n" for text in TEXTS))
    judge = str(Path(colada.__file__).parent / "bundled")
    fast = ["--steps", "2", "--judge-steps", "1", "--prompt-tokens", "4", "--new-tokens", "4"]
    arguments = ["eval", "generative", str(data), "--judge", judge, *fast, "-q", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "perplexity, at most" in result.stdout
    record = json.loads(out.read_text())
    assert record["kind"] == "bound"
    assert record["settings"]["steps"] == 2
    assert record["judge_settings"]["steps"] == 1
    assert record["made_with"]["colada"] == colada.__version__
    for column, name in (("generated", "log_likelihood"), ("real", "real_log_likelihood")):
        total = -sum(own[name] for own in record["records"])
        assert record[column]["perplexity"] == pytest.approx(math.exp(total / record[column]["judge_tokens"]))
        assert record[column]["tokens"] == record["generated"]["tokens"]
    missing = CliRunner().invoke(app, ["eval", "generative", str(data), "--judge", str(tmp_path / "no")])
    assert missing.exit_code != 0
