"""Random models of named sizes: speed does not depend on what the weights say."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from colada.checks import choose
from colada.errors import ColadaError
from colada.models.cola import ColaDLM
from colada.networks.config import DiTConfig, TextVAEConfig
from colada.networks.dit import ROPE_THETA, DiT
from colada.networks.layers import inverse_frequencies
from colada.networks.vae import TextVAE

HEAD = 64  # Channels of a head, except at the released size.

# The keys of the Text VAE and of the DiT that are not the released ones.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {
            "vocab_size": 8192,
            "latent_dim": 64,
            "dim": 128,
            "ffn_dim": 512,
            "num_heads": 4,
            "encoder_num_blocks": 2,
            "decoder_num_blocks": 2,
        },
        {"txt_in_channels": 64, "txt_out_channels": 64, "num_layers": 6, "head_dim": HEAD, "rope_dim": 48}
        | {"txt_dim": 256, "emb_dim": 256, "heads": 256 // HEAD},
    ),
    "small": (
        {"vocab_size": 8192, "latent_dim": 64, "dim": 512, "ffn_dim": 2048, "num_heads": 8},
        {"txt_in_channels": 64, "txt_out_channels": 64, "num_layers": 12, "head_dim": HEAD, "rope_dim": 48}
        | {"txt_dim": 768, "emb_dim": 768, "heads": 768 // HEAD},
    ),
    "2.3b": ({}, {}),
}


def size_configs(
    size: str, block_size: int = 16, layers: int | None = None, width: int | None = None
) -> tuple[TextVAEConfig, DiTConfig]:
    """Return the configurations of a named size.

    Args:
        size: a name in :data:`SIZES`.
        block_size: latents in a block.
        layers, width: of the DiT, in place of the size's own; the Text VAE stays.

    Raises:
        ColadaError: for an unknown size, or a width that heads do not divide.
    """
    vae_keys, dit_keys = choose("size", size, SIZES)
    vae = TextVAEConfig(**vae_keys, block_size=block_size)
    vae = dataclasses.replace(vae, pad_token_id=vae.vocab_size - 1)
    dit = DiTConfig(**dit_keys, block_size=block_size)
    if layers is not None:
        dit = dataclasses.replace(dit, num_layers=layers)
    if width is not None:
        if width < 1 or width % dit.head_dim:
            raise ColadaError(f"width={width}, expected a multiple of head_dim={dit.head_dim}")
        dit = dataclasses.replace(dit, txt_dim=width, emb_dim=width, heads=width // dit.head_dim)
    return vae, dit


@torch.no_grad()
def open_gates(network: nn.Module, generator: torch.Generator) -> None:
    """Give random values to what starts from zero, such as the DiT's gates: every part then has an effect."""
    for parameter in network.parameters():
        if not bool(parameter.any()):
            parameter.normal_(std=0.02, generator=generator)


@torch.no_grad()
def random_model(
    vae: TextVAEConfig, dit: DiTConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> ColaDLM:
    """Return a model without a tokenizer, made on the device in its final type, with open gates."""
    with torch.device("meta"):
        networks = TextVAE(vae), DiT(dit)
    generator = torch.Generator(device).manual_seed(seed)
    for network in networks:
        network.to(dtype).to_empty(device=device)
        network.init_weights(generator)
        open_gates(network, generator)
    for buffer in networks[1].buffers():
        buffer.copy_(inverse_frequencies(dit.rope_dim, ROPE_THETA))
    shape = f"{dit.num_layers} layers, width {dit.txt_dim}, block {dit.block_size}"
    return ColaDLM(*networks, origin=f"{shape}, random weights")
