"""What both networks are built of: rotary positions, packed attention, and the history it may see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from colada.errors import ColadaError
from colada.packing import Layout


def inverse_frequencies(dims: int, theta: float) -> Tensor:
    """Return the rotary frequencies theta^(-2k/dims), k = 0..dims/2-1, float32 (dims/2,)."""
    return 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)


def rotary_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, float32 (N, 1, dims/2), ready to broadcast over heads.

    The table is made from the positions themselves, not looked up by length:
    the two copies of a training row share positions.
    """
    angles = positions.to(torch.float32)[:, None, None] * frequencies.to(positions.device)
    return angles.cos(), angles.sin()


def rotate_interleaved(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first channels of x (N, K, D), in pairs (2k, 2k+1), in float32; the rest pass through."""
    cos, sin = table
    dims = 2 * cos.shape[-1]
    even, odd = x[..., :dims].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)
    return turned if dims == x.shape[-1] else torch.cat([turned, x[..., dims:]], -1)


def rotate_half_split(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate all channels of x (N, K, D), pairing the first half with the second, in float32."""
    cos, sin = table
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class History:
    """The committed keys and values of one sample: rotated and normalised, one pair a layer.

    Attributes:
        layers: per layer, keys and values, each (positions, K, D); empty until the first commit.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Return the number of committed positions."""
        return self.layers[0][0].shape[0] if self.layers else 0

    def copy(self) -> History:
        """Return a history of the same positions; what is appended to one is not in the other."""
        copied = History()
        copied.layers = list(self.layers)
        return copied

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append keys and values (L, K, D) of new positions to one layer."""
        if layer == len(self.layers):
            # A copy, so that the history does not keep the whole pass it came from alive.
            self.layers.append((keys.clone(), values.clone()))
        else:
            old_keys, old_values = self.layers[layer]
            self.layers[layer] = torch.cat([old_keys, keys]), torch.cat([old_values, values])


FLEX_WIDTH = 16  # The narrowest head of FlexAttention's kernels.


@lru_cache(maxsize=1)
def _flex() -> Callable[..., Tensor]:
    """FlexAttention as a compiled kernel; uncompiled it would make the dense scores."""
    return torch.compile(flex_attention, dynamic=False)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    histories: Sequence[History | None] | None = None,
    layer: int = 0,
) -> Tensor:
    """Scaled dot-product attention of packed queries, each sample to its own history and new positions.

    Args:
        q, k, v: (N, K, D), the new positions, rotated and normalised.
        layout: the packing; its ``history`` lengths must be those of ``histories``.
        histories: per sample, or None where a sample has none.
        layer: which layer of the histories to read.

    Returns: (N, K, D).

    Raises:
        ColadaError: for heads that FlexAttention cannot compute on a GPU.
    """
    outputs = []
    for group in layout.groups:
        shape = (len(group.samples), group.length)
        gq, gk, gv = (
            (x if group.index is None else x[group.index]).unflatten(0, shape).transpose(1, 2)
            for x in (q, k, v)
        )
        if histories is not None and layout.history[group.samples[0]] > 0:
            past = [histories[sample].layers[layer] for sample in group.samples]  # type: ignore[union-attr]
            gk = torch.cat([torch.stack([keys for keys, _ in past]).transpose(1, 2), gk], 2)
            gv = torch.cat([torch.stack([values for _, values in past]).transpose(1, 2), gv], 2)
        if isinstance(group.mask, BlockMask):
            if q.shape[-1] < FLEX_WIDTH:
                raise ColadaError(f"heads of {q.shape[-1]} channels, expected at least {FLEX_WIDTH} on a GPU")
            out = _flex()(gq, gk, gv, block_mask=group.mask)
        else:
            out = F.scaled_dot_product_attention(gq, gk, gv, attn_mask=group.mask)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if not outputs:
        return torch.empty_like(q)
    if len(outputs) == 1:
        return outputs[0]
    order = torch.cat([group.index for group in layout.groups])  # type: ignore[misc]
    return torch.cat(outputs)[order.argsort()]


def commit(
    histories: Sequence[History | None], layer: int, keys: Tensor, values: Tensor, layout: Layout
) -> None:
    """Append each sample's new keys and values, packed (N, K, D), to its history."""
    per_sample = zip(keys.split(layout.lengths), values.split(layout.lengths), strict=True)
    for history, (k, v) in zip(histories, per_sample, strict=True):
        if history is not None:
            history.append(layer, k, v)


class Shared(Protocol):
    """What all layers of one pass share, however its rows are arranged.

    Attributes:
        table: rotary cosines and sines of the rows' positions.
    """

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        """See :func:`rotary_table`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attend in one layer: q, k, v (N, K, D) -> (N, K, D)."""


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward pass share.

    Attributes:
        layout: the packing.
        table: rotary cosines and sines of its positions.
        histories: what each sample sees before its new positions, or None.
        committing: append the new positions to the histories.
    """

    layout: Layout
    table: tuple[Tensor, Tensor]
    histories: Sequence[History | None] | None = None
    committing: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attend in one layer, see :func:`attend`, and commit its keys and values if so asked."""
        out = attend(q, k, v, self.layout, self.histories, layer)
        if self.committing and self.histories is not None:
            commit(self.histories, layer, k, v, self.layout)
        return out
