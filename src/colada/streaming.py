"""From finished blocks to text: end tokens, stop strings, exact lengths, and chunks as they become final."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from colada.errors import ColadaError
from colada.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Chunk:
    """What :meth:`ColaDLM.stream` yields.

    Attributes:
        index: which prompt.
        block: number of the block within this sample's generation, from 0.
        step: solver steps done when this is a guess of the block under way; None when the block is finished.
        text: finished: new text that will not change any more (empty while a stop string or a
            character may still be under way); guess: the block's text as it would read now.
        tokens: the new tokens, or the guess's. A stop string that straddles blocks takes tokens back
            that an earlier chunk had; texts always add up.
        finish_reason: "length", "end", "stop" or "error" in a sample's last chunk, else None.
        error: why the sample failed.
    """

    index: int
    block: int
    step: int | None
    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """A finished generation of one prompt.

    Attributes:
        text: what follows the prompt, without end tokens, cut before the stop string.
        tokens: its tokens, at most ``max_new_tokens``; the end token and what
            spells the stop string are left out.
        finish_reason: "length", "end" (an end token), "stop" (a stop string), or "error".
        seed: the sample's own seed.
        error: why the sample failed; its text is what was finished before.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    seed: int
    error: str | None = None


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


class Transcript:
    """Follows one sample's tokens, and decides what of its text is final and when it is done.

    Args:
        tokenizer: None for a model without one; the text is then empty.
        skip: tokens of the first blocks that only repeat the prompt's tail.
        limit: how many tokens the user asked for.
        stop: stop strings.
        end_ids: tokens that end the text.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, skip: int, limit: int, stop: Sequence[str], end_ids: Sequence[int]
    ) -> None:
        self._tokenizer, self.skip, self.limit = tokenizer, skip, limit
        self._stop, self._end_ids = tuple(stop), frozenset(end_ids)
        self._released = 0
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None

    def add(self, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Take a block's ids; return the text that became final and the tokens that count."""
        before = len(self.tokens)
        for token in self._new(ids):
            if token in self._end_ids:
                self.finish_reason = "end"
                break
            self.tokens.append(token)
            if len(self.tokens) == self.limit:
                self.finish_reason = "length"
                break
        self.text = self._decode(self.tokens)
        self._cut_at_stop()
        final = len(self.text) if self.finish_reason else len(self.text) - self._unsettled()
        text, self._released = self.text[self._released : final], max(self._released, final)
        return text, tuple(self.tokens[before:])

    def guess(self, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Return how a guess of the coming block would read, up to an end token or the limit."""
        new = []
        for token in self._new(ids, peek=True)[: self.limit - len(self.tokens)]:
            if token in self._end_ids:
                break
            new.append(token)
        return self._decode([*self.tokens, *new])[self._released :], tuple(new)

    def _new(self, ids: Sequence[int], peek: bool = False) -> Sequence[int]:
        """Return the ids that are not the prompt's."""
        skipped = min(self.skip, len(ids))
        if not peek:
            self.skip -= skipped
        return ids[skipped:]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids) if self._tokenizer is not None else ""

    def _cut_at_stop(self) -> None:
        found = [at for at in (self.text.find(stop) for stop in self._stop) if at >= 0]
        if not found:
            return
        self.text, self.finish_reason = self.text[: min(found)], "stop"
        # The tokens kept are the longest run that spells nothing beyond the cut.
        while self.tokens and not self.text.startswith(self._decode(self.tokens)):
            self.tokens.pop()

    def _unsettled(self) -> int:
        """Return how many last characters may still change: a character or a stop string under way."""
        settled = self.text.rstrip(REPLACEMENT)
        open_ends = [
            size
            for stop in self._stop
            for size in range(1, len(stop))
            if settled.endswith(stop[:size]) or self.text.endswith(stop[:size])
        ]
        return len(self.text) - len(settled) + max(open_ends, default=0)
