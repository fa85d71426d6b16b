"""The measurements of docs/pictures.md: their commands, on a few scenes."""

from __future__ import annotations

from pathlib import Path

import pytest

from colada.models.load import load_cola
from colada.pictures.config import CodecConfig
from colada.pictures.load import load_picture
from colada.pictures.shapes import example
from experiments.pictures import measures
from experiments.pictures.__main__ import main


def cells(output: str) -> list[list[str]]:
    """The rows of a Markdown table, without titles."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_reader_is_right_of_true_pictures_and_chance_is_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reader", "--count", "20", "--markdown"]) == 0
    rows = cells(capsys.readouterr().out)
    assert len(rows) == 4
    assert all(row[1].startswith("1.000 [0.8") for row in rows)
    assert all(float(row[2].split()[0]) < 0.15 for row in rows)


def test_codecs_keep_more_with_more_channels(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["codec", "--count", "12", "--fitted-on", "1000", "--vae-steps", "2", "--vae-width", "8"]
    assert main([*arguments, "--markdown"]) == 0
    rows = cells(capsys.readouterr().out)
    assert [row[1] for row in rows] == ["16 × 64", "16 × 48", "16 × 32", "64 × 16", "64 × 24", "16 × 64"]
    variance, decibels = [float(row[3]) for row in rows], [float(row[4]) for row in rows]
    assert 1 > variance[0] > variance[1] > variance[2] > 0.9
    assert decibels[0] > decibels[1] > decibels[2] > 24
    assert float(rows[0][5]) > 0.9
    assert decibels[5] < 20  # Two steps teach nothing.


def test_a_vae_is_trained_and_calibrated() -> None:
    config = CodecConfig(kind="conv_vae", patch=8, channels=4, width=8)
    codec = measures.trained_vae(config, 1)
    latents = codec.encode(measures.stack(measures.validation_scenes(50)))
    assert latents.square().mean().item() == pytest.approx(1.0, rel=0.5)


def test_the_bundled_model_spells_captions() -> None:
    ((count, _, tokens, captions),) = measures.captions_table(load_cola(), 20).rows
    assert count == "20"
    assert tokens.startswith("1.000")
    assert captions.startswith("1.000")


def test_a_sheet_of_scenes_is_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL", reason="pictures are read by Pillow: colada-lm[pictures]")
    out = tmp_path / "sheet.png"
    assert main(["sheet", str(out), "--count", "3", "--columns", "2", "--show"]) == 0
    kinds = [change.kind for change in load_picture(out, 66).changes]
    assert kinds == ["scaled"]  # From 4 × (2 × 32 + 2).
    assert example(0, 0).caption in capsys.readouterr().out
    assert main(["sheet", str(out), "--source", "shapes:onne"]) == 2
