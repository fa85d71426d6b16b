"""Small networks with open gates and non-trivial biases, and the plain arithmetic that checks them.

The plain functions are textbook numpy in float64, one vector at a time: slow, and
sharing nothing with the package.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from colada.generate.engine.slots import latents_of
from colada.generate.noise import sample_noise
from colada.generate.reference import BlockGenerator
from colada.generate.settings import RequestSettings
from colada.generate.writer import Request
from colada.models.cola import ColaDLM
from colada.networks.config import DiTConfig, TextVAEConfig
from colada.networks.dit import DiT
from colada.networks.vae import TextVAE
from colada.text.tokenizer import Tokenizer


def tiny_dit_config(**over: Any) -> DiTConfig:
    values: dict[str, Any] = {
        "txt_in_channels": 8,
        "txt_out_channels": 8,
        "txt_dim": 32,
        "emb_dim": 32,
        "heads": 4,
        "head_dim": 8,
        "rope_dim": 6,
        "num_layers": 2,
        "expand_ratio": 2,
        "block_size": 4,
    }
    return DiTConfig(**{**values, **over})


def tiny_vae_config(**over: Any) -> TextVAEConfig:
    values: dict[str, Any] = {
        "vocab_size": 50,
        "encoder_num_blocks": 2,
        "decoder_num_blocks": 2,
        "dim": 32,
        "ffn_dim": 64,
        "latent_dim": 8,
        "num_heads": 4,
        "block_size": 4,
        # Wider than the released 0.02: on 32 channels the blocks would otherwise hardly do anything.
        "init_std": 0.2,
    }
    return TextVAEConfig(**{**values, **over})


@torch.no_grad()
def _shake(network: nn.Module, generator: torch.Generator) -> None:
    """Replace every parameter that init_weights left at 0 (or at 1) by random values near it."""
    for parameter in network.parameters():
        for start in (0.0, 1.0):
            if bool((parameter == start).all()):
                parameter.copy_(start + 0.1 * torch.randn(parameter.shape, generator=generator))
                break


def tiny_dit(seed: int = 0, **over: Any) -> DiT:
    generator = torch.Generator().manual_seed(seed)
    network = DiT(tiny_dit_config(**over))
    network.init_weights(generator)
    with torch.no_grad():
        for layer in (network.emb_in.proj_in, network.emb_in.proj_hid, network.emb_in.proj_out):
            layer.weight.mul_(10)  # so that the timestep matters
    _shake(network, generator)
    return network.eval()


def tiny_vae(seed: int = 0, **over: Any) -> TextVAE:
    generator = torch.Generator().manual_seed(seed)
    network = TextVAE(tiny_vae_config(**over))
    network.init_weights(generator)
    _shake(network, generator)
    return network.eval()


SENTENCE = "Once upon a time a little dog ran home, and the cat sat on the mat and looked at the moon.\n"


def writing_model(**parts: Any) -> ColaDLM:
    """A random model with a tokenizer, which writes letters and spaces and never ends by itself."""
    tokenizer = Tokenizer.train([SENTENCE] * 20, 300)
    vae, dit = tiny_vae(0, vocab_size=300), tiny_dit(1)
    with torch.no_grad():
        for token in range(300):
            if not re.fullmatch(r"[A-Za-z ]+", tokenizer.decode([token])):
                vae.decoder.final_layer.bias[token] = -1e4
    return ColaDLM(vae, dit, tokenizer, **parts)


def tiny_model(
    seed: int = 0,
    vae: dict[str, Any] | None = None,
    dit: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> ColaDLM:
    """Both networks without a tokenizer, padding id 0; ``vae`` and ``dit`` override their configurations."""
    return ColaDLM(
        tiny_vae(seed, **{"pad_token_id": 0, **(vae or {})}),
        tiny_dit(seed + 1, **(dit or {})),
        generation=generation,
    )


# --- requests, and the readable loop ---------------------------------------------------------------

Blocks = list[tuple[Tensor, list[int]]]
"""Latents and ids of each."""


def unit_probes(rows: int, blocks: int, size: int, width: int) -> torch.Tensor:
    """Return probes of a divergence that are each of a block's unit vectors: they make it exact."""
    probes = torch.eye(size * width).view(-1, 1, 1, size, width)
    return probes.expand(-1, rows, blocks, -1, -1).flatten(2, 3)


def request(model: ColaDLM, ids: Sequence[int], new_tokens: int, seed: int, **settings: Any) -> Request:
    return Request(tuple(ids), new_tokens, RequestSettings(seed=seed, **settings))


def reference(model: ColaDLM, own: Request, pad_id: int = 0) -> Blocks:
    """A request alone, in the readable loop."""
    settings = own.settings
    generator = BlockGenerator(model.vae, model.dit, **asdict(settings))
    made: Blocks = []
    with torch.inference_mode():
        patch, size = model.vae.config.patch_size, model.vae.config.block_size
        noise = sample_noise(settings.seed, (size, model.vae.config.latent_dim), torch.device("cpu"))
        (sample,) = generator.start([own.ids], [noise], [settings.seed], [settings.guidance], pad_id)
        for _ in range(latents_of(own, patch, size)[2]):
            for _ in generator.next_block([sample]):
                pass
            assert sample.block is not None
            made.append((sample.block.latents, sample.block.ids))
    return made


# --- plain arithmetic ----------------------------------------------------------------------------

Array = np.ndarray


def plain_weights(network: nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().double().numpy() for name, tensor in network.state_dict().items()}


def plain_linear(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    """weight @ x for one vector, plus the bias if there is one."""
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def plain_norm(x: Array, eps: float, weights: Mapping[str, Array] | None = None, name: str = "") -> Array:
    """LayerNorm of one vector, with weight and bias where the checkpoint has them."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    y = (x - mean) / math.sqrt(variance + eps)
    if weights is not None and f"{name}.weight" in weights:
        y = y * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return y


def plain_silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def plain_attention(
    q: Sequence[Array],
    k: Sequence[Array],
    v: Sequence[Array],
    visible: Callable[[int, int], bool],
) -> list[Array]:
    """One head: per query a softmax over the keys it may see, scaled by 1 / sqrt(width)."""
    outputs = []
    for i, query in enumerate(q):
        keys = [j for j in range(len(k)) if visible(i, j)]
        scores = [float(query @ k[j]) / math.sqrt(len(query)) for j in keys]
        top = max(scores)
        shares = [math.exp(score - top) for score in scores]
        outputs.append(sum(share * v[j] for share, j in zip(shares, keys, strict=True)) / sum(shares))
    return outputs


def assert_close(ours: torch.Tensor, plain: Any, tolerance: float = 1e-5) -> None:
    """Assert max |a - b| <= tolerance * max |b|."""
    a, b = ours.detach().double().numpy(), np.asarray(plain, dtype=np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


# --- safetensors by hand -------------------------------------------------------------------------

_NUMPY = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U16": "<u2"}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> None:
    """Write a file of the format: header's length, JSON header, data. Values are (type, shape, bytes)."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def read_safetensors(path: Path) -> dict[str, tuple[str, Sequence[int], bytes]]:
    """Read what :func:`write_safetensors` writes, in the order of the header."""
    blob = path.read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], blob[8 + size + start : 8 + size + end])
    return tensors


def as_safetensors(
    values: Mapping[str, Array], kind: str = "F32"
) -> dict[str, tuple[str, Sequence[int], bytes]]:
    return {name: (kind, value.shape, value.astype(_NUMPY[kind]).tobytes()) for name, value in values.items()}
