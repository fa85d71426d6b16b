"""Models as differences of low rank to others: what is written, what it makes again, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import colada
from colada.cli.main import main
from colada.errors import ColadaError
from colada.models.cola import ColaDLM
from colada.models.difference import low_rank, save_difference
from colada.networks.checkpoint import read_configs
from colada.train.trainer import Trainer
from helpers import tiny_model
from runs import recipe

RANK = 2


def moved(model: ColaDLM, rank: int) -> ColaDLM:
    """A copy whose matrices of blocks are moved by products of a rank, and one bias by numbers."""
    seeded = torch.Generator().manual_seed(1)
    other = tiny_model(generation={"steps": 3, "guidance": 1.0})
    with torch.no_grad():
        for (name, to), start in zip(other.dit.named_parameters(), model.dit.parameters(), strict=True):
            to.copy_(start)
            if name.startswith("blocks.") and to.ndim == 2:
                parts = [
                    torch.randn(*shape, generator=seeded) for shape in ((len(to), rank), (rank, to.shape[1]))
                ]
                to += 0.02 * parts[0] @ parts[1]
        other.dit.txt_out.proj.bias += 0.1
    other.chat_template = "{{ messages[0]['content'] }}"
    return other


def test_products_are_the_nearest_of_their_rank() -> None:
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    up, down = low_rank(matrix, 3)
    left = float((matrix - up @ down).square().sum())
    assert left == pytest.approx(float(torch.linalg.svdvals(matrix)[3:].square().sum()), rel=1e-4)


def test_a_model_of_low_rank_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_model()
    base.save(tmp_path / "base")
    model = moved(base, RANK)
    left_out = save_difference(model, base, str(tmp_path / "base"), tmp_path / "small", RANK)
    assert left_out < 1e-4  # Of bfloat16.
    assert len({path.stat().st_mode for path in (tmp_path / "small").iterdir()}) == 1
    again = colada.load(tmp_path / "small")
    assert isinstance(again, ColaDLM)
    for (name, value), expected in zip(again.dit.named_parameters(), model.dit.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=2e-3, msg=name)
    assert torch.equal(again.dit.txt_out.proj.bias, model.dit.txt_out.proj.bias)
    assert again.generation == model.generation
    assert again.chat_template == model.chat_template
    assert read_configs(tmp_path / "small") == (model.vae.config, model.dit.config)
    assert (
        colada.load(tmp_path / "small", dtype=torch.bfloat16).dit.txt_out.proj.weight.dtype == torch.bfloat16
    )
    assert main(["info", str(tmp_path / "small")]) == 0
    assert "difference.safetensors" in capsys.readouterr().out
    again.save(tmp_path / "whole")  # A model like any other.
    assert (
        main(["export", str(tmp_path / "whole"), str(tmp_path / "again"), "--base", str(tmp_path / "base")])
        == 0
    )
    size = sum(path.stat().st_size for path in (tmp_path / "small").iterdir())
    assert size < 0.5 * (tmp_path / "base" / "cola_dit" / "model.safetensors").stat().st_size


def test_a_whole_difference_is_made_again_to_half_a_step_of_each_row(tmp_path: Path) -> None:
    base = tiny_model()
    base.save(tmp_path / "base")
    model = moved(base, 4)
    model.save(tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(tmp_path / "small"), "--base", str(tmp_path / "base"), "--int8"]
    assert main(["export", *arguments]) == 0
    again = colada.load(tmp_path / "small")
    assert isinstance(again, ColaDLM)
    start = dict(base.dit.named_parameters())
    for (name, value), expected in zip(again.dit.named_parameters(), model.dit.parameters(), strict=True):
        wide = expected.ndim == 2
        steps = (expected - start[name]).abs().amax(1, keepdim=True) / 127 if wide else torch.zeros(1)
        assert bool(((value - expected).abs() <= 0.501 * steps + 1e-6).all()), name
    assert main(["export", *arguments, "--rank", "2"]) == 2

    file = tmp_path / "small" / "difference.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name + "_scale" in tensors)
    for damaged in ({name + "_scale": torch.ones(2, 1)}, {name: tensors[name].float()}):
        save_file({**tensors, **damaged}, file)
        with pytest.raises(ColadaError, match=f"{name} is no difference to a tensor"):
            colada.load(tmp_path / "small")
    save_file({key: x for key, x in tensors.items() if key != name + "_scale"}, file)
    with pytest.raises(ColadaError, match=f"{name} is no difference to a tensor"):
        colada.load(tmp_path / "small")


def test_a_model_is_written_anew_where_it_lies(tmp_path: Path) -> None:
    model, where = tiny_model(), tmp_path / "model"
    model.save(where)
    before = (where / "cola_dit" / "model.safetensors").stat().st_size
    assert main(["export", str(where), str(where), "--int8"]) == 0
    assert (where / "cola_dit" / "model.safetensors").stat().st_size < 0.6 * before
    colada.load(where)


def test_less_than_its_rank_leaves_out_what_it_says(tmp_path: Path) -> None:
    base = tiny_model()
    base.save(tmp_path / "base")
    assert 0.05 < save_difference(moved(base, 4), base, str(tmp_path / "base"), tmp_path / "small", 2) < 0.9


def test_what_is_no_difference_to_what_is_here_is_refused(tmp_path: Path) -> None:
    base, model = tiny_model(), moved(tiny_model(), RANK)
    base.save(tmp_path / "base")
    save_difference(model, base, str(tmp_path / "base"), tmp_path / "small", RANK)
    with pytest.raises(ColadaError, match="holds something else"):
        save_difference(model, base, "x", tmp_path / "base", RANK)
    with pytest.raises(ColadaError, match="other Text VAEs"):
        save_difference(model, tiny_model(seed=5), "x", tmp_path / "new", RANK)
    deeper = tiny_model(vae={"decoder_num_blocks": 3})
    with pytest.raises(ColadaError, match="other Text VAEs"):
        save_difference(model, deeper, "x", tmp_path / "new", RANK)
    file = tmp_path / "small" / "difference.json"
    about = json.loads(file.read_text())
    moved(base, 1).save(tmp_path / "base")
    with pytest.raises(ColadaError, match="is a difference to another"):
        colada.load(tmp_path / "small")
    file.write_text(json.dumps({**about, "base": str(tmp_path / "small")}))
    with pytest.raises(ColadaError, match="is a difference itself"):
        colada.load(tmp_path / "small")
    file.write_text(json.dumps({**about, "base": 3}))
    with pytest.raises(ColadaError, match="base=3, expected the name"):
        colada.load(tmp_path / "small")
    assert main(["export", "x", "y", "--rank", "3"]) == 2


def test_a_run_begins_with_a_difference(tmp_path: Path) -> None:
    Trainer(recipe("run.sample_every=0", "run.validate_every=0"), tmp_path / "run").run()
    start = colada.load(tmp_path / "run" / "model")
    assert isinstance(start, ColaDLM)
    other = colada.load(tmp_path / "run" / "model")
    assert isinstance(other, ColaDLM)
    with torch.no_grad():
        other.dit.txt_out.proj.bias += 1
    save_difference(other, start, str(tmp_path / "run" / "model"), tmp_path / "small", 1)
    init = [
        f"model.init={tmp_path / 'small'}",
        "model.vae={}",
        "model.dit={}",
        "stages.prior.steps=1",
        "stages.vae.steps=0",
    ]
    Trainer(recipe(*init, "stages.prior.lr=1.0e-9"), tmp_path / "next").run()
    after = colada.load(tmp_path / "next" / "model")
    assert isinstance(after, ColaDLM)
    torch.testing.assert_close(after.dit.txt_out.proj.bias, other.dit.txt_out.proj.bias, rtol=0, atol=1e-6)


def test_the_bundled_model_has_a_name() -> None:
    assert colada.load("bundled").origin == "bundled"
