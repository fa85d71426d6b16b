"""Parity with the reference implementation's own outputs, and that the comparison can fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colada.cli.parity import relative_error, report, run_case
from colada.errors import ColadaError
from helpers import read_safetensors, write_safetensors

SINGLE_PASSES = ("encode_mean", "encode_logvar", "decode", "velocity")


@pytest.fixture
def case(parity_cases: list[Path], tmp_path: Path) -> Path:
    """A copy of the smallest fixture, to damage."""
    smallest = min(parity_cases, key=lambda path: (path / "expected.safetensors").stat().st_size)
    target = tmp_path / "case"
    # The originals may be read-only.
    for file in smallest.rglob("*"):
        if file.is_file():
            copy = target / file.relative_to(smallest)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return target


def test_every_fixture_holds_at_3e_6_in_single_passes_and_1e_5_in_generation(
    parity_cases: list[Path],
) -> None:
    for directory in parity_cases:
        errors = run_case(directory)
        for part in SINGLE_PASSES:
            assert errors[part] <= 3e-6, (directory.name, part)
        for part in ("latents", "logits", "engine_latents", "engine_logits"):
            assert errors[part] <= 1e-5, (directory.name, part)
        assert errors["tokens_equal"] is True, directory.name


def _perturb(case: Path, part: str, name: str, amount: float) -> None:
    file = case / part / "model.safetensors"
    tensors: dict[str, Any] = read_safetensors(file)
    kind, shape, data = tensors[name]
    values = np.frombuffer(data, "<f4").copy()
    values[0] += amount
    tensors[name] = (kind, shape, values.tobytes())
    write_safetensors(file, tensors)


@pytest.mark.parametrize(
    ("part", "name", "seen"),
    [
        ("cola_dit", "blocks.0.mlp.proj_in.bias", {"velocity", "latents", "engine_latents"}),
        (
            "cola_vae",
            "encoder.blocks.0.ffn_out.bias",
            {"encode_mean", "encode_logvar", "latents", "engine_latents"},
        ),
        ("cola_vae", "decoder.final_layer.bias", {"decode", "logits", "engine_logits"}),
    ],
)
def test_one_weight_off_by_a_thousandth_is_noticed_where_it_is(
    case: Path, capsys: pytest.CaptureFixture[str], part: str, name: str, seen: set[str]
) -> None:
    _perturb(case, part, name, 1e-3)
    assert report(case, 1e-5) == 1
    line = json.loads(capsys.readouterr().out)
    assert line["ok"] is False
    for own in SINGLE_PASSES:
        assert (line[own] > 1e-5) == (own in seen), own
    assert all(line[own] > 1e-5 for own in seen)


def test_other_tokens_are_noticed_though_all_numbers_hold(
    case: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((case / "case.json").read_text())
    values["generated"][0][0] += 1
    (case / "case.json").write_text(json.dumps(values))
    assert report(case, 1e-5) == 1
    line = json.loads(capsys.readouterr().out)
    assert line["tokens_equal"] is False
    assert line["ok"] is False


def test_the_tolerance_decides(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(case, 1e-12) == 1
    assert json.loads(capsys.readouterr().out)["tolerance"] == 1e-12


def test_a_fixture_that_holds_is_one_json_line(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(case, 1e-5) == 0
    (text,) = capsys.readouterr().out.splitlines()
    line = json.loads(text)
    assert line["ok"] is True
    assert set(line) >= {*SINGLE_PASSES, "latents", "logits", "tokens_equal", "case", "tolerance"}


def test_an_incomplete_fixture_is_refused_by_name(case: Path) -> None:
    file = case / "expected.safetensors"
    tensors = read_safetensors(file)
    tensors.pop("dit.drift")
    write_safetensors(file, tensors)
    with pytest.raises(ColadaError, match=r"no complete fixture: 'dit\.drift' is missing"):
        run_case(case)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ColadaError, match=r"expected\.safetensors is truncated"):
        run_case(case)
    shutil.rmtree(case / "cola_dit")
    file.write_bytes(b"")
    with pytest.raises(ColadaError, match=r"expected\.safetensors is truncated"):
        run_case(case)


@pytest.mark.parametrize(
    "damage",
    [{"n_blocks": 1.5}, {"prompts": 5}, {"settings": []}, {"pad_token_id": "x"}, {"generated": 2.5}],
    ids=str,
)
def test_a_fixture_of_the_wrong_shape_is_one_line(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: dict[str, object]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(case, broken)
    (broken / "case.json").write_text(json.dumps({**json.loads((case / "case.json").read_text()), **damage}))
    with pytest.raises(ColadaError, match="is no fixture"):
        run_case(broken)


def test_the_relative_error_is_the_largest_difference_over_the_largest_value_of_all() -> None:
    theirs = [torch.tensor([1.0, -4.0]), torch.tensor([[8.0]])]
    ours = [torch.tensor([1.5, -4.0]), torch.tensor([[7.0]])]
    assert relative_error(ours, theirs) == 1.0 / 8.0
    assert relative_error(theirs, theirs) == 0.0


def test_the_relative_error_is_infinite_for_other_shapes_and_for_nan() -> None:
    assert relative_error([torch.zeros(2)], [torch.ones(2, 1)]) == float("inf")
    assert relative_error([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_relative_error_is_infinite_wherever_the_nan_is(at: int) -> None:
    ours = [torch.ones(2) for _ in range(3)]
    ours[at][1] = float("nan")
    assert relative_error(ours, [torch.ones(2)] * 3) == float("inf")
