"""Who may ask, and who has room: refusals, limits, hosts and keys, and the places that requests take."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from colada.errors import ColadaError, shown
from colada.generate.settings import UNGUIDED

logger = logging.getLogger("colada.serve")

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
PROBES = ("/health", "/ready", "/live")
OPEN_PATHS = (*PROBES, "/openapi.json", "/")
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "stop")
EXTENSION = (
    *("steps", *UNGUIDED, "guidance_interval", "early_end"),
    *("candidates", "solver", "schedule", "whole_sentences", "noise", "end_ids"),
)
"""Settings of a generation, as fields of OpenAI's and of ours."""
KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}


class Refusal(HTTPException):
    """A request that is not served, as OpenAI's clients read it: its code is for programs, param a field."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, **headers: str
    ) -> None:
        if status == 500:  # The same request would fail again.
            headers["x-should-retry"] = "false"
        super().__init__(status, message, {name.replace("_", "-"): text for name, text in headers.items()})
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        """Return what the client is sent."""
        kind = KINDS.get(self.status_code, "invalid_request_error")
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def as_refusal(error: Exception) -> Refusal:
    """Return an error as a client is told it: a ColadaError by its text, nothing of any other."""
    if isinstance(error, Refusal):
        return error
    if not isinstance(error, ColadaError):
        logger.error("a request has failed", exc_info=error)
        return Refusal(500, "internal", "this request has failed")
    word = str(error).replace("=", " ").partition(" ")[0].rstrip(":")  # The name of what is at fault.
    names = {"prompt": "prompt", "text": "prompt", "chat": "messages"} | {name: name for name in SAMPLING}
    param = f"colada.{word}" if word in EXTENSION else names.get(word)
    long = str(error).startswith("prompt of ")
    return Refusal(400, "context_length_exceeded" if long else "invalid_value", str(error), param)


def invalid(param: str, value: object, expected: str, code: str = "invalid_value") -> Refusal:
    """Return the refusal of a field's value."""
    return Refusal(400, code, f"{param}={shown(value)}, expected {expected}", param)


@dataclass(frozen=True)
class Limits:
    """What one process serves.

    Attributes:
        slots: requests under way together, a model.
        waiting: choices that may wait beside them.
        capacity: latents (a baseline's: tokens) under way together, a model; a longer request is refused.
        context: tokens of the longest request, prompt and all; None: what the KV cache holds.
        max_tokens, max_steps: of a request.
        watchers: requests that may be sent guesses at once: these cost the engine a quarter more.
        timeout, queue, body: seconds for a whole request, waiting included; until the engine begins with it;
            and for its body to be there.
        reader: seconds after which a client that takes nothing of its stream is given up.
        ping: seconds of silence after which a stream has a comment; 0 is none.
        drain: seconds that accepted requests have to finish once the process is told to end.
        stall: seconds without a step of a busy engine after which the server is not healthy.
    """

    slots: int = 64
    waiting: int = 256
    capacity: int = 8192
    context: int | None = None
    max_tokens: int = 8192
    max_steps: int = 64
    watchers: int = 8
    timeout: float = 600
    queue: float = 60
    body: float = 30
    reader: float = 60
    ping: float = 15
    drain: float = 30
    stall: float = 60


@dataclass(frozen=True)
class Policy:
    """Who may ask.

    Attributes:
        keys: one of them has to be sent; none: nobody needs one. Who changes the list changes who may ask.
        hosts: names by which the server may be called; "*" is any.
        origins: whose pages may ask, beside the server's own; "*" is any.
        public_metrics: show the metrics without a key.
        log: a line a request as "text", "json" or "off".
        log_prompts: with what was asked in it.
        connections: requests that are open at once; more get 503, but for :data:`PROBES`.
    """

    keys: list[str] = field(default_factory=list)
    hosts: Sequence[str] = LOOPBACK_HOSTS
    origins: Sequence[str] = ()
    public_metrics: bool = False
    log: str = "text"
    log_prompts: bool = False
    connections: int = 1024

    def check(self, path: str, headers: Headers) -> str:
        """Return the name of the request's key in logs.

        Raises:
            Refusal: for another host, a page of another origin, or without a right key where one is needed.
        """
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise Refusal(400, "invalid_value", f"{len(hosts)} Host headers, expected one", "host")
        name, origin = re.sub(r":\d*$", "", hosts[0]).lower(), headers.get("origin", "")
        if not {"*", name} & set(self.hosts):
            raise Refusal(403, "host_not_allowed", f"host {name[:100]!a} is not served; see --allowed-host")
        same_origin = origin.partition("://")[2].lower() == hosts[0].lower()
        if origin and not same_origin and not {"*", origin} & set(self.origins):
            raise Refusal(403, "origin_not_allowed", f"{origin[:100]!a} may not ask; see --cors-origin")
        free = path in OPEN_PATHS or path.startswith("/playground/")
        if not self.keys or free or (path == "/metrics" and self.public_metrics):
            return "-"
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = key.strip().encode() if scheme.lower() == "bearer" else b""
        right = [hmac.compare_digest(sent, one.encode()) for one in self.keys]  # All: time says nothing.
        if not any(right):
            text = "no right key, expected `Authorization: Bearer KEY`"
            raise Refusal(401, "invalid_api_key", text, WWW_Authenticate="Bearer")
        return hashlib.sha256(sent).hexdigest()[:6]


@dataclass
class Admission:
    """Counts the places of the choices that are accepted and not finished.

    As many as there are slots may be under way, and ``waiting`` more wait; in latents, four times
    the limit's ``capacity`` waits beside one that is under way.
    """

    limits: Limits
    places: int = 0
    latents: int = 0
    watchers: int = 0

    def require_place(self, places: int = 1, latents: int = 0) -> None:
        """Raise Refusal where there is no room; called before a body is read as JSON, too."""
        most = self.limits.slots + self.limits.waiting
        crowded = self.places and self.latents + latents > 5 * self.limits.capacity
        if self.places + places > most or crowded:
            text = f"{self.places} choices of {self.latents} latents are accepted, and no more has room"
            seconds = min(60, 1 + self.places // self.limits.slots)
            raise Refusal(429, "queue_full", text, Retry_After=str(seconds))

    def take(self, latents: Sequence[int], watching: bool) -> None:
        """Take the places of a request's choices, all or none; raises Refusal where there is no room."""
        self.require_place(len(latents), sum(latents))
        if watching and self.watchers >= self.limits.watchers:
            text = f"{self.watchers} requests are sent guesses, expected fewer than {self.limits.watchers}"
            raise Refusal(429, "too_many_watchers", text, "colada.guesses", Retry_After="1")
        self._count(1, latents, watching)

    def give_back(self, latents: Sequence[int], watching: bool) -> None:
        """Give places back, once their request has ended."""
        self._count(-1, latents, watching)

    def _count(self, sign: int, latents: Sequence[int], watching: bool) -> None:
        self.places += sign * len(latents)
        self.latents += sign * sum(latents)
        self.watchers += sign * watching
