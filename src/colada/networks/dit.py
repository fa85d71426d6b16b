"""The block-causal Diffusion Transformer p_psi: noisy latents and a timestep in, velocity out.

Module names are those of the released checkpoint; see ``docs/architecture.md``
for the equations. Forward and backward cost one AdaLN row per *distinct*
timestep, not one per position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colada.errors import ColadaError
from colada.flow import PREDICTIONS, T
from colada.networks.config import DiTConfig
from colada.networks.dropout import Dropout, Masks
from colada.networks.layers import (
    KVCache,
    Pass,
    gelu_tanh,
    inverse_frequencies,
    rotate_interleaved,
    rotations,
)
from colada.networks.packing import Layout
from colada.networks.ragged import MOST_CELLS, needed_layout

TIMESTEP_FEATURES = 256
ROPE_THETA = 10000.0


@lru_cache(maxsize=8)
def _timestep_frequencies(count: int, device: torch.device) -> Tensor:
    # Kept, so that a pass on a GPU waits for no copy.
    with torch.inference_mode(False):
        return torch.exp(
            -math.log(10000.0) * torch.arange(count, dtype=torch.float32, device="cpu") / count
        ).to(device)


def timestep_features(timestep: Tensor) -> Tensor:
    """Return [sin | cos] of t exp(-ln(10000) k / 128), k = 0..127: t (R,) in 0..1000 -> float32 (R, 256)."""
    half = TIMESTEP_FEATURES // 2
    angles = timestep.float()[:, None] * _timestep_frequencies(half, timestep.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


def modulate(x: Tensor, modulation: Tensor, row: Tensor) -> Tensor:
    """Return x (N, dim) times 1 + scale plus shift, rows ``row`` (N,) of modulation = [shift | scale]."""
    shift, scale = modulation.chunk(2, -1)
    # index_select, not [row]: its backward adds rows in parallel.
    return torch.addcmul(shift.contiguous().index_select(0, row), x, (1 + scale).index_select(0, row))


@dataclass(frozen=True)
class Timesteps:
    """The timesteps of packed positions as a table of distinct ones and each position's row in it.

    Attributes:
        values: (R,) in 0..1000.
        row: int64 (N,).
        landing: (R,) in 0..1000, with ``config.landing_time`` where each one's step ends; None is at itself.
    """

    values: Tensor
    row: Tensor
    landing: Tensor | None = None


class TimestepEmbedding(nn.Module):
    """t (R,) -> (R, emb_dim): sinusoids through a three-layer MLP."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj_in = nn.Linear(TIMESTEP_FEATURES, config.txt_dim)
        self.proj_hid = nn.Linear(config.txt_dim, config.txt_dim)
        self.proj_out = nn.Linear(config.txt_dim, config.emb_dim)

    def forward(self, timestep: Tensor) -> Tensor:
        features = timestep_features(timestep).to(self.proj_in.weight.dtype)
        return self.proj_out(F.silu(self.proj_hid(F.silu(self.proj_in(features)))))


class Patch(nn.Module):
    """A linear map called ``proj``: latents to width, and width to latents."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def _ada(emb_dim: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, outputs))


class StoredFrequencies(nn.Module):
    """The rotary frequencies as the released files carry them, once a layer, under ``rope.rope.freqs``.

    Kept for the format: loading checks them, the forward pass computes its own in float32.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.rope = nn.Module()
        self.rope.register_buffer("freqs", inverse_frequencies(dims, ROPE_THETA))


class SelfAttention(nn.Module):
    """Packed attention with a LayerNorm per head on queries and keys, and partial rotary positions."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        self.heads = config.heads
        self.proj_qkv = nn.Linear(config.txt_dim, 3 * width, bias=config.qk_bias)
        self.norm_q = nn.LayerNorm(config.head_dim, eps=config.norm_eps)
        self.norm_k = nn.LayerNorm(config.head_dim, eps=config.norm_eps)
        self.rope = StoredFrequencies(config.rope_dim)
        self.proj_out = nn.Linear(width, config.txt_dim, bias=config.qk_bias)

    def project(self, x: Tensor, turn: Tensor, noisy: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (of ``noisy`` only), keys and values (N, K, D), with positions by ``turn``."""
        q, k, v = self.proj_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        if noisy is not None:
            q = q.index_select(0, noisy)
        # Under autocast a norm may come out wider than its input; keys must match values.
        q = rotate_interleaved(self.norm_q(q), turn if noisy is None else turn[noisy]).to(v.dtype)
        k = rotate_interleaved(self.norm_k(k), turn).to(v.dtype)
        return q, k, v

    def forward(self, x: Tensor, shared: Pass[Tensor], layer: int, noisy: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x, shared.table, noisy)
        return self.proj_out(shared.attend(q, k, v, layer).flatten(-2))


class MLP(nn.Module):
    """dim -> expand * dim -> dim with a tanh-approximate GELU."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj_in = nn.Linear(config.txt_dim, config.expand_ratio * config.txt_dim)
        self.proj_out = nn.Linear(config.expand_ratio * config.txt_dim, config.txt_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(gelu_tanh(self.proj_in(x)))


class AdaLN(nn.Module):
    """The modulation of one block: shift and scale before attention and MLP, a gate after each."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.msa_in = _ada(config.emb_dim, 2 * config.txt_dim)
        self.msa_out = _ada(config.emb_dim, config.txt_dim)
        self.mlp_in = _ada(config.emb_dim, 2 * config.txt_dim)
        self.mlp_out = _ada(config.emb_dim, config.txt_dim)


class DiTBlock(nn.Module):
    """x + gate * attention(h), then x + gate * mlp(h), with h = LN(x) * (1 + scale) + shift."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.dim, self.eps = config.txt_dim, config.norm_eps
        self.msa = SelfAttention(config)
        self.mlp = MLP(config)
        self.ada = AdaLN(config)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        row: Tensor,
        shared: Pass[Tensor],
        layer: int,
        noisy: Tensor | None = None,
    ) -> Tensor:
        """Run the layer; with ``noisy``, int64 rows of x, the others leave their keys and values only."""
        attended, dropout = self.msa(self.before(x, emb, row), shared, layer, noisy), shared.dropout
        if noisy is not None:
            x, row = x.index_select(0, noisy), row.index_select(0, noisy)
            dropout = None if dropout is None else dropout.rows(noisy)
        return self.after(x, attended, emb, row, layer, dropout)

    def before(self, x: Tensor, emb: Tensor, row: Tensor) -> Tensor:
        """Return what attention takes."""
        return modulate(F.layer_norm(x, (self.dim,), eps=self.eps), self.ada.msa_in(emb), row)

    def after(
        self,
        x: Tensor,
        attended: Tensor,
        emb: Tensor,
        row: Tensor,
        layer: int = 0,
        dropout: Masks | None = None,
    ) -> Tensor:
        """Return what follows from x and what attention made of it, with dropout on what either adds."""
        if dropout is not None:
            attended = dropout(attended, 2 * layer)
        x = torch.addcmul(x, self.ada.msa_out(emb).index_select(0, row), attended)
        h = self.mlp(modulate(F.layer_norm(x, (self.dim,), eps=self.eps), self.ada.mlp_in(emb), row))
        if dropout is not None:
            h = dropout(h, 2 * layer + 1)
        return torch.addcmul(x, self.ada.mlp_out(emb).index_select(0, row), h)


class DualBlock(DiTBlock):
    """A layer with weights of its own for pictures, beside those for text; all attend together."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.image = DiTBlock(config)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        row: Tensor,
        shared: Pass[Tensor],
        layer: int,
        noisy: Tensor | None = None,
    ) -> Tensor:
        """Run the layer, as :meth:`DiTBlock.forward`."""
        mask = shared.layout.pictures
        if mask is None:
            return super().forward(x, emb, row, shared, layer, noisy)
        halves = (self, self.image)
        where, back = _apart(mask)
        parts = [
            half.msa.project(half.before(x[index], emb, row[index]), shared.table[index])
            for half, index in zip(halves, where, strict=True)
        ]
        q, k, v = (torch.cat(both).index_select(0, back) for both in zip(*parts, strict=True))
        if noisy is not None:
            q, x, row = (one.index_select(0, noisy) for one in (q, x, row))
            where, back = _apart(mask[noisy])
        attended = shared.attend(q, k, v, layer).flatten(-2)
        outputs = [
            half.after(x[index], half.msa.proj_out(attended[index]), emb, row[index])
            for half, index in zip(halves, where, strict=True)
        ]
        return torch.cat(outputs).index_select(0, back)


def _apart(pictures: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return where text is and where pictures are, int64, and the order that puts both in their places."""
    where = (~pictures).nonzero().flatten(), pictures.nonzero().flatten()
    return where, torch.cat(where).argsort()


class DiT(nn.Module):
    """The latent prior p_psi(z0^b | z0^<b) as a velocity field over packed latents."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        DiTConfig.require(config)
        self.config = config
        patch = config.patch_size
        self.txt_in = Patch(config.txt_in_channels * patch, config.txt_dim)
        if config.self_conditioning:
            self.sc_in = Patch(config.txt_in_channels * patch, config.txt_dim, bias=False)
        if config.img_grid is not None:
            self.img_in = Patch(config.img_channels, config.txt_dim)
            self.img_pos = nn.Parameter(torch.zeros(math.prod(config.img_grid), config.txt_dim))
            self.img_out = Patch(config.txt_dim, config.img_channels)
        self.emb_in = TimestepEmbedding(config)
        if config.landing_time:
            self.emb_in2 = TimestepEmbedding(config)
        kinds = [DualBlock] * config.dual_layers + [DiTBlock] * (config.num_layers - config.dual_layers)
        self.blocks = nn.ModuleList(kind(config) for kind in kinds)
        self.txt_out_norm = nn.LayerNorm(config.txt_dim, eps=config.norm_eps)
        self.txt_out_ada = nn.ModuleDict({"out_in": _ada(config.emb_dim, 2 * config.txt_dim)})
        self.txt_out = Patch(config.txt_dim, config.txt_out_channels * patch)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter; see :meth:`init_parameter`."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, generator)

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator | None) -> None:
        """Initialise one: Xavier-uniform matrices, AdaLN, outputs and second inputs at zero (adaLN-zero)."""
        at_zero = ("txt_out.", "sc_in.", "img_out.", "emb_in2.proj_out.")
        if "norm" in name:
            nn.init.constant_(parameter, float(name.endswith("weight")))
        elif parameter.ndim == 1 or "ada." in name or name.startswith(at_zero):
            nn.init.zeros_(parameter)
        elif name.startswith(("emb_in.", "emb_in2.", "img_pos")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)

    def layout(self, lengths: Sequence[int], caches: Sequence[KVCache | None] | None = None) -> Layout:
        """Return the packing of samples of these many latents, which follow their KV caches.

        Raises:
            ColadaError: if a length is not a multiple of ``patch_size``.
        """
        patch = self.config.patch_size
        for length in lengths:
            if length % patch:
                raise ColadaError(f"a sample of {length} latents, expected a multiple of patch_size={patch}")
        cached = [len(cache or ()) for cache in caches] if caches is not None else None
        return Layout(
            [length // patch for length in lengths],
            self.config.block_size // patch,
            cached,
            self.txt_in.proj.weight.device,
        )

    def two_copy_layout(
        self,
        rows: int,
        length: int,
        copies: int = 1,
        sample: Tensor | None = None,
        alone: Tensor | None = None,
    ) -> Layout:
        """Return the packing of rows ``[clean length - block | noisy length | ...]``, lengths in latents.

        ``sample`` (rows, length) numbers the samples of each row, which do not see each other; ``alone``
        (rows, copies, blocks) are noisy blocks that see no clean cell.
        """
        patch = self.config.patch_size
        return Layout.rows(
            rows,
            length // patch,
            self.config.block_size // patch,
            copies,
            None if sample is None else sample[:, patch - 1 :: patch],
            self.txt_in.proj.weight.device,
            alone,
        )

    def needed_layout(
        self, needed: Tensor, copies: int, sample: Tensor | None = None, alone: Tensor | None = None
    ) -> tuple[Layout, Tensor] | None:
        """Return the packing of rows' needed cells alone, and which latents these are, bool (rows, cells).

        None where whole rows are as well: if all is needed, on a GPU and in compiled blocks, which want
        shapes that stay the same, and for rows whose masks would be large.

        Args:
            needed: bool (rows, blocks), noisy blocks whose output is wanted.
            copies, sample, alone: as :meth:`two_copy_layout` takes them.
        """
        patch, size = self.config.patch_size, self.config.block_size
        cells = ((1 + copies) * needed.shape[1] - 1) * size // patch
        compiled = any(block._compiled_call_impl is not None for block in self.blocks)
        same = needed.device.type != "cpu" or compiled or cells > MOST_CELLS
        if same or bool(needed.all()) or not bool(needed.any()):
            return None
        of_patches = None if sample is None else sample[:, patch - 1 :: patch]
        layout, cells_needed = needed_layout(needed, size // patch, copies, of_patches, alone)
        return layout, cells_needed.repeat_interleave(patch, 1)

    def embed(self, latents: Tensor, guess: Tensor | None = None) -> Tensor:
        """Return the first layer's input (N / patch_size, dim), see :meth:`forward` for latents and guess."""
        width, dtype = self.txt_in.proj.in_features, self.txt_in.proj.weight.dtype
        x = self.txt_in(latents.reshape(-1, width).to(dtype))
        if self.config.self_conditioning:
            # Also without a guess: on several ranks every parameter takes part in every pass.
            guess = torch.zeros_like(latents) if guess is None else guess
            x = x + self.sc_in(guess.reshape(-1, width).to(dtype))
        return x

    def embed_times(self, values: Tensor, landing: Tensor | None = None) -> Tensor:
        """Return the embedding (R, emb_dim) of timesteps (R,) and, where it is told, of their steps' ends."""
        emb: Tensor = self.emb_in(values)
        if self.config.landing_time:
            emb = emb + self.emb_in2(values if landing is None else landing)
        return emb

    def embed_pictures(self, latents: Tensor) -> Tensor:
        """Return the first layer's input of whole pictures' latents (P, C): where in its picture each lies.

        Of latents, which may be wider than a picture's, the first ``img_channels`` numbers are looked at.

        Raises:
            ColadaError: for a network that has text only.
        """
        if self.config.img_grid is None:
            raise ColadaError(f"this model has no pictures: img_channels={self.config.img_channels}")
        x = self.img_in(latents[:, : self.config.img_channels].to(self.img_in.proj.weight.dtype))
        return (x.unflatten(0, (-1, len(self.img_pos))) + self.img_pos.to(x.dtype)).flatten(0, 1)

    def rotations(self, positions: Tensor, pictures: Tensor | None = None) -> Tensor:
        """Return the rotary positions of rows, see :func:`colada.networks.layers.rotations`.

        Args:
            positions: int64 (N,).
            pictures: int64 (P,), which of them hold latents of pictures, whole ones.
        """
        config, places = self.config, None
        if pictures is not None and config.img_grid is not None and config.img_axial:
            rows, columns = config.img_grid
            number = torch.arange(len(pictures), device=positions.device) % (rows * columns)
            cells = torch.stack([number // columns, number % columns], 1)
            places = cells.new_zeros(len(positions), 2).index_copy(0, pictures, cells)
        return rotations(positions, config.rope_dim, config.head_dim, ROPE_THETA, places)

    def unembed_pictures(self, h: Tensor) -> Tensor:
        """Return the output (P, C) for the last layer's (P, dim); 0 in what of it a picture does not have."""
        output = self.img_out(h)
        return F.pad(output, (0, self.config.txt_out_channels - output.shape[1]))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | Timesteps,
        layout: Layout,
        caches: Sequence[KVCache | None] | None = None,
        appending: bool = False,
        noisy_only: bool = False,
        guess: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Run the network on packed latents.

        Args:
            latents: (N, C), in any floating type; computed in the parameters' type.
            timestep: (N,) or () in 0..1000, or :class:`Timesteps` where the distinct ones are known;
                clean and pinned positions have 0. With ``patch_size`` above 1 a patch takes the
                timestep of its last latent.
            layout: from :meth:`layout` or :meth:`two_copy_layout`.
            caches: per sample what it may see before its new positions, or None.
            appending: append the new positions to the KV caches.
            noisy_only: of the rows of :meth:`two_copy_layout`, return the noisy cells only; the last
                layer then computes no more of the clean ones than their keys and values.
            guess: (N, C), with ``config.self_conditioning`` the z0 that an earlier pass pointed at, 0 where
                there was none and at clean positions, the latent itself at pinned ones; None is 0 everywhere.
            dropout: of the rows that are packed, of equal length, on what attention and MLP of text add.

        Returns: float32 (N, C), the velocity or z0, whichever ``config.prediction`` says.
        """
        config = self.config
        patch = config.patch_size
        if isinstance(timestep, Tensor):
            timestep = Timesteps(*timestep.expand(latents.shape[0]).unique(return_inverse=True))
        row = timestep.row[patch - 1 :: patch]
        x = self.embed(latents, guess)
        pictures = None if layout.pictures is None else layout.pictures.nonzero().flatten()
        if pictures is not None:
            x = x.index_copy(0, pictures, self.embed_pictures(latents.index_select(0, pictures)))
        emb = self.embed_times(timestep.values, timestep.landing)
        table = self.rotations(layout.positions, pictures)
        masks = None if dropout is None else dropout.masks(len(x))
        shared = Pass(layout, table, caches, appending, masks)
        noisy = layout.noisy if noisy_only else None
        for layer, block in enumerate(self.blocks):
            x = block(x, emb, row, shared, layer, noisy if layer + 1 == len(self.blocks) else None)
        if noisy is not None:
            row = row.index_select(0, noisy)
            if layout.pictures is not None:
                pictures = layout.pictures[noisy].nonzero().flatten()
        h = modulate(self.txt_out_norm(x), self.txt_out_ada["out_in"](emb), row)
        x = self.txt_out(h)
        if pictures is not None:
            x = x.index_copy(0, pictures, self.unembed_pictures(h.index_select(0, pictures)))
        return x.reshape(-1, config.txt_out_channels).float()

    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        layout: Layout,
        caches: Sequence[KVCache | None] | None = None,
        guess: Tensor | None = None,
        landing: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity float32 (N, C), whatever the network predicts; arguments as :meth:`forward`.

        Args:
            landing: (N,) in 0..1000, where each position's step ends, see :class:`Timesteps`.
        """
        times: Tensor | Timesteps = timestep
        if self.config.landing_time and landing is not None:
            pairs = torch.stack([timestep, landing], 1)
            values, row = pairs.unique(dim=0, return_inverse=True)
            times = Timesteps(values[:, 0], row, values[:, 1])
        output = self(latents, times, layout, caches, guess=guess)
        return PREDICTIONS[self.config.prediction].velocity(latents, output, timestep / T)
