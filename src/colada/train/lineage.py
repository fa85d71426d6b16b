"""What a model has built in after each stage of a recipe, and stages that would undo it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colada.errors import ColadaError
from colada.generate.settings import UNGUIDED
from colada.locate import DECODER_DIR, find_tokenizer, locate
from colada.networks.checkpoint import read_configs
from colada.networks.config import DiTConfig
from colada.train.kinds import (
    DistilSection,
    FlowSection,
    FlowTerms,
    JointSection,
    PicturesSection,
    PreferencesSection,
    RolloutSection,
    SolverSection,
    StageSection,
    TaughtSection,
)
from colada.train.recipe import Recipe
from colada.train.teaching_terms import SAME


def built_in(recipe: Recipe, name: str, start: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the DiT has built in after a stage, as its configuration says it; None for nothing.

    Args:
        start: what it has before the first stage, None for nothing.

    Raises:
        ColadaError: if a teacher that has guidance built in would be guided once more, or there is none.
    """
    inside = None if start is None else dict(start)
    teacher: Mapping[str, Any] | None = None
    first = True
    for other, section in recipe.trained.items():
        if isinstance(section, TaughtSection) and section.steps:
            where = f"recipe: stages.{other}"
            if section.teacher == SAME and first:
                raise ColadaError(
                    f"{where}.teacher={SAME}, but no stage with one is before it: expected a model"
                )
            if section.teacher is None:
                teacher = inside
            elif section.teacher != SAME:
                teacher = read_configs(locate(section.teacher))[1].distilled
            if teacher is not None and section.guidance != 1:
                built = f"{teacher['guidance']:g}"
                raise ColadaError(
                    f"{where}.guidance={section.guidance:g}: its teacher has {built} built in, expected 1"
                )
            first = False
        if isinstance(section, DistilSection) and section.steps:
            inside = _inside(section, teacher)
        if other == name:
            break
    return inside


def _inside(section: DistilSection, teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    built = section.guided if teacher is None else teacher
    inside = {key: built.get(key, off) for key, off in UNGUIDED.items()}
    grids = None if section.grids is None else [list(grid) for grid in section.grids]
    inside |= {"teacher_steps": None if grids is None else _teacher_steps(section)}
    return inside | {"steps": None if grids is None else [len(grid) - 1 for grid in grids], "grids": grids}


def _teacher_steps(section: DistilSection) -> int:
    if section.trajectories is None:
        return section.teacher_steps
    return section.trajectories.substeps * (len(section.trajectories.grid) - 1)


def _of_data(section: StageSection) -> bool:
    """Return whether a stage trains the flow of data, as preferences' anchor does."""
    if isinstance(section, RolloutSection):
        return section.replay > 0 and section.replay_of == "data"
    return isinstance(section, FlowSection | JointSection | PicturesSection | PreferencesSection)


def check_order(recipe: Recipe, dit: DiTConfig) -> None:
    """Check that no stage undoes what one before it, or the model that a run begins with, has built in.

    Args:
        dit: of that model, or a new one's.

    Raises:
        ColadaError: as :func:`built_in`; or for a stage that trains the flow of data after a distillation,
            a teacher that takes its own last guess, which a student of other steps has never seen, a stage
            that leaves new layers as they are drawn, a second learnt solver of another size, or a judge
            that cannot be one.
    """
    _check_judges(recipe)
    _check_new_layers(recipe, dit)
    _check_solvers(recipe)
    start = dit.distilled
    distilled = start is not None
    for name, section in recipe.trained.items():
        if isinstance(section, TaughtSection) and section.steps and dit.self_conditioning:
            raise ColadaError(f"recipe: stages.{name} of a DiT with self_conditioning, expected one without")
        if section.steps:
            inside = built_in(recipe, name, start)
            if isinstance(section, RolloutSection) and inside is not None and inside.get("grids"):
                raise ColadaError(
                    f"recipe: stages.{name} learns at any time, but the model before it makes a few steps"
                    " only, expected one without grids: distil after"
                )
        if isinstance(section, DistilSection) and section.steps:
            distilled = True
        elif distilled and _of_data(section) and section.steps:
            raise ColadaError(
                f"recipe: stages.{name} trains the flow of data, which undoes what a distilled model has"
                " built in: fine-tune first, distil after"
            )


def _check_judges(recipe: Recipe) -> None:
    """Raise ColadaError for a judge that is not there, or cannot be one."""
    for name, section in recipe.trained.items():
        if isinstance(section, RolloutSection) and section.steps and section.judge is not None:
            check_judge(f"recipe: stages.{name}.judge={section.judge}", locate(section.judge))


def check_judge(where: str, directory: Path) -> None:
    """Raise ColadaError, beginning with ``where``, for a model that cannot say how likely a text is."""
    if find_tokenizer(directory) is None:
        raise ColadaError(f"{where} has no tokenizer.json, expected one: it reads texts")
    if not (directory / DECODER_DIR).is_dir() and read_configs(directory)[1].distilled is not None:
        raise ColadaError(f"{where} is distilled, expected a model that has a likelihood")


def _check_new_layers(recipe: Recipe, dit: DiTConfig) -> None:
    """Raise ColadaError for a first stage of something new to the DiT that does not train all of it."""
    start = None if recipe.model.init is None else read_configs(locate(recipe.model.init))[1]
    pictures = start is not None and start.img_channels > 0
    guesses = start is not None and start.self_conditioning
    for name, section in recipe.trained.items():
        if not section.steps or not isinstance(section, FlowTerms):
            continue
        needed = {
            "pictures": isinstance(section, PicturesSection) and not pictures,
            "its own guess as an input": section.self_conditioning > 0 and not guesses,
        }
        new = [what for what, is_new in needed.items() if is_new]
        if section.train == "pictures":  # Which has all that is new of them.
            new = [what for what in new if what != "pictures"]
        if new and section.train != "all":
            raise ColadaError(
                f"recipe: stages.{name}.train={section.train!r}, but the DiT has not learnt {new[0]} before:"
                " new layers would stay as they are drawn, expected 'all'"
            )
        pictures |= isinstance(section, PicturesSection)
        guesses |= section.self_conditioning > 0


def _check_solvers(recipe: Recipe) -> None:
    """Raise ColadaError for learnt solvers of two sizes: a model has one."""
    sizes = {
        name: section.evaluations
        for name, section in recipe.trained.items()
        if isinstance(section, SolverSection) and section.steps
    }
    if len(set(sizes.values())) > 1:
        sizes_named = ", ".join(f"stages.{name}.evaluations={size}" for name, size in sizes.items())
        raise ColadaError(f"recipe: {sizes_named}: a model has one learnt solver, expected equal numbers")
