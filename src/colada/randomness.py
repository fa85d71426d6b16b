"""The one way from a seed to random numbers: a few numbers, the seed among them, name what is drawn."""

from __future__ import annotations

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """Return 64 bits that numbers from 0 name; those of other numbers have nothing to do with them."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def generator_of(*numbers: int) -> torch.Generator:
    """Return the CPU generator that numbers name, as (seed, stage, row): the same in any batch."""
    return torch.Generator().manual_seed(seed_of(*numbers))
