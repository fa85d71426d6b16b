"""What may go wrong with files, by kind; each is one line; none loses anything."""

import json
import os
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
from colada.errors import ColadaError
from colada.models.cola import ColaDLM
from colada.networks import checkpoint
from colada.text.chat import read_template, render
from colada.text.tokenizer import Tokenizer
from colada.train.recipe import Recipe, load_recipe, save_recipe
from faults import refused
from helpers import read_safetensors, tiny_model, write_safetensors

DIT_WEIGHTS, VAE_WEIGHTS = "cola_dit/model.safetensors", "cola_vae/model.safetensors"


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
