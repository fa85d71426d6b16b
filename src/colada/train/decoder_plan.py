"""The arithmetic of training a baseline; :mod:`colada.train.plan` says what is counted."""

from __future__ import annotations

from functools import lru_cache

from colada.device import unallocated
from colada.networks.decoder import Decoder
from colada.networks.decoder_config import DecoderConfig
from colada.train.plan import Phase, Placement, block_causal_pairs, matrix_entries, state_bytes


@lru_cache(maxsize=4)
def _network(config: DecoderConfig) -> Decoder:
    """The network without memory."""
    with unallocated():
        return Decoder(config)


def decoder_flops(config: DecoderConfig, rows: int, length: int) -> dict[str, float]:
    """Return the useful FLOPs of a step by part.

    With W the matrix entries of the layers and P visible pairs of a row of L tokens, L (L + 1) / 2 for AR and
    L^2 for LLaDA, three times (forward and backward)

    - decoder: rows * (2 L W + 4 layers dim P)
    - head: rows * 2 L dim V; for LLaDA half of it, as half of the tokens are masked on average
    """
    network = _network(config)
    head_entries = matrix_entries(network.lm_head)
    layers = 2 * length * (matrix_entries(network) - head_entries)
    causal = config.objective == "ar"
    pairs = block_causal_pairs(length, 1) if causal else length**2
    attention = 4 * config.num_layers * config.dim * pairs
    head = 2 * length * head_entries * (1.0 if causal else 0.5)
    return {"decoder": 3.0 * rows * (layers + attention), "head": 3.0 * rows * head}


def decoder_memory(config: DecoderConfig, length: int, placement: Placement) -> dict[str, float]:
    """Return the bytes a rank needs by part; estimates as :func:`colada.train.plan.memory_per_rank`.

    With D = dim, F = ffn_dim and e = 4 bytes, or 2 in bfloat16, a layer keeps
    e (11 D + 4 F) + (4 - e) 6 D bytes a position.
    """
    entry = 2 if placement.bfloat16 else 4
    layer = entry * (11 * config.dim + 4 * config.ffn_dim) + (4 - entry) * 6 * config.dim
    kept = config.num_layers * layer
    if placement.checkpointing:
        kept = config.num_layers * entry * config.dim + layer
    rows = placement.micro_batch
    return {
        **state_bytes([_network(config)], placement),
        "activations": float(rows * length * kept),
        "logits": float(rows * length * config.vocab_size * (entry + 8 if placement.bfloat16 else 8)),
    }


def decoder_parameters(config: DecoderConfig) -> dict[str, int]:
    """Return the parameters of the network."""
    return {"decoder": config.parameters}


def decoder_phase(config: DecoderConfig, steps: int, rows: int, length: int, placement: Placement) -> Phase:
    """Return the steps of a baseline's run."""
    return Phase(
        "training",
        steps,
        rows * length,
        decoder_flops(config, rows, length),
        decoder_memory(config, length, placement),
        placement,
        {"rows": rows, "length": length},
    )
