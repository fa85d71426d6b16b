"""Rules that judge answers: what one is, one of a user's own, and what it says once checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from colada.checks import is_number, plain, require_import
from colada.errors import ColadaError, failure, shown

Reward = Callable[[str, str], float]
"""Prompt and answer to a reward; those of :mod:`colada.data.instructions` are in 0..1."""


def imported(name: str) -> Reward:
    """Return the rule ``package.module:function``; raises ColadaError if it is not there."""
    reward: Reward = require_import("reward", name, "function")
    return reward


def rewarded(reward: Reward, name: str, prompt: str, answer: str) -> float:
    """Return the reward of an answer, whoever wrote the rule.

    Raises:
        ColadaError: naming rule and prompt, if the rule fails, or what it says is no finite number.
    """
    try:
        value = plain(reward(prompt, answer))
    except Exception as error:  # It is a user's program.
        raise failure(f"the reward {name} of prompt {shown(prompt)} failed", error) from None
    if not is_number(value):
        raise ColadaError(f"the reward {name} of prompt {shown(prompt)} is {shown(value)}, expected a number")
    return float(value)


def met_in(reward: Callable[[str], float], texts: Sequence[str]) -> int | None:
    """Return which of texts, each the beginning of the next, met what the reward asks for.

    That is the first from which on the reward is that of the last: what is written after it has changed
    nothing. None if the last one's is that of no text at all: nothing was met.
    """
    value = reward(texts[-1])
    if reward("") == value:
        return None
    return next((n for n in range(len(texts) - 1, 0, -1) if reward(texts[n - 1]) != value), 0)
