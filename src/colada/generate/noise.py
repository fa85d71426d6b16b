"""What a sample's seed draws: noise by rule, and the generators of its blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from colada.randomness import generator_of

Noise = Callable[[int, int], Tensor]
"""Block number, number of the candidate -> noise (block, C) of one sample."""


def block_generator(seed: int, block: int, purpose: int) -> torch.Generator:
    """Return the CPU generator of one sample's block.

    Purpose 0 draws its noise, 1 its tokens, 1 + k the noise of its candidate k, from 1.
    """
    return generator_of(seed, block, purpose)


def sample_noise(seed: int, shape: tuple[int, int], device: torch.device) -> Noise:
    """Return this project's rule: independent streams per (seed, block, k), the same on every device."""

    def draw(block: int, candidate: int) -> Tensor:
        generator = block_generator(seed, block, 1 + candidate if candidate else 0)
        noise = torch.randn(shape, generator=generator, pin_memory=device.type == "cuda")
        return noise.to(device, non_blocking=True)

    return draw


def released_noise(seed: int, shape: tuple[int, int], device: torch.device) -> Noise:
    """Return the released code's rule: a generator on the device, seeded with seed + 10,000,000 * block.

    That code has no candidates; here they are what the generator draws next.
    """

    def draw(block: int, candidate: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed + 10_000_000 * block)
        for _ in range(candidate):
            torch.randn(shape, generator=generator, device=device)
        return torch.randn(shape, generator=generator, device=device)

    return draw


NOISE_RULES = {"per-sample": sample_noise, "released": released_noise}
"""By name, as in :data:`colada.generate.settings.NOISE_NAMES`."""
