"""What stages with a teacher are told of where it is, how it is guided, and of its way."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from colada.data.sources import Section
from colada.errors import one_of
from colada.generate.settings import SOLVER_NAMES, UNGUIDED
from colada.train.answers import Count

SAME = "same"
"""In place of a teacher: that of the stage with one before it."""


def _falls(grid: tuple[float, ...]) -> tuple[float, ...]:
    if not (
        2 <= len(grid) <= 65 and grid[0] == 1 and grid[-1] == 0 and all(a > b for a, b in pairwise(grid))
    ):
        raise ValueError(f"{list(grid)}, expected values that fall from 1 to 0")
    return grid


Grid = Annotated[tuple[float, ...], AfterValidator(_falls)]
"""Values of a = t / T between which a student makes a step each."""


def _is_solver(name: str) -> str:
    if name not in SOLVER_NAMES:
        raise ValueError(f"{name!r}, {one_of(SOLVER_NAMES, name)}")
    return name


class TrajectorySection(Section):
    """The teacher's trajectories over fixed rows of the data, written once and read by all stages."""

    path: str = Field(
        "runs/trajectories", description="A directory; made, or gone on with where it was stopped."
    )
    rows: Count = Field(2000, description="Rows of the data.")
    grid: Grid = Field(
        (1.0, 0.95, 0.9, 0.825, 0.75, 0.65, 0.55, 0.3, 0.0),
        description="Where on its way each block is kept: what stages have as grids is among these.",
    )
    substeps: int = Field(2, ge=1, le=64, description="The teacher's solver steps from one to the next.")
    solver: Annotated[str, AfterValidator(_is_solver)] = Field("ab2", description="Its solver.")


class GuidanceTerms(Section):
    """How a teacher is guided."""

    guidance: float = Field(5.0, ge=-1e6, le=1e6, description="The teacher's guidance scale.")
    guidance_against: Literal["block", "latents"] = Field(
        "block", description="What that leads away from: the block, or each latent, by itself."
    )
    guidance_cap: float = Field(0.0, ge=0, le=1e6, description="Its cap, the data's size, say; 0: none.")
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="Its rescaling.")

    @property
    def guided(self) -> dict[str, Any]:
        """The same, as settings of a generation say it."""
        return {name: getattr(self, name) for name in UNGUIDED}
