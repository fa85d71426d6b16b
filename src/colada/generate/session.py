"""Texts in, chunks out: requests of their own settings that share an engine, joining and leaving it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from colada.checks import is_whole, require_flag, require_function
from colada.errors import ColadaError, failure, shown
from colada.generate.canvas import Canvas
from colada.generate.reference import TransportStep
from colada.generate.settings import Prompt, Settings
from colada.generate.writer import Request, Slot, Writer
from colada.text.transcript import Chunk, Completion, Transcript, completed

Open = Callable[[Prompt, int, Settings, Prompt | None], tuple[Request, Transcript]]
"""Checks a prompt, a number of tokens, settings and a suffix, and makes of them what a writer takes."""


@dataclass(frozen=True)
class _Entry:
    """A request that is not finished, the transcript that follows its tokens, and if its guesses are told.

    Of one that asks for its latents, those so far, and the ids of their blocks from where the prompt ends.
    """

    index: int
    request: Request
    transcript: Transcript | Canvas
    guesses: bool
    latents: list[Tensor] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def completion(self, error: ColadaError | None) -> Completion:
        """Return all that was written."""
        seed, why = self.request.settings.seed, None if error is None else str(error)
        completion = self.transcript.completion(seed, why)
        if self.latents:
            completion = replace(completion, latents=torch.cat(self.latents), ids=tuple(self.ids))
        return completion


class Session:
    """Requests that are generated together as far as the engine has room; made by ``model.session()``.

    A request's result depends on its own prompt and settings, not on who shares the engine. One that fails
    ends with a chunk that says why, and the others go on. One that is finished or cancelled is forgotten: its
    last chunk has its completion, and nobody else.

    One thread at a time drives a session, and whoever drives it decides when::

        first = session.submit("Once upon a time", 200, seed=1)
        while session.busy:
            for chunk in session.step():
                ...                                  # submit and cancel in between, as you like

    Attributes:
        submitted: how many requests, so far.
        failed: how many rounds have ended all who were in them.
    """

    def __init__(
        self, engine: Writer[Any], open_request: Open, at_end: Callable[[Any], None] | None = None
    ) -> None:
        self.engine, self._open, self._at_end = engine, open_request, at_end
        self.submitted = self.failed = 0
        self._entries: dict[int, _Entry] = {}  # By the request's identity: equal ones may be submitted twice.
        self._round: Iterator[TransportStep] | None = None  # The one under way.
        self._pending: deque[Chunk] = deque()  # Of the last step, not yet taken from chunks().

    def submit(
        self,
        prompt: Prompt,
        max_new_tokens: int = 64,
        *,
        suffix: Prompt | None = None,
        guesses: bool = False,
        confidence: bool = False,
        **settings: Unpack[Settings],
    ) -> int:
        """Ask for the continuation of a prompt; it joins at a block boundary, when there is room.

        Args:
            prompt, max_new_tokens, settings: of one prompt, else as
                :meth:`colada.models.base.LanguageModel.generate`.
            suffix: fill a hole of exactly ``max_new_tokens`` tokens between the prompt and this, as
                :meth:`colada.models.cola.ColaDLM.infill`; of models that can.
            guesses: after every solver step, a chunk says how the block under way would read now.
            confidence: finished chunks say how likely the model held each token, as guesses always do.

        Returns: the number that its chunks have as ``index``: 0, 1, 2 and so on.

        Raises:
            ColadaError: naming the argument at fault, or if it is larger than the whole KV cache;
                the other requests are not affected.
        """
        guesses, confidence = require_flag("guesses", guesses), require_flag("confidence", confidence)
        request, transcript = self._open(prompt, max_new_tokens, settings, suffix)
        return self.add(replace(request, confidence=confidence), transcript, guesses)

    def add(self, request: Request, transcript: Transcript | Canvas, guesses: bool = False) -> int:
        """Submit a request that is already checked, with the transcript that follows its tokens."""
        if id(request) in self._entries:
            request = replace(request)
        self.engine.submit(request)
        index, self.submitted = self.submitted, self.submitted + 1
        self._entries[id(request)] = _Entry(index, request, transcript, guesses)
        return index

    def cancel(self, index: int) -> None:
        """Take a request back: no chunk of it comes any more, and from the next block on its room is free.

        One that is finished or cancelled already is no error.

        Raises:
            ColadaError: for an index that :meth:`submit` did not return.
        """
        if not is_whole(index) or not 0 <= index < self.submitted:
            raise ColadaError(f"request {shown(index)}, expected one of the {self.submitted} submitted")
        self._pending = deque(chunk for chunk in self._pending if chunk.index != index)
        for entry in list(self._entries.values()):
            if entry.index == index:
                self.engine.withdraw(entry.request)
                del self._entries[id(entry.request)]
        if not self._entries:  # Nobody waits for the round's end.
            self._round = None
            self._dismiss()

    def waiting(self) -> Iterator[int]:
        """Yield the numbers of the requests that have not begun, in the order in which they will."""
        for request in list(self.engine.waiting):
            if (entry := self._entries.get(id(request))) is not None:
                yield entry.index

    def _dismiss(self) -> None:
        """Let those leave the engine who are cancelled."""
        for slot in [slot for slot in self.engine.under_way if id(slot.request) not in self._entries]:
            self.engine.leave(slot)

    @property
    def busy(self) -> bool:
        """Whether a further :meth:`step` has something to do."""
        return bool(self._entries)

    def step(self, callback: Callable[[TransportStep], None] | None = None) -> list[Chunk]:
        """Do the next piece of work, and return the chunks that are new; most calls bring none.

        A piece is one solver step of all who are under way, or the end of a round, where blocks are decoded
        and tell their texts; with baselines a round is one piece: a token of AR, a block of LLaDA. When the
        next round begins, requests that wait join, and those cancelled leave. Where nobody is left, nothing
        is done.

        What fails for one request alone ends that one with an ``error`` chunk. What fails a round, as memory
        that runs out, ends all who were in it, and those who wait go on.

        Args:
            callback: sees the latents of all who are under way, in a solver step.

        Raises:
            Exception: what went wrong where no request is there to be told.
        """
        if self._round is None:
            self._dismiss()
            if not self.engine.busy:
                return []
            self._round = self.engine.next_block()
        step = self._next_step(self._round)
        if step is None:
            self._round = None
            return [chunk for slot in list(self.engine.news) for chunk in self._finished(slot)]
        if callback is not None:
            callback(step)
        return self._guesses(step)

    def _next_step(self, steps: Iterator[TransportStep]) -> TransportStep | None:
        """Return a round's next solver step, or None at its end; what stops it fails all its slots."""
        try:
            return next(steps, None)
        except BaseException as error:
            self._round = None  # After an interrupt, the block is begun again.
            if not isinstance(error, Exception) or not self.engine.under_way:  # Nobody to be told.
                raise
            self.failed += 1
            for slot in self.engine.under_way:
                slot.error = slot.error or failure(f"block {slot.blocks} failed", error)
            return None

    def chunks(self, callback: Callable[[TransportStep], None] | None = None) -> Iterator[Chunk]:
        """Yield the chunks of one :meth:`step` after the other until no request is left.

        Between chunks, requests may be submitted and cancelled. Whoever stops taking chunks and begins anew
        goes on where that was.

        Raises:
            ColadaError: for a callback that cannot be called.
        """
        require_function("callback", callback)

        def take() -> Iterator[Chunk]:
            while self._pending or self.busy:
                if self._pending:
                    yield self._pending.popleft()
                else:
                    self._pending.extend(self.step(callback))
            if self._at_end is not None:
                self._at_end(self.engine)

        return take()

    def completions(
        self,
        callback: Callable[[TransportStep], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Return the completions of all that were submitted, in order; ``progress`` is told after each.

        Raises:
            ColadaError: for a callback that cannot be called.
            GenerationError: if some failed; it carries the completions of the others.
        """
        require_function("progress", progress)
        done = dict[int, Completion]()
        for chunk in self.chunks(callback):
            if chunk.completion is not None:
                done[chunk.index] = chunk.completion
                if progress is not None:
                    progress(len(done), self.submitted)
        return completed([done[index] for index in range(self.submitted)])

    def _guesses(self, step: TransportStep) -> list[Chunk]:
        """Return how the blocks under way would read now, of those who ask."""
        watched = {
            slot: entry
            for slot in self.engine.under_way
            if (entry := self._entries.get(id(slot.request))) is not None and entry.guesses
        }
        chunks = []
        for slot, guess in (self.engine.guesses(step, watched) if watched else {}).items():
            transcript, skipped = watched[slot].transcript, watched[slot].transcript.skip
            try:
                text, tokens = transcript.guess(guess.ids)
                picture = transcript.look(guess.z0) if isinstance(transcript, Canvas) else None
            except Exception:  # The block will fail for the same reason, and say so.
                continue
            confidence = guess.confidence[skipped : skipped + len(tokens)]
            chunks.append(
                Chunk(
                    watched[slot].index,
                    slot.blocks,
                    guess.step,
                    text,
                    tokens,
                    steps=guess.steps,
                    confidence=confidence,
                    latents=guess.latents,
                    picture=picture,
                )
            )
        return chunks

    def _finished(self, slot: Slot) -> Iterator[Chunk]:
        """Yield what a slot's new block adds; a slot that is finished leaves, and nothing of it is kept."""
        entry = self._entries.get(id(slot.request))
        if entry is None:  # Cancelled since.
            return
        transcript, error, block = entry.transcript, slot.error, slot.blocks - (slot.error is None)
        text, tokens, confidence = "", tuple[int, ...](), None
        if error is None:
            skipped = transcript.skip
            try:
                text, tokens = transcript.add(slot.ids)
                if isinstance(transcript, Canvas):
                    transcript.finish(slot.drawn)
                elif entry.request.latents and (latents := slot.written) is not None:
                    entry.latents.append(latents.float().cpu())
                    entry.ids.extend(slot.ids[skipped:])
            except Exception as cause:  # Its own: the others have their text.
                error = slot.error = failure(f"block {block} cannot be read", cause)
            if slot.confidence is not None:
                confidence = slot.confidence[skipped : skipped + len(tokens)]
        if error is not None:
            transcript.finish_reason = "error"
        completion = None
        if transcript.finish_reason is not None:
            self.engine.leave(slot)
            del self._entries[id(entry.request)]
            completion = entry.completion(error)
        yield Chunk(
            entry.index,
            block,
            None,
            text,
            tokens,
            transcript.finish_reason,
            None if error is None else str(error),
            completion,
            confidence=confidence,
            picture=transcript.picture if isinstance(transcript, Canvas) else None,
        )
