"""Stages that learn from preferences between two answers; and what they share with those of rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from answers import TASKS, made, preferring, rewarding
from colada.cli.main import main
from colada.errors import ColadaError
from colada.train.preferences import PairNoise
from colada.train.recipe import Recipe, commented
from colada.train.stages import make_stage
from colada.train.trainer import Interrupted, Trainer
from on_ranks import on_ranks
from runs import At, assert_same_run, final_state, logged, metrics


@pytest.fixture(scope="module")
def preferred(start: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preferred") / "run"
    Trainer(preferring(start, pairs), out).run()
    return out


def test_preferences_are_logged_from_nothing_on(preferred: Path) -> None:
    training = [record for record in metrics(preferred) if record["split"] == "train"]
    assert [record["beta"] > 0 for record in training] == [False, False, True, True, True, True]
    assert training[2]["beta"] == pytest.approx(training[5]["beta"])
    first = training[0]
    assert (first["margin"], first["chosen"], first["rejected"]) == (
        0,
        0,
        0,
    )  # The first weights are their own.
    for record in training[1:]:
        assert record["margin"] == pytest.approx(record["rejected"] - record["chosen"], abs=1e-6)
        assert 0 <= record["preferred"] <= 1
    # At the same draws: the first weights' loss of the chosen is what is left when what was gained is not.
    assert first["loss"] == pytest.approx(0.6931 + 0.1 * first["flow"], rel=1e-3)
    held_out = [record for record in metrics(preferred) if record["split"] == "validation"]
    assert held_out[-1].keys() >= {"preferred", "margin", "chosen", "rejected", "flow"}
    assert training[0]["chosen_length"] < training[0]["rejected_length"]


def test_preferences_resume_in_the_middle_of_what_sets_beta(
    start: Path, pairs: Path, preferred: Path, tmp_path: Path
) -> None:
    for step in (1, 3):
        out = tmp_path / str(step)
        with pytest.raises(Interrupted):
            Trainer(preferring(start, pairs), out, At("preferences", step)).run()
        Trainer(preferring(start, pairs), out).run()
        assert_same_run(out, preferred)


def test_a_stored_reference_is_the_one_that_is_computed_again(
    start: Path, pairs: Path, preferred: Path, tmp_path: Path
) -> None:
    stored = preferring(start, pairs, "stages.preferences.reference=stored")
    Trainer(stored, tmp_path / "stored").run()
    one, other = (
        [r for r in logged(out) if r["split"] == "train"] for out in (preferred, tmp_path / "stored")
    )
    for record, again in zip(one, other, strict=True):
        for key in ("loss", "margin", "chosen", "rejected", "beta"):
            assert again[key] == pytest.approx(record[key], rel=1e-4, abs=1e-6)
    assert "reference" not in final_state(tmp_path / "stored")
    once = ("run.precision=bfloat16", "stages.preferences.steps=1")
    Trainer(preferring(start, pairs, "stages.preferences.reference=stored", *once), tmp_path / "once").run()
    assert logged(tmp_path / "once")[0]["margin"] == pytest.approx(0, abs=1e-4)  # Rounded as the steps are.
    with pytest.raises(Interrupted):
        Trainer(stored, tmp_path / "resumed", At("preferences", 2)).run()
    Trainer(stored, tmp_path / "resumed").run()
    assert_same_run(tmp_path / "stored", tmp_path / "resumed")


def test_how_pairs_are_grouped_changes_nothing(
    start: Path, pairs: Path, preferred: Path, tmp_path: Path
) -> None:
    Trainer(preferring(start, pairs, "stages.preferences.micro_batch=1"), tmp_path / "run").run()
    for record, again in zip(logged(preferred), logged(tmp_path / "run"), strict=True):
        for key in {"loss", "margin", "chosen", "rejected"} & record.keys():
            assert again[key] == pytest.approx(record[key], rel=1e-3, abs=2e-5)


def test_both_answers_of_a_pair_have_the_same_noise(start: Path, pairs: Path, tmp_path: Path) -> None:
    trainer = Trainer(preferring(start, pairs), tmp_path / "run")
    stage = make_stage(trainer.system, "preferences", trainer._lay_out)
    noise, alone = stage.draw([3, 7]), stage.draw([7])
    trainer._unlock()
    assert isinstance(noise, PairNoise)
    assert isinstance(alone, PairNoise)
    assert noise.pair is not None
    assert noise.pair.tolist() == [3, 3, 7, 7]
    for name in ("posterior", "timestep", "z1"):
        values = getattr(noise, name)
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])
        assert torch.equal(values[2:], getattr(alone, name))


def test_means_are_other_latents(start: Path, pairs: Path, preferred: Path, tmp_path: Path) -> None:
    mean = preferring(start, pairs, "stages.preferences.latents=mean", "stages.preferences.steps=1")
    Trainer(mean, tmp_path / "run").run()
    one, other = (metrics(out)[0] for out in (preferred, tmp_path / "run"))
    assert other["flow"] != pytest.approx(one["flow"], rel=1e-3)


def test_a_pair_that_is_none_is_named(start: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    for line, said in (
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt is 3, expected a string or a list"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "completion is empty"),
        (
            {"prompt": [{"role": "user", "content": "x"}], "chosen": "b", "rejected": 2},
            "answer 2, expected text",
        ),
    ):
        file.write_text(json.dumps(line))
        with pytest.raises(ColadaError, match=f"broken.jsonl:1.*{said}"):
            Trainer(preferring(start, file), tmp_path / "run")


# --- preferences and rewards alike ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["preferences", "reward", "raft"])
def test_a_look_before_the_run(
    start: Path, pairs: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{{path: {pairs}, format: preferences}}" if kind == "preferences" else TASKS
    made(start, tmp_path, kind, source)
    yaml = str(tmp_path / f"{kind}.yaml")
    assert (
        main(["train", yaml, "--dry-run", f"--set=data.sources=[{source}]", "--set=data.packing=samples"])
        == 0
    )
    said = capsys.readouterr().out
    assert ("reference" if kind == "preferences" else "answers") in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["preferences", "reward"])
def test_two_ranks_learn_what_one_does(start: Path, pairs: Path, tmp_path: Path, kind: str) -> None:
    judge = f"stages.reward.judge={start}"
    run = preferring(start, pairs) if kind == "preferences" else rewarding(start, tmp_path, judge)
    second = {"preferences": {"reference": "stored"}, "reward": {"kind": "raft"}}[kind]
    values = run.model_dump(mode="json", exclude_unset=True)
    values["stages"]["second"] = {**values["stages"][kind], **second}
    run = Recipe.model_validate(values)
    Trainer(run, tmp_path / "alone").run()
    file = tmp_path / "run.yaml"
    file.write_text(commented(run))
    done = on_ranks(2, ["train", str(file), "--out", str(tmp_path / "two")], tmp_path / "log")
    assert done.returncode == 0, done.output
    for record, again in zip(logged(tmp_path / "alone"), logged(tmp_path / "two"), strict=True):
        for key in {"loss", "margin", "push", "drift", "reward"} & record.keys():
            assert again[key] == pytest.approx(record[key], rel=2e-3, abs=1e-4), key
