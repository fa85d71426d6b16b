"""Matrix products as fast as the machine has them, on the weights as they are stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[[Tensor, nn.Linear], Tensor]
"""x (N, in), and a layer, to (N, out)."""


ONEDNN = torch.backends.mkldnn.is_available()


def _plain(x: Tensor, layer: nn.Linear) -> Tensor:
    out: Tensor = layer(x)
    return out


def _plain_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.gelu(layer(x), approximate="tanh")


def _onednn(x: Tensor, layer: nn.Linear) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return out


def _onednn_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
    return out


def linears(weight: Tensor) -> tuple[Linear, Linear]:
    """Return the linear map, and the one followed by a tanh-approximate GELU, for weights like this one.

    In float32 on a CPU, :func:`torch.nn.functional.linear` goes to the BLAS library; oneDNN, which
    compiled models use, is faster at the few rows of a block, and fuses the GELU.
    """
    dense = type(weight) in (Tensor, nn.Parameter)  # not a quantised kind
    if dense and weight.device.type == "cpu" and weight.dtype == torch.float32 and ONEDNN:
        return _onednn, _onednn_gelu
    return _plain, _plain_gelu
