"""Runs that stop and go on: the same bits as one that was not stopped, whatever stopped it."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import colada
import make_stories
from colada.errors import ColadaError
from colada.train.checkpoints import Place, find, places
from colada.train.export import export
from colada.train.plan import resolve
from colada.train.recipe import commented, load_recipe
from colada.train.trainer import Interrupted, Trainer
from runs import (
    TINY,
    VARIANTS,
    At,
    CrashAt,
    assert_same_run,
    final_state,
    logged,
    metrics,
    recipe,
    same,
)


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


# --- what is in its files ------------------------------------------------------------------------


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
