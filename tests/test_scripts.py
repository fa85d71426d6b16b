"""The scripts behind the documents' figures still start: what they import is there."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "experiments").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
SCRIPTS = [path for path in SCRIPTS if "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package:RuntimeWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_how_it_is_used(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [script.name, "--help"])
    code: object = None
    try:
        runpy.run_module(f"{script.parent.name}.{script.stem}", run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert not code
    assert "usage" in capsys.readouterr().out.lower()
