"""Checks of plain values that users give, before torch is imported: counts, seeds, flags, texts and ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

from colada.errors import ColadaError, failure, nearest, one_of, shown

Choice = TypeVar("Choice")

MOST_TOKENS = 2**17
"""Tokens of a prompt, and tokens that may follow it."""
MOST_CHARACTERS = 2**20
"""Characters of a prompt: as many tokens have more only where each is a long word."""
MOST_SEED = 2**63 - 1
"""The largest seed, also of the last sample of many. What a block adds to it stays within 64 bits."""
MOST_COUNT = 2**31 - 1
"""Of whatever else is counted: a batch, a KV cache, top-k."""
SMALLEST, LARGEST = 2.0**-149, 2.0**127
"""Of positive numbers that are computed with: float32 has them."""


def plain(value: Any) -> Any:
    """Return numbers and lists of numpy and torch as Python's own, and anything else as it is."""
    # By what they offer, not by their type: neither library is imported for this.
    if hasattr(value, "tolist") and hasattr(value, "dtype") and callable(value.tolist):
        try:
            return value.detach().cpu().tolist() if hasattr(value, "detach") else value.tolist()
        except Exception as error:  # A tensor without data, a sparse one: the libraries raise many kinds.
            reason = str(error).partition("\n")[0]
            raise ColadaError(f"{shown(value)} cannot be read: {reason}") from None
    return value


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number within float32's range; 10**400 is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -LARGEST <= value <= LARGEST


def between(least: int, most: int) -> str:
    """Return bounds in words."""
    return f"of at least {least} and at most {most}"


def require_count(name: str, value: Any, most: int = MOST_COUNT) -> int:
    """Return a count, once it is a whole number from 1 to ``most``.

    Raises:
        ColadaError: naming the value and its bounds.
    """
    count = plain(value)
    if not is_whole(count) or not 1 <= count <= most:
        raise ColadaError(f"{name}={shown(count)}, expected a whole number {between(1, most)}")
    return int(count)


def require_seed(value: Any) -> int:
    """Return one seed for all once it is a whole number in its bounds. Raises ColadaError otherwise."""
    if not is_whole(value) or not 0 <= value <= MOST_SEED:
        raise ColadaError(f"seed={shown(value)}, expected a whole number {between(0, MOST_SEED)}")
    return int(value)


def require_flag(name: str, value: Any) -> bool:
    """Return a flag once it is True or False, numpy's too. Raises ColadaError for anything else."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise ColadaError(f"{name}={shown(value)}, expected True or False")
    return flag


def require_choice(name: str, value: Any, known: Iterable[str]) -> str:
    """Return a name once it is a known one. Raises ColadaError, naming those and the nearest, otherwise."""
    names = list(known)
    if not isinstance(value, str) or value not in names:
        raise ColadaError(f"{name}={shown(value)}, {one_of(names, value)}")
    return value


def choose(name: str, value: Any, choices: Mapping[str, Choice]) -> Choice:
    """Return what a name stands for; raises as :func:`require_choice`."""
    return choices[require_choice(name, value, choices)]


def require_function(name: str, value: Any) -> None:
    """Raise ColadaError unless a value, if it is not None, can be called."""
    if value is not None and not callable(value):
        raise ColadaError(f"{name}={shown(value)}, expected a function")


def require_import(what: str, name: str, kind: str) -> Any:
    """Return what ``package.module:name`` stands for.

    Args:
        what: it is for.
        kind: "class" or "function".

    Raises:
        ColadaError: if it cannot be imported, is not there, or cannot be called.
    """
    module_name, _, member = name.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:  # It is a user's program.
        raise failure(f"{what} {name!r}: cannot import {module_name!r}", error) from None
    if not callable(getattr(module, member, None)):
        hint = nearest(member, [known for known, value in vars(module).items() if callable(value)])
        raise ColadaError(f"{what} {name!r}: {module_name} has no {kind} {member!r}{hint}")
    return getattr(module, member)


def check_text(text: str) -> str:
    """Return a text that is to be continued. Raises ColadaError for one of too many characters."""
    if len(text) > MOST_CHARACTERS:
        raise ColadaError(f"a prompt of {len(text)} characters, expected at most {MOST_CHARACTERS}")
    return text


def check_ids(prompt: Any, vocab_size: int, what: str = "prompt") -> list[int]:
    """Return the ids of a prompt's tokens.

    Args:
        prompt: a list, tuple, array or tensor of whole numbers.
        vocab_size: ids are below it.
        what: they are, for messages.

    Raises:
        ColadaError: for anything else, an id outside the vocabulary, or too many.
    """
    ids = plain(prompt)
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes | bytearray | memoryview):
        raise ColadaError(f"{what} {shown(ids)}, expected a text or a list of ids")
    if len(ids) > MOST_TOKENS:
        raise ColadaError(f"{what} of {len(ids)} tokens, expected at most {MOST_TOKENS}")
    checked = []
    for value in ids:
        token = plain(value)
        if not is_whole(token) or not 0 <= token < vocab_size:
            raise ColadaError(f"{what} id {shown(token)}, expected whole numbers from 0 to {vocab_size - 1}")
        checked.append(token)
    return checked
