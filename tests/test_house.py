"""The order of the house: imports point down and in no circle, files are short, a class name is one class."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/colada"
# From the ground up: a shelf's modules import from their own shelf and those before it.
SHELVES = [
    "",
    "text",
    "data",
    "networks",
    "pictures",
    "generate",
    "models",
    "train",
    "evaluate",
    "report",
    "serve",
    "cli",
]
FRONT_DOOR = ("colada", "colada.__main__")
MOST_LINES = 500
# To be mended: none may be added.
CLIMBS: set[str] = set()
LONG: set[str] = set()

MODULES = {
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(module: str) -> Iterator[str]:
    """The package's modules that one imports, wherever in it, except for types only."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for branch in ast.walk(tree):  # What is imported for its types alone is not there when the code runs.
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING":
            branch.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "colada":
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)


def shelf(module: str) -> str:
    """The shelf that a module stands on."""
    parts = module.split(".")[1:]
    return parts[0] if len(parts) > 1 or (PACKAGE / parts[0]).is_dir() else ""


INSIDE = [module for module in MODULES if module not in FRONT_DOOR]


@pytest.mark.parametrize("module", INSIDE)
def test_imports_point_down(module: str) -> None:
    own = SHELVES.index(shelf(module))
    climbs = [
        other for other in imports(module) if other not in FRONT_DOOR and SHELVES.index(shelf(other)) > own
    ]
    assert bool(climbs) == (module.removeprefix("colada.") in CLIMBS), climbs


def test_no_imports_go_in_a_circle() -> None:
    graph = {module: {other for other in imports(module) if other in INSIDE} - {module} for module in INSIDE}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = [module.removeprefix("colada.") for module in reversed(error.args[1])]
        if not CLIMBS.intersection(circle):
            pytest.fail(" -> ".join(circle))


@pytest.mark.parametrize("folder", ["src", "benchmarks", "experiments", "examples"])
def test_no_file_is_too_long(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= MOST_LINES or str(path).endswith(tuple(LONG)), f"{path.relative_to(ROOT)}: {lines}"


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}
