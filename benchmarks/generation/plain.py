"""The opponent: generation as section 4 reads, in plain vectorised PyTorch on the same weights.

Two passes a step, the second without history; histories grown by concatenation; the timestep MLP and
AdaLN at every position of every step; one dense mask over the packed batch; a separate pass to commit a
block; logits for the whole prefix. The numbers of the readable loop, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.generation.work import prompt_latents
from colada.errors import ColadaError
from colada.flow import T, uniform, velocity_from_z0
from colada.generate.reference import sample_noise
from colada.networks.dit import ROPE_THETA, DiT, DiTBlock
from colada.networks.layers import inverse_frequencies, rotary_table, rotate_interleaved, rotations
from colada.networks.packing import pad_to_multiple
from colada.networks.vae import TextVAE


class PlainHistory:
    """The keys and values of a batch by layer, each (B, positions, K, D)."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return self.layers[0][0].shape[1] if self.layers else 0

    def join(self, layer: int, keys: Tensor, values: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values with new ones (B, L, K, D) after them, and keep these if asked."""
        if layer < len(self.layers):
            old_keys, old_values = self.layers[layer]
            keys, values = torch.cat([old_keys, keys], 1), torch.cat([old_values, values], 1)
        if keep:
            self.layers[layer : layer + 1] = [(keys, values)]
        return keys, values


def modulated(x: Tensor, modulation: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift, modulation = [shift | scale], each (N, dim)."""
    shift, scale = modulation.chunk(2, -1)
    return x * (1 + scale) + shift


class DensePass:
    """What the layers of a pass share: positions, one mask over the packed batch, and the history.

    Args:
        batch, length: samples, and new positions of each.
        block_size: in positions.
        rotary: makes the rotary table of positions (N,).
        history: what the new positions see, and are added to when ``keep``.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        block_size: int,
        rotary: Callable[[Tensor], Any],
        history: PlainHistory,
        keep: bool,
        device: torch.device,
    ) -> None:
        self.shape, self.history, self.keep = (batch, length), history, keep
        past = len(history)
        key_position = torch.arange(past + length, device=device).repeat(batch)
        key_sample = torch.arange(batch, device=device).repeat_interleave(past + length)
        position = torch.arange(past, past + length, device=device).repeat(batch)
        sample = torch.arange(batch, device=device).repeat_interleave(length)
        earlier = position[:, None] // block_size >= key_position[None, :] // block_size
        self.mask = earlier & (sample[:, None] == key_sample[None, :])
        self.table = rotary(position)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attend, over the whole packed batch at once; all (N, K, D)."""
        k, v = self.history.join(layer, k.unflatten(0, self.shape), v.unflatten(0, self.shape), self.keep)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k.flatten(0, 1), v.flatten(0, 1)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)[0].transpose(0, 1)


class PlainGenerator:
    """Generates blocks for samples with prompts of one length, with Euler on the uniform grid.

    Args:
        vae, dit: the two networks.
        steps: solver steps per block.
        guidance: scale s.
    """

    def __init__(self, vae: TextVAE, dit: DiT, steps: int, guidance: float) -> None:
        self.vae, self.dit, self.guidance = vae, dit, guidance
        self.grid = uniform(steps).tolist()

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.dit.txt_in.proj.weight.device

    @torch.inference_mode()
    def blocks(
        self, prompts: Sequence[Sequence[int]], count: int, seeds: Sequence[int], pad_id: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``count`` blocks of every sample: latents (B, block, C) and greedy ids (B, block * patch).

        Raises:
            ColadaError: for prompts of different lengths.
        """
        if len(set(map(len, prompts))) > 1:
            raise ColadaError(f"prompts of {sorted(set(map(len, prompts)))} tokens, expected one length")
        config = self.vae.config
        batch, size, width = len(prompts), config.block_size, config.latent_dim
        prefix, tail = prompt_latents(config, len(prompts[0]))
        latents = self.encode(prompts, pad_id)[:, : prefix + tail]
        prior, spelling = PlainHistory(), PlainHistory()
        if prefix:
            self.velocity(latents[:, :prefix], torch.zeros(batch, prefix), prior, keep=True)
            self.logits(latents[:, :prefix], spelling)
        noises = [sample_noise(seed, (size, width), self.device) for seed in seeds]
        pinned = torch.zeros(batch, size, width, device=self.device)
        pinned[:, :tail] = latents[:, prefix:]
        where = torch.zeros(batch, size, dtype=torch.bool, device=self.device)
        where[:, :tail] = True
        for number in range(count):
            z = torch.stack([noise(number) for noise in noises])
            z = self.transport(z, where, pinned, prior)
            yield z, self.logits(z, spelling).argmax(-1).view(batch, -1)
            if number + 1 < count:
                self.velocity(z, torch.zeros(batch, size), prior, keep=True)
            where = torch.zeros_like(where)

    def transport(self, z: Tensor, where: Tensor, pinned: Tensor, history: PlainHistory) -> Tensor:
        """Integrate from noise (B, block, C) to latents; the history is seen and left as it is."""
        guided = self.guidance != 1 and len(history) > 0
        for a, a_next in pairwise(self.grid):
            z = torch.where(where[..., None], pinned, z)
            timestep = torch.where(where, 0.0, T * a)
            velocity = self.velocity(z, timestep, history, keep=False)
            if guided:
                alone = self.velocity(z, timestep, PlainHistory(), keep=False)
                velocity = alone + self.guidance * (velocity - alone)
            z = torch.where(where[..., None], pinned, z + (a_next - a) * velocity)
        return z

    def velocity(self, latents: Tensor, timestep: Tensor, history: PlainHistory, keep: bool) -> Tensor:
        """Return the velocity (B, L, C) of latents (B, L, C) at timesteps (B, L)."""
        config = self.dit.config
        patch = config.patch_size
        batch, length, channels = latents.shape
        shared = DensePass(
            batch,
            length // patch,
            config.block_size // patch,
            partial(rotations, dims=config.rope_dim, width=config.head_dim, theta=ROPE_THETA),
            history,
            keep,
            self.device,
        )
        timestep = timestep.to(self.device)
        x = latents.reshape(-1, patch * channels).to(self.dit.txt_in.proj.weight.dtype)
        x = self.dit.txt_in(x)
        emb = self.dit.emb_in(timestep[:, patch - 1 :: patch].flatten())
        for layer, block in enumerate(self.dit.blocks):
            assert isinstance(block, DiTBlock)
            h = modulated(F.layer_norm(x, (block.dim,), eps=block.eps), block.ada.msa_in(emb))
            x = x + block.ada.msa_out(emb) * self._attention(block, h, shared, layer)
            h = modulated(F.layer_norm(x, (block.dim,), eps=block.eps), block.ada.mlp_in(emb))
            x = x + block.ada.mlp_out(emb) * block.mlp(h)
        x = self.dit.txt_out(modulated(self.dit.txt_out_norm(x), self.dit.txt_out_ada["out_in"](emb)))
        output: Tensor = x.view_as(latents).float()
        if config.prediction == "velocity":
            return output
        z, z0 = latents.flatten(0, 1), output.flatten(0, 1)
        return velocity_from_z0(z, z0, timestep.flatten() / T).view_as(latents)

    def _attention(self, block: DiTBlock, x: Tensor, shared: DensePass, layer: int) -> Tensor:
        q, k, v = block.msa.proj_qkv(x).unflatten(-1, (3, block.msa.heads, -1)).unbind(1)
        q = rotate_interleaved(block.msa.norm_q(q), shared.table)
        k = rotate_interleaved(block.msa.norm_k(k), shared.table)
        return block.msa.proj_out(shared.attend(q, k, v, layer).flatten(1))

    def encode(self, prompts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
        """Return the normalised posterior means (B, L, C) of prompts padded to whole blocks."""
        config, encoder = self.vae.config, self.vae.encoder
        ids = torch.tensor([pad_to_multiple(own, config.block_tokens, pad_id) for own in prompts])
        if not ids.numel():
            return torch.zeros(len(prompts), 0, config.latent_dim, device=self.device)
        embedded = encoder.wte(ids.to(self.device)).transpose(1, 2)
        x = encoder.patch_embedder(embedded).transpose(1, 2).flatten(0, 1)
        x = encoder.final_layer(self._vae_blocks(encoder.blocks, x, len(prompts), PlainHistory())).float()
        mean = x.chunk(2, -1)[0] if config.use_variation else x
        if config.encoder_last_ln:
            mean = F.layer_norm(mean, (config.latent_dim,), eps=config.layer_norm_eps)
        return self.vae.normalise(mean).unflatten(0, (len(prompts), -1))

    def logits(self, latents: Tensor, history: PlainHistory) -> Tensor:
        """Return the logits float32 (B * L * patch, V) of latents (B, L, C), and commit them."""
        config, decoder = self.vae.config, self.vae.decoder
        x = decoder.in_layer(latents.flatten(0, 1).to(decoder.in_layer.weight.dtype))
        x = decoder.unpatch_layer(self._vae_blocks(decoder.blocks, x, len(latents), history))
        x = x.unflatten(-1, (config.dim, config.patch_size)).transpose(1, 2).reshape(-1, config.dim)
        return decoder.logits(x)

    def _vae_blocks(self, blocks: nn.ModuleList, x: Tensor, batch: int, history: PlainHistory) -> Tensor:
        config = self.vae.config
        frequencies = inverse_frequencies(config.dim // config.num_heads, config.rope_theta)
        rotary = partial(rotary_table, frequencies=frequencies)
        length = len(x) // batch
        shared = DensePass(batch, length, config.block_size, rotary, history, True, self.device)
        for layer, block in enumerate(blocks):
            x = block(x, shared, layer)
        return x
