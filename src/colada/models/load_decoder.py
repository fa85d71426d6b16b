"""A baseline's directory to a model."""

from __future__ import annotations

from pathlib import Path

import torch

from colada.files import read_json_object
from colada.locate import DECODER_DIR
from colada.models.autoregressive import AutoregressiveLM
from colada.models.decoder import DecoderLM
from colada.models.masked import MaskedLM
from colada.networks.checkpoint import read_parts, read_weights
from colada.networks.decoder import Decoder
from colada.networks.decoder_config import DecoderConfig

MODELS: dict[str, type[DecoderLM]] = {"ar": AutoregressiveLM, "llada": MaskedLM}
"""By objective."""


def read_decoder_config(directory: Path) -> DecoderConfig:
    """Return the configuration in a baseline's directory; raises ColadaError naming file and key."""
    file = directory / DECODER_DIR / "config.json"
    return DecoderConfig.from_dict(read_json_object(file), str(file))


def load_decoder(
    directory: Path,
    origin: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> DecoderLM:
    """Load a baseline; see :func:`colada.load`.

    Args:
        directory: with ``decoder/``.
        origin: what the model is called.
        device: where to put the network.
        dtype: convert the weights; they keep the file's type by default.

    Raises:
        ColadaError: for what is missing, damaged or inconsistent.
    """
    config = read_decoder_config(directory)
    return MODELS[config.objective](
        read_weights(lambda: Decoder(config), directory / DECODER_DIR, dtype, device),
        origin=origin,
        **read_parts(directory),
    )
