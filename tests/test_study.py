"""The scaling study: who is trained and asked when, what is kept, what the figure says of given results."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import runs
from colada.errors import ColadaError
from colada.evaluate.data import load_benchmark
from colada.evaluate.scoring import is_correct
from colada.evaluate.tasks import find_task
from colada.models.base import find_archs
from colada.report.style import styled
from colada.train.display import Display
from colada.train.recipe import Recipe, save_recipe
from colada.train.trainer import Interrupted, Trainer
from commands import main
from experiments.scaling import likelihood as study_likelihood
from experiments.scaling import run as scaling
from experiments.scaling.cells import CELL_FILE, Result, read_result, read_results
from experiments.scaling.data import RECORD_FILE, write_documents
from experiments.scaling.figure import draw_options, draw_scores, write_figures
from experiments.scaling.likelihood import LIKELIHOOD_FILE, validation_texts
from experiments.scaling.run import Asked, Progress, plan_cells, run_study
from experiments.scaling.summary import Difference, markdown, points_of, verdict

# The items' prompts are longer than the rows that models of a second's training see.
pytestmark = pytest.mark.filterwarnings("ignore:a prompt of")

LAMBADA = [
    {"id": n, "context": "", "question": f"Ann saw {n} birds and one", "answer": "cat"} for n in range(6)
]
OBQA = [
    {
        "id": n,
        "context": "",
        "question": f"Which of {n}?",
        "choices": ["red", "blue", "green", "grey"],
        "answer": "blue",
        "answer_index": 1,
    }
    for n in range(6)
]


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    directory = tmp_path / "benchmarks"
    directory.mkdir()
    write_records(directory / "lambada.test.jsonl", LAMBADA)
    write_records(directory / "obqa.test.jsonl", OBQA)
    return directory


@pytest.fixture
def recipes(tmp_path: Path) -> list[Path]:
    """Two points; the one named first is the more expensive."""
    paths = []
    for name, steps in (("big", 4), ("little", 2)):
        paths.append(tmp_path / f"{name}.yaml")
        # No decoder is as small as the tiny Cola DLM.
        decoder = "model.decoder={dim: 16, num_layers: 1, num_heads: 2, ffn_dim: 40}"
        small = ["stages.decoder.batch=1", "stages.decoder.length=8", "stages.decoder.warmup=1"]
        quiet = [
            decoder,
            *small,
            "generation={}",
            "run.validate_every=0",
            "run.sample_every=0",
            f"data.cache={tmp_path / 'shards'}",
        ]
        save_recipe(
            runs.recipe(f"stages.vae.steps={steps}", f"stages.prior.steps={steps}", *quiet), paths[-1]
        )
    return paths


ASKED = Asked(("lambada", "obqa"), limit=3, max_new_tokens=4)


def study(recipes: list[Path], benchmarks: Path, out: Path, asked: Asked = ASKED, seeds: int = 1) -> Progress:
    cells = plan_cells(recipes, ["cola"], seeds, "cpu")
    return run_study(cells, asked, asked.benchmarks(benchmarks), out, Display())


class CopyingTrainer:
    """Stands in for the trainer: a model that was trained once, whatever the recipe."""

    def __init__(self, recipe: Recipe, out: Path, display: Display) -> None:
        out.mkdir(parents=True)
        save_recipe(recipe, out / "recipe.yaml")
        self.out = out

    def run(self) -> None:
        shutil.copytree(self.model, self.out / "model")

    model: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    Trainer(runs.recipe("run.validate_every=0", "run.sample_every=0", "run.save_every=100"), out).run()
    return out / "model"


@pytest.fixture
def untrained(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training costs nothing, where what is tested is all else."""
    monkeypatch.setattr(CopyingTrainer, "model", trained, raising=False)
    monkeypatch.setattr(scaling, "Trainer", CopyingTrainer)


def forbid(*arguments: object, **options: object) -> None:
    raise AssertionError("this was done before")


# --- the run -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untrained")
def test_all_points_of_a_seed_come_first_and_nothing_is_done_twice(
    recipes: list[Path], benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    cells = ["little/cola/seed0", "big/cola/seed0", "little/cola/seed1", "big/cola/seed1"]
    assert study(recipes, benchmarks, out, seeds=2).made == cells
    result = read_result(out / cells[0] / CELL_FILE)
    assert (result.point, result.arch, result.seed) == ("little", "cola", 0)
    assert [(name, counts.items) for name, counts in result.counts.items()] == [("lambada", 3), ("obqa", 3)]
    assert result.cost.total_flops > 0
    assert "torch" in result.record["made_with"]

    monkeypatch.setattr(scaling, "Trainer", forbid)
    monkeypatch.setattr(scaling, "evaluate", forbid)
    again = study(recipes, benchmarks, out, seeds=2)
    assert (again.made, again.kept, again.failed) == ([], cells, {})


@pytest.mark.usefixtures("untrained")
def test_what_was_trained_before_an_interrupt_is_not_trained_again(
    recipes: list[Path], benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "study"
    with monkeypatch.context() as patch:
        patch.setattr(scaling, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study(recipes[1:], benchmarks, out)
    weights = next((out / "little/cola/seed0/training/model").rglob("*.safetensors")).read_bytes()

    monkeypatch.setattr(scaling, "Trainer", forbid)
    assert study(recipes[1:], benchmarks, out).made == ["little/cola/seed0"]
    assert weights == next((out / "little/cola/seed0/training/model").rglob("*.safetensors")).read_bytes()


def test_an_interrupted_training_goes_on(
    recipes: list[Path], benchmarks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = plan_cells(recipes[:1], ["cola"], 1, "cpu")
    out, whole = tmp_path / "study", tmp_path / "whole"
    items = ASKED.benchmarks(benchmarks)
    with pytest.raises(Interrupted):
        run_study(cells, ASKED, items, out, runs.At("prior", 3))
    assert not (out / cells[0].name / CELL_FILE).exists()
    assert run_study(cells, ASKED, items, out, Display()).made == [cells[0].name]
    run_study(cells, ASKED, items, whole, Display())
    runs.assert_same_run(out / cells[0].name / "training", whole / cells[0].name / "training")


def test_all_architectures_are_trained_at_equal_cost_and_asked(
    recipes: list[Path], benchmarks: Path, tmp_path: Path
) -> None:
    out, archs = tmp_path / "study", ["cola", "ar", "llada"]
    cells = plan_cells(recipes[1:], archs, 1, "cpu")
    progress = run_study(cells, ASKED, ASKED.benchmarks(benchmarks), out, Display())
    assert progress.made == [f"little/{arch}/seed0" for arch in archs]
    costs = {result.arch: result.cost for result in read_results(out)}
    for cost in costs.values():
        # Steps are whole, and the runs short: a step is a good part of one.
        assert cost.total_flops == pytest.approx(costs["cola"].total_flops, rel=0.3)
    for arch in archs:
        assert len((out / f"little/{arch}/seed0/evaluation/obqa.jsonl").read_text().splitlines()) == 3


@pytest.mark.usefixtures("untrained")
def test_more_items_keep_the_outputs_there_are(
    recipes: list[Path], benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    study(recipes[1:], benchmarks, out)
    outputs = out / "little/cola/seed0/evaluation/obqa.jsonl"
    before = outputs.read_text()
    monkeypatch.setattr(scaling, "Trainer", forbid)
    more = Asked(ASKED.tasks, limit=5, max_new_tokens=4)
    assert study(recipes[1:], benchmarks, out, more).made == ["little/cola/seed0"]
    assert outputs.read_text().startswith(before)
    assert read_results(out)[0].counts["obqa"].items == 5


@pytest.mark.usefixtures("untrained")
def test_a_cell_that_another_process_is_at_is_left_to_it(
    recipes: list[Path], benchmarks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    (out / "little/cola/seed0").mkdir(parents=True)
    with FileLock(out / "little/cola/seed0/lock"):
        progress = study(recipes, benchmarks, out)
    assert (progress.made, progress.elsewhere) == (["big/cola/seed0"], ["little/cola/seed0"])


@pytest.mark.usefixtures("untrained")
def test_a_damaged_cell_is_named_and_the_others_go_on(
    recipes: list[Path], benchmarks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    damaged = out / "little/cola/seed0" / CELL_FILE
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"cell": {"recipe": "little"')
    command = ["study", "run", *map(str, recipes), "--benchmarks", str(benchmarks), "--out", str(out)]
    command += ["--archs", "cola", "--seeds", "1", "--tasks", "lambada,obqa", "--limit", "3", "-n", "4", "-q"]
    assert main(command) == 2  # Before anything is trained.
    assert "bytes of validation text, expected 16384; give fewer --text-bytes" in capsys.readouterr().err
    command += ["--text-bytes", "60"]
    assert main(command) == 2
    assert f"1 of 2 cells failed, first little/cola/seed0: {damaged}" in capsys.readouterr().err
    assert (out / "big/cola/seed0" / CELL_FILE).is_file()
    assert main(["study", "figure", str(out)]) == 2
    assert str(damaged) in capsys.readouterr().err

    damaged.unlink()
    assert main(command) == 0
    assert "2 of 2 cells are finished, 1 of them by this process" in capsys.readouterr().out
    record = json.loads((out / "scaling.json").read_text())
    assert [(point["recipe"], point["seeds"]) for point in record["points"]] == [
        ("little", [0]),
        ("big", [0]),
    ]
    assert all("cost" in cell and "commit" not in cell for cell in record["cells"])


@pytest.mark.usefixtures("untrained")
def test_a_cell_trained_with_another_recipe_is_refused(
    recipes: list[Path], benchmarks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    study(recipes[1:], benchmarks, out)
    recipes[1].write_text(recipes[1].read_text().replace("mask_ratio: 0.15", "mask_ratio: 0.2"))
    failed = study(recipes[1:], benchmarks, out).failed["little/cola/seed0"]
    assert "stages.vae.mask_ratio was 0.15 and is now 0.2" in failed


@pytest.mark.usefixtures("untrained")
def test_bits_per_byte_of_held_out_text_are_measured_once(
    recipes: list[Path], benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    asked = Asked(ASKED.tasks, limit=3, max_new_tokens=4, text_bytes=60)
    assert study(recipes[1:], benchmarks, out, asked).made == ["little/cola/seed0"]
    cell = out / "little/cola/seed0"
    result = read_result(cell / CELL_FILE)
    assert result.likelihood is not None
    assert result.likelihood.kind == "bound"
    # Untrained but for a moment: about as much as a byte of 300 tokens' vocabulary can have.
    assert 1 < result.likelihood.bits_per_byte < 12
    assert json.loads((cell / LIKELIHOOD_FILE).read_text())["bytes"] >= 60

    (cell / CELL_FILE).unlink()  # As if the study was stopped while items were asked.
    with monkeypatch.context() as patch:
        patch.setattr(study_likelihood, "measure", forbid)
        study(recipes[1:], benchmarks, out, asked)
    assert read_result(cell / CELL_FILE) == result
    more = Asked(ASKED.tasks, limit=3, max_new_tokens=4, text_bytes=600)
    study(recipes[1:], benchmarks, out, more)
    assert json.loads((cell / LIKELIHOOD_FILE).read_text())["bytes"] >= 600


def test_validation_text_is_held_out_and_mixed_as_the_sources_are(tmp_path: Path) -> None:
    def lines(name: str) -> list[dict[str, str]]:
        # Of two bytes a character, the last one longer than what is measured of a text.
        texts = [f"{name} {n} " + "é" * 40 for n in range(40)] + [f"{name} long " + "é" * 1000]
        return [
            {"text": text, "split": "validation" if n % 2 == 0 else "train"} for n, text in enumerate(texts)
        ]

    for name in ("one", "two"):
        write_records(tmp_path / f"{name}.jsonl", lines(name))
    one, two = (
        f"{{path: {tmp_path / name}.jsonl, weight: {part}}}" for name, part in (("one", 3), ("two", 1))
    )
    recipe = runs.recipe(f"data.sources=[{one}, {two}]")
    texts = validation_texts(recipe, 1600)
    every = [*lines("one"), *lines("two")]
    held_out = [line["text"] for line in every if line["split"] == "validation"]
    assert all(any(whole.startswith(text) for whole in held_out) for text in texts)
    assert max(map(len, texts)) <= study_likelihood.CHARACTERS
    for name, share in (("one", 1200), ("two", 400)):
        sizes = [len(text.encode()) for text in texts if text.startswith(name)]
        assert share <= sum(sizes) < share + max(sizes)
    assert texts == validation_texts(recipe, 1600)
    with pytest.raises(ColadaError, match=r"one\.jsonl holds out 2\d+ bytes of .*, expected 75000"):
        validation_texts(recipe, 100_000)


def test_bad_requests_are_named(recipes: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=r"unknown architecture 'lada' \(did you mean 'llada'\?\)"):
        find_archs("cola,lada")
    with pytest.raises(ColadaError, match="'ar' is there twice"):
        find_archs("ar,cola,ar")
    other = tmp_path / "other"
    other.mkdir()
    twin = other / "big.yaml"
    twin.write_text(recipes[0].read_text())
    with pytest.raises(ColadaError, match="recipes of one name"):
        plan_cells([*recipes, twin], ["cola"], 1, "cpu")
    guided = tmp_path / "guided.yaml"
    quiet = ["generation={guidance: 3.0}", "stages.decoder.generation={guidance: 3.0}"]
    save_recipe(runs.recipe(*quiet, "model.decoder={dim: 16, num_heads: 2, num_layers: 1}"), guided)
    assert len(plan_cells([guided], ["cola"], 1, "cpu")) == 1
    with pytest.raises(ColadaError, match=r"guided\.yaml: generation: guidance=3\.0, but AR has no guidance"):
        plan_cells([guided], ["cola", "ar"], 1, "cpu")
    recipes[1].write_text(recipes[1].read_text().replace("align: 0.5", "align: 0.25"))
    with pytest.raises(ColadaError, match=r"data\.align was 0\.5 and is now 0\.25.*must share their data"):
        plan_cells(recipes, ["cola"], 1, "cpu")


# --- what the results say ------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Result]:
    """Writes a cell's file with scores of 8 items a task, and reads it."""

    def make(
        point: str,
        arch: str,
        seed: int,
        flops: float,
        lambada: int,
        obqa: int,
        bits: float | None = None,
        **asked: Any,
    ) -> Result:
        record: dict[str, Any] = {"likelihood": None}
        if bits is not None:
            asked["text_bytes"] = 100
            kind = "exact" if arch == "ar" else "bound"
            record["likelihood"] = {"bits_per_byte": bits, "kind": kind, "fingerprint": "f"}
        record |= {
            "cell": {"recipe": point, "arch": arch, "seed": seed},
            "cost": {
                "arch": arch,
                "parameters": {"a": 7, "b": 3, "total": 10},
                "flops": {"x": flops, "y": flops, "total": 2 * flops},
                "tokens": 5,
                "narrow_flops": flops,
            },
            "asked": {"limit": 8, **asked},
            "outcomes": {
                "lambada": {str(n): [int(n < lambada), 0, 0] for n in range(8)},
                "obqa": {str(n): [int(n < obqa), int(n < 6), int(n < obqa)] for n in range(8)},
            },
        }
        path = tmp_path / point / arch / f"seed{seed}" / CELL_FILE
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
        return read_result(path)

    return make


def test_means_and_errors_over_seeds(make: Callable[..., Result]) -> None:
    results = [make("one", "cola", seed, 50.0, correct, 4) for seed, correct in enumerate((2, 4, 6))]
    (point,) = points_of(results)
    # 25, 50 and 75%: their standard deviation is 25, so the mean's error 25 / sqrt(3).
    assert point.scores["lambada"].value == pytest.approx(50)
    assert point.scores["lambada"].error == pytest.approx(14.433757)
    assert point.scores["obqa"].error == pytest.approx(0)
    # Averages 37.5, 50 and 62.5.
    assert point.average.value == pytest.approx(50)
    assert point.average.error == pytest.approx(12.5 / math.sqrt(3))
    assert point.pooled["obqa"].to_dict() == {"items": 24, "correct": 12, "named": 18, "right": 12}
    assert (point.cost.total_parameters, point.cost.total_flops) == (10, 100.0)
    record = point.to_dict(results[0].tasks)
    # Every seed gets the same items right: three answers count once, and the variance of 8 has n - 1 = 7.
    # p ± z sqrt(p (1 - p) / n), solved for p by hand.
    assert record["tasks"]["obqa"]["independent_items"] == pytest.approx(7)
    assert record["tasks"]["obqa"]["interval_95"] == pytest.approx([20.24, 79.76], abs=0.01)
    assert record["tasks"]["obqa"]["is"] == "at"


def test_one_seed_has_no_error(make: Callable[..., Result]) -> None:
    (point,) = points_of([make("one", "ar", 0, 1.0, 1, 1)])
    assert point.scores["lambada"].error is None
    assert point.scores["lambada"].shown() == "12.5"


def test_verdicts() -> None:
    assert verdict((40, 64), 0.25) == "above"
    assert verdict((16, 64), 0.25) == "at"
    assert verdict((1, 64), 0.25) == "below"
    assert verdict((0, 0), 0.25) == "at"  # Nothing is known.


def test_differences() -> None:
    # Newcombe's example (1998, table II, a): 56/70 - 48/80 = 0.2, from 0.0524 to 0.3339.
    found = Difference.of((56, 70), (48, 80))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert str(found) == "**+20.0 (+5.2 to +33.4)**"
    mean = Difference.mean([Difference(0.2, 0.1, 0.5), Difference(-0.2, -0.2, 0.2)])
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.0, -0.05, 0.25))
    assert str(mean) == "+0.0 (−5.0 to +25.0)"


def test_bits_per_byte_stand_beside_the_scores_as_bounds_or_exact(
    make: Callable[..., Result],
) -> None:
    results = [
        make("one", arch, seed, 1.0, 1, 2, bits=bits + seed / 10)
        for arch, bits in (("cola", 2.5), ("ar", 2.0))
        for seed in (0, 1)
    ]
    points = points_of(results)
    tables = markdown(points, results[0].tasks)
    # Two values that are 0.1 apart: the standard error is half of it.
    assert "| one | Cola DLM | 12.5 ± 0.0 | 25.0 ± 0.0 | 18.8 ± 0.0 | ≤ 2.550 ± 0.050 |" in tables
    assert "| one | AR | 12.5 ± 0.0 | 25.0 ± 0.0 | 18.8 ± 0.0 | 2.050 ± 0.050 |" in tables
    assert points[0].to_dict(results[0].tasks)["bits_per_byte"]["bound"]
    assert not points[1].to_dict(results[0].tasks)["bits_per_byte"]["bound"]
    assert results[0].likelihood is not None
    elsewhere = replace(results[0].likelihood, fingerprint="g")
    with pytest.raises(ColadaError, match="one/ar/seed0: its validation text is not that of one/cola/seed0"):
        points_of([results[0], replace(results[2], likelihood=elsewhere)])


def test_results_that_do_not_belong_together_are_refused(make: Callable[..., Result]) -> None:
    results = [make("one", "cola", 0, 1.0, 1, 1), make("one", "cola", 1, 1.0, 1, 1, limit=9)]
    with pytest.raises(ColadaError, match=r"one/cola/seed1 was asked .*'limit': 9"):
        points_of(results)
    with pytest.raises(ColadaError, match="one/cola/seed2: its cost is not that of seed 0"):
        points_of([results[0], make("one", "cola", 2, 2.0, 1, 1)])


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"0": [1, 0, 0]', '"0": [9, 0, 0]', "impossible counts of item '0'"),
        ('"0": [1, 0, 0]', '"0": [1, 0]', "missing 1 required positional argument"),
        ('"outcomes"', '"outcome"', "KeyError('outcomes')"),
        ('"cola"', '"coal"', "arch='coal'"),
        ('"lambada"', '"lambda"', "did you mean 'lambada'"),
        ('"flops": {', '"flop": {', "KeyError('flops')"),
        ('"tokens": 5', '"tokens": Infinity', "not a cell's result"),
        ('"tokens": 5', '"tokens": ' + "9" * 5000, "thousands of digits"),
        ('"narrow_flops": 1.0', f'"narrow_flops": {10**400}', "not a cell's result"),
        ('"tokens": 5', '"tokens": ' + "[" * 100_000, "nested too deeply"),
        ('"bits_per_byte": 2.0', '"bits_per_byte": NaN', "not a cell's result"),
        ('"kind": "bound"', '"kind": "guess"', "kind='guess', expected a number, and exact or bound"),
    ],
)
def test_damage_is_named(
    make: Callable[..., Result], tmp_path: Path, old: str, new: str, reason: str
) -> None:
    make("one", "cola", 0, 1.0, 1, 1, bits=2.0)
    path = tmp_path / "one/cola/seed0" / CELL_FILE
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ColadaError) as error:
        read_results(tmp_path)
    assert str(path) in str(error.value)
    assert reason in str(error.value)


def test_the_figure_shows_the_means_their_errors_and_chance(make: Callable[..., Result]) -> None:
    results = [
        make(point, arch, seed, flops, seed + extra, 2)
        for point, flops, extra in (("one", 1e12, 1), ("two", 4e12, 3))
        for arch in ("cola", "ar")
        for seed in (0, 1)
    ]
    points = points_of(results)
    assert [(point.arch, point.name) for point in points] == [
        ("cola", "one"),
        ("cola", "two"),
        ("ar", "one"),
        ("ar", "two"),
    ]
    with styled():
        figure = draw_scores(points, results[0].tasks)
    lambada, obqa, average = figure.axes
    assert [axes.get_title("left") for axes in figure.axes] == ["LAMBADA", "OBQA", "Average of 2"]
    line = lambada.containers[0].lines[0]
    assert line.get_xdata().tolist() == [2e12, 8e12]
    assert line.get_ydata().tolist() == [18.75, 43.75]  # of 1 and 2, of 3 and 4, in 8
    # Two values that are 12.5 apart: the standard error is half of it.
    segments = lambada.containers[0].lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in segments] == [[12.5, 25.0], [37.5, 50.0]]
    chance = [line for line in obqa.lines if line.get_label() == "chance"]
    assert chance[0].get_ydata() == [25.0, 25.0]
    assert not [line for axes in (lambada, average) for line in axes.lines if line.get_label() == "chance"]
    named, right = draw_options(points, results[0].tasks).axes
    assert named.containers[0].lines[0].get_xdata().tolist() == [75.0]
    assert right.containers[0].lines[0].get_xdata().tolist() == [pytest.approx(100 / 3)]


def test_figures_tables_and_record_are_written(make: Callable[..., Result], tmp_path: Path) -> None:
    results = [make("one", arch, 0, flops, 1, 2) for arch, flops in (("cola", 1e12), ("llada", 1.02e12))]
    written = {path.name for path in write_figures(tmp_path, results)}
    assert written == {
        *("scaling.svg", "scaling.png", "options.svg", "options.png"),
        *("scaling.md", "scaling.json"),
    }
    tables = markdown(points_of(results), results[0].tasks)
    assert (tmp_path / "scaling.md").read_text() == tables + "\n"
    assert "| one | LLaDA | 10 | 1.000 | 2.04 T | 1.020 | 1.02 T | 5 | 1 |" in tables
    assert "| one | Cola DLM | 12.5 | 25.0 | 18.8 |" in tables
    assert "| task | minus LLaDA (one) |\n| --- | ---: |\n| LAMBADA | +0.0 (" in tables
    assert "| OBQA | Cola DLM (one) | 25.0 (7.1 to 59.1) | 25.0 | at | 75.0 (40.9 to 92.9) |" in tables


# --- in-domain text ------------------------------------------------------------------------------


def test_documents_are_what_the_evaluation_asks_and_the_answer(benchmarks: Path, tmp_path: Path) -> None:
    fresh = {**OBQA[0], "id": "new", "question": "Which of them?"}
    write_records(benchmarks / "obqa.train.jsonl", [fresh, OBQA[4]])
    said: list[str] = []
    (written,) = write_documents(benchmarks, tmp_path / "text", ["obqa"], said.append)
    assert (written.documents, written.scored) == (1, 1)  # The other one is asked in the evaluation.
    (line,) = (tmp_path / "text/obqa.train.jsonl").read_text().splitlines()
    text = json.loads(line)["text"]
    assert text == "Question: Which of them?\n(A) red\n(B) blue\n(C) green\n(D) grey\nAnswer: blue"
    asked = load_benchmark(find_task("obqa"), benchmarks / "obqa.train.jsonl", shots=0).items[0]
    assert text == asked.prefix + asked.prompt + " blue"
    assert "Apache-2.0" in said[0]
    assert "lambada, mmlu, race, squad, story_cloze" in said[1]
    write_documents(benchmarks, tmp_path / "letters", ["obqa"], letters=True)
    (line,) = (tmp_path / "letters/obqa.train.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == text.removesuffix(" blue") + " (B) blue"
    assert json.loads((tmp_path / "text" / RECORD_FILE).read_text())["files"][0]["documents"] == 1


def test_hellaswag_is_learnt_as_it_is_scored_by_the_bare_ending(benchmarks: Path, tmp_path: Path) -> None:
    endings = {"choices": ["he runs.", "he eats.", "he sings.", "he sleeps."], "answer": "he eats."}
    record = {"id": 1, "context": "A man is hungry. Then", "question": "", "answer_index": 1, **endings}
    write_records(benchmarks / "hellaswag.train.jsonl", [record])
    write_records(benchmarks / "hellaswag.validation.jsonl", [{**record, "context": "A man is late. Then"}])
    write_documents(benchmarks, tmp_path / "text", ["hellaswag"], letters=True)
    (line,) = (tmp_path / "text/hellaswag.train.jsonl").read_text().splitlines()
    item = load_benchmark(find_task("hellaswag"), benchmarks / "hellaswag.train.jsonl", shots=0).items[0]
    written = json.loads(line)["text"].removeprefix(item.prefix + item.prompt)
    assert written == " he eats."
    rule = find_task("hellaswag").rule
    assert is_correct(rule, written, item.answer, item.choices)
    assert not is_correct(rule, f" (B){written}", item.answer, item.choices)


def test_what_is_scored_on_is_no_training_text(
    benchmarks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(benchmarks / "obqa.train.jsonl", OBQA)
    with pytest.raises(ColadaError, match=r"obqa\.train\.jsonl: every record is among those"):
        write_documents(benchmarks, tmp_path / "text", ["obqa"])
    with pytest.raises(ColadaError, match="lambada has no training split"):
        write_documents(benchmarks, tmp_path / "text", ["lambada"])
    command = ["study", "data", "--benchmarks", str(benchmarks), "--out", str(tmp_path / "text")]
    assert main([*command, "--tasks", "hellaswag"]) == 2
    assert (
        "no hellaswag.train.jsonl or hellaswag.train.jsonl.gz, data files there: lambada"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "text").exists()
