"""Who may join: limits of a server, places that requests take, and when to come again. Plain arithmetic."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from colada.errors import shown

RATE_SECONDS = 60.0
"""Over so long, what is finished is counted to tell how fast places come free."""
LONGEST_RETRY = 60
"""Seconds that a client is told to wait at most."""


class Refusal(HTTPException):
    """A request that is not served, as OpenAI's clients read it.

    Attributes:
        code: what a program looks at; ``param``: the field at fault.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        """Return what the client is sent."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
        kind = kinds.get(self.status_code, "invalid_request_error")
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(param: str | None, value: object, expected: str) -> Refusal:
    """Return the refusal of a value that is out of its bounds."""
    return Refusal(400, "invalid_value", f"{param}={shown(value)}, expected {expected}", param)


@dataclass(frozen=True)
class Limits:
    """What one process serves; those in seconds are at least 0.

    Attributes:
        slots: requests under way together, a model.
        waiting: choices that may wait beside them.
        history: latents (an AR model's: tokens) under way together, a model; a longer request is refused.
        max_tokens, max_steps: of a request.
        watchers: requests that may be sent guesses at once: these cost the engine a quarter more.
        connections: at once.
        timeout: seconds for a whole request, waiting included.
        reader: seconds in which a client takes none of what it is sent, before it is given up.
        ping: seconds of silence after which a stream has a comment; 0 is none.
        body: seconds in which a request's body has to be there.
        drain: seconds that accepted requests have to finish once the process is told to end.
        stall: seconds without a solver step after which the engine counts as stalled.
    """

    slots: int = 64
    waiting: int = 256
    history: int = 8192
    max_tokens: int = 8192
    max_steps: int = 64
    watchers: int = 8
    connections: int = 1024
    timeout: float = 600
    reader: float = 60
    ping: float = 15
    body: float = 30
    drain: float = 30
    stall: float = 60


@dataclass
class Admission:
    """Counts the places of the choices that are accepted and not finished.

    As many as there are slots may be under way, and ``waiting`` more wait; in latents, four times the
    history waits beside the one under way.
    """

    limits: Limits
    clock: Callable[[], float] = time.monotonic
    places: int = 0
    latents: int = 0
    watchers: int = 0
    _finished: deque[tuple[float, int]] = field(default_factory=deque)

    def require_place(self) -> None:
        """Raise Refusal where everything is taken: before a body is read as JSON, and long before tokens."""
        if self.places >= self.limits.slots + self.limits.waiting:
            raise self._full()

    def take(self, latents: list[int], watching: bool) -> None:
        """Take the places of a request's choices, all or none; :meth:`give_back` has the same arguments.

        Raises:
            Refusal: 429, with the seconds after which there may be room.
        """
        places = self.places + len(latents)
        if places > self.limits.slots + self.limits.waiting or (
            self.places and self.latents + sum(latents) > 5 * self.limits.history
        ):
            raise self._full()
        if watching and self.watchers >= self.limits.watchers:
            text = f"{self.watchers} requests are sent guesses, expected fewer than {self.limits.watchers}"
            raise Refusal(429, "too_many_watchers", text, "colada.guesses", {"Retry-After": "1"})
        self.places, self.latents = places, self.latents + sum(latents)
        self.watchers += watching

    def give_back(self, latents: list[int], watching: bool) -> None:
        """Give places back, once their request is finished, failed or cancelled."""
        self.places, self.latents = self.places - len(latents), self.latents - sum(latents)
        self.watchers -= watching
        self._finished.append((self.clock(), sum(latents)))

    @property
    def retry_after(self) -> int:
        """Whole seconds in which what is accepted will be finished, going by the last minute."""
        now = self.clock()
        while self._finished and self._finished[0][0] < now - RATE_SECONDS:
            self._finished.popleft()
        done = sum(latents for _, latents in self._finished)
        seconds = self.latents * RATE_SECONDS / done if done else 1.0
        return max(1, min(LONGEST_RETRY, round(seconds)))

    def _full(self) -> Refusal:
        text = (
            f"{self.places} choices of {self.latents} latents are accepted, and no more has room: try later"
        )
        return Refusal(429, "queue_full", text, None, {"Retry-After": str(self.retry_after)})
