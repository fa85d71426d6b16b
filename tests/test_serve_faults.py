"""An engine that fails, stalls, dies or is not there yet. Others go on."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import numpy as np
import pytest

from colada.models.cola import ColaDLM
from colada.serve.admission import Limits, Refusal
from colada.serve.driver import MOST_GUESSES, News, Ticket
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Chunk
from serving import (
    GOOD,
    LIMITS,
    Answer,
    Json,
    Running,
    alone,
    ask,
    byte_model,
    check_answer,
    running,
)


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return byte_model()


async def beside(server: Running, body: Json) -> tuple[Answer, Answer]:
    """A good stream, and beside it another request."""
    good, other = await asyncio.gather(
        ask(server.port, "/v1/completions", GOOD), ask(server.port, "/v1/completions", body)
    )
    return good, other


def test_guesses_that_a_reader_is_too_slow_for_are_replaced() -> None:
    guess, block = Chunk(0, 0, 1, "a", (1,)), Chunk(0, 0, None, "a", (1,))
    ticket = Ticket("bytes", [{}])
    for _ in range(MOST_GUESSES + 10):
        ticket.put([(0, guess)])
    ticket.put([(0, guess), (0, block)])
    told = [ticket.news.get_nowait() for _ in range(ticket.news.qsize())]
    assert told == [[(0, guess)]] * MOST_GUESSES + [[(0, block)]]
    assert ticket.replaced == 11


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ["noise", "pick"])
def test_what_fails_for_one_request_ends_that_one_alone(
    server: Running, model: ColaDLM, monkeypatch: pytest.MonkeyPatch, what: str, stream: bool
) -> None:
    from colada.generate.engine import engine

    pick = engine.pick

    def failing_pick(logits: Any, settings: Any, *arguments: Any) -> Any:
        if settings.top_k == 17:
            raise RuntimeError("broken")
        return pick(logits, settings, *arguments)

    def failing_noise(*arguments: Any) -> Any:
        raise RuntimeError("broken")

    body = {"prompt": "a", "max_tokens": 20, "stream": stream}
    if what == "pick":
        monkeypatch.setattr(engine, "pick", failing_pick)
        body |= {"top_k": 17, "temperature": 1.0}
    else:
        monkeypatch.setitem(engine.NOISE_RULES, "released", failing_noise)
        body |= {"colada": {"noise": "released"}}
    good, bad = asyncio.run(beside(server, body))
    check_answer(good, GOOD, alone(model, GOOD))
    if stream:  # An error is the last event: no [DONE], and a body that ends.
        assert bad.complete
        assert bad.events[-1]["error"]["code"] == "internal"
    else:
        assert (bad.status, bad.error["code"]) == (500, "internal")
        assert bad.headers["x-should-retry"] == "false"
    assert server.get("/health").status == 200
    server.empty()


def test_latents_that_are_not_finite_are_said(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from colada.generate.engine.engine import Engine

    plain = Engine._noise

    def spoilt(self: Engine, slot: Any) -> Any:
        own = plain(self, slot)
        return own * float("nan") if slot.request.settings.seed == 99 else own

    monkeypatch.setattr(Engine, "_noise", spoilt)
    bad = server.post("/v1/completions", {"prompt": "a", "max_tokens": 8, "seed": 99})
    assert (bad.status, bad.error["code"]) == (500, "not_finite")


def test_a_tokenizer_that_raises_is_a_500_without_its_text(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(self: Tokenizer, text: str) -> list[int]:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(Tokenizer, "encode", raises)
    bad = server.post("/v1/completions", {"prompt": "abc"})
    assert (bad.status, bad.error["code"]) == (500, "internal")
    assert b"secret" not in bad.body
    monkeypatch.undo()
    server.empty()


class Saboteur:
    """Replaces a session's step, once or for good."""

    def __init__(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        from colada.generate.session import Session

        self.error: BaseException | None = None
        self.times = 0
        self.seconds = 0.0
        plain = Session.step

        def step(session: Session, *arguments: Any) -> Any:
            if self.seconds:
                time.sleep(self.seconds)
            if self.error is not None and self.times:
                self.times -= 1
                raise self.error
            return plain(session, *arguments)

        monkeypatch.setattr(Session, "step", step)


@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError()], ids=["broken", "memory"])
def test_a_round_that_fails_ends_who_is_in_it_and_the_next_ones_are_served(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from colada.generate.engine.transport import Transport

    with running({"bytes": byte_model()}, LIMITS) as server:
        with monkeypatch.context() as patch:

            def broken(*arguments: Any) -> Any:
                raise error

            patch.setattr(Transport, "run", broken)
            bad = server.post("/v1/completions", {"prompt": "a", "max_tokens": 8})
            assert (bad.status, bad.error["code"]) == (500, "internal")
        assert server.get("/health").status == 200
        assert server.metrics()["colada_engine_restarts_total"] == 1
        check_answer(server.post("/v1/completions", GOOD), GOOD, alone(byte_model(), GOOD))
        server.empty()


def wait_for(holds: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_when_the_engine_dies_everybody_is_told_and_health_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    with running({"bytes": byte_model()}, LIMITS, on_end=lambda: ended.append(True)) as server:
        saboteur = Saboteur(server, monkeypatch)
        saboteur.seconds = 0.05

        async def many() -> list[Answer]:
            bodies = [
                {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": stream}
                for stream in [True, False] * 5
            ]
            asked = [asyncio.ensure_future(ask(server.port, "/v1/completions", body)) for body in bodies]
            await asyncio.sleep(0.5)
            saboteur.error, saboteur.times = SystemExit(), 1
            return await asyncio.gather(*asked)

        for answer in asyncio.run(many()):
            told = answer.events[-1]["error"] if answer.events else answer.error
            assert told["code"] == "engine_dead"
        health = server.get("/health")
        assert (health.status, health.json["status"]) == (503, "engine_dead")
        refused = server.post("/v1/completions", {"prompt": "a"})
        assert (refused.status, refused.error["code"]) == (503, "engine_dead")
        assert server.get("/live").status == 200
        assert ended
        assert server.service.admission.places == 0


def test_a_stalled_engine_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    with running({"bytes": byte_model()}, Limits(capacity=512, stall=0.3)) as server:
        saboteur = Saboteur(server, monkeypatch)

        async def stall() -> None:
            saboteur.seconds = 1.0
            asked = asyncio.ensure_future(
                ask(server.port, "/v1/completions", {"prompt": "a", "max_tokens": 4})
            )
            await asyncio.sleep(0.6)
            health = await ask(server.port, "/health", method="GET")
            assert (health.status, health.json["status"]) == (503, "engine_stalled")
            refused = await ask(server.port, "/v1/completions", {"prompt": "a"})
            assert (refused.status, refused.error["code"]) == (503, "engine_stalled")
            assert "retry-after" in refused.headers
            saboteur.seconds = 0.0
            assert (await asked).status == 200
            assert (await ask(server.port, "/health", method="GET")).status == 200

        asyncio.run(stall())
        time.sleep(0.5)
        assert server.get("/health").status == 200  # Idle is not stalled.


def test_a_request_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with running({"bytes": byte_model()}, Limits(capacity=512, timeout=0.5)) as server:
        Saboteur(server, monkeypatch).seconds = 0.05
        body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
        late = server.post("/v1/completions", body)
        assert (late.status, late.error["code"]) == (504, "deadline")
        stream = server.post("/v1/completions", {**body, "stream": True})
        assert stream.events[-1]["error"]["code"] == "deadline"
        server.empty()
        metrics = server.metrics()
        assert metrics['colada_cancelled_total{when="running",why="deadline"}'] == 2
        assert metrics['colada_refusals_total{code="deadline"}'] == 2


@pytest.mark.parametrize(
    ("limits", "fails", "status", "code"),
    [
        (Limits(capacity=512, queue=0.1), False, 200, ""),  # What is waited for has no other bound.
        (Limits(capacity=512, timeout=0.4), False, 504, "deadline"),
        (Limits(capacity=512, stall=0.3), False, 503, "engine_stalled"),
        (Limits(capacity=512), True, 503, "engine_dead"),
    ],
    ids=["busy", "late", "stalled", "dead"],
)
def test_work_beside_the_steps_waits_for_an_engine_that_lives(
    monkeypatch: pytest.MonkeyPatch, model: ColaDLM, limits: Limits, fails: bool, status: int, code: str
) -> None:
    with running({"bytes": byte_model()}, limits) as server:
        saboteur = Saboteur(server, monkeypatch)
        saboteur.seconds = 1.5

        async def both() -> Answer:
            body = {"prompt": "a", "max_tokens": 4, "ignore_eos": True}
            stream = asyncio.ensure_future(ask(server.port, "/v1/completions", body))
            await asyncio.sleep(0.2)
            if fails:
                saboteur.error, saboteur.times = SystemExit(), 1
            encoded = await ask(server.port, "/colada/encode", {"input": "abc", "encoding_format": "float"})
            saboteur.seconds = 0.0
            await stream
            return encoded

        answer = asyncio.run(both())
        assert answer.status == status, answer.body
        if code:
            assert answer.error["code"] == code
        else:
            assert np.allclose(answer.json["latents"], model.encode("abc").numpy(), atol=1e-6)
        deadline = time.monotonic() + 5  # A stream is forgotten just after its last byte is sent.
        while server.service.driver.tickets and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.service.driver.tickets


def test_who_leaves_before_it_is_not_encoded_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with running({"bytes": byte_model()}, LIMITS) as server:
        saboteur, encoded = Saboteur(server, monkeypatch), list[Any]()
        monkeypatch.setattr(server.models["bytes"], "encode", encoded.append)
        saboteur.seconds = 0.5

        async def leave() -> None:
            stream = asyncio.ensure_future(
                ask(server.port, "/v1/completions", {"prompt": "a", "max_tokens": 4, "ignore_eos": True})
            )
            await asyncio.sleep(0.2)
            gone = asyncio.ensure_future(ask(server.port, "/colada/encode", {"input": "abc"}))
            await asyncio.sleep(0.1)
            gone.cancel()
            await stream

        asyncio.run(leave())
        server.empty()
        assert not encoded


def test_a_ticket_is_accepted_refused_or_not_taken_in_time() -> None:
    async def told(news: list[Any], most: float) -> None:
        ticket = Ticket("bytes", [{}], since=time.monotonic() - 1)
        for one in news:
            ticket.news.put_nowait(one)
        await asyncio.wait_for(ticket.accepted(most), 5)

    asyncio.run(told([[], None, [(0, Chunk(0, 0, None, "a", (1,)))]], 60))
    with pytest.raises(Refusal, match="no such thing"):
        asyncio.run(told([Refusal(400, "invalid_value", "no such thing")], 60))
    with pytest.raises(Refusal) as late:
        asyncio.run(told([[], None], 0.1))
    assert (late.value.status_code, late.value.code) == (503, "queue_timeout")
    assert late.value.headers is not None
    assert "Retry-After" in late.value.headers


def test_a_request_that_comes_to_an_engine_that_has_ended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine may die while a body is read: what is checked before is no longer so."""
    with running({"bytes": byte_model()}, LIMITS) as server:
        saboteur, driver = Saboteur(server, monkeypatch), server.service.driver
        saboteur.error, saboteur.times = SystemExit(), 1
        server.post("/v1/completions", {"prompt": "a"})
        wait_for(lambda: driver.status == "engine_dead")

        async def late() -> None:
            ticket = Ticket("bytes", [{}])
            driver.submit(ticket)
            await ticket.accepted(5)

        with pytest.raises(Refusal) as dead:
            asyncio.run(late())
        assert dead.value.code == "engine_dead"


def test_a_deadline_does_not_interrupt_who_sends() -> None:
    """What is read of a ticket is sent in between, which the deadline must not break off."""
    begun, sent = Chunk(0, 0, None, "a", (1,)), list[News]()

    async def send_slowly() -> None:
        ticket = Ticket("bytes", [{}])
        for _ in range(3):
            ticket.put([(0, begun)])
        async for news in ticket.steps(0.05):
            await asyncio.sleep(0.1)
            sent.append(news)

    with pytest.raises(Refusal) as refused:
        asyncio.run(send_slowly())
    assert (refused.value.status_code, refused.value.code) == (504, "deadline")
    assert sent == [[(0, begun)]]


def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    body: Json = {"prompt": "a", "max_tokens": 4, "stream": True, "ignore_eos": True}
    with running({"bytes": byte_model()}, Limits(capacity=512, ping=0.05)) as server:
        Saboteur(server, monkeypatch).seconds = 0.15
        answer = server.post("/v1/completions", body)
    # Comments, which no client takes for an event.
    assert answer.body.count(b": ping\n\n") >= 2
    monkeypatch.undo()
    check_answer(answer, body, alone(byte_model(), body))


def test_a_loop_that_is_held_up_loses_nothing_and_tells_its_lag(model: ColaDLM) -> None:
    with running({"bytes": byte_model()}, LIMITS) as server:

        async def hold_up() -> Answer:
            stream = asyncio.ensure_future(ask(server.port, "/v1/completions", GOOD))
            while not server.service.driver.tickets:
                await asyncio.sleep(0.005)
            server.service.driver._loop.call_soon_threadsafe(time.sleep, 2.0)
            return await stream

        check_answer(asyncio.run(hold_up()), GOOD, alone(model, GOOD))
        wait_for(lambda: server.metrics()["colada_loop_lag_seconds"] > 1.5)
        assert server.get("/health").status == 200
        server.empty()


def test_while_models_load_requests_are_told_to_come_again() -> None:
    def slow() -> dict[str, Any]:
        time.sleep(1.0)
        return {"bytes": byte_model()}

    with running(slow, LIMITS, ready=False) as server:
        assert server.get("/live").status == 200
        health = server.get("/ready")
        assert (health.status, health.json["status"]) == (503, "loading")
        refused = server.post("/v1/completions", {"prompt": "a"})
        assert (refused.status, refused.error["code"]) == (503, "loading")
        wait_for(lambda: server.get("/ready").status == 200)


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    from colada.errors import ColadaError

    def missing() -> dict[str, Any]:
        raise ColadaError("no model there")

    with running(missing, LIMITS, ready=False) as server:
        wait_for(lambda: server.get("/ready").json["status"] == "engine_dead")
        assert isinstance(server.service.driver.error, ColadaError)


def test_no_descriptor_or_task_is_left(server: Running) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    server.post("/v1/completions", GOOD)
    time.sleep(0.3)
    before = count()
    for _ in range(20):
        server.post("/v1/completions", GOOD)
        server.post("/v1/completions", b"{")
    wait_for(lambda: count() <= before + 1)
