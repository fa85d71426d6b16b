"""What may go wrong with files, by kind; each is one line; none loses anything."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from colada import files, load
from colada.data.documents import Cut, Holdout, read_documents, read_records, split_file
from colada.data.listing import find_files, list_files
from colada.data.sources import Source, check_sources, hold_out, parts, read
from colada.errors import ColadaError
from colada.models.cola import ColaDLM
from colada.networks import checkpoint
from colada.text.chat import read_template, render
from colada.text.tokenizer import Tokenizer
from colada.train.inputs import prepare_inputs, train_tokenizer
from colada.train.recipe import Recipe, load_recipe, save_recipe
from helpers import read_safetensors, tiny_model, write_safetensors

DIT_WEIGHTS, VAE_WEIGHTS = "cola_dit/model.safetensors", "cola_vae/model.safetensors"


def refused(call: Callable[[], object]) -> str:
    """What is said, in one line."""
    with pytest.raises(ColadaError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults") / "model"
    tiny_model().save(directory)
    return directory


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in _files(directory)}


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def bits(model: Any) -> list[bytes]:
    states = [network.state_dict() for network in (model.vae, model.dit)]
    return [tensor.view(torch.uint8).numpy().tobytes() for state in states for tensor in state.values()]


# --- model directories -------------------------------------------------------------------------


def killed_at(number: int, work: Callable[[], None], below: Path) -> int:
    """Do work in another process, killed before its so many-th operation on files; how many it did."""
    child = os.fork()
    if child == 0:
        done = 0
        events = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod"}

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal done
            if event in events and any(str(below) in str(arg) for arg in args):
                if done == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

        exchange = files._exchange

        def counted(one: Path, other: Path) -> bool:
            count("os.rename", (one, other))
            return exchange(one, other)

        files._exchange = counted
        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(done)
    _, status = os.waitpid(child, 0)
    return number if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


@pytest.mark.parametrize("place", ["a2", "a2-working-directory"])
def test_a_model_whose_saving_is_killed_is_the_old_or_the_new_one_or_refused(
    broken: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A2: whenever it is killed; and the next save mends it and leaves nothing behind."""
    inside = place == "a2-working-directory"
    if inside:
        monkeypatch.chdir(broken)
    (broken / "README.md").write_text("mine")
    old, newer = tiny_model(), tiny_model(9)
    total = killed_at(1000, lambda: newer.save(broken), broken.parent)
    old.save(broken)
    seen, refusals = set[str](), 0
    # Most operations write files that nobody sees yet.
    for number in (0, 5, *range(total - 14, total)):
        assert killed_at(number, lambda: newer.save(broken), broken.parent) == number
        try:
            loaded = bits(load(broken))
            seen.add("old" if loaded == bits(old) else "new" if loaded == bits(newer) else "mixed")
        except ColadaError:
            refusals += 1
        assert (broken / "README.md").read_text() == "mine"
        old.save(broken)
        assert bits(load(broken)) == bits(old)
        assert [path.name for path in broken.parent.iterdir()] == ["model"]
    assert seen == {"old", "new"}
    # Where the directory must stay, a moment remains in which there is no model.
    assert bool(refusals) == inside


def test_a_mixture_of_two_saved_models_is_refused(broken: Path, saved: Path, tmp_path: Path) -> None:
    """A2, made by other means."""
    tiny_model(9).save(tmp_path / "newer")
    shutil.copytree(tmp_path / "newer" / "cola_dit", broken / "cola_dit", dirs_exist_ok=True)
    assert "mixes two models" in refused(lambda: load(broken))
    # Other software does not say what was saved together.
    write_safetensors(broken / DIT_WEIGHTS, read_safetensors(broken / DIT_WEIGHTS))
    assert bits(load(broken)) != bits(load(saved))


def test_a_fixed_log_snr_is_part_of_the_model(tmp_path: Path) -> None:
    """A16: it is written only where it is set."""
    model = tiny_model(vae={"log_snr": 2})
    model.save(tmp_path / "model")
    loaded, ids = load(tmp_path / "model"), torch.arange(1, 17)
    assert isinstance(loaded, ColaDLM)
    posterior = loaded.vae.encode(ids, [16])
    assert posterior.logvar is not None
    ratio = posterior.mean.square().mean(-1) / posterior.logvar.exp().mean(-1)
    torch.testing.assert_close(ratio.log(), torch.full((16,), 2.0))
    tiny_model().save(tmp_path / "plain")
    assert "log_snr" not in files.read_json(tmp_path / "plain" / "cola_vae" / "config.json")


def test_equal_models_are_equal_files(saved: Path, tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["decoder/thesis.tex"], "decoder"),
        (["tokenizer.json"], "tokenizer.json"),
        (["generation_config.json"], "generation_config.json"),
        (["cola_dit/config.json.txt", "cola_vae/notes"], "cola_dit"),
        ([".git/config"], ".git"),
        (["cola_dit/config.json", "cola_dit/notes.txt"], "cola_dit/notes.txt"),
        (["cola_dit/config.json", "cola_vae"], "cola_vae"),
        (["cola_dit/config.json", "decoder/thesis.tex"], "decoder"),
    ],
)
def test_a_model_is_never_saved_over_anything_else(tmp_path: Path, names: list[str], said: str) -> None:
    """A6."""
    for name in names:
        (tmp_path / "place" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "place" / name).write_text("mine")
    before = contents(tmp_path)
    assert said in refused(lambda: tiny_model().save(tmp_path / "place"))
    assert contents(tmp_path) == before


def test_what_lies_beside_a_model_stays_when_it_is_replaced(broken: Path) -> None:
    """A6."""
    (broken / "README.md").write_text("mine")
    (broken / ".git" / "objects").mkdir(parents=True)
    (broken / ".git" / "objects" / "ab").write_text("mine")
    (broken / "link").symlink_to("README.md")
    (broken / "generation_config.json").write_text('{"steps": 3}')
    (broken / "chat_template.jinja").write_text("old")
    tiny_model(9).save(broken)
    assert bits(load(broken)) == bits(tiny_model(9))
    assert (broken / "link").is_symlink()
    assert [path.read_text() for path in _files(broken) if path.name in ("README.md", "ab", "link")] == [
        "mine"
    ] * 3
    assert not (broken / "generation_config.json").exists()
    assert not (broken / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("cola_dit", "num_layers", 10**9),
        ("cola_dit", "txt_dim", 10**30),
        ("cola_dit", "block_size", 2**63),
        ("cola_dit", "norm_eps", 1e-300),
        ("cola_dit", "heads", True),
        ("cola_dit", "heads", "4"),
        ("cola_dit", "rope_dim", None),
        ("cola_dit", "prediction", ["z0"]),
        ("cola_vae", "vocab_size", 10**30),
        ("cola_vae", "vocab_size", 10**4000),
        ("cola_vae", "encoder_num_blocks", 2000),
        ("cola_vae", "scaling_factor", float("nan")),
        ("cola_vae", "scaling_factor", 1e-320),
        ("cola_vae", "rope_theta", float("inf")),
        ("cola_vae", "log_snr", 1e9),
        ("cola_vae", "log_snr", 10**400),
        ("cola_vae", "rope_theta", -(10**400)),
        ("cola_vae", "pad_token_id", -1),
    ],
)
def test_configurations_beyond_any_network_are_refused_by_key(
    broken: Path, file: str, key: str, value: Any
) -> None:
    """B1, B3."""
    path = broken / file / "config.json"
    path.write_text(json.dumps({**files.read_json(path), key: value}))
    said = refused(lambda: load(broken))
    assert f"{path}: {file.replace('vae', 'text_vae')}: {key}=" in said
    assert len(said) < 400


def change(file: Path, dtypes: dict[str, torch.dtype]) -> None:
    """Store tensors whose names match in other types."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for pattern, dtype in dtypes.items():
        tensors |= {name: value.to(dtype) for name, value in tensors.items() if re.search(pattern, name)}
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("file", "dtypes", "expected"),
    [
        (DIT_WEIGHTS, {"": torch.bfloat16, "norm": torch.float32}, torch.float32),
        (DIT_WEIGHTS, {"": torch.bfloat16, "bias": torch.float16}, torch.float32),
        (VAE_WEIGHTS, {"": torch.bfloat16, "norm|bias": torch.float32}, torch.float32),
        (DIT_WEIGHTS, {"": torch.bfloat16, "freqs": torch.float32}, torch.float32),
    ],
)
def test_weights_of_several_types_are_converted_to_the_widest(
    broken: Path, file: str, dtypes: dict[str, torch.dtype], expected: torch.dtype
) -> None:
    """A26."""
    change(broken / file, dtypes)
    model = load(broken)
    assert isinstance(model, ColaDLM)
    network = model.dit if file == DIT_WEIGHTS else model.vae
    assert {parameter.dtype for parameter in network.state_dict().values()} == {expected}
    assert len(model.generate([[1, 2, 3]], 8)[0].tokens) <= 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.0.msa.rope.rope.freqs", "blocks.1.mlp", "txt_in"])
def test_weights_that_are_not_finite_are_blamed_by_name(broken: Path, name: str, value: float) -> None:
    """B17."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / DIT_WEIGHTS)
    found = next(full for full in tensors if name in full)
    tensors[found].flatten()[-1] = value
    save_file(tensors, broken / DIT_WEIGHTS)
    said = refused(lambda: load(broken))
    assert f"tensor {found} holds values that are not finite" in said


def test_mapped_weights_of_large_files_are_not_read_while_they_are_loaded(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / DIT_WEIGHTS)
    tensors["txt_in.proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / DIT_WEIGHTS)
    monkeypatch.setattr(checkpoint, "MOST_READ_AT_LOAD", 0)
    load(broken)
    # What is converted is read anyway.
    assert "txt_in.proj.weight holds values that are not finite" in refused(
        lambda: load(broken, dtype=torch.bfloat16)
    )


def test_weights_too_large_for_a_wanted_type_are_named(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / DIT_WEIGHTS)
    tensors["txt_in.proj.weight"][0, 0] = 1e6
    save_file(tensors, broken / DIT_WEIGHTS)
    load(broken, dtype=torch.bfloat16)
    assert "txt_in.proj.weight holds values that are not finite in float16" in refused(
        lambda: load(broken, dtype=torch.float16)
    )


@pytest.mark.parametrize("name", [DIT_WEIGHTS, "cola_vae/config.json", "tokenizer.json"])
def test_what_may_not_be_read_is_not_missing(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """B17."""
    directory = shutil.copytree(saved, tmp_path / "model")
    Tokenizer.train([], 260).save(directory / "tokenizer.json")
    opened = open

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if str(path) == str(directory / name):
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr("builtins.open", refuse)
    said = refused(lambda: load(directory))
    assert f"{name}: cannot be read (Permission denied)" in said


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
@pytest.mark.parametrize(
    "name",
    [
        DIT_WEIGHTS,
        "cola_vae/config.json",
        "cola_dit/model.safetensors.index.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    ],
)
def test_special_files_are_no_part_of_a_model(broken: Path, name: str, kind: str) -> None:
    """B4."""
    (broken / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(broken / name)
    elif kind == "device":
        (broken / name).symlink_to("/dev/zero")
    else:
        (broken / name).mkdir()
    assert "no regular file" in refused(lambda: load(broken))


@pytest.mark.parametrize("name", ["a25.json", "deep/a25.json"])
def test_a_tokenizer_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A25."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    tokenizer = Tokenizer.train([], 260)
    tokenizer.save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert "No space left" in refused(lambda: tokenizer.save(path))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ " + "(" * 3000, "not a chat template"),
        ("{% if x %}" * 500, "not a chat template"),
        ("{% for x in", "not a chat template"),
        ("{{ 'a' * 10000000000 }}", "too large"),
        ("{{ 9 ** 9 ** 9 }}", "too large"),
        ("{{ (9 ** 60) * (9 ** 60) }}", "too large"),
        ("{{ [1] * 2 ** 40 }}", "too large"),
    ],
)
def test_templates_that_compute_without_end_are_refused(tmp_path: Path, template: str, said: str) -> None:
    """B1, B2: when they are read, or else when they are used."""
    (tmp_path / "x.jinja").write_text(template)
    messages = [{"role": "user", "content": "x"}]

    def use() -> str:
        return render(messages, Tokenizer.train([], 260), read_template(tmp_path / "x.jinja"), "here", True)

    assert said in refused(use)
    (tmp_path / "x.jinja").write_text("\ufeff{{ messages[0].content * 3 }}{{ 2 ** 10 * 0.5 }}")
    assert use() == "xxx512.0"


# --- recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: {vae: {steps: 010}}", "begins with 0"),
        ("stages: {vae: {steps: 1:30}}", "stages.vae.steps='1:30'"),
        ("stages: {vae: {steps: 0x10}}", "stages.vae.steps='0x10'"),
        ("stages: {vae: {steps: '10'}}", "stages.vae.steps='10'"),
        ("stages: {vae: {steps: true}}", "stages.vae.steps=True"),
        ("stages: {vae: {steps: 10.5}}", "stages.vae.steps=10.5"),
        ("stages: {vae: {lr: yes}}", "stages.vae.lr='yes'"),
        ("stages: {vae: {lr: .nan}}", "stages.vae.lr=nan"),
        ("stages: {prior: {loc: -.inf}}", "stages.prior.loc=-inf"),
        ("seed: true", "seed=True"),
        ("seed: 1e3", "seed=1000.0"),
        ("data: {sources: [{path: x, weight: .inf}]}", "data.sources.0.weight=inf"),
        ("data: {sources: [{path: x, weight: true}]}", "data.sources.0.weight=True"),
        ("data: {sources: [{path: ''}]}", "data.sources.0.path=''"),
        ("data: {sources: x}", "data.sources='x'"),
        ("run: {report: 1}", "run.report=1"),
        ("run: {report: 'yes'}", "run.report='yes'"),
        ("seed: 1\nseed: 2", "'seed' twice"),
        ("!!python/name:os.system x", "tag"),
        ("seed: !!int x", "invalid literal"),
        ("seed: 2020-13-45", "seed='2020-13-45'"),
        ("seed: " + "9" * 5000, "thousands of digits"),
        ("[" * 100_000, "nested too deeply"),
        ("- a\n- b", "list"),
        ("1: 2", "no string"),
    ],
)
def test_recipes_hold_what_they_say(tmp_path: Path, text: str, said: str) -> None:
    """B2, B8: as a file and, where it is one value, as an override."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert said in refused(lambda: load_recipe(recipe))
    inner = re.fullmatch(r"(\w+): \{(\w+): (.*)\}", text)
    if inner is not None and inner[1] != "data":
        recipe.write_text("")
        override = f"{inner[1]}.{inner[2]}={inner[3]}"
        assert said in refused(lambda: load_recipe(recipe, [override]))


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """A21."""
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbfseed: 3")
    assert load_recipe(tmp_path / "recipe.yaml").seed == 3


def test_a_recipe_is_saved_as_what_is_read_again(tmp_path: Path) -> None:
    names = ["1e5", "010", "1:30", "yes", "null", "~", "a: b", "\u2028", "# a", "x" * 200]
    recipe = Recipe.model_validate({"data": {"sources": [{"path": name} for name in names]}})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


# --- data --------------------------------------------------------------------------------------


def texts(where: Path, share: float = 0.0) -> list[str]:
    return [document.text for document in read_documents(find_files(where), validation_share=share)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"\xef\xbb\xbf<|endoftext|>\none\n<|endoftext|>\ntwo", ["one", "two"]),
        ("a.txt", b"one\n\xef\xbb\xbf<|endoftext|>\n\xef\xbb\xbftwo", ["one", "two"]),
        ("a.txt.gz", gzip.compress(b"\xef\xbb\xbfone", mtime=0), ["one"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}', ["one", "two"]),
        ("a.jsonl.gz", gzip.compress(b'\xef\xbb\xbf{"text": "one"}', mtime=0), ["one"]),
    ],
)
def test_a_byte_order_mark_is_never_trained_on(
    tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    """A21: also in parts that begin within a file."""
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path) == expected
    parts = split_file(tmp_path / name, 1)
    assert [
        r.values[0] for part in parts for r in read_records(part, ["text"], 0.0) if r.values[0]
    ] == expected


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    """A22."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "a", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text(folder.name)
    (data / "linked").symlink_to(elsewhere)
    (data / "again").symlink_to(elsewhere)
    (data / "inside").symlink_to(data / "a")
    (data / "a" / "up").symlink_to(data)
    (elsewhere / "deep" / "around").symlink_to(tmp_path)
    (elsewhere / "deep" / "own").symlink_to(".")
    listing = list_files(data)
    assert listing.files == [data / "a" / "x.txt", data / "again" / "deep" / "x.txt"]
    assert listing.left_out == {"linked folder that is read elsewhere": 5}


def test_files_that_are_left_out_are_counted_with_the_reason(tmp_path: Path) -> None:
    """A24."""
    for name in ("a.txt", "b.csv", "c.csv", "README", ".hidden.txt", ".ipynb_checkpoints/a.txt", "d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    said = str(list_files(tmp_path, ["*.txt"]))
    assert said == (
        f"{tmp_path}: 1 file to read, 8 left out: 2 .csv, 1 broken link, 2 hidden, 1 no regular file,"
        " 1 not included, 1 without a suffix"
    )
    for name in ("a.txt", "d.jsonl"):
        (tmp_path / name).unlink()
    assert "2 .csv" in refused(lambda: list_files(tmp_path))


def test_a_run_is_no_data_of_itself(tmp_path: Path) -> None:
    """A23."""
    data = tmp_path / "data"
    for name in ("texts/a.txt", "run/recipe.yaml", "run/metrics.jsonl", "run/samples.jsonl", "recipe.yaml"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    source = Source(path=str(data))
    assert check_sources([source], data / "run") == [
        f"{data}: 1 file to read, 2 left out: 1 .yaml, 1 directory of a training run"
    ]
    assert "expected another one to write to" in refused(
        lambda: check_sources([source], data / "texts" / "..")
    )
    assert "a training run's directory" in refused(lambda: find_files(data / "run"))


@pytest.mark.parametrize("key", ["path", "validation"])
def test_data_that_is_not_there_is_said_with_what_to_give(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.txt").touch()
    source = Source.model_validate({"path": str(tmp_path), key: str(tmp_path / "corpora")})
    said = refused(lambda: check_sources([Source(path=str(tmp_path)), source]))
    assert (
        f"{tmp_path / 'corpora'}: no such file or folder (data.sources.1.{key}); give yours with --data"
        in said
    )
    assert "the corpora that" not in said  # Another place was meant.


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colada.files.MOST_LINE", 2**16)
    path = tmp_path / "endless.txt"
    path.touch()
    os.truncate(path, 2**40)  # Sparse: it takes no room on the disk.
    line = r"endless.txt:1: a line of 65536 bytes or more"
    with pytest.raises(ColadaError, match=line):
        split_file(path, 2**20)
    with pytest.raises(ColadaError, match=line):
        list(read_documents([path]))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet", "x.txt.gz"])
def test_special_files_are_no_data(tmp_path: Path, name: str) -> None:
    """B4: given by name; in a folder they are left out."""
    os.mkfifo(tmp_path / name)
    assert "a named pipe" in refused(lambda: find_files(tmp_path / name))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "a device" in refused(lambda: find_files(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("5", "a int"),
        ("null", "null"),
        ("[]", "a list"),
        ('{"text": 5}', "expected a string"),
        ('{"text": null}', "expected a string"),
        ('{"text": "a", "text": "b"}', "twice"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"text": ' + "9" * 5000 + "}", "thousands of digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "[" * 200 + "]" * 200 + "}", "within one another"),
        ('{"txt": "a"}', "did you mean 'txt'"),
        ('{"text": "a", "split": 5}', "split is 5"),
        ("\x00", "not valid JSON"),
    ],
)
def test_lines_that_are_no_records_are_named(tmp_path: Path, line: str, said: str) -> None:
    """B2, B3."""
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    found = refused(lambda: texts(tmp_path))
    assert f"{tmp_path / 'a.jsonl'}:2" in found
    assert said in found


def _parquet(path: Path, columns: list[tuple[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, values = [name for name, _ in columns], [values for _, values in columns]
    pq.write_table(pa.Table.from_arrays(values, names=names), path)


def test_parquet_that_python_cannot_convert_is_named_by_row_and_column(tmp_path: Path) -> None:
    """B9."""
    import pyarrow as pa

    words = pa.array(["a"])
    late = pa.array([10**15], pa.timestamp("s"))
    zoned = pa.array([0], pa.timestamp("s", tz="Mars/Olympus"))
    days = pa.array([2**31 - 1], pa.date32())
    path = tmp_path / "x.parquet"
    for columns, said in (
        ([("text", words), ("text", words)], "'text' is there twice"),
        ([("text", words), ("split", words), ("split", words)], "'split' is there twice"),
        ([("text", late)], "row 1: 'text' cannot be converted"),
        ([("text", zoned)], "row 1: 'text' cannot be converted"),
        ([("text", days)], "row 1: 'text' cannot be converted"),
        ([("text", words), ("split", late)], "row 1: 'split' cannot be converted"),
        ([("text", pa.array([b"\xff"], pa.binary()).cast(pa.string(), safe=False))], "not UTF-8"),
        ([("body", words)], "no column 'text'"),
        ([("text", pa.array([1]))], "expected a string"),
    ):
        _parquet(path, columns)
        assert said in refused(lambda: texts(tmp_path))
    for damaged in (b"", b"PAR1", path.read_bytes()[:-9], b"PAR1" + b"\xff" * 50 + b"PAR1"):
        path.write_bytes(damaged)
        assert "not a readable parquet file" in refused(lambda: texts(tmp_path))


# --- small data --------------------------------------------------------------------------------


def prose(characters: int, seed: int = 0) -> str:
    """Lines of words."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefgh ", k=60)) for _ in range(500)]
    return "\n".join(chance.choices(words, k=characters // 60))


def held_out(where: Path, share: float, least: int) -> tuple[list[str], list[str], Holdout]:
    """Training and validation texts."""
    source = Source(path=str(where))
    holdout = hold_out(source, share, least)
    records = [r for part in parts(source) for r in read(source, part, holdout)]
    found = ([r.values[0] for r in records if r.split == split] for split in ("train", "validation"))
    return (*found, holdout)  # type: ignore[return-value]


@pytest.mark.parametrize("names", [["input.txt"], ["a.txt", "b.txt", "c.txt"], ["x.jsonl"], ["x.txt.gz"]])
def test_few_long_documents_have_validation_text(tmp_path: Path, names: list[str]) -> None:
    """590 KB: nothing is lost, and no word is cut."""
    originals = [prose(590_000 // len(names), number) for number, _ in enumerate(names)]
    for name, text in zip(names, originals, strict=True):
        if name.endswith(".txt"):
            (tmp_path / name).write_text(text)
        else:
            (tmp_path / name).write_bytes(
                gzip.compress(text.encode()) if name.endswith("gz") else json.dumps({"text": text}).encode()
            )
    trained, validation, holdout = held_out(tmp_path, 0.02, 4096)
    assert isinstance(holdout, Cut)
    size = sum(map(len, validation))
    assert max(4096, 0.02 * 590_000) <= size < 0.04 * 590_000
    assert sum(map(len, trained)) + size == sum(map(len, originals))
    assert all(any(text in original for original in originals) for text in (*trained, *validation))
    assert all(text.endswith("\n") or any(map(str.endswith, originals, [text] * 9)) for text in trained)
    # Neighbours stay together: only what is held out cuts a text.
    assert len(trained) <= len(validation) + len(names)


def test_validation_pieces_do_not_depend_on_the_files_order(tmp_path: Path) -> None:
    found = []
    for order in ("abc", "cab"):
        folder = tmp_path / order
        folder.mkdir()
        for number, name in enumerate(order):
            (folder / f"{number}.txt").write_text(prose(50_000, ord(name)))
        found.append(sorted(held_out(folder, 0.02, 1024)[1]))
    assert found[0] == found[1] != []


@pytest.mark.parametrize(
    ("documents", "share", "expected"),
    [
        ([prose(200, n) for n in range(400)], 0.05, 0.05),  # Enough as it is.
        ([prose(3000)], 0.02, 0.0),  # So little that nothing is held out.
        ([prose(200_000)], 0.0, 0.0),  # Nothing is asked for.
        ([], 0.02, 0.02),
    ],
)
def test_documents_stay_whole_where_cutting_would_not_help(
    tmp_path: Path, documents: list[str], share: float, expected: float
) -> None:
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents))
    trained, validation, holdout = held_out(tmp_path, share, 1024)
    assert holdout in (share, expected)
    assert sorted(text for text in (*trained, *validation) if text) == sorted(documents)
    assert trained


def test_a_split_that_data_state_is_left_alone(tmp_path: Path) -> None:
    rows = [{"text": prose(9000, n), "split": "train"} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained, validation, holdout = held_out(tmp_path, 0.02, 1024)
    assert (len(trained), validation, holdout) == (5, [], 0.02)


@pytest.mark.parametrize(("characters", "left_out"), [(1500, True), (60_000, False)])
def test_training_goes_without_validation_text_where_there_is_too_little(
    tmp_path: Path, characters: int, left_out: bool
) -> None:
    (tmp_path / "input.txt").write_text(prose(characters))
    sections = {
        "stages": {"vae": {"length": 64}, "prior": {"length": 64}},
        "tokenizer": {"vocab_size": 260},
    }
    recipe = Recipe.model_validate({"data": {"sources": [{"path": str(tmp_path)}], "workers": 1}, **sections})
    said = list[str]()
    inputs = prepare_inputs(recipe, train_tokenizer(recipe), None, tmp_path / "shards", said.append)
    inputs.rows("train", recipe.stages["vae"], 0, 4)
    assert (inputs.validation_rows(recipe.stages["vae"], 0, 4, said.append) is None) == left_out
    assert any(line.startswith("validation is left out: ") for line in said) == left_out
