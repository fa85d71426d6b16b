"""A LLaMA-style decoder on packed samples: RMSNorm before, rotary positions, SwiGLU, no biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colada.networks.config import DecoderConfig
from colada.networks.layers import Pass, Shared, kept_frequencies, rotary_table, rotate_half_split
from colada.networks.packing import Layout


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.norm_attn = nn.RMSNorm(dim, eps=config.norm_eps)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out_proj = nn.Linear(dim, dim, bias=False)
        self.norm_ffn = nn.RMSNorm(dim, eps=config.norm_eps)
        self.ffn_proj = nn.Linear(dim, 2 * config.ffn_dim, bias=False)
        self.ffn_out = nn.Linear(config.ffn_dim, dim, bias=False)

    def forward(self, x: Tensor, shared: Shared[tuple[Tensor, Tensor]], layer: int) -> Tensor:
        """Run the block on rows (N, dim)."""
        q, k, v = self.qkv_proj(self.norm_attn(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k = rotate_half_split(q, shared.table), rotate_half_split(k, shared.table)
        x = x + self.attn_out_proj(shared.attend(q, k, v, layer).flatten(-2))
        value, gate = self.ffn_proj(self.norm_ffn(x)).chunk(2, -1)
        return x + self.ffn_out(value * F.silu(gate))


class Decoder(nn.Module):
    """Tokens in, logits out. Which tokens see which is the layout's: see :meth:`layout`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        DecoderConfig.require(config)
        self.config = config
        self.wte = nn.Embedding(config.embeddings, config.dim)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter; see :meth:`init_parameter`."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, generator)

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator | None) -> None:
        """Initialise one: normal, what adds to the residual narrower by sqrt(2 layers)."""
        config = self.config
        if "norm" in name:
            nn.init.ones_(parameter)
        else:
            added = name.endswith(("attn_out_proj.weight", "ffn_out.weight"))
            std = config.init_std / math.sqrt(2 * config.num_layers) if added else config.init_std
            nn.init.normal_(parameter, std=std, generator=generator)

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary table of positions (N,)."""
        config = self.config
        dims = config.dim // config.num_heads
        return rotary_table(positions, kept_frequencies(dims, config.rope_theta, positions.device))

    def layout(self, lengths: Sequence[int]) -> Layout:
        """Return the packing of samples of these lengths: causal, or for "llada" all of a sample visible."""
        block = 1 if self.config.objective == "ar" else max(1, *lengths)
        return Layout(lengths, block, device=self.wte.weight.device)

    def rows_layout(self, rows: int, length: int, sample: Tensor | None = None) -> Layout:
        """Return the packing of equal training rows; ``sample`` (rows, length) numbers each row's samples."""
        block = 1 if self.config.objective == "ar" else length
        return Layout.rows(rows, length, block, 0, sample, self.wte.weight.device)

    def forward(self, ids: Tensor, layout: Layout, where: Tensor | None = None) -> Tensor:
        """Return the logits float32 (n, V) of packed ids (N,), at all positions or at ``where`` (n,)."""
        hidden = self.run(ids, Pass(layout, self.table(layout.positions)))
        return self.logits(hidden if where is None else hidden.index_select(0, where))

    def run(self, ids: Tensor, shared: Shared[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the last layer's output (N, dim) for rows of ids (N,)."""
        x = self.wte(ids)
        for layer, block in enumerate(self.blocks):
            x = cast(DecoderBlock, block)(x, shared, layer)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, dim) -> logits float32 (n, V)."""
        return self.lm_head(self.final_norm(hidden)).float()
