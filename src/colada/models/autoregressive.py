"""Autoregressive generation, token by token, with keys and values in memory made once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from colada.device import require_memory, undisturbed
from colada.errors import ColadaError
from colada.generate.reference import block_generator
from colada.generate.sampling import Sampling
from colada.models.decoder import DEFAULTS, DecoderLM, Writing
from colada.networks.decoder import Decoder
from colada.networks.layers import attend
from colada.networks.packing import Layout
from colada.text.transcript import Chunk


class KeyValueCache:
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
        width = decoder.config.num_layers * decoder.config.dim
        return 2 * batch * positions * width * decoder.wte.weight.element_size()

    def prompts(self, lengths: Sequence[int]) -> KeyValueCache:
        """Become the pass of packed prompts of these lengths."""
        device = self.keys.device
        self._layout = Layout(lengths, 1, device=device)
        sample = torch.arange(len(lengths), device=device)
        rows = sample.repeat_interleave(torch.tensor(lengths, device=device))
        self._where = rows, self._layout.positions
        self.table = self._decoder.table(self._layout.positions)
        return self

    def token(self, positions: Sequence[int]) -> KeyValueCache:
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


class AutoregressiveLM(DecoderLM):
    """A decoder that writes token by token; every text follows ``bos_token_id``."""

    arch = "ar"
    defaults = DEFAULTS

    @undisturbed
    def _run(self, writing: Writing) -> Iterator[Chunk]:
        transcripts, seeds, sampling = writing.transcripts, writing.seeds, writing.sampling
        given = [[self.decoder.config.bos_token_id, *ids] for ids in writing.prompts]
        lengths = [len(ids) for ids in given]
        positions = max(lengths) + transcripts[0].limit
        size = KeyValueCache.size(self.decoder, len(given), positions)
        require_memory(size, self.device, f"a cache of {len(given)} x {positions} tokens")
        cache = KeyValueCache(self.decoder, len(given), positions)
        packed = torch.tensor([token for ids in given for token in ids], device=self.device)
        hidden = self.decoder.run(packed, cache.prompts(lengths))
        hidden = hidden[torch.tensor(lengths, device=self.device).cumsum(0) - 1]
        active, seen = list(range(len(given))), [set[int]() for _ in given]
        step = 0
        while True:
            picked = self._pick(self.decoder.logits(hidden), active, seen, sampling, seeds, step)
            ids = [token if isinstance(token, int) else 0 for token in picked]
            for index, token in zip(active, picked, strict=True):
                if isinstance(token, int):
                    seen[index].add(token)
                    yield writing.chunk(index, step, [token])
                else:
                    yield writing.chunk(index, step, [], token)
            rows = [row for row, own in enumerate(active) if transcripts[own].finish_reason is None]
            if not rows:
                return
            if len(rows) < len(active):
                active, ids = [active[row] for row in rows], [ids[row] for row in rows]
                cache.keep(rows)
            new = torch.tensor(ids, device=self.device)
            hidden = self.decoder.run(new, cache.token([lengths[own] + step for own in active]))
            step += 1

    def _pick(
        self,
        logits: Tensor,
        active: Sequence[int],
        seen: Sequence[set[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        step: int,
    ) -> list[int | ColadaError]:
        """Return one token for each row of logits (B, V), or why there is none."""
        greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
        if greedy and bool(logits.isfinite().all()):
            ids: list[int | ColadaError] = logits.argmax(-1).tolist()
            return ids
        picked: list[int | ColadaError] = []
        for index, own in zip(active, logits, strict=True):
            try:
                generator = block_generator(seeds[index], step, 1)
                picked.append(int(sampling.pick(own[None], seen[index], generator)))
            except Exception as error:  # Its own: the others have their tokens.
                picked.append(self._fault(error))
        return picked
