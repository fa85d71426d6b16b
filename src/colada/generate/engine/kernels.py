"""Matrix products as fast as the machine has them, of weights as they are stored or of packed copies."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
"""x (N, in) to (N, out)."""

ONEDNN = torch.backends.mkldnn.is_available()

PACKED_BYTES = 2**29
"""The most that packed copies of weights may take; above, an engine computes on the stored ones."""


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


@dataclass(frozen=True)
class _Packed:
    """A packed copy of a layer's weight, and how the weight was when it was made.

    Attributes:
        weight: in the order in which oneDNN reads it.
        bytes: of the weight.
        place, version: where the weight was, and torch's count of its changes in place.
        sample: some of its elements, at least one of each row and of each column.
    """

    weight: Tensor
    bytes: int
    place: int
    version: int
    sample: Tensor


_PACKED: WeakKeyDictionary[nn.Linear, _Packed] = WeakKeyDictionary()
_PACKING = threading.Lock()


def _sample(weight: Tensor) -> Tensor:
    """Return every so-manieth element of a weight (out, in), at least one of each row and of each column."""
    rows, columns = weight.shape
    step = max(1, min(rows, columns) - 1)
    while math.gcd(step, columns) > 1:
        step -= 1
    return weight.detach().flatten()[::step].clone()


def packed_weight(layer: nn.Linear) -> Tensor:
    """Return a copy of a layer's weight in the order in which oneDNN reads it, kept until the weight changes.

    Changes are noticed by torch's own count of them, and those it does not count (``weight.data``) by a
    sample of the elements: any change of a whole row or column, and so every update of a matrix.
    """
    weight = layer.weight
    version = -1 if weight.is_inference() else weight._version
    with _PACKING, torch.inference_mode(False), torch.no_grad():
        # Outside inference mode, so that those who compute outside it may share the copy.
        sample = _sample(weight)
        stored = _PACKED.get(layer)
        fresh = stored is not None and (stored.place, stored.version) == (weight.data_ptr(), version)
        if stored is not None and fresh and torch.equal(stored.sample, sample):
            return stored.weight
        _PACKED.pop(layer, None)
        if sum(other.bytes for other in _PACKED.values()) + weight.nbytes > PACKED_BYTES:
            _PACKED.clear()
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        _PACKED[layer] = _Packed(packed, weight.nbytes, weight.data_ptr(), version, sample)
    return packed


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
        packed: multiply by a copy of the weight as it is now, see :func:`packed_weight`. At few
            rows reading the weights takes the time, and the stored order, an output after the other, is
            one of long strides to it. Without oneDNN there is no copy.
    """
    if not has_onednn(layer.weight):
        return plain_product(layer, gelu=gelu)
    weight = packed_weight(layer) if packed else layer.weight
    run, bias = torch.ops.mkldnn._linear_pointwise.default, layer.bias
    after: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def call(x: Tensor) -> Tensor:
        out: Tensor = run(x, weight, bias, *after)
        return out

    return call
