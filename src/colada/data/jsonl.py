"""Files of JSON lines: reading them, and naming the file, line and field of what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from colada import files
from colada.errors import ColadaError, nearest

Fields = Mapping[str, Any]

_KINDS: Mapping[str, tuple[type, ...]] = {
    "a string": (str,),
    "a string or a whole number": (str, int),
    "a whole number": (int,),
    "a list": (list,),
}


def read_lines(path: Path, unfinished: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a .jsonl or .jsonl.gz file, each with its place, ``file:line``.

    Args:
        path: the file.
        unfinished: it is still being written: a last line without a line break does not count.

    Raises:
        ColadaError: if the file cannot be read, or a line is not a JSON object.
    """
    for number, raw in files.read_lines(path):
        if unfinished and not raw.endswith(b"\n"):
            return
        if raw.strip():
            yield f"{path}:{number}", parse_object(raw, f"{path}:{number}")


def parse_object(raw: bytes, place: str) -> dict[str, Any]:
    """Return the object of a line. Raises ColadaError naming its place, if it is none."""
    try:
        return files.as_object(files.parse_json(raw, place), place)
    except ColadaError as error:
        if raw.endswith(b"\n"):
            raise
        raise ColadaError(f"{error}, and has no line break: was its writing cut off?") from None


def get(fields: Fields, name: str, kind: str, place: str) -> Any:
    """Return a field that must be there and of a kind ("a string", "a list" ...).

    Raises:
        ColadaError: naming place and field.
    """
    if name not in fields:
        known = ", ".join(fields) or "none"
        raise ColadaError(f"{place}: no field {name!r}{nearest(name, fields)}, fields there: {known}")
    value = fields[name]
    if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
        raise ColadaError(f"{place}: {name!r} is {_shown(value)}, expected {kind}")
    return value


def get_optional(fields: Fields, name: str, kind: str, place: str) -> Any:
    """Return a field as :func:`get` does, or None if it is null or absent."""
    return None if fields.get(name) is None else get(fields, name, kind, place)


def get_texts(fields: Fields, name: str, place: str) -> tuple[str, ...]:
    """Return a field that must be a list of strings, or null or absent: then there are none.

    Raises:
        ColadaError: naming place and field.
    """
    texts = get_optional(fields, name, "a list", place) or ()
    for text in texts:
        if not isinstance(text, str):
            raise ColadaError(f"{place}: {name!r} holds {_shown(text)}, expected strings")
    return tuple(texts)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"
