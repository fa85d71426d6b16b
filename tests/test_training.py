"""Whole training runs: what they learn, log and save, and that stopping them changes nothing."""

import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
from colada.train.checkpoints import Place, find, places
from colada.train.export import export
from colada.train.inputs import Inputs
from colada.train.optimisation import learning_rate
from colada.train.plan import resolve
from colada.train.recipe import commented, load_recipe, save_recipe
from colada.train.stages import make_stage
from colada.train.trainer import Interrupted, Trainer
from golden_losses import GOLDEN, curve
from runs import DEBUG, ROOT, TINY, At, CrashAt, assert_same_run, final_state, logged, metrics, recipe, same

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


def test_the_corpus_is_what_its_script_writes() -> None:
    text = make_stories.STORIES.read_text(encoding="utf-8")
    assert text == make_stories.corpus()
    assert len(text.encode()) < 150_000


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


# --- resuming ----------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {}
    for variant, overrides in VARIANTS.items():
        runs[variant] = tmp_path_factory.mktemp("runs") / variant
        Trainer(recipe(*overrides), runs[variant]).run()
    return runs


@pytest.mark.parametrize(
    ("variant", "stage", "step"),
    [
        ("frozen", "vae", 3),
        ("frozen", "vae", 6),
        ("frozen", "prior", 1),
        ("frozen", "prior", 5),
        ("joint", "vae", 3),
        ("joint", "vae", 6),
        ("joint", "prior", 3),
        ("joint", "prior", 6),
        ("interval", "prior", 1),
        ("interval", "prior", 4),
        ("levers", "prior", 3),
        ("muon", "vae", 1),
        ("muon", "prior", 3),
    ],
)
def test_a_run_that_is_stopped_and_resumed_equals_one_that_was_not(
    tmp_path: Path, uninterrupted: dict[str, Path], variant: str, stage: str, step: int
) -> None:
    made = recipe(*VARIANTS[variant])
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=rf"step {step} of {stage};"):
        Trainer(made, tmp_path, At(stage, step)).run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert places(tmp_path / "checkpoints")[-1] == Place(stage, step)
    assert not (tmp_path / "model").exists()
    Trainer(made, tmp_path).run()
    assert_same_run(tmp_path, uninterrupted[variant])
    assert logged(tmp_path) == logged(uninterrupted[variant])
    samples = (path / "samples.jsonl" for path in (tmp_path, uninterrupted[variant]))
    assert len({sample.read_text() for sample in samples}) == 1


def test_what_an_earlier_stage_has_trained_is_in_later_checkpoints(tmp_path: Path) -> None:
    made = recipe("stages.vae.steps=0", "stages.last={kind: vae, steps: 6, batch: 4, length: 16, warmup: 2}")
    Trainer(made, tmp_path / "whole").run()
    with pytest.raises(Interrupted, match="step 3 of last"):
        Trainer(made, tmp_path / "run", At("last", 3)).run()
    words = export(tmp_path / "run/checkpoints/last-00000003", tmp_path / "exported")
    assert words == "stage last, step 3"
    Trainer(made, tmp_path / "run").run()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    trained, exported = (colada.load(tmp_path / where).dit for where in ("whole/model", "exported"))
    assert same(trained.state_dict(), exported.state_dict())


def test_a_third_stage_reads_its_own_sources_and_resumes_exactly(tmp_path: Path) -> None:
    for name, words in (("rain", "rain falls softly "), ("sun", "the sun is warm ")):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'text': words * 40})}\n" * 30)
    sources = ", ".join(f"{{path: {tmp_path / name}.jsonl}}" for name in ("rain", "sun"))
    made = recipe(
        f"data.sources=[{sources}]",
        "data.validation_share=0",
        "stages.decay={kind: prior, steps: 6, batch: 4, length: 16, weights: {sun: 2}, ema: 0.9}",
        "run.sample_every=0",
    )
    Trainer(made, tmp_path / "whole").run()
    with pytest.raises(Interrupted, match="step 3 of decay"):
        Trainer(made, tmp_path / "run", At("decay", 3)).run()
    resumed = Trainer(made, tmp_path / "run")
    rows = resumed.inputs.rows("train", made.stages["decay"], 0, 4)
    assert all("sun.jsonl" in rows.describe(number) for number in range(20))
    mixed = resumed.inputs.rows("train", made.stages["prior"], 0, 4)
    assert len({mixed.describe(number).split(":")[0] for number in range(20)}) == 2
    resumed.run()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


@pytest.mark.parametrize(
    ("variant", "stage", "step"), [("frozen", "vae", 5), ("joint", "prior", 1), ("joint", "prior", 5)]
)
def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Path], variant: str, stage: str, step: int
) -> None:
    made = recipe(*VARIANTS[variant])
    with pytest.raises(ZeroDivisionError):
        Trainer(made, tmp_path, CrashAt(stage, step)).run()
    Trainer(made, tmp_path).run()
    assert_same_run(tmp_path, uninterrupted[variant])


def test_the_variants_are_different_runs(uninterrupted: dict[str, Path]) -> None:
    models = [colada.load(out / "model") for out in uninterrupted.values()]
    for one, other in itertools.combinations(models, 2):
        assert not same(one.dit.state_dict(), other.dit.state_dict())
        assert not same(one.vae.state_dict(), other.vae.state_dict())


def test_a_frozen_vae_stays_that_of_stage_1_and_a_joint_one_moves(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    for variant in ("frozen", "joint"):
        out = tmp_path / variant
        Trainer(recipe(*VARIANTS[variant], "stages.prior.steps=0"), out).run()
        stage1 = colada.load(out / "model").vae.state_dict()
        after = colada.load(uninterrupted[variant] / "model").vae.state_dict()
        assert same(stage1, after) == (variant == "frozen")
        if variant == "joint":
            assert same(final_state(uninterrupted[variant])["reference"], stage1)


def test_another_recipe_in_the_same_directory_is_refused(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted["frozen"], out)
    before = (out / "recipe.yaml").read_bytes()
    with pytest.raises(ColadaError, match=r"stages\.prior\.lr was 0\.008 and is now 0\.5"):
        Trainer(recipe(*VARIANTS["frozen"], "stages.prior.lr=0.5"), out)
    with pytest.raises(ColadaError, match=r"seed was 0 and is now 1"):
        Trainer(recipe(*VARIANTS["frozen"], "seed=1"), out)
    assert (out / "recipe.yaml").read_bytes() == before
    # What is only shown or saved more often is the same run.
    Trainer(recipe(*VARIANTS["frozen"], "run.log_every=5"), out)


def test_a_run_goes_on_with_the_text_it_began_with(tmp_path: Path) -> None:
    texts, out = tmp_path / "texts", tmp_path / "run"
    shutil.copytree(make_stories.STORIES.parent, texts)
    made = recipe("stages.prior.steps=0", f"data.sources.0.path={texts}")
    with pytest.raises(Interrupted):
        Trainer(made, out, At("vae", 3)).run()
    story = texts / "stories.txt"
    os.utime(story, (1, 1))  # Copied, say: the text is the same.
    Trainer(made, out)
    story.write_text(story.read_text() + "\n<|endoftext|>\nOne more story.\n")
    with pytest.raises(ColadaError, match=r"the training text of .*texts is not what .*vae-00000003"):
        Trainer(made, out)


def test_a_file_that_is_two_sources_has_two_digests() -> None:
    source = Source(path="a")
    streams: Any = [(source, {"train": SimpleNamespace(digest=own)}) for own in ("one", "other")]
    assert [own for _, own in Inputs(recipe(), 0, streams).digests()] == ["one", "other"]


def test_a_directory_without_a_checkpoint_takes_the_recipe_it_is_given(tmp_path: Path) -> None:
    # A first try that stopped before its first checkpoint leaves a tokenizer behind.
    Trainer(recipe("tokenizer.vocab_size=280"), tmp_path)
    assert Trainer(recipe("tokenizer.vocab_size=300"), tmp_path).tokenizer.vocab_size == 300


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    made = recipe("stages.prior.steps=0")
    Trainer(made, tmp_path).run()
    (file,) = (tmp_path / "checkpoints" / "vae-00000006").glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ColadaError, match=r"vae-00000006 is damaged"):
        Trainer(made, tmp_path).run()


def test_the_last_checkpoints_and_the_milestones_are_kept(tmp_path: Path) -> None:
    Trainer(recipe("run.save_every=1", "run.keep_last=2", "run.keep_every=3"), tmp_path).run()
    kept = [place.name for place in places(tmp_path / "checkpoints")]
    assert kept == ["vae-00000003", "vae-00000006", "prior-00000003", "prior-00000005", "prior-00000006"]


def test_a_run_resumes_from_a_step_or_a_directory_as_from_the_last_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    made = recipe(*VARIANTS["joint"], "run.keep_last=20")
    Trainer(made, tmp_path / "run").run()
    for resume in ("4", "vae-00000002", str(tmp_path / "run" / "checkpoints" / "prior-00000002")):
        Trainer(made, tmp_path / "run", resume=resume).run()
        assert_same_run(tmp_path / "run", uninterrupted["joint"])
        assert logged(tmp_path / "run") == logged(uninterrupted["joint"])
    with pytest.raises(ColadaError, match=r"no checkpoint '7'.*vae-00000002"):
        Trainer(made, tmp_path / "run", resume="7")
    # Into a directory of its own.
    start = tmp_path / "run" / "checkpoints" / "prior-00000002"
    Trainer(made, tmp_path / "other", resume=str(start)).run()
    assert_same_run(tmp_path / "other", uninterrupted["joint"])


def test_a_run_that_went_back_goes_on_from_there(tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    made = recipe(*VARIANTS["joint"], "run.keep_last=20")
    Trainer(made, tmp_path).run()
    with pytest.raises(Interrupted):
        Trainer(made, tmp_path, At("prior", 3), resume="prior-00000002").run()
    # Those of the later steps are older now.
    assert find(tmp_path, "auto") == tmp_path / "checkpoints" / "prior-00000003"
    Trainer(made, tmp_path).run()
    assert_same_run(tmp_path, uninterrupted["joint"])
    assert logged(tmp_path) == logged(uninterrupted["joint"])


def test_two_runs_in_one_directory_are_refused(tmp_path: Path) -> None:
    made, seen = recipe(), []

    class Another(At):
        def act(self) -> None:
            with pytest.raises(ColadaError, match=r"is in use by another run") as caught:
                Trainer(made, tmp_path).run()
            seen.append(caught.value)

    Trainer(made, tmp_path, Another("vae", 2)).run()
    assert seen
    assert [r["step"] for r in metrics(tmp_path) if r["split"] == "train"] == [*range(1, 7)] * 2


def test_what_a_recipe_gets_wrong_is_said_before_any_text_is_read(tmp_path: Path) -> None:
    for override in ("stages.prior.length=63", "run.monitors=[tensorbord]", "model.vae.dimm=3"):
        with pytest.raises(ColadaError):
            Trainer(recipe(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stages_may_both_be_left_out(tmp_path: Path) -> None:
    Trainer(recipe("stages.vae.steps=0", "stages.prior.steps=0", "run.report=true"), tmp_path).run()
    assert len(colada.load(tmp_path / "model").generate("One", 4, end_ids=())[0].tokens) == 4


KILLED_WRITING = """
import os, signal, sys
from pathlib import Path
import torch
from colada.train import checkpoints
from colada.train.recipe import load_recipe
from colada.train.stages import make_stage
from colada.train.trainer import Trainer

number, moment = int(sys.argv[3]), sys.argv[4]
begun = tensors = 0
begin, write, rename = checkpoints.async_save, torch.save, os.rename

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(*args, **kwargs):
    global begun, tensors
    begun, tensors = begun + 1, 0
    return begin(*args, **kwargs)

def save(*args, **kwargs):  # In the middle of the file that holds the tensors.
    global tensors
    tensors += 1
    if moment == "tensors" and begun == number and tensors == 9:
        die()
    return write(*args, **kwargs)

def late(old, new):  # After all is written, before the checkpoint has its name.
    if moment == "rename" and begun == number and Path(new).name.startswith("vae"):
        die()
    rename(old, new)

checkpoints.async_save, torch.save, os.rename = counted, save, late
Trainer(load_recipe(Path(sys.argv[1])), Path(sys.argv[2])).run()
"""


@pytest.mark.parametrize(
    ("number", "moment"), [(1, "tensors"), (3, "tensors"), (5, "tensors"), (2, "rename")]
)
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    tmp_path: Path, uninterrupted: dict[str, Path], number: int, moment: str
) -> None:
    made = recipe(*VARIANTS["joint"])
    (tmp_path / "own.yaml").write_text(commented(made))
    out = tmp_path / "run"
    command = [sys.executable, "-c", KILLED_WRITING, tmp_path / "own.yaml", out, str(number), moment]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    directory = out / "checkpoints"
    assert list(directory.glob(".*.partial")), "it was not killed while writing"
    assert not (out / "model").exists()
    assert len(places(directory)) == min(number - 1, 2)
    Trainer(made, out).run()
    assert_same_run(out, uninterrupted["joint"])
    assert not list(directory.glob(".*"))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on(tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    made = recipe(*VARIANTS["frozen"], "run.save_every=1")
    (tmp_path / "own.yaml").write_text(commented(made))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "colada", "train", tmp_path / "own.yaml", "--out", out, "-q"]
    killed = 0
    for wait in (2.5, 3.0, 3.5, 4.0, 60.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            assert process.wait(wait) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    else:
        pytest.fail("it never finished")
    assert_same_run(out, uninterrupted["frozen"])


@pytest.mark.parametrize(("stage", "step"), [("vae", 4), ("prior", 2), ("prior", 6)])
def test_a_checkpoint_becomes_a_model_at_any_step(
    tmp_path: Path, uninterrupted: dict[str, Path], stage: str, step: int
) -> None:
    out = tmp_path / "run"
    Trainer(recipe(*VARIANTS["joint"], "run.keep_last=20"), out).run()
    words = export(out / "checkpoints" / f"{stage}-0000000{step}", tmp_path / "model")
    assert f"stage {stage}, step {step}" in words
    model = colada.load(tmp_path / "model")
    assert len(model.generate("One morning", 6, end_ids=())[0].tokens) == 6
    if step == 6:
        last = colada.load(out / "model")
        assert same(model.vae.state_dict(), last.vae.state_dict())
        assert same(model.dit.state_dict(), last.dit.state_dict())


def test_every_checkpoint_says_what_made_it(uninterrupted: dict[str, Path]) -> None:
    directory = find(uninterrupted["joint"], "auto")
    assert directory is not None
    assert load_recipe(directory / "recipe.yaml") == resolve(recipe(*VARIANTS["joint"]))
    made_with = json.loads((directory / "state.json").read_text())["made_with"]
    assert made_with["torch"] == torch.__version__
    assert {"python", "colada", "device", "parameters"} <= made_with.keys()


# --- logs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["frozen", "joint"])
def test_metrics_are_one_json_object_a_line(uninterrupted: dict[str, Path], variant: str) -> None:
    records = metrics(uninterrupted[variant])
    train = [(r["stage"], r["step"]) for r in records if r["split"] == "train"]
    assert train == [(stage, step) for stage in ("vae", "prior") for step in range(1, 7)]
    checked = [(r["stage"], r["step"]) for r in records if r["split"] == "validation"]
    assert checked == [("vae", 3), ("vae", 6), ("prior", 3), ("prior", 6)]
    times = [record["time"] for record in records]
    assert times == sorted(times)
    wanted = {"vae": {"nll", "kl", "masked", "accuracy", "log_snr"}, "prior": {"flow", "log_snr"}}
    if variant == "joint":
        wanted["prior"] |= {"nll", "log_q", "kl_ref", "masked", "accuracy"}
    for record in records:
        terms = record.keys() - {"stage", "step", "split", "time"}
        extra = {"tokens"}
        if record["split"] == "train":
            extra |= {"lr", "grad_norm", "loss", "skipped", "tokens_per_s", "mfu", "memory_gb"}
        assert terms - {"flow_by_t"} == wanted[record["stage"]] | extra
        assert all(math.isfinite(record[term]) for term in terms - {"flow_by_t"})
        if record["stage"] == "prior":
            assert len(record["flow_by_t"]) == 10
    assert [r["tokens"] for r in records if r["split"] == "train"] == [16 * 4 * n for n in range(1, 7)] * 2


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


def test_a_model_is_the_start_of_another_run(tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    start = uninterrupted["frozen"] / "model"
    yaml = tmp_path / "own.yaml"
    yaml.write_text("generation: {steps: 4}\n")
    common = [o for o in TINY if not o.startswith(("model.", "tokenizer.", "generation."))]
    tune = load_recipe(yaml, [*common, f"model.init={start}", "stages.vae.steps=0", "stages.prior.steps=1"])
    Trainer(tune, tmp_path / "tuned").run()
    before, after = colada.load(start), colada.load(tmp_path / "tuned" / "model")
    assert same(before.vae.state_dict(), after.vae.state_dict())
    assert after.dit.config == before.dit.config
    change = max(
        float((a - b).abs().max().detach())
        for a, b in zip(before.dit.parameters(), after.dit.parameters(), strict=True)
    )
    assert 0 < change < 2 * tune.stages["prior"].lr
    # What the recipe does not say is the model's own.
    assert (before.generation, after.generation) == (
        {"steps": 2, "guidance": 2.0},
        {"steps": 4, "guidance": 2.0},
    )
    export(tmp_path / "tuned" / "checkpoints" / "prior-00000001", tmp_path / "exported")
    assert colada.load(tmp_path / "exported").generation == after.generation
    assert after.tokenizer is not None
    assert before.tokenizer is not None
    assert after.tokenizer.encode("One morning") == before.tokenizer.encode("One morning")


def test_a_model_is_given_a_second_input_that_changes_nothing_at_first(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    start = uninterrupted["frozen"] / "model"
    yaml = tmp_path / "own.yaml"
    yaml.write_text(f"model: {{init: {start}}}\nstages: {{prior: {{self_conditioning: 1}}}}\n")
    common = [o for o in TINY if not o.startswith(("model.", "tokenizer.", "generation."))]
    made = load_recipe(yaml, [*common, "stages.vae.steps=0", "stages.prior.steps=1", "stages.prior.warmup=0"])
    Trainer(made, tmp_path / "tuned").run()
    before, after = colada.load(start), colada.load(tmp_path / "tuned" / "model")
    assert (before.dit.config.self_conditioning, after.dit.config.self_conditioning) == (False, True)
    second = after.dit.sc_in.proj.weight
    # A step of AdamW from nothing: as far as the learning rate, or nowhere.
    assert 0 < float(second.detach().abs().max()) < 1.1 * made.stages["prior"].lr
    with torch.no_grad():
        second.zero_()
        latents = torch.randn(8, after.dit.config.txt_in_channels)
        dits = before.dit, after.dit
        outputs = [dit(latents, torch.tensor(500.0), dit.layout([8])) for dit in dits]
    torch.testing.assert_close(*outputs, rtol=0, atol=0.05)


def test_a_model_that_contradicts_the_recipe_is_no_start(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    yaml = tmp_path / "own.yaml"
    yaml.write_text(f"model: {{init: {uninterrupted['frozen'] / 'model'}}}\n")
    common = [o for o in TINY if not o.startswith(("model.", "tokenizer.", "generation."))]
    with pytest.raises(ColadaError, match=r"stages.vae.length=18"):
        Trainer(load_recipe(yaml, [*common, "stages.vae.length=18"]), tmp_path / "run")


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


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let writes beyond a size fail, as they do on a full disk; the system reports "File too large"."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_refuses_keeps_the_last_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    made = recipe(*VARIANTS["frozen"])
    with pytest.raises(Interrupted):
        Trainer(made, tmp_path, At("vae", 2)).run()
    size = max(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*.distcp"))
    with files_of_at_most(size // 2), pytest.raises(ColadaError, match="cannot write to") as caught:
        Trainer(made, tmp_path).run()
    assert "\n" not in str(caught.value)
    assert places(tmp_path / "checkpoints") == [Place("vae", 2)]
    Trainer(made, tmp_path).run()
    assert_same_run(tmp_path, uninterrupted["frozen"])


def test_resuming_on_a_full_disk_harms_nothing(tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    made = recipe(*VARIANTS["frozen"])
    with pytest.raises(Interrupted):
        Trainer(made, tmp_path, At("prior", 2)).run()
    with files_of_at_most(0), pytest.raises(ColadaError, match="cannot"):
        Trainer(made, tmp_path).run()
    Trainer(made, tmp_path).run()
    assert_same_run(tmp_path, uninterrupted["frozen"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_log_that_cannot_be_written_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(ColadaError, match=f"cannot write to .*{os.strerror(errno.ENOSPC)}"):
        Trainer(recipe("stages.vae.steps=2", "stages.prior.steps=1"), tmp_path).run()
