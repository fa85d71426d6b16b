"""Where models are looked for, and what is said of paths that nearly fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from colada.errors import ColadaError
from colada.locate import find_tokenizer, locate


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, one that has only checkpoints, and a folder of something else, in ``runs/``."""
    monkeypatch.chdir(tmp_path)
    for part in ("debug/model/cola_dit", "debug/model/cola_vae", "other"):
        (tmp_path / "runs" / part).mkdir(parents=True)
    (tmp_path / "runs/debug/model/cola_dit/config.json").write_text("{}")
    checkpoint = tmp_path / "runs/young/checkpoints/vae-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        ("runs/debug", "did you mean runs/debug/model?"),
        ("runs/debug/model/cola_dit", "did you mean runs/debug/model?"),
        ("runs/debug/model/cola_dit/config.json", "did you mean runs/debug/model?"),
        ("runs/debgu/model", "did you mean runs/debug?"),
        ("./runs/debug/modle", "did you mean runs/debug/model?"),
        ("runs/young/model", "colada export runs/young/checkpoints/... runs/young/model"),
        ("runs/young", "colada export runs/young/checkpoints/... MODEL"),
        (
            "runs/young/checkpoints/vae-00000010",
            "colada export runs/young/checkpoints/vae-00000010 MODEL",
        ),
    ],
)
def test_a_path_that_nearly_fits_gets_a_hint(runs: Path, where: str, hint: str) -> None:
    with pytest.raises(ColadaError) as caught:
        locate(where)
    assert str(caught.value).endswith(")")
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_of_two_parts_gets_its_hint_when_the_hub_has_no_such_repository(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("refused")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ColadaError, match=r"\(did you mean runs/debug\?\)"):
        locate("runs/debgu")


def test_a_folder_of_something_else_is_refused_without_a_guess(runs: Path) -> None:
    with pytest.raises(ColadaError, match=r"cola_dit/ and cola_vae/ are missing$"):
        locate(runs / "other")


def test_a_repository_laid_out_as_the_released_one_is_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its networks are in ``cola_dlm/``, its tokenizer beside that."""
    for part in ("cola_dit", "cola_vae"):
        (tmp_path / "cola_dlm" / part).mkdir(parents=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    for found in (locate("owner/name"), locate(tmp_path)):
        assert found == tmp_path / "cola_dlm"
        assert find_tokenizer(found) == tmp_path / "tokenizer.json"


def test_a_repository_of_something_else_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ColadaError, match="hub repository 'owner/name' holds no model"):
        locate("owner/name")


def test_nothing_here_imports_torch_or_the_hub() -> None:
    code = "import sys, colada.locate; sys.exit(bool({'torch', 'huggingface_hub'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
