"""What a run is refused for before anything is done: nothing here waits for torch, or reads a text."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from colada.data.sources import check_sources
from colada.errors import ColadaError
from colada.files import require_file
from colada.locate import local
from colada.train.environment import world_size
from colada.train.logs import check_names
from colada.train.pairs import open_pairs
from colada.train.recipe import Recipe
from colada.train.teaching_terms import SAME


def preflight(recipe: Recipe, out: Path | None = None) -> list[str]:
    """Check what a run needs, as far as that takes no time.

    Args:
        out: where it is going to write.

    Returns: lines to show: what is read of the sources, and what the run goes without.

    Raises:
        ColadaError: for what is missing or does not fit.
    """
    world_size()
    if out is not None and out.exists() and not out.is_dir():
        raise ColadaError(f"{out} is a file, expected the run's directory, or where there is nothing yet")
    check_names(recipe.run.monitors)
    lines = check_sources(recipe.data.sources, out)
    _check_packages(recipe)
    splits = open_pairs(recipe)
    lines += [] if splits is None else splits.notes
    questions = [getattr(section, "questions", None) for section in recipe.trained.values() if section.steps]
    for path in (recipe.tokenizer.file, recipe.data.chat_template, *questions):
        if path is not None:
            require_file(path)
    named = [recipe.model.init]
    for section in recipe.trained.values():
        if section.steps:
            teacher = getattr(section, "teacher", None)
            named += [None if teacher == SAME else teacher, getattr(section, "judge", None)]
    for where in named:
        if where is not None:
            local(where)
    recipe.check_networks()
    if recipe.run.report and find_spec("matplotlib") is None:
        lines.append('there will be no report, which needs matplotlib: pip install "colada-lm[train]"')
    return lines


def _check_packages(recipe: Recipe) -> None:
    """Raise ColadaError for a package that is missing, rather than hours later."""
    needs = [("tensorboard", "the tensorboard monitor", "tensorboard" in recipe.run.monitors, "tensorboard")]
    needs.append(("datasets", "hub data", any(source.hub for source in recipe.data.sources), "hub"))
    for package, what, needed, extra in needs:
        if needed and find_spec(package) is None:
            raise ColadaError(f'{what} needs {package}: pip install "colada-lm[{extra}]"')
