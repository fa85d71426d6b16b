"""Recipes of stages that learn from answers, on a model that has seen very little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from colada.train.recipe import Recipe, load_recipe
from colada.train.trainer import Trainer
from runs import STORIES, TINY, recipe

TASKS = f"{{path: {STORIES}, format: tasks, tasks: [sums, greeting, questions], samples: 30}}"


def barely_taught(folder: Path) -> Path:
    """Train a model of conversations, so little that it has seen next to nothing; return where it is."""
    first = [f"data.sources=[{TASKS}]", "data.packing=samples", "stages.prior.kind=instruct"]
    lengths = ["stages.vae.length=64", "stages.prior.length=64", "stages.vae.steps=20", "stages.vae.lr=0.01"]
    Trainer(recipe(*first, *lengths, "run.validate_every=0", "run.sample_every=0"), folder / "run").run()
    return folder / "run" / "model"


def write_preferences(folder: Path) -> Path:
    """Write forty pairs of answers to a file, and return it."""
    file, lines = folder / "pairs.jsonl", []
    for n in range(40):
        prompt: Any = f"Say {n}." if n % 2 else [{"role": "user", "content": f"Say {n}."}]
        lines.append({"prompt": prompt, "chosen": f"It is {n}.", "rejected": f"I will not say {n * 7}!"})
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def made(start: Path, folder: Path, kind: str, source: str, *overrides: str) -> Recipe:
    yaml = folder / f"{kind}.yaml"
    yaml.write_text(f"model: {{init: {start}}}\nstages: {{{kind}: {{}}}}\n")
    common = [own for own in TINY if own.startswith(("data.", "run."))]
    mine = [f"data.sources=[{source}]", "data.packing=samples", "run.sample_every=0", "run.save_every=1"]
    stage = ["steps=6", "length=64", "warmup=0", "copies=2", "lr=0.003"]
    return load_recipe(yaml, [*common, *mine, *(f"stages.{kind}.{own}" for own in stage), *overrides])


def preferring(start: Path, pairs: Path, *overrides: str) -> Recipe:
    source = f"{{path: {pairs}, format: preferences}}"
    some = ["stages.preferences.batch=4", "stages.preferences.calibration=2", "stages.preferences.anchor=0.1"]
    return made(start, pairs.parent, "preferences", source, *some, *overrides)


def rewarding(start: Path, folder: Path, *overrides: str, kind: str = "reward") -> Recipe:
    some = ["batch=8", "prompts=2", "samples=3", "updates=2", "new_tokens=8", "unended=0"]
    some += ["reward=rules:letters"]
    some += ["sampler={steps: 2, guidance: 1.0}"]
    mine = [f"stages.{kind}.{own}" for own in some]
    return made(start, folder, kind, TASKS, *mine, "run.validate_every=3", *overrides)
