"""Matrix products as fast as the machine has them, of weights as they are stored or of packed copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
"""x (N, in) to (N, out)."""

ONEDNN = torch.backends.mkldnn.is_available()

PACKED_BYTES = 2**29
"""The most that packed copies of an engine's weights may take; above, it computes on the stored ones."""


def has_onednn(weight: Tensor) -> bool:
    """Return whether oneDNN can multiply by weights like this one: dense float32 or bfloat16 on a CPU."""
    dense = type(weight) in (Tensor, nn.Parameter)  # not a quantised kind
    # Where a processor has no instructions for bfloat16, oneDNN may refuse it.
    exact = weight.dtype == torch.float32
    known = exact or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dense and weight.device.type == "cpu" and known and ONEDNN


def fits_packed(layers: Iterable[nn.Linear]) -> bool:
    """Return whether copies of these layers' weights fit into :data:`PACKED_BYTES`, all of them."""
    return sum(layer.weight.nbytes for layer in layers) <= PACKED_BYTES


def plain_product(layer: nn.Linear, *, gelu: bool = False) -> Product:
    """Return a layer as torch computes it, with gradients; see :func:`product`."""
    return (lambda x: F.gelu(layer(x), approximate="tanh")) if gelu else layer


def product(layer: nn.Linear, *, gelu: bool = False, packed: bool = False) -> Product:
    """Return a layer as a function, followed by a tanh-approximate GELU if asked.

    On a CPU, :func:`torch.nn.functional.linear` goes to the BLAS library in float32; oneDNN,
    which compiled models use, is faster at the few rows of a block, and fuses the GELU.

    Args:
        layer: whose bias, and unless packed whose weight, is used as it is.
        gelu: apply it.
        packed: multiply by a copy of the weight as it is now, in the order in which oneDNN reads it. At few
            rows reading the weights takes the time, and the stored order, an output after the other, is
            one of long strides to it. Without oneDNN there is no copy.
    """
    if not has_onednn(layer.weight):
        return plain_product(layer, gelu=gelu)
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()) if packed else layer.weight
    run, bias = torch.ops.mkldnn._linear_pointwise.default, layer.bias
    after: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def call(x: Tensor) -> Tensor:
        out: Tensor = run(x, weight, bias, *after)
        return out

    return call
