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
from colada.models.load import load
from colada.text.tokenizer import Tokenizer
from colada.train.inputs import prepare_inputs
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


# --- the kit -------------------------------------------------------------------------------------


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
    settings = gpu.open_kit(recipe, kit)
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
