"""Rewards of one's own, as a recipe names them."""

from __future__ import annotations

asked: list[str] = []
said: dict[str, object] = {}
"""What ``changing`` says instead of a reward, or raises, under "value"."""


def letters(prompt: str, answer: str) -> float:
    """Between 0 and 1, and different for nearly any two answers."""
    asked.append(prompt)
    return sum(map(ord, answer)) % 17 / 17


def coarse(prompt: str, answer: str) -> float:
    """One of two values."""
    return sum(map(ord, answer)) % 2


def vowels(prompt: str, answer: str) -> float:
    """What share of the vowels an answer has."""
    return len(set(answer) & set("aeiou")) / 5


def equal(prompt: str, answer: str) -> float:
    return 0.25


def changing(prompt: str, answer: str) -> object:
    value = said.get("value", 0.5 * len(answer) % 3)
    if isinstance(value, Exception):
        raise value
    return value
