"""One pass of either network over rows of many requests, written for speed; the readable ones are the oracle.

The same, plainly: :meth:`colada.networks.dit.DiT.forward`, :meth:`colada.networks.vae.TextDecoder.forward`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from colada.flow import Evaluation, T
from colada.generate.engine.kernels import Product, fits_packed, plain_product, product
from colada.networks.dit import DiT, DiTBlock, DualBlock
from colada.networks.layers import rotate_interleaved

_KEPT_TIMESTEPS = 64

Moment = float | tuple[float, float]
"""A timestep in 0..1000; or, for a DiT with ``landing_time``, that and where its step ends."""


def _pair(moment: Moment) -> tuple[float, float]:
    """Return the timestep, and where its step ends: at itself where that is not told."""
    return moment if isinstance(moment, tuple) else (moment, moment)


def blocks_of(dit: DiT, pictures: bool) -> list[DiTBlock]:
    """Return the layers that text goes through, or those that pictures do."""
    blocks = [cast(DiTBlock, block) for block in dit.blocks]
    return [block.image if pictures and isinstance(block, DualBlock) else block for block in blocks]


class Modulation:
    """AdaLN by timestep: what every layer multiplies and adds, computed once for each timestep of a schedule.

    For each layer, six vectors a timestep: 1 + scale, shift and gate of the attention, then of the MLP.
    ``h = LN(x) * (1 + scale) + shift`` is then a LayerNorm whose weight and bias are table rows.
    The tables stay where they are while timesteps come and go, so that captured passes may read them.
    """

    def __init__(self, dit: DiT, pictures: bool = False) -> None:
        self._dit, self._pictures = dit, pictures
        self.version = 0  # of the tables' place: they move where more timesteps are wanted than they hold
        self._row: dict[Moment, int] = {}
        self._layers: list[Tensor] = []  # each (rows, 6, dim)
        self._output = torch.empty(0, 2, 0)
        self._views: dict[int, list[tuple[Tensor, ...]]] = {}

    def forget(self) -> None:
        """Have every timestep computed anew when it is next wanted: the weights may have changed."""
        self._row = {}

    def moment(self, evaluation: Evaluation) -> Moment:
        """Return what decides the modulation of a solver's evaluation."""
        if not self._dit.config.landing_time:
            return T * evaluation.a
        return T * evaluation.a, T * evaluation.end

    def rows(self, moments: Iterable[Moment]) -> dict[Moment, int]:
        """Return the table row of each moment, computing those that are not there."""
        asked = set(moments)
        missing = sorted(asked - self._row.keys(), key=_pair)
        if missing and len(self._row) + len(missing) > max(_KEPT_TIMESTEPS, len(self._output)):
            self._row = {}
            missing = sorted(asked, key=_pair)
        if missing:
            self._add(missing)
        return self._row

    @torch.no_grad()
    def _add(self, moments: list[Moment]) -> None:
        dit, first = self._dit, len(self._row)
        timestep, landing = torch.tensor(
            [_pair(moment) for moment in moments], device=dit.txt_in.proj.weight.device
        ).unbind(1)
        emb = dit.embed_times(timestep, landing)
        layers = [self._layer(block, emb) for block in blocks_of(dit, self._pictures)]
        shift, scale = dit.txt_out_ada["out_in"](emb).chunk(2, -1)
        norm = dit.txt_out_norm
        output = torch.stack([norm.weight * (1 + scale), norm.bias * (1 + scale) + shift], 1)
        if len(self._output) < first + len(moments):  # Then nothing is in it, see rows().
            count = max(_KEPT_TIMESTEPS, len(moments))
            with torch.inference_mode(False):  # Whoever adds to them later may be outside it.
                self._layers = [table.new_empty(count, *table.shape[1:]) for table in layers]
                self._output = output.new_empty(count, *output.shape[1:])
            self._views = {}
            self.version += 1
        for table, values in zip([*self._layers, self._output], [*layers, output], strict=True):
            table[first : first + len(moments)] = values
        self._row |= {moment: first + number for number, moment in enumerate(moments)}

    @staticmethod
    def _layer(block: DiTBlock, emb: Tensor) -> Tensor:
        parts = []
        for inwards, gate in ((block.ada.msa_in, block.ada.msa_out), (block.ada.mlp_in, block.ada.mlp_out)):
            shift, scale = inwards(emb).chunk(2, -1)
            parts += [1 + scale, shift, gate(emb)]
        return torch.stack(parts, 1)

    def at(self, row: int | Tensor, layer: int) -> tuple[Tensor, ...]:
        """Return a layer's six vectors: (dim,) for the row that all share, (N, dim) for a row each."""
        if isinstance(row, Tensor):
            return self._layers[layer].index_select(0, row).unbind(1)
        if row not in self._views:
            self._views[row] = [table[row].unbind(0) for table in self._layers]
        return self._views[row][layer]

    def output(self, row: int | Tensor) -> tuple[Tensor, ...]:
        """Return weight and bias of the last LayerNorm, as :meth:`at`."""
        return self._output[row].unbind(-2)


def modulated_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return LN(x) * weight + bias for x (N, dim); weight and bias (dim,), or a row each."""
    if weight.ndim == 1:
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return torch.addcmul(bias, torch.layer_norm(x, x.shape[-1:], None, None, eps), weight)


def _turned(qk: Tensor, weight: Tensor, bias: Tensor, eps: float, rotations: Tensor) -> Tensor:
    """Return queries and keys (N, 2, K, D) normalised and rotated in float32; weight and bias (2, 1, D)."""
    h = torch.layer_norm(qk.float(), qk.shape[-1:], None, None, eps)
    return rotate_interleaved(torch.addcmul(bias, h, weight), rotations[:, None]).to(qk.dtype)


def matrices(block: DiTBlock) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Return the products of a layer, in their order."""
    return block.msa.proj_qkv, block.msa.proj_out, block.mlp.proj_in, block.mlp.proj_out


class AttendingRows(Protocol):
    """Which rows a pass has and what they see: :class:`~colada.generate.engine.memory.ViewRows`, or the like.

    Attributes:
        clean_rows: how many rows, the first ones, are not needed after their keys and values are written.
    """

    clean_rows: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, silent: int = 0) -> Tensor:
        """See :meth:`colada.generate.engine.memory.ViewRows.attend`."""


class PriorPass:
    """The DiT over rows of many requests.

    Args:
        dit: whose weights are used as they are.
        differentiable: compute by what has gradients, and no copies of the weights.
        text: the pass of text beside which this is one of pictures alone; copies of weights are shared.
    """

    def __init__(self, dit: DiT, differentiable: bool = False, text: PriorPass | None = None) -> None:
        self.dit, self.modulation = dit, Modulation(dit, text is not None)
        self._differentiable, self._text = differentiable, text
        self._products: list[tuple[Product, ...]] = []
        self._qk_norms: list[tuple[Tensor, Tensor]] = []
        self.refresh()

    def refresh(self) -> None:
        """Take the weights as they are now: what was computed from earlier ones is made anew when wanted."""
        self._blocks = blocks_of(self.dit, self._text is not None)
        layers = [matrices(block) for block in self._blocks]
        packed = fits_packed([layer for of_block in layers for layer in of_block])
        make = plain_product if self._differentiable else partial(product, packed=packed)
        shared = self._text._products if self._text is not None else []
        self._products = [
            shared[layer]
            if shared and not isinstance(self.dit.blocks[layer], DualBlock)
            else tuple(make(one, gelu=number == 2) for number, one in enumerate(of_block))
            for layer, of_block in enumerate(layers)
        ]
        self._refresh_norms()
        self.modulation.forget()

    def _refresh_norms(self) -> None:
        """Take the norms of queries and keys side by side: one operation does for both."""
        # Made once and outside inference mode, as the tables: captured passes read them where they are.
        with torch.inference_mode(False), torch.no_grad():
            norms = [(block.msa.norm_q, block.msa.norm_k) for block in self._blocks]
            values = [
                (
                    torch.stack([queries.weight, keys.weight])[:, None].float(),
                    torch.stack([queries.bias, keys.bias])[:, None].float(),
                )
                for queries, keys in norms
            ]
            for places, now in zip(self._qk_norms, values, strict=False):
                for place, value in zip(places, now, strict=True):
                    place.copy_(value)
            self._qk_norms = self._qk_norms or values

    def rotations(self, positions: Tensor) -> Tensor:
        """Return the rotary positions of rows, see :func:`colada.networks.layers.rotations`."""
        pictures = None
        if self._text is not None:
            pictures = torch.arange(len(positions), device=positions.device)
        return self.dit.rotations(positions, pictures)

    def __call__(self, latents: Tensor, row: int | Tensor, plan: AttendingRows, rotations: Tensor) -> Tensor:
        """Run the network.

        Args:
            latents: (N * patch_size, C); with self-conditioning (N * patch_size, 2 C), guesses of z0
                beside them, or C alone where there are none.
            row: of the modulation table: one for all, or int64 (N,).
            plan: of the N rows.
            rotations: of their positions.

        Returns: float32, the network's output (n, C) for the latents of all rows but the clean ones.
        """
        config = self.dit.config
        width = config.txt_in_channels
        guess = latents[:, width:] if latents.shape[1] > width else None
        pictures = self._text is not None
        x = self.dit.embed_pictures(latents) if pictures else self.dit.embed(latents[:, :width], guess)
        last = config.num_layers - 1
        for layer in range(config.num_layers):
            x = self._block(x, row, plan, rotations, layer, plan.clean_rows if layer == last else 0)
        if not len(x):
            return latents[:0, :width].float()
        weight, bias = self.modulation.output(row[plan.clean_rows :] if isinstance(row, Tensor) else row)
        out = self.dit.unembed_pictures if pictures else self.dit.txt_out
        x = out(modulated_norm(x, weight, bias, config.norm_eps))
        return x.reshape(-1, config.txt_out_channels).float()

    def _block(
        self, x: Tensor, row: int | Tensor, plan: AttendingRows, rotations: Tensor, layer: int, silent: int
    ) -> Tensor:
        """One layer; rows before ``silent`` only leave their keys and values."""
        config = self.dit.config
        to_qkv, from_heads, expand, contract = self._products[layer]
        modulation = self.modulation.at(row, layer)
        h = modulated_norm(x, modulation[0], modulation[1], config.norm_eps)
        qkv = to_qkv(h).view(len(h), 3, config.heads, config.head_dim)
        weight, bias = self._qk_norms[layer]
        q, k = _turned(qkv[:, :2], weight, bias, config.norm_eps, rotations).unbind(1)
        v = qkv[:, 2]
        if silent:
            x, q = x[silent:], q[silent:]
            modulation = tuple(part[silent:] if part.ndim == 2 else part for part in modulation)
        attended = plan.attend(q, k, v, layer, silent)
        if not len(x):
            return x
        x = torch.addcmul(x, modulation[2], from_heads(attended.flatten(-2)))
        h = modulated_norm(x, modulation[3], modulation[4], config.norm_eps)
        return torch.addcmul(x, modulation[5], contract(expand(h)))
