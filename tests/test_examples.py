"""The examples run as they are: the minimal training script, and the notebook's cells."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

import colada

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_minimal", EXAMPLES / "train_minimal.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_minimal_training_script_learns_and_saves_a_model(
    minimal: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = minimal.main(["--steps", "30", "4", "--out", str(tmp_path / "model")])
    printed = capsys.readouterr().out
    (nll,) = map(float, re.findall(r"stage 1 step 30/30 .* nll ([\d.]+)", printed))
    assert nll < math.log(model.vocab_size) / 2, "half of what knowing nothing costs"
    assert "stage 2 step 4/4" in printed
    loaded = colada.load(tmp_path / "model")
    assert (
        printed.splitlines()[-1]
        == f"One morning{loaded.generate('One morning', 48)[0].text}".splitlines()[-1]
    )


def test_too_short_a_text_is_said_before_anything_is_trained(minimal: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    with pytest.raises(SystemExit, match=r"short\.txt has \d+ tokens, expected more than a row of 64"):
        minimal.main([str(text), "--vocab-size", "260"])


def test_the_notebook_s_cells_run_in_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.switch_backend("agg")
    notebook = json.loads((EXAMPLES / "latents.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in code:
        exec("".join(cell["source"]), names)
    plt.close("all")
    printed = capsys.readouterr().out
    assert "100% of the tokens survive" in printed
    assert len(re.findall(r"^block \d", printed, re.MULTILINE)) > 5
    assert len(names["steps"]) == 3 * 16, "the latents of every step of three blocks"  # type: ignore[arg-type]
    assert any(output.get("data", {}).get("image/png") for cell in code for output in cell["outputs"])
