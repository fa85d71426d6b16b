"""The release's scoring rules: an output, an answer, and whether the one gives the other.

Everything is matching of text, nothing is ranking by likelihood. Similarities have to reach 1 to count,
so only an output that copies the answer, or names its option, is correct.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal

ScoringRule = Literal["first word", "text", "option"]
"""How a task is scored: the answer's first word, its whole text, or the option that is named."""

NEAR = 0.9
"""Similarity from which an output that equals and contains no option names the most similar one."""

_MARK = r"(?:is\b|[=:\uff1d\uff1a])"  # "is", "=" or ":", ASCII or full-width
_LETTER = r"(?:\(([a-z])\)|\[([a-z])\]|([a-z]))"

_CUT = re.compile(r"\w[^\n]*(\n)")
_SEGMENT = re.compile(rf"\b(?:final\s+)?answer\b\s*{_MARK}?\s*(\S.*)", re.IGNORECASE)
_WHOLE_LETTER = re.compile(rf"{_LETTER}\.?", re.IGNORECASE)
_NAMED_LETTER = re.compile(
    rf"\b(?:answer|option|choice)\b\s*{_MARK}?\s*{_LETTER}(?=\s|$|[.,;:!?])", re.IGNORECASE
)
_BRACKETED_LETTER = re.compile(r"\(([a-z])\)|\[([a-z])\]", re.IGNORECASE)
_SHORT = 40  # characters in which a letter in brackets is taken for the answer
_OPENING = re.compile(
    rf"(?:the\s+)?(?:correct\s+)?(?:final\s+)?(?:answer|option|choice)\b\s*{_MARK}?\s*", re.IGNORECASE
)


def cut(text: str) -> tuple[str, str | None]:
    """Return a generated text up to the first newline that has a word character before it, and what follows.

    Without such a newline the text is whole, and None follows.
    """
    line_break = _CUT.search(text)
    return (text[: line_break.start(1)], text[line_break.end(1) :]) if line_break else (text, None)


def normalise(text: str) -> str:
    """Return a text in lower case, without punctuation, white space collapsed."""
    return " ".join(re.sub(r"[^\w\s]", "", text.strip().lower()).split())


def similarity(a: str, b: str) -> float:
    """Return how alike two texts are once normalised, from 0 to 1; 1 if both are empty."""
    return SequenceMatcher(None, normalise(a), normalise(b)).ratio()


def is_correct(rule: ScoringRule, output: str, answer: str, choices: Sequence[str] = ()) -> bool:
    """Return whether an output, cut already, gives the answer."""
    if rule == "first word":
        return normalise(output).split()[:1] == normalise(answer).split()[:1]
    if rule == "option":
        named, truth = named_option(output, choices), answer_option(answer, choices)
        if named is not None and named == truth:
            return True
    return similarity(output, answer) == 1


def named_option(output: str, choices: Sequence[str]) -> int | None:
    """Return which option an output names, from 0; None if it names none.

    Its answer segment is tried before the whole of it, and in each the letter before the text.
    """
    for text in (answer_segment(output), output):
        option = answer_option(text, choices)
        if option is not None:
            return option
    return None


def answer_option(text: str, choices: Sequence[str]) -> int | None:
    """Return which option a text is, by its letter or else by its text; None if it is none."""
    option = option_by_letter(text, len(choices))
    return option_by_text(text, choices) if option is None else option


def answer_segment(output: str) -> str:
    """Return what follows "answer" or "final answer" in the last line that has it, else the whole output."""
    for line in reversed(output.splitlines()):
        segment = _SEGMENT.search(line)
        if segment:
            return segment[1]
    return output


def option_by_letter(text: str, count: int) -> int | None:
    """Return the option whose letter a text gives, from 0; a letter beyond ``count`` options gives none.

    In turn: the whole text is a letter; the last letter after "answer", "option" or "choice"; in a
    short text, the last letter in brackets.
    """
    text = text.strip()
    whole = _WHOLE_LETTER.fullmatch(text)
    named = list(_NAMED_LETTER.finditer(text))[-1:]
    bracketed = list(_BRACKETED_LETTER.finditer(text))[-1:] if len(text) <= _SHORT else []
    for match in ([whole] if whole else []) + named + bracketed:
        letter = next(group for group in match.groups() if group)
        index = ord(letter.lower()) - ord("a")
        if index < count:
            return index
    return None


def option_by_text(text: str, choices: Sequence[str]) -> int | None:
    """Return the option that a text spells, from 0.

    In turn: it equals an option, with or without a leading "the correct answer is"; exactly one option
    is contained in it; the most similar option is at least ``NEAR`` like it.
    """
    options = [normalise(choice) for choice in choices]
    opening = _OPENING.match(text.strip())
    remainder = text.strip()[opening.end() :] if opening else text
    for candidate in (normalise(text), normalise(remainder)):
        if candidate in options:
            return options.index(candidate)
    contained = [index for index, option in enumerate(options) if option in normalise(remainder)]
    if len(contained) == 1:
        return contained[0]
    likeness = [similarity(remainder, choice) for choice in choices]
    best = max(range(len(choices)), key=likeness.__getitem__, default=None)
    return best if best is not None and likeness[best] >= NEAR else None
