"""Fewer bits for transformer layers: in memory through torchao (extra ``quant``), in files by row."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from colada.checks import choose
from colada.errors import ColadaError

QUANTISATIONS = {"int8": "Int8WeightOnlyConfig"}
"""By name, torchao's configuration: int8 weights by output channel."""


def quantise(networks: tuple[nn.Module, nn.Module], name: str) -> None:
    """Quantise the linear layers of both networks' blocks in place.

    The AdaLN matrices stay as they are: in generation they are only read to fill the table.

    Args:
        networks: the DiT, and the Text VAE's decoder.
        name: one of :data:`QUANTISATIONS`.

    Raises:
        ColadaError: for an unknown name, or if torchao is missing.
    """
    config = choose("quantise", name, QUANTISATIONS)
    logging.disable(logging.WARNING)  # torchao logs each of its own kernels that this machine has no use for
    try:
        import torchao.quantization as ao
    except ImportError:
        raise ColadaError(f"quantise={name!r} needs torchao: pip install 'colada-lm[quant]'") from None
    finally:
        logging.disable(logging.NOTSET)
    for network in networks:
        ao.quantize_(network.blocks, getattr(ao, config)(), filter_fn=_is_quantised)


def _is_quantised(module: nn.Module, name: str, *_: Any) -> bool:
    return isinstance(module, nn.Linear) and ".ada." not in name


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 (R, C) and float32 scales (R, 1) whose product is nearest to a matrix (R, C), row by row.

    Symmetric: a row's largest weight is 127 times its scale, so no weight is off by more than half of that.
    """
    scales = matrix.float().abs().amax(1, keepdim=True) / 127
    values = matrix.float() / torch.where(scales > 0, scales, 1.0)
    return values.round().clamp(-127, 127).to(torch.int8), scales


def dequantise_rows(values: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 matrix (R, C) of int8 (R, C) and the scales (R, 1) of its rows."""
    return values.float() * scales.float()
