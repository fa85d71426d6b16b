"""LLaDA: the decoder with full visibility, masked tokens filled in a few at a time, likeliest first.

*Large Language Diffusion Models* (arXiv 2502.09992): low-confidence remasking within blocks that are decoded
from left to right (semi-autoregressive), by default in as many steps as tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from colada.device import require_memory, undisturbed
from colada.errors import ColadaError
from colada.generate.reference import block_generator
from colada.generate.sampling import Sampling
from colada.models.decoder import DEFAULTS, DecoderLM, Writing
from colada.text.transcript import Chunk

ACTIVATIONS = 6
"""Vectors of either width that a pass holds at once for a token."""
_TIE = 1e-5  # of probability: what a place further right counts less


class MaskedLM(DecoderLM):
    """A masked diffusion model that writes: prompt, then masks for all new tokens, filled block by block.

    The setting ``steps`` is passes a block; as many as a block has tokens by default.
    """

    arch = "llada"
    defaults: ClassVar[Mapping[str, Any]] = {**DEFAULTS, "steps": None}

    @undisturbed
    def _run(self, writing: Writing) -> Iterator[Chunk]:
        mask, size = self.decoder.config.mask_id, self.decoder.config.block_size
        limit = writing.transcripts[0].limit
        config, total = self.decoder.config, sum(len(ids) + limit for ids in writing.prompts)
        widths = ACTIVATIONS * (config.dim + config.ffn_dim) * self.decoder.wte.weight.element_size()
        require_memory(total * widths, self.device, f"passes over {total} tokens")
        rows = [torch.tensor([*ids, *[mask] * limit], device=self.device) for ids in writing.prompts]
        seen = [set[int]() for _ in rows]
        active, errors = list(range(len(rows))), dict[int, ColadaError]()
        for number, begin in enumerate(range(0, limit, size)):
            length = min(size, limit - begin)
            starts = [len(writing.prompts[index]) + begin for index in active]
            schedule = transfers(length, min(writing.steps or length, length))
            for step, count in enumerate(schedule):
                logits = self._logits([rows[index] for index in active], starts, length)
                for index, start, own in zip(active, starts, logits, strict=True):
                    block = rows[index][start : start + length]
                    generator = block_generator(writing.seeds[index], number * size + step, 1)
                    try:
                        fill(block, own, mask, count, writing.sampling, seen[index], generator)
                    except Exception as error:  # Its own: the others have their tokens.
                        errors.setdefault(index, self._fault(error))
            for index, start in zip(active, starts, strict=True):
                ids = rows[index][start : start + length].tolist()
                seen[index].update(ids)
                yield writing.chunk(index, number, ids, errors.get(index))
            active = [index for index in active if writing.transcripts[index].finish_reason is None]
            if not active:
                return

    def _logits(self, rows: Sequence[Tensor], starts: Sequence[int], length: int) -> tuple[Tensor, ...]:
        """Return the logits (length, V) of each row's block, which begins at its start."""
        lengths = [len(row) for row in rows]
        first = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths) + torch.tensor(starts)
        where = (first[:, None] + torch.arange(length)).flatten().to(self.device)
        logits = self.decoder(torch.cat(list(rows)), self.decoder.layout(lengths), where)
        return logits.split(length)


def transfers(tokens: int, steps: int) -> list[int]:
    """Return how many tokens each step fills: as even as can be, the larger ones first."""
    each, more = divmod(tokens, steps)
    return [each + (step < more) for step in range(steps)]


def fill(
    block: Tensor,
    logits: Tensor,
    mask: int,
    count: int,
    sampling: Sampling,
    seen: set[int],
    generator: torch.Generator,
) -> None:
    """Fill the ``count`` masked tokens of a block that the model is surest of, in place.

    Args:
        block: (L,) ids, some of them masked; at least ``count``.
        logits: (L, V).
        sampling: how each token is picked; how sure the model is of it is its probability untempered.
        seen: ids of earlier blocks, to be penalised.
    """
    picked = sampling.pick(logits, seen, generator).to(logits.device)
    confidence = logits.softmax(-1).gather(1, picked[:, None]).squeeze(1)
    # Where nothing but masks is seen all are equally sure, to rounding: then from left to right.
    confidence = confidence - _TIE * torch.arange(len(block), device=block.device)
    chosen = confidence.masked_fill(block != mask, -1.0).topk(count).indices
    block[chosen] = picked[chosen]
