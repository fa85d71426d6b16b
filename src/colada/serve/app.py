"""The server's routes, as an ASGI app that any ASGI server runs: :func:`create_app`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, JSONResponse
from starlette.staticfiles import StaticFiles

from colada import __version__
from colada.errors import ColadaError
from colada.serve import protocol
from colada.serve.admission import Admission, Limits, Refusal, invalid
from colada.serve.answers import Job, Writer, as_json, open_job
from colada.serve.driver import Driver, Models, News, as_refusal
from colada.serve.edge import Body, Edge, Policy, refused
from colada.serve.metrics import Metrics
from colada.serve.models import Served

Answer = TypeVar("Answer")
logger = logging.getLogger("colada.serve")

PLAYGROUND = Path(__file__).parent / "playground"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
LONG_BODY = 8192
"""Bytes from which on a request is tokenised beside the loop."""
MOST_ENCODED = 2048
"""Tokens that are encoded or decoded between two rounds of the engine."""
LAG_SECONDS = 0.1
ELSEWHERE = {
    "/v1/embeddings": "latents of a Text VAE are no sentence embeddings; /colada/encode gives them",
    "/v1/responses": "use /v1/chat/completions",
    "/v1/batches": "use `colada generate --file FILE --json`",
    "/v1/files": "use `colada generate --file FILE --json`",
    "/infill": "use /v1/completions with `suffix`",
}
"""What OpenAI's or other servers have and this one has not, and where to go instead."""


class _Route(APIRoute):
    """Reads bodies with bounds."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(Body(request.scope, request.receive))

        return handle


class Service:
    """The handlers of all routes, and what they share."""

    def __init__(
        self, driver: Driver, admission: Admission, metrics: Metrics, keyed: bool, lenient: bool
    ) -> None:
        self.driver, self.admission, self.metrics = driver, admission, metrics
        self.keyed, self.lenient, self.draining = keyed, lenient, False

    @property
    def limits(self) -> Limits:
        """Of the server."""
        return self.admission.limits

    @property
    def status(self) -> str:
        """loading, ready, draining, stalled, stopped or dead."""
        status = self.driver.status
        return "draining" if self.draining and status == "ready" else status

    def closed(self) -> str | None:
        """Return the code with which requests are refused, or None where they are taken."""
        codes = {"ready": None, "stalled": "engine_stalled", "stopped": "draining", "dead": "engine_dead"}
        return codes.get(self.status, self.status)

    def served(self, name: str | None) -> Served:
        """Return a model by its name. Raises Refusal where there is none of it."""
        models = self.driver.models
        if not models:
            raise Refusal(503, "loading", "no model is loaded yet", None, {"Retry-After": "5"})
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name is None:
            raise Refusal(
                400, "missing_parameter", f"model is missing, expected one of {', '.join(models)}", "model"
            )
        if name not in models:
            text = f"no model {name[:100]!r}, expected one of {', '.join(models)}"
            raise Refusal(404, "model_not_found", text, "model")
        return models[name]

    # --- text --------------------------------------------------------------------------------

    async def completions(self, request: Request, body: protocol.CompletionRequest) -> Response:
        """Continue prompts, or fill a hole before a suffix."""
        return await self._write(request, body)

    async def chat(self, request: Request, body: protocol.ChatRequest) -> Response:
        """Answer a conversation."""
        return await self._write(request, body)

    async def _write(self, request: Request, body: protocol.Common) -> Response:
        """Answer with text: as a stream of events, or at once when all is written."""
        served = self.served(body.model)
        arguments = (body, served, self.limits, self.lenient)
        if len(await request.body()) > LONG_BODY:
            job = await run_in_threadpool(open_job, *arguments)
        else:
            job = open_job(*arguments)
        self._begin(job, request)
        headers = {"x-colada-ignored": ", ".join(map(ascii, job.ignored))} if job.ignored else {}
        writer, begin = Writer(job), time.monotonic()
        await self._unless_gone(request, job.ticket.begun())
        if body.stream:
            return EventSourceResponse(
                self._events(job, writer, begin, request),
                headers=headers,
                media_type="text/event-stream; charset=utf-8",
                sep="\n",
                ping=self.limits.ping,
                ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
                send_timeout=self.limits.reader or None,
            )

        async def collect() -> None:
            async for news in self._news(job, begin):
                writer.add(news)

        await self._unless_gone(request, collect())
        self._finished(job, writer, request)
        return JSONResponse(writer.answer(), headers=headers)

    def _begin(self, job: Job, request: Request) -> None:
        """Take a job's places and hand it to the engine; both end with the request, however that does."""
        watching = job.ticket.guesses
        self.admission.take(job.latents, watching)
        on_end = request.scope["state"]["on_end"]
        on_end.callback(self.admission.give_back, job.latents, watching)
        self.driver.submit(job.ticket)
        on_end.callback(self.driver.close, job.ticket)

    async def _news(self, job: Job, begin: float) -> AsyncIterator[News]:
        """Yield what a job's choices grow by, and measure when they come. Raises Refusal where it is late."""
        last: dict[int, float] = {}
        try:
            async with asyncio.timeout(self.limits.timeout):
                async for news in job.ticket.news():
                    if news.chunk.step is None:
                        now = time.monotonic()
                        measured = self.metrics.between if news.number in last else self.metrics.first
                        measured.observe(now - last.get(news.number, begin))
                        last[news.number] = now
                    yield news
        except TimeoutError:
            text = f"not finished after {self.limits.timeout:g} s"
            raise Refusal(504, "deadline", text, None, {"x-should-retry": "false"}) from None

    async def _events(self, job: Job, writer: Writer, begin: float, request: Request) -> AsyncIterator[str]:
        """Yield a stream's events; an error is the last one, without ``[DONE]``."""
        try:
            for event in writer.begin():
                yield event
            async for news in self._news(job, begin):
                writer.add(news)
                for event in writer.events(news):
                    yield event
            self._finished(job, writer, request)
            for event in writer.end():
                yield event
        except Refusal as refusal:
            request.scope["state"]["log"]["error"] = refusal.code
            yield as_json(refusal.body())
        except Exception as error:
            yield as_json(as_refusal(error).body())

    def _finished(self, job: Job, writer: Writer, request: Request) -> None:
        usage = writer.usage
        for kind in ("prompt", "completion"):
            self.metrics.tokens.labels(job.served.name, kind).inc(usage[f"{kind}_tokens"])
        for reason in writer.reasons:
            self.metrics.finished.labels(job.served.name, reason).inc()
        self.metrics.replaced.inc(job.ticket.replaced)
        request.scope["state"]["log"].update(usage, reason="+".join(sorted(set(writer.reasons))))

    async def _unless_gone(self, request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Return a result, unless the client goes first. Raises Refusal, that nobody reads, if it does."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
        finally:
            for task in (working, watching):
                task.cancel()
                with suppress(asyncio.CancelledError, Refusal):
                    await task
        self.metrics.cancelled.labels("client").inc()
        raise Refusal(499, "client_gone", "the client has closed the connection")

    # --- tokens and latents --------------------------------------------------------------------

    async def tokenize(self, body: protocol.TokenizeRequest) -> Response:
        """Return a text's tokens."""
        served = self.served(body.model)
        try:
            tokens = await run_in_threadpool(served.model.ids, body.prompt)
        except ColadaError as error:
            raise Refusal(400, "invalid_value", str(error), "prompt") from None
        context = served.context(self.limits)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": context})

    async def detokenize(self, body: protocol.DetokenizeRequest) -> Response:
        """Return the text of tokens, special ones included."""
        model = self.served(body.model).model
        if model.tokenizer is None:
            raise Refusal(400, "invalid_value", "this model has no tokenizer", "tokens")
        try:
            ids = model.ids(body.tokens)
        except ColadaError as error:
            raise Refusal(400, "invalid_value", str(error), "tokens") from None
        return JSONResponse({"prompt": model.tokenizer.decode(ids, skip_special=False)})

    async def encode(self, body: protocol.EncodeRequest) -> Response:
        """Return the Text VAE's latents of a text."""
        served = self._cola(body.model)
        model: Any = served.model

        def work() -> tuple[Any, list[int]]:
            ids = model.ids(body.input)
            if len(ids) > MOST_ENCODED:
                raise Refusal(
                    400,
                    "context_length_exceeded",
                    f"{len(ids)} tokens, expected at most {MOST_ENCODED}",
                    "input",
                )
            latents = model.encode(ids).float().cpu()
            if body.encoding_format == "float":
                return latents.tolist(), list(latents.shape)
            return base64.b64encode(latents.numpy().tobytes()).decode(), list(latents.shape)

        latents, shape = await self.driver.aside(work)
        return JSONResponse({"latents": latents, "shape": shape})

    async def decode(self, body: protocol.DecodeRequest) -> Response:
        """Return the likeliest tokens of latents."""
        model: Any = self._cola(body.model).model
        width = model.vae.config.latent_dim
        rows: Any = body.latents
        if isinstance(rows, list) and any(len(row) != width for row in rows):
            raise invalid("latents", rows, f"rows of {width} numbers")

        def work() -> list[int]:
            import torch

            try:
                data = base64.b64decode(rows, validate=True) if isinstance(rows, str) else b""
                latents = (
                    torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, width)
                    if data
                    else torch.tensor(rows or [], dtype=torch.float32).view(-1, width)
                )
            except (binascii.Error, ValueError, RuntimeError, TypeError):
                raise invalid("latents", rows, f"base64 of float32, in rows of {width}") from None
            if len(latents) * model.vae.config.patch_size > MOST_ENCODED:
                raise Refusal(
                    400,
                    "context_length_exceeded",
                    f"{len(latents)} latents, expected at most {MOST_ENCODED} tokens",
                    "latents",
                )
            try:
                ids: list[int] = model.decode(latents)
            except ColadaError as error:
                raise Refusal(400, "invalid_value", str(error), "latents") from None
            return ids

        ids = await self.driver.aside(work)
        text = "" if model.tokenizer is None else model.tokenizer.decode(ids, skip_special=False)
        return JSONResponse({"text": text, "tokens": ids})

    def _cola(self, name: str | None) -> Served:
        served = self.served(name)
        if served.model.arch != "cola":
            raise Refusal(400, "invalid_value", f"{served.name} has no latents, expected a Cola DLM", "model")
        return served

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
        status, places = self.status, self.admission.places
        running = min(places, self.limits.slots)
        load = {
            "running": running,
            "waiting": places - running,
            "slots": self.limits.slots,
            "key": self.keyed,
        }
        retry = {} if status == "ready" else {"Retry-After": "5"}
        return JSONResponse({"status": status, **load}, 200 if status == "ready" else 503, retry)

    async def live(self) -> Response:
        """Say that the loop runs."""
        return JSONResponse({"status": "live"})

    async def show_metrics(self) -> Response:
        """Return what is counted, for Prometheus."""
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


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
    metrics, admission = Metrics(), Admission(limits)
    driver = Driver(open_models, limits, metrics, on_end)
    service = Service(driver, admission, metrics, bool(policy.keys), lenient)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        driver.start()
        lag = asyncio.create_task(_watch_lag(metrics))
        yield
        lag.cancel()
        driver.stop()
        await run_in_threadpool(driver.join, 10.0)

    app = FastAPI(
        title="Colada",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=JSONResponse,
    )
    app.state.service = service
    app.router.route_class = _Route
    _add_routes(app, service)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_fields)
    app.add_exception_handler(Exception, _fail)
    app.add_middleware(Edge, policy=policy, limits=limits, metrics=metrics, closed=service.closed)
    if policy.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=policy.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    metrics.watch(metrics.places, lambda: admission.places)
    metrics.watch(metrics.latents, lambda: admission.latents)
    metrics.watch(metrics.watchers, lambda: admission.watchers)
    metrics.watch(metrics.heartbeat, lambda: time.monotonic() - driver.heartbeat)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    errors: dict[int | str, dict[str, Any]] = {"default": {"model": protocol.ErrorAnswer}}
    stream: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    }
    posts: list[tuple[str, Any, Any]] = [
        ("/v1/completions", service.completions, protocol.CompletionAnswer),
        ("/v1/chat/completions", service.chat, protocol.ChatAnswer),
        ("/tokenize", service.tokenize, protocol.Tokens),
        ("/detokenize", service.detokenize, protocol.Spelled),
        ("/colada/encode", service.encode, protocol.Latents),
        ("/colada/decode", service.decode, protocol.Decoded),
    ]
    for path, handler, model in posts:
        responses = errors | stream if "completions" in path else errors
        app.add_api_route(path, handler, methods=["POST"], response_model=model, responses=responses)
    gets: list[tuple[str, Any, Any]] = [
        ("/v1/models", service.models, protocol.ModelList),
        ("/v1/models/{name:path}", service.model, protocol.ModelCard),
        ("/health", service.health, protocol.Health),
        ("/ready", service.health, protocol.Health),
        ("/live", service.live, protocol.Health),
    ]
    for path, handler, model in gets:
        answers = errors | {503: {"model": protocol.Health}} if model is protocol.Health else errors
        app.add_api_route(path, handler, response_model=model, responses=answers)
    app.add_api_route("/metrics", service.show_metrics, include_in_schema=False)
    for path, instead in ELSEWHERE.items():
        app.router.add_route(path, _elsewhere(path, instead), ["GET", "POST"], include_in_schema=False)
    if PLAYGROUND.is_dir():

        async def page(request: Request) -> Response:
            return FileResponse(PLAYGROUND / "index.html", headers=PAGE_HEADERS)

        app.router.add_route("/", page, ["GET"], include_in_schema=False)
        app.mount("/playground", _Pages(directory=PLAYGROUND))


def _elsewhere(path: str, instead: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def refuse(request: Request) -> Response:
        raise Refusal(404, "not_supported", f"{path} is not served: {instead}")

    return refuse


class _Pages(StaticFiles):
    """The playground's files, with headers of their own."""

    def file_response(self, *arguments: Any, **more: Any) -> Response:
        response = super().file_response(*arguments, **more)
        response.headers.update(PAGE_HEADERS)
        return response


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, Refusal):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_value")
        text = f"{request.method} {request.url.path[:100]}: {error.detail}"
        error = Refusal(error.status_code, code, ascii(text)[1:-1], None, error.headers)
    metrics = request.app.state.service.metrics
    metrics.rejected.labels(error.code).inc()
    request.scope["state"]["log"]["error"] = error.code
    return refused(error)


async def _refuse_fields(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _refuse(request, protocol.field_refused(error.errors()))


async def _fail(request: Request, error: Exception) -> Response:
    """Answer for what nobody has thought of; the server above logs the error."""
    return refused(as_refusal(error))


async def _watch_lag(metrics: Metrics) -> None:
    """Tell once a second by how much the loop was late at most."""
    while True:
        worst = 0.0
        for _ in range(round(1 / LAG_SECONDS)):
            begin = time.monotonic()
            await asyncio.sleep(LAG_SECONDS)
            worst = max(worst, time.monotonic() - begin - LAG_SECONDS)
        metrics.lag.set(worst)
