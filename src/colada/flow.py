"""Flow matching: the path from latents to noise, the law of training timesteps, grids and solvers.

The path is z_t = (1 - a) z0 + a z1 with a = t / T in [0, 1] and z1 ~ N(0, I);
its velocity is dz/da = z1 - z0. Generation integrates from a = 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

T = 1000.0


def interpolate(z0: Tensor, z1: Tensor, a: Tensor) -> Tensor:
    """Return z_t = (1 - a) z0 + a z1 for latents and noise (..., C) and a (...)."""
    return torch.lerp(z0, z1, a[..., None])


def target_velocity(z0: Tensor, z1: Tensor) -> Tensor:
    """Return u = z1 - z0, the regression target of flow matching."""
    return z1 - z0


def z0_from_velocity(z: Tensor, velocity: Tensor, a: Tensor) -> Tensor:
    """Return the guess of z0 at z_t (N, C) that a velocity implies: z_t - a v; a is () or (N,)."""
    return z - a.expand(z.shape[0])[:, None] * velocity


def velocity_from_z0(z: Tensor, z0: Tensor, a: Tensor) -> Tensor:
    """Return the velocity (z_t - z0) / a that a guess of z0 implies; a is () or (N,).

    Clean positions (a = 0) have velocity zero: they do not move.
    """
    a = a.expand(z.shape[0])[:, None]
    return torch.where(a > 0, (z - z0) / a.clamp_min(1e-6), torch.zeros_like(z))


@dataclass(frozen=True)
class Prediction:
    """What a network's output says of the path through z_a; an entry of :data:`PREDICTIONS` is a kind.

    Attributes:
        velocity: the velocity at z_a (N, C) that an output (N, C) implies; a is () or (N,).
        error: an output's error as one of the velocity (..., C), from output, z0, z1 and a (...).
    """

    velocity: Callable[[Tensor, Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


MIN_A = 0.1
"""Errors of z0 are errors of the velocity times a, and count so at no smaller a than this."""

PREDICTIONS: dict[str, Prediction] = {
    "velocity": Prediction(
        velocity=lambda z, output, a: output,
        error=lambda output, z0, z1, a: output - target_velocity(z0, z1),
    ),
    "z0": Prediction(
        velocity=velocity_from_z0,
        error=lambda output, z0, z1, a: (output - z0) / a.clamp_min(MIN_A)[..., None],
    ),
}

LOSS_SPACES = {"velocity": 0, "half": 1, "z0": 2}
"""In which space a squared error counts: that of the velocity times max(a, MIN_A) to this power."""


@dataclass(frozen=True)
class TimestepLaw:
    """t = T sigmoid(n), n ~ N(loc, scale^2): where along the path training looks. A larger loc is noisier."""

    loc: float = 1.0
    scale: float = 1.0

    def sample(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw timesteps in (0, T), float32."""
        return T * torch.sigmoid(self.loc + self.scale * torch.randn(shape, generator=generator))

    def quantile(self, timestep: Tensor) -> Tensor:
        """Return the share of draws that are below each timestep."""
        return torch.special.ndtr((torch.logit(timestep / T, 1e-6) - self.loc) / self.scale)

    def at(self, quantile: Tensor) -> Tensor:
        """Return the timestep below which that share of draws is."""
        return T * torch.sigmoid(self.loc + self.scale * torch.special.ndtri(quantile))


def calibrated_loc(latent_dim: int) -> float:
    """Return the paper's line for the law's loc at latent width C: 1 + ln(C / 16) / 2."""
    return 1.0 + 0.5 * math.log(latent_dim / 16)


# --- guidance ----------------------------------------------------------------------------------


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Return u + s (c - u), of velocities or of guesses of z0 (arXiv:2207.12598); a scale of 1 is off."""
    return unconditional + scale * (conditional - unconditional)


def rms(x: Tensor, where: Tensor | None = None) -> Tensor:
    """Return the root mean square of latents (..., C) as (..., 1), or of blocks (..., L, C) as (..., 1, 1).

    Args:
        where: bool (..., L), the latents of a block that count; a block without any has 0.
    """
    if where is None:
        return x.square().mean(-1, keepdim=True).sqrt()
    weight = where[..., None].to(x.dtype)
    total = (x.square() * weight).sum((-2, -1), keepdim=True)
    return (total / (weight.sum((-2, -1), keepdim=True) * x.shape[-1]).clamp_min(1)).sqrt()


def within_the_data(
    z0: Tensor, conditional: Tensor, cap: Tensor | float, rescale: Tensor | float, free: Tensor
) -> Tensor:
    """Return guided guesses of z0 brought back to the size of data, which guidance throws them beyond.

    First each block is scaled to the size of its conditional guess, to a share of ``rescale``
    (arXiv:2305.08891, there of velocities); then each latent is cut off at a root mean square of ``cap``.

    Args:
        z0: (..., L, C), guided.
        conditional: (..., L, C), not guided.
        cap: inf is off.
        rescale: from 0, off, to 1.
        free: bool (..., L), latents that are not pinned: of these is a block's size.
    """
    size = rms(z0, free)
    ratio = torch.where(size > 0, rms(conditional, free) / size.clamp_min(1e-12), torch.ones_like(size))
    z0 = z0 * (1 + rescale * (ratio - 1))
    limit = torch.as_tensor(cap, dtype=z0.dtype, device=z0.device)
    return z0 * (limit / rms(z0).clamp_min(1e-12)).clamp_max(1.0)


# --- grids -------------------------------------------------------------------------------------

Schedule = Callable[[int], Tensor]


def uniform(steps: int) -> Tensor:
    """Return S + 1 equally spaced values of a from 1 to 0 (the released grid)."""
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)


def front_loaded(steps: int) -> Tensor:
    """Return 1 - (1 - u)^2 over uniform u: small steps at high noise, steps of 2 / S near a = 0."""
    return 1.0 - (1.0 - uniform(steps)) ** 2


def logit_normal(steps: int) -> Tensor:
    """Return the training law's quantiles (loc 1, scale 1), stretched to 1..0."""
    edge = 0.5 / (steps + 1)  # The outermost quantiles, 0 and 1, are at infinity.
    quantiles = torch.linspace(1.0 - edge, edge, steps + 1, dtype=torch.float64)
    grid = torch.sigmoid(1.0 + torch.special.ndtri(quantiles))
    return (grid - grid[-1]) / (grid[0] - grid[-1])


SCHEDULES: dict[str, Schedule] = {
    "uniform": uniform,
    "front-loaded": front_loaded,
    "logit-normal": logit_normal,
}


# --- solvers -----------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """One velocity that a solver asks for, and what it then does.

    Attributes:
        a: at which it asks for the velocity of z.
        weights: z moves by the sum of ``weights[k]`` times the velocity k evaluations ago, this one's first.
        z_factor: None; or what z is multiplied by, and the weights are of the z0 that velocities point at.
    """

    a: float
    weights: tuple[float, ...]
    z_factor: float | None = None

    @property
    def end(self) -> float:
        """Where on the path a solver of one velocity a step goes with it."""
        return self.a + sum(self.weights)


Solver = Callable[[Sequence[float]], list[Evaluation]]
"""Descending values of a from 1 to 0 -> all evaluations that integrate dz/da = v along them.

What an evaluation costs is a pass of the network (two rows a sample where it is guided).
"""


def euler(grid: Sequence[float]) -> list[Evaluation]:
    """First order, one evaluation a step: z + h v with h = a_next - a (the released solver)."""
    return [Evaluation(a, (a_next - a,)) for a, a_next in pairwise(grid)]


def adams_bashforth2(grid: Sequence[float]) -> list[Evaluation]:
    """Second order, one evaluation a step: h times the line through the last two velocities, on any grid."""
    evaluations = euler(grid[:2])
    for last, a, a_next in zip(grid, grid[1:], grid[2:], strict=False):
        share = 0.5 * (a_next - a) / (a - last)
        evaluations.append(Evaluation(a, ((a_next - a) * (1 + share), -(a_next - a) * share)))
    return evaluations


def heun(grid: Sequence[float]) -> list[Evaluation]:
    """Second order, two evaluations a step: to the end with v, then back by half of h (v - v_end).

    The last step, which ends in data, is Euler's, as no network is asked there: 2 S - 1 evaluations.
    """
    evaluations = []
    for a, a_next in pairwise(grid):
        h = a_next - a
        evaluations.append(Evaluation(a, (h,)))
        if a_next > 0:
            evaluations.append(Evaluation(a_next, (h / 2, -h / 2)))
    return evaluations


def learnt(solver: Mapping[str, Any]) -> list[Evaluation]:
    """Return the evaluations of a learnt solver (bespoke non-stationary, arXiv:2403.01329).

    z_k+1 = alpha_k z_k + sum over j <= k of beta_kj x_j, with x_j the z0 that is pointed at from z_j.

    Args:
        solver: ``grid``, N values of a that fall from 1; ``alpha``, N numbers; ``beta``, N rows, of 1 to N.
    """
    rows = zip(solver["grid"], solver["alpha"], solver["beta"], strict=True)
    return [Evaluation(a, tuple(reversed(beta)), alpha) for a, alpha, beta in rows]


def memory(evaluations: Iterable[Evaluation]) -> int:
    """Return how many velocities, or guesses of z0, an evaluation has at hand, its own among them."""
    return max(len(evaluation.weights) for evaluation in evaluations)


def advance(z: Tensor, velocities: Iterable[Tensor], weights: Iterable[Tensor | float]) -> Tensor:
    """Return where an evaluation moves z; velocities as far as they are weighted, the newest first."""
    for velocity, weight in zip(velocities, weights, strict=False):
        z = z + weight * velocity
    return z


SOLVERS: dict[str, Solver] = {"euler": euler, "ab2": adams_bashforth2, "heun": heun}


def evaluations_of(
    solver: str | Mapping[str, Any], schedule: str | Sequence[float], steps: int, early_end: float = 0.0
) -> list[Evaluation]:
    """Return the evaluations that take a block from noise to data.

    Args:
        solver: a name in :data:`SOLVERS`; or a learnt one, of which the other arguments change nothing.
        schedule: a name in :data:`SCHEDULES`, or the values of a themselves, from 1 to 0.
        steps: of a schedule by name.
        early_end: no evaluation is at a below this; the last then goes straight to the z0 that it points at.
    """
    if not isinstance(solver, str):
        return learnt(solver)
    *grid, end = SCHEDULES[schedule](steps).tolist() if isinstance(schedule, str) else schedule
    evaluated = [a for a in grid if a >= early_end] or grid[:1]
    evaluations = SOLVERS[solver]([*evaluated, end])
    if len(evaluated) < len(grid):
        evaluations[-1] = Evaluation(evaluations[-1].a, (end - evaluations[-1].a,))
    return evaluations
