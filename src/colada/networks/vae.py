"""The Text VAE: q_phi(z0 | x), tokens to latents, and p_theta(x | z0), latents to tokens.

Module names are those of the released checkpoint. Both halves are block-causal:
they may be run block by block with a :class:`~colada.networks.layers.KVCache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colada.errors import ColadaError
from colada.networks.config import TextVAEConfig
from colada.networks.layers import KVCache, Pass, Shared, kept_frequencies, rotary_table, rotate_half_split
from colada.networks.packing import Layout

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of :func:`~colada.networks.layers.rotary_table`."""


@dataclass(frozen=True)
class Posterior:
    """q_phi(z0 | x) = N(mean, exp(logvar)), each float32 (N, C); logvar None is a deterministic encoder."""

    mean: Tensor
    logvar: Tensor | None

    def at_log_snr(self, log_snr: float | None) -> Posterior:
        """Return it with variances that make each latent's log(E mu^2 / E sigma^2) this; None: as it is."""
        if log_snr is None or self.logvar is None:
            return self
        power = self.mean.detach().square().mean(-1, keepdim=True)
        return Posterior(self.mean, (power.log() - log_snr).expand_as(self.mean))


class VAEBlock(nn.Module):
    """A transformer block of either half; mind the residual order of ``post_norm``."""

    def __init__(self, config: TextVAEConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.layer_norm_eps
        self.config = config
        self.norm_attn = nn.LayerNorm(dim, eps=eps, elementwise_affine=config.layer_norm_affine)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=config.qk_bias)
        if config.qk_norm:
            self.q_norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=config.qk_norm_affine)
            self.k_norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=config.qk_norm_affine)
        self.attn_out_proj = nn.Linear(dim, dim, bias=config.bias)
        self.norm_ffn = nn.LayerNorm(dim, eps=eps)
        self.ffn_proj = nn.Linear(dim, config.ffn_dim, bias=config.bias)
        hidden = config.ffn_dim // 2 if config.act == "swiglu" else config.ffn_dim
        self.ffn_out = nn.Linear(hidden, dim, bias=config.bias)

    def forward(self, x: Tensor, shared: Shared[Rotary], layer: int) -> Tensor:
        if self.config.post_norm:
            a = self.attention(x, shared, layer)
            x = self.norm_attn(x) + a
            return x + self.norm_ffn(self.ffn(x))
        x = x + self.attention(self.norm_attn(x), shared, layer)
        return x + self.ffn(self.norm_ffn(x))

    def attention(self, x: Tensor, shared: Shared[Rotary], layer: int) -> Tensor:
        """Attend (N, dim) to itself and the KV caches of the pass."""
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        if self.config.clip_qkv is not None:
            limit = self.config.clip_qkv
            q, k, v = q.clamp(-limit, limit), k.clamp(-limit, limit), v.clamp(-limit, limit)
        if self.config.qk_norm:
            # Over the whole width, before the heads are split.
            q, k = self.q_norm(q), self.k_norm(k)
        heads = (self.config.num_heads, -1)
        q, k, v = q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
        q = rotate_half_split(q, shared.table).to(v.dtype)
        k = rotate_half_split(k, shared.table).to(v.dtype)
        return self.attn_out_proj(shared.attend(q, k, v, layer).flatten(-2))

    def ffn(self, x: Tensor) -> Tensor:
        """dim -> ffn_dim -> dim; swiglu takes the projection's first half as value, the second as gate."""
        x = self.ffn_proj(x)
        if self.config.act == "swiglu":
            value, gate = x.chunk(2, -1)
            x = value * F.silu(gate)
        else:
            x = F.gelu(x) if self.config.act == "gelu" else F.silu(x)
        return self.ffn_out(x)


def _table(config: TextVAEConfig, layout: Layout) -> Rotary:
    dims = config.dim // config.num_heads
    return rotary_table(layout.positions, kept_frequencies(dims, config.rope_theta, layout.device))


class TextEncoder(nn.Module):
    """ids (N * patch,) -> posterior over latents (N, C)."""

    def __init__(self, config: TextVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size + 1, config.dim)
        self.patch_embedder = nn.Conv1d(config.dim, config.dim, config.patch_size, stride=config.patch_size)
        self.blocks = nn.ModuleList(VAEBlock(config) for _ in range(config.encoder_num_blocks))
        outputs = 2 * config.latent_dim if config.use_variation else config.latent_dim
        self.final_layer = nn.Linear(config.dim, outputs, bias=config.bias)

    def forward(
        self, ids: Tensor, layout: Layout, caches: Sequence[KVCache | None] | None = None
    ) -> Posterior:
        config = self.config
        # Kernel = stride, and no patch straddles samples: the convolution is one product per patch.
        weight = self.patch_embedder.weight.transpose(1, 2).flatten(1)
        x = F.linear(self.wte(ids).view(-1, config.patch_size * config.dim), weight, self.patch_embedder.bias)
        shared = Pass(layout, _table(config, layout), caches, appending=True)
        for layer, block in enumerate(self.blocks):
            x = block(x, shared, layer)
        out = self.final_layer(x).float()
        if config.use_variation:
            mean, logvar = out.chunk(2, -1)
            logvar = logvar.clamp(-30, 20)
        else:
            mean, logvar = out, None
        if config.encoder_last_ln:
            mean = F.layer_norm(mean, (config.latent_dim,), eps=config.layer_norm_eps)
        return Posterior(mean, logvar).at_log_snr(config.log_snr)


class TextDecoder(nn.Module):
    """Latents (N, C) -> hidden states of their tokens (N * patch, dim); ``logits`` spells them out."""

    def __init__(self, config: TextVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.in_layer = nn.Linear(config.latent_dim, config.dim, bias=config.bias)
        self.blocks = nn.ModuleList(VAEBlock(config) for _ in range(config.decoder_num_blocks))
        self.unpatch_layer = nn.Linear(config.dim, config.dim * config.patch_size)
        self.final_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.final_layer = nn.Linear(config.dim, config.vocab_size, bias=config.bias)

    def forward(
        self, latents: Tensor, layout: Layout, caches: Sequence[KVCache | None] | None = None
    ) -> Tensor:
        shared = Pass(layout, _table(self.config, layout), caches, appending=True)
        return self.unpatch(self.run(latents, shared))

    def run(self, latents: Tensor, shared: Shared[Rotary]) -> Tensor:
        """Latents (N, C) -> the last layer's output (N, dim)."""
        x = self.in_layer(latents.to(self.in_layer.weight.dtype))
        for layer, block in enumerate(self.blocks):
            x = block(x, shared, layer)
        return x

    def unpatch(self, x: Tensor) -> Tensor:
        """(n, dim) -> hidden states of the tokens (n * patch, dim)."""
        config = self.config
        # The projection's output axis is ordered (channel, patch).
        x = self.unpatch_layer(x).unflatten(-1, (config.dim, config.patch_size))
        return x.transpose(1, 2).reshape(-1, config.dim)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, dim) -> logits float32 (n, V)."""
        return self.final_layer(self.final_norm(hidden)).float()


class TextVAE(nn.Module):
    """Encoder q_phi and conditional decoder p_theta over packed samples."""

    def __init__(self, config: TextVAEConfig) -> None:
        super().__init__()
        TextVAEConfig.require(config)
        self.config = config
        self.encoder = TextEncoder(config)
        self.decoder = TextDecoder(config)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter; see :meth:`init_parameter`."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, generator)

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator | None) -> None:
        """Initialise one: matrices from a normal cut off at ``init_cutoff_factor`` deviations."""
        std, cutoff = self.config.init_std, self.config.init_std * self.config.init_cutoff_factor
        if "norm" in name:
            nn.init.constant_(parameter, float(name.endswith("weight")))
        elif parameter.ndim == 1:
            nn.init.zeros_(parameter)
        else:
            truncated_normal_(parameter, std, cutoff, generator)

    def layout(self, lengths: Sequence[int], caches: Sequence[KVCache | None] | None = None) -> Layout:
        """Return the packing of samples of these many *latents*, which follow their KV caches."""
        cached = [len(cache or ()) for cache in caches] if caches is not None else None
        return Layout(lengths, self.config.block_size, cached, self.encoder.wte.weight.device)

    def rows_layout(self, rows: int, length: int, sample: Tensor | None = None) -> Layout:
        """Return the packing of equal training rows of ``length`` latents.

        ``sample`` (rows, length) numbers the samples of each row, which do not see each other.
        """
        device = self.encoder.wte.weight.device
        return Layout.rows(rows, length, self.config.block_size, 0, sample, device)

    def encode(
        self, ids: Tensor, lengths: Sequence[int], caches: Sequence[KVCache | None] | None = None
    ) -> Posterior:
        """Return the posterior of packed tokens.

        Args:
            ids: int64 (sum of lengths,), below vocab_size, or the mask id.
            lengths: tokens of each sample, multiples of ``patch_size``.
            caches: what the encoder has seen of each sample before, whole blocks; these follow, and are
                appended to it.

        Returns: a posterior over N = sum(lengths) / patch_size latents, not normalised.

        Raises:
            ColadaError: if a length is no multiple of ``patch_size``, or the lengths do not add up.
        """
        patch = self.config.patch_size
        for length in lengths:
            if length % patch:
                raise ColadaError(f"a sample of {length} tokens, expected a multiple of patch_size={patch}")
        if sum(lengths) != ids.numel():
            raise ColadaError(f"lengths add up to {sum(lengths)}, but there are {ids.numel()} ids")
        return self.encoder(ids, self.layout([length // patch for length in lengths], caches), caches)

    def decode(
        self,
        latents: Tensor,
        lengths: Sequence[int],
        caches: Sequence[KVCache | None] | None = None,
    ) -> Tensor:
        """Return the logits float32 (N * patch_size, V) of packed latents (N, C).

        With ``caches``, the latents see them and are appended to them.
        """
        return self.decoder.logits(self.decoder(latents, self.layout(lengths, caches), caches))

    def normalise(self, latents: Tensor) -> Tensor:
        """Return (z - shifting_factor) * scaling_factor: what the DiT *and* the decoder see in generation."""
        return (latents - self.config.shifting_factor) * self.config.scaling_factor


@torch.no_grad()
def truncated_normal_(tensor: Tensor, std: float, cutoff: float, generator: torch.Generator | None) -> None:
    """Fill a tensor from a normal of mean 0; what lies beyond the cutoff is drawn anew.

    So does ``trunc_normal_`` of torch 2.13, but not that of 2.11: with it, a recipe would start from other
    weights in each.
    """
    if cutoff < std / 2:  # Nearly everything would be drawn anew, again and again.
        nn.init.trunc_normal_(tensor, 0.0, std, -cutoff, cutoff, generator=generator)
        return
    most = tensor.new_tensor(cutoff, device="cpu").item()  # As the tensor's type can hold it.
    tensor.normal_(0.0, std, generator=generator)
    while bool((beyond := tensor.abs() > most).any()):
        tensor.copy_(tensor.where(~beyond, torch.empty_like(tensor).normal_(0.0, std, generator=generator)))
