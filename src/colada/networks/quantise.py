"""Fewer bits for the weights of the transformer layers, through torchao (extra ``quant``)."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from colada.errors import ColadaError
from colada.flow import choose

QUANTISATIONS = {"int8": "Int8WeightOnlyConfig"}
"""By name, torchao's configuration: int8 weights by output channel."""


def quantise(networks: tuple[nn.Module, nn.Module], name: str) -> None:
    """Quantise the linear layers of both networks' blocks in place.

    The AdaLN matrices stay as they are: in generation they are only read to fill the table.

    Args:
        networks: the DiT, and the Text VAE's decoder.
        name: one of :data:`QUANTISATIONS`.

    Raises:
        ColadaError: for an unknown name, or if torchao is missing.
    """
    config = choose("quantise", name, QUANTISATIONS)
    logging.disable(logging.WARNING)  # torchao logs each of its own kernels that this machine has no use for
    try:
        import torchao.quantization as ao
    except ImportError:
        raise ColadaError(f"quantise={name!r} needs torchao: pip install 'colada-lm[quant]'") from None
    finally:
        logging.disable(logging.NOTSET)
    for network in networks:
        ao.quantize_(network.blocks, getattr(ao, config)(), filter_fn=_is_quantised)


def _is_quantised(module: nn.Module, name: str, *_: Any) -> bool:
    return isinstance(module, nn.Linear) and ".ada." not in name
