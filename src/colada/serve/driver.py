"""The engine thread: sole owner of every model, with an inbox before it and one wake-up a round after it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, Protocol

from colada.errors import ColadaError
from colada.serve.admission import Limits, Refusal

if TYPE_CHECKING:
    from colada.serve.models import Served
    from colada.text.transcript import Chunk

logger = logging.getLogger("colada.serve")

MOST_GUESSES = 64
"""Of a request that wait for its reader; newer ones take the place of the oldest."""
RESTART_SECONDS = 60.0
"""A second failure of the engine within so long ends the process."""
WARM_TOKENS = 8

Models = Mapping[str, "Served"]


class Meter(Protocol):
    """What is counted of the engine; see :class:`colada.serve.metrics.Metrics`."""

    def round(self, model: str, seconds: float, blocks: int) -> None:
        """A step of a model's session is done."""

    def restarted(self) -> None:
        """A model's session was made anew."""


@dataclass(frozen=True)
class Choice:
    """What is asked of a session, once checked; see :meth:`colada.generate.session.Session.submit`."""

    prompt: Sequence[int]
    max_new_tokens: int
    settings: Mapping[str, Any]
    suffix: Sequence[int] | None = None


@dataclass(frozen=True)
class News:
    """What a choice grows by, with its latents as they are sent."""

    number: int
    chunk: Chunk
    picture: str | None = None


@dataclass(eq=False)
class Ticket:
    """A request under way: its choices, and what is written of them and not yet read.

    The engine thread only hands it from one place to the next; its methods are called on the loop.
    """

    model: str
    choices: Sequence[Choice]
    guesses: bool = False
    confidence: bool = False
    latents: Literal["pca", "full"] | None = None
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    _news: deque[News] = field(default_factory=deque)
    _pending: int = 0
    _failure: Refusal | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    replaced: int = 0
    indices: list[int] = field(default_factory=list)
    """Of the session; the engine thread's own."""

    def put(self, news: News) -> None:
        """Take what a choice grows by. Guesses that nobody reads make room for newer ones."""
        if news.chunk.step is not None:
            if self._pending == MOST_GUESSES:
                self._news.remove(next(old for old in self._news if old.chunk.step is not None))
                self.replaced += 1
            else:
                self._pending += 1
        self._news.append(news)
        self._wake.set()

    def fail(self, failure: Refusal) -> None:
        """End with an error, unless it has ended."""
        self._failure = self._failure or failure
        self._wake.set()
        self.accepted.set()

    async def begun(self) -> None:
        """Wait until the session has taken it. Raises Refusal where it does not."""
        await self.accepted.wait()
        if self._failure is not None and not self._news:
            raise self._failure

    async def news(self) -> AsyncIterator[News]:
        """Yield what the choices grow by, until all are finished.

        Raises:
            Refusal: for what has failed; what was finished before has been yielded.
        """
        left = len(self.choices)
        while left:
            while not self._news:
                if self._failure is not None:
                    raise self._failure
                self._wake.clear()
                await self._wake.wait()
            news = self._news.popleft()
            chunk = news.chunk
            self._pending -= chunk.step is not None
            if chunk.error is not None:
                code = "not_finite" if "not finite" in chunk.error else "internal"
                raise Refusal(500, code, chunk.error, headers={"x-should-retry": "false"})
            left -= chunk.finish_reason is not None
            yield news


class Driver:
    """Runs the models of a process in one thread, in turns by round.

    Args:
        open_models: loads them; called in the thread.
        limits: of the server.
        meter: counts.
        on_end: called on the loop when the thread has ended, also where it failed.
    """

    def __init__(
        self,
        open_models: Callable[[], Models],
        limits: Limits,
        meter: Meter,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._open, self._limits, self._meter, self._on_end = open_models, limits, meter, on_end
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._side: deque[Callable[[], None]] = deque()
        self._sessions: dict[str, Any] = {}
        self._tickets: dict[tuple[str, int], tuple[Ticket, int]] = {}
        self._open_tickets: set[Ticket] = set()
        self._restarted = -RESTART_SECONDS
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.models: Models = {}
        self.state = "loading"
        self.error: BaseException | None = None
        self.heartbeat = time.monotonic()

    # --- on the loop -------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the models."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def status(self) -> str:
        """loading, ready, draining, stalled, stopped or dead."""
        late = time.monotonic() - self.heartbeat > self._limits.stall
        return (
            "stalled" if late and self._open_tickets and self.state in ("ready", "draining") else self.state
        )

    def submit(self, ticket: Ticket) -> None:
        """Let the engine begin with a request; :meth:`close` must follow, however it ends."""
        if not self._open_tickets:
            self.heartbeat = time.monotonic()
        self._open_tickets.add(ticket)
        self._inbox.put(partial(self._begin, ticket))

    def close(self, ticket: Ticket) -> None:
        """Forget a request; what is under way of it is cancelled."""
        self._open_tickets.discard(ticket)
        self._inbox.put(partial(self._cancel, ticket))

    def aside(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """Return the result that some other work with a model will have, run between two rounds."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def run() -> None:
            try:
                done = partial(_resolve, future, work(), None)
            except Exception as error:
                done = partial(_resolve, future, None, error)
            self._post(done)

        self._inbox.put(partial(self._side.append, run))
        return future

    def fail_all(self, failure: Refusal) -> None:
        """End every request with an error."""
        for ticket in list(self._open_tickets):
            ticket.fail(failure)

    @property
    def open_tickets(self) -> int:
        """Requests that are not closed."""
        return len(self._open_tickets)

    def stop(self) -> None:
        """Let the thread end after its round."""
        self._inbox.put(None)

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _deliver(self, all_news: Sequence[tuple[Ticket, News]]) -> None:
        for ticket, news in all_news:
            ticket.put(news)

    def _ended(self) -> None:
        self.fail_all(Refusal(503, "engine_dead", "the engine has ended", headers={"Retry-After": "5"}))
        self._on_end()

    # --- in the engine thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.models = self._open()
            for name in self.models:
                self._sessions[name] = self._session(name)
                self._warm(name)
            self.state = "ready" if self.state == "loading" else self.state
            while self._take():
                for name, session in self._sessions.items():
                    if session.busy:
                        self._round(name)
                if self._side:
                    self._side.popleft()()
            self.state = "stopped"
        except BaseException as error:
            self.error, self.state = error, "dead"
            if not isinstance(error, ColadaError):  # That is said where the command ends.
                logger.critical("the engine thread has failed", exc_info=error)
        finally:
            self._post(self._ended)

    def _session(self, name: str) -> Any:
        model: Any = self.models[name].model
        return model.session(history=self._limits.history, slots=self._limits.slots)

    def _warm(self, name: str) -> None:
        """Run what first requests would wait for."""
        begin, session, model = time.monotonic(), self._sessions[name], self.models[name].model
        scales: list[dict[str, Any]] = [{}]
        if "guidance" in model.defaults:
            scales = [{"guidance": 1.0}, {"guidance": 2.0}]
        for scale in scales:
            session.submit([0] * WARM_TOKENS, WARM_TOKENS, **scale, end_ids=())
        while session.busy:
            session.step()
        logger.info("%s is warm after %.1f s", name, time.monotonic() - begin)

    def _take(self) -> bool:
        """Do what the inbox holds, and wait for it where there is nothing else. False: the thread may end."""
        wait = not self._side and not any(session.busy for session in self._sessions.values())
        while True:
            try:
                work = self._inbox.get(block=wait)
            except Empty:
                return True
            if work is None:
                return False
            work()
            wait = False

    def _begin(self, ticket: Ticket) -> None:
        session = self._sessions[ticket.model]
        try:
            for number, choice in enumerate(ticket.choices):
                index = session.submit(
                    choice.prompt,
                    choice.max_new_tokens,
                    suffix=choice.suffix,
                    guesses=ticket.guesses,
                    confidence=ticket.confidence,
                    **choice.settings,
                )
                ticket.indices.append(index)
                self._tickets[ticket.model, index] = ticket, number
        except Exception as error:
            self._cancel(ticket)
            self._post(partial(ticket.fail, as_refusal(error)))
        else:
            self._post(ticket.accepted.set)

    def _cancel(self, ticket: Ticket) -> None:
        for index in ticket.indices:
            if self._tickets.pop((ticket.model, index), None) is not None:
                session = self._sessions[ticket.model]
                session.cancel(index)
                if not session.busy:
                    session.step()  # Nobody is left: what it held is free now.

    def _round(self, name: str) -> None:
        """Advance a model's session, and tell what is new."""
        session, begin = self._sessions[name], time.monotonic()
        try:
            chunks = session.step()
        except Exception as error:
            self._restart(name, error)
            return
        self.heartbeat = time.monotonic()
        news = []
        for chunk in chunks:
            entry = self._tickets.get((name, chunk.index))
            if entry is not None:
                ticket, number = entry
                picture = None
                if ticket.latents is not None and chunk.latents is not None:  # Tensors stay in this thread.
                    prompt = len(ticket.choices[number].prompt)
                    picture = self.models[name].picture(chunk, prompt, ticket.latents)
                news.append((ticket, News(number, replace(chunk, latents=None), picture)))
            if chunk.finish_reason is not None:
                self._tickets.pop((name, chunk.index), None)
        if news:
            self._post(partial(self._deliver, news))
        blocks = sum(chunk.step is None for chunk in chunks)
        self._meter.round(name, self.heartbeat - begin, blocks)

    def _restart(self, name: str, error: Exception) -> None:
        """Fail all requests of a model, and give it a new session; raises the error if that was just done."""
        now = time.monotonic()
        if now - self._restarted < RESTART_SECONDS:
            raise error
        self._restarted = now
        logger.error("the engine has failed and begins anew", exc_info=error)
        failure = Refusal(500, "internal", "the engine has failed", headers={"x-should-retry": "false"})
        for key, (ticket, _) in list(self._tickets.items()):
            if ticket.model == name:
                del self._tickets[key]
                self._post(partial(ticket.fail, failure))
        self._sessions[name] = self._session(name)
        self._meter.restarted()

    def _post(self, work: Callable[[], None]) -> None:
        """Let the loop do something. Where it is closed, nobody waits for it."""
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:
            logger.debug("the loop is closed")


def as_refusal(error: Exception) -> Refusal:
    """Return an error as a client is told it: a ColadaError by its text, nothing of any other."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ColadaError):
        name = str(error).partition("=")[0]
        return Refusal(400, "invalid_value", str(error), name if name.isidentifier() else None)
    logger.error("a request has failed", exc_info=error)
    return Refusal(500, "internal", "this request has failed", headers={"x-should-retry": "false"})


def _resolve(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(as_refusal(error))
