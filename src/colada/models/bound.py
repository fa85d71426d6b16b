"""What a likelihood is asked for and what it says, for every kind of model; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from colada.checks import is_number, require_count
from colada.errors import ColadaError, shown
from colada.generate.settings import MOST_STEPS

LikelihoodKind = Literal["bound", "exact"]
"""What a log-likelihood is: a lower bound on log p(x), or log p(x) itself."""

SETTINGS: dict[str, dict[str, Any]] = {
    "cola": {"samples": 1, "at": 0.6, "steps": 16},
    "ar": {},
    "llada": {"samples": 32},
}
"""By architecture, the settings of its likelihood and their defaults."""

MOST_SAMPLES = 2**16
NEAREST = 1e-3
"""How near to 0 or 1 the a of a bound may be: nearer, the flow's velocity is a difference of equals."""


@dataclass(frozen=True)
class TextScore:
    """log p(x) of a text, or a bound on it, in nats.

    Attributes:
        tokens, bytes: the text's size; bytes are of UTF-8, 0 for a text of ids.
        log_likelihood: of the whole text.
        parts: what it is made of, by name, in nats; may be empty.
    """

    tokens: int
    bytes: int
    log_likelihood: float
    parts: dict[str, float]


def check_bound(samples: Any = None, at: Any = None, steps: Any = None) -> None:
    """Check settings of a likelihood, which every kind of model has some of; None is the default.

    Raises:
        ColadaError: naming the value that is out of its bounds.
    """
    if samples is not None:
        require_count("samples", samples, MOST_SAMPLES)
    if steps is not None:
        require_count("steps", steps, MOST_STEPS)
    if at is not None and not (is_number(at) and NEAREST <= at <= 1 - NEAREST):
        raise ColadaError(f"at={shown(at)}, expected a number from {NEAREST} to {1 - NEAREST}")
