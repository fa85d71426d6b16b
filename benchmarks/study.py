"""The scaling study as a part of benchmarks/gpu.sh: three compute points, for as long as there is time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit import open_kit
from benchmarks.part import ROOT, Failed, Part, reached
from colada.files import write_json, write_text
from colada.strict_yaml import dump_yaml
from colada.train.checkpoints import find
from colada.train.recipe import load_recipe
from experiments.scaling.data import RECORD_FILE, write_documents

STUDY = ROOT / "recipes/scaling-gpu.yaml"
STUDY_TOKENIZER = "scaling-tokenizer.json"
POINTS = {"small": 9, "medium": 3, "large": 1}  # One in so many of the recipe's steps.


def scaling(part: Part) -> None:
    """Train and ask the models of the scaling study for as long as there is time; resumable.

    Finished cells are in the part's file. On another machine the study goes on from them, if that file is in
    the kit; a cell that is half trained needs the part's ``run``.
    """
    recipe = ROOT / "recipes/debug.yaml" if part.debug else STUDY
    benchmarks, study = part.kit / "benchmarks", part.run / "study"
    job = ["--seeds", "2", "--limit", "64"]
    debug: list[str] = []
    if part.debug:
        job = ["--seeds", "1", "--limit", "2", "--tasks", "obqa", "-n", "4", "--text-bytes", "256"]
        debug = [f"stages.{stage}.{size}" for stage in ("vae", "prior") for size in ("steps=9", "batch=4")]
        debug += ["run.validate_every=0", "run.sample_every=0", "run.report=false"]
        benchmarks = rehearsal(part.run)
    job += ["--benchmarks", str(benchmarks), "--out", str(study), "--device", part.device.type]

    def train() -> dict[str, Any]:
        settings = debug if part.debug else open_study(part.kit)
        recipes = write_points(recipe, [*settings, *part.overrides], part.run)
        words = ["-m", "experiments.scaling", "run", *map(str, recipes), *job]
        status, _ = part.command(*words, good=(0, 130), stop_after=part.training_time)
        return {"finished": status == 0}

    def cells() -> dict[str, Any]:
        paths = sorted(study.glob("*/*/seed*/cell.json"))
        return {path.parent.relative_to(study).as_posix(): json.loads(path.read_text()) for path in paths}

    def under_way() -> dict[str, Any]:
        runs = [run for run in study.glob("*/*/seed*/training") if not (run.parent / "cell.json").exists()]
        begun = [run for run in sorted(runs) if find(run, "auto") is not None]
        return {run.parent.relative_to(study).as_posix(): reached(run) for run in begun}

    def table() -> str:
        part.command("-m", "experiments.scaling", "figure", str(study))
        shutil.copyfile(study / "scaling.svg", part.out / "scaling.svg")
        return (study / "scaling.md").read_text()

    if (part.kit / "scaling.json").is_file():
        part.add("from the kit", lambda: restore(part.kit / "scaling.json", study))
    part.add("training", train)
    part.add("under way", under_way)
    if part.add("cells", cells):
        part.add("table", table)


def open_study(kit: Path) -> list[str]:
    """Return the settings with which the study's recipe takes what it reads from a kit that was carried here.

    Raises:
        Failed: for a kit without it.
    """
    if not (kit / STUDY_TOKENIZER).is_file():
        raise Failed(f"no {kit / STUDY_TOKENIZER}, expected a kit of benchmarks/gather.py --benchmarks")
    if not (kit / "corpora" / RECORD_FILE).is_file():
        write_documents(kit / "benchmarks", kit / "corpora", letters=True)
    return open_kit(STUDY, kit, STUDY_TOKENIZER)


def write_points(recipe: Path, settings: Sequence[str], run: Path) -> list[Path]:
    """Write a recipe for each compute point, of fewer steps each, and return the files."""
    stages = load_recipe(recipe, settings).stages_of("cola")
    paths = []
    for name, part in POINTS.items():
        steps = [f"stages.{stage}.steps={section.steps // part}" for stage, section in stages.items()]
        paths.append(run / f"{name}.yaml")
        # Only what is said: the baselines' keys that are left out follow from Cola DLM's stages.
        said = load_recipe(recipe, [*settings, *steps]).model_dump(mode="json", exclude_unset=True)
        write_text(paths[-1], dump_yaml(said))
    return paths


def restore(file: Path, study: Path) -> list[str]:
    """Put the cells of an earlier part's file that a study lacks into it, and return their names."""
    there = json.loads(file.read_text())["results"].get("cells", {})
    missing = [name for name in there if not (study / name / "cell.json").exists()]
    for name in missing:
        (study / name).mkdir(parents=True, exist_ok=True)
        write_json(study / name / "cell.json", there[name], sort=False)
    return missing


def rehearsal(run: Path) -> Path:
    """Write a benchmark of two questions, and return its directory."""
    run.mkdir(parents=True, exist_ok=True)
    colours = ["red", "blue", "green", "grey"]
    question = {"context": "", "choices": colours, "answer": "blue", "answer_index": 1}
    records = [{"id": n, "question": f"Which colour has bird {n}?", **question} for n in range(2)]
    write_text(run / "obqa.test.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    return run
