"""Stages that learn from a frozen, guided teacher; what is kept of its trajectories is made before them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colada.data.rows import Batch, batch
from colada.flow import T
from colada.networks.dit import DiT
from colada.networks.vae import TextVAE
from colada.randomness import generator_of
from colada.train.cola import PriorStage
from colada.train.kinds import TaughtSection
from colada.train.noise import StepNoise, draw_noise
from colada.train.recipe import source_weights
from colada.train.stages import Beginning, LayOut, System, network_of
from colada.train.teaching_terms import SAME
from colada.train.trajectories import Trajectories, digest, roll_out, sampler

_FIXED = 2**20  # In place of a stage's number, in the seeds of rows whose trajectories are kept.


@dataclass(frozen=True)
class TaughtNoise(StepNoise):
    """Noise of rows, and what is kept of the teacher's trajectories over them.

    Attributes:
        number: int64 (B,), of the rows.
        states: (B, M, P, C), where each block is at each kept value of a; None in steps that do not use them.
    """

    number: Tensor | None = None
    states: Tensor | None = None


class TaughtStage(PriorStage):
    """What learns from a copy of the DiT, frozen as the stage begins, or from another model's."""

    teachers = {"teacher": "dit"}  # noqa: RUF012 - the base class says that it is the class's
    section: TaughtSection  # type: ignore[assignment]

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        super().__init__(system, name, lay_out)
        self._kept: Trajectories | None = None

    def teacher(self, network: str, lay_out: LayOut) -> nn.Module:
        """Return the frozen teacher: the weights of now, a model's, or that of the stage with one before.

        Where a run is resumed after that stage, its weights are still to be filled from the checkpoint.
        """
        system, where = self.system, self.section.teacher
        if where != SAME or system.teacher is None:
            system.teacher = system.frozen_copy(network, lay_out, None if where == SAME else where)
        return system.teacher

    def draw(self, rows: Sequence[int]) -> TaughtNoise:
        """Return what the loss draws, and the rows' numbers."""
        noise = super().draw(rows)
        return TaughtNoise(**vars(noise), number=torch.tensor(rows))

    def begin(self, beginning: Beginning) -> None:
        """Make what is missing of the trajectories, on the first rank, which checks those that are there."""
        trajectories = self.section.trajectories
        if trajectories is None:
            return
        whole = beginning.whole({"vae": self.vae, "teacher": self.frozen["teacher"]})
        if whole is not None:
            self._make(beginning, whole)
        beginning.ranks.wait()
        self._kept = Trajectories(Path(trajectories.path), trajectories.rows, {})

    def _made_of(self, beginning: Beginning, whole: Mapping[str, nn.Module]) -> dict[str, Any]:
        section, trajectories = self.section, self.section.trajectories
        assert trajectories is not None
        return {
            "teacher": digest(whole["teacher"]),
            "Text VAE": digest(whole["vae"]),
            **section.guided,
            **{key: getattr(section, key) for key in ("length", "prefix_share")},
            **{key: getattr(trajectories, key) for key in ("rows", "substeps", "solver")},
            "grid": list(trajectories.grid),
            "seed": self.recipe.seed,
            "text": beginning.text,
            "weights": source_weights(section, self.recipe.data.sources),
        }

    def _make(self, beginning: Beginning, whole: Mapping[str, nn.Module]) -> None:
        section, trajectories = self.section, self.section.trajectories
        vae, teacher = network_of(whole, "vae", TextVAE), network_of(whole, "teacher", DiT)
        assert trajectories is not None
        files = Trajectories(Path(trajectories.path), trajectories.rows, self._made_of(beginning, whole))
        missing, rows = files.missing, beginning.rows(self.recipe.seed)
        settings = sampler(trajectories, section.guided)
        device = beginning.ranks.device
        done = trajectories.rows - sum(len(files.numbers(part)) for part in missing)
        title = f"{self.name}: trajectories"
        with beginning.display.task(title, trajectories.rows, done, passing=True, unit="rows"):
            for part in missing:
                if beginning.stopped():
                    return
                numbers = files.numbers(part)
                some, noise = batch(rows, numbers), self._fixed(numbers)
                sources = vae.to(device), teacher.to(device), some.to(device), noise.to(device)
                states = roll_out(*sources, settings, trajectories.grid, self.system.pad_id)
                files.keep(part, some, states)
                done += len(numbers)
                beginning.display.advance(done, trajectories.rows)

    def _fixed(self, numbers: Sequence[int]) -> StepNoise:
        """Return what is drawn for rows whose trajectories are kept: the same whenever they are used."""
        config, section = self.vae.config, self.section
        flow = section.model_copy(update={"copies": 1})
        generators = [generator_of(self.recipe.seed, _FIXED, number) for number in numbers]
        return draw_noise(generators, config, section.length, flow=flow)

    def rollouts(self, step: int, rows: Batch, noise: TaughtNoise) -> tuple[Batch, TaughtNoise]:
        """Return rows whose trajectories are kept, in place of this step's own, where it learns from them."""
        if self._kept is None or not self._on_trajectory(step):
            return rows, noise
        assert noise.number is not None
        numbers = self._numbers(noise.number)
        fixed = self._fixed(numbers)
        stored_rows, states = self._kept.read(numbers)
        stored_noise = dataclasses.replace(
            noise, posterior=fixed.posterior, prefix=fixed.prefix, states=states.float()
        )
        return stored_rows, stored_noise

    def _numbers(self, number: Tensor) -> list[int]:
        """Return which kept rows rows of these numbers take: after the last one the first again."""
        assert self._kept is not None
        return [row % self._kept.rows for row in number.tolist()]

    def _at(self, states: Tensor, timestep: Tensor) -> Tensor:
        """Return states (B, M, P, C) at timesteps (B, K, M) of the kept ones: (B, K, M, C)."""
        assert self.section.trajectories is not None
        times = T * torch.tensor(self.section.trajectories.grid, dtype=timestep.dtype, device=timestep.device)
        place_of = (timestep[..., None] - times).abs().argmin(-1)
        copies = states[:, None].expand(-1, timestep.shape[1], -1, -1, -1)
        index = place_of[..., None, None].expand(*place_of.shape, 1, states.shape[-1])
        return copies.gather(3, index).squeeze(3)

    def _on_trajectory(self, step: int) -> bool:
        """Return whether a step learns from the teacher's own states."""
        return True
