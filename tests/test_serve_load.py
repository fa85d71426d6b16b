"""Many at once: an answer is what it is alone; who leaves frees its place, who does not read waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import colada
from colada.models.cola import ColaDLM
from colada.serve.admission import Admission, Limits, Refusal
from colada.serve.metrics import Metrics
from serving import (
    MALFORMED,
    Answer,
    Json,
    Running,
    alone,
    ask,
    byte_model,
    check_answer,
    request_bytes,
    running,
    some_body,
)


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return byte_model()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running({"bytes": byte_model()}, Limits(capacity=2048, max_tokens=512, slots=8)) as server:
        yield server
        server.empty()


def tasks_and_descriptors(server: Running) -> tuple[int, int]:
    """How many of both there are, once what this asks for is gone."""
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return len(asyncio.all_tasks(server.service.driver._loop)), descriptors


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("bytes", 40),
        pytest.param("bytes", 200, marks=pytest.mark.slow),
        pytest.param("stories", 40, marks=pytest.mark.slow),
    ],
)
def test_whatever_the_load_an_answer_is_the_one_alone(kind: str, count: int) -> None:
    draw = random.Random(0)
    # In float32 a draw at the border of two tokens may fall otherwise beside others: once in 80, by rounding.
    model = byte_model() if kind == "bytes" else colada.load(dtype=torch.float64)
    words = "né🙂" if kind == "bytes" else "Once upon a time "
    bodies = [some_body(draw, words) for _ in range(count)]
    leaving = set(draw.sample(range(count), count // 4))
    limits = Limits(capacity=max(4096, 64 * count), slots=16, waiting=2 * count, watchers=count)

    async def one(server: Running, number: int) -> Answer | None:
        await asyncio.sleep(draw.random())
        if number % 10 == 0:
            refused = await ask(server.port, "/v1/completions", draw.choice(MALFORMED))
            assert refused.status == 400
        asked = asyncio.ensure_future(ask(server.port, "/v1/completions", bodies[number]))
        if number not in leaving:
            return await asked
        await asyncio.sleep(draw.random())
        asked.cancel()
        return None

    with running({kind: model}, limits) as server:

        async def all_of_them() -> list[Answer | None]:
            return await asyncio.gather(*[one(server, number) for number in range(count)])

        before = tasks_and_descriptors(server)
        answers = asyncio.run(all_of_them())
        server.empty()
        end = time.monotonic() + 5
        while tasks_and_descriptors(server) != before:
            assert time.monotonic() < end, (before, tasks_and_descriptors(server))
            time.sleep(0.05)
        assert server.get("/health").status == 200
    oracle = byte_model() if kind == "bytes" else model
    for body, answer in zip(bodies, answers, strict=True):
        if answer is not None:
            check_answer(answer, body, alone(oracle, body))


def test_what_a_step_writes_is_sent_at_once(server: Running) -> None:
    body: Json = {"prompt": "abc", "n": 4, "max_tokens": 40, "seed": 1, "ignore_eos": True, "stream": True}
    answer = server.post("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    blocks = answer.events[-3]["choices"][0]["colada"]["blocks"]
    assert len(answer.events) > 3 * blocks
    # All four choices' blocks together, with the last ones what ends them; they may begin a block apart.
    assert answer.parts <= blocks + 1


# --- who leaves ----------------------------------------------------------------------------------

LONG: Json = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "colada": {"steps": 32}}


async def sent(port: int, body: Json) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes("/v1/completions", body, {}, "POST"))
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_who_leaves_while_it_is_written_frees_its_place(server: Running, stream: bool, how: str) -> None:
    async def leave() -> None:
        reader, writer = await sent(server.port, {**LONG, "stream": stream})
        while not server.service.driver._places:
            await asyncio.sleep(0.01)
        if stream:
            await reader.readuntil(b"data: ")
        if how == "reset":
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        writer.close()

    asyncio.run(leave())
    server.empty(2.0)


def test_who_leaves_the_queue_is_never_written() -> None:
    with running({"bytes": byte_model()}, Limits(capacity=2048, max_tokens=512, slots=1)) as server:
        submitted: list[int] = []
        session = server.service.driver._sessions["bytes"]
        admit = session.engine.admit

        def admitted() -> Any:
            new = admit()
            submitted.extend(slot.request.settings.seed for slot in new)
            return new

        session.engine.admit = admitted

        async def queue() -> list[Answer]:
            first = asyncio.ensure_future(ask(server.port, "/v1/completions", {**LONG, "seed": 1000}))
            await asyncio.sleep(0.2)
            waiting = [
                asyncio.ensure_future(
                    ask(server.port, "/v1/completions", {"prompt": "a", "max_tokens": 5, "seed": seed})
                )
                for seed in range(20)
            ]
            await asyncio.sleep(0.2)
            for asked in waiting[::2]:
                asked.cancel()
            first.cancel()
            return await asyncio.gather(*waiting[1::2])

        answers = asyncio.run(queue())
        assert [answer.status for answer in answers] == [200] * 10
        server.empty()
        assert sorted(submitted) == [*range(1, 20, 2), 1000]
        metrics = server.metrics()
        assert metrics['colada_cancelled_total{when="waiting",why="client"}'] == 10
        assert metrics['colada_cancelled_total{when="running",why="client"}'] == 1
        assert metrics["colada_queue_seconds_count"] == 11
        for state in ("waiting", "running"):
            assert metrics[f'colada_choices_open{{model="bytes",state="{state}"}}'] == 0


@pytest.mark.parametrize("part", [b"", b"POST /v1/comp", b"{"], ids=["nothing", "half a head", "half a body"])
def test_half_a_request_holds_nothing(server: Running, part: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        whole = request_bytes("/v1/completions", {"prompt": "a"}, {}, "POST")
        client.sendall(whole[:-5] if part == b"{" else part)
        assert server.service.admission.places == 0
    server.empty(2.0)


@pytest.mark.slow
def test_who_reads_slowly_or_never_is_given_up_and_disturbs_nobody() -> None:
    limits = Limits(capacity=16384, slots=64, reader=0.5, watchers=64)
    good: Json = {"prompt": "b", "max_tokens": 20, "stream": True, "ignore_eos": True}
    colada = {"guesses": True, "latents": "full", "steps": 8, "guidance": 1.0}
    endless = {"prompt": "a", "max_tokens": 400, "n": 8, "ignore_eos": True, "stream": True, "colada": colada}
    with running({"bytes": byte_model()}, limits) as server:
        slow = []
        for _ in range(4):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(request_bytes("/v1/completions", endless, {}, "POST"))
            slow.append(client)
        before = server.metrics()["process_resident_memory_bytes"]

        async def trickle(client: socket.socket) -> None:
            client.setblocking(False)
            with contextlib.suppress(ConnectionError):
                while await asyncio.get_running_loop().sock_recv(client, 1):
                    await asyncio.sleep(0.2)

        async def beside() -> list[Answer]:
            trickling = [asyncio.ensure_future(trickle(client)) for client in slow[:2]]
            answers = await asyncio.gather(*[ask(server.port, "/v1/completions", good) for _ in range(6)])
            while server.service.admission.places:
                await asyncio.sleep(0.05)
            for one in trickling:
                one.cancel()
            return answers

        wanted = alone(byte_model(), good)
        for answer in asyncio.run(asyncio.wait_for(beside(), 240)):
            check_answer(answer, good, wanted)
        server.empty(20.0)
        metrics = server.metrics()
        assert metrics['colada_cancelled_total{when="running",why="reader"}'] == 4
        assert metrics["process_resident_memory_bytes"] - before < 2**26
        for client in slow:
            client.close()


# --- long prompts, any text ----------------------------------------------------------------------


def test_a_long_prompt_does_not_hold_the_others_up(server: Running) -> None:
    async def beside() -> tuple[Answer, list[Answer], tuple[float, float]]:
        body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        stream = asyncio.ensure_future(ask(server.port, "/v1/completions", body))
        while not server.service.driver._places:
            await asyncio.sleep(0.01)
        begin = time.monotonic()
        first = await ask(server.port, "/v1/completions", {"prompt": "b" * 1600, "max_tokens": 1})
        end = time.monotonic()
        prompts: list[Any] = [["c"] * 16, "d" * 2047, "e" * 2048, "e" * 2049, "f" * (2**20 - 100)]
        others = [ask(server.port, "/v1/completions", {"prompt": one, "max_tokens": 1}) for one in prompts]
        return await stream, [first, *await asyncio.gather(*others)], (begin, end)

    stream, answers, (begin, end) = asyncio.run(beside())
    assert [answer.status for answer in answers] == [200, 200, 200, 400, 400, 400]
    assert {answer.error["code"] for answer in answers[3:]} == {"context_length_exceeded"}
    assert stream.events[-1] == "[DONE]"
    # 1,600 latents are read in parts of 512, a part before each of the others' blocks.
    assert sum(begin < at < end for at in stream.times) >= 3


@pytest.mark.parametrize(
    "words", ["👩‍👩‍👧‍👦", "é́ñ", "שלום", "語言モデル", "\0\u0001", "\ufffd", "\u2028\r\n"], ids=ascii
)
def test_any_text_streams_as_it_reads_at_once(server: Running, model: ColaDLM, words: str) -> None:
    for seed in range(3):
        body: Json = {
            "prompt": words,
            "max_tokens": 40,
            "temperature": 2.0,
            "seed": seed,
            "stop": [words[:1], words],
            "echo": True,
        }
        whole = server.post("/v1/completions", body).json["choices"][0]["text"]
        stream = server.post("/v1/completions", {**body, "stream": True})
        assert stream.texts()[0] == whole
        assert whole == words + alone(model, body)[0].text


# --- more than there is room for -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "waiting"), [(400, 24), pytest.param(2000, 248, marks=pytest.mark.slow)], ids=str
)
def test_beyond_its_places_a_server_refuses_at_once_and_everybody_ends(
    count: int, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []  # In the server: the client's own queue is not of interest.
    told, draw = Metrics.request, random.Random(0)

    def request(self: Metrics, endpoint: str, status: int, took: float, log: Any) -> None:
        told(self, endpoint, status, took, log)
        if status == 429:
            seconds.append(took)

    monkeypatch.setattr(Metrics, "request", request)
    body = {"prompt": "a" * 40, "max_tokens": 20, "ignore_eos": True}
    with running({"bytes": byte_model()}, Limits(capacity=8192, slots=8, waiting=waiting)) as server:

        async def one() -> int:
            await asyncio.sleep(draw.random() * count / 400)
            answer = await ask(server.port, "/v1/completions", body)
            if answer.status == 429:
                assert answer.error["code"] == "queue_full"
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.error["type"] == "rate_limit_error"
            else:
                assert answer.json["usage"]["completion_tokens"] == 20
            return answer.status

        async def all_of_them() -> list[int]:
            return await asyncio.gather(*[one() for _ in range(count)])

        statuses = asyncio.run(all_of_them())
        server.empty()
    assert statuses.count(200) + statuses.count(429) == count
    assert statuses.count(200) >= 8 + waiting
    assert statuses.count(429) == len(seconds) > 0
    assert sorted(seconds)[len(seconds) * 99 // 100] < 0.25  # 50 ms on an idle machine.


def test_what_is_refused_is_not_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from colada.serve import edge

    def never(body: bytes) -> Any:
        pytest.fail("a body was read as JSON")

    admission = server.service.admission
    places = admission.limits.slots + admission.limits.waiting
    monkeypatch.setattr(edge, "read_json", never)
    admission.places += places
    try:
        body = json.dumps({"prompt": "a" * (2**20 - 100)}).encode()
        assert {server.post("/v1/completions", body).status for _ in range(5)} == {429}
    finally:
        admission.places -= places


def test_places_are_counted_and_given_back() -> None:
    admission = Admission(Limits(slots=2, waiting=2, capacity=100, watchers=1))
    admission.take([10, 10], watching=True)
    admission.take([100], watching=False)
    with pytest.raises(Refusal, match="no more has room") as full:
        admission.take([1, 1], watching=False)
    assert (full.value.status_code, full.value.headers) == (429, {"Retry-After": "2"})
    with pytest.raises(Refusal, match="guesses"):
        admission.take([1], watching=True)
    assert (admission.places, admission.latents, admission.watchers) == (3, 120, 1)
    admission.give_back([10, 10], watching=True)
    admission.take([300], watching=True)
    with pytest.raises(Refusal, match="400 latents"):
        admission.take([101], watching=False)


# --- for ever ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="there is no /proc here")
def test_requests_for_hours_leave_no_memory_behind_and_are_no_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all kinds, a quarter of them cancelled and a tenth malformed: smaller numbers of a soak.

    Without oneDNN, which keeps a kernel for every size of product that it has seen: with it, memory is flat
    only once all are there.
    """
    from colada.generate.engine import kernels

    monkeypatch.setattr(kernels, "ONEDNN", False)
    waves, at_once, draw = 60, 20, random.Random(0)
    resident: list[float] = []
    cpu: list[float] = []

    async def one(port: int) -> None:
        malformed, leaving = draw.random() < 0.1, draw.random() < 0.25
        body = draw.choice(MALFORMED) if malformed else some_body(draw, "né🙂", most=8)
        asked = asyncio.ensure_future(ask(port, "/v1/completions", body))
        if leaving:
            await asyncio.sleep(draw.random() / 10)
            asked.cancel()
            return
        answer = await asked
        assert answer.status == (400 if malformed else 200), answer.body
        assert answer.complete

    async def wave(port: int) -> None:
        await asyncio.gather(*[one(port) for _ in range(at_once)])

    with (
        torch.backends.mkldnn.flags(enabled=False),
        running({"bytes": byte_model()}, Limits(watchers=at_once)) as server,
    ):
        for _ in range(waves):
            asyncio.run(wave(server.port))
            metrics = server.metrics()
            resident.append(metrics["process_resident_memory_bytes"] / 2**20)
            cpu.append(metrics["process_cpu_seconds_total"])
        server.empty()
    third, quarter = waves // 3, waves // 4
    assert resident[-1] - resident[-third] < 2.0, resident
    assert cpu[-1] - cpu[-quarter] < 1.5 * (cpu[quarter] - cpu[1]), (
        cpu
    )  # Seconds on a clock depend on others.
