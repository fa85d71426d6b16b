import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import typer
from rich.console import Console
from torch import nn

import colada
from colada.cli.evaluate import eval_app
from colada.errors import ColadaError
from colada.evaluate.data import Benchmark, load_benchmark, load_prompts
from colada.evaluate.outputs import read_outputs
from colada.evaluate.run import RESULTS_FILE, EvaluationRank, Results, evaluate, fingerprint, item_seed
from colada.evaluate.statistics import average, score, wilson
from colada.evaluate.tasks import TASKS, Item
from colada.generate.settings import TextRequest
from colada.locate import BUNDLED
from colada.models.cola import ColaDLM
from colada.report.evaluation import draw_naming, draw_scores, write_page
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Chunk, Completion
from colada.train.display import Display
from helpers import tiny_model

CHOICES = ["red", "green", "blue", "grey"]


class Parrot:
    """Names an option, or none, as prompt and seed say; counts what it is asked; may stop in between."""

    tokenizer: Tokenizer | None = Tokenizer.from_file(BUNDLED / "tokenizer.json")
    origin, device = "parrot", torch.device("cpu")

    def __init__(self, fails_after: int | None = None) -> None:
        self.generation: dict[str, Any] = {"steps": 4}
        self.network = nn.Linear(2, 2)
        nn.init.ones_(self.network.weight)
        nn.init.zeros_(self.network.bias)
        self.asked: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.fails_after = fails_after

    def stream(self, prompts: Sequence[TextRequest], *, batch: int) -> Iterator[Chunk]:
        """Of as many as are under way, the last one is finished first."""
        for start in range(0, len(prompts), batch):
            if self.fails_after is not None and start >= self.fails_after * batch:
                raise KeyboardInterrupt
            for number in reversed(range(start, min(len(prompts), start + batch))):
                prompt, length, settings = prompts[number]
                assert isinstance(prompt, str)
                assert isinstance(settings["seed"], int)
                self.calls.append({"max_new_tokens": length, **settings})
                self.asked.append(prompt)
                text = self.write(prompt, settings["seed"])
                done = Completion(text, (1, 2), "length", settings["seed"])
                yield Chunk(number, 0, None, text, (1, 2), "length", None, done)

    def write(self, prompt: str, seed: int) -> str:
        pick = hashlib.md5(f"{seed}{prompt}".encode()).digest()[0] % 5
        return f" {[*CHOICES, 'no colour'][pick]}\nQuestion: more"


def write_records(path: Path, count: int = 10, **change: Any) -> Path:
    rows = (
        {
            "id": str(n),
            "context": "",
            "question": f"Which colour has number {n}?",
            "choices": CHOICES,
            "answer": CHOICES[n % 4],
            "answer_index": n % 4,
            **change,
        }
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def colours(tmp_path: Path) -> Benchmark:
    return load_benchmark(TASKS["obqa"], write_records(tmp_path / "colours.jsonl"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without(path: Path, *names: str) -> dict[str, Any]:
    """A result file without what may differ between equal runs."""
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in names:
        del found["settings"][name]
    return found


def spoken() -> tuple[Display, Callable[[], str]]:
    stream = io.StringIO()
    return Display(Console(file=stream, width=200)), stream.getvalue


# --- what a run writes ----------------------------------------------------------------------------------


def test_outputs_have_the_released_fields_and_the_result_file_says_how(
    tmp_path: Path, colours: Benchmark
) -> None:
    model = Parrot()
    results = evaluate(model, [colours], tmp_path / "out", seed=3, batch=4, guidance=2.0)
    assert results is not None
    rows = lines(tmp_path / "out/obqa.jsonl")
    assert [row["id"] for row in rows] == [str(n) for n in range(10)]
    for row, item in zip(rows, colours.items, strict=True):
        assert row["few_shot_prefix"] + row["prompt"] in model.asked
        assert row["seed"] == item_seed(3, TASKS["obqa"], item)
        assert (row["others"], row["task"], row["tokens"]) == ("Question: more", "obqa", [1, 2])
        assert row["generate"] == model.write(item.prefix + item.prompt, row["seed"]).split("\n")[0]
        assert (row["ground_truth"], row["choices"], row["finish_reason"]) == (item.answer, CHOICES, "length")
    assert len(model.calls) == 10
    assert all(call["max_new_tokens"] == 32 and call["temperature"] == 0 for call in model.calls)
    assert all((call["guidance"], call["steps"]) == (2.0, 4) for call in model.calls)
    right = sum(row["generate"].strip() == row["ground_truth"] for row in rows)
    assert 0 < right < 10
    found = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
    assert found == results.record
    assert found["tasks"]["obqa"]["score"] == found["average"] == 10 * right
    assert (
        found["settings"] | {"guidance": 2.0, "steps": 4, "seed": 3, "temperature": 0.0} == found["settings"]
    )
    assert found["data"]["obqa"]["fingerprint"] == colours.fingerprint
    assert found["made_with"]["colada"] == colada.__version__
    # What was written is scored alike later.
    again = score(TASKS["obqa"], read_outputs(tmp_path / "out/obqa.jsonl", TASKS["obqa"]))
    assert again == results.scores[0]


def test_seeds_are_the_items_own() -> None:
    item, other = (Item(str(n), "", "?", "x", ()) for n in (1, 2))
    task = TASKS["obqa"]
    seeds = {
        item_seed(seed, own, one) for seed, own, one in product((0, 1), (task, TASKS["mmlu"]), (item, other))
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**32 for seed in seeds)
    # The same situation, with and without its context.
    assert item_seed(0, TASKS["siqa"], item) == item_seed(0, TASKS["siqa-released"], item)


# --- resuming -------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, colours: Benchmark) -> None:
    whole = evaluate(Parrot(), [colours], tmp_path / "whole", batch=3)
    stopped = Parrot(fails_after=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, [colours], tmp_path / "out", batch=3)
    assert len(lines(tmp_path / "out/obqa.jsonl")) == 6
    rest = Parrot()
    assert evaluate(rest, [colours], tmp_path / "out", batch=3) is not None
    assert len(rest.asked) == 4
    assert not set(rest.asked) & set(stopped.asked)
    assert same_files(tmp_path / "whole", tmp_path / "out")
    # Nothing is left to do.
    idle = Parrot()
    again = evaluate(idle, [colours], tmp_path / "out", batch=3)
    assert whole is not None
    assert again is not None
    assert idle.asked == []
    assert again.outputs == whole.outputs


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    outputs = [name for name in names if name != RESULTS_FILE]
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in outputs)


def test_a_half_written_line_is_generated_again_at_any_cut(tmp_path: Path, colours: Benchmark) -> None:
    evaluate(Parrot(), [colours], tmp_path / "whole")
    content = (tmp_path / "whole/obqa.jsonl").read_bytes()
    ends = [n + 1 for n, byte in enumerate(content) if byte == ord("\n")]
    for cut in (0, 5, ends[3] - 1, ends[3], ends[3] + 1, ends[7] + 40, len(content) - 1):
        out = tmp_path / f"cut{cut}"
        out.mkdir()
        (out / "obqa.settings.json").write_bytes((tmp_path / "whole/obqa.settings.json").read_bytes())
        (out / "obqa.jsonl").write_bytes(content[:cut])
        model, (display, said) = Parrot(), spoken()
        assert evaluate(model, [colours], out, display=display) is not None
        done = sum(end <= cut for end in ends)
        assert len(model.asked) == 10 - done
        assert ("the last line was half-written" in said()) == (cut not in (0, *ends))
        assert same_files(tmp_path / "whole", out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, r"seed=1, begun with 0"),
        ({"steps": 9}, r"steps=9, begun with 4"),
        ({"max_new_tokens": 8}, r"max_new_tokens=8, begun with 32"),
        ({"guidance": 3.0, "steps": 9}, r"steps=9, begun with 4; guidance=3.0, begun with None"),
    ],
)
def test_other_settings_than_the_begun_runs_are_refused(
    tmp_path: Path, colours: Benchmark, change: dict[str, Any], said: str
) -> None:
    evaluate(Parrot(), [colours], tmp_path / "out")
    before = (tmp_path / "out/obqa.jsonl").read_bytes()
    model = Parrot()
    with pytest.raises(ColadaError, match=rf"obqa\.settings\.json: {said}: keep the settings"):
        evaluate(model, [colours], tmp_path / "out", **change)
    assert model.calls == []
    assert (tmp_path / "out/obqa.jsonl").read_bytes() == before


def test_another_model_or_other_data_are_refused(tmp_path: Path, colours: Benchmark) -> None:
    evaluate(Parrot(), [colours], tmp_path / "out")
    trained = Parrot()
    with torch.no_grad():
        trained.network.bias[1] += 1e-3
    with pytest.raises(ColadaError, match="weights="):
        evaluate(trained, [colours], tmp_path / "out")
    more = load_benchmark(TASKS["obqa"], write_records(tmp_path / "more.jsonl", 11))
    with pytest.raises(ColadaError, match="data="):
        evaluate(Parrot(), [more], tmp_path / "out")
    shown = load_benchmark(TASKS["obqa"], tmp_path / "colours.jsonl", shots=1)
    with pytest.raises(ColadaError, match="shots=1, begun with 2"):
        evaluate(Parrot(), [shown], tmp_path / "out")


def test_a_limit_and_the_tasks_may_grow_but_not_shrink(tmp_path: Path, colours: Benchmark) -> None:
    path = tmp_path / "colours.jsonl"
    out = tmp_path / "out"
    few = load_benchmark(TASKS["obqa"], path, limit=4)
    evaluate(Parrot(), [few], out)
    hellaswag = load_benchmark(
        TASKS["hellaswag"], write_records(tmp_path / "h.jsonl", 3, context="He paints it")
    )
    model = Parrot()
    results = evaluate(model, [colours, hellaswag], out)
    assert results is not None
    assert len(model.asked) == 6 + 3
    assert [len(some) for some in results.outputs.values()] == [10, 3]
    assert results.record["average"] == pytest.approx(100 * average(results.scores)[0])
    with pytest.raises(ColadaError, match=r"item '4' is none of this run's 4 .*give the limit"):
        evaluate(Parrot(), [few], out)


def test_outputs_of_other_prompts_are_refused(tmp_path: Path, colours: Benchmark) -> None:
    evaluate(Parrot(), [colours], tmp_path / "out")
    file = tmp_path / "out/obqa.jsonl"
    text = file.read_text(encoding="utf-8")
    file.write_text(
        text.replace("Which colour has number 2?", "Which colour has number 3?"), encoding="utf-8"
    )
    with pytest.raises(ColadaError, match="item '2' has another prompt or seed"):
        evaluate(Parrot(), [colours], tmp_path / "out")
    file.write_text(text.replace('"task": "obqa"', '"task": "mmlu"'), encoding="utf-8")
    with pytest.raises(ColadaError, match=r"obqa\.jsonl:1: an output of task 'mmlu', expected 'obqa'"):
        evaluate(Parrot(), [colours], tmp_path / "out")


# --- ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_share_the_items_and_the_last_joins_them(
    tmp_path: Path, colours: Benchmark, order: tuple[int, ...]
) -> None:
    evaluate(Parrot(), [colours], tmp_path / "one")
    asked: list[str] = []
    for turn, rank in enumerate(order):
        model = Parrot()
        results = evaluate(model, [colours], tmp_path / "three", part=EvaluationRank(rank, 3), batch=2)
        assert (results is not None) == (turn == 2)
        expected = [item.prefix + item.prompt for item in colours.items[rank::3]]
        assert sorted(model.asked) == sorted(expected)
        asked += model.asked
    assert len(set(asked)) == len(asked) == 10
    assert same_files(tmp_path / "one", tmp_path / "three")
    first, second = (without(tmp_path / name / RESULTS_FILE, "batch", "ranks") for name in ("one", "three"))
    assert first == second


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, colours: Benchmark) -> None:
    evaluate(Parrot(), [colours], tmp_path / "one")
    out = tmp_path / "out"
    for rank in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            evaluate(Parrot(fails_after=1), [colours], out, part=EvaluationRank(rank, 2), batch=2)
    # The second was stopped within a line.
    half = out / "obqa.rank1of2.jsonl"
    half.write_bytes(half.read_bytes()[:-7])
    model = Parrot()
    assert evaluate(model, [colours], out) is not None
    assert len(model.asked) == 10 - 2 - 1
    assert same_files(tmp_path / "one", out)


def test_a_rank_outside_the_world() -> None:
    with pytest.raises(ColadaError, match="rank 2 of 2, expected 0 to 1"):
        EvaluationRank(2, 2)


@pytest.mark.slow
def test_any_grouping_of_the_bundled_models_items_gives_the_same_outputs(tmp_path: Path) -> None:
    """Batch 1, batch 8, and two processes in batches of 3."""
    tasks = [
        load_benchmark(TASKS["obqa"], write_records(tmp_path / "obqa.jsonl", 5), shots=0),
        load_benchmark(TASKS["lambada"], write_records(tmp_path / "lambada.jsonl", 3, choices=None)),
    ]
    model = colada.load()
    settings = {"steps": 2, "max_new_tokens": 12}
    for name, batch in (("one", 1), ("eight", 8)):
        assert evaluate(model, tasks, tmp_path / name, batch=batch, **settings) is not None
    program = "import sys; from colada.cli.evaluate import eval_app; eval_app(sys.argv[1:])"
    arguments = ["run", "--data", str(tmp_path), "--shots", "0", "--tasks", "obqa,lambada", "--world", "2"]
    arguments += ["--steps", "2", "-n", "12", "--batch", "3", "--quiet", "--out", str(tmp_path / "ranks")]
    other = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--rank", "1"], stdout=subprocess.DEVNULL
    )
    command(*arguments, "--rank", "0")
    assert other.wait(timeout=120) == 0
    for task in ("obqa", "lambada"):
        written = {(tmp_path / name / f"{task}.jsonl").read_bytes() for name in ("one", "eight", "ranks")}
        assert len(written) == 1
    rows = lines(tmp_path / "one/obqa.jsonl")
    assert len({row["generate"] for row in rows}) > 1
    assert all(len(row["tokens"]) <= 12 for row in rows)


# --- models that do not fit -----------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, colours: Benchmark) -> None:
    with pytest.raises(ColadaError, match=r"has no tokenizer\.json, and the benchmarks are text"):
        evaluate(tiny_model(), [colours], tmp_path / "out")


def test_a_tokenizer_that_cannot_spell_the_task_is_refused(tmp_path: Path, colours: Benchmark) -> None:
    # It knows the words of the demonstrations only, not those of the question.
    words = sorted({word for item in colours.items for word in item.prefix.split()})
    known = {word: n for n, word in enumerate([*words, "[UNK]", "<|endoftext|>", "<|pad|>"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = Parrot()
    model.tokenizer = Tokenizer(inner)
    with pytest.raises(ColadaError, match=r"parrot: its tokenizer does not fit obqa: of item '0' it makes"):
        evaluate(model, [colours], tmp_path / "out")
    assert model.calls == []


# --- the command line -----------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    return typer.main.get_command(eval_app).main(list(arguments), standalone_mode=False) or 0


def test_run_and_score_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path / "obqa.test.jsonl", 3)
    out = tmp_path / "out"
    run = ["run", "--data", str(tmp_path), "--tasks", "obqa", "--limit", "2", "--shots", "1"]
    command(*run, "--steps", "1", "-n", "4", "--guidance", "1", "--out", str(out))
    printed = capsys.readouterr().out
    assert "OBQA" in printed
    found = json.loads((out / RESULTS_FILE).read_text())
    assert found["tasks"]["obqa"]["items"] == 2
    assert (
        found["data"]["obqa"] | {"shots": 1, "rows": 3, "items": 2, "order": "file"} == found["data"]["obqa"]
    )
    own = colada.load().generation
    assert found["settings"] | {**own, "steps": 1, "guidance": 1.0, "temperature": 0.0} == found["settings"]
    assert (out / "report.html").is_file()
    command("score", str(out), "--json", "--html", str(tmp_path / "page.html"))
    again = json.loads(capsys.readouterr().out)
    assert again["tasks"] == found["tasks"]
    assert (tmp_path / "page.html").is_file()
    (out / "obqa.jsonl").rename(out / "mine.jsonl")
    command("score", str(out / "mine.jsonl"), "--task", "obqa")
    assert "OBQA" in capsys.readouterr().out


def test_a_run_on_given_prompts(tmp_path: Path) -> None:
    released = {
        "id": 5,
        "prompt": "x\n(A) red\n(B) green\n(C) blue\n(D) grey\nAnswer:",
        "few_shot_prefix": "Question: y\nAnswer: z\n\nQuestion: ",
        "ground_truth": "red",
        "choices": CHOICES,
    }
    (tmp_path / "mmlu.jsonl").write_text(json.dumps(released) + "\n", encoding="utf-8")
    model = Parrot()
    results = evaluate(model, [load_prompts(TASKS["mmlu"], tmp_path)], tmp_path / "out")
    assert results is not None
    assert model.asked == [released["few_shot_prefix"] + released["prompt"]]
    assert results.record["data"]["mmlu"]["shots"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "obqa,mmul"], r"task='mmul', .*\(did you mean 'mmlu'\?\)"),
        (["--tasks", "obqa,obqa"], "'obqa' is there twice"),
        (["--tasks", "race"], r"no race\.test\.jsonl or"),
        (["--tasks", "obqa", "--rank", "0"], "--rank 0 and --world None, expected both or neither"),
        (["--tasks", "obqa", "--rank", "2", "--world", "2"], "rank 2 of 2"),
        (["--tasks", "obqa", "--prompts", "x"], "--data .* and --prompts x, expected one of them"),
        (["--tasks", "obqa", "--batch", "0"], "batch=0, expected a whole number"),
        (["--tasks", "obqa", "--dtype", "float8"], "float8"),
    ],
)
def test_bad_options_of_run(tmp_path: Path, arguments: list[str], said: str) -> None:
    write_records(tmp_path / "obqa.test.jsonl", 2)
    with pytest.raises(ColadaError, match=said):
        command("run", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *arguments)


def test_bad_options_without_data(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out"), "--tasks", "obqa"]
    with pytest.raises(ColadaError, match="where are the records"):
        command("run", *out)
    with pytest.raises(ColadaError, match="--shots with --prompts"):
        command("run", *out, "--prompts", str(tmp_path), "--shots", "1")


def test_bad_files_to_score(tmp_path: Path) -> None:
    evaluate(Parrot(), [load_benchmark(TASKS["obqa"], write_records(tmp_path / "x.jsonl"))], tmp_path / "out")
    file = tmp_path / "out/obqa.jsonl"
    for arguments, said in (
        ([str(tmp_path / "x.jsonl")], r"x\.jsonl: task='x', .*or give --task"),
        ([str(file), "--task", "squad"], "an output of task 'obqa', expected 'squad'"),
        ([str(file), str(tmp_path / "out")], "both are outputs of obqa"),
        ([str(tmp_path)], "no <task>.jsonl"),
        ([str(tmp_path / "obqa.jsonl")], "no such file"),
        ([str(tmp_path / "x.jsonl"), "--task", "obqa"], "no field 'ground_truth'"),
    ):
        with pytest.raises(ColadaError, match=said):
            command("score", *arguments)


def test_torchruns_ranks_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "obqa.test.jsonl", 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command(
        *("run", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--tasks", "obqa"),
        *("--shots", "0", "--steps", "1", "-n", "1", "-q"),
    )
    assert [row["id"] for row in lines(tmp_path / "out/obqa.rank1of2.jsonl")] == ["1"]
    assert not (tmp_path / "out" / RESULTS_FILE).exists()


# --- the page -------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Texts, tags and links of a page, and whether what it opens it closes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.tags, self.links = "", [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self._see(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, attrs)

    def _see(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path, colours: Benchmark) -> tuple[Page, Results]:
    class Rude(Parrot):
        def write(self, prompt: str, seed: int) -> str:
            return f" <script>alert(1)</script>{super().write(prompt, seed)}"

    results = evaluate(Rude(), [colours], tmp_path / "out")
    assert results is not None
    write_page(tmp_path / "page.html", "a <b>", results.scores, results.outputs, results.record["settings"])
    return Page((tmp_path / "page.html").read_text(encoding="utf-8")), results


def test_the_page_stands_alone_and_escapes_what_models_write(page: tuple[Page, Results]) -> None:
    own, _ = page
    assert own.links == []
    assert not {"script", "img", "b"} & set(own.tags)
    assert "a <b>" in own.text
    assert "<script>alert(1)</script>" in own.text


def test_the_page_says_and_draws_what_the_result_says(page: tuple[Page, Results]) -> None:
    own, results = page
    (found,) = results.scores
    naming = found.naming
    assert naming is not None
    for said in (f"{100 * found.share:.2f}", f"{100 * naming.accuracy:.1f}", f"{10 * naming.named:.1f}"):
        assert said in own.text
    (scores,) = draw_scores(results.scores).axes
    drawn = {line.get_label(): line.lines[0].get_xdata().tolist() for line in scores.containers}
    assert drawn == {"score": [100 * found.share], "released Cola 2.3B": [23.0]}
    (options,) = draw_naming(results.scores).axes
    drawn = {line.get_label(): line.lines[0].get_xdata().tolist() for line in options.containers}
    assert drawn == {"name an option": [10 * naming.named], "right among those": [100 * naming.accuracy]}
    for axes, interval in ((scores, found.interval), (options, wilson(naming.named, 10))):
        bars = axes.containers[0].lines[2][0].get_segments()
        assert [100 * bound for bound in interval] == pytest.approx([x for x, _ in bars[0]])
        assert axes.collections[-1].get_segments()[0][0][0] == 25  # chance


def test_a_page_of_a_task_without_options(tmp_path: Path) -> None:
    lambada = load_benchmark(TASKS["lambada"], write_records(tmp_path / "l.jsonl", 2, choices=None))
    results = evaluate(Parrot(), [lambada], tmp_path / "out")
    assert results is not None
    write_page(tmp_path / "page.html", "x", results.scores, results.outputs, {})
    assert "How options are chosen" not in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text


def test_cola_is_a_model_to_evaluate() -> None:
    """mypy checks the protocol; this, that nothing else is asked of it."""
    assert {"tokenizer", "origin", "generation"} <= vars(tiny_model()).keys()
    assert callable(ColaDLM.generate)
    assert fingerprint(tiny_model()) == fingerprint(tiny_model()) != fingerprint(tiny_model(seed=1))
