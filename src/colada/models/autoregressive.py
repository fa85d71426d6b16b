"""Autoregressive generation, token by token, with keys and values in memory made once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from colada.device import require_memory, undisturbed
from colada.generate.noise import block_generator
from colada.generate.reference import TransportStep
from colada.generate.sampling import confidence, pick
from colada.generate.writer import Slot
from colada.models.decoder import DEFAULTS, DecoderLM, DecoderWriter
from colada.networks.decoder import Decoder
from colada.networks.layers import attend
from colada.networks.packing import Layout


class BatchCache:
    """Keys and values of a batch, (layers, B, positions, K, D) each, and the pass that uses them.

    A pass is either the prompts', packed, or one new token of every sample.
    """

    def __init__(self, decoder: Decoder, batch: int, positions: int) -> None:
        config, weight = decoder.config, decoder.wte.weight
        shape = (config.num_layers, batch, positions, config.num_heads, config.dim // config.num_heads)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self._decoder = decoder
        self._layout: Layout | None = None
        self._where: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._seen = 0
        self._mask: Tensor | None = None
        self.table: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    @staticmethod
    def size(decoder: Decoder, batch: int, positions: int) -> int:
        """Return the bytes that keys and values take."""
        return batch * positions * decoder.config.cache_numbers * decoder.wte.weight.element_size()

    def prompts(self, lengths: Sequence[int]) -> BatchCache:
        """Become the pass of packed prompts of these lengths."""
        device = self.keys.device
        self._layout = Layout(lengths, 1, device=device)
        sample = torch.arange(len(lengths), device=device)
        rows = sample.repeat_interleave(torch.tensor(lengths, device=device))
        self._where = rows, self._layout.positions
        self.table = self._decoder.table(self._layout.positions)
        return self

    def token(self, positions: Sequence[int]) -> BatchCache:
        """Become the pass of one token of every sample, at these positions."""
        device = self.keys.device
        at = torch.tensor(positions, device=device)
        self._layout, self._where = None, (torch.arange(len(positions), device=device), at)
        self._seen = max(positions) + 1
        self._mask = None
        if min(positions) != max(positions):
            self._mask = (torch.arange(self._seen, device=device) <= at[:, None])[:, None, None]
        self.table = self._decoder.table(at)
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Keep keys and values (N, K, D), and attend; see :class:`colada.networks.layers.Shared`."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self._where], values[self._where] = k, v
        if self._layout is not None:
            return attend(q, k, v, self._layout)
        k, v = keys[:, : self._seen].transpose(1, 2), values[:, : self._seen].transpose(1, 2)
        out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=self._mask)
        return out.squeeze(2)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these samples of the batch alone."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys.index_select(1, index), self.values.index_select(1, index)

    def join(self, other: BatchCache) -> None:
        """Go on with the samples of another one behind these."""
        positions = max(self.keys.shape[2], other.keys.shape[2])

        def joined(first: Tensor, second: Tensor) -> Tensor:
            padded = (F.pad(part, (0, 0, 0, 0, 0, positions - part.shape[2])) for part in (first, second))
            return torch.cat(list(padded), 1)

        self.keys, self.values = joined(self.keys, other.keys), joined(self.values, other.values)


class TokenWriter(DecoderWriter[Slot]):
    """Writes a token of every request a round; prompts of those who join are read before.

    Args: as :class:`DecoderWriter`.
    """

    def __init__(self, decoder: Decoder, *args: Any) -> None:
        super().__init__(decoder, *args)
        size = BatchCache.size(decoder, 1, self.capacity)
        require_memory(size, self.device, f"a KV cache of {self.capacity} tokens")
        self._rows: list[Slot] = []  # Of the cache.
        self._cache = BatchCache(decoder, 0, 0)

    @undisturbed
    def next_block(self) -> Iterator[TransportStep]:
        """Write a token of everyone; there are no solver steps."""
        hidden = [self._go_on(), *self._join()]
        logits = self.decoder.logits(torch.cat(hidden)) if self._rows else torch.empty(0)
        greedy = logits.argmax(-1).tolist() if bool(logits.isfinite().all()) else None
        for row, slot in enumerate(self._rows):
            settings = slot.request.settings
            token = None
            if settings.temperature == 0 and settings.repetition_penalty == 1 and greedy is not None:
                token = torch.tensor([greedy[row]])
            try:
                if token is None:
                    generator = block_generator(settings.seed, slot.blocks, 1)
                    token = pick(logits[row : row + 1], settings, slot.seen, generator)
            except Exception as error:  # Its own: the others have their tokens.
                self.fail(slot, error)
                continue
            sure = confidence(logits[row : row + 1], token) if slot.request.confidence else None
            slot.take(token.tolist(), sure)
        yield from ()

    def _go_on(self) -> Tensor:
        """Read the last token of everyone under way; return the hidden states (B, dim) after it."""
        rows = [row for row, slot in enumerate(self._rows) if slot in self.under_way]
        if not rows:
            self._rows, self._cache = [], BatchCache(self.decoder, 0, 0)
            return self.decoder.wte.weight.new_empty(0, self.decoder.config.dim)
        if len(rows) < len(self._rows):
            self._cache.keep(rows)
            self._rows = [self._rows[row] for row in rows]
        tokens = torch.tensor([slot.ids[0] for slot in self._rows], device=self.device)
        positions = [len(slot.request.ids) + slot.blocks for slot in self._rows]
        return self.decoder.run(tokens, self._cache.token(positions))

    def _join(self) -> list[Tensor]:
        """Read the prompts of those who join; return the hidden states (B, dim) at their ends, or nothing."""
        new = [Slot(request) for request in self.admitted()]
        if not new:
            return []
        self.under_way += new
        try:
            return [self._read(new)]
        except Exception as error:  # Nothing of those under way is touched.
            for slot in new:
                self.fail(slot, error)
            return []

    def _read(self, new: Sequence[Slot]) -> Tensor:
        """Read prompts into the cache; return the hidden states (B, dim) at their ends."""
        texts = [[self.decoder.config.bos_token_id, *slot.request.ids] for slot in new]
        lengths, positions = [len(ids) for ids in texts], max(self.room(slot.request) for slot in new)
        size = BatchCache.size(self.decoder, len(new), positions)
        require_memory(size, self.device, f"a cache of {len(new)} x {positions} tokens")
        cache = BatchCache(self.decoder, len(new), positions)
        packed = torch.tensor([token for ids in texts for token in ids], device=self.device)
        hidden = self.decoder.run(packed, cache.prompts(lengths))
        self._cache.join(cache)
        self._rows += new
        return hidden[torch.tensor(lengths, device=self.device).cumsum(0) - 1]


class AutoregressiveLM(DecoderLM):
    """A decoder that writes token by token; every text follows ``bos_token_id``."""

    arch = "ar"
    defaults = DEFAULTS

    def _writer(self, capacity: int, slots: int | None) -> TokenWriter:
        return TokenWriter(self.decoder, capacity, slots, self._room, self.origin)
