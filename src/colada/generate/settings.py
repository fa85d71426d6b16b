"""What a generation may be asked for: the settings, the released values, and the one place that checks them.

Settings of a recipe, of a ``generation_config.json``, of the command line and of the Python interface are
checked here alike, before torch is imported. What may be asked for is bounded, by the constants below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict

from colada.checks import MOST_COUNT, MOST_SEED, SMALLEST, between, is_number, is_whole, plain
from colada.errors import ColadaError, nearest, shown

MOST_STEPS = 10_000
"""Solver steps of a block; a tenth of a timestep each."""
MOST_LEARNT = 64
"""Evaluations of a learnt solver."""
MOST_STOPS = 256
"""Stop strings of a request."""
LONGEST_STOP = 4096
"""Characters of a stop string."""
MOST_END_IDS = 1024
"""End tokens of a request."""
MOST_CANDIDATES = 64
"""Candidates of a block."""
PENALTIES = (0.01, 100.0)
"""Repetition penalties: a logit times one is still a number."""

SOLVER_NAMES = ("euler", "ab2", "heun")
SCHEDULE_NAMES = ("uniform", "front-loaded", "logit-normal")
NOISE_NAMES = ("per-sample", "released")
AGAINST_NAMES = ("block", "latents")
SEED_STRIDE = {"per-sample": 1, "released": 1000}
"""By how much the seeds of consecutive samples differ where one seed is given for all."""
UNGUIDED = {"guidance": 1.0, "guidance_against": "block", "guidance_cap": 0.0, "guidance_rescale": 0.0}
"""Settings that say how a velocity is guided, of one that is not."""
PER_PROMPT = ("seed", "guidance")
"""Settings that may be a list, one for each prompt."""

Prompt = str | Sequence[int]
"""A text, or the ids of its tokens; arrays and tensors of whole numbers are taken too."""


class Settings(TypedDict, total=False):
    """Generation settings; those left out, or None, are the model's own, or else the released ones.

    Attributes:
        steps: solver steps per block (released: 16). Each is an evaluation of the network, with "heun" two
            but for the last: 2 steps - 1.
        guidance: scale s of v = u + s (c - u); 1 is off (released: 7). One for all, or one each.
        guidance_interval: the values (low, high) of a = t / T between which guidance acts; elsewhere there
            is no unconditional pass (released: everywhere, (0, 1)).
        guidance_against: whose velocity u guidance leads away from: "block", the block's without the text
            before it (released), or "latents", each latent's by itself, so that guidance makes the latents
            of a block agree with each other too (after perturbed-attention guidance, arXiv:2403.17377). It
            costs no more; a block that no text is before is then guided as well.
        guidance_cap: no latent of a guided guess of z0 has a root mean square above this, which keeps large
            scales within the data (that of the data itself, say); 0 is off (released).
        guidance_rescale: share, 0 to 1, to which a guided guess of a block is brought back to the size of the
            conditional one; 0 is off (released).
        early_end: below this value of a there is no evaluation: the last one goes straight to its guess of
            z0, which saves steps that change no token; 0 is off (released).
        candidates: every block is drawn so many times, from noise of its own each, and the one of whose
            tokens the decoder is surest is kept; all that comes before a token costs as much more
            (released: 1).
        solver, schedule: names in ``colada.flow.SOLVERS`` and ``SCHEDULES`` (released: "euler", "uniform").
            A schedule may be the values of a themselves, falling from 1 to 0; ``steps`` then says nothing.
            A solver may be a learnt one, with a grid of its own: ``steps``, ``schedule`` and ``early_end``
            then say nothing, and where it is stored with a model they need another solver beside them.
        temperature, top_k, top_p, repetition_penalty: of each token: 0 picks
            the likeliest; only the k likeliest, 0 is all; only the likeliest that reach p; above 1, tokens of
            earlier blocks are less likely.
        seed: one for all (sample i then has seed + i), or one each; below 2**63. A sample's result depends
            on its own prompt, settings and seed, not on the batch it is in.
        stop: strings that end the text; they may straddle blocks.
        whole_sentences: a text that comes to its length is cut back to the end of its last sentence, if it
            has one; it still ends by "length" (default: exact lengths).
        end_ids: tokens that end the text; the tokenizer's end tokens if None, ``()`` for none.
        noise: "per-sample", or "released" for the released code's rule, where sample i of a single
            seed has seed + 1000 i (the published scores have seed 66).
    """

    steps: int | None
    guidance: float | Sequence[float] | None
    guidance_interval: Sequence[float] | None
    guidance_against: str | None
    guidance_cap: float | None
    guidance_rescale: float | None
    early_end: float | None
    candidates: int | None
    solver: str | Mapping[str, Any] | None
    schedule: str | Sequence[float] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    whole_sentences: bool | None
    end_ids: Sequence[int] | None
    noise: str | None


class TextRequest(NamedTuple):
    """A prompt among others with settings of its own, over those that all have; its seed is one number."""

    prompt: Prompt
    max_new_tokens: int
    settings: Settings


@dataclass(frozen=True)
class RequestSettings:
    """All settings of one request, for the names of :class:`Settings`; by default the released ones.

    Made of what :func:`check_settings` has checked, and handed on as it is.
    """

    steps: int = 16
    guidance: float = 7.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_against: str = "block"
    guidance_cap: float = 0.0
    guidance_rescale: float = 0.0
    early_end: float = 0.0
    candidates: int = 1
    solver: str | Mapping[str, Any] = "euler"
    schedule: str | Sequence[float] = "uniform"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: str | Sequence[str] = ()
    whole_sentences: bool = False
    end_ids: Sequence[int] | None = None
    noise: str = "per-sample"


RELEASED_SETTINGS: dict[str, Any] = {field.name: field.default for field in fields(RequestSettings)}
"""What a model without a ``generation_config.json`` of its own uses."""


# --- one setting after the other ----------------------------------------------------------------


class _Rule(NamedTuple):
    """What a value has to be; ``several``: also a list of such values, one a prompt."""

    holds: Callable[[Any], bool]
    expected: str
    several: bool = False


def _names(known: Sequence[str]) -> _Rule:
    return _Rule(lambda value: isinstance(value, str) and value in known, ", ".join(map(repr, known)))


def _whole(least: int, most: int, more: str = "") -> _Rule:
    return _Rule(
        lambda value: is_whole(value) and least <= value <= most,
        f"a whole number {between(least, most)}{more}",
    )


def _is_interval(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(is_number, value)):
        return False
    return bool(0 <= value[0] <= value[1] <= 1)


def _is_grid(value: Any) -> bool:
    """Return whether values of a fall from 1 to 0."""
    if not isinstance(value, list | tuple) or not 2 <= len(value) <= MOST_STEPS:
        return False
    falls = all(map(is_number, value)) and all(a > b for a, b in pairwise(value))
    return falls and value[0] == 1 and value[-1] == 0


def _is_learnt(value: Any) -> bool:
    """Return whether a value is a learnt solver, see :func:`colada.flow.learnt`."""
    if not isinstance(value, Mapping) or set(value) != {"kind", "grid", "alpha", "beta"}:
        return False
    grid, alpha, beta = (value[name] for name in ("grid", "alpha", "beta"))
    lists = all(isinstance(numbers, list | tuple) for numbers in (grid, alpha, beta))
    if value["kind"] != "bns" or not lists or not 1 <= len(grid) <= MOST_LEARNT or not _is_grid([*grid, 0]):
        return False
    if not len(grid) == len(alpha) == len(beta) or not all(map(is_number, alpha)):
        return False
    return all(
        isinstance(row, list | tuple) and len(row) == k and all(map(is_number, row))
        for k, row in enumerate(beta, start=1)
    )


def _is_stop(value: Any) -> bool:
    if not isinstance(value, str) or not 1 <= len(value) <= LONGEST_STOP:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # No text has a lone surrogate.
        return False
    return True


_RULES: dict[str, _Rule] = {
    "steps": _whole(1, MOST_STEPS),
    "guidance": _Rule(is_number, "a finite number within float32's range", several=True),
    "guidance_interval": _Rule(_is_interval, "[low, high] between 0 and 1"),
    "guidance_against": _names(AGAINST_NAMES),
    "guidance_cap": _Rule(
        lambda value: is_number(value) and (value == 0 or value >= SMALLEST),
        "0 (off), or a positive number within float32's range",
    ),
    "guidance_rescale": _Rule(lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "early_end": _Rule(lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "candidates": _whole(1, MOST_CANDIDATES),
    "solver": _Rule(
        lambda value: _is_learnt(value) or (isinstance(value, str) and value in SOLVER_NAMES),
        f"{', '.join(map(repr, SOLVER_NAMES))}, or a learnt solver's kind 'bns', grid, alpha and beta",
    ),
    "schedule": _Rule(
        lambda value: _is_grid(value) or (isinstance(value, str) and value in SCHEDULE_NAMES),
        f"{', '.join(map(repr, SCHEDULE_NAMES))}, or numbers that fall from 1 to 0",
    ),
    "temperature": _Rule(
        lambda value: is_number(value) and (value == 0 or value >= SMALLEST),
        "0, or a positive number within float32's range",
    ),
    "top_k": _whole(0, MOST_COUNT, " (0 is off)"),
    "top_p": _Rule(
        lambda value: is_number(value) and SMALLEST <= value <= 1,
        f"above 0 (at least {SMALLEST:.2g}) and at most 1",
    ),
    "repetition_penalty": _Rule(
        lambda value: is_number(value) and PENALTIES[0] <= value <= PENALTIES[1],
        "a positive number from {} to {}".format(*PENALTIES),
    ),
    "seed": _whole(0, MOST_SEED)._replace(several=True),
    "whole_sentences": _Rule(lambda value: isinstance(value, bool), "true or false"),
    "noise": _names(NOISE_NAMES),
}
_NAMED = {
    "solver": SOLVER_NAMES,
    "schedule": SCHEDULE_NAMES,
    "noise": NOISE_NAMES,
    "guidance_against": AGAINST_NAMES,
}
_LISTS: dict[str, tuple[int, _Rule]] = {
    "stop": (MOST_STOPS, _Rule(_is_stop, f"a string of 1 to {LONGEST_STOP} characters, or a list of such")),
    "end_ids": (MOST_END_IDS, _Rule(lambda value: is_whole(value) and value >= 0, "a list of token ids")),
}


def check_settings(settings: Mapping[str, Any], origin: str = "") -> dict[str, Any]:
    """Return generation settings once checked, without those that are None.

    Args:
        settings: of the names of :class:`Settings`; numbers of numpy and torch are taken as Python's own.
        origin: where they are from, for messages.

    Raises:
        ColadaError: for a setting that does not exist, is of the wrong type or out of its bounds.
    """
    where = f"{origin}: " if origin else ""
    if not isinstance(settings, Mapping):
        raise ColadaError(f"{where}settings are {shown(settings)}, expected names and values")
    checked: dict[str, Any] = {}
    for name, raw in settings.items():
        if not isinstance(name, str) or name not in RELEASED_SETTINGS:
            hint = nearest(name, RELEASED_SETTINGS) if isinstance(name, str) else ""
            raise ColadaError(f"{where}unknown generation setting {shown(name)}{hint}")
        if raw is None:
            continue
        value = plain(raw)
        if name in _LISTS:
            _check_list(name, value, where)
        elif isinstance(value, list | tuple) and _RULES[name].several:
            value = [plain(one) for one in value]
            for one in value:
                _check_one(name, one, where)
        else:
            _check_one(name, value, where)
        checked[name] = value
    return checked


def _check_one(name: str, value: Any, where: str) -> None:
    rule = _RULES[name]
    if not rule.holds(value):
        known = _NAMED.get(name)
        one_of = "one of " if known else ""
        hint = nearest(value, known) if known and isinstance(value, str) else ""
        each = ", or one for each prompt" if rule.several else ""
        raise ColadaError(f"{where}{name}={shown(value)}, expected {one_of}{rule.expected}{each}{hint}")


def _check_list(name: str, value: Any, where: str) -> None:
    most, rule = _LISTS[name]
    if name == "stop" and isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ColadaError(f"{where}{name}={shown(value)}, expected {rule.expected}")
    if len(value) > most:
        raise ColadaError(f"{where}{len(value)} values of {name}, expected at most {most}")
    for one in value:
        if not rule.holds(plain(one)):
            raise ColadaError(f"{where}{name}={shown(one)}, expected {rule.expected}")


# --- of a model ----------------------------------------------------------------------------------


def with_built_in(
    stored: Mapping[str, Any], asked: Mapping[str, Any], built_in: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return a model's stored settings with those asked for over them, all of them checked.

    Args:
        stored: with a value for each.
        asked: some.
        built_in: ``distilled`` of a distilled prior's config, which goes before what is stored.

    Raises:
        ColadaError: for guidance, steps, grid or solver beside those that are built in; for steps beside a
            stored learnt solver.
    """
    chosen = {**stored, **asked}
    if built_in is not None:
        chosen |= _distilled(stored, asked, built_in)
    solver = chosen.get("solver")
    if isinstance(solver, Mapping) and "solver" not in asked:
        count = len(solver["grid"])
        for name in ("steps", "schedule", "early_end"):
            if asked.get(name) not in (None, count if name == "steps" else None):
                known = f"this model's learnt solver makes {count} evaluations"
                raise ColadaError(f"{name}={shown(asked[name])}: {known}; expected another solver beside it")
    return chosen


def _distilled(
    stored: Mapping[str, Any], asked: Mapping[str, Any], built_in: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings that a distilled prior has built in; raises as :func:`with_built_in`."""
    scales = asked.get("guidance", 1.0)
    if any(scale != 1 for scale in (scales if isinstance(scales, list | tuple) else [scales])):
        scale = f"{built_in['guidance']:g}"
        raise ColadaError(f"guidance={shown(scales)}: this model has {scale} built in, expected 1")
    if built_in.get("grids") is None:
        return UNGUIDED
    grids = {len(grid) - 1: tuple(grid) for grid in built_in["grids"]}
    steps = asked.get("steps", stored["steps"] if stored["steps"] in grids else next(iter(grids)))
    grid = grids.get(steps)
    schedule = asked.get("schedule", grid)
    if grid is None or isinstance(schedule, str) or tuple(schedule) != grid:
        known = " or ".join(f"{count} steps along a = {list(values)}" for count, values in grids.items())
        words = f"steps={shown(steps)}" + (f", schedule={shown(schedule)}" if schedule else "")
        raise ColadaError(f"{words}: this model makes {known}")
    if asked.get("solver", "euler") != "euler" or asked.get("early_end"):
        words = f"solver={shown(asked.get('solver'))}, early_end={shown(asked.get('early_end'))}"
        raise ColadaError(f"{words}: this model makes Euler steps of its own, expected 'euler' and 0")
    return {**UNGUIDED, "schedule": grid, "steps": steps, "solver": "euler", "early_end": 0.0}


# --- prompts -------------------------------------------------------------------------------------


def several(prompts: Any) -> list[Any]:
    """Return a list of prompts, of one or of several; their ids are not looked at yet.

    Args:
        prompts: a text, ids or a request, or a list (tuple, array) of these.

    Raises:
        ColadaError: for anything else.
    """
    if isinstance(prompts, str | TextRequest):
        return [prompts]
    prompts = plain(prompts)
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray | memoryview):
        raise ColadaError(f"prompts={shown(prompts)}, expected a text, a list of ids, or a list of these")
    if len(prompts) and not any(_is_prompt(part) for part in prompts):
        return [prompts]  # Ids, or what is meant to be some.
    return list(prompts)


def _is_prompt(part: Any) -> bool:
    return (
        isinstance(part, str)
        or (isinstance(part, Sequence) and not isinstance(part, bytes))
        or (getattr(part, "ndim", 0) > 0)
    )


def one_each(name: str, value: Any, count: int, stride: int) -> list[Any]:
    """Return a checked setting per sample: its list, or value + stride * i.

    Raises:
        ColadaError: for a list of another length, or a last seed beyond :data:`MOST_SEED`.
    """
    values = list(value) if isinstance(value, list | tuple) else [value + stride * i for i in range(count)]
    if len(values) != count:
        raise ColadaError(f"{len(values)} values of {name} for {count} prompts, expected one, or one each")
    if name == "seed" and values and values[-1] > MOST_SEED:
        raise ColadaError(
            f"seed={value} for {count} prompts ends with {values[-1]}, expected at most {MOST_SEED}"
        )
    return values


def per_prompt(chosen: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return what each of so many prompts has of :data:`PER_PROMPT`; see :class:`Settings` for their seeds.

    Raises:
        ColadaError: as :func:`one_each`.
    """
    strides = {"seed": SEED_STRIDE[chosen.get("noise", "per-sample")], "guidance": 0}
    each = {name: one_each(name, chosen[name], count, strides[name]) for name in PER_PROMPT if name in chosen}
    return [dict(zip(each, row, strict=True)) for row in zip(*each.values(), strict=True)]


def settings_of_each(chosen: Mapping[str, Any], count: int) -> list[RequestSettings]:
    """Return all settings of each of so many prompts; raises as :func:`one_each`."""
    return [RequestSettings(**{**chosen, **one}) for one in per_prompt(chosen, count)]
