"""Faults of evaluating and of studies, by kind: what is wrong is one line, and nothing is lost or hidden."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import colada
from colada.checks import MOST_CHARACTERS
from colada.errors import ColadaError
from colada.evaluate.data import Benchmark, load_benchmark
from colada.evaluate.run import EvaluationRank, evaluate, fingerprint
from colada.evaluate.tasks import TASKS, find_task
from colada.evaluate.texts import read_texts
from colada.generate.settings import TextRequest
from colada.locate import BUNDLED
from colada.models import cola_likelihood as likelihood_room
from colada.models.base import LanguageModel
from colada.models.likelihood import measure
from colada.models.load import MODELS
from colada.networks import layers
from colada.networks.config import DecoderConfig
from colada.networks.decoder import Decoder
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Chunk, Completion
from commands import main
from experiments.scaling.cells import Counts, clustered
from experiments.scaling.summary import verdict
from helpers import tiny_model

# --- one batch loop ------------------------------------------------------------------------------

PROMPTS = [[], [7, 3, 9], [4] * 17, [23, 42, 1, 2, 3, 4, 5, 6, 7], [11, 12]]
LENGTHS = [9, 3, 14, 1, 6]


def models() -> dict[str, LanguageModel]:
    config = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 40, "vocab_size": 50, "block_size": 4}
    decoders = {
        arch: MODELS[arch](_decoder(DecoderConfig(objective=arch, **config)))  # type: ignore[arg-type]
        for arch in ("ar", "llada")
    }
    return {"cola": tiny_model(), **decoders}


def _decoder(config: DecoderConfig) -> Decoder:
    decoder = Decoder(config)
    decoder.init_weights()
    return decoder


@pytest.mark.parametrize("arch", ["cola", "ar", "llada"])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_texts_that_take_turns_are_those_written_alone(arch: str, batch: int) -> None:
    model = models()[arch]
    requests = [
        TextRequest(prompt, length, {"seed": 5 + number, "temperature": 1.0, "end_ids": ()})
        for number, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]
    found = model.generate(requests, batch=batch)
    assert len(found) == len(PROMPTS)
    for number, (prompt, length, settings) in enumerate(requests):
        (alone,) = model.generate([prompt], length, **settings)
        assert found[number] == alone


def test_a_text_joins_as_soon_as_another_leaves() -> None:
    """Two short texts are finished, one after the other, beside one long text."""
    requests = [TextRequest([], length, {"steps": 1}) for length in (24, 4, 4, 4)]
    chunks = tiny_model().stream(requests, batch=2)
    order = [chunk.index for chunk in chunks if chunk.completion is not None]
    assert order == [1, 2, 3, 0]


@pytest.mark.parametrize("batch", [0, -1, True, 1.5])
def test_a_batch_of_nothing_is_refused(batch: int) -> None:
    for model in models().values():
        with pytest.raises(ColadaError, match="batch="):
            model.generate([TextRequest([1], 1, {})], batch=batch)


def test_one_bad_request_is_found_before_anything_is_written() -> None:
    for model in models().values():
        with pytest.raises(ColadaError, match="prompt id 99"):
            model.stream([TextRequest([1], 4, {}), TextRequest([99], 4, {})], batch=1)


# --- long texts ----------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor) and not part.is_mkldnn:
                # What is expanded takes no memory.
                own = part.untyped_storage().nbytes() // max(1, part.element_size())
                self.numbers = max(self.numbers, own)
        return out


def largest(model: LanguageModel, tokens: int) -> int:
    text = [1 + number % 40 for number in range(tokens)]
    with LargestTensor() as counted:
        measure(model, [text], steps=1, samples=1)
    return counted.numbers


@pytest.mark.parametrize("arch", ["cola", "ar"])
def test_memory_of_a_likelihood_is_linear_in_the_length(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood_room, "EXACT_NUMBERS", 0)
    monkeypatch.setattr(likelihood_room, "GROUP_LATENTS", 64)
    model = models()[arch]
    short, long = largest(model, 768), largest(model, 1536)
    assert long <= 2.1 * short
    assert long < 1536**2 / 4


def test_a_text_that_no_memory_holds_is_refused_before_it_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("colada.device.memory_of", lambda device: 2**20)
    with pytest.raises(ColadaError, match=r"a text of 4,000 tokens takes 0\.0 GiB .* 50% of the 0\.0 that"):
        measure(tiny_model(), [[1], [2] * 4000])


def test_groups_of_blocks_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text and probes, in groups of one block, of two, and in one."""
    model, text = tiny_model(), [1 + number % 40 for number in range(30)]
    found = []
    for latents in (4, 8, 128):
        monkeypatch.setattr(likelihood_room, "GROUP_LATENTS", latents)
        found.append(measure(model, [text], [[3] * 9], steps=2)[0])
    for other in found[1:]:
        assert other.log_likelihood == pytest.approx(found[0].log_likelihood, rel=1e-5)
        assert other.parts["reconstruction"] == pytest.approx(found[0].parts["reconstruction"], rel=1e-5)


def test_no_compiled_kernel_is_used_so_that_several_samples_may_follow_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A compiled kernel gives its buffers away in the first backward pass, and an exact trace has many."""

    def compiled(*arguments: object, **options: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(layers, "_flex", compiled)
    model = tiny_model()
    one, several = (measure(model, [[1, 2, 3]], samples=samples, steps=1) for samples in (1, 3))
    assert one[0].tokens == several[0].tokens == 3


def _append(said: list[tuple[int, int]], done: int, total: int) -> None:
    said.append((done, total))


def test_progress_rises_to_all_tokens() -> None:
    for arch, model in models().items():
        said: list[tuple[int, int]] = []
        measure(model, [[1] * 40, [2] * 9, [3] * 9], steps=2, progress=partial(_append, said))
        assert said == sorted(said), arch
        assert said[-1] == (58, 58)
        assert all(total == 58 for _, total in said)
        assert arch != "cola" or len(said) > 10


# --- two at one directory ------------------------------------------------------------------------


class Reader:
    """Writes an answer, and while it is asked does something else."""

    tokenizer: Tokenizer | None = Tokenizer.from_file(BUNDLED / "tokenizer.json")
    origin, device = "reader", torch.device("cpu")

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.generation: dict[str, Any] = {}
        self.meanwhile = meanwhile

    def stream(self, prompts: Sequence[TextRequest], *, batch: int) -> Iterator[Chunk]:
        self.meanwhile()
        for number, request in enumerate(prompts):
            seed = request.settings["seed"]
            assert isinstance(seed, int)
            done = Completion(" red", (1,), "length", seed)
            yield Chunk(number, 0, None, " red", (1,), "length", None, done)


@pytest.fixture
def colours(tmp_path: Path) -> Benchmark:
    path = tmp_path / "colours.jsonl"
    write_lines(path, *({**RECORD, "id": number} for number in range(6)))
    return load_benchmark(TASKS["obqa"], path)


RECORD = {"context": "", "question": "Which?", "choices": list("abcd"), "answer": "a", "answer_index": 0}


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (EvaluationRank(), EvaluationRank()),
        (EvaluationRank(0, 2), EvaluationRank(0, 2)),
        (EvaluationRank(0, 2), EvaluationRank()),
        (EvaluationRank(), EvaluationRank(1, 2)),
        (EvaluationRank(0, 2), EvaluationRank(2, 3)),
    ],
)
def test_a_second_run_in_a_directory_is_refused_and_the_first_is_whole(
    tmp_path: Path, colours: Benchmark, first: EvaluationRank, second: EvaluationRank
) -> None:
    out, refused = tmp_path / "out", []

    def also() -> None:
        with pytest.raises(ColadaError, match="is at work there: wait for it") as error:
            evaluate(Reader(), [colours], out, part=second)
        refused.append(error)

    evaluate(Reader(also), [colours], out, part=first)
    assert len(refused) == 1
    rank = f".rank{first.rank}of{first.world}" if first.world > 1 else ""
    lines = (out / f"obqa{rank}.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 6 // first.world
    # The next one goes on.
    assert evaluate(Reader(), [colours], out) is not None
    assert not list(out.glob(".rank*"))


@pytest.mark.parametrize("name", ["obqa.jsonl", "obqa.settings.json"])
@pytest.mark.parametrize("content", ["a named pipe", "[" * 100_000, "[]", "9" * 5000, "5"])
def test_b2_b4_what_no_run_has_left_in_its_directory_is_one_line(
    tmp_path: Path, colours: Benchmark, name: str, content: str
) -> None:
    if content == "a named pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text(content + "\n")
    with pytest.raises(ColadaError, match=name):
        evaluate(Reader(), [colours], tmp_path)


NOTHING: list[Any] = [5, "x", [5], {}, 1.5, 10**400]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", [None, *NOTHING]),
        ("benchmarks", [None, *NOTHING]),
        ("out", [None, 5, "\0", [5]]),
        ("seed", [None, -1, 1.5, "1", [1], True, 2**63]),
        ("max_new_tokens", [None, 0, 1.5, "1", 10**12]),
        ("batch", [None, 0, 1.5, "1", 10**12]),
        ("part", NOTHING),
        ("steps", [0, "1", 10**12]),
    ],
)
def test_b5_an_evaluation_of_nothing_is_refused_in_one_line(
    tmp_path: Path, colours: Benchmark, name: str, values: list[Any]
) -> None:
    good: dict[str, Any] = {"model": Reader(), "benchmarks": [colours], "out": tmp_path / "out"}
    for value in values:
        with pytest.raises(ColadaError):
            evaluate(**{**good, name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("task", [None, 5, [5], {}, {1}, "obq"]),
        ("data", [None, 5, b"x", "\0", [5], torch.ones(2)]),
        ("shots", [-1, 1.5, "1", [1], True, 99, torch.ones(2)]),
        ("limit", [0, -1, 1.5, "1", [1], True]),
        ("seed", [None, -1, 1.5, "1", [1], True]),
        ("order", [None, "fil", 5, [1], {}, torch.ones(2)]),
        ("part", [(None, 1), (0, None), (0.5, 1), (True, 2), ("0", "1"), (1, 1)]),
    ],
)
def test_b5_benchmarks_asked_for_wrongly_are_refused_in_one_line(
    tmp_path: Path, name: str, values: list[Any]
) -> None:
    path = write_lines(tmp_path / "colours.jsonl", {"id": 1, **RECORD})
    asks: dict[str, Callable[[Any], object]] = {
        "task": find_task,
        "part": lambda value: EvaluationRank(*value),
    }
    other = lambda value: load_benchmark(TASKS["obqa"], **{"data": path, name: value})  # noqa: E731
    for value in values:
        with pytest.raises(ColadaError):
            asks.get(name, other)(value)


def test_other_ranks_of_the_same_run_are_let_in(tmp_path: Path, colours: Benchmark) -> None:
    out = tmp_path / "out"
    other = partial(evaluate, Reader(), [colours], out, part=EvaluationRank(1, 2))
    assert evaluate(Reader(other), [colours], out, part=EvaluationRank(0, 2)) is not None


def test_an_item_that_fails_is_named_and_the_others_are_kept(tmp_path: Path, colours: Benchmark) -> None:
    class Failing(Reader):
        def stream(self, prompts: Sequence[TextRequest], *, batch: int) -> Iterator[Chunk]:
            for chunk in super().stream(prompts, batch=batch):
                assert chunk.completion is not None
                failed = replace(chunk.completion, error="not finite")
                yield replace(chunk, completion=failed) if chunk.index == 2 else chunk

    out = tmp_path / "out"
    with pytest.raises(ColadaError, match="1 of 6 items of obqa failed, first '2': not finite"):
        evaluate(Failing(), [colours], out)
    assert len((out / "obqa.jsonl").read_text().splitlines()) == 5
    assert evaluate(Reader(), [colours], out) is not None


# --- quantised models ----------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings(
    "ignore:a prompt of"
)  # With its demonstrations, longer than the rows it was trained on.
def test_a_quantised_model_is_evaluated_and_is_another_one(tmp_path: Path, colours: Benchmark) -> None:
    exact, rounded, again = (colada.load() for _ in range(3))
    for model in (rounded, again):
        model.quantise("int8")  # type: ignore[attr-defined]
    assert fingerprint(rounded) == fingerprint(again) != fingerprint(exact)
    settings = {"steps": 1, "max_new_tokens": 1}
    results = evaluate(rounded, [colours], tmp_path / "out", **settings)
    assert results is not None
    assert results.record["settings"]["quantised"] == "int8"
    with pytest.raises(ColadaError, match="weights="):
        evaluate(exact, [colours], tmp_path / "out", **settings)


# --- above chance --------------------------------------------------------------------------------


def simulated(seed: int, items: int, models: int, agreement: float) -> Counts:
    """Models without any skill on the same items of four options; on some items all of them do alike."""
    draw = random.Random(seed)
    by_item = {}
    for item in range(items):
        if draw.random() < agreement:
            right = models * (draw.random() < 0.25)
        else:
            right = sum(draw.random() < 0.25 for _ in range(models))
        by_item[str(item)] = (models, right, models, right)
    return Counts(by_item)


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("models", [2, 3, 8])
def test_a_model_without_skill_is_rarely_called_above_or_below_chance(agreement: float, models: int) -> None:
    """5% is claimed. Counted as independent, seeds that agree were so at 11 to 19%."""
    trials = 1500
    found = [simulated(seed, 100, models, agreement) for seed in range(trials)]
    false = sum(verdict(own.score, 0.25) != "at" for own in found)
    # Three standard errors of a share of 5% over what is claimed, and one point for discreteness.
    assert false / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    if agreement == 1:
        pooled = sum(verdict((own.share * own.items, own.items), 0.25) != "at" for own in found)
        assert pooled / trials > 0.1


def test_independent_answers_count_as_such_and_agreeing_ones_once() -> None:
    items = 4000
    independent = simulated(0, items, 3, 0.0).score[1]
    assert 0.9 * 3 * items < independent <= 3 * items
    agreeing = simulated(0, items, 3, 1.0)
    assert agreeing.score[1] == pytest.approx(items, rel=0.01)
    assert agreeing.score[0] / agreeing.score[1] == pytest.approx(agreeing.share)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], (0, 0)),
        ([(0, 0), (0, 0)], (0, 0)),
        ([(1, 1), (0, 1), (0, 1)], (1, 3)),  # One answer each: nothing to correct.
        ([(0, 3), (0, 3)], (0, 2)),  # No variance to see: as if all agreed.
        ([(3, 3), (3, 3)], (2, 2)),
        ([(2, 3)], (2 / 3, 1)),
    ],
)
def test_clusters_by_hand(parts: list[tuple[int, int]], expected: tuple[float, float]) -> None:
    assert clustered(parts) == pytest.approx(expected)


@pytest.mark.parametrize("counts", [(2, 3, 0, 0), (2, 0, 1, 2), (2, 0, 3, 0), (0, 0, 0, 0), (2, -1, 0, 0)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="impossible counts of item 'a'"):
        Counts({"a": counts})


# --- what is left out is said --------------------------------------------------------------------


def test_texts_that_are_left_out_are_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in ("one", " ", "\n", "two", "")))
    said: list[str] = []
    assert [text.text for text in read_texts([path], say=said.append)] == ["one", "two"]
    assert said == ["left out: 3 texts of nothing but white space"]
    said.clear()
    assert len(read_texts([path], limit=1, say=said.append)) == 1
    assert said == []


def test_a_text_longer_than_a_prompt_may_be_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "x"}, {"text": "x" * (MOST_CHARACTERS + 1)})
    with pytest.raises(ColadaError, match=rf"a\.jsonl:2: a text of {MOST_CHARACTERS + 1} characters"):
        read_texts([path])


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command in a directory with one good file of each kind; returns its one line."""
    monkeypatch.chdir(tmp_path)
    Path("ok.txt").write_text("The dog ran home. He was happy to be there.")
    Path("data").mkdir()
    write_lines(Path("data/obqa.test.jsonl"), {"id": "1", **RECORD})
    Path("nothing").mkdir()
    Path("empty.jsonl").touch()
    Path("bytes.txt").write_bytes(b"\xff\xfe\n")
    write_lines(Path("number.jsonl"), {"text": 5})
    write_lines(Path("list.jsonl"), [1])
    Path("digits.jsonl").write_text('{"text": ' + "9" * 5000 + "}\n")
    os.mkfifo("fifo.jsonl")
    Path("recipe.yaml").write_text("data: {sources: [{path: no/where}]}\n")

    def run(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


FILES = ("empty.jsonl", "bytes.txt", "number.jsonl", "list.jsonl", "digits.jsonl", "fifo.jsonl", "no/where")


@pytest.mark.parametrize("file", [*FILES, "nothing", "/dev/zero"])
@pytest.mark.parametrize(
    "command",
    [
        ("eval", "likelihood", "FILE"),
        ("eval", "generative", "FILE", "--judge", "no/judge"),
        ("eval", "score", "FILE", "--task", "obqa"),
        ("eval", "run", "--data", "FILE", "--out", "out", "--tasks", "obqa"),
        ("eval", "run", "--prompts", "FILE", "--out", "out", "--tasks", "obqa"),
        ("study", "figure", "FILE"),
        ("study", "run", "FILE", "--benchmarks", "data"),
        ("study", "data", "--benchmarks", "FILE", "--out", "out"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    run: Callable[..., str], command: tuple[str, ...], file: str
) -> None:
    line = run(*(file if part == "FILE" else part for part in command))
    assert "FILE" not in line
    assert not Path("out").exists()


LIKELIHOOD = ("eval", "likelihood", "ok.txt")
RUN = ("eval", "run", "--data", "data", "--tasks", "obqa", "--out", "out")
GENERATIVE = ("eval", "generative", "ok.txt", "--judge", "no/where")
STUDY = ("study", "run", "recipe.yaml", "--benchmarks", "data", "--tasks", "obqa")
HUGE = "1" + "0" * 23
COUNTS = ("0", "-1", HUGE, "x")


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        *(
            (LIKELIHOOD, name, ("0", "-1", HUGE, "x"))
            for name in ("--limit", "--samples", "--steps", "--batch")
        ),
        (LIKELIHOOD, "--at", ("0", "1", "nan", "1e-300", "-1", "1e400")),
        (LIKELIHOOD, "--seed", ("-1", HUGE, "x")),
        (LIKELIHOOD, "--device", ("nonsense", "cuda:x")),
        (LIKELIHOOD, "--dtype", ("int8",)),
        *(
            (RUN, name, ("0", "-1", HUGE, "x"))
            for name in ("--limit", "--max-new-tokens", "--steps", "--batch")
        ),
        (RUN, "--shots", ("-1", HUGE)),
        (RUN, "--seed", ("-1", HUGE)),
        (RUN, "--guidance", ("nan", "inf", "1e400")),
        (RUN, "--quantise", ("int3",)),
        (RUN, "--tasks", ("nonsense", "", "obqa,obqa")),
        *((GENERATIVE, f"--judge-{name}", ("0", "-1", HUGE)) for name in ("samples", "steps", "at")),
        *(
            (GENERATIVE, name, ("-1", HUGE))
            for name in ("--prompt-tokens", "--new-tokens", "--limit", "--batch")
        ),
        (GENERATIVE, "--temperature", ("-1", "nan", "1e-46")),
        (GENERATIVE, "--judge", ("data", "/no/where")),
        *(
            (STUDY, name, ("0", "-1", HUGE))
            for name in ("--seeds", "--limit", "--max-new-tokens", "--threads")
        ),
        (STUDY, "--shots", ("-1", HUGE)),
        (STUDY, "--archs", ("gpt", "", "ar,ar")),
    ],
)
def test_a_value_out_of_bounds_is_refused_before_anything_is_loaded(
    run: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    option: str,
    values: tuple[str, ...],
) -> None:
    def loading(*arguments: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("colada.cli.evaluate.load_model", loading)
    for value in values:
        assert run(*command, option, value)
        assert not Path("out").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        *(({"WORLD_SIZE": size}, "WORLD_SIZE") for size in ("x", "", "0", "-1", "2.0", "9" * 30)),
        *(({"WORLD_SIZE": "2", "RANK": rank}, "RANK") for rank in ("2", "-1", "x", "")),
        ({"RANK": "1"}, "RANK"),
        ({"WORLD_SIZE": "2"}, "RANK"),
    ],
)
def test_b7_an_environment_that_makes_no_ranks_is_one_line(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], named: str
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    assert f"the environment has {named}=" in run(*RUN)
    assert not Path("out").exists()


def test_a_study_without_its_corpora_is_refused_at_once(run: Callable[..., str]) -> None:
    assert "no/where" in run(*STUDY)
    assert not Path("runs").exists()


def test_a_study_without_what_draws_it_is_refused_before_it_trains(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "a study's figure needs matplotlib" in run(*STUDY)


@pytest.mark.parametrize("out", [".", "ok.txt/x.json"])
def test_results_that_cannot_be_written_are_one_line(run: Callable[..., str], out: str) -> None:
    assert out.split("/")[0] in run(*LIKELIHOOD, "--steps", 1, "--out", out, "--quiet")


def test_a_bound_that_is_no_number_is_an_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.dit.txt_out.proj.weight[0, 0] = math.nan
    with pytest.raises(ColadaError, match="not finite"):
        measure(model, [[1, 2, 3]], steps=1)
