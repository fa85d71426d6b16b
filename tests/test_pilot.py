"""The pilot at its smallest: variants at equal FLOPs, lines that are measured once, shortcuts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from colada.errors import ColadaError
from colada.models.load import load_cola
from colada.train.plan import plan_run
from colada.train.recipe import commented, load_recipe
from colada.train.trainer import Trainer
from experiments import common, pilot
from runs import STORIES, recipe

AR = [
    "stages={decoder: {steps: 2, batch: 4, length: 16}}",
    "model.decoder={dim: 16, num_layers: 1, num_heads: 2, ffn_dim: 16}",
]
ROOT = Path(__file__).resolve().parents[1]


def test_lines_are_compared_where_their_variety_is_equal() -> None:
    def points(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [{"distinct_2": variety, "nats_per_token": nats} for variety, nats in pairs]

    line = points((0.7, 4.0), (0.45, 3.0), (0.55, 3.2))
    assert pilot.nats_at(line, 0.5) == pytest.approx(3.1)
    assert pilot.nats_at(line, 0.6) == pytest.approx(3.2 + 0.8 / 3)
    assert pilot.nats_at(line, 0.4) is None
    table = pilot.compared({"base": [line, points((0.45, 3.2), (0.55, 3.4))]})
    assert table["base"]["0.5"] == {
        "nats": pytest.approx(3.2),
        "standard_error": pytest.approx(0.1),
        "seeds": 2,
    }
    assert table["base"]["0.4"]["nats"] is None


def test_a_line_is_the_mean_of_its_seeds() -> None:
    def point(variety: float, nats: float) -> dict[str, Any]:
        return {"distinct_2": variety, "nats_per_token": nats, "settings": {"guidance": 2.0}}

    (mean,) = pilot.averaged("base", [[point(0.4, 3.0)], [point(0.5, 3.2)]])
    assert mean["perplexity"] == pytest.approx(math.exp(3.1))
    assert mean["standard_error"] == pytest.approx(0.1 * math.exp(3.1))
    assert mean["distinct_2"] == pytest.approx(0.45)
    assert (mean["model"], mean["settings"]) == ("base", {"guidance": 2.0})
    assert pilot.averaged("base", [[point(0.4, 3.0)]])[0]["standard_error"] is None


@pytest.mark.parametrize("variant", pilot.VARIANTS)
def test_every_variant_is_a_recipe(variant: str) -> None:
    recipe = ROOT / "recipes/tiny.yaml"
    base, changed = load_recipe(recipe).stages, load_recipe(recipe, pilot.VARIANTS[variant]).stages
    assert [name for name in base if name != "prior" and changed[name] != base[name]] == []
    # The recipe's own lever and optimiser are among them.
    assert (changed["prior"] == base["prior"]) == (variant in ("history dropout", "Muon 4e-3"))


def test_what_nobody_knows_is_refused_before_anything_is_read() -> None:
    for words, message in (
        (["run", "nothing.yaml", "--init", "x", "--only", "bsae"], "--only 'bsae' (did you mean 'base'?)"),
        (["shortcuts", "x", "--guidance", "1;2"], "--guidance '1;2', expected numbers"),
    ):
        result = CliRunner().invoke(pilot.app, [*words, "--judge", "x"])
        assert isinstance(result.exception, ColadaError)
        assert message in str(result.exception)


def test_the_pilot_trains_measures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(common, "NEW_TOKENS", 8)
    quick = ["run.validate_every=0", "run.sample_every=0", "run.save_every=100"]
    Trainer(recipe(*quick, "stages.prior.steps=0"), tmp_path / "vae").run()
    Trainer(recipe(*quick, "model.arch=ar", *AR), tmp_path / "judge").run()
    file = tmp_path / "recipe.yaml"
    file.write_text(commented(recipe(*quick)))
    data = tmp_path / "data"
    data.mkdir()
    stories = [own for own in (STORIES / "stories.txt").read_text().split("<|endoftext|>") if own.strip()]
    lines = [{"text": own, "split": "validation" if n < 4 else "train"} for n, own in enumerate(stories[:40])]
    (data / "stories.jsonl").write_text("".join(json.dumps(own) + "\n" for own in lines))
    judge = ["--judge", str(tmp_path / "judge/model"), "--data", str(data), "--documents", "3"]
    only = ["--only", "base", "--only", "self-conditioning"]
    command = [
        "run",
        str(file),
        "--init",
        str(tmp_path / "vae/model"),
        *judge,
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--steps", "6", "--seeds", "1", *only, "--beside", str(tmp_path / "judge/model")]
    first = CliRunner().invoke(pilot.app, command)
    assert first.exit_code == 0, first.output
    record = json.loads((tmp_path / "out/pilot.json").read_text())
    assert [point["settings"]["guidance"] for point in record["points"][:6]] == list(common.GUIDANCE)
    beside = [str(tmp_path / "judge/model")] * len(common.TEMPERATURES)
    assert [point["model"] for point in record["points"]] == [
        *["base"] * 6,
        *["self-conditioning"] * 6,
        *beside,
    ]
    temperatures = [point["settings"]["temperature"] for point in record["points"][12:]]
    assert temperatures == list(common.TEMPERATURES)
    assert set(record["nats_at_equal_distinct_2"]) == {
        "base",
        "self-conditioning",
        str(tmp_path / "judge/model"),
    }
    assert (tmp_path / "out/pilot.html").is_file()
    assert "self-conditioning" in (tmp_path / "out/pilot.svg").read_text()
    # Self-conditioning costs more a step, so it has fewer.
    costs = []
    for number in (0, 2):
        made = load_recipe(tmp_path / f"out/{number}-0/recipe.yaml")
        costs.append((made.stages["prior"].steps, plan_run(made).cost.total_flops))
    assert costs[1][0] < costs[0][0] == 6
    assert costs[1][1] == pytest.approx(costs[0][1], rel=0.1)
    assert load_cola(tmp_path / "out/2-0/model").dit.config.self_conditioning
    before = (tmp_path / "out/0-0/line.json").stat().st_mtime_ns
    again = CliRunner().invoke(pilot.app, command)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out/0-0/line.json").stat().st_mtime_ns == before
    # Neither another recipe's model nor another question's line stands for what is asked now.
    other = CliRunner().invoke(pilot.app, [*command, "--set", "stages.prior.lr=0.5"])
    assert isinstance(other.exception, ColadaError)
    assert "is of another recipe: stages.prior.lr was" in str(other.exception)
    fewer = CliRunner().invoke(pilot.app, [*command, "--documents", "2", "--only", "base"])
    assert fewer.exit_code == 0, fewer.output
    assert json.loads((tmp_path / "out/0-0/line.json").read_text())["real"]["texts"] == 2
    ways = ["--only", "as stored", "--only", "4 candidates of 8 steps", "--guidance", "1,3"]
    result = CliRunner().invoke(
        pilot.app,
        ["shortcuts", str(tmp_path / "out/0-0/model"), *judge, "--out", str(tmp_path / "ways"), *ways],
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "ways/pilot.json").read_text())
    assert [point["settings"]["candidates"] for point in record["points"]] == [1, 1, 4, 4]
