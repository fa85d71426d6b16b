"""What a request passes before any route: an id, hosts and keys, bounds, and a line that is logged."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from colada.serve.admission import PROBES, Policy, Refusal, as_refusal
from colada.serve.protocol import read_json

MOST_BODY, MOST_HEADERS, MOST_HEADER_BYTES = 2**20, 64, 2**14

logger = logging.getLogger("colada.serve")


class Edge:
    """The outermost layer.

    What a route leaves in ``state.on_end`` is done when its request has ended, however it did; what it writes
    into ``state.log`` is logged.

    Args:
        closed: why no requests are taken, if they are not.
        count: told the route, status, seconds and log of each request.
    """

    def __init__(
        self, app: ASGIApp, policy: Policy, closed: Callable[[], str | None], count: Callable[..., None]
    ) -> None:
        self.app, self.policy, self.closed, self.count = app, policy, closed, count
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, begin, status = Headers(scope=scope), time.monotonic(), 0
        clients_id = headers.get("x-request-id", "")
        request_id = clients_id if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", clients_id) else uuid.uuid4().hex
        log: dict[str, Any] = {"id": request_id}
        self._open += 1

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            with ExitStack() as stack:
                scope.setdefault("state", {}).update(on_end=stack, log=log)
                try:
                    self._check(scope, headers, log)
                    await self.app(scope, receive, answer)
                except Exception as error:
                    refusal = as_refusal(error)
                    log["error"] = refusal.code
                    if not status:
                        await refused(refusal)(scope, receive, answer)
        finally:
            self._open -= 1
            status, seconds = status or 499, round(time.monotonic() - begin, 3)
            self.count(getattr(scope.get("route"), "path", "other"), status, seconds, log)
            line = {
                "status": status,
                "method": scope["method"],
                "path": scope["path"],
                "seconds": seconds,
                **log,
            }
            if self.policy.log == "json":
                logger.info(json.dumps({"time": round(time.time(), 3), **line}))
            elif self.policy.log == "text":
                line["path"] = ascii(line["path"])[1:-1]
                line |= {name: json.dumps(value) for name, value in log.items() if isinstance(value, list)}
                logger.info(" ".join(f"{name}={value}" for name, value in line.items()))

    def _check(self, scope: Scope, headers: Headers, log: dict[str, Any]) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        count, size = len(scope["headers"]), sum(len(name) + len(value) for name, value in scope["headers"])
        if count > MOST_HEADERS or size > MOST_HEADER_BYTES:
            text = f"{count} headers of {size} bytes, expected at most {MOST_HEADERS} of {MOST_HEADER_BYTES}"
            raise Refusal(431, "headers_too_large", text, Connection="close")
        if "transfer-encoding" in headers and "content-length" in headers:
            text = "Content-Length and Transfer-Encoding, expected one of them"
            raise Refusal(400, "invalid_value", text, Connection="close")
        if self._open > self.policy.connections and path not in PROBES:
            text = f"{self._open} requests are open, expected at most {self.policy.connections}"
            raise Refusal(503, "too_many_connections", text, Retry_After="5", Connection="close")
        log["key"] = self.policy.check(path, headers)
        if scope["method"] == "POST" and (closed := self.closed()) is not None:
            raise Refusal(503, closed, f"no requests are taken: {closed}", Retry_After="5")


class Body(Request):
    """A request whose body is read with bounds, and as strict JSON."""

    async def body(self) -> bytes:
        """Return the whole body. Raises Refusal for one too large, too slow or of another type."""
        if hasattr(self, "_body"):
            return self._body
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or self.headers.get("content-encoding", "identity") != "identity":
            text = f"content of type {kind[:60]!r}, expected application/json, not compressed"
            raise Refusal(415, "unsupported_media_type", text, Connection="close")
        body, seconds = bytearray(), self.app.state.service.limits.body
        try:
            async with asyncio.timeout(seconds):
                async for part in self.stream():
                    body += part
                    if len(body) > MOST_BODY:
                        text = f"a body of more than {MOST_BODY} bytes, expected at most so many"
                        raise Refusal(413, "body_too_large", text, Connection="close")
        except TimeoutError:
            text = f"the body was not there after {seconds:g} s"
            raise Refusal(408, "body_timeout", text, Connection="close") from None
        self._body = bytes(body)
        return self._body

    async def json(self) -> Any:
        """Return what the body says; it is not read as JSON where nothing has room. Raises Refusal."""
        if self.scope["path"].endswith("/completions"):
            self.app.state.service.admission.require_place()
        return read_json(await self.body())


def refused(refusal: Refusal) -> JSONResponse:
    """Return the answer that refuses."""
    return JSONResponse(refusal.body(), refusal.status_code, refusal.headers)
