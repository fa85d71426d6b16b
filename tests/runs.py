"""Tiny training runs for tests: a recipe of a fraction of a second, and ways to interrupt and compare."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import make_stories
from colada.train.checkpoints import find
from colada.train.display import Display
from colada.train.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
DEBUG = ROOT / "recipes" / "debug.yaml"
STORIES = make_stories.STORIES.parent

# Both stages in a fraction of a second.
TINY = [
    f"data.sources=[{{path: {STORIES}}}]",
    "data.workers=1",
    "tokenizer.vocab_size=300",
    "model.vae.dim=16",
    "model.vae.ffn_dim=16",
    "model.vae.num_heads=2",
    "model.dit.txt_dim=16",
    "model.dit.emb_dim=16",
    "model.dit.head_dim=8",
    "model.dit.rope_dim=8",
    "model.dit.num_layers=1",
    *(f"stages.{name}.{setting}" for name in ("vae", "prior") for setting in ("steps=6", "batch=4")),
    *(f"stages.{name}.{setting}" for name in ("vae", "prior") for setting in ("length=16", "warmup=2")),
    "stages.prior.prefix_share=0.2",
    "run.log_every=1",
    "run.validate_every=3",
    "run.validation_rows=4",
    "run.save_every=2",
    "run.sample_every=3",
    "run.sample_tokens=5",
    "run.report=false",
    "generation.steps=2",
]
# What depends on the clock or the machine.
MEASURED = ("time", "tokens_per_s", "mfu", "memory_gb")


def recipe(*overrides: str) -> Recipe:
    """The tiny recipe, changed."""
    return load_recipe(DEBUG, [*TINY, *overrides])


def metrics(out: Path) -> list[dict[str, Any]]:
    """All records of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def logged(out: Path) -> list[dict[str, Any]]:
    """What a run logged, without what no two runs share."""
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in metrics(out)]


def final_state(out: Path) -> dict[str, Any]:
    """All tensors of a run's last checkpoint, read by torch's own converter."""
    checkpoint = find(out, "auto")
    assert checkpoint is not None
    whole = out / "whole.pt"
    dcp_to_torch_save(checkpoint, whole)
    state: dict[str, Any] = torch.load(whole, weights_only=False)
    whole.unlink()
    return state


def same(one: Any, other: Any) -> bool:
    """Whether two nested structures of tensors agree bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same_run(out: Path, other: Path) -> None:
    """Both runs ended in the same tensors, bit for bit, and wrote the same model."""
    assert same(final_state(out), final_state(other))
    files = [sorted(path.rglob("*.safetensors")) for path in (out / "model", other / "model")]
    assert len(files[0]) == len(files[1]) >= 2
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes()


class At(Display):
    """A display that acts after one step of a stage: as if SIGTERM came then."""

    def __init__(self, stage: str, step: int) -> None:
        super().__init__()
        self.where, self.title = (stage, step), ""

    @contextmanager
    def task(
        self, title: str, total: int, start: int = 0, passing: bool = False, unit: str = "steps"
    ) -> Iterator[None]:
        self.title = title
        with super().task(title, total, start, passing, unit):
            yield

    def update(self, step: int, terms: Mapping[str, Any]) -> None:
        super().update(step, terms)
        if (self.title, step) == self.where:
            self.act()

    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class CrashAt(At):
    """One that fails."""

    def act(self) -> None:
        raise ZeroDivisionError("the machine was switched off")


SHORT = ["stages.prior.steps=0", "run.sample_every=0"]
JOINT = ["stages.prior.kind=joint", "stages.prior.vae_lr=0.1", "stages.vae.ema=0.9", "stages.prior.ema=0.95"]
VARIANTS = {
    "frozen": ["stages.prior.ema=0"],
    "joint": [*JOINT, "stages.vae.micro_batch=2", "stages.prior.micro_batch=3"],
    "interval": [
        *JOINT,
        "stages.prior.kind=joint",
        "stages.prior.interval=[2, 1]",
        "stages.prior.copies=2",
        "stages.prior.schedule=wsd",
    ],
    "levers": [
        "stages.vae.ema=0.8",
        "stages.prior.self_conditioning=0.5",
        "stages.prior.history_dropout=0.3",
        "stages.prior.space=half",
    ],
    "more levers": [
        "stages.vae.decoder_only=0.5",
        "stages.prior.ema=0.9",
        "stages.prior.consistency=0.7",
        "stages.prior.consistency_ramp=0.5",
        "stages.prior.adaptive_timesteps=true",
        "stages.prior.dropout=0.2",
    ],
    "muon": [*JOINT, "stages.vae.optimiser=muon", "stages.prior.optimiser=muon"],
}
