"""The engine thread: sole owner of every model, with an inbox before it and the event loop after it."""

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
from typing import TYPE_CHECKING, Any

from colada.errors import ColadaError
from colada.serve.admission import Limits, Refusal, as_refusal

if TYPE_CHECKING:
    from colada.serve.metrics import Metrics
    from colada.serve.models import Served
    from colada.text.transcript import Chunk

logger = logging.getLogger("colada.serve")

MOST_GUESSES = 64
"""Of what waits for a request's reader: while it is more, newer guesses are left out."""
WARM_TOKENS = 8
ENDED = ("stopped", "engine_dead")

Models = Mapping[str, "Served"]
News = Sequence[tuple[int, "Chunk"]]
"""Numbers of a request's choices, and what they grow by."""


@dataclass(eq=False)
class Ticket:
    """A request under way: its choices, and what is written of them and not yet read.

    Attributes:
        choices: arguments of :meth:`colada.generate.session.Session.submit`.
        latents: "pca" or "full": how guesses show them.
        news: None once it is accepted, then what a step has brought: numbers of choices with their chunks,
            none where :meth:`Driver.look` finds it silent; of work beside them (:meth:`Driver.aside`), its
            result in a list; or why it fails.
        indices: of the choices in the session; the engine thread's own.
        since: when it was submitted.
        news_at: when there last was news.
        begun: whether a choice has left the queue.
        replaced: guesses that were left out for newer ones.
    """

    model: str
    choices: Sequence[Mapping[str, Any]]
    latents: str | None = None
    news: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    indices: list[int] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)
    news_at: float = field(default_factory=time.monotonic)
    begun: bool = False
    replaced: int = 0

    def put(self, news: News) -> None:
        """Take what choices grow by in a step."""
        if self.news.qsize() >= MOST_GUESSES:
            blocks = [(number, chunk) for number, chunk in news if chunk.step is None]
            self.replaced, news = self.replaced + len(news) - len(blocks), blocks
        if news:
            self.news_at = time.monotonic()
            self.news.put_nowait(news)

    async def accepted(self, most: float) -> None:
        """Wait until the session has it. Raises Refusal where it refuses, or has said nothing for so long."""
        while (news := await self.news.get()) is not None:
            if isinstance(news, Refusal):
                raise news
            if time.monotonic() - self.since > most:
                raise _late(most)

    async def steps(self, most: float) -> AsyncIterator[News]:
        """Yield what choices grow by until all are finished, and nothing after some seconds of silence.

        Raises:
            Refusal: once one has failed, or where all takes more seconds than ``most``.
        """
        unfinished = len(self.choices)
        while unfinished:
            news = await self.news.get()
            if isinstance(news, Refusal):
                raise news
            if time.monotonic() - self.since > most:
                raise _overdue(most)
            for _, chunk in news:
                if chunk.error is not None:
                    code = "not_finite" if "not finite" in chunk.error else "internal"
                    raise Refusal(500, code, chunk.error)
                unfinished -= chunk.finish_reason is not None
            yield news


class Driver:
    """Runs the models of a process in one thread, in turns by step.

    Args:
        open_models: loads them; called in the thread.
        limits: of the server.
        metrics: count what the thread does.
        on_end: called on the loop when the thread has ended, also where it failed.
    """

    def __init__(
        self,
        open_models: Callable[[], Models],
        limits: Limits,
        metrics: Metrics,
        on_end: Callable[[], None],
    ) -> None:
        self._open, self._limits, self._metrics, self._on_end = open_models, limits, metrics, on_end
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._side: deque[Callable[[], None]] = deque()
        self._sessions: dict[str, Any] = {}
        self._places: dict[tuple[str, int], tuple[Ticket, int]] = {}
        self._queue: dict[str, deque[tuple[int, Ticket]]] = {}
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._state = "loading"
        self.tickets: set[Ticket] = set()
        """Those that are not closed."""
        self.models: Models = {}
        self.error: BaseException | None = None
        self.heartbeat = time.monotonic()

    # --- on the loop -------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the models."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after its step."""
        self._inbox.put(None)
        self._thread.join(10)

    @property
    def status(self) -> str:
        """loading, ready, engine_stalled, stopped or engine_dead."""
        late = bool(self.tickets) and time.monotonic() - self.heartbeat > self._limits.stall
        return "engine_stalled" if late and self._state == "ready" else self._state

    def submit(self, ticket: Ticket) -> None:
        """Let the engine begin with a request; :meth:`close` must follow, however it ends."""
        self._hand_over(ticket, partial(self._begin, ticket))

    def _hand_over(self, ticket: Ticket, work: Callable[[], None]) -> None:
        if not self.tickets:
            self.heartbeat = time.monotonic()
        self.tickets.add(ticket)
        self._inbox.put(work)
        if self._state in ENDED:  # While its body was read; nobody looks into the inbox any more.
            ticket.news.put_nowait(_gone())

    def close(self, ticket: Ticket) -> None:
        """Forget a request; what is under way of it is cancelled."""
        self.tickets.discard(ticket)
        self._inbox.put(partial(self._cancel, ticket))

    def fail_all(self, failure: Refusal) -> None:
        """End every request with an error."""
        for ticket in self.tickets:
            ticket.news.put_nowait(failure)

    async def aside(self, work: Callable[[], Any]) -> Any:
        """Return the result of some other work with a model, done between two steps.

        Raises:
            Refusal: where the work does, the engine dies or stalls, or it has not come to it within the time
                that a request may take.
        """
        ticket = Ticket("", ())
        self._hand_over(ticket, partial(self._side.append, partial(self._do, ticket, work)))
        try:
            while not (news := await ticket.news.get()):
                if self.status == "engine_stalled":
                    text = f"the engine has done nothing for {self._limits.stall:g} s"
                    raise Refusal(503, "engine_stalled", text, Retry_After="5")
                if time.monotonic() - ticket.since > self._limits.timeout:
                    raise _overdue(self._limits.timeout)
            if isinstance(news, Refusal):
                raise news
            return news[0]
        finally:
            self.close(ticket)

    def look(self) -> None:
        """Let those look at the clock who have had no news for long; to be called several times a second.

        One look at all is cheaper than a timer for each wait of each: a stream waits at every block.
        """
        now, limits, stalled = time.monotonic(), self._limits, self.status == "engine_stalled"
        for ticket in self.tickets:
            silent = now - ticket.news_at > limits.ping > 0
            late = now - ticket.since > (
                limits.timeout if ticket.indices else min(limits.timeout, limits.queue)
            )
            if ticket.news.empty() and (silent or late or (stalled and not ticket.choices)):
                ticket.news_at = now
                ticket.news.put_nowait([])

    def _ended(self) -> None:
        self.fail_all(_gone())
        self._on_end()

    # --- in the engine thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.models = self._open()
            for name, served in self.models.items():
                model: Any = served.model
                session = model.session(capacity=self._limits.capacity, slots=self._limits.slots)
                self._sessions[name], self._queue[name] = session, deque()
                self._show(name, served, session)
                # What first requests would wait for.
                for scale in [{"guidance": 1.0}, {"guidance": 2.0}] if "guidance" in model.defaults else [{}]:
                    session.submit([0] * WARM_TOKENS, WARM_TOKENS, end_ids=(), **scale)
                while session.busy:
                    session.step()
                if model.arch == "cola" and self._limits.watchers:
                    _ = served.directions
            self._state = "ready"
            while self._take():
                for name, session in self._sessions.items():
                    if session.busy:
                        self._step(name, session)
                        self._refuse_late(name)
                if self._side:
                    self._side.popleft()()
            self._state = "stopped"
        except BaseException as error:
            self.error, self._state = error, "engine_dead"
            if not isinstance(error, ColadaError):  # That is said where the command ends.
                logger.critical("the engine thread has failed", exc_info=error)
        finally:
            self._post(self._ended)

    def _show(self, name: str, served: Served, session: Any) -> None:
        """Let the metrics know a model, and look at who waits for it and is under way."""
        self._metrics.info.labels(name, *served.marks).set(1)
        writer = session.engine
        for state, count in {
            "waiting": lambda: len(writer.waiting),
            "running": lambda: len(writer.under_way) + len(getattr(writer, "joining", ())),
        }.items():
            self._metrics.under_way.labels(name, state).set_function(count)

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
        accepted: Refusal | None = None
        try:
            for number, choice in enumerate(ticket.choices):
                index = self._sessions[ticket.model].submit(**choice)
                ticket.indices.append(index)
                self._places[ticket.model, index] = ticket, number
                self._queue[ticket.model].append((index, ticket))
        except Exception as error:
            self._cancel(ticket)
            accepted = as_refusal(error)
        self._post(partial(ticket.news.put_nowait, accepted))

    def _do(self, ticket: Ticket, work: Callable[[], Any]) -> None:
        if ticket not in self.tickets:  # Whoever asked for it has gone.
            return
        try:
            news: Any = [work()]
        except Exception as error:
            news = as_refusal(error)
        self.heartbeat = time.monotonic()
        self._post(partial(ticket.news.put_nowait, news))

    def _cancel(self, ticket: Ticket) -> None:
        for index in ticket.indices:
            if self._places.pop((ticket.model, index), None) is not None:
                self._sessions[ticket.model].cancel(index)

    def _step(self, name: str, session: Any) -> None:
        """Do a step of a model's session, and tell the loop what is new, if anything is."""
        begin, failed = time.monotonic(), session.failed
        chunks: list[Chunk] = session.step(lambda step: self._metrics.pass_of(len(step.latents)))
        self.heartbeat = time.monotonic()
        self._metrics.steps.observe(self.heartbeat - begin)
        self._metrics.blocks.inc(sum(chunk.step is None for chunk in chunks))
        self._metrics.restarts.inc(session.failed - failed)
        self._note_begun(name, session)
        news: dict[Ticket, list[tuple[int, Chunk]]] = {}
        for chunk in chunks:
            place = self._places.get((name, chunk.index))
            if chunk.finish_reason is not None:
                self._places.pop((name, chunk.index), None)
            if place is None:
                continue
            ticket, number = place
            if chunk.latents is not None:  # Tensors stay in this thread.
                picture = None
                if ticket.latents is not None:
                    prompt = len(ticket.choices[number]["prompt"])
                    picture = self.models[name].picture(chunk, prompt, ticket.latents)
                chunk = replace(chunk, latents=picture)  # type: ignore[arg-type]
            news.setdefault(ticket, []).append((number, chunk))
        if news:
            self._metrics.wakeups.inc()
            self._post(partial(_deliver, news))

    def _note_begun(self, name: str, session: Any) -> None:
        """Note whose wait has ended; those that wait are in order, and so are their numbers."""
        queue, first = self._queue[name], next(session.waiting(), None)
        while queue and (first is None or queue[0][0] < first):
            index, ticket = queue.popleft()
            if (name, index) in self._places:  # Else it is cancelled.
                ticket.begun = True
                self._metrics.queue.observe(time.monotonic() - ticket.since)

    def _refuse_late(self, name: str) -> None:
        """End requests of which no choice has begun for too long."""
        for index, ticket in self._queue[name]:
            if time.monotonic() - ticket.since < self._limits.queue:
                return
            if not ticket.begun and (name, index) in self._places:
                self._cancel(ticket)
                self._post(partial(ticket.news.put_nowait, _late(self._limits.queue)))

    def _post(self, work: Callable[[], Any]) -> None:
        """Let the loop do something. Where it is closed, nobody waits for it."""
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:
            logger.debug("the loop is closed")


def _late(seconds: float) -> Refusal:
    text = f"the engine has not begun with it after {seconds:g} s"
    return Refusal(503, "queue_timeout", text, Retry_After="5")


def _overdue(seconds: float) -> Refusal:
    return Refusal(504, "deadline", f"not finished after {seconds:g} s", x_should_retry="false")


def _gone() -> Refusal:
    return Refusal(503, "engine_dead", "the engine has ended", Retry_After="5")


def _deliver(news: Mapping[Ticket, News]) -> None:
    """Let tickets have what a step has brought: their loop wakes up once for all."""
    for ticket, told in news.items():
        ticket.put(told)
