"""What the tests of faults share: how a call is refused, small baselines, and texts for a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from colada.errors import ColadaError
from colada.models.autoregressive import AutoregressiveLM
from colada.models.masked import MaskedLM
from colada.networks.config import DecoderConfig
from colada.networks.decoder import Decoder

TEXTS = ["The fox saw the owl. The owl saw the fox, and the fox ran off to look under the bridge. é"] * 9

BASELINES: dict[str, type[AutoregressiveLM] | type[MaskedLM]] = {"ar": AutoregressiveLM, "llada": MaskedLM}


def refused(call: Callable[[], Any]) -> str:
    """Return the one line with which a call is refused."""
    with pytest.raises(ColadaError) as caught:
        call()
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def decoder(objective: str, seed: int = 0) -> Decoder:
    network = Decoder(
        DecoderConfig(
            vocab_size=50,
            dim=16,
            num_layers=1,
            num_heads=2,
            ffn_dim=32,
            objective=objective,
            block_size=4,
        )
    )
    network.init_weights(torch.Generator().manual_seed(seed))
    return network
