"""Timesteps that go where the loss falls: the law's quantiles, drawn more often where they teach more.

With F the flow's mean error by quantile q of the law of timesteps, a bin of quantiles is drawn in proportion
to |dF/dq| (arXiv:2211.15089, there by the cross-entropy), so that each draw stands for an equal part of the
loss's fall along the path; a share of the draws stays the law's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colada.flow import TimestepLaw

BINS = 20
FLOOR = 0.2
"""Share of the draws that is spread over all bins alike."""
KEEP = 0.99
"""Of a bin's mean error, from one step to the next."""
EDGE = 1e-6
"""Quantiles stay so far from 0 and 1, where the law has no timestep."""


def bin_of(law: TimestepLaw, timestep: Tensor) -> Tensor:
    """Return which bin of quantiles each timestep is in, int64."""
    return (law.quantile(timestep) * BINS).long().clamp(0, BINS - 1)


def new_memory() -> Tensor:
    """Return what is known of the loss before the first step: sums and weights of bins, float64 (2, BINS)."""
    return torch.zeros(2, BINS, dtype=torch.float64)


def remember(memory: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Take a step's errors into account, in place.

    Args:
        memory: see :func:`new_memory`.
        sums, counts: (BINS,), of the errors in each bin; one without any stays as it is.
    """
    sums, counts = sums.double().cpu(), counts.double().cpu()
    seen = counts > 0
    fresh = torch.stack([sums / counts.clamp_min(1), torch.ones_like(counts)])
    memory.copy_(torch.where(seen, KEEP * memory + (1 - KEEP) * fresh, memory))


def density(memory: Tensor) -> Tensor:
    """Return how likely each bin of quantiles is drawn, float64 (BINS,); all alike until each was seen."""
    sums, weights = memory
    even = torch.full_like(weights, 1 / BINS)
    if not bool((weights > 0).all()):
        return even
    (slope,) = torch.gradient(sums / weights)
    slope = slope.abs()
    if not float(slope.sum()) > 0:
        return even
    return (1 - FLOOR) * slope / slope.sum() + FLOOR / BINS


def adapted(law: TimestepLaw, memory: Tensor, timestep: Tensor) -> Tensor:
    """Return timesteps drawn from the law as ones drawn by :func:`density`, each at its own quantile."""
    shares = density(memory)
    ends = shares.cumsum(0)
    quantile = law.quantile(timestep.double().cpu())
    at = torch.searchsorted(ends, quantile, right=True).clamp_max(BINS - 1)
    within = (quantile - (ends - shares)[at]) / shares[at]
    return law.at(((at + within) / BINS).clamp(EDGE, 1 - EDGE)).to(timestep)
