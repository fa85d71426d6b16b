"""The released checkpoint format: directories of ``config.json`` and safetensors files, read strictly.

A model directory holds ``cola_dit/`` and ``cola_vae/``, and a ``tokenizer.json``
beside them or one level up; that of a baseline holds ``decoder/`` instead. Two files beside
them are extensions: ``generation_config.json``, the settings with which this model measures best, and
``chat_template.jinja``, how it writes conversations.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from colada.config import DiTConfig, NetworkConfig, TextVAEConfig
from colada.device import unallocated
from colada.dit import ROPE_THETA, DiT
from colada.errors import ColadaError
from colada.layers import inverse_frequencies
from colada.locate import CHAT_TEMPLATE_FILE, DECODER_DIR, DIT_DIR, GENERATION_FILE, TOKENIZER_FILE, VAE_DIR
from colada.vae import TextVAE

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

Network = TypeVar("Network", bound=nn.Module)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises ColadaError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ColadaError(f"{path} is missing") from None
    except OSError as error:
        raise ColadaError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ColadaError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ColadaError(f"{path} holds a JSON {type(values).__name__}, expected an object")
    return values


# --- reading -----------------------------------------------------------------------------------


def read_configs(directory: Path) -> tuple[TextVAEConfig, DiTConfig]:
    """Return both configurations of a model directory, checked against each other.

    Raises:
        ColadaError: naming the file and key at fault.
    """
    if (directory / DECODER_DIR).is_dir():
        raise ColadaError(f"{directory} holds a baseline ({DECODER_DIR}/), expected a Cola DLM")
    for part in (DIT_DIR, VAE_DIR):
        if not (directory / part).is_dir():
            raise ColadaError(f"{directory} is no model directory: {part}/ is missing")
    dit_file, vae_file = directory / DIT_DIR / "config.json", directory / VAE_DIR / "config.json"
    dit = DiTConfig.from_dict(read_json(dit_file), str(dit_file))
    vae = TextVAEConfig.from_dict(read_json(vae_file), str(vae_file))
    check_pair(vae, dit, str(directory))
    return vae, dit


def check_pair(vae: TextVAEConfig, dit: DiTConfig, origin: str = "model") -> None:
    """Raise ColadaError if a Text VAE and a DiT cannot be parts of one model."""
    if dit.txt_in_channels != vae.latent_dim:
        raise ColadaError(
            f"{origin}: cola_dit txt_in_channels={dit.txt_in_channels} contradicts "
            f"cola_vae latent_dim={vae.latent_dim}"
        )
    if dit.block_size != vae.block_size:
        raise ColadaError(
            f"{origin}: cola_dit block_size={dit.block_size} contradicts cola_vae block_size={vae.block_size}"
        )


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


def read_weights(
    build: Callable[[], Network], folder: Path, dtype: torch.dtype | None, device: str | torch.device
) -> Network:
    """Build a network without storage and give it the tensors of a folder's safetensors files.

    Tensors that already have the wanted type are mapped from the file. Others
    are converted one by one, so that memory peaks at the result's size plus one tensor.

    Raises:
        ColadaError: for a missing, extra or misshapen tensor, or a truncated or corrupt file.
    """
    with unallocated():
        network = build()
    wanted = network.state_dict()
    files = _weight_files(folder)
    _check_names(folder, files, wanted)
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(files.values()):
        names = [name for name, at in files.items() if at == file]
        with _open(file) as handle:
            for name in names:
                part = handle.get_slice(name)
                shape = tuple(part.get_shape())
                if shape != tuple(wanted[name].shape):
                    expected = tuple(wanted[name].shape)
                    raise ColadaError(
                        f"{file}: tensor {name} has shape {shape}, its config expects {expected}"
                    )
                if part.get_dtype() not in ("F32", "BF16", "F16", "F64"):
                    raise ColadaError(
                        f"{file}: tensor {name} is of type {part.get_dtype()}, expected a float"
                    )
                if dtype is None or part.get_dtype() == _SAFETENSORS_NAMES.get(dtype):
                    tensors[name] = handle.get_tensor(name)
        for name in names:
            if name not in tensors:
                # Opened anew for each tensor: the pages of the last one leave memory with its handle.
                with _open(file) as handle:
                    tensors[name] = handle.get_tensor(name).to(dtype)
    if isinstance(network, DiT):
        _check_frequencies(folder, network, tensors)
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.to(device)


_SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}


def _weight_files(folder: Path) -> dict[str, Path]:
    """Return which file holds each tensor, from the index of a sharded set or the single file's header."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ColadaError(f"{index} has no weight_map")
        return {name: folder / str(file) for name, file in weight_map.items()}
    with _open(folder / WEIGHTS_FILE) as handle:
        return dict.fromkeys(handle.keys(), folder / WEIGHTS_FILE)


def _check_names(folder: Path, files: Mapping[str, Path], wanted: Mapping[str, Tensor]) -> None:
    missing = sorted(wanted.keys() - files.keys())
    extra = sorted(files.keys() - wanted.keys())
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
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except FileNotFoundError:
        raise ColadaError(f"{file} is missing") from None
    except OSError as error:
        raise ColadaError(f"cannot read {file}: {error}") from None
    except SafetensorError as error:
        raise ColadaError(f"{file} is truncated or corrupt: {error}") from None


# --- writing -----------------------------------------------------------------------------------


def write_model(
    directory: Path,
    networks: Mapping[str, nn.Module],
    save_tokenizer: Callable[[Path], None] | None = None,
    generation: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> None:
    """Write networks in the released format; an older model there is replaced once all is written.

    Args:
        networks: by folder; each has a ``config``.

    Raises:
        ColadaError: if the directory cannot be written (no space, no permission).
    """
    from huggingface_hub import save_torch_state_dict  # only when needed: 0.4 s

    directory = directory.resolve()
    partial = directory.with_name(directory.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for part, network in networks.items():
            folder = partial / part
            folder.mkdir(parents=True)
            config = network.config
            assert isinstance(config, NetworkConfig)
            write_json(folder / "config.json", config.to_dict())
            state = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
            save_torch_state_dict(state, folder, max_shard_size="5GB")
            for file in folder.glob("*.safetensors"):
                # The library writes them for the owner only; whoever may read the config may read these.
                file.chmod((folder / "config.json").stat().st_mode)
        if save_tokenizer is not None:
            save_tokenizer(partial / TOKENIZER_FILE)
        if generation:
            write_json(partial / GENERATION_FILE, generation)
        if chat_template is not None:
            (partial / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        directory.mkdir(parents=True, exist_ok=True)
        folders = (DIT_DIR, VAE_DIR, DECODER_DIR)
        for name in (*folders, TOKENIZER_FILE, GENERATION_FILE, CHAT_TEMPLATE_FILE):
            target = directory / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            if (partial / name).exists():
                (partial / name).replace(target)
        partial.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ColadaError(f"cannot write the model to {directory}: {error}") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an indented JSON object with its keys sorted."""
    path.write_text(json.dumps(dict(values), indent=2, sort_keys=True) + "\n", encoding="utf-8")
