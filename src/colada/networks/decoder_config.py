"""The configuration of a baseline's network, and the one of a wanted size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from colada.errors import ColadaError
from colada.networks.config import TRAINING_LENGTH, NetworkConfig, Rule

HEAD = 64  # Channels of a head, where the width allows it.
OBJECTIVES = ("ar", "llada")
_ASPECT = 64  # Width per layer of a matched network, as GPT-2's family has about.


@dataclass(frozen=True)
class DecoderConfig(NetworkConfig):
    """A LLaMA-style decoder (``model_type`` "colada_decoder").

    ``objective`` says what it is trained for: "ar", the next token under causal visibility, or "llada",
    masked tokens under full visibility. ``bos_token_id`` precedes every text of an AR model;
    ``block_size`` tokens are decoded together by a LLaDA model, blocks from left to right.
    """

    model_type: ClassVar[str] = "colada_decoder"
    architecture: ClassVar[str] = "ColadaDecoderModel"
    positive: ClassVar[str] = (
        "vocab_size dim num_layers num_heads ffn_dim norm_eps rope_theta init_std block_size"
    )
    rules: ClassVar[Sequence[Rule]] = (
        ("objective", lambda c: c.objective in OBJECTIVES, "'ar' or 'llada'"),
        (
            "bos_token_id",
            lambda c: 0 <= c.bos_token_id < c.vocab_size,
            "an id below vocab_size={c.vocab_size}",
        ),
        ("dim", lambda c: c.dim % c.num_heads == 0, "a multiple of num_heads={c.num_heads}"),
        ("dim", lambda c: c.dim // c.num_heads % 2 == 0, "an even width per head"),
    )

    objective: str = "ar"
    vocab_size: int = 32000
    dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    ffn_dim: int = 1408
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    init_std: float = 0.02
    bos_token_id: int = 0
    block_size: int = 16
    training_length: int | None = TRAINING_LENGTH

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token of a LLaDA model: the embedding's extra last row."""
        return self.vocab_size

    @property
    def embeddings(self) -> int:
        """Rows of the embedding: the vocabulary, and a LLaDA model's mask."""
        return self.vocab_size + (self.objective == "llada")

    @property
    def parameters(self) -> int:
        """How many parameters the network has; embedding and output are two matrices."""
        layer = 4 * self.dim**2 + 3 * self.dim * self.ffn_dim + 2 * self.dim
        return (self.embeddings + self.vocab_size) * self.dim + self.num_layers * layer + self.dim


def matched_config(parameters: int, vocab_size: int, **others: Any) -> DecoderConfig:
    """Return a network of a wanted number of parameters, of proportions as usual as that allows.

    Heads have 64 channels. Of all widths and depths, the one whose MLP comes out nearest to 8/3 of the
    width and whose width is nearest to 64 a layer, both by ratio.

    Args:
        parameters: wanted.
        vocab_size: of the tokenizer.
        others: further keys of the configuration.

    Raises:
        ColadaError: if none is within 3%.
    """
    best: tuple[float, DecoderConfig] | None = None
    for dim in range(HEAD, 8193, HEAD):
        for layers in range(max(1, dim // (4 * _ASPECT)), 4 * dim // _ASPECT + 1):
            rest = parameters - 2 * vocab_size * dim - dim - layers * (4 * dim**2 + 2 * dim)
            ffn_dim = max(8, round(rest / (3 * dim * layers) / 8) * 8)
            strange = abs(math.log(ffn_dim / (8 * dim / 3))) + 0.5 * abs(math.log(dim / (_ASPECT * layers)))
            if best is None or strange < best[0]:
                config = DecoderConfig(
                    **others,
                    vocab_size=vocab_size,
                    dim=dim,
                    num_layers=layers,
                    num_heads=dim // HEAD,
                    ffn_dim=ffn_dim,
                )
                if abs(config.parameters - parameters) <= 0.03 * parameters:
                    best = strange, config
    if best is None:
        raise ColadaError(f"no decoder with vocab_size={vocab_size} has {parameters:,} parameters")
    return best[1]
