"""benchmarks/gpu.sh and gather.py on a CPU: the same way through the code as on a GPU, at debug size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    gather,
    gpu,
)
from benchmarks import (
    kit as kits,
)
from benchmarks import (
    study as studies,
)
from colada.data.sources import check_sources
from colada.evaluate.tasks import TASKS, THE_EIGHT
from colada.models.load import load
from colada.text.tokenizer import Tokenizer
from colada.train.inputs import prepare_inputs
from colada.train.plan import plan_run, resolve
from colada.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]


def started(*arguments: str, status: int = 0) -> None:
    done = subprocess.run(
        [str(ROOT / "benchmarks/gpu.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr


def results_of(file: Path) -> Any:
    record = json.loads(file.read_text())
    assert record["ok"], record["errors"]
    assert {"device", "torch", "python"} <= record["made_with"].keys()
    assert record["seed"] == 0
    assert record["wall_s"] > 0
    assert record["peak_memory_bytes"] > 50e6
    return record["results"]


@pytest.mark.slow
def test_every_part_runs_at_debug_size_on_a_cpu(tmp_path: Path, parity_cases: list[Path]) -> None:
    run = tmp_path / "run"
    started("--debug", "all", str(tmp_path), "--run", str(run), "--kit", str(tmp_path / "no kit"))
    tests = results_of(tmp_path / "tests.json")
    assert not tests["tests"]["failed"]
    assert all(case["ok"] for case in tests["parity"])
    for cell in results_of(tmp_path / "generate.json").values():
        assert cell["settings"]["dtype"] == "bfloat16"
        assert [row["peer"] for row in cell["rows"]] == ["limit", "engine", "readable", "ar"]
    few = results_of(tmp_path / "few.json")
    assert list(few) == ["batch 1", "batch 2"]
    assert all(cell["settings"]["guidance"] == 1 for cell in few.values())
    assert [row["peer"] for row in few["batch 1"]["rows"]] == ["limit", "engine", "ar"]
    steps = results_of(tmp_path / "training.json")
    assert [name.endswith("--compile yes") for name in steps] == [False, True]
    assert all(cell["rows"][0]["tokens/s"] > 0 for cell in steps.values())
    trained = results_of(tmp_path / "bundled.json")
    assert trained["training"]["finished"]
    assert trained["sample"].startswith("Once upon a time")
    assert load(tmp_path / "model").generation["steps"] == 8
    study = results_of(tmp_path / "scaling.json")
    assert study["training"]["finished"]
    archs, points = ("cola", "ar", "llada"), ("small", "medium", "large")
    assert set(study["cells"]) == {f"{point}/{arch}/seed0" for point in points for arch in archs}
    for point in points:
        # A model that is cut down keeps pace with Cola DLM's compute, which thirds of the steps decide.
        flops = [study["cells"][f"{point}/{arch}/seed0"]["cost"]["flops"]["total"] for arch in archs]
        assert flops == pytest.approx([flops[0]] * 3, rel=0.3)
    assert study["table"].count("| ≤ ") == 6
    assert (tmp_path / "scaling.svg").is_file()


@pytest.mark.slow
def test_training_stops_by_itself_and_goes_on_when_started_again(tmp_path: Path) -> None:
    def part() -> Any:
        started(
            "--debug",
            "5",
            str(tmp_path),
            *("--run", str(tmp_path / "run"), "--train-for", "12", "--pieces", "1"),
            *(
                "--set",
                "stages.vae.steps=2",
                "--set",
                "stages.prior.steps=1000000",
                "--set",
                "run.validate_every=20",
            ),
        )
        return results_of(tmp_path / "bundled.json")

    first = part()
    second = part()
    assert not first["training"]["finished"]
    assert not second["training"]["finished"]
    assert 0 < first["training"]["step"] < second["training"]["step"]
    said = (tmp_path / "gpu.log").read_text()
    assert f"resuming prior at step {first['training']['step']}" in said
    subprocess.run("cat model.tar.* | tar x", shell=True, cwd=tmp_path, check=True)
    load(tmp_path / "model").generate(["Once"], 4)


@pytest.mark.slow
def test_the_study_stops_by_itself_and_goes_on_where_it_was(tmp_path: Path) -> None:
    def part() -> Any:
        arguments = ("--run", str(tmp_path / "run"), "--train-for", "12", "--kit", str(tmp_path / "no kit"))
        started("--debug", "6", str(tmp_path), *arguments, "--set", "stages.prior.steps=1000000")
        results = results_of(tmp_path / "scaling.json")
        assert not results["training"]["finished"]
        assert results["cells"] == {}
        return results["under way"].get("small/cola/seed0", {"stage": "none"})

    first = part()
    for _ in range(4):  # A busy machine may not come to the prior in one part.
        if first["stage"] != "prior":
            first = part()
    assert part()["step"] > first["step"] > 0
    assert f"resuming prior at step {first['step']}" in (tmp_path / "gpu.log").read_text()


def part_of(out: Path, seconds: float = 60) -> gpu.Part:
    return gpu.Part("some", out, out, True, seconds, None, out / "run", ())


def test_what_fails_is_said_and_does_not_stop_the_rest_of_a_part(tmp_path: Path) -> None:
    part = part_of(tmp_path)
    part.add("bad", lambda: part.command("-c", "import sys; sys.exit('no such thing')"))
    part.add("good", lambda: part.command("-c", "print(7)")[1])
    record = json.loads((tmp_path / "some.json").read_text())
    assert record["errors"] == ["bad: exit status 1: no such thing"]
    assert record["results"] == {"good": "7\n"}
    assert not record["ok"]


def test_a_command_ends_with_its_part(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(gpu.Failed, match="not over in time"):
        part_of(tmp_path, seconds=2).command("-c", "import time; time.sleep(60)")
    assert time.monotonic() - begin < 30


def test_a_command_is_asked_to_stop_before_its_part_ends(tmp_path: Path) -> None:
    waits = "import sys, time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
    code = f"{waits}    print('saved'); sys.exit(130)"
    assert part_of(tmp_path).command("-c", code, good=(130,), stop_after=3) == (130, "saved\n")


def test_too_little_memory_is_a_result_and_the_smaller_step_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = part_of(tmp_path)
    part.debug = False  # The released size has two tries.

    def command(self: gpu.Part, *words: str) -> None:
        if words[words.index("--batch") + 1] == "8":
            raise gpu.OutOfMemory
        Path(words[words.index("--json") + 1]).write_text('{"rows": []}')

    monkeypatch.setattr(gpu.Part, "command", command)
    gpu.training(part)
    assert part.errors == []
    assert part.results["2.3b 8 x 512"] == "out of memory"
    assert part.results["2.3b 4 x 512 --checkpoint-activations"] == {"rows": []}


def test_without_a_gpu_nothing_is_run_unless_it_is_a_rehearsal(tmp_path: Path) -> None:
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    started("1", str(tmp_path / "out"), status=2)
    assert not (tmp_path / "out").exists()


# --- the study -----------------------------------------------------------------------------------


def test_the_points_of_the_study_are_shares_of_its_compute_for_all_models(tmp_path: Path) -> None:
    paths = studies.write_points(studies.STUDY, [], tmp_path)
    flops = {
        (path.stem, arch): plan_run(load_recipe(path, [f"model.arch={arch}"])).cost.total_flops
        for path in paths
        for arch in ("cola", "ar", "llada")
    }
    for point, part in (("small", 9), ("medium", 3), ("large", 1)):
        for arch in ("cola", "ar", "llada"):
            assert flops[point, arch] == pytest.approx(12.5e15 / part, rel=0.01)
    rates = {
        arch: [resolve(load_recipe(path, [f"model.arch={arch}"])).stages["decoder"].lr for path in paths]
        for arch in ("ar", "llada")
    }
    assert rates == {"ar": [1e-3] * 3, "llada": [5e-4] * 3}


def test_cells_of_another_machine_are_taken_over_unless_they_are_there(tmp_path: Path) -> None:
    there = tmp_path / "study/small/cola/seed0/cell.json"
    there.parent.mkdir(parents=True)
    there.write_text('"mine"')
    theirs = {"whose": "theirs"}
    cells = {"small/cola/seed0": theirs, "small/ar/seed0": theirs}
    (tmp_path / "scaling.json").write_text(json.dumps({"results": {"cells": cells}}))
    assert studies.restore(tmp_path / "scaling.json", tmp_path / "study") == ["small/ar/seed0"]
    assert there.read_text() == '"mine"'
    assert json.loads((tmp_path / "study/small/ar/seed0/cell.json").read_text()) == theirs


# --- the kit -------------------------------------------------------------------------------------


def test_a_kit_of_the_study_has_all_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks, corpora, kit = (tmp_path / name for name in ("benchmarks", "corpora", "kit"))
    for place in (benchmarks, corpora, kit):
        place.mkdir()
    record = {"id": 1, "answer": "a", "answer_index": 0}
    for name in THE_EIGHT:
        for split in {TASKS[name].split, "train", "dev"}:
            choices = list("abcd"[: TASKS[name].options])
            own = {
                **record,
                "choices": choices,
                "context": f"In {split}",
                "question": f"Which one, in {split}?",
            }
            (benchmarks / f"{name}.{split}.jsonl").write_text(json.dumps(own) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {sources: [{path: data/corpora/stories.txt}, {path: data/scaling/siqa.train.jsonl}]}\n"
        "tokenizer: {vocab_size: 300}"
    )
    shutil.copyfile(ROOT / "tests/data/stories.txt", corpora / "stories.txt")
    for module in (gather, studies):
        monkeypatch.setattr(module, "STUDY", recipe)
    gather.gather_study(benchmarks, corpora, kit)
    assert len(list((kit / "benchmarks").iterdir())) == 8 + 3  # What is asked, and what is learnt.
    assert [path.name for path in (kit / "corpora").iterdir()] == ["stories.txt"]

    settings = studies.open_study(kit)
    shutil.rmtree(corpora)
    made = load_recipe(recipe, settings)
    assert len(check_sources(made.data.sources)) == 2
    assert Tokenizer.from_file(Path(str(made.tokenizer.file))).vocab_size == 300
    before = (kit / "corpora/siqa.train.jsonl").stat()
    assert studies.open_study(kit) == settings
    assert (kit / "corpora/siqa.train.jsonl").stat() == before  # Shards made of it stay.


def test_a_kit_without_the_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(gpu.Failed, match=r"scaling-tokenizer\.json, expected a kit of .* --benchmarks"):
        studies.open_study(tmp_path)


def test_a_kit_that_was_carried_elsewhere_needs_no_tokenising(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there, kit = tmp_path / "here", tmp_path / "there", Path("runs/kit")
    for place in (here, there):
        place.mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {sources: [{path: elsewhere}], validation_share: 0.1}\ntokenizer: {vocab_size: 300}"
    )
    monkeypatch.chdir(here)
    kit.mkdir(parents=True)
    gather.gather_text(recipe, ROOT / "tests/data", kit, shards=True)
    shutil.copytree(kit, there / kit, copy_function=shutil.copyfile)
    monkeypatch.chdir(there)
    said: list[str] = []
    settings = kits.open_kit(recipe, kit)
    made = load_recipe(recipe, settings)
    tokenizer = Tokenizer.from_file(kit / "tokenizer.json")
    prepare_inputs(made, tokenizer, None, kit / "shards", said.append)
    assert "reusing" in said[0]


def test_a_kit_has_every_wheel_but_torch_and_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str]) -> int:
        wanted = command[command.index("--dest") + 2 :]
        pins = Path(command[command.index("--constraint") + 1]).read_text()
        assert not [line for line in pins.splitlines() if gather.normalised(line) == "torch"]
        assert "--python-version=3.12" in command
        place = Path(command[command.index("--dest") + 1])
        place.mkdir()
        for own in wanted:
            (place / f"{gather.normalised(own).replace('-', '_')}-1.0-py3-none-any.whl").touch()
        return 0

    monkeypatch.setattr(gather.subprocess, "call", download)
    gather.gather_wheels(tmp_path, "3.12", "x86_64", {"pyarrow", "huggingface-hub"})
    wheels = {path.name.partition("-")[0] for path in (tmp_path / "wheels").iterdir()}
    assert {"pydantic", "safetensors", "pytest", "typer"} <= wheels
    assert not wheels & {"torch", "pyarrow", "huggingface_hub"}
