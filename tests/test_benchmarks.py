"""What the benchmarks compare is what they say: the same step, by the code that is named."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import colada
from benchmarks.measure import made_with
from benchmarks.step import Case, Step, StepProcess
from benchmarks.training import app, largest_difference
from colada.cli.main import run

ROOT = Path(__file__).resolve().parents[1]

CASE = Case(batch=2, length=32, block=4, layers=1, precision="float32")


def test_a_step_elsewhere_is_that_of_the_other_checkout(tmp_path: Path) -> None:
    """The other checkout's flow loss is three times ours, so its gradients must be too, and no others."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("bundled", "__pycache__"))
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    losses = tmp_path / "src/colada/train/losses.py"
    text, old = losses.read_text(), "    return Loss(flow, _detached("
    assert text.count(old) == 1
    losses.write_text(text.replace(old, "    return Loss(3 * flow, _detached("))
    other = StepProcess(CASE, tmp_path)
    try:
        assert other.made_with["colada"] == str(tmp_path)
        theirs = torch.load(other.ask(f"gradients {tmp_path / 'gradients'}"))
        assert other.seconds() > 0
    finally:
        other.close()
    ours = Step(CASE).gradients()
    assert ours.keys() == theirs.keys()
    for name, own in ours.items():
        torch.testing.assert_close(theirs[name], 3 * own, rtol=1e-4, atol=1e-7)


def test_a_process_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"):
        StepProcess(Case(size="no such size"), ROOT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["steps", "--size", "large"], "size='large', expected one of 'tiny', 'small', '2.3b'"),
        (["steps", "--length", "30"], "length=30, expected a multiple of patch_size * block_size = 16"),
        (["steps", "--precision", "float8"], "precision='float8'"),
        (["steps", "--compile", "maybe"], "compile='maybe'"),
        (["steps", "--against", "nowhere"], "--against nowhere: no benchmarks/step.py"),
        (["naive", "--width", "30"], "width=30, expected a multiple of 64"),
        (["naive", "--json", "nowhere/record.json"], "there is no directory nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, arguments, "training") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_variants_of_a_step_take_turns_and_compute_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--layers", "1", "--batch", "2", "--length", "32", "--repeats", "2", "--warmup", "0"]
    assert run(app, ["steps", *small, "--precision", "float32", "--against", str(ROOT)], "training") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {"before", "now"} < {line[0] for line in lines if line}
    (now,) = (line for line in lines if line[:1] == ["now"])
    assert float(now[-2]) == 0  # "gradients"
    assert largest_difference({"w": torch.tensor([1.0, 4.5])}, {"w": torch.tensor([1.0, 4.0])}) == 0.125


def test_a_record_names_the_commit_that_was_measured() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode or Path(colada.__file__).parents[2] != ROOT:
        pytest.skip("colada is not run from a git checkout")
    assert made_with(torch.device("cpu"))["commit"].removesuffix("+") == head.stdout.strip()
