"""Whole training runs: what they learn, log and save, and that stopping them changes nothing."""

import errno
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import colada
import make_stories
from colada.cli.main import main
from colada.data.sources import Source
from colada.errors import ColadaError
from colada.text.tokenizer import Tokenizer
from colada.train.checkpoints import Place, places
from colada.train.inputs import Inputs
from colada.train.optimisation import learning_rate
from colada.train.recipe import load_recipe, save_recipe
from colada.train.stages import make_stage
from colada.train.trainer import Interrupted, Trainer
from golden_losses import GOLDEN, curve
from runs import (
    DEBUG,
    JOINT,
    ROOT,
    VARIANTS,
    At,
    final_state,
    metrics,
    recipe,
    same,
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.vae.dims=3"], r"model.vae.*'dims'.*did you mean 'dim'"),
        (["model.dit.rope_dim=7"], r"model.dit.*rope_dim=7"),
        (["model.dit.block_size=2"], r"block_size=2"),
        (["stages.vae.length=18"], r"stages.vae.length=18.*multiple.*4"),
        (["stages.prior.length=2"], r"stages.prior.length=2"),
        (["model.vae.vocab_size=17"], r"vocab_size"),
        (["run.device=gpu"], r"run.device='gpu'"),
        (["run.device=cuda:99"], r"run.device='cuda:99' cannot be used"),
        (["generation.stepz=4"], r"'stepz'.*did you mean 'steps'"),
        (["data.sources.0.include=[nothing.txt]"], r"nothing.txt"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_trained(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ColadaError, match=message):
        Trainer(recipe(*overrides), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("variant", ["frozen", "joint"])
def test_every_step_uses_its_own_learning_rate(tmp_path: Path, variant: str) -> None:
    made = recipe(
        *VARIANTS[variant],
        "run.sample_every=0",
        "stages.prior.micro_batch=null",
        "stages.vae.micro_batch=null",
    )
    used: list[list[float]] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimiser, *_: used.append([group["lr"] for group in optimiser.param_groups])
    )
    try:
        Trainer(made, tmp_path).run()
    finally:
        hook.remove()
    first = [[made.stages["vae"].lr * learning_rate(k, made.stages["vae"])] * 2 for k in range(6)]
    second = []
    for k in range(6):
        rate = made.stages["prior"].lr * learning_rate(k, made.stages["prior"])
        second.append([rate] * 2)
        if variant == "joint":
            second.append([0.1 * rate] * 2)
    assert [x for rates in used for x in rates] == pytest.approx([x for r in first + second for x in r])


# --- the whole debug recipe ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of recipes/debug.yaml as it stands, started from the repository root."""
    out = tmp_path_factory.mktemp("debug") / "run"
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        Trainer(load_recipe(DEBUG), out).run()
    finally:
        os.chdir(before)
    return out


def validation(out: Path, stage: str, term: str) -> list[float]:
    return [
        record[term] for record in metrics(out) if (record["stage"], record["split"]) == (stage, "validation")
    ]


@pytest.mark.slow
def test_the_debug_recipe_learns_to_reconstruct(debug_run: Path) -> None:
    assert validation(debug_run, "vae", "accuracy")[-1] > 0.9
    losses = validation(debug_run, "vae", "nll")
    assert losses[-1] < 0.2
    trained = [record["nll"] for record in metrics(debug_run) if record["stage"] == "vae" and "nll" in record]
    assert trained[-1] < 0.1 * trained[0]
    # The same through the saved model, on stories it has not seen.
    model = colada.load(debug_run / "model")
    unseen = "Cleo had a green hat, and now it was gone. Snow lay on the roof."
    assert model.reconstruct(unseen).accuracy > 0.9


@pytest.mark.slow
def test_the_debug_recipe_learns_the_prior(debug_run: Path) -> None:
    losses = validation(debug_run, "prior", "flow")
    assert losses[-1] < losses[0]
    model = colada.load(debug_run / "model")
    stories = make_stories.STORIES.read_text().split(make_stories.SEPARATOR)[:40]
    latents = torch.cat([model.encode(story) for story in stories])
    # Predicting zero costs E(z1 - z0)^2 = 1 + E z0^2, of which the posterior's variance is left out here.
    zero = 1 + float(latents.square().mean())
    assert losses[-1] < 0.7 * zero
    # The best that can be done knowing only that latents have mean 0 and variance 1, over the timesteps' law.
    grid = torch.special.ndtri((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
    a = torch.sigmoid(1 + grid)
    assert losses[-1] < 0.85 * float((1 / ((1 - a) ** 2 + a**2)).mean())


@pytest.mark.slow
def test_the_debug_recipes_model_generates(debug_run: Path) -> None:
    model = colada.load(debug_run / "model")
    assert dict(model.generation) == {"steps": 8, "guidance": 2.0}
    one, other = model.generate(["One morning", ""], 40, seed=1)
    assert one.text
    assert len(set(other.tokens)) > 5
    assert len((debug_run / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_running_a_finished_run_again_changes_nothing(
    debug_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [debug_run / "metrics.jsonl", *sorted((debug_run / "model").rglob("*.safetensors"))]
    before = [path.read_bytes() for path in files]
    monkeypatch.chdir(ROOT)
    Trainer(load_recipe(DEBUG), debug_run).run()
    assert [path.read_bytes() for path in files] == before


@pytest.mark.slow
def test_the_debug_recipe_repeats_its_golden_loss_curve(debug_run: Path) -> None:
    """The same mathematics gives the same losses; see tests/golden_losses.py for what may move them."""
    golden, found = json.loads(GOLDEN.read_text()), curve(debug_run / "metrics.jsonl")
    assert found.keys() == golden.keys()
    for name, values in found.items():
        # Rounding differs between processors, and training lets it grow.
        assert values == pytest.approx(golden[name], rel=2e-2), name
        assert values[:2] == pytest.approx(golden[name][:2], rel=1e-4), name


def test_a_file_that_is_two_sources_has_two_digests() -> None:
    source = Source(path="a")
    streams: Any = [(source, {"train": SimpleNamespace(digest=own)}) for own in ("one", "other")]
    assert [own for _, own in Inputs(recipe(), 0, streams).digests()] == ["one", "other"]


def test_what_a_recipe_gets_wrong_is_said_before_any_text_is_read(tmp_path: Path) -> None:
    for override in ("stages.prior.length=63", "run.monitors=[tensorbord]", "model.vae.dimm=3"):
        with pytest.raises(ColadaError):
            Trainer(recipe(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stages_may_both_be_left_out(tmp_path: Path) -> None:
    Trainer(recipe("stages.vae.steps=0", "stages.prior.steps=0", "run.report=true"), tmp_path).run()
    assert len(colada.load(tmp_path / "model").generate("One", 4, end_ids=())[0].tokens) == 4


def test_validation_is_the_same_measurement_every_time(tmp_path: Path) -> None:
    made = Trainer(recipe(), tmp_path)
    for name in ("vae", "prior"):
        stage = make_stage(made.system, name, made._lay_out)
        rows = made.inputs.rows("validation", stage.section, 0, made.system.block_tokens)
        first = made._validate(stage, stage.networks, rows, 0)
        torch.manual_seed(1)
        assert made._validate(stage, stage.networks, rows, 0) == first


def test_a_run_feeds_its_monitors_and_ends_with_a_report(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    save_recipe(recipe("run.monitors=[tensorboard]", "run.report=true"), tmp_path / "recipe.yaml")
    assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    for title in ("Flow loss", "Gradient norm", "log-SNR", "MFU", "Memory", "One morning"):
        assert title.lower() in page.lower(), title
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    flow = "prior/flow"
    logged = [r["flow"] for r in metrics(tmp_path) if r["split"] == "train" and r["stage"] == "prior"]
    assert [event.value for event in seen.Scalars(flow)] == pytest.approx(logged)


# --- other settings -----------------------------------------------------------------------------


def test_z0_prediction_wider_latents_and_joint_training_run(tmp_path: Path) -> None:
    made = recipe(
        *JOINT,
        "model.dit.prediction=z0",
        "model.vae.latent_dim=24",
        "model.vae.patch_size=2",
        "stages.prior.loc=null",
        "stages.prior.timestep_per=row",
        "model.vae.log_snr=3.0",
    )
    Trainer(made, tmp_path).run()
    model = colada.load(tmp_path / "model")
    assert (model.dit.config.prediction, model.vae.config.latent_dim) == ("z0", 24)
    assert len(model.generate("One morning", 9, end_ids=())[0].tokens) == 9
    assert [r["log_snr"] for r in metrics(tmp_path)] == pytest.approx([3.0] * 16, abs=1e-3)
    with torch.no_grad():
        posterior = model.vae.encode(torch.arange(16), [16])  # The model measures with what was trained.
    assert posterior.logvar is not None
    ratio = posterior.mean.square().mean() / posterior.logvar.exp().mean()
    assert float(ratio.log()) == pytest.approx(3.0, abs=1e-3)


def test_bfloat16_trains_and_saves(tmp_path: Path) -> None:
    Trainer(recipe("run.precision=bfloat16", "run.save_dtype=bfloat16"), tmp_path).run()
    model = colada.load(tmp_path / "model")
    assert {parameter.dtype for parameter in model.dit.parameters()} == {torch.bfloat16}
    state = final_state(tmp_path)
    assert {tensor.dtype for tensor in state["dit"].values()} == {torch.float32}
    assert len(model.generate("One morning", 6, end_ids=())[0].tokens) == 6


def test_a_run_saves_its_matrices_in_int8(tmp_path: Path) -> None:
    Trainer(recipe("run.save_dtype=int8", "stages.prior.ema=0"), tmp_path).run()
    stored, trained = colada.load(tmp_path / "model"), final_state(tmp_path)["dit"]
    for name, value in stored.dit.state_dict().items():
        torch.testing.assert_close(
            value, trained[name], rtol=0.004, atol=float(trained[name].abs().max()) / 250
        )


def test_a_tokenizer_of_ones_own_is_used(tmp_path: Path) -> None:
    own = Tokenizer.train([make_stories.corpus()], 290)
    own.save(tmp_path / "own.json")
    made = recipe(f"tokenizer.file={tmp_path / 'own.json'}", "stages.vae.steps=1", "stages.prior.steps=0")
    Trainer(made, tmp_path / "run").run()
    model = colada.load(tmp_path / "run" / "model")
    assert model.tokenizer is not None
    assert model.vae.config.vocab_size == 290
    assert model.tokenizer.encode("One morning") == own.encode("One morning")


@pytest.mark.parametrize("variant", ["frozen", "joint", "interval"])
def test_micro_batches_change_nothing_but_rounding(tmp_path: Path, variant: str) -> None:
    curves = []
    for size in ("null", 1, 3):
        made = recipe(
            *VARIANTS[variant], f"stages.vae.micro_batch={size}", f"stages.prior.micro_batch={size}"
        )
        Trainer(made, tmp_path / str(size)).run()
        curves.append([r["loss"] for r in metrics(tmp_path / str(size)) if r["split"] == "train"])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["run.checkpoint_activations=true", "run.compile=true"])
def test_recomputing_and_compiling_change_nothing_but_rounding(tmp_path: Path, setting: str) -> None:
    if setting.startswith("run.compile") and shutil.which("c++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    # Two layers: the last is compiled for fewer queries.
    short = ["stages.vae.steps=1", "stages.prior.steps=4", "model.dit.num_layers=2"]
    curves = []
    for name, extra in (("plain", []), ("other", [setting])):
        Trainer(recipe(*short, *extra), tmp_path / name).run()
        curves.append([r["loss"] for r in metrics(tmp_path / name) if r["split"] == "train"])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    models = [colada.load(tmp_path / name / "model").dit.state_dict() for name in ("plain", "other")]
    for name, one in models[0].items():
        torch.testing.assert_close(models[1][name], one, rtol=1e-3, atol=1e-5)


# --- steps that are not finite ------------------------------------------------------------------


class Spoilt(Trainer):
    """A trainer in which some steps of the Text VAE draw infinite noise."""

    bad: tuple[int, ...] = ()

    def _step(self, stage: Any, step: int, own: Any, noise: Any) -> Any:
        if stage.name == "vae" and step in self.bad:
            noise = noise.map(lambda x: x * math.inf if x.is_floating_point() else x)
        return super()._step(stage, step, own, noise)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    class Twice(Spoilt):
        bad = (2, 4)

    made = recipe("stages.prior.steps=0", "stages.vae.ema=0.9")
    with pytest.raises(Interrupted):
        Twice(made, tmp_path, At("vae", 3)).run()
    Twice(made, tmp_path).run()
    records = [r for r in metrics(tmp_path) if r["split"] == "train"]
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 2, 2]
    assert records[2]["grad_norm"] is None
    assert all(math.isfinite(r["loss"]) for r in records if r["step"] not in (3, 5))
    model = colada.load(tmp_path / "model")
    assert all(bool(p.isfinite().all()) for p in model.vae.parameters())


def test_a_skipped_step_leaves_weights_and_optimiser_as_they_were(tmp_path: Path) -> None:
    class Last(Spoilt):
        bad = (5,)

    made = recipe("stages.prior.steps=0", "run.save_every=5", "run.keep_last=5")
    Last(made, tmp_path).run()
    states = [final_state(tmp_path)]
    shutil.rmtree(tmp_path / "checkpoints" / "vae-00000006")
    states.append(final_state(tmp_path))
    assert same(states[0], states[1])


def test_too_many_steps_that_are_not_finite_stop_the_run_saved(tmp_path: Path) -> None:
    class Always(Spoilt):
        bad = (1, 3, 4)

    with pytest.raises(ColadaError) as caught:
        Always(recipe("run.max_skipped=2"), tmp_path).run()
    message = str(caught.value)
    assert "vae: 3 steps were not finite, run.max_skipped=2; the last is step 5" in message
    assert re.search(r"stories\.txt:\d+", message), message
    assert "\n" not in message
    assert places(tmp_path / "checkpoints")[-1] == Place("vae", 5)


def test_a_learning_rate_far_too_high_is_caught(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=r"steps were not finite"):
        Trainer(recipe("stages.vae.lr=1e6", "stages.vae.warmup=0", "run.max_skipped=1"), tmp_path).run()


# --- unusable data and full disks ---------------------------------------------------------------


def test_too_little_text_is_refused_by_how_much_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("few words\n<|endoftext|>\nfewer still\n<|endoftext|>\nand words again\n")
    made = ["data.validation_share=0.5", f"data.sources.0.path={tmp_path / 'a.txt'}"]
    made.append("tokenizer.vocab_size=260")
    with pytest.raises(ColadaError, match=r"(train|validation) has \d+ ids, expected at least 65"):
        Trainer(recipe(*made, "stages.vae.length=64"), tmp_path / "run").run()


def test_an_undecodable_file_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine\n" * 500)
    (tmp_path / "b.txt").write_bytes(b"fine\nfine too\nnot \xff fine\n")
    with pytest.raises(ColadaError, match=r"b\.txt:3.*0xff.*UTF-8"):
        Trainer(recipe(f"data.sources.0.path={tmp_path}"), tmp_path / "run")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=r"nowhere: no such file"):
        Trainer(recipe(f"data.sources.0.path={tmp_path / 'nowhere'}"), tmp_path / "run")


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ColadaError, match="cannot write to"):
        Trainer(recipe(), tmp_path / "file" / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_log_that_cannot_be_written_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(ColadaError, match=f"cannot write to .*{os.strerror(errno.ENOSPC)}"):
        Trainer(recipe("stages.vae.steps=2", "stages.prior.steps=1"), tmp_path).run()
