"""What goes wrong: bodies, bytes, strangers, keys, an engine that fails, stalls or dies. Others go on."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from colada.models.cola import ColaDLM
from colada.serve.admission import Limits, Policy, Refusal
from colada.serve.driver import MOST_GUESSES, News, Ticket
from colada.serve.edge import MOST_BODY
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Chunk
from serving import Answer, Json, Running, alone, ask, byte_model, check_answer, running

LIMITS = Limits(history=512, max_tokens=256, slots=8, body=0.5)
GOOD: Json = {"prompt": "a good stream", "max_tokens": 60, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return byte_model()


@pytest.fixture(scope="module")
def server(model: ColaDLM) -> Iterator[Running]:
    with running({"bytes": byte_model()}, LIMITS) as server:
        yield server
        server.empty()
        check_answer(server.post("/v1/completions", GOOD), GOOD, alone(model, GOOD))


# --- bodies --------------------------------------------------------------------------------------

NEST = 10**5
BODIES: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 400, "missing_parameter"),
    "a list": (b"[]", 400, "invalid_json"),
    "null": (b"null", 400, "invalid_json"),
    "no JSON": (b"{'prompt': 1}", 400, "invalid_json"),
    "cut": (b'{"prompt": "a', 400, "invalid_json"),
    "two": (b"{}{}", 400, "invalid_json"),
    "NaN": (b'{"temperature": NaN}', 400, "invalid_json"),
    "Infinity": (b'{"temperature": -Infinity}', 400, "invalid_json"),
    "1e400": (b'{"temperature": 1e400}', 400, "invalid_json"),
    "10**400": (b'{"temperature": 1' + b"0" * 400 + b"}", 400, "invalid_value"),
    "10**10000": (b'{"seed": 1' + b"0" * 10000 + b"}", 400, "invalid_json"),
    "2**63": (b'{"seed": 9223372036854775808}', 400, "invalid_value"),
    "2**64": (b'{"max_tokens": 18446744073709551616}', 400, "invalid_value"),
    "a tiny number": (b'{"temperature": 1e-320}', 400, "invalid_value"),
    "a tiny share": (b'{"top_p": 1e-300, "temperature": 1}', 400, "invalid_value"),
    "a tiny penalty": (b'{"repetition_penalty": 1e-300}', 400, "invalid_value"),
    "guidance 10**400": (b'{"colada": {"guidance": 1' + b"0" * 400 + b"}}", 400, "invalid_value"),
    "end ids in lists": (b'{"colada": {"end_ids": [[1]]}}', 400, "invalid_value"),
    "end ids of text": (b'{"colada": {"end_ids": ["a"]}}', 400, "invalid_value"),
    "many steps": (b'{"colada": {"steps": 1000000}}', 400, "invalid_value"),
    "a surrogate": (b'{"prompt": "\\ud800"}', 400, "invalid_json"),
    "a surrogate as stop": (b'{"stop": "\\uDFFF"}', 400, "invalid_json"),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', 400, "invalid_json"),
    "a key twice, inside": (b'{"colada": {"steps": 1, "steps": 2}}', 400, "invalid_json"),
    "a mark": (b'\xef\xbb\xbf{"prompt": "a"}', 400, "invalid_json"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), 400, "invalid_json"),
    "Latin-1": ('{"prompt": "é"}'.encode("latin-1"), 400, "invalid_json"),
    "deep": (b'{"metadata": ' + b"[" * NEST + b"]" * NEST + b"}", 400, "invalid_json"),
    "deep objects": (b'{"prompt": ' * 2000 + b"1" + b"}" * 2000, 400, "invalid_json"),
    "many keys": (
        json.dumps({f"k{number}": 0 for number in range(60_000)}).encode(),
        400,
        "unknown_parameter",
    ),
    "too large": (b'{"prompt": "' + b"a" * MOST_BODY + b'"}', 413, "body_too_large"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_one_line_and_costs_little(server: Running, name: str) -> None:
    body, status, code = BODIES[name]
    server.get("/live")
    begin = time.process_time()
    answer = server.post("/v1/completions", body)
    seconds = time.process_time() - begin
    assert (answer.status, answer.error["code"]) == (status, code), answer.error
    assert len(answer.error["message"]) < 1200
    # The client's and the loop's; 50 ms on an idle machine.
    assert seconds < 0.25


def test_minus_zero_is_zero(server: Running) -> None:
    assert server.post("/v1/completions", b'{"temperature": -0, "max_tokens": 1}').status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
    ids=str,
)
def test_only_json_is_read(server: Running, headers: dict[str, str], status: int) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    body = gzip.compress(body) if "Content-Encoding" in headers else body
    assert server.post("/v1/completions", body, **headers).status == status


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with running({"bytes": byte_model()}, Limits(body=0.3)) as server:
        sent = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        got = exchange(server.port, sent + b"Content-Length: 100\r\n\r\n{")
        assert got.startswith(b"HTTP/1.1 408 ")
        server.empty()


# --- bytes ---------------------------------------------------------------------------------------


def exchange(port: int, data: bytes, seconds: float = 1.0) -> bytes:
    """Send bytes, and return all that comes until the other side closes or is silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        client.settimeout(seconds)
        got = b""
        try:
            client.sendall(data)
            while part := client.recv(65536):
                got += part
        except (ConnectionError, TimeoutError):
            pass
        return got


BODY = b'{"prompt": "a", "max_tokens": 1}'
LENGTH = f"Content-Length: {len(BODY)}\r\n".encode()
POST = b"POST /v1/completions HTTP/1.1\r\n"
TYPED = b"Host: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
BYTES: dict[str, bytes] = {
    "length and chunks": POST + TYPED + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + BODY,
    "two lengths": POST + TYPED + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY,
    "a signed length": POST + TYPED + b"Content-Length: +32\r\n\r\n" + BODY,
    "a negative length": POST + TYPED + b"Content-Length: -1\r\n\r\n" + BODY,
    "another coding": POST + TYPED + b"Transfer-Encoding: xchunked\r\n\r\n" + BODY,
    "a huge chunk": POST + TYPED + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + BODY,
    "bare line feeds": (POST + TYPED + LENGTH).replace(b"\r\n", b"\n") + b"\n" + BODY,
    "a folded header": POST + TYPED + b"X-A: b\r\n c\r\n" + LENGTH + b"\r\n" + BODY,
    "a NUL": POST + TYPED + b"X-A: b\x00c\r\n" + LENGTH + b"\r\n" + BODY,
    "a space before the colon": POST
    + TYPED.replace(b"Content-Type:", b"Content-Type :")
    + LENGTH
    + b"\r\n"
    + BODY,
    "no host": POST + TYPED.replace(b"Host: localhost\r\n", b"") + LENGTH + b"\r\n" + BODY,
    "two hosts": POST + TYPED + b"Host: localhost\r\n" + LENGTH + b"\r\n" + BODY,
    "a long header": POST + TYPED + b"X-A: " + b"a" * 100_000 + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "many headers": POST + TYPED + b"X-A: b\r\n" * 70 + LENGTH + b"\r\n" + BODY,
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
    "half a request": POST + TYPED,
}


@pytest.mark.parametrize("name", BYTES)
def test_odd_bytes_have_one_answer_at_most_and_soon(server: Running, name: str) -> None:
    begin = time.monotonic()
    got = exchange(server.port, BYTES[name])
    assert time.monotonic() - begin < 4
    assert got.count(b"HTTP/1.1 ") <= 1, got
    assert (
        got.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ", b"HTTP/1.1 408 ")) or name == "half a request"
    ), got[:200]
    server.empty()


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    one = POST + TYPED.replace(b"Connection: close\r\n", b"") + LENGTH + b"\r\n" + BODY
    got = exchange(server.port, one + one + b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert got.count(b"HTTP/1.1 200 OK") == 3
    assert got.count(b'"text_completion"') == 2
    assert got.endswith(b'{"status":"live"}')
    server.empty()


# --- strangers -----------------------------------------------------------------------------------


def test_a_foreign_host_or_page_is_refused(server: Running) -> None:
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example"):
        answer = server.get("/v1/models", Host=host)
        assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1:80", "[::1]:80", "LOCALHOST"):
        assert server.get("/v1/models", Host=host).status == 200
    answer = server.post("/v1/completions", {"prompt": "a"}, Origin="http://evil.example")
    assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
    own = server.post(
        "/v1/completions", {"prompt": "a", "max_tokens": 1}, Origin="http://localhost", Host="localhost"
    )
    assert own.status == 200
    assert "access-control-allow-origin" not in own.headers


def test_pages_that_are_listed_may_ask() -> None:
    policy = Policy(origins=("https://mine.example",), log="off")
    with running({"bytes": byte_model()}, LIMITS, policy) as server:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        preflight = asyncio.run(
            ask(
                server.port,
                "/v1/completions",
                method="OPTIONS",
                headers={"Origin": "https://mine.example", **asked},
            )
        )
        assert preflight.status == 200
        assert preflight.headers["access-control-allow-origin"] == "https://mine.example"
        other = asyncio.run(
            ask(
                server.port,
                "/v1/completions",
                method="OPTIONS",
                headers={"Origin": "https://other.example", **asked},
            )
        )
        assert other.status == 400
        body = {"prompt": "a", "max_tokens": 1}
        assert server.post("/v1/completions", body, Origin="https://mine.example").status == 200
        assert server.post("/v1/completions", body, Origin="https://other.example").status == 403


def test_without_a_right_key_only_health_and_the_page_are_shown() -> None:
    with running({"bytes": byte_model()}, LIMITS, Policy(keys=["one", "two"], log="off")) as server:
        for path in ("/health", "/ready", "/live", "/openapi.json"):
            assert server.get(path).status == 200
        assert server.get("/ready").json["key"] is True
        for path in ("/v1/models", "/metrics", "/v1/models/x", "/nothing"):
            answer = server.get(path)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for sent in ("Bearer three", "Basic one", "one", "Bearer ", "Bearer", "Bearer one two"):
            assert server.get("/v1/models", Authorization=sent).status == 401, sent
        for sent in ("Bearer one", "bearer two", "Bearer  one "):
            assert server.get("/v1/models", Authorization=sent).status == 200, sent
        assert server.post("/v1/completions", {"prompt": "a"}).status == 401


def test_a_log_has_a_line_a_request_and_never_a_prompt_or_key(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(keys=["secret"], log="json")
    with caplog.at_level("INFO", "colada.serve"), running({"bytes": byte_model()}, LIMITS, policy) as server:
        server.post(
            "/v1/completions",
            {"prompt": "private", "max_tokens": 3, "ignore_eos": True},
            Authorization="Bearer secret",
        )
        server.get(
            "/a\tb\x1b[31m%0a".replace("\t", "%09").replace("\x1b", "%1b"), Authorization="Bearer secret"
        )
        server.post("/v1/completions", b"{", Authorization="Bearer secret", x_request_id="mine")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.getMessage()[0] == "{"]
    assert [line["status"] for line in lines] == [200, 404, 400]
    assert lines[0]["completion_tokens"] == 3
    assert lines[0]["key"] == lines[1]["key"] != "-"
    assert (lines[2]["id"], lines[2]["error"]) == ("mine", "invalid_json")
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "private" not in text
    assert "secret" not in text
    assert "\x1b" not in text


def test_prompts_are_logged_only_where_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(log="text", log_prompts=True)
    with caplog.at_level("INFO", "colada.serve"), running({"bytes": byte_model()}, LIMITS, policy) as server:
        server.post("/v1/completions", {"prompt": ["open\nlid", "ab"], "max_tokens": 1})
    (line,) = [record.getMessage() for record in caplog.records if "status=200" in record.getMessage()]
    assert json.loads(line.partition("prompts=")[2].partition(" prompt_tokens")[0]) == ["open\nlid", "ab"]
    assert "\n" not in line


def test_keys_that_change_count_from_then_on() -> None:
    policy = Policy(keys=["one"], log="off")
    with running({"bytes": byte_model()}, LIMITS, policy) as server:
        assert server.get("/v1/models", Authorization="Bearer one").status == 200
        policy.keys[:] = ["two"]
        assert server.get("/v1/models", Authorization="Bearer one").status == 401
        assert server.get("/v1/models", Authorization="Bearer two").status == 200


def test_the_longest_request_is_what_the_limit_says() -> None:
    with running({"bytes": byte_model()}, Limits(history=64, context=20)) as server:
        assert server.get("/v1/models").json["data"][0]["colada"]["max_context"] == 20
        assert server.post("/v1/completions", {"prompt": "a" * 12, "max_tokens": 8}).status == 200
        answer = server.post("/v1/completions", {"prompt": "a" * 13, "max_tokens": 8})
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")


def test_too_many_open_requests_are_refused_and_probes_are_not() -> None:
    policy = Policy(log="off", connections=2)
    with running({"bytes": byte_model()}, LIMITS, policy) as server:
        body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}

        async def crowd() -> tuple[list[Answer], list[Answer], list[Answer]]:
            asked = [asyncio.ensure_future(ask(server.port, "/v1/completions", body)) for _ in range(2)]
            while server.service.admission.places < 2:
                await asyncio.sleep(0.01)
            refused = [await ask(server.port, "/v1/completions", body)]
            refused.append(await ask(server.port, "/v1/models", method="GET"))
            probes = [await ask(server.port, path, method="GET") for path in ("/live", "/ready", "/health")]
            assert not any(one.done() for one in asked)
            return await asyncio.gather(*asked), refused, probes

        streams, refused, probes = asyncio.run(crowd())
        assert [answer.status for answer in probes] == [200, 200, 200]
        assert [(answer.status, answer.error["code"]) for answer in refused] == [
            (503, "too_many_connections")
        ] * 2
        assert all(answer.events[-1] == "[DONE]" for answer in streams)
        assert server.get("/v1/models").status == 200


def test_who_waits_too_long_is_refused_and_the_others_go_on() -> None:
    with running({"bytes": byte_model()}, Limits(slots=1, history=512, queue=0.3)) as server:
        slow = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "colada": {"steps": 32}}

        async def queue() -> list[Answer]:
            first = asyncio.ensure_future(ask(server.port, "/v1/completions", slow))
            await asyncio.sleep(0.2)
            second = await ask(server.port, "/v1/completions", {"prompt": "b", "n": 2, "max_tokens": 4})
            return [await first, second]

        first, second = asyncio.run(queue())
        assert first.status == 200
        assert first.json["usage"]["completion_tokens"] == 400
        assert (second.status, second.error["code"]) == (503, "queue_timeout")
        assert "retry-after" in second.headers
        server.empty()
        assert server.metrics()['colada_cancelled_total{when="waiting",why="deadline"}'] == 1


# --- an engine that fails ------------------------------------------------------------------------


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
    with running({"bytes": byte_model()}, Limits(history=512, stall=0.3)) as server:
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
    with running({"bytes": byte_model()}, Limits(history=512, timeout=0.5)) as server:
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
        (Limits(history=512, queue=0.1), False, 200, ""),  # What is waited for has no other bound.
        (Limits(history=512, timeout=0.4), False, 504, "deadline"),
        (Limits(history=512, stall=0.3), False, 503, "engine_stalled"),
        (Limits(history=512), True, 503, "engine_dead"),
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
    with running({"bytes": byte_model()}, Limits(history=512, ping=0.05)) as server:
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
