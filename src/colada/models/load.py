"""A directory, or a hub repository, to a model of whatever architecture."""

from __future__ import annotations

from pathlib import Path

import torch

from colada.device import check_dtype, find_device, plain_torch
from colada.errors import ColadaError
from colada.files import read_json_object
from colada.locate import BUNDLED, DECODER_DIR, base_of, locate
from colada.models.autoregressive import AutoregressiveLM
from colada.models.base import ARCHITECTURES, LanguageModel
from colada.models.cola import ColaDLM
from colada.models.decoder import DecoderLM
from colada.models.difference import apply_difference
from colada.models.masked import MaskedLM
from colada.networks.checkpoint import check_one_save, read_dit, read_parts, read_vae, read_weights
from colada.networks.config import DecoderConfig
from colada.networks.decoder import Decoder
from colada.pictures.codec import read_codec

MODELS: dict[str, type[DecoderLM]] = {"ar": AutoregressiveLM, "llada": MaskedLM}
"""Baselines, by objective."""
KINDS: dict[str, type[LanguageModel]] = {"cola": ColaDLM, **MODELS}
"""By architecture."""


def load(
    where: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Load a model.

    Args:
        where: nothing for the bundled model, a directory (of a Cola DLM in the released format, or of a
            baseline), or a hub repository id (downloaded on first use).
        revision: branch, tag or commit of a hub repository.
        device: where to put the networks.
        dtype: convert the weights; by default they keep the file's type, except the bundled
            model's, which are stored in bfloat16 to be small and computed in float32.
            Weights of the wanted type are mapped from the file, not copied.

    Returns: a :class:`ColaDLM`, or the baseline that is in the directory.

    Raises:
        ColadaError: if the model cannot be found, read or is inconsistent.
    """
    if where is None and not BUNDLED.is_dir():
        raise ColadaError("this installation has no bundled model: give a directory or a hub id")
    check_dtype(dtype)
    place = find_device(device)
    directory, origin = locate(BUNDLED if where is None else where, revision), str(where or "bundled")
    if dtype is None and directory == BUNDLED:
        dtype = torch.float32
    if (base := base_of(directory)) is not None:
        whole = load(base, device=device)  # In the type that the difference is exact to.
        return apply_difference(whole, directory, origin).to(dtype=dtype)
    with plain_torch(inference=False):
        if (directory / DECODER_DIR).is_dir():
            config = read_decoder_config(directory)
            decoder = read_weights(lambda: Decoder(config), directory / DECODER_DIR, dtype, place)
            return MODELS[config.objective](decoder, origin=origin, **read_parts(directory))
        vae, dit = read_vae(directory, dtype, place), read_dit(directory, dtype, place)
    check_one_save(directory)
    image = read_codec(directory).to(place) if dit.config.img_channels else None
    return ColaDLM(vae, dit, image=image, origin=origin, **read_parts(directory))


def load_cola(
    where: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> ColaDLM:
    """Load a Cola DLM, for what only such a model can do; arguments as :func:`load`.

    Raises:
        ColadaError: as :func:`load`; or for a model of another architecture.
    """
    return require_cola(load(where, revision=revision, device=device, dtype=dtype))


def require_cola(model: LanguageModel) -> ColaDLM:
    """Return a model that is a Cola DLM. Raises ColadaError for one of another architecture."""
    if not isinstance(model, ColaDLM):
        raise ColadaError(f"{model.origin} is {ARCHITECTURES[model.arch]}, expected a Cola DLM here")
    return model


def read_decoder_config(directory: Path) -> DecoderConfig:
    """Return the configuration in a baseline's directory; raises ColadaError naming file and key."""
    file = directory / DECODER_DIR / "config.json"
    return DecoderConfig.from_dict(read_json_object(file), str(file))
