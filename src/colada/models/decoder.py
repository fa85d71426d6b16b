"""A baseline as users see it: the interface of every language model, over a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from colada.errors import ColadaError, failure
from colada.generate.settings import RELEASED_SETTINGS, RequestSettings
from colada.generate.writer import Request, S, Slot, Writer
from colada.locate import DECODER_DIR
from colada.models.base import LanguageModel, require_kind
from colada.networks.decoder import Decoder
from colada.text.tokenizer import Tokenizer

_NAMES = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "whole_sentences", "end_ids")
DEFAULTS = {name: RELEASED_SETTINGS[name] for name in _NAMES}
"""Settings that both baselines have."""


class DecoderLM(LanguageModel):
    """A baseline, ready to use.

    Args:
        decoder: the network; its ``objective`` must be the class's ``arch``.
        tokenizer, origin, generation, chat_template: see :class:`LanguageModel`.

    Raises:
        ColadaError: if the parts do not fit each other.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        origin: str = "",
        generation: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        require_kind("decoder", decoder, Decoder)
        if decoder.config.objective != self.arch:
            raise ColadaError(f"objective={decoder.config.objective!r}, expected {self.arch!r}")
        self.decoder = decoder.eval()
        super().__init__(tokenizer, origin, generation, chat_template)

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return self.decoder.config.vocab_size

    @property
    def networks(self) -> dict[str, Any]:
        """The one network, by its folder."""
        return {DECODER_DIR: self.decoder}

    def _writer_for(self, requests: Sequence[Request], slots: int) -> Writer[Any]:
        rooms = sorted(map(self._room, requests), reverse=True)
        return self._writer(sum(rooms[:slots]), slots)

    def _room(self, request: Request) -> int:
        """Return how many tokens a request takes, with the one that every text of AR follows."""
        return len(request.ids) + request.new_tokens + (self.arch == "ar")

    def _request(
        self, ids: Sequence[int], max_new_tokens: int, settings: RequestSettings
    ) -> tuple[Request, int]:
        return Request(tuple(ids), max_new_tokens, settings), 0


class DecoderWriter(Writer[S]):
    """Writes for requests that share a decoder, as far as ``capacity`` tokens and ``slots`` go.

    Args:
        room: how many tokens a request takes.
        origin: what the model is called, for messages.
    """

    def __init__(
        self,
        decoder: Decoder,
        capacity: int,
        slots: int | None,
        room: Callable[[Request], int],
        origin: str,
    ) -> None:
        super().__init__(capacity, slots)
        self.decoder, self.origin, self._room = decoder, origin or "the model", room

    def room(self, request: Request) -> int:
        """Return how many tokens a request takes."""
        return self._room(request)

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self.decoder.wte.weight.device

    def admitted(self) -> list[Request]:
        """Take those out of the queue, in order, for whom there is room now."""
        requests: list[Request] = []
        free = self.capacity - sum(self.room(slot.request) for slot in self.under_way)
        while self.waiting and (self.slots is None or len(self.under_way) + len(requests) < self.slots):
            free -= self.room(self.waiting[0])
            if free < 0:
                break
            requests.append(self.waiting.popleft())
        return requests

    def fail(self, slot: Slot, error: Exception) -> None:
        """Note why one request of many gets no more tokens."""
        slot.error = slot.error or failure(self.origin, error)
