"""Gather, on a machine with a network, what benchmarks/gpu.sh needs on one without: a kit in one folder.

The kit holds the corpora of a recipe, its tokenizer and its token shards, the parity fixtures, and the wheels
of all packages but torch; with --benchmarks also what the scaling study asks and learns, and its tokenizer.
On the other machine it is to lie in runs/kit of the repository.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.kit import KIT_TIME, kit_overrides, place_in
from benchmarks.measure import made_with
from benchmarks.part import ROOT
from benchmarks.study import STUDY, STUDY_TOKENIZER
from colada.data.listing import find_files
from colada.errors import ColadaError
from colada.evaluate.data import find_file
from colada.evaluate.tasks import TASKS, THE_EIGHT
from colada.files import write_json, write_text
from colada.train.inputs import prepare_inputs, train_tokenizer
from colada.train.recipe import load_recipe
from experiments.scaling.data import LICENCES, RECORD_FILE, SPLIT, write_documents

TESTING = ("pytest", "pytest-xdist")
GLIBC = range(17, 40)  # pip takes each manylinux tag at its word: a newer one does not stand for older ones.
SIZE = 64  # MiB that are easily carried.


def gather_text(
    recipe: Path, corpora: Path, kit: Path, shards: bool, tokenizer_file: str = "tokenizer.json"
) -> None:
    """Copy the files that a recipe reads and the kit lacks, train its tokenizer, and prepare its shards.

    Raises:
        ColadaError: for corpora that lack a source's files, or a recipe that does not read files.
    """
    original = load_recipe(recipe)
    (kit / "corpora").mkdir(exist_ok=True)
    for source in original.data.sources:
        if source.path is None:
            raise ColadaError(f"{recipe}: {source.name} is not read from files")
        if place_in(kit / "corpora", source.path).is_file():
            continue
        for path in find_files(place_in(corpora, source.path), source.include):
            shutil.copyfile(path, kit / "corpora" / path.name)
    for path in (kit / "corpora").iterdir():
        os.utime(path, (KIT_TIME, KIT_TIME))
    moved = load_recipe(recipe, kit_overrides(original.data.sources, kit, tokenizer_file))
    tokenizer = train_tokenizer(moved)
    tokenizer.save(kit / tokenizer_file)
    if shards:
        prepare_inputs(moved, tokenizer, None, kit / "shards", print)


def gather_study(benchmarks: Path, corpora: Path, kit: Path) -> None:
    """Copy the items that the scaling study asks and those it learns, and train its tokenizer.

    The documents made of them are left out, as are its shards: they are larger, and quickly made.

    Raises:
        ColadaError: for a benchmark's file that is not there, or as :func:`gather_text`.
    """
    (kit / "benchmarks").mkdir()
    splits = [f"{TASKS[name].data}.{TASKS[name].split}" for name in THE_EIGHT]
    for stem in [*splits, *(f"{TASKS[name].data}.{SPLIT}" for name in LICENCES)]:
        path = find_file(benchmarks, [stem])
        shutil.copyfile(path, kit / "benchmarks" / path.name)
    written = write_documents(kit / "benchmarks", kit / "corpora", letters=True)
    gather_text(STUDY, corpora, kit, False, STUDY_TOKENIZER)
    for name in [RECORD_FILE, *(one.file for one in written)]:
        (kit / "corpora" / name).unlink()


def gather_wheels(kit: Path, python: str, machine: str, have: set[str]) -> None:
    """Download the wheels of everything that training and testing need, torch aside.

    Args:
        python, machine: version and architecture of the machine they are for.
        have: packages, normalised, that are there already.

    Raises:
        ColadaError: if pip finds no wheel of a package.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"], *TESTING]
    wanted = [line for line in wanted if normalised(line) != "torch"]
    write_text(kit / "requirements.txt", "\n".join(wanted) + "\n")
    pins = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if normalised(line) != "torch"
    ]
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC]
    platforms += [f"--platform=manylinux2014_{machine}", f"--platform=linux_{machine}"]
    with tempfile.TemporaryDirectory() as directory:
        write_text(Path(directory) / "pins.txt", "\n".join(pins) + "\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
        command += ["--implementation=cp", f"--python-version={python}", *platforms]
        command += ["--constraint", f"{directory}/pins.txt", "--dest", f"{directory}/wheels"]
        if subprocess.call([*command, *wanted]):
            raise ColadaError("pip could not download every wheel; what it said stands above")
        (kit / "wheels").mkdir()
        for wheel in sorted(Path(directory, "wheels").glob("*.whl")):
            if normalised(wheel.name.partition("-")[0]) not in have:
                shutil.copyfile(wheel, kit / "wheels" / wheel.name)


def normalised(requirement: str) -> str:
    """Return the name of a package as packages are compared."""
    name = re.match(r"[\w.-]*\w", requirement)
    return re.sub(r"[-_.]+", "-", name[0] if name else "").lower()


def main(
    corpora: Annotated[Path, typer.Argument(help="Folder of the recipe's text files.")],
    kit: Annotated[Path, typer.Option("--out", help="Folder to make.")] = Path("runs/kit"),
    recipe: Annotated[Path, typer.Option(help="Whose text.")] = ROOT / "recipes/tiny-gpu.yaml",
    fixtures: Annotated[Path, typer.Option(help="Folder of parity fixtures.")] = ROOT.parent
    / "shared/fixtures/parity",
    python: Annotated[
        str, typer.Option(help="Python's version on the other machine.")
    ] = f"{sys.version_info.major}.{sys.version_info.minor}",
    machine: Annotated[str, typer.Option(help="Its architecture.")] = platform.machine(),
    have: Annotated[
        str, typer.Option(metavar="NAME,...", help="Packages it has, whose wheels are left out.")
    ] = "",
    benchmarks: Annotated[
        Path | None,
        typer.Option(help="Folder of the benchmarks, for the scaling study. Default: without it."),
    ] = None,
    shards: Annotated[bool, typer.Option(help="Prepare the token shards; otherwise it makes them.")] = True,
    wheels: Annotated[bool, typer.Option(help="Download wheels.")] = True,
) -> None:
    """Make the kit."""
    if kit.exists():
        raise typer.BadParameter(f"{kit} exists; remove it, or give another --out")
    kit.mkdir(parents=True)
    try:
        gather_text(recipe, corpora, kit, shards)
        if benchmarks is not None:
            gather_study(benchmarks, corpora, kit)
        if not fixtures.is_dir():
            raise ColadaError(f"--fixtures {fixtures}: no such folder")
        shutil.copytree(fixtures, kit / "parity", copy_function=shutil.copyfile)
        if wheels:
            gather_wheels(kit, python, machine, {normalised(name) for name in have.split(",") if name})
    except ColadaError as error:
        shutil.rmtree(kit)
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    facts = {"made_with": made_with(torch.device("cpu")), "python": python, "machine": machine}
    write_json(kit / "kit.json", facts, sort=False)
    total = 0.0
    for path in sorted(kit.iterdir()):
        size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()) / 2**20
        total += size
        print(f"{path.name:<18}{size:8.1f} MiB")
    if total > SIZE:
        print(f"larger than {SIZE} MiB: leave out what the machine has (--have) or can make (--no-shards)")


if __name__ == "__main__":
    typer.run(main)
