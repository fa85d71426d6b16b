"""LLaDA: the decoder with full visibility, masked tokens filled in a few at a time, likeliest first.

*Large Language Diffusion Models* (arXiv 2502.09992): low-confidence remasking within blocks that are decoded
from left to right (semi-autoregressive), by default in as many steps as tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from colada.device import require_memory, undisturbed
from colada.errors import ColadaError
from colada.generate.noise import block_generator
from colada.generate.reference import TransportStep
from colada.generate.sampling import pick
from colada.generate.settings import RequestSettings
from colada.generate.writer import Request, Slot
from colada.models.decoder import DEFAULTS, DecoderLM, DecoderWriter
from colada.networks.decoder import Decoder

ACTIVATIONS = 6
"""Vectors of either width that a pass holds at once for a token."""
_TIE = 1e-5  # of probability: what a place further right counts less


@dataclass(eq=False, kw_only=True)
class MaskSlot(Slot):
    """A request under way: its ids (L,), the prompt's and those to come, which are masks."""

    row: Tensor


class MaskWriter(DecoderWriter[MaskSlot]):
    """Writes a block of every request a round.

    Args: as :class:`DecoderWriter`.
    """

    def __init__(self, decoder: Decoder, *args: Any) -> None:
        super().__init__(decoder, *args)
        config = decoder.config
        widths = ACTIVATIONS * (config.dim + config.ffn_dim) * decoder.wte.weight.element_size()
        require_memory(self.capacity * widths, self.device, f"passes over {self.capacity} tokens")

    @undisturbed
    def next_block(self) -> Iterator[TransportStep]:
        """Write a block of everyone, filling some of its masks a pass; there are no solver steps."""
        mask, size = self.decoder.config.mask_id, self.decoder.config.block_size
        for request in self.admitted():
            row = torch.tensor([*request.ids, *[mask] * request.new_tokens], device=self.device)
            self.under_way.append(MaskSlot(request, row=row))
        blocks = {
            slot: slot.row[len(slot.request.ids) + slot.blocks * size :][:size] for slot in self.under_way
        }
        schedules = {
            slot: transfers(len(block), min(slot.request.settings.steps, len(block)))
            for slot, block in blocks.items()
        }
        sure: dict[MaskSlot, Tensor] = {}
        for step in range(max(map(len, schedules.values()), default=0)):
            going = [slot for slot in self.under_way if step < len(schedules[slot])]
            logits = self._logits(going, [len(blocks[slot]) for slot in going])
            for slot, slot_logits in zip(going, logits, strict=True):
                settings, block = slot.request.settings, blocks[slot]
                generator = block_generator(settings.seed, slot.blocks * size + step, 1)
                try:
                    where, shares = fill(
                        block, slot_logits, mask, schedules[slot][step], settings, slot.seen, generator
                    )
                except Exception as error:  # Its own: the others have their tokens.
                    self.fail(slot, error)
                    continue
                sure.setdefault(slot, torch.zeros(len(block), device=self.device))[where] = shares
        for slot, block in blocks.items():
            if slot.error is None:
                slot.take(block.tolist(), tuple(sure[slot].tolist()) if slot.request.confidence else None)
        yield from ()

    def _logits(self, slots: Sequence[MaskSlot], lengths: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the logits (length, V) of each one's coming block."""
        size, rows = self.decoder.config.block_size, [slot.row for slot in slots]
        where, first = list[int](), 0
        for slot, length in zip(slots, lengths, strict=True):
            begin = first + len(slot.request.ids) + slot.blocks * size
            where += range(begin, begin + length)
            first += len(slot.row)
        layout = self.decoder.layout([len(row) for row in rows])
        return self.decoder(torch.cat(rows), layout, torch.tensor(where, device=self.device)).split(
            list(lengths)
        )


class MaskedLM(DecoderLM):
    """A masked diffusion model that writes: prompt, then masks for all new tokens, filled block by block.

    The setting ``steps`` is passes a block; as many as a block has tokens by default.
    """

    arch = "llada"
    defaults: ClassVar[Mapping[str, Any]] = {**DEFAULTS, "steps": None}

    def _writer(self, capacity: int, slots: int | None) -> MaskWriter:
        return MaskWriter(self.decoder, capacity, slots, self._room, self.origin)

    def _request(
        self, ids: Sequence[int], max_new_tokens: int, settings: RequestSettings
    ) -> tuple[Request, int]:
        size = self.decoder.config.block_size
        steps = size if settings.steps is None else settings.steps
        if steps > size:
            raise ColadaError(f"steps={steps}, expected at most the {size} tokens of a block")
        return super()._request(ids, max_new_tokens, replace(settings, steps=steps))


def transfers(tokens: int, steps: int) -> list[int]:
    """Return how many tokens each step fills: as even as can be, the larger ones first."""
    each, more = divmod(tokens, steps)
    return [each + (step < more) for step in range(steps)]


def fill(
    block: Tensor,
    logits: Tensor,
    mask: int,
    count: int,
    settings: RequestSettings,
    seen: set[int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Fill the ``count`` masked tokens of a block that the model is surest of, in place.

    Args:
        block: (L,) ids, some of them masked; at least ``count``.
        logits: (L, V).
        settings: how each token is picked; how sure the model is of it is its probability untempered.
        seen: ids of earlier blocks, to be penalised.

    Returns: where it filled (count,), and how likely the model holds what is there now.
    """
    picked = pick(logits, settings, seen, generator).to(logits.device)
    shares = logits.float().softmax(-1).gather(1, picked[:, None]).squeeze(1)
    # Where nothing but masks is seen all are equally sure, to rounding: then from left to right.
    ranks = shares - _TIE * torch.arange(len(block), device=block.device)
    chosen = ranks.masked_fill(block != mask, -1.0).topk(count).indices
    block[chosen] = picked[chosen]
    return chosen, shares[chosen]
