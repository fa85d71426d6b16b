"""What a newcomer meets: what is missing, what is said before a run, and how long it may be."""

import importlib.util
import io
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from colada.errors import ColadaError
from colada.train.checkpoints import places
from colada.train.display import Display
from colada.train.kinds import MOST_STEPS, JointSection, StageSection
from colada.train.optimisation import learning_rate
from colada.train.plan import plan_run
from colada.train.recipe import load_recipe
from colada.train.trainer import Trainer
from commands import main
from runs import DEBUG, ROOT, SHORT, STORIES, TINY, recipe

# --- a newcomer's first run --------------------------------------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if a package were not installed, for who looks before importing it."""
    find_spec = importlib.util.find_spec
    missing = lambda name, *args: None if name == package else find_spec(name, *args)  # noqa: E731
    for module in ("train.preflight", "cli.train"):
        # The module that others have imported: another test may have had it imported anew.
        monkeypatch.setattr(import_module(f"colada.{module}"), "find_spec", missing)


def test_a_run_without_matplotlib_says_at_the_start_that_there_will_be_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "matplotlib")
    file = io.StringIO()
    display = Display(Console(file=file, width=80))
    Trainer(recipe(*SHORT, "run.report=true"), tmp_path, display).run()
    lines = file.getvalue().splitlines()
    said = next(number for number, line in enumerate(lines) if "there will be no report" in line)
    assert said < next(number for number, line in enumerate(lines) if "training a tokenizer" in line)
    assert (tmp_path / "model").is_dir()
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("package", "override", "extra"),
    [
        ("tensorboard", "run.monitors=[tensorboard]", "tensorboard"),
        ("datasets", "data.sources=[{hub: a/b}]", "hub"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, override: str, extra: str
) -> None:
    without(monkeypatch, package)
    with pytest.raises(ColadaError, match=rf'needs {package}: pip install "colada-lm\[{extra}\]"'):
        Trainer(recipe(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_first_lines_say_what_is_trained_on_what_and_for_how_long(tmp_path: Path) -> None:
    file = io.StringIO()
    Trainer(recipe(*SHORT), tmp_path, Display(Console(file=file, width=80)))
    first, second, *_ = file.getvalue().splitlines()
    assert first.startswith(f"training Cola DLM in {tmp_path}: Text VAE ")
    assert "DiT" in first
    assert second == f"on cpu with {torch.get_num_threads()} thread, float32; 6 steps, 384 tokens"


@pytest.mark.parametrize(
    "command",
    [
        ["train", str(DEBUG), "--set", "stages.vae.lr=-1"],
        ["train", str(DEBUG), "--set", "generation={steps: a}"],
        ["train", str(DEBUG), "--data", "nowhere"],
        ["train", str(DEBUG), "--json"],
        ["train", str(DEBUG), "--out", str(ROOT / "README.md")],
        ["train", str(DEBUG), "--set", "model.decoder={dims: 3}"],
        ["train", "nothing.yaml"],
        ["recipe", str(DEBUG), "--set", "model.vae.dim=wide"],
        ["report", "nowhere"],
        ["recipe", str(DEBUG), "--set", "steps=10"],
        ["export", "nowhere", "model"],
    ],
)
def test_a_command_is_refused_without_waiting_for_torch(tmp_path: Path, command: list[str]) -> None:
    code = f"import sys; from colada.cli.main import main; print(main({command!r}), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_said(tmp_path: Path) -> None:
    file = io.StringIO()
    with pytest.raises(ColadaError, match="no checkpoint 'nowhere'"):
        Trainer(recipe(), tmp_path / "run", Display(Console(file=file)), resume="nowhere")
    assert file.getvalue() == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["vae", "prior", "decoder"])
@pytest.mark.parametrize("interval", [[], ["stages.prior.kind=joint", "stages.prior.interval=[3, 4]"]])
def test_b1_the_longest_run_is_planned_at_once(stage: str, interval: list[str]) -> None:
    plan = plan_run(recipe(f"stages.{stage}.steps={MOST_STEPS}", *interval))
    assert sum(phase.steps for phase in plan.phases) >= (MOST_STEPS if stage != "decoder" else 12)


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 6, 9, 10, 11, 101])
@pytest.mark.parametrize("interval", [None, (4, 2)])
def test_joint_steps_are_counted_as_they_are_trained(steps: int, interval: tuple[int, int] | None) -> None:
    section = JointSection(steps=steps, interval=interval)
    assert section.joint_steps == sum(map(section.joint_at, range(steps)))


def test_a_dry_run_looks_at_the_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = [part for override in TINY for part in ("--set", override)]
    assert main(["train", str(DEBUG), *overrides, "--dry-run", "--json"]) == 0
    (data,) = json.loads(capsys.readouterr().out)["data"]
    made = Trainer(recipe(), tmp_path)
    stream = made.inputs.streams[0][1]["train"]
    assert data["name"] == str(STORIES)
    assert data["documents"] == len(stream.starts)
    assert data["tokens"] == pytest.approx(len(stream), rel=0.01)
    assert main(["train", str(DEBUG), *overrides, "--dry-run"]) == 0
    assert "passes over the data" in capsys.readouterr().out


def test_a_run_over_another_things_files_is_refused_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("all of it")
    with pytest.raises(ColadaError, match=r"thesis\.tex"):
        Trainer(recipe(*SHORT), tmp_path)
    assert not (tmp_path / "recipe.yaml").exists()


# --- long runs ---------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_after_so_many_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 40))  # Each look at it 40 seconds later.
    fake = SimpleNamespace(monotonic=lambda: float(next(clock)), time=time.time)
    monkeypatch.setattr("colada.train.trainer.time", fake)
    Trainer(
        recipe(*SHORT, "run.checkpoint_minutes=1", "run.save_every=100", "run.keep_last=9"), tmp_path
    ).run()
    assert [place.step for place in places(tmp_path / "checkpoints")] == [2, 4, 6]


def test_a_decay_may_begin_from_any_checkpoint() -> None:
    section = StageSection(steps=4, warmup=0, schedule="wsd", decay=1.0, final_lr=0.0)
    assert [learning_rate(step, section) for step in range(4)] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_the_tinystories_recipe_trains_from_a_data_set_of_its_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of parquet files stands in for the hub's."""
    datasets = pytest.importorskip("datasets", reason="needs colada-lm[hub]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    import pyarrow as pa
    import pyarrow.parquet as pq

    stories = [text for text in (STORIES / "stories.txt").read_text().split("<|endoftext|>") if text.strip()]
    folder = tmp_path / "TinyStories"
    folder.mkdir()
    for number in range(2):
        rows = stories[100 * number : 100 * number + 100]
        pq.write_table(pa.table({"text": rows}), folder / f"train-0000{number}-of-00002.parquet")
    pq.write_table(pa.table({"text": stories[200:240]}), folder / "validation-00000-of-00001.parquet")
    small = [override for override in TINY if not override.startswith("data.")]
    own = load_recipe(
        ROOT / "recipes" / "tinystories.yaml",
        [
            *small,
            f"data.sources.0.hub={folder}",
            "data.sources.0.limit=120",
            "data.workers=1",
            "stages.decay.steps=2",
            "stages.decay.batch=4",
            "stages.decay.length=16",
            "run.report=false",
        ],
    )
    trainer = Trainer(own, tmp_path / "run")
    train, validation = (trainer.inputs.streams[0][1][split] for split in ("train", "validation"))
    assert (len(train.starts), len(validation.starts)) == (120, 40)
    trainer.run()
    assert (tmp_path / "run" / "model" / "cola_dit").is_dir()


def test_the_tinystories_recipe_trains_what_the_bundled_models_recipe_does() -> None:
    one, two = (load_recipe(ROOT / "recipes" / f"{name}.yaml") for name in ("tiny", "tinystories"))
    for part in ("tokenizer", "model", "generation"):
        assert getattr(one, part) == getattr(two, part)
    # But for which sources they read.
    plain = {name: section.model_copy(update={"weights": None}) for name, section in one.stages.items()}
    assert plain == two.stages


def test_a_study_of_data_that_is_not_there_ends_before_anything_and_the_cost_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = str(ROOT / "recipes" / "tiny.yaml")
    assert main(["study", "run", tiny, "--benchmarks", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: data/corpora/tinystories.parquet: no such file or folder (data.sources.0.path); give yours"
    )
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert main(["cost", tiny, "--archs", "cola"]) == 0
    counted = capsys.readouterr()
    assert "data/corpora/tinystories.parquet: no such file or folder" in counted.err
    assert "get the corpora" in counted.err
    assert "tiny, Cola DLM" in counted.out


@pytest.mark.parametrize("arch", ["cola", "ar"])
def test_text_too_little_for_the_vocabulary_gives_a_smaller_one(tmp_path: Path, arch: str) -> None:
    small = tmp_path / "text"
    small.mkdir()
    (small / "a.txt").write_text((STORIES / "stories.txt").read_text()[:2000])
    shape = ["model.decoder.dim=16", "model.decoder.num_layers=1", "model.decoder.num_heads=2"]
    shape.append("model.decoder.ffn_dim=16")
    made = recipe(f"model.arch={arch}", "tokenizer.vocab_size=900", *(shape if arch == "ar" else []))
    source = made.data.sources[0].model_copy(update={"path": str(small)})
    made = made.model_copy(update={"data": made.data.model_copy(update={"sources": (source,)})})
    said = io.StringIO()
    run = Trainer(made, tmp_path / "run", Display(Console(file=said, width=200)))
    run.run()
    assert 260 < run.tokenizer.vocab_size < 900
    assert f"the text is too little for 900 entries: {run.tokenizer.vocab_size}" in said.getvalue()
