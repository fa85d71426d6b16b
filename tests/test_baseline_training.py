"""Baselines in the trainer and on the command line: recipes, checkpoints and commands of Cola DLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import colada
from colada.cli.main import main
from colada.errors import ColadaError
from colada.models.decoder import DecoderLM
from colada.train.checkpoints import Place
from colada.train.export import export
from colada.train.plan import resolve
from colada.train.recipe import Recipe, commented, difference
from colada.train.trainer import Interrupted, Trainer
from on_ranks import on_ranks
from runs import At, final_state, logged, metrics, recipe, same

BASELINE = [
    "stages.decoder.steps=6",
    "stages.decoder.batch=4",
    "stages.decoder.length=16",
    "stages.decoder.warmup=2",
    "stages.decoder.ema=0.9",
    "stages.decoder.generation={repetition_penalty: 1.1}",
    "model.decoder={dim: 16, num_layers: 2, num_heads: 2, ffn_dim: 24, init_std: 0.2}",
]
ARCHS = ["ar", "llada"]


def baseline(arch: str, *overrides: str) -> Recipe:
    return recipe(f"model.arch={arch}", *BASELINE, *overrides)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {}
    for arch in ARCHS:
        runs[arch] = tmp_path_factory.mktemp("baseline") / arch
        Trainer(baseline(arch), runs[arch]).run()
    return runs


@pytest.mark.parametrize("arch", ARCHS)
def test_a_baseline_that_is_stopped_and_resumed_equals_one_that_was_not(
    tmp_path: Path, uninterrupted: dict[str, Path], arch: str
) -> None:
    with pytest.raises(Interrupted, match="stopped at step 3 of decoder"):
        Trainer(baseline(arch), tmp_path / "run", At("decoder", 3)).run()
    Trainer(baseline(arch), tmp_path / "run").run()
    assert logged(tmp_path / "run") == logged(uninterrupted[arch])
    assert same(final_state(tmp_path / "run"), final_state(uninterrupted[arch]))


@pytest.mark.parametrize("arch", ARCHS)
def test_what_a_baseline_learns_is_logged_and_its_model_writes(
    uninterrupted: dict[str, Path], arch: str
) -> None:
    out = uninterrupted[arch]
    losses = [record["nll"] for record in metrics(out) if record["split"] == "train"]
    assert len(losses) == 6
    assert all(loss > 0 for loss in losses)
    model = colada.load(out / "model")
    assert isinstance(model, DecoderLM)
    assert model.arch == arch
    assert model.generation == {"repetition_penalty": 1.1}
    assert model.decoder.config.bos_token_id == (model.tokenizer and model.tokenizer.end_ids[0])
    (made,) = model.generate("One morning", 5)
    assert 0 < len(made.tokens) <= 5


@pytest.mark.parametrize("arch", ARCHS)
def test_a_checkpoint_of_a_baseline_becomes_a_model(
    tmp_path: Path, uninterrupted: dict[str, Path], arch: str
) -> None:
    checkpoint = uninterrupted[arch] / "checkpoints" / Place("decoder", 6).name
    assert export(checkpoint, tmp_path / "model") == "stage decoder, step 6"
    one, two = colada.load(tmp_path / "model"), colada.load(uninterrupted[arch] / "model")
    assert isinstance(one, DecoderLM)
    assert isinstance(two, DecoderLM)
    assert same(one.decoder.state_dict(), two.decoder.state_dict())


def test_micro_batches_and_whole_samples_change_only_what_they_say(tmp_path: Path) -> None:
    losses = {}
    for name, overrides in {
        "whole": [],
        "cut": ["stages.decoder.micro_batch=1", "run.checkpoint_activations=true"],
        "samples": ["data.packing=samples"],
    }.items():
        Trainer(baseline("llada", *overrides), tmp_path / name).run()
        losses[name] = [record["nll"] for record in metrics(tmp_path / name)]
    assert losses["cut"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["samples"] != pytest.approx(losses["whole"], rel=1e-2)


def test_a_baseline_goes_on_from_another_and_not_from_another_kind(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    model = uninterrupted["ar"] / "model"
    start = [
        f"model.init={model}",
        "model.vae={}",
        "model.dit={}",
        "model.decoder={}",
        "stages.decoder.lr=1e-9",
    ]
    Trainer(baseline("ar", *start, "stages.decoder.ema=0"), tmp_path / "run").run()
    one, two = colada.load(tmp_path / "run" / "model"), colada.load(model)
    assert isinstance(one, DecoderLM)
    assert isinstance(two, DecoderLM)
    for value, expected in zip(one.decoder.parameters(), two.decoder.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    with pytest.raises(ColadaError, match=r"is ar, model.arch is 'llada'"):
        Trainer(baseline("llada", *start), tmp_path / "other")
    with pytest.raises(ColadaError, match="holds a baseline"):
        Trainer(recipe(f"model.init={model}", "model.vae={}", "model.dit={}"), tmp_path / "cola")
    with pytest.raises(ColadaError, match=r"stages\.decoder\.steps=0 with model.init, expected a number"):
        Trainer(baseline("ar", *start, "stages.decoder.steps=0"), tmp_path / "steps")


def test_a_checkpoint_is_exported_without_the_model_it_went_on_from(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    shutil.copytree(uninterrupted["llada"] / "model", tmp_path / "start")
    start = [f"model.init={tmp_path / 'start'}", "model.vae={}", "model.dit={}", "model.decoder={}"]
    Trainer(baseline("llada", *start), tmp_path / "run").run()
    shutil.rmtree(tmp_path / "start")
    export(tmp_path / "run" / "checkpoints" / Place("decoder", 6).name, tmp_path / "model")
    one, two = colada.load(tmp_path / "model"), colada.load(tmp_path / "run" / "model")
    assert isinstance(one, DecoderLM)
    assert isinstance(two, DecoderLM)
    assert same(one.decoder.state_dict(), two.decoder.state_dict())


def test_what_does_not_concern_an_architecture_does_not_make_another_run() -> None:
    cola, other = recipe(), recipe("stages.decoder.lr=0.5", "model.decoder={dim: 16}")
    assert difference(cola, other) is None
    assert difference(baseline("ar"), baseline("ar", "stages.prior.lr=0.5")) is None
    assert difference(baseline("ar"), baseline("ar", "stages.decoder.lr=0.5")) is not None
    assert difference(baseline("ar"), baseline("ar", "stages.decoder.llada_lr=0.5")) is None
    assert difference(baseline("ar"), baseline("llada")) == "model.arch was 'ar' and is now 'llada'"


def test_settings_that_a_baseline_does_not_have_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match="has no guidance"):
        Trainer(baseline("ar", "stages.decoder.generation={guidance: 3.0}"), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_the_losses_of_two_ranks_are_those_of_one(
    tmp_path: Path, uninterrupted: dict[str, Path], arch: str
) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(commented(resolve(baseline(arch))))
    done = on_ranks(2, ["train", str(file), "--out", str(out)], tmp_path / "log")
    assert done.returncode == 0, done.output
    found, expected = ([record["nll"] for record in metrics(run)] for run in (out, uninterrupted[arch]))
    assert found == pytest.approx(expected, rel=1e-4)


# --- the command line ----------------------------------------------------------------------------


def test_arch_trains_a_baseline_of_the_recipes_size_and_flops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wider = ["model.vae.dim=64", "model.vae.ffn_dim=128", "model.dit.txt_dim=64", "model.dit.emb_dim=64"]
    file = tmp_path / "tiny.yaml"
    file.write_text(commented(recipe("stages.decoder.length=16", "stages.decoder.batch=4", *wider)))
    assert main(["train", str(file), "--arch", "ar", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["train", str(file), "--dry-run", "--json"]) == 0
    cola = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["total"] == pytest.approx(cola["parameters"]["total"], rel=0.03)
    assert plan["flops"] == pytest.approx(cola["flops"], rel=0.1)  # in whole steps
    assert main(["cost", str(file), "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert [own["arch"] for own in costs] == ["cola", "ar", "llada"]
    assert costs[0]["flops"]["total"] == cola["flops"]
    assert main(["cost", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "6 N D" in printed
    for model in costs:
        total = model["flops"].pop("total")
        for part, flops in model["flops"].items():
            assert f"{part} {100 * flops / total:.1f}%" in " ".join(printed.split())
    assert main(["cost", str(file), "--archs", "cola,lada"]) == 2
    assert "'lada' (did you mean 'llada'?)" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ARCHS)
def test_the_commands_take_a_baselines_model(
    uninterrupted: dict[str, Path], arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(uninterrupted[arch] / "model")
    assert main(["generate", "One morning", "--model", model, "-n", "5", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["settings"]["repetition_penalty"] == 1.1
    assert "guidance" not in made["settings"]
    assert main(["generate", "One morning", "--model", model, "-n", "5"]) == 0
    assert capsys.readouterr().out == f"One morning{made['text']}\n"
    assert main(["generate", "One", "--model", model, "--guidance", "3"]) == 2
    assert "has no guidance" in capsys.readouterr().err
    assert main(["info", model, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    loaded = colada.load(model)
    assert isinstance(loaded, DecoderLM)
    assert info["parameters"]["total"] == sum(p.numel() for p in loaded.decoder.parameters())
    assert info["decoder"]["objective"] == arch
    assert main(["info", model]) == 0
    assert "KV cache per token" in capsys.readouterr().out
    assert main(["reconstruct", "One", "--model", model]) == 2
    assert "expected a Cola DLM here" in capsys.readouterr().err
    texts = tmp_path / "texts.txt"
    texts.write_text("One morning the sun was warm.")
    assert main(["eval", "likelihood", str(texts), "--model", model, "-q"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("at most ") == (arch == "llada")
    assert main(["eval", "likelihood", str(texts), "--model", model, "-q", "--at", "0.5"]) == 2
    assert "has no at" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ARCHS)
def test_benchmarks_run_on_a_baseline(uninterrupted: dict[str, Path], arch: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    fields = {"context": "", "choices": None, "answer": "sun", "answer_index": None}
    lines = [json.dumps({**fields, "id": str(n), "question": f"{n} times he saw the"}) for n in range(3)]
    (data / "lambada.test.jsonl").write_text("\n".join(lines) + "\n")
    out, model = tmp_path / "results", str(uninterrupted[arch] / "model")
    command = ["eval", "run", "--model", model, "--data", str(data), "--tasks", "lambada", "--out", str(out)]
    assert main([*command, "-q", "-n", "4", "--batch", "2"]) == 0
    record = json.loads((out / "results.json").read_text())
    assert record["tasks"]["lambada"]["items"] == 3
    assert "solver" not in record["settings"]
    first = (out / "lambada.jsonl").read_text()
    shutil.rmtree(out)
    assert main([*command, "-q", "-n", "4", "--batch", "3"]) == 0
    assert (out / "lambada.jsonl").read_text() == first
