"""What a sample's seed draws: noise by rule, and the generators of its blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Noise = Callable[[int], Tensor]
"""Block number -> noise (block, C) of one sample."""


def block_generator(seed: int, block: int, purpose: int) -> torch.Generator:
    """Return the CPU generator of one sample's block; purpose 0 draws noise, 1 draws tokens."""
    state = np.random.SeedSequence([seed, block, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def sample_noise(seed: int, shape: tuple[int, int], device: torch.device) -> Noise:
    """Return this project's rule: independent streams per (seed, block), the same on every device."""

    def draw(block: int) -> Tensor:
        generator = block_generator(seed, block, 0)
        noise = torch.randn(shape, generator=generator, pin_memory=device.type == "cuda")
        return noise.to(device, non_blocking=True)

    return draw


def released_noise(seed: int, shape: tuple[int, int], device: torch.device) -> Noise:
    """Return the released code's rule: a generator on the device, seeded with seed + 10,000,000 * block."""

    def draw(block: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed + 10_000_000 * block)
        return torch.randn(shape, generator=generator, device=device)

    return draw


NOISE_RULES = {"per-sample": sample_noise, "released": released_noise}
"""By name, as in :data:`colada.generate.settings.NOISE_NAMES`."""
