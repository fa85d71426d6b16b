"""Texts in, chunks out: requests of their own settings that share an engine, joining and leaving it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Unpack

from colada.engine.engine import Engine
from colada.engine.request import Request, Slot
from colada.errors import ColadaError
from colada.generation import TransportStep
from colada.settings import Prompt, Settings
from colada.streaming import Chunk, Completion, GenerationError, Transcript

CANCELLED = "cancelled"

Open = Callable[[Prompt, int, Settings], tuple[Request, Transcript]]
"""Checks a prompt, a number of tokens and settings, and makes of them what the engine takes."""


class Session:
    """Requests that are generated together as far as the engine has room.

    A request's result depends on its own prompt and settings, not on who shares the engine.
    Made by :meth:`colada.model.ColaDLM.session`.
    """

    def __init__(self, engine: Engine, open_request: Open) -> None:
        self.engine, self._open = engine, open_request
        self._requests: list[Request] = []
        self._transcripts: list[Transcript] = []
        self._errors: dict[int, str] = {}
        self._index: dict[int, int] = {}  # of a request, by identity: equal ones may be submitted twice

    def submit(self, prompt: Prompt, max_new_tokens: int = 64, **settings: Unpack[Settings]) -> int:
        """Ask for the continuation of a prompt; it joins at a block boundary, when there is room.

        Args:
            prompt, max_new_tokens, settings: as :meth:`colada.model.ColaDLM.generate`, of one prompt.

        Returns: the index that its chunks have.

        Raises:
            ColadaError: naming the argument at fault, or if it is larger than the whole history;
                the other requests are not affected.
        """
        return self.add(*self._open(prompt, max_new_tokens, settings))

    def add(self, request: Request, transcript: Transcript) -> int:
        """Submit a request that is already checked, with the transcript that follows its tokens."""
        self.engine.submit(request)
        self._index[id(request)] = len(self._requests)
        self._requests.append(request)
        self._transcripts.append(transcript)
        return len(self._requests) - 1

    def cancel(self, index: int) -> None:
        """Take a request back: no more chunks of it come, and from the next block on its room is free.

        Raises:
            ColadaError: for an index that :meth:`submit` did not return.
        """
        if not 0 <= index < len(self._requests):
            raise ColadaError(f"request {index}, expected one of the {len(self._requests)} submitted")
        self.engine.withdraw(self._requests[index])
        self._transcripts[index].finish_reason = self._transcripts[index].finish_reason or CANCELLED

    def chunks(
        self, guesses: bool = False, callback: Callable[[TransportStep], None] | None = None
    ) -> Iterator[Chunk]:
        """Generate until no request is left, yielding as :meth:`colada.model.ColaDLM.stream` does.

        Between chunks, requests may be submitted and cancelled.
        """
        while True:
            for slot in list(self.engine.under_way):
                if self._transcript(slot).finish_reason == CANCELLED:
                    self.engine.leave(slot)
            if not self.engine.busy:
                return
            for step in self.engine.next_block():
                if callback is not None:
                    callback(step)
                if guesses:
                    yield from self._guesses(step)
            for slot in list(self.engine.under_way):
                if self._transcript(slot).finish_reason is None:
                    yield self._chunk(slot)

    def _transcript(self, slot: Slot) -> Transcript:
        return self._transcripts[self._index[id(slot.request)]]

    def _guesses(self, step: TransportStep) -> Iterator[Chunk]:
        slots = list(self.engine.under_way)
        for slot, ids in zip(slots, self.engine.spell(step.z0), strict=True):
            if self._transcript(slot).finish_reason is None:
                text, tokens = self._transcript(slot).guess(ids)
                yield Chunk(self._index[id(slot.request)], slot.blocks, step.step, text, tokens)

    def _chunk(self, slot: Slot) -> Chunk:
        """Return what a slot's new block adds; a slot that is finished leaves."""
        index, transcript = self._index[id(slot.request)], self._transcript(slot)
        if slot.error is not None:
            self.engine.leave(slot)
            self._errors[index] = str(slot.error)
            transcript.finish_reason = "error"
            return Chunk(index, slot.blocks, None, "", (), "error", str(slot.error))
        assert slot.block is not None
        text, tokens = transcript.add(slot.block.ids)
        if transcript.finish_reason is not None:
            self.engine.leave(slot)
        return Chunk(index, slot.blocks - 1, None, text, tokens, transcript.finish_reason)

    def completions(self) -> list[Completion]:
        """Return the completions of all requests, in the order in which they were submitted.

        Raises:
            GenerationError: if some failed.
        """
        made = [
            Completion(own.text, tuple(own.tokens), own.finish_reason or "length", request.seed)
            for own, request in zip(self._transcripts, self._requests, strict=True)
        ]
        if self._errors:
            done = [None if number in self._errors else one for number, one in enumerate(made)]
            raise GenerationError(done, self._errors)
        return made
