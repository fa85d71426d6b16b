"""Distillation as a stage: a student that needs no unconditional pass, and few evaluations where asked.

See :mod:`colada.train.distillation` for what is taught, :mod:`colada.train.trajectories` for what is kept of
the teacher.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from colada.data.rows import Batch, batch
from colada.errors import ColadaError
from colada.flow import T, interpolate
from colada.locate import locate
from colada.networks.checkpoint import read_configs
from colada.networks.dit import DiT
from colada.networks.vae import TextVAE
from colada.train.cola import PriorStage, flow_settings
from colada.train.cost import Phase, Placement
from colada.train.distil_cost import trajectories_phase, with_teacher
from colada.train.distillation import Guided, distillation_errors, landing, target_of
from colada.train.flow_matching import pin, place, weighed
from colada.train.kinds import DistilSection, JointSection, PriorSection
from colada.train.losses import Loss, draw, encode, log_snr_terms, rows_layout
from colada.train.noise import Counts, Draws, VAEWeights, draw_randomness, sample_of_latents
from colada.train.recipe import Recipe, source_weights
from colada.train.stages import Beginning, LayOut, System, row_generator
from colada.train.trajectories import Trajectories, digest, roll_out, sampler

SAME = "same"
_FIXED = 2**20  # In place of a stage's number, in the seeds of rows whose trajectories are kept.


def built_in(recipe: Recipe, name: str, start: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the DiT has inside after a stage of distillation, as its configuration says it.

    Args:
        start: what it has before the first stage, None for nothing.

    Raises:
        ColadaError: if a teacher that has guidance inside would be guided once more, or there is none.
    """
    inside = None if start is None else dict(start)
    teacher: Mapping[str, Any] | None = None
    first = True
    for other, section in recipe.trained.items():
        if not isinstance(section, DistilSection) or not section.steps:
            continue
        where = f"recipe: stages.{other}"
        if section.teacher == SAME and first:
            raise ColadaError(f"{where}.teacher={SAME}, but no distillation is before it: expected a model")
        if section.teacher is None:
            teacher = inside
        elif section.teacher != SAME:
            teacher = read_configs(locate(section.teacher))[1].distilled
        if teacher is not None and section.guidance != 1:
            built = f"{teacher['guidance']:g}"
            raise ColadaError(
                f"{where}.guidance={section.guidance:g}: its teacher has {built} built in, expected 1"
            )
        keys = ("guidance", "guidance_cap", "guidance_rescale")
        inside = {key: getattr(section, key) if teacher is None else teacher.get(key, 0.0) for key in keys}
        grids = None if section.grids is None else [list(grid) for grid in section.grids]
        inside |= {"teacher_steps": None if grids is None else _teacher_steps(section)}
        inside |= {"steps": None if grids is None else [len(grid) - 1 for grid in grids], "grids": grids}
        first = False
        if other == name:
            break
    assert inside is not None
    return inside


def check_order(recipe: Recipe, start: Mapping[str, Any] | None) -> None:
    """Check that no stage undoes what one before it, or the model that a run begins with, has built in.

    Args:
        start: what that model has built in, None for nothing.

    Raises:
        ColadaError: as :func:`built_in`; or for a stage that trains the flow of data after a distillation.
    """
    distilled = start is not None
    for name, section in recipe.trained.items():
        if isinstance(section, DistilSection) and section.steps:
            built_in(recipe, name, start)
            distilled = True
        elif distilled and isinstance(section, PriorSection | JointSection) and section.steps:
            raise ColadaError(
                f"recipe: stages.{name} trains the flow of data, which undoes what a distilled model has"
                " built in: fine-tune first, distil after"
            )


def _teacher_steps(section: DistilSection) -> int:
    if section.trajectories is None:
        return section.teacher_steps
    return section.trajectories.substeps * (len(section.trajectories.grid) - 1)


class Interval(NamedTuple):
    """A step of a student: from a to a, in how many of its teacher, and how often it is drawn."""

    begin: float
    end: float
    substeps: int
    share: float


def intervals(section: DistilSection) -> list[Interval]:
    """Return the steps of a student's grids."""
    grids = section.grids or ()
    shares = section.shares or (1.0,) * len(grids)
    return [
        Interval(
            *ends,
            max(1, round(section.teacher_steps / (len(grid) - 1))),
            share / sum(shares) / (len(grid) - 1),
        )
        for grid, share in zip(grids, shares, strict=True)
        for ends in pairwise(grid)
    ]


@dataclass(frozen=True)
class Taught(Draws):
    """Draws of rows, and what is kept of the teacher's trajectories over them.

    Attributes:
        number: int64 (B,), of the rows.
        states: (B, M, P, C), where each block is at each kept value of a; None in steps that do not use them.
    """

    number: Tensor | None = None
    states: Tensor | None = None


class DistilStage(PriorStage):
    """The DiT under a frozen, guided copy of itself or of another model's."""

    teachers = {"teacher": "dit"}  # noqa: RUF012 - the base class says that it is the class's
    section: DistilSection  # type: ignore[assignment]

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        super().__init__(system, name, lay_out)
        dit = system.networks["dit"]
        assert isinstance(dit, DiT)
        inside = built_in(self.recipe, name, system.distilled)
        dit.config = dataclasses.replace(dit.config, distilled=inside)
        self._kept: Trajectories | None = None
        self._intervals = intervals(self.section)

    def draw(self, rows: Sequence[int]) -> Taught:
        """Return what the loss draws, and the rows' numbers."""
        draws = super().draw(rows)
        return Taught(**vars(draws), number=torch.tensor(rows))

    # --- the teacher's trajectories ----------------------------------------------------------

    def begin(self, beginning: Beginning) -> None:
        """Make what is missing of the trajectories, on the first rank, which checks those that are there."""
        kept = self.section.trajectories
        if kept is None:
            return
        whole = beginning.whole({"vae": self.vae, "teacher": self.frozen["teacher"]})
        if whole is not None:
            self._make(beginning, whole)
        beginning.ranks.wait()
        self._kept = Trajectories(Path(kept.path), kept.rows, {})

    def _made_of(self, beginning: Beginning, whole: Mapping[str, nn.Module]) -> dict[str, Any]:
        section, kept = self.section, self.section.trajectories
        assert kept is not None
        return {
            "teacher": digest(whole["teacher"]),
            "Text VAE": digest(whole["vae"]),
            **{key: getattr(section, key) for key in ("guidance", "guidance_cap", "guidance_rescale")},
            **{key: getattr(section, key) for key in ("length", "prefix_share")},
            **{key: getattr(kept, key) for key in ("rows", "substeps", "solver")},
            "grid": list(kept.grid),
            "seed": self.recipe.seed,
            "text": beginning.text,
            "weights": source_weights(section, self.recipe.data.sources),
        }

    def _make(self, beginning: Beginning, whole: Mapping[str, nn.Module]) -> None:
        section, kept, vae, teacher = self.section, self.section.trajectories, whole["vae"], whole["teacher"]
        assert kept is not None
        assert isinstance(vae, TextVAE)
        assert isinstance(teacher, DiT)
        files = Trajectories(Path(kept.path), kept.rows, self._made_of(beginning, whole))
        missing, rows = files.missing, beginning.rows(self.recipe.seed)
        settings = sampler(kept, section.guidance, section.guidance_cap, section.guidance_rescale)
        device = beginning.ranks.device
        done = files.parts - len(missing)
        with beginning.display.task(f"{self.name}: trajectories", files.parts, done, passing=True):
            for number, part in enumerate(missing, start=1):
                if beginning.stopped():
                    return
                numbers = files.numbers(part)
                some, draws = batch(rows, numbers), self._fixed(numbers)
                networks = vae.to(device), teacher.to(device)
                states = roll_out(
                    *networks, some.to(device), draws.to(device), settings, kept.grid, self.system.pad_id
                )
                files.keep(part, some, states)
                beginning.display.advance(done + number, files.parts)

    def _fixed(self, numbers: Sequence[int]) -> Draws:
        """Return what is drawn for rows whose trajectories are kept: the same whenever they are used."""
        config, section = self.vae.config, self.section
        flow = dataclasses.replace(flow_settings(section, config.latent_dim), copies=1, history_dropout=0.0)
        generators = [row_generator(self.recipe.seed, _FIXED, number) for number in numbers]
        return draw_randomness(generators, config, section.length, VAEWeights(), flow, masked=False)

    def rollouts(self, step: int, rows: Batch, draws: Taught) -> tuple[Batch, Taught]:
        """Return rows whose trajectories are kept, in place of this step's own, where it learns from them."""
        if self._kept is None or not self._on_trajectory(step):
            return rows, draws
        assert draws.number is not None
        numbers = [number % self._kept.rows for number in draws.number.tolist()]
        fixed = self._fixed(numbers)
        kept, states = self._kept.read(numbers)
        own = dataclasses.replace(
            draws, posterior=fixed.posterior, prefix=fixed.prefix, states=states.float()
        )
        return kept, own

    # --- the loss ----------------------------------------------------------------------------

    def loss(self, networks: nn.ModuleDict, rows: Batch, draws: Taught, counts: Counts, step: int) -> Loss:  # type: ignore[override]
        """Return the loss of rows in a step, with the network that learns or its average."""
        student, teacher, section = networks["dit"], self.frozen["teacher"], self.section
        assert isinstance(student, DiT)
        assert isinstance(teacher, DiT)
        assert draws.timestep is not None
        assert draws.noise is not None
        cap = section.guidance_cap or math.inf
        guided = Guided(teacher, section.guidance, cap, section.guidance_rescale)
        with torch.no_grad():
            layout = rows_layout(self.vae, rows)
            q = encode(self.vae, rows.ids, layout, self.vae.config.log_snr)
            z0 = self.vae.normalise(draw(q, draws.posterior))
            clean = z0.view(len(rows), -1, self.vae.config.latent_dim)
            pinned = pin(self.vae, rows, draws, layout, self.system.pad_id)
            sample = sample_of_latents(rows, self.vae.config.patch_size)
            timestep, end, substeps = self._drawn(draws.timestep)
            if draws.states is not None:
                z, landed = (place(self._at(draws.states, at), pinned) for at in (timestep, end))
                target = target_of(z, landed, timestep, end)
            else:
                if self._on_trajectory(step):
                    noise, begin = place(draws.noise, pinned), torch.full_like(timestep, T)
                    z = landing(guided, noise, begin, timestep, clean, pinned, sample, section.rollout)
                else:
                    z = place(interpolate(clean[:, None], draws.noise, timestep / T), pinned)
                if section.grids is None:
                    target = guided.guess(z, timestep, clean, pinned, sample)
                else:
                    landed = landing(guided, z, timestep, end, clean, pinned, sample, substeps)
                    target = target_of(z, landed, timestep, end)
        told = end if section.landing_time else None
        errors = distillation_errors(student, z, target, timestep, clean, pinned, sample, told)
        total, terms = weighed(errors, timestep, pinned, counts, section.space)
        terms |= log_snr_terms(q, rows, counts)
        return Loss(total, {name: term.detach() for name, term in terms.items()})

    def _drawn(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return drawn timesteps (B, K, M), 0, and 1; with grids, where steps begin and end, and substeps.

        The law's own quantile chooses a grid by its share, and each of its intervals alike.
        """
        if not self._intervals:
            return timestep, torch.zeros_like(timestep), torch.ones_like(timestep)
        law = flow_settings(self.section, self.vae.config.latent_dim).law
        quantile = torch.special.ndtr((torch.logit(timestep / T, 1e-6) - law.loc) / law.scale)
        table = torch.tensor(self._intervals, dtype=timestep.dtype, device=timestep.device)
        edges = table[:, 3].cumsum(0)[:-1]
        begin, end, substeps, _ = table[torch.bucketize(quantile, edges, right=True)].unbind(-1)
        return T * begin, T * end, substeps

    def _at(self, states: Tensor, timestep: Tensor) -> Tensor:
        """Return states (B, M, P, C) at timesteps (B, K, M) of the kept ones: (B, K, M, C)."""
        assert self.section.trajectories is not None
        kept = T * torch.tensor(self.section.trajectories.grid, dtype=timestep.dtype, device=timestep.device)
        place_of = (timestep[..., None] - kept).abs().argmin(-1)
        copies = states[:, None].expand(-1, timestep.shape[1], -1, -1, -1)
        index = place_of[..., None, None].expand(*place_of.shape, 1, states.shape[-1])
        return copies.gather(3, index).squeeze(3)

    def _on_trajectory(self, step: int) -> bool:
        """Return whether a step's states are the teacher's own; in a validation, never."""
        if not torch.is_grad_enabled():
            return False
        # A number that no row has, see the draws of self-conditioning.
        generator = row_generator(self.recipe.seed, self.number, 2**42 + step)
        return bool(torch.rand((), generator=generator) < self.section.trajectory)

    # --- what it costs -----------------------------------------------------------------------

    @classmethod
    def phases(
        cls, recipe: Recipe, name: str, configs: Mapping[str, Any], placement: Placement
    ) -> list[Phase]:
        """Return the steps, with the teacher's passes, and what making the trajectories takes."""
        (phase,), section = super().phases(recipe, name, configs, placement), recipe.stages[name]
        assert isinstance(section, DistilSection)
        vae, dit, kept = configs["vae"], configs["dit"], section.trajectories
        passes = float(max((own.substeps for own in intervals(section) if own.share), default=1))
        passes = (
            passes + section.trajectory * section.rollout
            if kept is None
            else passes * (1 - section.trajectory)
        )
        phases = [with_teacher(phase, vae, dit, section, passes)]
        users = [
            other
            for other, own in recipe.trained.items()
            if isinstance(own, DistilSection) and own.steps and own.trajectories == kept
        ]
        if kept is not None and name == next(iter(users), None):  # Others find them made.
            phases.append(trajectories_phase(f"{name}, trajectories", vae, dit, section, placement))
        return phases
