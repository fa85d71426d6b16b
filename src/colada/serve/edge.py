"""What a request passes before any route: hosts, keys, sizes, and the line that is logged of it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from colada.serve.admission import Limits, Refusal
from colada.serve.metrics import Metrics
from colada.serve.protocol import read_json

MOST_BODY = 2**20
MOST_HEADERS, MOST_HEADER_BYTES = 64, 2**14
OPEN_PATHS = ("/health", "/ready", "/live", "/openapi.json", "/", "/playground/")
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")

logger = logging.getLogger("colada.serve")


@dataclass(frozen=True)
class Policy:
    """Who may ask.

    Attributes:
        keys: one of them has to be sent; none: nobody needs one.
        hosts: names by which the server may be called, without ports; "*" is any.
        origins: whose pages may ask, beside the server's own; "*" is any.
        public_metrics: show the metrics without a key.
        log: "text", "json" or "off".
    """

    keys: Sequence[str] = ()
    hosts: Sequence[str] = LOOPBACK_HOSTS
    origins: Sequence[str] = ()
    public_metrics: bool = False
    log: str = "text"

    def require_host(self, headers: Headers) -> None:
        """Raise Refusal unless the request names one host, and one that is known."""
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise Refusal(400, "invalid_value", f"{len(hosts)} Host headers, expected one", "host")
        name = re.sub(r":\d*$", "", hosts[0]).lower()
        if "*" not in self.hosts and name not in self.hosts:
            text = f"host {name[:100]!r} is not served here; --allowed-host takes more"
            raise Refusal(403, "host_not_allowed", text)

    def require_origin(self, headers: Headers) -> None:
        """Raise Refusal for a page of another origin than the server's, unless it is known."""
        origin = headers.get("origin")
        if origin is None or origin in self.origins or "*" in self.origins:
            return
        if origin.partition("://")[2].lower() != headers["host"].lower():
            text = f"pages of {origin[:100]!a} may not ask; --cors-origin lets them"
            raise Refusal(403, "origin_not_allowed", text)

    def require_key(self, path: str, headers: Headers) -> str:
        """Return the name of a key in logs. Raises Refusal without a right one where one is needed."""
        free = path in OPEN_PATHS or path.startswith("/playground/")
        if not self.keys or free or (path == "/metrics" and self.public_metrics):
            return "-"
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = key.strip().encode() if scheme.lower() == "bearer" else b""
        # Against all of them: how long it takes says nothing.
        right = [hmac.compare_digest(sent, one.encode()) for one in self.keys]
        if not any(right):
            text = "no right key: send `Authorization: Bearer KEY`"
            raise Refusal(401, "invalid_api_key", text, None, {"WWW-Authenticate": "Bearer"})
        return hashlib.sha256(sent).hexdigest()[:6]


class Edge:
    """The outermost layer: refuses by header, gives every request an id, and logs and counts it.

    What a route leaves in ``scope["state"]["on_end"]`` is done when the request has ended, however it did;
    what it writes into ``scope["state"]["log"]`` is logged.
    """

    def __init__(
        self, app: ASGIApp, policy: Policy, limits: Limits, metrics: Metrics, closed: Callable[[], str | None]
    ) -> None:
        self.app, self.policy, self.limits, self.metrics, self.closed = app, policy, limits, metrics, closed
        self.connections = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, begin, status = Headers(scope=scope), time.monotonic(), 0
        wanted = headers.get("x-request-id", "")
        request_id = wanted if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", wanted) else uuid.uuid4().hex
        log: dict[str, Any] = {"id": request_id, "key": "-", "path": scope["path"]}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self.connections += 1
        try:
            with ExitStack() as stack:
                scope.setdefault("state", {}).update(on_end=stack, log=log)
                try:
                    self._check(scope, headers, log)
                except Refusal as refusal:
                    self.metrics.rejected.labels(refusal.code).inc()
                    await refused(refusal)(scope, receive, answer)
                else:
                    await self.app(scope, receive, answer)
        finally:
            self.connections -= 1
            self._tell({**log, "status": status or 499, "seconds": round(time.monotonic() - begin, 3)}, scope)

    def _check(self, scope: Scope, headers: Headers, log: dict[str, Any]) -> None:
        count, size = len(scope["headers"]), sum(len(name) + len(value) for name, value in scope["headers"])
        if count > MOST_HEADERS or size > MOST_HEADER_BYTES:
            text = f"{count} headers of {size} bytes, expected at most {MOST_HEADERS} of {MOST_HEADER_BYTES}"
            raise Refusal(431, "headers_too_large", text, None, {"Connection": "close"})
        if "transfer-encoding" in headers and "content-length" in headers:
            text = "Content-Length and Transfer-Encoding, expected one of them"
            raise Refusal(400, "invalid_value", text, None, {"Connection": "close"})
        if self.connections > self.limits.connections:
            text = f"{self.connections} requests at once, expected at most {self.limits.connections}"
            raise Refusal(503, "too_many_connections", text, None, {"Retry-After": "1"})
        self.policy.require_host(headers)
        self.policy.require_origin(headers)
        log["key"] = self.policy.require_key(scope["path"], headers)
        closed = self.closed()
        if closed is not None and scope["method"] == "POST":
            raise Refusal(503, closed, f"the server is {closed}", None, {"Retry-After": "5"})

    def _tell(self, log: dict[str, Any], scope: Scope) -> None:
        route = scope.get("route")
        endpoint = getattr(route, "path", "other") if log["status"] not in (404, 405) else "other"
        self.metrics.answers.labels(endpoint, str(log["status"])).inc()
        self.metrics.whole.observe(log["seconds"])
        if self.policy.log == "json":
            logger.info(json.dumps({"time": round(time.time(), 3), "method": scope["method"], **log}))
        elif self.policy.log == "text":
            rest = " ".join(
                f"{name}={value}" for name, value in log.items() if name not in ("path", "status")
            )
            logger.info("%s %s %s %s", log["status"], scope["method"], ascii(log["path"])[1:-1], rest)


class Body(Request):
    """A request whose body is read with bounds, and as strict JSON."""

    async def body(self) -> bytes:
        """Return the whole body. Raises Refusal for one too large, too slow or of another type."""
        if not hasattr(self, "_body"):
            kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" or self.headers.get("content-encoding", "identity") != "identity":
                text = f"content of type {kind[:60]!r}, expected application/json, not compressed"
                raise Refusal(415, "unsupported_media_type", text, None, {"Connection": "close"})
            limits, parts, size = self.app.state.service.limits, [], 0
            try:
                async with asyncio.timeout(limits.body):
                    async for part in self.stream():
                        parts.append(part)
                        if (size := size + len(part)) > MOST_BODY:
                            text = f"a body of more than {MOST_BODY} bytes, expected at most so many"
                            raise Refusal(413, "body_too_large", text, None, {"Connection": "close"})
            except TimeoutError:
                text = f"the body was not there after {limits.body:g} s"
                raise Refusal(408, "body_timeout", text, None, {"Connection": "close"}) from None
            self._body = b"".join(parts)
        return self._body

    async def json(self) -> Any:
        """Return what the body says; it is not read as JSON where nothing has room. Raises Refusal."""
        if self.scope["path"].endswith("/completions"):
            self.app.state.service.admission.require_place()
        return read_json(await self.body())


def refused(refusal: Refusal) -> JSONResponse:
    """Return the answer that refuses."""
    return JSONResponse(refusal.body(), refusal.status_code, refusal.headers)
