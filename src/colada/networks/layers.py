"""What both networks are built of: rotary positions, packed attention, and the KV cache it may see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from colada.errors import ColadaError
from colada.networks.dropout import Masks
from colada.networks.packing import Layout, Range


def inverse_frequencies(dims: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """Return the rotary frequencies theta^(-2k/dims), k = 0..dims/2-1, float32 (dims/2,)."""
    return 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)


@lru_cache(maxsize=64)
def kept_frequencies(dims: int, theta: float, device: torch.device) -> Tensor:
    """Return :func:`inverse_frequencies` as a CPU computes them, kept so that no pass waits for a copy."""
    with torch.inference_mode(False):
        return inverse_frequencies(dims, theta, "cpu").to(device)


def rotary_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, float32 (N, 1, dims/2), ready to broadcast over heads.

    The table is made from the positions themselves, not looked up by length:
    the two copies of a training row share positions.
    """
    angles = positions.to(torch.float32)[:, None, None] * frequencies.to(positions.device)
    return angles.cos(), angles.sin()


def rotations(positions: Tensor, dims: int, width: int, theta: float, places: Tensor | None = None) -> Tensor:
    """Return e^(i position frequency) as pairs, float32 (N, 1, width/2, 2), for :func:`rotate_interleaved`.

    Channels from ``dims`` on turn with frequency zero: they pass through, in the same product.

    Args:
        places: int64 (N, 2), rows and columns in a picture, 0 of text: every second frequency turns by the
            position plus the row, the others by the position plus the column.
    """
    frequencies = F.pad(kept_frequencies(dims, theta, positions.device), (0, (width - dims + 1) // 2))
    if places is None:
        angles = positions.to(torch.float32)[:, None, None] * frequencies
    else:
        both = (positions[:, None] + places).repeat(1, (len(frequencies) + 1) // 2)[:, : len(frequencies)]
        angles = both.to(torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate_interleaved(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the channels of x (N, K, D), in pairs (2k, 2k+1), in float32: one complex product."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # Compiled code has no complex products, but fuses real ones.
        cos, sin = rotation.unbind(-1)
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)


def rotate_half_split(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate all channels of x (N, K, D), pairing the first half with the second, in float32."""
    cos, sin = table
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU by its tanh approximation, x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    if torch.compiler.is_compiling():
        # The same by (1 + tanh u) / 2 = sigmoid(2 u): compiled, an exponential is much faster than a tanh.
        y = x.float()
        return (y * torch.sigmoid(y * (1.5957691216057308 + 0.07135481627260025 * y * y))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


class KVCache:
    """The keys and values of one sample's finished blocks: rotated and normalised, one pair a layer.

    Attributes:
        layers: per layer, keys and values, each (positions, K, D); empty until the first append.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Return the number of its positions."""
        return self.layers[0][0].shape[0] if self.layers else 0

    def copy(self) -> KVCache:
        """Return a KV cache of the same positions; what is appended to one is not in the other."""
        copied = KVCache()
        copied.layers = list(self.layers)
        return copied

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append keys and values (L, K, D) of new positions to one layer."""
        if layer == len(self.layers):
            # A copy, so that the KV cache does not keep the whole pass it came from alive.
            self.layers.append((keys.clone(), values.clone()))
        else:
            old_keys, old_values = self.layers[layer]
            self.layers[layer] = torch.cat([old_keys, keys]), torch.cat([old_values, values])


FLEX_WIDTH = 16  # The narrowest head of FlexAttention's kernels.
FLEX_SHAPES = 128
"""Shapes for which FlexAttention is compiled; torch's own limit of 8 is met by a run's last micro-batches."""


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention as a compiled kernel; beyond the limit of shapes an error, and not its dense scores."""
    if q.shape[-1] < FLEX_WIDTH:
        raise ColadaError(f"heads of {q.shape[-1]} channels, expected at least {FLEX_WIDTH} on a GPU")
    with torch._dynamo.config.patch(recompile_limit=FLEX_SHAPES, fail_on_recompile_limit_hit=True):
        return _compiled_flex()(q, k, v, block_mask=mask)


def _scores_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention by two products, its softmax in float32; arguments as :func:`_attention`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """Attend in one tile: q (B, K, Q, D), k and v (B, K, keys, D); the mask is over the last keys."""
    if isinstance(mask, BlockMask):
        return _flex(q, k, v, mask)
    if mask is not None:
        mask = F.pad(mask, (k.shape[2] - mask.shape[-1], 0), value=True)
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # The backward pass of torch's own kernel takes three times as long in bfloat16 on a CPU.
        return _scores_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class _Pieces:
    """Ranges of positions of x (B, K, L, D).

    Where gradients are wanted, x is split once: the backward pass then joins the pieces, in place of adding
    up one tensor of the whole length for each range.
    """

    def __init__(self, x: Tensor, ranges_of: Iterable[Sequence[Range]]) -> None:
        self._x = x
        ends = sorted({end for ranges in ranges_of for both in ranges for end in both} | {0, x.shape[2]})
        self._starts = {start: number for number, start in enumerate(ends)}
        sizes = [end - start for start, end in pairwise(ends)]
        self._parts = x.split(sizes, 2) if x.requires_grad and len(sizes) > 1 else None

    def __getitem__(self, ranges: Sequence[Range]) -> Tensor:
        if self._parts is None:
            parts = [self._x[:, :, start:end] for start, end in ranges]
        else:
            at = self._starts
            parts = [part for start, end in ranges for part in self._parts[at[start] : at[end]]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    caches: Sequence[KVCache | None] | None = None,
    layer: int = 0,
) -> Tensor:
    """Scaled dot-product attention of packed queries, each sample to its own KV cache and new positions.

    Args:
        q: (N, K, D), the new positions, rotated and normalised; or those of the noisy cells only.
        k, v: (N, K, D), likewise.
        layout: the packing; its ``cached`` lengths must be those of ``caches``.
        caches: per sample, or None where a sample has none.
        layer: which layer of the KV caches to read.

    Returns: (N, K, D), of the queries given.

    Raises:
        ColadaError: for heads that FlexAttention cannot compute on a GPU.
    """
    outputs = []
    groups = layout.groups if len(q) == len(k) else layout.noisy_groups
    for group in groups:
        asking = group.index if group.queries is None else group.queries
        gq, gk, gv = (
            # index_select, not [index]: its backward is half as dear.
            (x if index is None else x.index_select(0, index))
            .unflatten(0, (len(group.samples), length))
            .transpose(1, 2)
            for x, index, length in (
                (q, asking, group.asking),
                (k, group.index, group.length),
                (v, group.index, group.length),
            )
        )
        if caches is not None and layout.cached[group.samples[0]] > 0:
            past = [caches[sample].layers[layer] for sample in group.samples]  # type: ignore[union-attr]
            gk = torch.cat([torch.stack([keys for keys, _ in past]).transpose(1, 2), gk], 2)
            gv = torch.cat([torch.stack([values for _, values in past]).transpose(1, 2), gv], 2)
        queries = _Pieces(gq, (tile.queries for tile in group.tiles))
        keys, values = (_Pieces(x, (tile.keys for tile in group.tiles)) for x in (gk, gv))
        parts: dict[int, Tensor] = {}
        for tile in group.tiles:
            out = _attention(queries[tile.queries], keys[tile.keys], values[tile.keys], tile.mask)
            sizes = [end - start for start, end in tile.queries]
            parts |= dict(zip((start for start, _ in tile.queries), out.split(sizes, 2), strict=True))
        ordered = [parts[start] for start in sorted(parts)]
        out = ordered[0] if len(ordered) == 1 else torch.cat(ordered, 2)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if not outputs:
        return torch.empty_like(q)
    if len(outputs) == 1:
        return outputs[0]
    order = torch.cat([group.index if group.queries is None else group.queries for group in groups])  # type: ignore[misc]
    return torch.cat(outputs).index_select(0, order.argsort())


def append(
    caches: Sequence[KVCache | None], layer: int, keys: Tensor, values: Tensor, layout: Layout
) -> None:
    """Append each sample's new keys and values, packed (N, K, D), to its KV cache."""
    per_sample = zip(keys.split(layout.lengths), values.split(layout.lengths), strict=True)
    for cache, (k, v) in zip(caches, per_sample, strict=True):
        if cache is not None:
            cache.append(layer, k, v)


TableT = TypeVar("TableT", covariant=True)
"""The rotary positions of a pass: cosines and sines of :func:`rotary_table`, or :func:`rotations`."""


class Shared(Protocol[TableT]):
    """What all layers of one pass share, however its rows are arranged.

    Attributes:
        table: rotary positions of the rows.
    """

    @property
    def table(self) -> TableT:
        """See :data:`TableT`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attend in one layer: q, k, v (N, K, D) -> (N, K, D)."""


@dataclass(frozen=True)
class Pass(Generic[TableT]):
    """What all layers of one forward pass share.

    Attributes:
        layout: the packing.
        table: rotary positions of its rows.
        caches: what each sample sees before its new positions, or None.
        appending: append the new positions to the KV caches.
        dropout: of its rows, or None.
    """

    layout: Layout
    table: TableT
    caches: Sequence[KVCache | None] | None = None
    appending: bool = False
    dropout: Masks | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attend in one layer, see :func:`attend`, and append its keys and values if so asked."""
        out = attend(q, k, v, self.layout, self.caches, layer)
        if self.appending and self.caches is not None:
            append(self.caches, layer, k, v, self.layout)
        return out
