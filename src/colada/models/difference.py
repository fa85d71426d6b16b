"""A model as what it differs by from another: for each matrix of the DiT a product of low rank, or int8.

``difference.json`` says which model that is (``base``), a digest of its DiT, and what differs in the DiT's
configuration; ``difference.safetensors`` has, for each matrix W of the base, ``W.up`` (outputs, rank) and
``W.down`` (rank, inputs), or its whole difference as int8 and the scales of its rows, and other tensors'
whole differences. Generation settings and a chat template lie
beside them, the tokenizer and the Text VAE are the base's. A model that was trained with ``train: lora``
differs by no more than that; of another this is the nearest of its rank (Eckart and Young, 1936).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from colada.errors import ColadaError
from colada.files import atomic_directory, read_json_object, write_json, write_text
from colada.locate import CHAT_TEMPLATE_FILE, DIFFERENCE_FILE, DIFFERENCE_WEIGHTS, GENERATION_FILE
from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.networks.checkpoint import SCALE, open_weights, read_configs, read_parts
from colada.networks.dit import DiT
from colada.networks.quantise import dequantise_rows, quantise_rows

UP, DOWN = ".up", ".down"
_EXTENSIONS = ("distilled", "training_length")  # Keys of the configuration that change no tensor's shape.


def digest(dit: DiT) -> str:
    """Return what tells the weights of one DiT from those of another, in any type they are exact in."""
    digester = hashlib.sha256()
    for name, tensor in sorted(dit.named_parameters()):
        digester.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digester.hexdigest()[:16]


def low_rank(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors (outputs, rank) and (rank, inputs) whose product is nearest to a matrix."""
    u, s, v = torch.linalg.svd(difference.double(), full_matrices=False)
    size = s[:rank].sqrt()
    return (u[:, :rank] * size).float(), (size[:, None] * v[:rank]).float()


@torch.no_grad()
def save_difference(model: ColaDLM, base: ColaDLM, name: str, directory: Path, rank: int | None) -> float:
    """Write what a model differs by from another.

    Args:
        name: of the other, as it will be found when this is loaded.
        rank: of each matrix's product; None for whole differences, as int8 by row.

    Returns: the share of the squared difference that products or rounding leave out.

    Raises:
        ColadaError: if the two have other shapes, tokenizers or Text VAEs, or it cannot be written.
    """
    is_other = os.path.lexists(directory) and not os.path.lexists(directory / DIFFERENCE_FILE)
    if is_other and (not directory.is_dir() or os.listdir(directory)):
        raise ColadaError(f"{directory} holds something else, expected a new directory for a difference")
    plain = dict.fromkeys(_EXTENSIONS)
    configs = [dataclasses.replace(either.dit.config, **plain) for either in (model, base)]  # type: ignore[arg-type]
    if configs[0] != configs[1]:
        raise ColadaError(f"{model.origin} and {base.origin} have DiTs of other shapes, expected the same")
    texts = [None if either.tokenizer is None else either.tokenizer.to_json() for either in (model, base)]
    if not model.shares_vae(base) or texts[0] != texts[1]:
        raise ColadaError(
            f"{model.origin} and {base.origin} have other Text VAEs or tokenizers, expected the same"
        )
    tensors, whole, left_out = dict[str, Tensor](), 0.0, 0.0
    for (key, new), old in zip(model.dit.named_parameters(), base.dit.parameters(), strict=True):
        difference = new.float() - old.float()
        if not bool(difference.any()):
            continue
        if difference.ndim == 2 and rank is None:
            tensors[key], tensors[key + SCALE] = quantise_rows(difference)
            restored = dequantise_rows(tensors[key], tensors[key + SCALE])
        elif difference.ndim == 2 and rank is not None and rank < min(difference.shape):
            tensors[key + UP], tensors[key + DOWN] = (x.bfloat16() for x in low_rank(difference, rank))
            restored = tensors[key + UP].float() @ tensors[key + DOWN].float()
        else:
            tensors[key] = restored = difference
        whole += float(difference.square().sum())
        left_out += float((difference - restored).square().sum())
    config = model.dit.config.to_dict()
    extensions = {key: config[key] for key in _EXTENSIONS if key in config}
    about = {"base": name, "base_dit": digest(base.dit), "rank": rank, "dit": extensions}
    try:
        with atomic_directory(directory) as partial:
            write_json(partial / DIFFERENCE_FILE, about)
            save_file({key: x.contiguous() for key, x in tensors.items()}, partial / DIFFERENCE_WEIGHTS)
            # The library writes it for the owner only; whoever may read what it is may read this.
            (partial / DIFFERENCE_WEIGHTS).chmod((partial / DIFFERENCE_FILE).stat().st_mode)
            if model.generation:
                write_json(partial / GENERATION_FILE, model.generation)
            if model.chat_template is not None:
                write_text(partial / CHAT_TEMPLATE_FILE, model.chat_template)
    except (OSError, SafetensorError) as error:
        raise ColadaError(f"cannot write the difference to {directory}: {error}") from None
    return left_out / whole if whole else 0.0


@torch.no_grad()
def apply_difference(base: LanguageModel, directory: Path, origin: str) -> ColaDLM:
    """Return the model that a directory's difference makes of the one it is to; its weights are changed.

    Raises:
        ColadaError: if that is another model than it was, or the directory is damaged.
    """
    file, about = directory / DIFFERENCE_WEIGHTS, read_json_object(directory / DIFFERENCE_FILE)
    if not isinstance(base, ColaDLM) or about.get("base_dit") != digest(base.dit):
        raise ColadaError(
            f"{directory} is a difference to another {about.get('base')!r} than is here: expected weights"
            f" with the digest {about.get('base_dit')}"
        )
    parameters = dict(base.dit.named_parameters())
    with open_weights(file) as handle:
        tensors_read = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - it is no dict
    for key in sorted({key.removesuffix(UP).removesuffix(DOWN).removesuffix(SCALE) for key in tensors_read}):
        up, down, scales = (tensors_read.get(key + suffix) for suffix in (UP, DOWN, SCALE))
        change = tensors_read.get(key) if up is None or down is None else up.float() @ down.float()
        if change is not None and (change.dtype == torch.int8 or scales is not None):
            fits = change.dtype == torch.int8 and scales is not None and scales.shape == (len(change), 1)
            change = dequantise_rows(change, scales) if fits and scales is not None else None
        if change is None or key not in parameters or change.shape != parameters[key].shape:
            raise ColadaError(f"{file}: {key} is no difference to a tensor of {about.get('base')!r}")
        if not bool(change.isfinite().all()):
            raise ColadaError(f"{file}: {key} holds values that are not finite")
        parameters[key].data = parameters[key] + change.to(parameters[key])  # What is mapped stays as it is.
    _, base.dit.config = read_configs(directory)
    parts = {key: value for key, value in read_parts(directory).items() if value is not None}
    own_parts: dict[str, Any] = {"generation": base.generation, "chat_template": base.chat_template, **parts}
    return ColaDLM(base.vae, base.dit, image=base.image, origin=origin, **own_parts)
