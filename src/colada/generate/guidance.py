"""The one place where a velocity, and the z0 that it points at, are made of what the DiT says."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from colada.flow import guided


class Estimate(NamedTuple):
    """What a solver step goes by: the velocity at z, and the guess of z0, each (B, L, C)."""

    velocity: Tensor
    z0: Tensor


def estimate(
    z: Tensor,
    a: Tensor | float,
    conditional: Tensor,
    unconditional: Tensor | None = None,
    rows: Tensor | None = None,
    scale: Tensor | float = 1.0,
) -> Estimate:
    """Return the estimate at z (B, L, C) of velocities (B, L, C): v = u + s (c - u), z0 = z - a v.

    Args:
        a: one, or (B, 1, 1).
        unconditional: (G, L, C), of the rows that are guided; None without any.
        rows: int64 (G,), which these are.
        scale: s, one or (G, 1, 1).
    """
    velocity = conditional
    if unconditional is not None and rows is not None:
        velocity = conditional.index_copy(0, rows, guided(conditional[rows], unconditional, scale))
    return Estimate(velocity, z - a * velocity)
