"""The server's routes, as an ASGI app that any ASGI server runs: :func:`create_app`."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import generate_latest
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from colada import __version__
from colada.errors import ColadaError, one_of
from colada.serve import protocol
from colada.serve.admission import Admission, Limits, Policy, Refusal, as_refusal, invalid
from colada.serve.answers import Job, Reply, as_json, open_job
from colada.serve.driver import Driver, Models, News, Ticket
from colada.serve.edge import Body, Edge, refused
from colada.serve.metrics import Metrics
from colada.serve.models import Served

PLAYGROUND = Path(__file__).parent / "playground"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
Result = TypeVar("Result")
LONG_BODY = 8192
"""Bytes from which on a request is tokenised beside the loop."""
MOST_ENCODED = 2048
"""Tokens that are encoded or decoded between two steps of the engine."""
ELSEWHERE = {
    "/v1/embeddings": "latents of a Text VAE are no sentence embeddings; /colada/encode gives them",
    "/v1/responses": "use /v1/chat/completions",
    "/v1/batches": "use `colada generate --file FILE --json`",
    "/v1/files": "use `colada generate --file FILE --json`",
    "/infill": "use /v1/completions with `suffix`",
}
"""What OpenAI's or other servers have and this one has not, and where to go instead."""


class _Route(APIRoute):
    """Reads bodies by itself, with bounds and without the library's way through forms."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if (model := get_type_hints(self.endpoint).get("body")) is None:
            return super().get_route_handler()

        async def handle(request: Request) -> Response:
            request = Body(request.scope, request.receive)
            try:
                body = model.model_validate(await request.json())
            except ValidationError as error:
                raise protocol.field_refused(error.errors(include_url=False)) from None
            return await self.endpoint(request, body)

        return handle


class Service:
    """The handlers of all routes, and what they share."""

    def __init__(
        self, driver: Driver, limits: Limits, metrics: Metrics, policy: Policy, lenient: bool
    ) -> None:
        self.driver, self.admission, self.metrics = driver, Admission(limits), metrics
        self.limits, self.policy, self.lenient, self.draining = limits, policy, lenient, False
        places = ("places", "latents", "watchers")
        counts = {what: partial(getattr, self.admission, what) for what in places}
        metrics.watch(counts, lambda: time.monotonic() - driver.heartbeat)

    @property
    def status(self) -> str:
        """ready, or why no requests are taken: loading, draining, stopped, engine_stalled, engine_dead."""
        status = self.driver.status
        return "draining" if self.draining and status == "ready" else status

    def served(self, name: str | None, cola: bool = False) -> Served:
        """Return a model by its name. Raises Refusal where there is none of it, or it has no latents."""
        models = self.driver.models
        if not models:
            raise Refusal(503, "loading", "no model is loaded yet", Retry_After="5")
        if name is None and len(models) > 1:
            raise Refusal(400, "missing_parameter", f"model is missing, {one_of(models)}", "model")
        if name is not None and name not in models:
            raise Refusal(404, "model_not_found", f"no model {name[:100]!r}, {one_of(models, name)}", "model")
        served = models[name or next(iter(models))]
        if cola and served.model.arch != "cola":
            raise invalid("model", served.name, "a Cola DLM: this one has no latents")
        return served

    # --- text --------------------------------------------------------------------------------

    async def completions(self, request: Request, body: protocol.CompletionRequest) -> Response:
        """Continue prompts, or fill a hole before a suffix."""
        return await self._write(request, body)

    async def chat(self, request: Request, body: protocol.ChatRequest) -> Response:
        """Answer a conversation."""
        return await self._write(request, body)

    async def _write(self, request: Request, body: protocol.Common) -> Response:
        """Answer with text: as a stream of events, or at once when all is written."""
        check = partial(open_job, body, self.served(body.model), self.limits, self.lenient)
        job = await run_in_threadpool(check) if len(await request.body()) > LONG_BODY else check()
        if self.policy.log_prompts:
            request.state.log["prompts"] = [_shown(job.served, ids) for ids in job.prompts]
        on_end = request.state.on_end
        self.admission.take(job.latents, job.watching)
        on_end.callback(self.admission.give_back, job.latents, job.watching)
        self.driver.submit(job.ticket)
        on_end.callback(self._close, job.ticket, request)
        headers = {"x-colada-ignored": ", ".join(map(ascii, job.ignored))} if job.ignored else {}
        reply = Reply(job)
        if not body.stream:
            await _unless_gone(request.receive, self._collect(job, reply, request))
            return JSONResponse(reply.answer(), headers=headers)
        # Within a step; who goes away meanwhile is noticed behind it.
        await job.ticket.accepted(self.limits.queue)
        return _Stream(self._parts(job, reply, request), self.limits.reader, headers)

    def _close(self, ticket: Ticket, request: Request) -> None:
        self.driver.close(ticket)
        self.metrics.closed(ticket.begun, ticket.replaced, request.state.log)

    async def _collect(self, job: Job, reply: Reply, request: Request) -> None:
        await job.ticket.accepted(self.limits.queue)
        async for _ in self._steps(job, reply, request):
            pass

    async def _steps(self, job: Job, reply: Reply, request: Request) -> AsyncIterator[News]:
        """Yield what each step adds once the reply has it, and count it; nothing after silence."""
        last = dict.fromkeys(range(len(job.ticket.choices)), time.monotonic())
        begun = set[int]()
        async for news in job.ticket.steps(self.limits.timeout):
            for number, chunk in news:
                reply.add(number, chunk)
                if chunk.step is not None:
                    self.metrics.guesses.labels("sent").inc()
                else:
                    now = time.monotonic()
                    seconds = self.metrics.between if number in begun else self.metrics.first
                    seconds.observe(now - last[number])
                    last[number] = now
                    begun.add(number)
            if reply.finished:
                self._count(job, reply, request)
            yield news

    def _count(self, job: Job, reply: Reply, request: Request) -> None:
        usage, name, reasons = reply.usage, job.served.name, reply.reasons
        for kind in ("prompt", "completion"):
            self.metrics.tokens.labels(name, kind).inc(usage[f"{kind}_tokens"])
        for reason in reasons:
            self.metrics.choices.labels(name, reason).inc()
        request.state.log.update(usage, finish="+".join(sorted(set(reasons))))

    async def _parts(self, job: Job, reply: Reply, request: Request) -> AsyncGenerator[str, None]:
        """Yield a stream's events, those of one step together; an error is the last, without ``[DONE]``."""
        try:
            yield _framed(reply.begin())
            async for news in self._steps(job, reply, request):
                events = [event for number, chunk in news for event in reply.events(number, chunk)]
                if reply.finished:
                    events += reply.end()
                yield _framed(events) if news else ": ping\n\n"
        except Exception as error:
            refusal = as_refusal(error)
            request.state.log["error"] = refusal.code
            yield _framed([as_json(refusal.body())])

    # --- tokens and latents --------------------------------------------------------------------

    async def tokenize(self, request: Request, body: protocol.TokenizeRequest) -> Response:
        """Return a text's tokens."""
        served = self.served(body.model)
        tokens = await run_in_threadpool(_ids, served, body.prompt, "prompt")
        context = served.context(self.limits)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": context})

    async def detokenize(self, request: Request, body: protocol.DetokenizeRequest) -> Response:
        """Return the text of tokens, special ones included."""
        served = self.served(body.model)
        return JSONResponse({"prompt": _text(served, _ids(served, body.tokens, "tokens"))})

    async def encode(self, request: Request, body: protocol.EncodeRequest) -> Response:
        """Return the Text VAE's latents of a text."""
        served = self.served(body.model, cola=True)
        ids = _ids(served, body.input, "input")
        if len(ids) > MOST_ENCODED:
            raise invalid("input", len(ids), f"at most {MOST_ENCODED} tokens", "context_length_exceeded")

        def work() -> dict[str, Any]:
            latents = served.model.encode(ids).float().cpu()  # type: ignore[attr-defined]
            packed = base64.b64encode(latents.numpy().tobytes()).decode()
            numbers = body.encoding_format == "float"
            return {"latents": latents.tolist() if numbers else packed, "shape": list(latents.shape)}

        return JSONResponse(await _unless_gone(request.receive, self.driver.aside(work)))

    async def decode(self, request: Request, body: protocol.DecodeRequest) -> Response:
        """Return the likeliest tokens of latents."""
        served, sent = self.served(body.model, cola=True), body.latents

        def work() -> list[int]:
            import torch

            try:
                if isinstance(sent, str):
                    data = bytearray(base64.b64decode(sent, validate=True))
                    width = served.model.vae.config.latent_dim  # type: ignore[attr-defined]
                    latents = torch.frombuffer(data, dtype=torch.float32).view(-1, width)
                else:
                    latents = torch.tensor(sent, dtype=torch.float32)
                if len(latents) * served.sizes[0] > MOST_ENCODED:
                    raise ValueError
                ids: list[int] = served.model.decode(latents)  # type: ignore[attr-defined]
            except (ValueError, RuntimeError):  # base64's own is a ValueError.
                text = f"rows of float32, or these in base64, at most {MOST_ENCODED} tokens"
                raise invalid("latents", sent, text) from None
            except ColadaError as error:
                raise Refusal(400, "invalid_value", str(error), "latents") from None
            return ids

        ids = await _unless_gone(request.receive, self.driver.aside(work))
        return JSONResponse({"text": _text(served, ids), "tokens": ids})

    # --- the server itself -------------------------------------------------------------------

    async def models(self) -> Response:
        """List the models."""
        self.served(next(iter(self.driver.models), None))
        cards = [served.card(self.limits) for served in self.driver.models.values()]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, name: str) -> Response:
        """Describe a model."""
        return JSONResponse(self.served(name).card(self.limits))

    async def health(self) -> Response:
        """Say whether requests are taken, and how many are."""
        places, slots = self.admission.places, self.limits.slots
        running = min(places, slots)
        load = {
            "running": running,
            "waiting": places - running,
            "slots": slots,
            "key": bool(self.policy.keys),
        }
        status, headers = (200, {}) if self.status == "ready" else (503, {"Retry-After": "5"})
        return JSONResponse({"status": self.status, **load}, status, headers)

    async def live(self) -> Response:
        """Say that the loop runs."""
        return JSONResponse({"status": "live"})

    async def show_metrics(self) -> Response:
        """Return what is counted, for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def watch(self) -> None:
        """Look at who waits, ten times a second, and measure by how much the loop was late at most."""
        while True:
            worst = 0.0
            for _ in range(10):
                begin = time.monotonic()
                await asyncio.sleep(0.1)
                worst = max(worst, time.monotonic() - begin - 0.1)
                self.driver.look()
            self.metrics.lag.set(worst)


def create_app(
    open_models: Callable[[], Models],
    limits: Limits,
    policy: Policy,
    *,
    lenient: bool = False,
    on_end: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Return the app; the models are loaded when it starts.

    Args:
        open_models: loads them, by name; see :func:`colada.serve.models.open_served`.
        limits, policy: of the server.
        lenient: leave unknown fields out, and name them in the header ``x-colada-ignored``.
        on_end: called when the engine has ended, also where it has failed.
    """
    metrics = Metrics()
    driver = Driver(open_models, limits, metrics, on_end)
    service = Service(driver, limits, metrics, policy, lenient)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        driver.start()
        watch = asyncio.create_task(service.watch())
        yield
        watch.cancel()
        await run_in_threadpool(driver.stop)

    app = FastAPI(title="Colada", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.router.route_class = _Route
    _add_routes(app, service)
    app.add_exception_handler(HTTPException, _refuse)
    closed = lambda: None if service.status == "ready" else service.status  # noqa: E731
    app.add_middleware(Edge, policy=policy, closed=closed, count=metrics.request)
    if policy.origins:
        allowed: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=policy.origins, **allowed)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    errors: dict[int | str, Any] = {"default": {"model": protocol.ErrorAnswer}}
    stream: Any = {200: {"content": {"text/event-stream": {}}}}
    unready: Any = {503: {"model": protocol.Health}}
    routes: list[tuple[str, str, Any, Any, Any]] = [
        ("POST", "/v1/completions", service.completions, protocol.CompletionAnswer, stream),
        ("POST", "/v1/chat/completions", service.chat, protocol.ChatAnswer, stream),
        ("POST", "/tokenize", service.tokenize, protocol.Tokens, {}),
        ("POST", "/detokenize", service.detokenize, protocol.Spelled, {}),
        ("POST", "/colada/encode", service.encode, protocol.Latents, {}),
        ("POST", "/colada/decode", service.decode, protocol.Decoded, {}),
        ("GET", "/v1/models", service.models, protocol.ModelList, {}),
        ("GET", "/v1/models/{name:path}", service.model, protocol.ModelCard, {}),
        ("GET", "/health", service.health, protocol.Health, unready),
        ("GET", "/ready", service.health, protocol.Health, unready),
        ("GET", "/live", service.live, protocol.Health, {}),
    ]
    for method, path, handler, model, more in routes:
        responses = {**errors, **more}
        app.add_api_route(path, handler, methods=[method], response_model=model, responses=responses)
    app.add_api_route("/metrics", service.show_metrics, include_in_schema=False)
    for path in ELSEWHERE:
        app.router.add_route(path, partial(_elsewhere, path), ["GET", "POST"], include_in_schema=False)
    if PLAYGROUND.is_dir():
        pages = _Pages(directory=PLAYGROUND)
        app.mount("/playground", pages)
        app.router.add_route("/", pages.index, ["GET"], include_in_schema=False)


async def _elsewhere(path: str, request: Request) -> Response:
    raise Refusal(404, "not_supported", f"{path} is not served: {ELSEWHERE[path]}")


class _Pages(StaticFiles):
    """The playground's files, with headers of their own."""

    def file_response(self, *arguments: Any, **more: Any) -> Response:
        response = super().file_response(*arguments, **more)
        response.headers.update(PAGE_HEADERS)
        return response

    async def index(self, request: Request) -> Response:
        return await self.get_response("index.html", request.scope)


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer with an error: ours, or the router's."""
    refusal = error
    if isinstance(error, HTTPException) and not isinstance(error, Refusal):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_value")
        text = f"{request.method} {request.url.path[:100]}: {error.detail}"
        refusal = Refusal(error.status_code, code, ascii(text)[1:-1], None, **(error.headers or {}))
    assert isinstance(refusal, Refusal)
    request.state.log["error"] = refusal.code
    return refused(refusal)


def _framed(events: Sequence[str]) -> str:
    """Return JSON texts as server-sent events."""
    return "".join(f"data: {event}\n\n" for event in events)


class _Stream(Response):
    """Server-sent events, in parts of what there is at one moment: sending a part costs more than its events.

    Args:
        parts: of the body; empty ones are left out.
        seconds: after which a client that takes nothing is given up.
    """

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncGenerator[str, None], seconds: float, headers: Mapping[str, str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self.parts, self.seconds = parts, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all parts, unless the client goes or takes none."""
        try:
            await _unless_gone(receive, self._send(send))
        except Refusal as refusal:  # The status has left already.
            scope["state"]["log"]["error"] = refusal.code

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body: Message = {"type": "http.response.body"}
        async with aclosing(self.parts) as parts:
            async for part in parts:
                if part:
                    try:
                        async with asyncio.timeout(self.seconds):
                            await send({**body, "body": part.encode(), "more_body": True})
                    except TimeoutError:
                        text = f"nothing was read for {self.seconds:g} s"
                        raise Refusal(499, "client_slow", text) from None
        await send(body)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what work does, unless the client goes first. Raises Refusal, that nobody reads, if it does."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(499, "client_gone", "the client has closed the connection")
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _ids(served: Served, value: str | list[int], param: str) -> list[int]:
    try:
        return served.model.ids(value)
    except ColadaError as error:
        raise Refusal(400, "invalid_value", str(error), param) from None


def _shown(served: Served, ids: Sequence[int]) -> str | list[int]:
    """Return a prompt for the log: its text, or its ids where there is no tokenizer."""
    tokenizer = served.model.tokenizer
    return list(ids) if tokenizer is None else tokenizer.decode(ids, skip_special=False)


def _text(served: Served, ids: list[int]) -> str:
    if served.model.tokenizer is None:
        raise Refusal(400, "invalid_value", f"{served.name} has no tokenizer", "model")
    return served.model.tokenizer.decode(ids, skip_special=False)
