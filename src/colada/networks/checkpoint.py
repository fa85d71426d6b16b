"""The released checkpoint format: directories of ``config.json`` and safetensors files, read strictly.

A model directory holds ``cola_dit/`` and ``cola_vae/``, and a ``tokenizer.json``
beside them or one level up; that of a baseline holds ``decoder/`` instead. Beside them are extensions:
``cola_image/``, the codec of a model that has pictures; ``generation_config.json``, the settings with which
this model measures best; and ``chat_template.jinja``, how it writes conversations. A matrix ``name`` may be
stored as int8 with the scales of its rows, ``name_scale``.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from colada.device import unallocated
from colada.errors import ColadaError
from colada.files import atomic_directory, open_file, read_json_object, write_json, write_text
from colada.locate import (
    CHAT_TEMPLATE_FILE,
    DECODER_DIR,
    DIFFERENCE_FILE,
    DIT_DIR,
    GENERATION_FILE,
    IMAGE_DIR,
    TOKENIZER_FILE,
    VAE_DIR,
    base_of,
    find_tokenizer,
)
from colada.networks.config import DiTConfig, NetworkConfig, TextVAEConfig, check_pair
from colada.networks.dit import ROPE_THETA, DiT
from colada.networks.layers import inverse_frequencies
from colada.networks.quantise import dequantise_rows, quantise_rows
from colada.networks.vae import TextVAE
from colada.text.chat import read_template
from colada.text.tokenizer import Tokenizer

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
FOLDERS = (DIT_DIR, VAE_DIR, DECODER_DIR, IMAGE_DIR)
PARTS = (*FOLDERS, TOKENIZER_FILE, GENERATION_FILE, CHAT_TEMPLATE_FILE)
_MODEL_FILE = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
SCALE = "_scale"
"""What follows a matrix's name in that of its rows' scales, (rows, 1), where it is stored as int8."""
_SAVE = "save"  # The key of the weights' metadata that says which were saved together.

Network = TypeVar("Network", bound=nn.Module)


# --- reading -----------------------------------------------------------------------------------


def read_configs(directory: Path) -> tuple[TextVAEConfig, DiTConfig]:
    """Return both configurations of a model directory, checked against each other.

    Raises:
        ColadaError: naming the file and key at fault.
    """
    base = base_of(directory)
    if base is not None:
        vae, dit = read_configs(base)
        over = read_json_object(directory / DIFFERENCE_FILE).get("dit")
        where = f"{directory / DIFFERENCE_FILE}: dit"
        return vae, DiTConfig.from_dict({**dit.to_dict(), **(over if isinstance(over, dict) else {})}, where)
    if (directory / DECODER_DIR).is_dir():
        raise ColadaError(f"{directory} holds a baseline ({DECODER_DIR}/), expected a Cola DLM")
    for part in (DIT_DIR, VAE_DIR):
        if not (directory / part).is_dir():
            raise ColadaError(f"{directory} is no model directory: {part}/ is missing")
    dit_file, vae_file = directory / DIT_DIR / "config.json", directory / VAE_DIR / "config.json"
    dit = DiTConfig.from_dict(read_json_object(dit_file), str(dit_file))
    vae = TextVAEConfig.from_dict(read_json_object(vae_file), str(vae_file))
    check_pair(vae, dit, str(directory))
    return vae, dit


def read_dit(directory: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> DiT:
    """Return the DiT of a model directory; see :func:`read_weights`."""
    _, config = read_configs(directory)
    return read_weights(lambda: DiT(config), directory / DIT_DIR, dtype, device)


def read_vae(
    directory: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> TextVAE:
    """Return the Text VAE of a model directory; see :func:`read_weights`."""
    config, _ = read_configs(directory)
    return read_weights(lambda: TextVAE(config), directory / VAE_DIR, dtype, device)


def read_parts(directory: Path) -> dict[str, Any]:
    """Return what stands beside the networks, None where it does not: tokenizer, generation, chat_template.

    Raises:
        ColadaError: naming the file that cannot be read.
    """
    tokenizer = find_tokenizer(directory)
    settings, template = directory / GENERATION_FILE, directory / CHAT_TEMPLATE_FILE
    return {
        "tokenizer": None if tokenizer is None else Tokenizer.from_file(tokenizer),
        "generation": read_json_object(settings) if os.path.lexists(settings) else None,
        "chat_template": read_template(template) if os.path.lexists(template) else None,
    }


def read_weights(
    build: Callable[[], Network], folder: Path, dtype: torch.dtype | None, device: str | torch.device
) -> Network:
    """Build a network without storage and give it the tensors of a folder's safetensors files.

    Tensors that already have the wanted type are mapped from the file. Others
    are converted one by one, so that memory peaks at the result's size plus one tensor.
    Without ``dtype``, tensors of several types become the widest of these, in which none loses anything;
    of int8 and scales that is float32.

    Raises:
        ColadaError: for a missing, extra or misshapen tensor, a truncated or corrupt file, or values that
            are not finite, which are looked for in what is read now: not in mapped tensors of large files.
    """
    with unallocated():
        network = build()
    expected = network.state_dict()
    files = _weight_files(folder)
    scales = {name: name + SCALE for name in files if name + SCALE in files.keys() - expected.keys()}
    _check_names(folder, files.keys() - scales.values(), expected)
    names_of = {
        file: [name for name in expected if files[name] == file]
        for file in dict.fromkeys(files[name] for name in expected)
    }
    stored: dict[str, torch.dtype] = {}
    for file, names in names_of.items():
        with open_weights(file) as handle:
            for name in names:
                part, shape = handle.get_slice(name), tuple(expected[name].shape)
                if tuple(part.get_shape()) != shape:
                    shapes = f"has shape {tuple(part.get_shape())}, its config expects {shape}"
                    raise ColadaError(f"{file}: tensor {name} {shapes}")
                is_int8 = part.get_dtype() == "I8"
                if is_int8 != (name in scales):
                    without = "without" if is_int8 else f"of type {part.get_dtype()} with"
                    raise ColadaError(f"{file}: tensor {name} is {without} {name + SCALE}, as only int8 has")
                if part.get_dtype() not in _TYPES:
                    raise ColadaError(
                        f"{file}: tensor {name} is of type {part.get_dtype()}, expected a float"
                    )
                stored[name] = _TYPES[part.get_dtype()]
    dtype = dtype or reduce(torch.promote_types, stored.values())
    tensors: dict[str, Tensor] = {}
    for file, names in names_of.items():
        with open_weights(file) as handle:
            mapped = {
                name: handle.get_tensor(name)
                for name in names
                if stored[name] == dtype and name not in scales
            }
        tensors |= mapped
        large = sum(tensor.nbytes for tensor in mapped.values()) > MOST_READ_AT_LOAD
        for name in names:
            if name not in mapped:
                # Opened anew for each tensor: the pages of the last one leave memory with its handle.
                with open_weights(file) as handle:
                    tensor = handle.get_tensor(name)
                if name in scales:
                    tensor = dequantise_rows(tensor, _scales(files[name], scales[name], tensor))
                tensors[name] = tensor.to(dtype)
            elif large:
                continue
            # NaN is the least and the greatest value of what holds it.
            if not all(math.isfinite(end) for end in tensors[name].aminmax()):
                as_type = "" if name in mapped else f" in {str(dtype).removeprefix('torch.')}"
                raise ColadaError(f"{file}: tensor {name} holds values that are not finite{as_type}")
    if isinstance(network, DiT):
        _check_frequencies(folder, network, tensors)
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.to(device)


MOST_READ_AT_LOAD = 2**30
"""Bytes of mapped tensors that are read through while a file is loaded; a larger file's come when needed."""

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_TYPES["I8"] = torch.float32  # What int8 and its scales stand for.


def _scales(file: Path, name: str, matrix: Tensor) -> Tensor:
    """Return the scales of an int8 matrix's rows. Raises ColadaError for ones that do not fit it."""
    with open_weights(file) as handle:
        scales: Tensor = handle.get_tensor(name)
    if not scales.is_floating_point() or scales.shape != (len(matrix), 1):
        kind = str(scales.dtype).removeprefix("torch.")
        raise ColadaError(
            f"{file}: tensor {name} is {kind} {tuple(scales.shape)}, expected floats ({len(matrix)}, 1)"
        )
    return scales


def _weight_files(folder: Path) -> dict[str, Path]:
    """Return which file holds each tensor, from the index of a sharded set or the single file's header."""
    index = folder / INDEX_FILE
    if not os.path.lexists(index):
        with open_weights(folder / WEIGHTS_FILE) as handle:
            return dict.fromkeys(handle.keys(), folder / WEIGHTS_FILE)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ColadaError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ColadaError(f"{index}: {name} is in {file!r}, expected the name of a file beside it")
    return {name: folder / file for name, file in weight_map.items()}


def check_one_save(directory: Path) -> None:
    """Raise ColadaError for networks that say that they were not saved together; other software's do not."""
    saves = {}
    for part in (DIT_DIR, VAE_DIR, IMAGE_DIR):
        index = directory / part / INDEX_FILE
        if part == IMAGE_DIR and not (directory / part).is_dir():
            continue
        if os.path.lexists(index):
            metadata = read_json_object(index).get("metadata")
        else:
            with open_weights(directory / part / WEIGHTS_FILE) as handle:
                metadata = handle.metadata()
        if isinstance(metadata, dict) and metadata.get(_SAVE) is not None:
            saves[part] = str(metadata[_SAVE])
    if len(set(saves.values())) > 1:
        saves_named = " and ".join(f"{part}/ is of save {save}" for part, save in saves.items())
        raise ColadaError(f"{directory} mixes two models: {saves_named}; save or export it again")


def _check_names(folder: Path, stored: Set[str], expected: Mapping[str, Tensor]) -> None:
    missing = sorted(expected.keys() - stored)
    extra = sorted(stored - expected.keys())
    problems = [
        f"{kind} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for kind, names in (("misses tensor", missing), ("has the unknown tensor", extra))
        if names
    ]
    if problems:
        raise ColadaError(f"{folder} does not fit its config.json: it {' and '.join(problems)}")


def _check_frequencies(folder: Path, network: DiT, tensors: Mapping[str, Tensor]) -> None:
    """Refuse rotary frequencies that are not, to bf16 rounding, those of the config."""
    exact = inverse_frequencies(network.config.rope_dim, ROPE_THETA)
    for name, tensor in tensors.items():
        stored = name.endswith("rope.rope.freqs")
        if stored and not torch.allclose(tensor.float(), exact, rtol=1e-2, atol=0):
            raise ColadaError(
                f"{folder}: {name} does not hold the frequencies of rope_dim={network.config.rope_dim}"
            )


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ColadaError: if it is no regular file, may not be read, or is damaged.
    """
    # The library reports every file that it cannot open as missing.
    with open_file(file, "weights"):
        pass
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except OSError as error:
        raise ColadaError(f"{file}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise ColadaError(f"{file} is truncated or corrupt: {' '.join(str(error).split())}") from None


# --- writing -----------------------------------------------------------------------------------


def write_model(
    directory: Path,
    networks: Mapping[str, nn.Module],
    tokenizer: Tokenizer | None = None,
    generation: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    int8: bool = False,
) -> None:
    """Write networks in the released format; an older model there is replaced at once when all is written.

    Other files beside an older model stay. Where the directory itself must stay (a mount point, a working
    directory), its parts are exchanged one by one, the networks last: what is stopped there is no model.

    Args:
        networks: by folder; each has a ``config``.
        int8: store the matrices of the DiT's or a baseline's blocks as int8 with a scale a row, and what else
            there is in bfloat16.

    Raises:
        ColadaError: if the directory cannot be written (no space, no permission), or holds something else
            than a model.
    """
    directory = directory.resolve()
    try:
        check_replaceable(directory)
        inside = _must_stay(directory)
        with atomic_directory(directory / ".new" if inside else directory) as partial:
            _write_networks(partial, networks, int8)
            if tokenizer is not None:
                tokenizer.save(partial / TOKENIZER_FILE)
            if generation:
                write_json(partial / GENERATION_FILE, generation)
            if chat_template is not None:
                write_text(partial / CHAT_TEMPLATE_FILE, chat_template)
            if not inside and directory.is_dir():
                _carry_over(directory, partial)
        if inside:
            _exchange_parts(directory, directory / ".new")
    except (OSError, shutil.Error, SafetensorError) as error:
        raise ColadaError(f"cannot write the model to {directory}: {error}") from None


def _write_networks(directory: Path, networks: Mapping[str, nn.Module], int8: bool) -> None:
    from huggingface_hub import save_torch_state_dict  # only when needed: 0.4 s

    states = {
        part: {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
        for part, network in networks.items()
    }
    if int8:
        states = {part: state if part == IMAGE_DIR else _small(part, state) for part, state in states.items()}
    # Of the content, so that equal models are equal files.
    digest = hashlib.sha256()
    for part, state in states.items():
        for name, tensor in state.items():
            head = tensor.flatten()[:1024].cpu().contiguous().view(torch.uint8)
            digest.update(f"{part}.{name}:{tuple(tensor.shape)}".encode() + head.numpy().tobytes())
    for part, network in networks.items():
        folder = directory / part
        folder.mkdir()
        config = network.config
        assert isinstance(config, NetworkConfig)
        write_json(folder / "config.json", config.to_dict())
        save = digest.hexdigest()[:16]
        save_torch_state_dict(states[part], folder, max_shard_size="5GB", metadata={_SAVE: save})
        for file in folder.glob("*.safetensors"):
            _order_metadata(file, save)
            # The library writes them for the owner only; whoever may read the config may read these.
            file.chmod((folder / "config.json").stat().st_mode)


def _small(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's tensors in bfloat16, the matrices of a prior's or a decoder's blocks as int8."""
    small = {name: tensor.bfloat16() for name, tensor in state.items()}
    for name, tensor in state.items():
        if part != VAE_DIR and tensor.ndim == 2 and "blocks." in name:
            small[name], small[name + SCALE] = quantise_rows(tensor)
    return small


def _order_metadata(file: Path, save: str) -> None:
    """Put the two entries of a safetensors file's metadata in one order: the library's varies."""
    sorted_entries, unsorted = (
        f'{{"format":"pt","{_SAVE}":"{save}"}}',
        f'{{"{_SAVE}":"{save}","format":"pt"}}',
    )
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = stream.read(size).replace(unsorted.encode(), sorted_entries.encode(), 1)
        stream.seek(8)
        stream.write(header)


def check_replaceable(directory: Path) -> None:
    """Refuse a directory that holds something else than a model, or than a model's files in its parts."""
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise ColadaError(f"{directory} is a file, expected a directory for a model")
    parts = [part for part in FOLDERS if (directory / part / "config.json").is_file()]
    for part in FOLDERS if parts else ():
        if os.path.lexists(directory / part) and part not in parts:
            raise ColadaError(f"{directory / part} is no part of a model, and would be removed")
    others = sorted(name for name in os.listdir(directory) if name != ".new")
    if not parts and others and not (directory / ".new").is_dir():  # Not one whose saving was stopped.
        raise ColadaError(
            f"{directory} holds {others[0]!r} and no model, expected an empty or new directory, or a model"
        )
    for part in parts:
        for name in sorted(os.listdir(directory / part)):
            if not _MODEL_FILE.fullmatch(name):
                raise ColadaError(f"{directory / part / name} is no file of a model, and would be removed")


def _must_stay(directory: Path) -> bool:
    """Whether a directory cannot give its name to another, or would be missed: someone works in it."""
    if not directory.is_dir():
        return False
    here = None
    with suppress(FileNotFoundError):  # The working directory may be gone.
        here = Path.cwd()
    within = here is not None and here.is_relative_to(directory)
    return within or os.path.ismount(directory) or not os.access(directory.parent, os.W_OK)


def _carry_over(directory: Path, partial: Path) -> None:
    """Give a model's directory what else the one before holds, as links to the same files."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        return set(names) & {*PARTS, ".new"} if Path(folder) == directory else set()

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # A file system without them.
            shutil.copy2(source, target, follow_symlinks=False)

    shutil.copytree(
        directory, partial, symlinks=True, ignore=left_out, copy_function=link, dirs_exist_ok=True
    )


def _exchange_parts(directory: Path, new: Path) -> None:
    """Give a directory the parts of another, which is removed with the old ones."""
    old = new / "old"
    old.mkdir()
    for name in PARTS:
        if os.path.lexists(directory / name):
            os.rename(directory / name, old / name)
    for name in reversed(PARTS):  # The networks last: until then, this is no model.
        if os.path.lexists(new / name):
            os.rename(new / name, directory / name)
    shutil.rmtree(new)
