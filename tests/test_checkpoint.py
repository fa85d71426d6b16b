"""The checkpoint format: written, read strictly, and refused in one line that names the fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import colada
from colada import load
from colada.errors import ColadaError
from colada.locate import DIT_DIR, VAE_DIR, find_tokenizer, locate
from colada.models.cola import ColaDLM
from colada.networks.checkpoint import read_configs, read_dit, read_vae, write_model
from colada.networks.dit import DiT
from colada.text.tokenizer import Tokenizer
from helpers import (
    Array,
    as_safetensors,
    assert_close,
    read_safetensors,
    tiny_dit,
    tiny_dit_config,
    tiny_model,
    tiny_vae,
    write_safetensors,
)

DIT_WEIGHTS, VAE_WEIGHTS = "cola_dit/model.safetensors", "cola_vae/model.safetensors"
PACKAGE = Path(colada.__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny_model().save(directory)
    return directory


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    directory = tmp_path / "model"
    shutil.copytree(saved, directory)
    return directory


def _states(model: ColaDLM) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part, network in (("dit", model.dit), ("vae", model.vae))
        for name, tensor in network.state_dict().items()
    }


def _same_bits(first: ColaDLM, second: ColaDLM) -> bool:
    a, b = _states(first), _states(second)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


def _change_config(directory: Path, part: str, **values: Any) -> None:
    file = directory / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _change_tensors(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = read_safetensors(file)
    change(tensors)
    write_safetensors(file, tensors)


def _refused(directory: Path, message: str) -> None:
    with pytest.raises(ColadaError, match=message) as caught:
        load(directory)
    assert "\n" not in str(caught.value)


# --- writing and reading -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_then_load_gives_the_same_bits_and_configs(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(3, vae={"qk_bias": True, "scaling_factor": 1.3}, dit={"prediction": "z0"})
    model.to(dtype=dtype)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.vae.config == model.vae.config
    assert loaded.dit.config == model.dit.config
    assert _same_bits(model, loaded)
    assert {tensor.dtype for tensor in _states(loaded).values()} == {dtype}


def test_a_chat_template_is_stored_with_the_model_and_goes_when_it_has_none(tmp_path: Path) -> None:
    template = "{% for m in messages %}«{{ m['content'] }}»\n{% endfor %}\n"
    file = tmp_path / "model" / "chat_template.jinja"
    model = tiny_model()
    model.chat_template = template
    model.save(tmp_path / "model")
    assert file.read_bytes() == template.encode()
    assert load(tmp_path / "model").chat_template == template
    file.write_text("{% for m in %}")
    _refused(tmp_path / "model", r"chat_template\.jinja is not a chat template")
    tiny_model().save(tmp_path / "model")
    assert not file.exists()
    assert load(tmp_path / "model").chat_template is None


def test_the_written_files_are_those_of_the_format(saved: Path) -> None:
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert files == {DIT_WEIGHTS, VAE_WEIGHTS, "cola_dit/config.json", "cola_vae/config.json"}
    for part, network in (("cola_dit", tiny_model().dit), ("cola_vae", tiny_model().vae)):
        found = read_safetensors(saved / part / "model.safetensors")
        assert set(found) == set(network.state_dict())
        for name, tensor in network.state_dict().items():
            kind, shape, data = found[name]
            assert kind == "F32"
            assert shape == list(tensor.shape)
            assert data == tensor.detach().numpy().tobytes()


def test_a_file_written_by_hand_is_read_into_the_right_tensors(broken: Path) -> None:
    names = list(read_safetensors(broken / DIT_WEIGHTS))
    generator = np.random.default_rng(0)
    values: dict[str, Array] = {}
    for name, tensor in tiny_dit().state_dict().items():
        values[name] = generator.standard_normal(tuple(tensor.shape)).astype(np.float32)
        if name.endswith("freqs"):
            values[name] = tensor.numpy()
    write_safetensors(broken / DIT_WEIGHTS, as_safetensors({name: values[name] for name in reversed(names)}))
    for name, tensor in read_dit(broken).state_dict().items():
        assert np.array_equal(tensor.numpy(), values[name]), name


def test_a_sharded_set_is_read_as_its_index_says(broken: Path, saved: Path) -> None:
    folder = broken / "cola_dit"
    tensors = read_safetensors(broken / DIT_WEIGHTS)
    (broken / DIT_WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        write_safetensors(folder / file, {name: tensors[name] for name in own})
    weight_map = {name: file for file, own in halves.items() for name in own}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert _same_bits(load(broken), load(saved))
    # A shard that is not there, a tensor that is not where the index says, an index without a map.
    weight_map[names[0]] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    _refused(broken, rf"model-00002-of-00002\.safetensors.*{re.escape(names[0])}")
    weight_map[names[0]] = "gone.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    _refused(broken, r"gone\.safetensors: no such file")
    index.write_text("{}")
    _refused(broken, r"index\.json has no weight_map")


def test_a_large_model_is_written_in_shards_that_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(
        huggingface_hub,
        "save_torch_state_dict",
        lambda *given, **named: original(*given, **{**named, "max_shard_size": "40KB"}),
    )
    model = tiny_model()
    model.save(tmp_path / "model")
    assert len(list((tmp_path / "model" / "cola_dit").glob("*.safetensors"))) > 1
    assert _same_bits(model, load(tmp_path / "model"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_converted_on_request(saved: Path, dtype: torch.dtype) -> None:
    plain, converted = _states(load(saved)), _states(load(saved, dtype=dtype))
    for name, tensor in plain.items():
        assert converted[name].dtype == dtype
        assert torch.equal(converted[name], tensor.to(dtype)), name


def test_a_half_precision_file_is_widened_on_request(broken: Path) -> None:
    values = {name: tensor.numpy() for name, tensor in tiny_dit().state_dict().items()}
    write_safetensors(broken / DIT_WEIGHTS, as_safetensors(values, "F16"))
    assert {tensor.dtype for tensor in read_dit(broken).state_dict().values()} == {torch.float16}
    for name, tensor in read_dit(broken, torch.float32).state_dict().items():
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), values[name].astype(np.float16).astype(np.float32)), name


def test_a_model_may_be_saved_over_the_files_it_is_mapped_from(broken: Path, saved: Path) -> None:
    model = load(broken)
    model.save(broken)
    assert _same_bits(load(broken), load(saved))
    assert _same_bits(model, load(saved))
    assert not list(broken.parent.glob("*.partial"))


def test_a_newer_model_replaces_an_older_one_and_all_its_files(broken: Path) -> None:
    (broken / "cola_dit" / "model.safetensors.index.json").write_text("{}")
    (broken / "generation_config.json").write_text('{"steps": 3}')
    (broken / "tokenizer.json").write_text("not this model's")
    newer = tiny_model(9)
    newer.save(broken)
    loaded = load(broken)
    assert _same_bits(loaded, newer)
    assert loaded.generation == {}
    assert not (broken / "tokenizer.json").exists()


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_save_leaves_the_old_model_in_place_and_nothing_else(
    broken: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    calls = []
    original = huggingface_hub.save_torch_state_dict

    def full_disk(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full_disk)
    with pytest.raises(ColadaError, match=r"cannot write the model to .*model: .*No space left") as caught:
        tiny_model(9).save(broken)
    assert "\n" not in str(caught.value)
    assert _same_bits(load(broken), load(saved))
    assert [path.name for path in broken.parent.iterdir()] == ["model"]


def test_a_model_can_be_saved_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.save(".")
    assert _same_bits(model, load(tmp_path))


def test_saving_where_a_file_lies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ColadaError, match="model is a file"):
        tiny_model().save(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_tokenizer_and_settings_are_written_beside_the_networks(tmp_path: Path) -> None:
    model = tiny_model()
    write_model(
        tmp_path / "model",
        {DIT_DIR: model.dit, VAE_DIR: model.vae},
        Tokenizer.train([], 260),
        {"steps": 4},
    )
    assert find_tokenizer(tmp_path / "model") == tmp_path / "model" / "tokenizer.json"
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == {"steps": 4}


# --- int8 by row --------------------------------------------------------------------------------


def test_matrices_in_int8_are_off_by_half_a_step_of_their_row_and_half_as_large(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.dit.blocks[0].msa.proj_qkv.weight[0] = 0  # A row without a largest weight.
    model.save(tmp_path / "small", int8=True)
    loaded, file = load(tmp_path / "small"), tmp_path / "small" / "cola_dit" / "model.safetensors"
    with safe_open(file, framework="pt") as handle:
        kinds = {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
    assert {kinds[name] for name in kinds if name + "_scale" in kinds} == {"I8"}
    assert loaded.dit.config == model.dit.config
    for (name, value), exact in zip(loaded.dit.named_parameters(), model.dit.parameters(), strict=True):
        assert value.dtype == torch.float32
        if kinds[name] == "I8":
            largest = [max(map(abs, row)) for row in exact.tolist()]
            for row, expected, most in zip(value.tolist(), exact.tolist(), largest, strict=True):
                assert max(abs(a - b) for a, b in zip(row, expected, strict=True)) <= 0.501 * most / 127, name
        else:
            assert torch.equal(value, exact.bfloat16().float()), name
    assert "I8" not in {kinds[name] for name in kinds if "blocks." not in name}
    bf16 = load(tmp_path / "small", dtype=torch.bfloat16)
    assert {p.dtype for p in bf16.dit.parameters()} == {torch.bfloat16}
    loaded.save(tmp_path / "again", int8=True)  # Its rows keep their largest weight, and so their steps.
    for one, two in zip(load(tmp_path / "again").dit.parameters(), loaded.dit.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("missing", "is without .*_scale, as only int8 has"),
        ("wide", r"is float32 \(2, 1\), expected floats"),
        ("float", "is of type F32 with .*_scale, as only int8 has"),
        ("infinite", "holds values that are not finite"),
    ],
)
def test_int8_without_scales_that_fit_it_is_refused(tmp_path: Path, damage: str, why: str) -> None:
    tiny_model().save(tmp_path, int8=True)
    file = tmp_path / "cola_dit" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name + "_scale" in tensors)
    if damage == "missing":
        del tensors[name + "_scale"]
    elif damage == "wide":
        tensors[name + "_scale"] = torch.ones(2, 1)
    elif damage == "float":
        tensors[name] = tensors[name].float()
    else:
        tensors[name + "_scale"][0] = torch.inf
    save_file(tensors, file)
    with pytest.raises(ColadaError, match=why):
        load(tmp_path)


def test_the_tokenizer_is_found_beside_the_networks_or_one_level_up(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    assert find_tokenizer(directory) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_tokenizer(directory) == tmp_path / "tokenizer.json"
    (directory / "tokenizer.json").write_text("{}")
    assert find_tokenizer(directory) == directory / "tokenizer.json"


# --- memory --------------------------------------------------------------------------------------

_MEASURE = """
import json, sys
from pathlib import Path
import torch
from colada.networks.checkpoint import read_dit

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

found, kept = {}, []
for name in ("float32", "bfloat16"):
    read_dit(Path(sys.argv[2]), getattr(torch, name))  # what the first call costs once
    before = anonymous()
    kept.append(read_dit(Path(sys.argv[1]), getattr(torch, name)))
    found[name] = {
        "grown": anonymous() - before,
        "mapped": any("model.safetensors" in line for line in open("/proc/self/maps")),
        "sum": float(kept[-1].txt_in.proj.weight.double().sum()),
    }
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
def test_weights_of_the_wanted_type_are_mapped_and_others_cost_their_own_size(
    saved: Path, tmp_path: Path
) -> None:
    config = tiny_dit_config(txt_dim=512, emb_dim=512, num_layers=2)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in DiT(config).state_dict().items()}
    frequencies = tiny_dit().blocks[0].msa.rope.rope.freqs.numpy()
    values = {
        name: frequencies if name.endswith("freqs") else np.full(tuple(shape), 0.5, np.float32)
        for name, shape in shapes.items()
    }
    directory = tmp_path / "model"
    shutil.copytree(saved, directory)
    (directory / "cola_dit" / "config.json").write_text(json.dumps(config.to_dict()))
    write_safetensors(directory / DIT_WEIGHTS, as_safetensors(values))
    size = (directory / DIT_WEIGHTS).stat().st_size
    assert size > 20e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(directory), str(saved)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])},
    )
    found = json.loads(done.stdout)
    assert [own["sum"] for own in found.values()] == [0.5 * 512 * 8] * 2
    assert found["float32"]["mapped"]
    assert found["float32"]["grown"] < 0.1 * size
    # Half the file in bfloat16; not the file as well.
    assert 0.4 * size < found["bfloat16"]["grown"] < 0.75 * size


# --- what is refused -----------------------------------------------------------------------------


def test_a_missing_tensor_is_named(broken: Path) -> None:
    _change_tensors(broken / DIT_WEIGHTS, lambda tensors: tensors.pop("blocks.1.mlp.proj_in.bias"))
    _refused(broken, r"cola_dit does not fit .*misses tensor blocks\.1\.mlp\.proj_in\.bias$")


def test_an_extra_tensor_is_named(broken: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["decoder.surprise.weight"] = ("F32", [1], bytes(4))

    _change_tensors(broken / VAE_WEIGHTS, add)
    _refused(broken, r"cola_vae does not fit .*unknown tensor decoder\.surprise\.weight$")


def test_several_missing_and_extra_tensors_are_counted(broken: Path) -> None:
    _change_config(broken, "cola_dit", num_layers=1)
    count = len([name for name in tiny_dit().state_dict() if name.startswith("blocks.1.")])
    _refused(broken, rf"unknown tensor blocks\.1\..* and {count - 1} more$")


def test_a_misshapen_tensor_is_named_with_both_shapes(broken: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        tensors["txt_in.proj.bias"] = ("F32", [31], bytes(4 * 31))

    _change_tensors(broken / DIT_WEIGHTS, cut)
    _refused(
        broken, r"model\.safetensors: tensor txt_in\.proj\.bias has shape \(31,\), its config expects \(32,\)"
    )


def test_a_transposed_tensor_is_misshapen(broken: Path) -> None:
    def turn(tensors: dict[str, Any]) -> None:
        kind, shape, data = tensors["txt_in.proj.weight"]
        tensors["txt_in.proj.weight"] = (kind, shape[::-1], data)

    _change_tensors(broken / DIT_WEIGHTS, turn)
    _refused(broken, r"txt_in\.proj\.weight has shape \(8, 32\), its config expects \(32, 8\)")


@pytest.mark.parametrize(("kind", "width"), [("I32", 4), ("I64", 8), ("U16", 2)])
def test_a_tensor_of_whole_numbers_is_refused(broken: Path, kind: str, width: int) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["txt_in.proj.bias"] = (kind, [32], bytes(32 * width))

    _change_tensors(broken / DIT_WEIGHTS, change)
    _refused(broken, rf"tensor txt_in\.proj\.bias is of type {kind}, expected a float")


def test_weights_that_contradict_the_config_are_refused(broken: Path) -> None:
    _change_config(broken, "cola_vae", vocab_size=60)
    _refused(broken, r"\((50|51), 32\), its config expects \((60|61), 32\)|has shape \(50,\)")


@pytest.mark.parametrize("part", ["cola_dit", "cola_vae"])
def test_an_unknown_model_type_is_refused_with_its_file(broken: Path, part: str) -> None:
    _change_config(broken, part, model_type="llama")
    _refused(broken, rf"{part}.config\.json: model_type 'llama', expected")


def test_an_unknown_config_key_is_refused_with_its_file(broken: Path) -> None:
    _change_config(broken, "cola_dit", rope_dims=6)
    _refused(broken, r"cola_dit.config\.json: unknown key 'rope_dims' \(did you mean 'rope_dim'\?\)")


def test_networks_that_do_not_belong_together_are_refused(broken: Path) -> None:
    _change_config(broken, "cola_vae", block_size=8)
    _refused(broken, r"block_size=4 contradicts cola_vae block_size=8")
    _change_config(broken, "cola_vae", block_size=4, latent_dim=16)
    _refused(broken, r"txt_in_channels=8 contradicts cola_vae latent_dim=16")


@pytest.mark.parametrize("file", [DIT_WEIGHTS, VAE_WEIGHTS])
@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(broken: Path, file: str, keep: int) -> None:
    blob = (broken / file).read_bytes()
    (broken / file).write_bytes(blob[:keep])
    _refused(broken, rf"{file} is truncated or corrupt")


@pytest.mark.parametrize("garbage", [b"\xff" * 4096, b"<!DOCTYPE html>" * 50, b"version https://git-lfs\n"])
def test_a_file_of_garbage_is_named(broken: Path, garbage: bytes) -> None:
    (broken / DIT_WEIGHTS).write_bytes(garbage)
    _refused(broken, rf"{DIT_WEIGHTS} is truncated or corrupt")


@pytest.mark.parametrize("file", [DIT_WEIGHTS, VAE_WEIGHTS, "cola_dit/config.json", "cola_vae/config.json"])
def test_a_missing_file_is_named(broken: Path, file: str) -> None:
    (broken / file).unlink()
    _refused(broken, rf"{file}: no such file")


def test_a_directory_in_place_of_a_file_is_named(broken: Path) -> None:
    for file in (DIT_WEIGHTS, "cola_vae/config.json"):
        (broken / file).unlink()
        (broken / file).mkdir()
        _refused(broken, rf"{file}")


@pytest.mark.parametrize("part", ["cola_dit", "cola_vae"])
def test_a_directory_without_both_parts_is_no_model(broken: Path, part: str) -> None:
    shutil.rmtree(broken / part)
    _refused(broken, rf"is no model directory: {part}/ is missing")


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "is not valid JSON"), (b"\xff\xfe", "is not UTF-8"), (b"[]", "holds a list")],
)
def test_a_config_that_is_no_json_object_is_named(broken: Path, text: bytes, message: str) -> None:
    (broken / "cola_dit" / "config.json").write_bytes(text)
    _refused(broken, rf"cola_dit.config\.json.*{message}")


def test_rotary_frequencies_of_another_width_are_refused(broken: Path) -> None:
    name = "blocks.1.msa.rope.rope.freqs"

    def change(tensors: dict[str, Any]) -> None:
        kind, shape, data = tensors[name]
        wrong = np.frombuffer(data, "<f4").copy()
        wrong[1] *= 1.02
        tensors[name] = (kind, shape, wrong.tobytes())

    _change_tensors(broken / DIT_WEIGHTS, change)
    _refused(broken, rf"{re.escape(name)} does not hold the frequencies of rope_dim=6")


def test_rounded_rotary_frequencies_are_accepted_and_do_not_matter(broken: Path, saved: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name, (kind, shape, data) in tensors.items():
            if name.endswith("freqs"):
                rounded = torch.tensor(np.frombuffer(data, "<f4").copy()).bfloat16().float()
                tensors[name] = (kind, shape, rounded.numpy().tobytes())

    _change_tensors(broken / DIT_WEIGHTS, change)
    latents = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    with torch.no_grad():
        for directory in (broken, saved):
            network = read_dit(directory)
            outputs.append(network(latents, torch.tensor(500.0), network.layout([8])))
    assert_close(outputs[0], outputs[1].numpy(), 1e-6)


def test_configs_are_read_without_the_weights(broken: Path) -> None:
    (broken / DIT_WEIGHTS).unlink()
    vae, dit = read_configs(broken)
    assert (vae, dit) == (tiny_model().vae.config, tiny_model().dit.config)
    assert read_vae(broken).config == vae


def test_networks_that_do_not_fit_make_no_model() -> None:
    with pytest.raises(ColadaError, match=r"block_size=8 contradicts cola_vae block_size=4"):
        ColaDLM(tiny_vae(), tiny_dit(block_size=8))


# --- where a model is ----------------------------------------------------------------------------


def _hub(monkeypatch: pytest.MonkeyPatch, answer: Path | BaseException) -> list[SimpleNamespace]:
    """Put an answer in place of the hub's; return the calls it gets."""
    calls: list[SimpleNamespace] = []

    def download(name: str, **kwargs: Any) -> str:
        calls.append(SimpleNamespace(name=name, **kwargs))
        if isinstance(answer, BaseException):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def _http_error(cls: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, status_code=status, request=None, text="", url="")
    return cls("the hub said no\nin two lines", response=response)


def test_a_directory_is_itself_and_needs_no_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _hub(monkeypatch, AssertionError("asked the hub"))
    assert locate(saved) == saved
    assert locate(str(saved)) == saved
    monkeypatch.setenv("HOME", str(saved.parent))
    assert locate("~/model") == saved
    assert calls == []


def test_a_directory_called_like_a_hub_id_wins(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _hub(monkeypatch, AssertionError("asked the hub"))
    shutil.copytree(saved, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert load("owner/name").origin == "owner/name"
    assert calls == []


def test_a_hub_id_is_downloaded_at_its_revision_without_anything_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _hub(monkeypatch, saved)
    model = load("some-owner/Some.Name_1", revision="v2")
    assert _same_bits(model, load(saved))
    assert [(call.name, call.revision) for call in calls] == [("some-owner/Some.Name_1", "v2")] * len(calls)
    folders = [
        "cola_dit/*",
        "cola_vae/*",
        "decoder/*",
        "cola_image/*",
        "cola_dlm/cola_dit/*",
        "cola_dlm/cola_vae/*",
    ]
    wanted = [*folders, "tokenizer.json", "generation_config.json", "chat_template.jinja"]
    wanted += ["difference.json", "difference.safetensors"]
    assert sorted(calls[0].allow_patterns) == sorted(wanted)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_http_error(RevisionNotFoundError, 404), r"hub repository 'owner/name' has no revision 'v9'"),
        (_http_error(RepositoryNotFoundError, 404), r"no hub repository called 'owner/name'"),
        (_http_error(GatedRepoError, 403), r"'owner/name'.*private"),
        (_http_error(HfHubHTTPError, 503), r"'owner/name' .*the hub cannot be reached"),
        (LocalEntryNotFoundError("no\ncache"), r"'owner/name' .*local cache.*the hub cannot be reached"),
        (HFValidationError("bad id"), r"'owner/name' is not a hub id: bad id"),
        (ConnectionError("refused"), r"'owner/name' .*the hub cannot be reached"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_at_the_hub_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    _hub(monkeypatch, error)
    with pytest.raises(ColadaError, match=message) as caught:
        locate("owner/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_a_transport_error_of_the_hubs_http_library_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a refusing proxy raises: the HTTP library's own error, which need not be an OSError.
    base: Any = next(cls for cls in HfHubHTTPError.__bases__ if cls.__module__ != "builtins")
    _hub(monkeypatch, base("proxy refused"))
    with pytest.raises(ColadaError, match=r"'owner/name' .*the hub cannot be reached"):
        locate("owner/name")


@pytest.mark.parametrize(
    "where", ["nowhere", "a/b/c", "/no/such/dir", "./model", "owner/", "/name", "own er/name", "-x/../y"]
)
def test_neither_a_directory_nor_a_hub_id_is_refused_without_asking_the_hub(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = _hub(monkeypatch, AssertionError("asked the hub"))
    with pytest.raises(ColadaError, match=rf"no model at {re.escape(repr(where))}") as caught:
        load(where)
    assert "\n" not in str(caught.value)
    assert calls == []


@pytest.mark.parametrize("where", ["~nobody-of-this-name/model", "x" * 5000], ids=["user", "long"])
def test_names_the_file_system_cannot_take_are_refused_in_one_line(where: str) -> None:
    with pytest.raises(ColadaError, match=r"no model at|no directory"):
        locate(where)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ColadaError, match=r"model\.safetensors is a file, expected a model directory"):
        load(tmp_path / "model.safetensors")


def test_a_revision_of_a_directory_is_refused(saved: Path) -> None:
    with pytest.raises(ColadaError, match=r"revision='main' was given, but this is a directory"):
        load(saved, revision="main")
