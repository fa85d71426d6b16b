"""The one place where a velocity, and the z0 that it points at, are made of what the DiT says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from colada.device import on_device
from colada.flow import guided, within_the_data
from colada.generate.settings import RequestSettings


class Estimate(NamedTuple):
    """What a solver step goes by: the velocity at z, and the guess of z0, each (B, L, C)."""

    velocity: Tensor
    z0: Tensor


class Guidance(NamedTuple):
    """How rows are guided, each field one number for all or (G, 1, 1).

    Attributes:
        scale: s of v = u + s (c - u).
        cap: greatest root mean square of a latent of the guess; inf is off.
        rescale: share of the way back to the size of the conditional guess; 0 is off.
    """

    scale: Tensor
    cap: Tensor
    rescale: Tensor

    @classmethod
    def of(cls, settings: Sequence[RequestSettings], device: torch.device) -> Guidance:
        """Return how requests are guided, in the order of rows."""
        numbers = [(one.guidance, one.guidance_cap or math.inf, one.guidance_rescale) for one in settings]
        table = on_device(numbers, device, torch.float32).view(len(numbers), 3, 1, 1)
        return cls(*table.unbind(1))


def is_guided(settings: RequestSettings, a: float, follows: bool) -> bool:
    """Return whether a block has a second velocity at a, which guidance leads away from.

    Args:
        settings: of its request.
        a: of an evaluation.
        follows: whether anything is before the block; where nothing is, it is what guidance against
            blocks would lead away from.
    """
    low, high = settings.guidance_interval
    return settings.guidance != 1 and low <= a <= high and (follows or against_latents(settings))


def against_latents(settings: RequestSettings) -> bool:
    """Return whether what guidance leads away from is each latent by itself."""
    return settings.guidance_against == "latents"


def is_bounded(settings: RequestSettings) -> bool:
    """Return whether guided guesses are brought back to the size of data, by cap or rescaling."""
    return settings.guidance_cap > 0 or settings.guidance_rescale > 0


def estimate(
    z: Tensor,
    a: Tensor | float,
    conditional: Tensor,
    unconditional: Tensor | None = None,
    rows: Tensor | None = None,
    guidance: Guidance | None = None,
    free: Tensor | None = None,
) -> Estimate:
    """Return the estimate at z (B, L, C) of velocities (B, L, C): v = u + s (c - u), z0 = z - a v.

    Args:
        a: one, or (B, 1, 1).
        unconditional: (G, L, C), of the rows that are guided; None without any.
        rows: int64 (G,), which these are.
        guidance: of these rows.
        free: bool (B, L), latents that are not pinned; None where no row's guess is bounded.
    """
    if unconditional is None or rows is None or guidance is None:
        return Estimate(conditional, z - a * conditional)
    plain = conditional[rows]
    velocity = guided(plain, unconditional, guidance.scale)
    if free is not None:
        at, now = (a[rows] if isinstance(a, Tensor) else a), z[rows]
        _, cap, rescale = guidance
        z0 = within_the_data(now - at * velocity, now - at * plain, cap, rescale, free[rows])
        # Rows without bounds stay as they are, to the last bit.
        bounded = (cap < math.inf) | (rescale > 0)
        velocity = torch.where(bounded, (now - z0) / at, velocity)
    velocity = conditional.index_copy(0, rows, velocity)
    return Estimate(velocity, z - a * velocity)
