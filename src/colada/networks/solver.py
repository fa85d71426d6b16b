"""A solver of few evaluations whose numbers are learnt (bespoke non-stationary, arXiv:2403.01329).

z_k+1 = alpha_k z_k + sum over j <= k of beta_kj x_j, with x_j the guess of z0 at z_j and a_j.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from colada.flow import front_loaded

GUIDED = ("guidance", "guidance_against", "guidance_cap", "guidance_rescale")
"""Settings that say how a velocity is guided."""


class LearntSolver(nn.Module):
    """N evaluations: a grid, which a softmax of N numbers is the steps of, alpha and beta.

    Args:
        config: N.

    Attributes:
        fitted: bool (), whether the numbers are more than the first ones.
        guidance: float32 (4,), under which they were learnt: scale, whether against latents, cap (0 is none)
            and rescaling.
    """

    fitted: Tensor
    guidance: Tensor

    def __init__(self, config: int) -> None:
        super().__init__()
        self.config = config
        self.steps = nn.Parameter(torch.empty(config))
        self.alpha = nn.Parameter(torch.empty(config))
        self.beta = nn.Parameter(torch.empty(config * (config + 1) // 2))
        self.register_buffer("fitted", torch.tensor(False, device="cpu"))
        self.register_buffer("guidance", torch.tensor([1.0, 0.0, 0.0, 0.0], device="cpu"))

    def first_value(self, name: str, tensor: Tensor) -> Tensor:
        """Fill a parameter, by its name, so that the solver is Euler's on the front-loaded grid."""
        grid = front_loaded(self.config)
        ratio = grid[1:] / grid[:-1]
        if name == "steps":
            return tensor.copy_((grid[:-1] - grid[1:]).log())
        if name == "alpha":
            return tensor.copy_(ratio)
        rows = [torch.cat([torch.zeros(k), (1 - ratio[k : k + 1]).float()]) for k in range(self.config)]
        return tensor.copy_(torch.cat(rows))

    def forward(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the grid (N,), which falls from 1; alpha (N,); and rows of beta, (1,) to (N,)."""
        lengths = self.steps.softmax(0)
        grid = 1 - torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])
        return grid, self.alpha, list(self.beta.split(list(range(1, self.config + 1))))

    def learn_under(self, guided: Mapping[str, Any]) -> None:
        """Keep the settings of a generation that say how the velocity is guided under which it learns."""
        values = {**guided, "guidance_against": float(guided["guidance_against"] == "latents")}
        self.guidance.copy_(torch.tensor([values[name] for name in GUIDED]))

    @property
    def guided(self) -> dict[str, Any]:
        """The same settings."""
        values = dict(zip(GUIDED, (round(value, 6) for value in self.guidance.tolist()), strict=True))
        return {**values, "guidance_against": "latents" if values["guidance_against"] else "block"}

    @torch.no_grad()
    def settings(self) -> dict[str, Any]:
        """Return the settings of generation that say it."""
        grid, alpha, beta = self()
        values = {"grid": grid.tolist(), "alpha": alpha.tolist(), "beta": [row.tolist() for row in beta]}
        learnt = {"kind": "bns", **values}
        return {"solver": learnt, "steps": self.config, **self.guided, "early_end": 0.0}
