"""What a generation may be asked for: the settings, the released values, and their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from colada.errors import ColadaError, nearest

Prompt = str | Sequence[int]


class Settings(TypedDict, total=False):
    """Generation settings; those left out, or None, are the model's own, or else the released ones.

    Attributes:
        steps: solver steps per block (released: 16).
        guidance: scale s of v = u + s (c - u); 1 is off (released: 7). One for all, or one each.
        guidance_interval: the values (low, high) of a = t / T between which guidance acts; elsewhere there
            is no unconditional pass (released: everywhere, (0, 1)).
        solver, schedule: names in ``colada.flow.SOLVERS`` and ``SCHEDULES`` (released: "euler", "uniform").
        temperature, top_k, top_p, repetition_penalty: see :class:`~colada.sampling.Sampling` (greedy).
        seed: one for all (sample i then has seed + i), or one each. A sample's result depends on
            its own prompt, settings and seed, not on the batch it is in.
        stop: strings that end the text; they may straddle blocks.
        end_ids: tokens that end the text; the tokenizer's end tokens if None, ``()`` for none.
        noise: "per-sample", or "released" for the released code's rule, where sample i of a single
            seed has seed + 1000 i (the published scores have seed 66).
    """

    steps: int | None
    guidance: float | Sequence[float] | None
    guidance_interval: Sequence[float] | None
    solver: str | None
    schedule: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    end_ids: Sequence[int] | None
    noise: str | None


class TextRequest(NamedTuple):
    """A text to be continued, with settings of its own; its seed is one number.

    Attributes:
        prompt: a text, or ids.
        max_new_tokens: how many tokens follow it, unless an end token or stop string is first.
        settings: over the model's own.
    """

    prompt: Prompt
    max_new_tokens: int
    settings: Settings


RELEASED_SETTINGS: dict[str, Any] = {
    "steps": 16,
    "guidance": 7.0,
    "guidance_interval": (0.0, 1.0),
    "solver": "euler",
    "schedule": "uniform",
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "stop": (),
    "end_ids": None,
    "noise": "per-sample",
}
"""What a model without a ``generation_config.json`` of its own uses."""

SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty")
"""Those that :class:`~colada.sampling.Sampling` takes."""

_NUMBER, _SEVERAL = (int, float), (list, tuple)
_SETTING_TYPES: dict[str, Any] = {
    "steps": int,
    "solver": str,
    "schedule": str,
    "temperature": _NUMBER,
    "top_k": int,
    "top_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "seed": (int, *_SEVERAL),
    "guidance": (*_NUMBER, *_SEVERAL),
    "guidance_interval": _SEVERAL,
    "stop": (str, *_SEVERAL),
    "end_ids": _SEVERAL,
    "noise": str,
}
_KIND_NAMES = {int: "a whole number", str: "a name", _NUMBER: "a number", _SEVERAL: "a list"}
_KIND_NAMES |= {(int, *_SEVERAL): "a whole number of at least 0, or one for each prompt"}
_KIND_NAMES |= {(*_NUMBER, *_SEVERAL): "a finite number, or one for each prompt"}
_KIND_NAMES |= {(str, *_SEVERAL): "a string, or several"}


def check_settings(settings: Mapping[str, Any], origin: str = "") -> None:
    """Raise ColadaError for a generation setting that does not exist or is of the wrong type."""
    where = f"{origin}: " if origin else ""
    for name, value in settings.items():
        if name not in _SETTING_TYPES:
            raise ColadaError(f"{where}unknown generation setting {name!r}{nearest(name, _SETTING_TYPES)}")
        kind = _SETTING_TYPES[name]
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ColadaError(f"{where}{name}={value!r}, expected {_KIND_NAMES[kind]}")
    interval = settings.get("guidance_interval")
    if interval is not None:
        numbers = [end for end in interval if isinstance(end, _NUMBER) and not isinstance(end, bool)]
        if len(interval) != 2 or len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1] <= 1:
            raise ColadaError(
                f"{where}guidance_interval={list(interval)!r}, expected [low, high] between 0 and 1"
            )


def several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Return a list of prompts, of one or of several."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(part, int) for part in prompts):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def require_count(name: str, value: Any) -> None:
    """Raise ColadaError unless the value is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ColadaError(f"{name}={value!r}, expected a whole number of at least 1")


def one_each(name: str, value: Any, count: int, stride: int) -> list[Any]:
    """Return a setting per sample: its list, checked, or value + stride * i."""
    if isinstance(value, Sequence):
        values = list(value)
    elif isinstance(value, int | float):
        values = [value + stride * i for i in range(count)]
    else:
        values = [value] * count
    if len(values) != count:
        raise ColadaError(f"{len(values)} values of {name} for {count} prompts, expected one, or one each")
    for one in values:
        if name == "seed" and not (isinstance(one, int) and one >= 0):
            raise ColadaError(f"seed={one!r}, expected a whole number of at least 0")
        if name == "guidance" and not (isinstance(one, int | float) and math.isfinite(one)):
            raise ColadaError(f"guidance={one!r}, expected a finite number")
    return values
