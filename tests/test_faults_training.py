"""What training runs do when the clock, the disk, a sample, a setting or the environment is not as hoped.

The letter and number of a test is that of the fault it was written for.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from colada import device
from colada.errors import ColadaError
from colada.files import write_text
from colada.models.cola import ColaDLM
from colada.text.transcript import GenerationError
from colada.train import checkpoints
from colada.train.checkpoints import Place, find, places
from colada.train.export import export
from colada.train.inputs import train_tokenizer
from colada.train.kinds import StageSection
from colada.train.logs import LogFiles, read_samples
from colada.train.optimisation import learning_rate
from colada.train.parallel import Ranks
from colada.train.recipe import load_recipe
from colada.train.trainer import Trainer
from commands import main
from runs import DEBUG, SHORT, At, assert_same_run, recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the Text VAE that kept all its checkpoints."""
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

    Trainer(recipe(*SHORT), tmp_path, ClockGoesBack("vae", 3)).run()
    assert places(tmp_path / "checkpoints") == [Place("vae", 4), Place("vae", 6)]
    assert find(tmp_path, "auto") == tmp_path / "checkpoints" / "vae-00000006"


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
    assert all("vae-00000004" in names and "vae-00000006" in names for names in seen)


def test_a3_what_a_killed_run_left_half_removed_is_cleared_away(tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in (".vae-00000099.partial", ".vae-00000002.1-2.old", ".vae-00000001.pruned"):
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
    samples = (made / "samples.jsonl").read_text()
    assert samples.count("no sample") == (2 if fault == "one sample" else 4)
    assert reason in samples
    assert_same_run(made, other)


def test_a15_an_error_in_the_writing_thread_ends_the_run_with_that_error(tmp_path: Path) -> None:
    class Damages(At):
        def act(self) -> None:
            while not places(tmp_path / "checkpoints"):
                time.sleep(0.01)
            # At once: the writing thread may be reading it.
            write_text(tmp_path / "checkpoints" / "vae-00000002" / "state.json", "{}")

    made = recipe(*SHORT)
    with pytest.raises(ColadaError, match=r"vae-00000002/state.json is damaged: stage=None, expected"):
        Trainer(made, tmp_path, Damages("vae", 3)).run()
    with pytest.raises(ColadaError, match=r"vae-00000002/state.json is damaged"):
        Trainer(made, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "vae-00000002")
    Trainer(made, tmp_path).run()
    assert places(tmp_path / "checkpoints") == [Place("vae", 4), Place("vae", 6)]  # Pruning went on.


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
    section = StageSection(steps=steps, warmup=warmup, final_lr=0.05, schedule=schedule)
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

    trainer = Trainer(recipe("stages.prior.ema=0", "run.sample_every=2"), tmp_path, Looks("prior", 3))
    trainer.run()
    assert modes
    assert all(modes)


# --- B: what a recipe may say --------------------------------------------------------------------


# (key, value in YAML): each is refused when the recipe is read, with the key and the value.
REFUSED = [
    # Generation settings, for samples and for the saved model.
    *(("generation", value) for value in ("{stepz: 4}", "{steps: a}", "{temperature: .nan}")),
    *(("generation", value) for value in ("{solver: x}", "{steps: 0}", "{stop: [5]}", "{top_p: 1e-300}")),
    *(("stages.decoder.generation", value) for value in ("{steps: true}", "{steps: 0}", "{schedule: x}")),
    # NaN and infinities, anywhere.
    *((key, value) for key in ("stages.prior.loc", "stages.vae.lr") for value in (".nan", ".inf", "1e999")),
    ("model.vae", "{init_std: .nan}"),
    ("stages.prior.betas", "[.nan, 0.9]"),
    ("data.sources", "[{path: x, weight: .inf}]"),
    # Shares, rates and sizes without a meaning.
    *(
        ("stages.prior.betas", value)
        for value in ("[2, 0.9]", "[0.9, -1]", "[0.9, 1.0]", "[0.9]", "[true, 1]")
    ),
    *(("stages.vae.final_lr", value) for value in ("-0.1", "1.5", "true", "'0.5'")),
    *((f"stages.prior.{key}", "1e-300") for key in ("lr", "scale", "clip", "decay")),
    *((f"stages.{key}", "1e300") for key in ("vae.lr", "vae.beta", "prior.loc")),
    *(("data.sources", f"[{{path: x, weight: {value}}}]") for value in ("0", "1e-300", "true")),
    # Counts: whole numbers with bounds.
    *((f"stages.prior.{key}", "1" + "0" * 23) for key in ("steps", "batch", "length")),
    *(
        (key, "-1")
        for key in ("stages.vae.steps", "stages.vae.warmup", "run.max_skipped", "seed", "data.workers")
    ),
    *((key, value) for key in ("seed", "stages.prior.copies") for value in ("true", "'3'", "2.5")),
    *(("tokenizer.vocab_size", value) for value in ("1" + "0" * 30, "0")),
    ("stages.prior", "{kind: joint, interval: [0, 3]}"),
    # Numbers of YAML 1.1, and what is there twice.
    *(("stages.vae.steps", value) for value in ("010", "1:30", "9" * 5000)),
    ("stages", "{vae: {steps: 3, steps: 4}}"),
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
        ("steps=10", r"did you mean stages.<name>.steps\?"),
        ("vocab_size=300", r"did you mean tokenizer.vocab_size\?"),
        ("stages.vae.prefix_share=0.1", r"did you mean stages.<prior>.prefix_share or stages.<instruct>"),
        ("stages.vae.stpes=10", r"did you mean 'steps'\?"),
        ("llada_lr=1", r"did you mean stages.<decoder>.llada_lr\?"),
    ],
)
def test_a_key_in_the_wrong_place_gets_a_hint_at_the_right_one(override: str, hint: str) -> None:
    with pytest.raises(ColadaError, match=hint):
        load_recipe(DEBUG, [override])


# --- B: the environment, the memory, the disk ------------------------------------------------------


JOINABLE = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        *(({"WORLD_SIZE": size}, "WORLD_SIZE") for size in ("x", "", "0", "-1", "2.0", "9" * 30, "\u0662")),
        *(({**JOINABLE, "RANK": rank}, "RANK") for rank in ("5", "2", "-1", "x", "")),
        ({"RANK": "1"}, "RANK"),
        *(({**JOINABLE, "MASTER_PORT": port}, "MASTER_PORT") for port in ("x", "0", "65536", "")),
        ({**JOINABLE, "MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2"}, "RANK"),
    ],
)
def test_b7_an_environment_that_makes_no_ranks_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: dict[str, str], named: str
) -> None:
    for name in JOINABLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(DEBUG), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize(
    "key", ["stages.vae.batch=1000000", "stages.prior.copies=1024", "tokenizer.vocab_size=9999999"]
)
def test_b1_a_run_beyond_the_memory_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr("colada.train.plan.memory_of", lambda _: 2**26)
    with pytest.raises(
        ColadaError, match=r"(vae|prior).* would take about .* but cpu has 64.0 MiB: expected"
    ):
        Trainer(recipe(key), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_b1_the_memory_of_this_machine_is_known() -> None:
    with open("/proc/meminfo", encoding="ascii") as file:
        physical = 1024 * int(file.readline().split()[1])
    there = device.memory_of(torch.device("cpu"))
    assert there is not None
    assert 2**28 < there <= physical + 2**20


@pytest.mark.parametrize("damage", [b"", b"xx", b"half", b"\x80\x04N."])
def test_b15_damaged_metadata_is_one_line_and_nothing_is_printed(
    tmp_path: Path, finished: Path, capfd: pytest.CaptureFixture[str], damage: bytes
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    file = out / "checkpoints" / "vae-00000006" / ".metadata"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    with pytest.raises(ColadaError, match=r"vae-00000006 is damaged") as caught:
        Trainer(recipe(*SHORT), out).run()
    assert "\n" not in str(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "null",
        "5",
        "[]",
        '{"stage": 3}',
        "[" * 10**5,
        "9" * 5000,
        '{"stage": "vae", "step": true}',
        "NaN",
    ],
)
def test_b3_a_state_of_the_wrong_shape_is_one_line(tmp_path: Path, finished: Path, content: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "checkpoints" / "vae-00000006" / "state.json").write_text(content)
    with pytest.raises(ColadaError, match=r"vae-00000006/state\.json is damaged") as caught:
        Trainer(recipe(*SHORT), out)
    assert "\n" not in str(caught.value)


RECORD = '{"stage": "vae", "step": 1, "split": "train", "time": 1.0, '
RECORDS = [
    *("null", "5", "[]", "{}", "", "[" * 10**5, "9" * 5000, '"x"', RECORD, '{"stage": "a", "stage": "b"}'),
    *(
        RECORD + f'"nll": {value}}}'
        for value in ('"x"', "{}", "true", "1e400", "9" * 400, "9" * 5000, '[["x"]]')
    ),
    *(
        RECORD.replace('"step": 1', f'"step": {value}') + '"nll": 1}'
        for value in ("true", "1.5", "9" * 30, "null")
    ),
    RECORD.replace("1.0", '"now"') + '"nll": 1}',
]


@pytest.mark.parametrize("line", RECORDS, ids=[line[:70] for line in RECORDS])
def test_b3_a_line_of_metrics_of_the_wrong_shape_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{RECORD}"nll": 1.0}}\n{line}\n')
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/metrics.jsonl, line 2: ")
    assert error.count("\n") == 1
    assert len(error) < 1000


def test_b4_a_log_that_is_a_named_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        out = tmp_path / name
        out.mkdir()
        os.mkfifo(out / name)
        with pytest.raises(ColadaError, match=r"is a named pipe"):
            Trainer(recipe(*SHORT), out).run()


def test_b10_a_sample_with_half_a_character_is_written(tmp_path: Path) -> None:
    LogFiles(tmp_path).text("prior", 1, "a\udc80", "b\ud800")
    (sample,) = read_samples(tmp_path / "samples.jsonl")
    assert (sample["title"], sample["text"]) == ("a\udc80", "b\ud800")


def test_b17_a_checkpoint_on_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Future[None]:
        failed: Future[None] = Future()
        failed.set_exception(RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0"))
        return failed

    monkeypatch.setattr(checkpoints, "async_save", full)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ColadaError, match=r"cannot write to .*checkpoints: .*the disk has 1,000 bytes left"):
        Trainer(recipe(*SHORT), tmp_path).run()


# --- C: ranks ---------------------------------------------------------------------------------------


@pytest.fixture
def one_rank() -> Iterator[Ranks]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(0, 1, torch.device("cpu"), init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b")))
    finally:
        dist.destroy_process_group()


def test_c9_networks_are_laid_out_before_they_have_memory(
    tmp_path: Path, one_rank: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a mesh of one shard computes what a process without a mesh does."""
    averaged = ["stages.vae.ema=0.9", "stages.prior.ema=0.9"]
    made = recipe("stages.prior.kind=joint", *averaged, "run.sample_every=0")
    Trainer(made, tmp_path / "alone").run()
    laid_out: list[bool] = []
    lay_out = Trainer._lay_out

    def spied(self: Trainer, networks: dict[str, torch.nn.Module]) -> torch.nn.ModuleDict:
        laid_out.extend(p.is_meta for network in networks.values() for p in network.parameters())
        return lay_out(self, networks)

    monkeypatch.setattr(Trainer, "_lay_out", spied)
    Trainer(made, tmp_path / "mesh", ranks=one_rank).run()
    assert len(laid_out) > 100
    assert all(laid_out)
    for part in ("cola_vae", "cola_dit"):
        one, two = (
            load_file(tmp_path / run / "model" / part / "model.safetensors") for run in ("alone", "mesh")
        )
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_c9_the_tokenizer_learns_from_so_many_characters_of_each_source(tmp_path: Path) -> None:
    for name, word in (("one", "aba "), ("two", "cdc ")):
        (tmp_path / f"{name}.txt").write_text(word * 2000)
    sources = ", ".join(f"{{path: {tmp_path / name}.txt}}" for name in ("one", "two"))
    common = [f"data.sources=[{sources}]", "data.validation_share=0", "tokenizer.vocab_size=262"]
    learnt = train_tokenizer(recipe(*common, "tokenizer.characters=1000"))
    (tmp_path / "both.txt").write_text("aba " * 125 + "\n<|endoftext|>\n" + "cdc " * 125)
    same = train_tokenizer(
        recipe(f"data.sources=[{{path: {tmp_path}/both.txt}}]", *common[1:], "tokenizer.characters=1000000")
    )
    assert learnt.to_json() == same.to_json()


def test_a_checkpoint_is_exported_as_it_was_trained_whatever_its_recipe_says(
    tmp_path: Path, finished: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "vae-00000006"
    shutil.copytree(finished / "checkpoints" / "vae-00000006", checkpoint)
    text = (checkpoint / "recipe.yaml").read_text()
    (checkpoint / "recipe.yaml").write_text(text.replace("ffn_dim: 16", "ffn_dim: 16000000000"))
    export(checkpoint, tmp_path / "model")
    assert json.loads((tmp_path / "model/cola_vae/config.json").read_text())["ffn_dim"] == 16


def test_exporting_a_run_gets_a_hint_at_its_last_checkpoint(
    finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    last = finished / "checkpoints" / "vae-00000006"
    for path in (finished, finished / "checkpoints", finished / "checkpoints" / "vae-00000099"):
        assert main(["export", str(path), str(tmp_path / "model")]) == 2
        assert f"(did you mean {last}?)" in capsys.readouterr().err


def test_exporting_over_another_things_files_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "thesis.tex").write_text("all of it")
    checkpoint = finished / "checkpoints" / "vae-00000006"
    assert main(["export", str(checkpoint), str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.rglob("*.*")] == ["thesis.tex"]
