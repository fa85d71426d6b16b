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
import typer
from typer.testing import CliRunner

import colada
from colada.cli.main import app
from colada.errors import ColadaError
from colada.evaluate.generative import (
    ModelJudge,
    Passage,
    TransformersJudge,
    continue_passages,
    figures,
    frontier,
    real_passages,
)
from colada.evaluate.texts import Text
from colada.evaluate.variety import distinct, entropy, known, overlap, repeated, words
from colada.models.bound import TextScore
from colada.models.cola import ColaDLM
from colada.models.likelihood import measure
from colada.models.load import MODELS
from colada.networks.config import DecoderConfig
from colada.networks.decoder import Decoder
from colada.report.frontier import draw_frontier
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Completion

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


def test_words_by_hand() -> None:
    spoken = words("The the dog, don't DON'T: the\nÉté été.")
    assert spoken == ["the", "the", "dog", "don't", "don't", "the", "été", "été"]
    assert repeated([spoken, ["été"]]) == 3 / 7
    assert known([spoken, ["cat"]], {"the", "dog"}) == 4 / 9
    assert repeated([]) == known([], {"a"}) == 0.0


def test_overlap_by_hand() -> None:
    # ab, bc and ab, bd: one of three; the same twice: all; nothing to share with a text of one word: none.
    assert overlap([["abc", "abd"]]) == 1 / 3
    assert overlap([["abc", "abd"], ["abab", "ab"]]) == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert overlap([["abc", "abd", "a"]]) == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert overlap([["abc"], ["abd"]]) is None


def passage(*ids: int, text: str = "") -> Passage:
    return Passage("", text or "x" * len(ids), (), ids)


def test_figures_by_hand() -> None:
    passages = [passage(1, 1, 2, 2), passage(3, 3)]
    scores = [TextScore(5, 0, -5 * math.log(8), {}), TextScore(3, 0, -3 * math.log(8), {})]
    found = figures([passages], scores)
    assert found["perplexity"] == pytest.approx(8.0)
    assert found["standard_error"] == pytest.approx(0.0, abs=1e-9)
    assert found["entropy"] == pytest.approx((1.0 + 0.0) / 2)
    assert found["entropy_together"] == pytest.approx(math.log2(3))
    assert (found["distinct_1"], found["distinct_2"], found["distinct_3"]) == (3 / 6, 4 / 4, 2 / 2)
    assert (found["texts"], found["tokens"], found["judge_tokens"]) == (2, 6, 8)
    assert (found["repeated_words"], found["overlap"]) == (0.0, None)
    # Two samples of two prompts; where nothing was written there is nothing to compare.
    rows = [[passage(1, 2, 3, text="a a"), passage(5, 6)], [passage(1, 2, 4, text="a b"), passage()]]
    both = figures(rows, [*scores, scores[0]], {"a"})
    assert (both["texts"], both["overlap"]) == (3, 1 / 3)
    assert (both["repeated_words"], both["known_words"]) == (1 / 2, 3 / 5)
    uneven = figures([passages], [TextScore(4, 0, -4.0, {}), TextScore(2, 0, -8.0, {})])
    # Two nats a token over all; the texts are 4 - 2 * 4 = -4 and 8 - 2 * 2 = 4 nats off that.
    error = math.sqrt((16 + 16) * 2 / 1) / 6
    assert uneven["perplexity"] == pytest.approx(math.exp(2.0))
    assert uneven["standard_error"] == pytest.approx(math.exp(2.0) * error)
    assert figures([passages[:1]], scores[:1])["standard_error"] is None


# --- judging --------------------------------------------------------------------------------------


class CountingJudge:
    """Says that every character costs a nat; keeps what it was given."""

    origin, kind, settings = "counter", "exact", {}  # type: ignore[var-annotated]

    def __init__(self) -> None:
        self.seen: list[Passage] = []

    def score(self, passages: Sequence[Passage], progress: Any = None) -> list[TextScore]:
        self.seen = list(passages)
        return [TextScore(len(own.ids), 0, -float(len(own.text)), {}) for own in passages]


def tokenizer_of(model: ColaDLM) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer


def test_models_follow_the_prompts_of_real_texts_under_all_settings(model: ColaDLM) -> None:
    judge, tokenizer = CountingJudge(), tokenizer_of(model)
    real = real_passages(tokenizer, TEXTS, 4, 8)
    assert [own.origin for own in real] == ["a:1", "a:3"]  # The second is too short.
    ids = [model.ids(TEXTS[number].text) for number in (0, 2)]
    for own, whole in zip(real, ids, strict=True):
        assert (own.prompt_ids, own.ids) == (tuple(whole[:4]), tuple(whole[4:12]))
    settings = [{"steps": 2, "guidance": guidance} for guidance in (1.0, 3.0)]
    found = frontier([(model, settings)], real, judge, tokenizer, 8, seed=5, samples=2, batch=3)
    characters, tokens = sum(len(own.text) for own in real), sum(len(own.ids) for own in real)
    assert found["real"]["perplexity"] == pytest.approx(math.exp(characters / tokens))
    assert [record["origin"] for record in found["real"]["records"]] == ["a:1", "a:3"]
    for point, own in zip(found["points"], settings, strict=True):
        assert own.items() <= point["settings"].items()
        done = model.generate([whole[:4] for whole in [*ids, *ids]], 8, seed=[5, 6, 7, 8], **own)
        assert [record["text"] for record in point["records"]] == [each.text for each in done]
        assert point["texts"] == 4
        pairs = [[done[0].tokens, done[2].tokens], [done[1].tokens, done[3].tokens]]
        assert point["overlap"] == pytest.approx(overlap(pairs))
        assert point["distinct_2"] == distinct([each.tokens for each in done], 2)


def test_a_model_with_another_tokenizer_is_counted_in_the_first_ones_tokens(model: ColaDLM) -> None:
    stranger = Tokenizer.train(["a few words, no more than that"], 262)
    real = real_passages(stranger, TEXTS, 4, 8)
    (((own, _, _),),) = continue_passages(model, stranger, real, 4, [{"steps": 1}], seed=5)
    (done,) = model.generate([real[0].prompt], 4, seed=5, steps=1)
    assert own.ids == tuple(stranger.encode(done.text))
    assert own.prompt_ids == real[0].prompt_ids


def test_what_ends_early_is_counted_and_real_text_cut_for_comparison(
    model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = {0: 3, 1: 0}
    monkeypatch.setattr(
        model,
        "generate",
        lambda requests, **_: [Completion("", (1,) * lengths[n], "end", n) for n in range(len(requests))],
    )
    real = real_passages(tokenizer_of(model), TEXTS, 0, 8)
    assert real[0].prompt_ids == ()
    judge = CountingJudge()
    (point,) = frontier([(model, [{}])], real, judge, tokenizer_of(model), 8)["points"]
    assert [len(own.ids) for own in judge.seen] == [8, 8]  # Real text is whole to the judge, and read last.
    assert (point["empty"], point["ended"], point["texts"], point["tokens"]) == (1, 2, 1, 3)
    assert point["real_distinct_2"] == distinct([real[0].ids[:3]], 2)
    lengths[0] = 0
    with pytest.raises(ColadaError, match="ended every one of 2 texts"):
        continue_passages(model, tokenizer_of(model), real, 8, [{}])


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
    prompt_tokens, new_tokens = lengths.pop("prompt_tokens"), lengths.pop("new_tokens")
    batch = lengths.pop("batch", 16)
    tokenizer = tokenizer_of(model)

    def ask() -> None:
        real = real_passages(tokenizer, TEXTS, prompt_tokens, new_tokens)
        continue_passages(model, tokenizer, real, new_tokens, [lengths], batch=batch)

    with pytest.raises(ColadaError, match=words):
        ask()


def test_the_command_draws_a_line_of_each_model(tmp_path: Path) -> None:
    data, out, page = tmp_path / "real.jsonl", tmp_path / "out.json", tmp_path / "page.html"
    data.write_text("".join(json.dumps({"text": text.text}) + "\n" for text in TEXTS))
    judge = str(Path(colada.__file__).parent / "bundled")
    fast = ["--steps", "2", "--judge-steps", "1", "--prompt-tokens", "4", "--new-tokens", "4"]
    several = ["--guidance", "1,2.5", "--model", judge, "--model", judge]
    arguments = ["eval", "generative", str(data), "--judge", judge, *fast, *several, "-q"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert "at most" in result.stdout
    assert "left out: 1 texts with fewer than 8 tokens" in result.stdout
    record = json.loads(out.read_text())
    assert record["kind"] == "bound"
    assert record["judge_settings"]["steps"] == 1
    assert record["made_with"]["colada"] == colada.__version__
    assert [point["settings"]["guidance"] for point in record["points"]] == [1.0, 2.5, 1.0, 2.5]
    assert all(point["settings"]["steps"] == 2 for point in record["points"])
    for own in (record["real"], *record["points"]):
        total = -sum(each["log_likelihood"] for each in own["records"])
        assert own["perplexity"] == pytest.approx(math.exp(total / own["judge_tokens"]))
        assert f"{own['perplexity']:.2f}" in page.read_text()
    figure = draw_frontier(record)
    lines = [container.lines[0].get_xydata().tolist() for container in figure.axes[0].containers]
    expected = [[point["distinct_2"], point["perplexity"]] for point in record["points"]]
    assert lines == [expected]  # One model by its name, twice.
    stars = [line for line in figure.axes[0].lines if line.get_label() == "real text"]
    assert stars[0].get_xdata() == [record["real"]["distinct_2"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--guidance", "1,x"], "'x', expected a number"),
        (["--guidance", "1,nan"], "guidance=nan"),
        (["--samples", "0"], "samples=0"),
        (["--reference", ""], "'': no such file or directory"),
        (["--judge", "nowhere"], "nowhere"),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "real.jsonl").write_text(json.dumps({"text": TEXTS[0].text}) + "\n")
    judge = str(Path(colada.__file__).parent / "bundled")
    with pytest.raises((ColadaError, typer.BadParameter), match=words):
        app(
            ["eval", "generative", str(tmp_path / "real.jsonl"), "--judge", judge, *arguments],
            standalone_mode=False,
        )


def test_a_model_without_guidance_is_one_point_beside_the_lines(tmp_path: Path, model: ColaDLM) -> None:
    tokenizer = tokenizer_of(model)
    shape = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24}
    decoder = Decoder(DecoderConfig(objective="ar", vocab_size=tokenizer.vocab_size, **shape))
    decoder.init_weights()
    MODELS["ar"](decoder, tokenizer).save(tmp_path / "ar")
    (tmp_path / "real.jsonl").write_text(json.dumps({"text": TEXTS[0].text}) + "\n")
    bundled = str(Path(colada.__file__).parent / "bundled")
    lengths = ["--prompt-tokens", "4", "--new-tokens", "4", "-q", "--out", str(tmp_path / "out.json")]
    where = [str(tmp_path / "real.jsonl"), "--judge", str(tmp_path / "ar"), "--guidance", "1,2"]
    models = ["--model", bundled, "--model", str(tmp_path / "ar")]
    result = CliRunner().invoke(app, ["eval", "generative", *where, *models, *lengths])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["kind"] == "exact"
    assert [point["settings"].get("guidance") for point in record["points"]] == [1.0, 2.0, None]
    alone = CliRunner().invoke(app, ["eval", "generative", *where, "--model", str(tmp_path / "ar"), *lengths])
    assert "AR has no guidance" in str(alone.exception)
