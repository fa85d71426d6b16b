"""Fewer bits: near the same numbers, from less memory, and refused where it cannot be."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from colada.errors import ColadaError
from colada.models.load import load
from helpers import tiny_model

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


@needs_torchao
def test_int8_weights_are_rounded_by_output_channel() -> None:
    model = tiny_model()
    exact = model.dit.blocks[0].mlp.proj_in.weight.detach().clone()
    ada = model.dit.blocks[0].ada.msa_in[1].weight
    model.quantise("int8")
    weight = model.dit.blocks[0].mlp.proj_in.weight
    # Half a step of the largest weight of a row over 127.
    step = exact.abs().amax(1, keepdim=True) / 127
    rounded = weight.dequantize()
    assert 0 < ((rounded - exact).abs() / step).max() <= 0.51
    assert model.dit.blocks[0].ada.msa_in[1].weight is ada
    assert type(model.vae.encoder.blocks[0].ffn_proj.weight) is torch.nn.Parameter


@needs_torchao
def test_the_bundled_model_in_int8_writes_on() -> None:
    exact, rounded = (
        model.generate("Once upon a time", 16)[0] for model in (load(), load().quantise("int8"))
    )
    assert len(rounded.tokens) == 16
    assert sum(a == b for a, b in zip(exact.tokens, rounded.tokens, strict=True)) >= 4


@needs_torchao
def test_a_quantised_model_is_neither_quantised_again_nor_saved(tmp_path: Path) -> None:
    model = tiny_model().quantise("int8")
    with pytest.raises(ColadaError, match="is quantised already, to int8"):
        model.quantise("int8")
    with pytest.raises(ColadaError, match="a model quantised to int8 cannot be saved"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_cannot_be_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with pytest.raises(ColadaError, match="quantise='int4', expected one of 'int8'"):
        model.quantise("int4")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ColadaError, match=r"needs torchao: pip install 'colada-lm\[quant\]'"):
        model.quantise("int8")
    assert model.quantised is None
