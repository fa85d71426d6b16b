"""Settings: the one check that recipe, file, command line and Python share."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from colada.checks import MOST_COUNT, MOST_SEED, require_count
from colada.errors import ColadaError
from colada.flow import SCHEDULES, SOLVERS
from colada.generate.noise import NOISE_RULES
from colada.generate.settings import (
    LONGEST_STOP,
    MOST_STEPS,
    NOISE_NAMES,
    RELEASED_SETTINGS,
    SCHEDULE_NAMES,
    SEED_STRIDE,
    SOLVER_NAMES,
    Settings,
    check_settings,
    one_each,
    several,
)

HUGE = 10**400
REFUSED = [
    ("steps", [0, -1, True, 2.5, "2", [3], MOST_STEPS + 1, 10**23, HUGE, 10**5000, float("nan")]),
    ("guidance", ["x", True, float("nan"), float("inf"), 1e308, HUGE, -HUGE, [7.0, "x"], [HUGE], {}]),
    ("schedule", ["log", [], [1], [1, 1, 0], [0, 1], [1, 0.5], [1, "0.5", 0], [1, float("nan"), 0]]),
    ("guidance_cap", ["1", -0.5, HUGE, float("nan"), True, [1.0]]),
    ("guidance_against", ["blocks", "", 1, ["block"], True]),
    ("guidance_rescale", ["1", -0.1, 1.1, float("nan"), True]),
    ("candidates", [0, 65, 1.0, "2", True]),
    ("whole_sentences", [1, "yes", [True]]),
    ("early_end", ["1", -0.1, 1, float("nan"), True]),
    ("guidance_interval", [5, "01", [0.5], [0.9, 0.1], [-0.1, 1], [0, 1.1], [0, HUGE], [0, "1"], [0, True]]),
    ("solver", ["eular", 5, ["euler"], ""]),
    ("schedule", ["cosine", 5, {}]),
    ("noise", ["release", 0]),
    ("temperature", [-0.1, "hot", True, float("nan"), float("inf"), HUGE, 1e-46, 1e-300, [1.0]]),
    ("top_k", [-1, 1.5, True, MOST_COUNT + 1, HUGE]),
    ("top_p", [0, -0.5, 1.01, float("nan"), 1e-300, HUGE, "1"]),
    ("repetition_penalty", [0, -1, float("inf"), float("nan"), 1e-300, 1e30, HUGE]),
    ("seed", [-1, 1.5, True, "1", MOST_SEED + 1, 2**64, HUGE, [1, -2], [1.0], [2**64]]),
    ("stop", [5, [1], "", ["x", ""], {"a"}, "x" * (LONGEST_STOP + 1), ["x"] * 10**4, "\ud800", [None]]),
    ("end_ids", [5, "1", ["a"], [1.5], [True], [-1], list(range(10**4)), [None]]),
    ("stepz", [1]),
    (5, [1]),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}-{number}")
        for name, values in REFUSED
        for number, value in enumerate(values)
    ],
)
def test_a_setting_out_of_its_bounds_is_refused_by_name_on_one_short_line(
    name: object, value: object
) -> None:
    with pytest.raises(ColadaError, match=rf"^recipe: .*{name}") as caught:
        check_settings({name: value}, "recipe")  # type: ignore[dict-item]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("settings", [None, 5, "steps", [("steps", 3)]])
def test_settings_are_names_and_values(settings: object) -> None:
    with pytest.raises(ColadaError, match="expected names and values"):
        check_settings(settings)  # type: ignore[arg-type]


def test_what_is_within_bounds_comes_back_as_python_has_it_and_none_is_left_out() -> None:
    given = {
        "steps": np.int64(3),
        "guidance": torch.tensor([1.0, 7.5]),
        "guidance_interval": np.array([0.0, 0.5]),
        "temperature": np.float32(0.5),
        "seed": [np.uint8(4), torch.tensor(5)],
        "top_p": None,
        "stop": ("a", "b"),
        "end_ids": np.array([1, 2]),
    }
    checked = check_settings(given)
    assert checked == {
        "steps": 3,
        "guidance": [1.0, 7.5],
        "guidance_interval": [0.0, 0.5],
        "temperature": 0.5,
        "seed": [4, 5],
        "stop": ("a", "b"),
        "end_ids": [1, 2],
    }
    assert [type(one) for one in checked["seed"]] == [int, int]


def test_the_released_settings_are_within_bounds_and_so_are_the_bounds() -> None:
    assert set(RELEASED_SETTINGS) == set(Settings.__annotations__)
    check_settings(RELEASED_SETTINGS)
    check_settings(
        {"steps": MOST_STEPS, "seed": MOST_SEED, "stop": "x" * LONGEST_STOP, "temperature": 2**-149}
    )


def test_names_are_those_of_what_they_name() -> None:
    assert tuple(SOLVERS) == SOLVER_NAMES
    assert tuple(SCHEDULES) == SCHEDULE_NAMES
    assert tuple(NOISE_RULES) == NOISE_NAMES == tuple(SEED_STRIDE)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None, [1], 11, HUGE, float("nan"), np.bool_(True)])
def test_a_count_is_a_whole_number_within_its_bounds(value: object) -> None:
    with pytest.raises(
        ColadaError, match=r"^batch=.*, expected a whole number of at least 1 and at most 10$"
    ):
        require_count("batch", value, 10)
    assert require_count("batch", np.int32(10), 10) == 10


def test_the_last_samples_seed_has_the_bound_too() -> None:
    assert one_each("seed", MOST_SEED - 1, 2, 1) == [MOST_SEED - 1, MOST_SEED]
    with pytest.raises(ColadaError, match="seed="):
        one_each("seed", MOST_SEED - 1, 2, 1000)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("ab", ["ab"]),
        ("", [""]),
        ([], []),
        (["a", [1]], ["a", [1]]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [(1, 2)]),
        (np.array([1, 2]), [[1, 2]]),
        (torch.tensor([[1], [2]]), [[1], [2]]),
        ([[], []], [[], []]),
        (range(3), [range(3)]),
    ],
)
def test_one_prompt_or_several(prompts: object, expected: list[object]) -> None:
    assert several(prompts) == expected


def test_settings_are_checked_without_torch() -> None:
    code = "import colada.generate.settings, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
