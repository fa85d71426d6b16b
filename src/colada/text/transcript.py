"""From finished blocks to text: end tokens, stop strings, exact lengths, and chunks as they become final."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from colada.errors import ColadaError
from colada.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

REPLACEMENT = "\ufffd"
_CONTEXT, _LONGEST_CONTEXT = 8, 64  # Tokens; a character has at most four.
_STOPPED = re.compile(
    r"""(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)[.!?…]+["'”’»)\]]*|[。！？]+[」』”’）]*"""
)
_WIDE = "。！？"  # After these there is no space.


@dataclass(frozen=True)
class Chunk:
    """What :meth:`ColaDLM.stream` yields.

    Attributes:
        index: which prompt.
        block: number of the block within this sample's generation, from 0.
        step: solver steps done when this is a guess of the block under way; None when the block is finished.
        text: finished: new text that will not change any more (empty while a stop string, a
            character or a sentence that may be left out is still under way); guess: the block's text as it
            would read now.
        tokens: the new tokens, or the guess's. A stop string that straddles blocks, or a sentence that is
            left out, takes tokens back that an earlier chunk had; texts always add up.
        finish_reason: "length", "end", "stop", "drawn" or "error" in a sample's last chunk, else None.
        error: why the sample failed.
        completion: in a sample's last chunk, all of it.
        steps: of a guess: solver steps that the block takes.
        confidence: how likely the model held each of ``tokens``: of guesses, and of finished blocks where
            that is asked for.
        latents: of a guess: the block's latents (block, C) after the step.
        picture: of a drawing, uint8 (S, S, 3): how it would look now, or looks.
    """

    index: int
    block: int
    step: int | None
    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None = None
    error: str | None = None
    completion: Completion | None = None
    steps: int | None = None
    confidence: tuple[float, ...] | None = None
    latents: Tensor | None = field(default=None, compare=False, repr=False)
    picture: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Completion:
    """A finished generation of one prompt.

    Attributes:
        text: what follows the prompt, without end tokens, cut before the stop string, or where its last
            sentence ends if so asked.
        tokens: its tokens, at most ``max_new_tokens``; the end token and what
            spells the stop string are left out.
        finish_reason: "length", "end" (an end token), "stop" (a stop string), "drawn" (a picture) or "error".
        seed: the sample's own seed.
        error: why the sample failed; its text is what was finished before.
        picture: of a drawing, uint8 (S, S, 3).
        latents: where they are asked for, float32 (M, C) on the CPU: of the prompt's whole blocks, and of
            each block as it was appended to the KV cache.
        ids: of those blocks, from where the prompt ends, with what follows an end token.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    seed: int
    error: str | None = None
    picture: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    latents: Tensor | None = field(default=None, compare=False, repr=False)
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


class GenerationError(ColadaError):
    """Some samples of a batch failed; the others finished.

    Attributes:
        completions: of every prompt in order, None where it failed.
        errors: why, by number.
    """

    def __init__(self, completions: Sequence[Completion | None], errors: Mapping[int, str]) -> None:
        which, why = min(errors.items())
        count = f"{len(errors)} of {len(completions)} samples failed"
        super().__init__(f"{count}, the first is number {which}: {why}")
        self.completions, self.errors = tuple(completions), dict(errors)


def completed(completions: Sequence[Completion]) -> list[Completion]:
    """Return completions, none of which failed. Raises GenerationError if some did."""
    errors = {number: done.error for number, done in enumerate(completions) if done.error is not None}
    if errors:
        raise GenerationError([None if done.error else done for done in completions], errors)
    return list(completions)


def in_order(chunks: Iterable[Chunk]) -> Iterator[Completion]:
    """Yield a stream's completions in the order of its requests, each once all before it are finished."""
    number, early = 0, dict[int, Completion]()
    for chunk in chunks:
        if chunk.completion is not None:
            early[chunk.index] = chunk.completion
        while number in early:
            yield early.pop(number)
            number += 1


def sentence_end(text: str, complete: bool) -> int:
    """Return where the last sentence of a text ends, 0 where none does.

    A sentence ends with its stop and the quotation marks that close after it, if what follows is a space and
    no small letter; titles have no such stop.

    Args:
        complete: nothing follows the text; else a stop at its very end may turn out to be none.
    """
    for stop in reversed(list(_STOPPED.finditer(text))):
        behind = text[stop.end() :]
        following = behind.lstrip()
        apart = stop[0][0] in _WIDE or (following != behind and not following[:1].islower())
        if (apart and following) or (complete and not following):
            return stop.end()
    return 0


class _Stop:
    """A stop string that is looked for in text as it comes (Knuth, Morris and Pratt's automaton).

    What it costs is linear in the text, and in the string once, however the text is cut.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._shorter = [0] * len(text)  # Of each prefix, the longest one that also ends it.
        size = 0
        for at in range(1, len(text)):
            size = self._shorter[at] = self._next(size, text[at])
        self.matched = 0
        """How many characters of it the text that is settled ends with."""

    def _next(self, size: int, character: str) -> int:
        while size and self.text[size] != character:
            size = self._shorter[size - 1]
        return size + (self.text[size] == character)

    def read(self, text: str) -> tuple[int, int | None]:
        """Return how many characters of it end the text so far and this, and where in this it first ends."""
        size = self.matched
        for at, character in enumerate(text, start=1):
            size = self._next(size, character)
            if size == len(self.text):
                return size, at
        return size, None


class Transcript:
    """Follows one sample's tokens, and decides what of its text is final and when it is done.

    Tokens are decoded after some of what stands before them: there are decoders that strip the space before
    a text's first word. Once it is certain how a token reads it is settled, and not decoded again.

    Args:
        tokenizer: None for a model without one; the text is then empty.
        skip: tokens of the first blocks that only repeat the prompt's tail.
        limit: how many tokens the user asked for.
        stop: stop strings.
        end_ids: tokens that end the text.
        before: ids that the text follows.
        whole_sentences: cut a text that comes to its limit back to the end of its last sentence, if it has
            one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        skip: int,
        limit: int,
        stop: Sequence[str],
        end_ids: Sequence[int],
        before: Sequence[int] = (),
        whole_sentences: bool = False,
    ) -> None:
        self._tokenizer, self.skip, self.limit = tokenizer, skip, limit
        self._whole_sentences = whole_sentences
        self._stops, self._end_ids = [_Stop(text) for text in stop], frozenset(end_ids)
        self._released = 0
        self._settled, self._before = "", self._context(before)
        self._open: list[int] = []  # Tokens that may still read in another way.
        self._settlements = [(0, 0, self._before)]  # Tokens and characters settled, and what stands before.
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None

    def add(self, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Take a block's ids; return the text that became final and the tokens that count."""
        count = len(self.tokens)
        for token in self._new(ids):
            if token in self._end_ids:
                self.finish_reason = "end"
                break
            self.tokens.append(token)
            self._open.append(token)
            if len(self.tokens) == self.limit:
                self.finish_reason = "length"
                break
        tail = self._decode(self._before, self._open)
        self.text = self._settled + tail
        firm = self._firm(tail)
        held = self._follow_stops(tail, firm)
        if self._whole_sentences and self.finish_reason == "length":
            self._cut(sentence_end(self.text, complete=True) or len(self.text), "length")
        final = len(self.text) - (0 if self.finish_reason else held)
        if self._whole_sentences and self.finish_reason is None:
            final = self._released + sentence_end(self.text[self._released : final], complete=False)
        text, self._released = self.text[self._released : final], max(self._released, final)
        if len(firm) == len(tail) and self.finish_reason is None:
            self._settle(tail)
        return text, tuple(self.tokens[count:])

    def guess(self, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Return how a guess of the coming block would read, up to an end token or the limit."""
        new = []
        for token in self._new(ids, peek=True)[: self.limit - len(self.tokens)]:
            if token in self._end_ids:
                break
            new.append(token)
        text = self._settled + self._decode(self._before, [*self._open, *new])
        return text[self._released :], tuple(new)

    def completion(self, seed: int, error: str | None = None) -> Completion:
        """Return all that was written."""
        reason = "error" if error is not None else self.finish_reason or "length"
        return Completion(self.text, tuple(self.tokens), reason, seed, error)

    def _new(self, ids: Sequence[int], peek: bool = False) -> Sequence[int]:
        """Return the ids that are not the prompt's."""
        skipped = min(self.skip, len(ids))
        if not peek:
            self.skip -= skipped
        return ids[skipped:]

    # --- how tokens read -------------------------------------------------------------------

    def _context(self, ids: Sequence[int]) -> list[int]:
        """Return the last of these ids, after which others read as after all of them, or none."""
        if self._tokenizer is None:
            return []
        size = _CONTEXT
        while size < min(len(ids), _LONGEST_CONTEXT) and not self._tokenizer.decode(ids[-size:]):
            size *= 2  # Special tokens, which have no text.
        context = list(ids[-size:])
        # After half a character, what follows is decoded by itself.
        return [] if self._tokenizer.decode(context).endswith(REPLACEMENT) else context

    def _decode(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of ids that stand after others."""
        if self._tokenizer is None:
            return ""
        prefix = self._tokenizer.decode(before) if before else ""
        text = self._tokenizer.decode([*before, *ids])
        return text[len(prefix) :] if text.startswith(prefix) else self._tokenizer.decode(ids)

    def _firm(self, tail: str) -> str:
        """Return what of the open tokens' text no later token changes."""
        text = tail.rstrip(REPLACEMENT)
        bytes_at_end = self._tokenizer.bytes_at_end(self._open) if self._tokenizer is not None else 0
        if bytes_at_end:
            other = self._decode(self._before, self._open[:-bytes_at_end])
            equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False))
            text = text[: sum(1 for _ in equal)]
        return text

    def _settle(self, tail: str) -> None:
        self._settled += tail
        for stop in self._stops:
            stop.matched, _ = stop.read(tail)
        self._before = self._context([*self._before, *self._open])
        self._open = []
        self._settlements.append((len(self.tokens), len(self._settled), self._before))

    # --- stop strings ----------------------------------------------------------------------

    def _follow_stops(self, tail: str, firm: str) -> int:
        """Cut the text where a stop string begins; else return how many last characters may still change."""
        starts, held = [], 0
        for stop in self._stops:
            size, end = stop.read(tail)
            if end is not None:
                starts.append(len(self._settled) + end - len(stop.text))
            if firm != tail:
                size = max(size, stop.read(firm)[0])
            held = max(held, size)
        if starts:
            self._cut(min(starts), "stop")
        return len(tail) - len(firm) + held

    def _cut(self, at: int, reason: str) -> None:
        self.text, self.finish_reason = self.text[:at], reason
        # The tokens kept are the longest run that spells nothing beyond the cut.
        count, characters, before = next(
            settled for settled in reversed(self._settlements) if settled[1] <= at
        )
        settled, whole_text = self.text[:characters], self.text
        while len(self.tokens) > count and not whole_text.startswith(
            settled + self._decode(before, self.tokens[count:])
        ):
            self.tokens.pop()
