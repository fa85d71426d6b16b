"""Texts in, chunks out: requests of their own settings that share an engine, joining and leaving it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Unpack

from colada.checks import is_whole, require_flag, require_function
from colada.errors import ColadaError, failure, shown
from colada.generate.engine.engine import Engine
from colada.generate.engine.request import Request, Slot
from colada.generate.reference import TransportStep
from colada.generate.settings import Prompt, Settings
from colada.text.transcript import Chunk, Completion, Transcript, completed

CANCELLED = "cancelled"
MOST_COMPLETIONS = 4096
"""Completions that a session keeps until they are asked for."""

Open = Callable[[Prompt, int, Settings], tuple[Request, Transcript]]
"""Checks a prompt, a number of tokens and settings, and makes of them what the engine takes."""


@dataclass(frozen=True)
class _Entry:
    """A request that is not finished, and what follows its tokens."""

    index: int
    request: Request
    transcript: Transcript
    guesses: bool


class Session:
    """Requests that are generated together as far as the engine has room.

    A request's result depends on its own prompt and settings, not on who shares the engine. One that fails
    ends with a chunk that says why. One that is finished is forgotten but for its completion.
    Made by :meth:`colada.models.cola.ColaDLM.session`.
    """

    def __init__(self, engine: Engine, open_request: Open) -> None:
        self.engine, self._open = engine, open_request
        self._submitted = 0
        self._entries: dict[int, _Entry] = {}  # By the request's identity: equal ones may be submitted twice.
        self._steps: Iterator[TransportStep] | None = None  # Of the round under way,
        self._step = 0  # of which so many are done.
        self._ready: deque[Slot] = deque()  # Whose new block, or error, has not been told.
        self._completions: dict[int, Completion] = {}
        self._dropped = 0

    def submit(
        self, prompt: Prompt, max_new_tokens: int = 64, *, guesses: bool = False, **settings: Unpack[Settings]
    ) -> int:
        """Ask for the continuation of a prompt; it joins at a block boundary, when there is room.

        Args:
            prompt, max_new_tokens, settings: as :meth:`colada.models.cola.ColaDLM.generate`, of one prompt.
            guesses: yield guesses of this one.

        Returns: the index that its chunks have.

        Raises:
            ColadaError: naming the argument at fault, or if it is larger than the whole history;
                the other requests are not affected.
        """
        guesses = require_flag("guesses", guesses)
        return self.add(*self._open(prompt, max_new_tokens, settings), guesses=guesses)

    def add(self, request: Request, transcript: Transcript, *, guesses: bool = False) -> int:
        """Submit a request that is already checked, with the transcript that follows its tokens."""
        if id(request) in self._entries:
            request = replace(request)
        self.engine.submit(request)
        index, self._submitted = self._submitted, self._submitted + 1
        self._entries[id(request)] = _Entry(index, request, transcript, guesses)
        return index

    def cancel(self, index: int) -> None:
        """Take a request back: no more chunks of it come, and from the next block on its room is free.

        Raises:
            ColadaError: for an index that :meth:`submit` did not return.
        """
        if not is_whole(index) or not 0 <= index < self._submitted:
            raise ColadaError(f"request {shown(index)}, expected one of the {self._submitted} submitted")
        for entry in list(self._entries.values()):
            if entry.index == index:
                self.engine.withdraw(entry.request)
                entry.transcript.finish_reason = CANCELLED
                self._forget(entry)

    def chunks(
        self, guesses: bool = False, callback: Callable[[TransportStep], None] | None = None
    ) -> Iterator[Chunk]:
        """Generate until no request is left, yielding as :meth:`colada.models.cola.ColaDLM.stream` does.

        Between chunks, requests may be submitted and cancelled. Whoever stops taking chunks and begins
        anew goes on where that was.

        Args:
            guesses: yield those of all requests.
            callback: sees the latents after every solver step.

        Raises:
            ColadaError: for a callback that cannot be called, or guesses that are neither True nor False.
        """
        require_function("callback", callback)
        return self._chunks(require_flag("guesses", guesses), callback)

    def _chunks(self, guesses: bool, callback: Callable[[TransportStep], None] | None) -> Iterator[Chunk]:
        while True:
            while self._ready:
                yield from self._told(self._ready.popleft())
            if self._steps is None:
                for slot in [own for own in self.engine.under_way if id(own.request) not in self._entries]:
                    self.engine.leave(slot)  # Cancelled.
                if not self.engine.busy:
                    return
                self._steps, self._step = self.engine.next_block(), 0
            step = self._next_step()
            if step is None:
                self._steps = None
                self._ready.extend(self.engine.news)
                continue
            self._step += 1
            if callback is not None:
                callback(step)
            yield from self._guesses(step, guesses)

    def _next_step(self) -> TransportStep | None:
        """Return the next solver step, or None at a block's end; what stops a block fails all its slots."""
        assert self._steps is not None
        try:
            return next(self._steps, None)
        except Exception as error:
            if not self.engine.under_way:  # Nobody to be told.
                self._steps = None
                raise
            for slot in self.engine.under_way:
                slot.error = slot.error or failure(f"block {slot.blocks} failed", error)
            return None
        except BaseException:  # An interrupt: the block is begun again.
            self._steps = None
            raise

    def _guesses(self, step: TransportStep, everyone: bool) -> Iterator[Chunk]:
        slots = [slot for slot in self.engine.under_way if not slot.done]
        entries = [self._entries.get(id(slot.request)) for slot in slots]
        steps = [slot.request.steps - slot.left + self._step for slot in slots]
        wanted = [
            entry is not None and (everyone or entry.guesses) and own <= slot.request.steps
            for slot, entry, own in zip(slots, entries, steps, strict=True)
        ]
        if not any(wanted):
            return
        spelled = self.engine.spell(step.z0, wanted)
        for slot, entry, ids, own, told in zip(slots, entries, spelled, steps, wanted, strict=True):
            if entry is None or not told or id(entry.request) not in self._entries:
                continue
            try:
                text, tokens = entry.transcript.guess(ids)
            except Exception:  # The block will fail for the same reason, and say so.
                continue
            yield Chunk(entry.index, slot.blocks, own, text, tokens)

    def _told(self, slot: Slot) -> Iterator[Chunk]:
        """Yield what a slot's new block adds; a slot that is finished leaves, and nothing of it is kept."""
        entry = self._entries.get(id(slot.request))
        if entry is None:  # Cancelled since.
            return
        text, error, block = "", slot.error, slot.blocks - (slot.error is None)
        tokens: tuple[int, ...] = ()
        if error is None:
            assert slot.block is not None
            try:
                text, tokens = entry.transcript.add(slot.block.ids)
            except Exception as cause:  # Its own: the others have their text.
                error = slot.error = failure(f"block {block} cannot be read", cause)
        reason = entry.transcript.finish_reason
        if error is not None:
            reason = entry.transcript.finish_reason = "error"
        if reason is None:
            yield Chunk(entry.index, block, None, text, tokens)
            return
        self.engine.leave(slot)
        done = self._forget(entry, None if error is None else str(error))
        yield Chunk(entry.index, block, None, text, tokens, reason, done.error, done)

    def _forget(self, entry: _Entry, error: str | None = None) -> Completion:
        """Keep of a request that is finished what it came to, and return that."""
        del self._entries[id(entry.request)]
        done = entry.transcript.completion(entry.request.seed, error)
        self._completions[entry.index] = done
        if len(self._completions) > MOST_COMPLETIONS:
            del self._completions[next(iter(self._completions))]
            self._dropped += 1
        return done

    def completions(self) -> list[Completion]:
        """Return the completions of the requests finished since the last call, in the order of submission.

        They are then forgotten. Whoever takes each last chunk's own ``completion`` need not call this.

        Raises:
            GenerationError: if some failed.
            ColadaError: if more than :data:`MOST_COMPLETIONS` have finished, so that some are not kept.
        """
        done = [self._completions[index] for index in sorted(self._completions)]
        dropped, self._dropped = self._dropped, 0
        self._completions.clear()
        if dropped:
            count = len(done) + dropped
            raise ColadaError(
                f"{count} completions, expected at most {MOST_COMPLETIONS}: take those of the chunks"
            )
        return completed(done)
