"""What a terminal shows of a run."""

import io

import pytest
from rich.console import Console

from colada.training.display import Display

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


def test_elsewhere_a_step_is_a_line() -> None:
    file = io.StringIO()
    display = Display(Console(file=file, width=80))
    with display.task("stage 1", 120):
        display.update(80, TERMS)
    expected = "24,622 tokens/s nll 0.0123 kl 21.2 masked 0.659 log_snr 5.02 grad_norm 0.189"
    assert file.getvalue() == f"stage 1 step 80: {expected}\n"
