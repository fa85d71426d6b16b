"""What a terminal shows of a run."""

import io
import re
import time

import pytest
from rich.console import Console

from colada.train.display import Display

TERMS = {
    "tokens_per_s": 24622.0,
    "nll": 0.0123,
    "kl": 21.2,
    "masked": 0.659,
    "log_snr": 5.02,
    "grad_norm": 0.189,
}


def shown(width: int) -> str:
    """The last line of progress on a terminal of this width."""
    file = io.StringIO()
    display = Display(
        Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    )
    with display.task("stage 1", 120):
        display.update(80, TERMS)
    return file.getvalue().replace("\r", "\n").rstrip("\n\x1b[?25h").split("\n")[-1]


@pytest.mark.parametrize("width", [70, 80, 120])
def test_progress_and_speed_are_the_last_to_go_on_a_narrow_terminal(width: int) -> None:
    line = shown(width)
    for part in ("stage 1", "80/120", "24,622 tokens/s"):
        assert part in line
    assert ("grad_norm" in line) == (width == 120)


def test_square_brackets_of_a_line_are_shown_as_they_are() -> None:
    file = io.StringIO()
    line = 'pip install "colada-lm[train]" for my [bold]texts[/bold] [1].txt'
    Display(Console(file=file, width=80)).say(line)
    assert file.getvalue() == line + "\n"


def piped(steps: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines for steps of 120, at these seconds, where the output is no terminal."""
    clock = iter([0.0, *steps.values()])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    file = io.StringIO()
    display = Display(Console(file=file, width=80))
    with display.task("stage 1", 120):
        for step in steps:
            display.update(step, TERMS)
    return file.getvalue().splitlines()


def test_elsewhere_a_step_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "24,622 tokens/s nll 0.0123 kl 21.2 masked 0.659 log_snr 5.02 grad_norm 0.189"
    assert piped({80: 160.0}, monkeypatch) == [f"stage 1 step 80/120, 1:20 left: {expected}"]


def test_lines_are_seconds_apart_but_for_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = piped({1: 1.0, 2: 2.0, 3: 7.0, 4: 8.0, 119: 8.5, 120: 9.0}, monkeypatch)
    assert [line.split()[3].rstrip(":,") for line in lines] == ["1/120", "3/120", "120/120"]


def test_after_the_second_step_a_terminal_shows_the_time_left() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    display = Display(console)
    with display.task("stage 1", 120):
        for step in (1, 2):
            time.sleep(0.01)
            display.advance(step, 120)
    assert re.search(r"2/120 +\d+:\d\d", file.getvalue())


def test_a_task_says_in_a_pipe_how_far_it_is_and_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    file = io.StringIO()
    display = Display(Console(file=file, width=80))
    with display.task("likelihood", 1, unit="tokens"):
        for clock[0] in (1.0, 2.5, 5.0, 8.0, 13.0, 40.0):
            display.advance(int(clock[0] * 100), 4000)
    assert file.getvalue().splitlines() == [
        "likelihood: 250 of 4,000 tokens, 0:38 left",
        "likelihood: 800 of 4,000 tokens, 0:32 left",
        "likelihood: 1,300 of 4,000 tokens, 0:27 left",
    ]


def test_a_stage_of_slow_steps_has_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    file = io.StringIO()
    display = Display(Console(file=file, width=80))
    with display.task("stage 1", 100):
        for done, clock[0] in enumerate((12.0, 24.0, 36.0, 48.0, 60.0, 72.0), 1):
            display.move(done, 100)
    assert file.getvalue().splitlines() == [
        "stage 1 step 3/100, 19:24 left",
        "stage 1 step 6/100, 18:48 left",
    ]
