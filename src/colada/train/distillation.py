"""Distillation of a guided prior: one student pass learns what several passes of a teacher come to.

A teacher integrates a block from a to a' < a in some steps of its own, guided, and so moves z to z'. The
student learns the guess of z0 whose one Euler step lands there (progressive distillation, arXiv:2202.00512,
block by block): x = z - a (z - z') / (a - a'). A teacher that takes one step teaches its guided guess itself:
guidance is folded into the student, at any a. The KV cache is what each network makes of clean blocks before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from colada.flow import PREDICTIONS, T
from colada.generate.guidance import Guidance, against_latents, estimate
from colada.generate.settings import RequestSettings
from colada.networks.dit import DiT, Timesteps
from colada.train.flow_matching import Pinned, guess_errors, guess_of_z0, place, predict


@dataclass(frozen=True)
class Guided:
    """A frozen prior, and how it is guided.

    Attributes:
        dit: the network.
        guidance: scale s; 1 is off, and takes no unconditional pass.
        against_latents: whether it leads away from each latent by itself, not from the block by itself.
        cap: root mean square that no latent of a guided guess exceeds; inf is off.
        rescale: share to which a guided guess is scaled to its conditional one.
    """

    dit: DiT
    guidance: float = 1.0
    _: KW_ONLY
    against_latents: bool = False
    cap: float = math.inf
    rescale: float = 0.0

    @classmethod
    def of(cls, dit: DiT, settings: Mapping[str, Any]) -> Guided:
        """Return a prior that is guided as settings of a generation say."""
        one = RequestSettings(**settings)
        cap = one.guidance_cap or math.inf
        rescale = one.guidance_rescale
        return cls(dit, one.guidance, against_latents=against_latents(one), cap=cap, rescale=rescale)

    def guess(
        self,
        z: Tensor,
        timestep: Tensor,
        clean: Tensor,
        pinned: Pinned | None = None,
        sample: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Tensor:
        """Return the guided guess of z0 (B, K, M, C); arguments as of :func:`predict`.

        Conditional and unconditional blocks are copies of one pass; latents by themselves have another. A
        block that follows nothing is not guided against itself.
        """
        copies, size = z.shape[1], self.dit.config.block_size
        if self.guidance == 1:
            output = predict(self.dit, z, timestep, clean, pinned, sample, end=end)
            return guess_of_z0(self.dit, z, output, timestep, pinned)
        both, times = torch.cat([z, z], 1), torch.cat([timestep, timestep], 1)
        ends = None if end is None else torch.cat([end, end], 1)
        follows = _follows(z.shape[2], size, sample, z.device)[:, None]
        if self.against_latents:
            output = predict(self.dit, z, timestep, clean, pinned, sample, end=end)
            output = torch.cat([output, self._apart(z, timestep, end).view_as(output)], 1)
            follows = torch.ones_like(follows)
        else:
            alone = torch.zeros(len(z), 2 * copies, z.shape[2] // size, dtype=torch.bool, device=z.device)
            alone[:, copies:] = True
            output = predict(self.dit, both, times, clean, pinned, sample, alone, end=ends)
        of_output = PREDICTIONS[self.dit.config.prediction].velocity
        velocity = of_output(both.flatten(0, 2), output.flatten(0, 2), times.flatten() / T).to(z.dtype)
        velocities = velocity.view_as(both).unflatten(2, (-1, size)).chunk(2, 1)
        conditional, unconditional = (of_blocks.flatten(0, 2) for of_blocks in velocities)
        blocks, a = z.unflatten(2, (-1, size)).flatten(0, 2), timestep[..., ::size].reshape(-1, 1, 1) / T
        rows = follows.expand(len(z), copies, -1).flatten().nonzero().flatten()
        free = None
        if self.cap < math.inf or self.rescale > 0:
            free = torch.ones(blocks.shape[:-1], dtype=torch.bool, device=z.device)
            if pinned is not None:
                free = ~pinned.where[:, None].expand(-1, copies, -1).reshape(free.shape)
        guidance = Guidance(*z.new_tensor([self.guidance, self.cap, self.rescale]).unbind())
        z0 = estimate(blocks, a, conditional, unconditional[rows], rows, guidance, free).z0
        return place(z0.view_as(z), pinned)

    def _apart(self, z: Tensor, timestep: Tensor, end: Tensor | None) -> Tensor:
        """Return the network's output (N, C) for latents that see nothing but themselves."""
        patch, size = self.dit.config.patch_size, self.dit.config.block_size
        at, ends = (None if x is None else x[..., ::size].flatten() for x in (timestep, end))
        assert at is not None
        row = torch.arange(len(at), device=at.device).repeat_interleave(size)
        layout = self.dit.layout([patch] * (timestep.numel() // patch))
        return self.dit(z.flatten(0, 2), Timesteps(at, row, ends), layout)


def _follows(length: int, size: int, sample: Tensor | None, device: torch.device) -> Tensor:
    """Return which blocks of rows (B or 1, M / size) follow others of their sample."""
    follows = torch.arange(length // size, device=device)[None] > 0
    if sample is None:
        return follows
    first = sample[:, ::size]
    return follows & (first == first.roll(1, 1))


@torch.no_grad()
def landing(
    teacher: Guided,
    z: Tensor,
    timestep: Tensor,
    end: Tensor,
    clean: Tensor,
    pinned: Pinned | None = None,
    sample: Tensor | None = None,
    substeps: int | Tensor = 1,
) -> Tensor:
    """Return where a teacher's Euler steps of equal length take z (B, K, M, C) from ``timestep`` to ``end``.

    Args:
        timestep, end: (B, K, M) in 0..1000, constant within a block, the end before the beginning.
        substeps: how many steps; one number for all, or (B, K, M).
    """
    counts = torch.as_tensor(substeps, device=z.device)
    length = (timestep - end) / counts
    for step in range(int(counts.max())):
        now = timestep - step * length
        z0 = teacher.guess(z, now, clean, pinned, sample, now - length)
        velocity = (z - z0) / (now / T).clamp_min(1e-6)[..., None]
        moved = place(z - (length / T)[..., None] * velocity, pinned)
        z = torch.where((step < counts)[..., None], moved, z)
    return z


def target_of(z: Tensor, landed: Tensor, timestep: Tensor, end: Tensor) -> Tensor:
    """Return the guess of z0 whose Euler step from z at ``timestep`` lands at ``landed`` at ``end``."""
    a, step = (timestep / T)[..., None], ((timestep - end) / T)[..., None]
    return z - a / step * (z - landed)


def distillation_errors(
    student: DiT,
    z: Tensor,
    target: Tensor,
    timestep: Tensor,
    clean: Tensor,
    pinned: Pinned | None = None,
    sample: Tensor | None = None,
    end: Tensor | None = None,
) -> Tensor:
    """Return the student's squared error as one of the velocity, per latent number (B, K, M).

    Args:
        z: (B, K, M, C), the teacher's or the data's, pinned latents in place.
        target: (B, K, M, C), the guess of z0 that is taught.
        timestep: (B, K, M); at pinned positions there is no error.
        clean: (B, M, C), from which the student makes a KV cache of its own.
        end: (B, K, M), where a step ends, which a student with landing times is told.
    """
    output = predict(student, z, timestep, clean, pinned, sample, end=end)
    return guess_errors(student, output, z, target, timestep, pinned)
