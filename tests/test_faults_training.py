"""What training runs do when the clock, the disk, a sample, a setting or the environment is not as hoped.

The letter and number of a test is that of the fault it was written for.
"""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from colada.errors import ColadaError
from colada.model import ColaDLM
from colada.streaming import GenerationError
from colada.training import checkpoints
from colada.training.checkpoints import Place, find, places
from colada.training.optimisation import learning_rate
from colada.training.recipe import load_recipe
from colada.training.sections import OptimiserSection
from colada.training.trainer import Trainer
from runs import DEBUG, At, assert_same_run, recipe

SHORT = ["stage2.steps=0", "run.sample_every=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage 1 that kept all its checkpoints."""
    out = tmp_path_factory.mktemp("finished") / "run"
    Trainer(recipe(*SHORT, "run.keep_last=20"), out).run()
    return out


# --- A: nothing is lost --------------------------------------------------------------------------


def test_a1_a_clock_that_goes_back_prunes_no_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = time.time

    class ClockGoesBack(At):
        def act(self) -> None:
            monkeypatch.setattr(time, "time", lambda: true() - 86_400)

    Trainer(recipe(*SHORT), tmp_path, ClockGoesBack(1, 3)).run()
    assert places(tmp_path / "checkpoints") == [Place(1, 4), Place(1, 6)]
    assert find(tmp_path, "auto") == tmp_path / "checkpoints" / "stage1-00000006"


def test_a1_checkpoints_of_earlier_versions_come_before_new_ones(tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name, written in (("stage1-00000002", 3e9), ("stage1-00000004", 1e9)):
        file = out / "checkpoints" / name / "state.json"
        state = json.loads(file.read_text())
        del state["number"]
        file.write_text(json.dumps({**state, "written": written}))
    assert places(out / "checkpoints") == [Place(1, 4), Place(1, 2), Place(1, 6)]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a3_going_back_over_a_checkpoint_leaves_a_whole_one_at_any_moment(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """As if the process ended while the old checkpoint of the same name is being removed."""
    out, remove = tmp_path / "run", shutil.rmtree
    shutil.copytree(finished, out)
    seen: list[list[str]] = []

    def removed(path: Path, *args: Any, **kwargs: Any) -> None:
        if moment == "after":
            remove(path, *args, **kwargs)
        seen.append([place.name for place in places(out / "checkpoints")])
        for place in places(out / "checkpoints"):
            assert (out / "checkpoints" / place.name / ".metadata").is_file()
        if moment == "before":
            remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", removed)
    Trainer(recipe(*SHORT, "run.keep_last=20"), out, resume="2").run()
    assert seen
    assert all("stage1-00000004" in names and "stage1-00000006" in names for names in seen)


def test_a3_what_a_killed_run_left_half_removed_is_cleared_away(tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in (".stage1-00000099.partial", ".stage1-00000002.1-2.old", ".stage1-00000001.pruned"):
        (out / "checkpoints" / name).mkdir()
    Trainer(recipe(*SHORT, "run.keep_last=20"), out, resume="4").run()
    assert not list((out / "checkpoints").glob(".*"))


def test_a4_a_run_that_is_refused_leaves_the_files_of_the_one_under_way(tmp_path: Path) -> None:
    Trainer(recipe(*SHORT), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert {path.name for path in before} >= {"recipe.yaml", "tokenizer.json"}
    with (
        FileLock(tmp_path / "lock"),
        pytest.raises(ColadaError, match=r"is in use by another run: wait, or give another --out"),
    ):
        Trainer(recipe(*SHORT, "tokenizer.vocab_size=280", "seed=3"), tmp_path)
    assert {path: path.read_bytes() for path in before} == before


def test_a4_a_trainer_that_waits_to_run_has_the_directory_for_itself(tmp_path: Path) -> None:
    waiting = Trainer(recipe(*SHORT), tmp_path)
    with pytest.raises(ColadaError, match="is in use by another run"):
        Trainer(recipe(*SHORT, "seed=3"), tmp_path)
    waiting.run()
    Trainer(recipe(*SHORT), tmp_path).run()  # Given back.


def test_a4_a_trainer_that_cannot_begin_gives_the_directory_back(tmp_path: Path) -> None:
    with pytest.raises(ColadaError) as held:  # With its trace, which holds the trainer.
        Trainer(recipe(*SHORT, "data.sources.0.include=[nothing.txt]"), tmp_path)
    Trainer(recipe(*SHORT), tmp_path)
    assert "nothing.txt" in str(held.value)


@pytest.mark.parametrize("fault", ["every sample", "one sample", "the model"])
def test_a7_a_sample_that_fails_is_noted_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    made, other = tmp_path / "run", tmp_path / "other"
    settings = ["run.sample_prompts=[One morning, A bird]", "generation.guidance=3.0"]
    Trainer(recipe(*settings), other).run()
    write = ColaDLM.generate

    def spoilt(self: ColaDLM, *args: Any, **kwargs: Any) -> Any:
        done = write(self, *args, **kwargs)
        if fault == "the model":
            raise RuntimeError("out of\nmemory")
        if fault == "one sample":
            raise GenerationError([None, done[1]], {0: "latents are not finite"})
        raise GenerationError([None, None], dict.fromkeys((0, 1), "latents are not finite"))

    monkeypatch.setattr(ColaDLM, "generate", spoilt)
    reason = "out of memory" if fault == "the model" else "not finite"
    Trainer(recipe(*settings), made).run()
    samples = (made / "samples.txt").read_text()
    assert samples.count("no sample") == (2 if fault == "one sample" else 4)
    assert reason in samples
    assert_same_run(made, other)


def test_a15_an_error_in_the_writing_thread_ends_the_run_with_that_error(tmp_path: Path) -> None:
    class Damages(At):
        def act(self) -> None:
            while not places(tmp_path / "checkpoints"):
                time.sleep(0.01)
            (tmp_path / "checkpoints" / "stage1-00000002" / "state.json").write_text("{}")

    made = recipe(*SHORT)
    with pytest.raises(ColadaError, match=r"stage1-00000002/state.json is damaged: stage=None, expected"):
        Trainer(made, tmp_path, Damages(1, 3)).run()
    with pytest.raises(ColadaError, match=r"stage1-00000002/state.json is damaged"):
        Trainer(made, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "stage1-00000002")
    Trainer(made, tmp_path).run()
    assert places(tmp_path / "checkpoints") == [Place(1, 4), Place(1, 6)]  # Pruning went on.


def test_a15_any_error_in_the_writing_thread_is_raised_where_the_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = []

    def fails(*_: Any) -> None:
        where.append(threading.current_thread())
        raise ArithmeticError("the writer broke")

    monkeypatch.setattr(checkpoints, "write_text", fails)
    with pytest.raises(ArithmeticError, match="the writer broke"):
        Trainer(recipe(*SHORT), tmp_path).run()
    assert len(where) == 1
    assert where[0] is not threading.main_thread()
    assert places(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(20, 4), (20, 0), (2, 0), (1, 0), (400, 20)])
def test_a18_the_last_step_has_the_final_learning_rate(schedule: Any, steps: int, warmup: int) -> None:
    section = OptimiserSection(steps=steps, warmup=warmup, final_lr=0.05, schedule=schedule)
    assert learning_rate(steps - 1, section) == pytest.approx(0.05)
    # And only there: nothing else about the schedule is this low.
    assert all(learning_rate(step, section) > 0.05 for step in range(warmup, steps - 1))


@pytest.mark.parametrize("fails", [False, True])
def test_a19_sampling_leaves_the_networks_in_training_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    if fails:
        monkeypatch.setattr(ColaDLM, "generate", lambda *_, **__: 1 // 0)
    modes: list[bool] = []

    class Looks(At):
        def act(self) -> None:
            modes.extend(
                module.training for net in trainer.system.networks.values() for module in net.modules()
            )

    trainer = Trainer(recipe("stage2.ema=0", "run.sample_every=2"), tmp_path, Looks(2, 3))
    trainer.run()
    assert modes
    assert all(modes)


# --- B: what a recipe may say --------------------------------------------------------------------

# (key, value in YAML): each is refused when the recipe is read, with the key and the value.
REFUSED = [
    # Generation settings, for samples and for the saved model.
    *(("generation", value) for value in ("{stepz: 4}", "{steps: a}", "{temperature: .nan}")),
    ("baseline.generation", "{steps: true}"),
    # NaN and infinities, anywhere.
    *((key, value) for key in ("stage2.loc", "stage1.lr") for value in (".nan", ".inf", "1e999")),
    ("model.vae", "{init_std: .nan}"),
    ("stage2.betas", "[.nan, 0.9]"),
    ("data.sources", "[{path: x, weight: .inf}]"),
    # Shares, rates and sizes without a meaning.
    *(("stage2.betas", value) for value in ("[2, 0.9]", "[0.9, -1]", "[0.9, 1.0]", "[0.9]", "[true, 0.9]")),
    *(("stage1.final_lr", value) for value in ("-0.1", "1.5", "true", "'0.5'")),
    *((key, "1e-300") for key in ("stage1.lr", "stage2.scale", "stage1.clip", "stage2.decay")),
    *((key, "1e300") for key in ("stage1.lr", "stage2.lambda_fm", "stage1.beta", "stage2.loc")),
    *(("data.sources", f"[{{path: x, weight: {value}}}]") for value in ("0", "1e-300", "true")),
    # Counts: whole numbers with bounds.
    *((key, "1" + "0" * 23) for key in ("stage1.steps", "stage2.batch", "stage2.length", "run.save_every")),
    *((key, "-1") for key in ("stage1.steps", "stage1.warmup", "run.max_skipped", "seed", "data.workers")),
    *((key, value) for key in ("stage1.steps", "seed", "stage2.copies") for value in ("true", "'3'", "2.5")),
    *(("tokenizer.vocab_size", value) for value in ("1" + "0" * 30, "0")),
    ("stage2.interval", "[0, 3]"),
    # Numbers of YAML 1.1, and what is there twice.
    *(("stage1.steps", value) for value in ("010", "1:30", "9" * 5000)),
    ("stage1", "{steps: 3, steps: 4}"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=[f"{key}={value[:20]}" for key, value in REFUSED])
def test_b8_a_value_without_a_meaning_is_refused_when_the_recipe_is_read(
    tmp_path: Path, key: str, value: str
) -> None:
    with pytest.raises(ColadaError) as caught:
        load_recipe(DEBUG, [f"{key}={value}"])
    assert "\n" not in str(caught.value)
    assert key.split(".")[-1] in str(caught.value)
    # In the file itself, and so by a dry run.
    section, _, name = key.partition(".")
    file = tmp_path / "own.yaml"
    file.write_text(f"{section}:\n  {name}: {value}\n" if name else f"{section}: {value}\n")
    with pytest.raises(ColadaError, match=r"own\.yaml"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("steps=10", r"did you mean stage1.steps or stage2.steps\?"),
        ("vocab_size=300", r"did you mean tokenizer.vocab_size\?"),
        ("stage1.prefix_share=0.1", r"did you mean stage2.prefix_share\?"),
        ("stage1.stpes=10", r"did you mean 'steps'\?"),
        ("llada_lr=1", r"did you mean baseline.llada_lr\?"),
    ],
)
def test_a_key_in_the_wrong_place_gets_a_hint_at_the_right_one(override: str, hint: str) -> None:
    with pytest.raises(ColadaError, match=hint):
        load_recipe(DEBUG, [override])
