"""What of a DiT learns: products of low rank against factors of autograd's own, and the modulation alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import colada
from colada.errors import ColadaError
from colada.networks.dit import DiT
from colada.train.cost import Placement, state_bytes
from colada.train.kinds import PriorSection
from colada.train.lora import LowRankAdamW, choose
from colada.train.optimisation import make_optimisers
from colada.train.recipe import Recipe, load_recipe
from colada.train.trainer import Interrupted, Trainer
from helpers import tiny_dit
from runs import TINY, At, assert_same_run, recipe, same

RANK = 2
LORA = ["stages.prior.train=lora", f"stages.prior.rank={RANK}", "stages.prior.lr=0.05"]


def test_the_steps_are_those_of_factors_under_autograd() -> None:
    seeded = torch.Generator().manual_seed(3)
    x, wanted = torch.randn(20, 6, generator=seeded), torch.randn(20, 5, generator=seeded)
    first = torch.randn(5, 6, generator=seeded)
    matrix = nn.Parameter(first.clone())
    settings = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}
    merged = LowRankAdamW([matrix], RANK, **settings)  # type: ignore[arg-type]
    plain: torch.optim.Optimizer | None = None
    for _ in range(6):
        merged.zero_grad()
        (x @ matrix.T - wanted).square().mean().backward()
        merged.step()
        if plain is None:  # From the first factors, which the step before has moved: B alone, from 0.
            bound = 6**-0.5
            a = nn.Parameter(merged.state[matrix]["a"] / (1 - 0.02 * 0.1))
            assert float(a.detach().abs().max()) <= bound
            b = nn.Parameter(torch.zeros(5, RANK))
            plain = torch.optim.AdamW([a, b], **settings)  # type: ignore[arg-type]
        plain.zero_grad()
        (x @ (first + b @ a).T - wanted).square().mean().backward()
        plain.step()
        torch.testing.assert_close(matrix.detach(), (first + b @ a).detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "run"
    Trainer(recipe("run.validate_every=0", "run.sample_every=0"), out).run()
    return out


def continued(start: Path, *overrides: str) -> Recipe:
    """A prior alone, from the model of a run."""
    yaml = start / "continued.yaml"
    yaml.write_text(f"model: {{init: {start / 'model'}}}\nstages: {{prior: {{}}}}\n")
    keys = ("data.", "run.", "stages.prior.")
    return load_recipe(yaml, [*(own for own in TINY if own.startswith(keys)), *overrides])


def test_low_rank_moves_each_matrix_within_its_rank_and_resumes(start: Path, tmp_path: Path) -> None:
    made = continued(start, *LORA, "stages.prior.ema=0", "run.sample_every=0")
    Trainer(made, tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        Trainer(made, tmp_path / "resumed", At("prior", 3)).run()
    Trainer(made, tmp_path / "resumed").run()
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    before, after = (colada.load(path / "model") for path in (start, tmp_path / "whole"))
    moved = 0
    for (name, old), new in zip(before.dit.named_parameters(), after.dit.parameters(), strict=True):
        difference = (new - old).detach().double()
        if name.startswith("blocks.") and old.ndim == 2:
            values = torch.linalg.svdvals(difference)
            assert float(values[RANK:].max(initial=0) if False else values[RANK:].max()) < 1e-4 * float(
                values[0]
            )
            moved += float(values[0]) > 1e-3
        else:
            assert not bool(difference.any()), name
    assert moved >= 4


def test_the_modulation_alone_learns(start: Path, tmp_path: Path) -> None:
    Trainer(
        continued(start, "stages.prior.train=adaln", "stages.prior.optimiser=muon"), tmp_path / "run"
    ).run()
    before, after = (colada.load(path / "model") for path in (start, tmp_path / "run"))
    for (name, old), new in zip(before.dit.named_parameters(), after.dit.parameters(), strict=True):
        assert same(old, new) == ("ada." not in name), name


@pytest.mark.parametrize("train", ["all", "adaln", "lora"])
def test_the_planned_memory_is_what_there_is(train: str) -> None:
    dit = tiny_dit()
    section = PriorSection(train=train, rank=RANK)
    choose(dit, train)
    (optimiser,) = make_optimisers(dit, section, 1e-3)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    there = [x for state in optimiser.state.values() for x in state.values() if x.ndim]
    grads = [p.grad for p in dit.parameters() if p.grad is not None]
    planned = state_bytes([DiT(dit.config)], Placement(1, bfloat16=False, train=train, rank=RANK))
    assert planned["gradients"] == 4 * sum(x.numel() for x in grads)
    assert planned["optimiser"] == 4 * sum(x.numel() for x in there)


def test_muon_has_no_factors() -> None:
    with pytest.raises(ColadaError, match="train='lora' with optimiser='muon', expected 'adamw'"):
        recipe("stages.prior.train=lora", "stages.prior.optimiser=muon")
