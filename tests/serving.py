"""A server in this process, and a client that reads its bytes by itself: no HTTP library of the server's."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import uvicorn

from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.serve.admission import Limits, Policy
from colada.serve.app import Service, create_app
from colada.serve.models import Served
from colada.text.chat import DEFAULT_TEMPLATE
from colada.text.tokenizer import Tokenizer
from helpers import tiny_model

Json = dict[str, Any]

LIMITS = Limits(capacity=512, max_tokens=256, slots=8, body=0.5)
GOOD: Json = {"prompt": "a good stream", "max_tokens": 60, "stream": True, "ignore_eos": True}


def byte_model(**generation: Any) -> ColaDLM:
    """A tiny model whose tokens are bytes: what it writes is full of halves of characters."""
    tiny = tiny_model(vae={"vocab_size": 260, "pad_token_id": None})
    tokenizer = Tokenizer.train(["nothing to merge"], 260)
    settings = {"steps": 3, "guidance": 2.0, **generation}
    return ColaDLM(tiny.vae, tiny.dit, tokenizer, generation=settings, chat_template=DEFAULT_TEMPLATE)


def served(name: str, model: LanguageModel) -> Served:
    return Served(name, model, 1_700_000_000, "0123456789abcdef" * 4)


@dataclass
class Running:
    """A server under way, in a thread of this process."""

    port: int
    service: Service
    server: uvicorn.Server
    models: Mapping[str, LanguageModel]

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        """Send a body, as JSON unless it is bytes, and wait for the answer."""
        return asyncio.run(ask(self.port, path, body, headers=headers))

    def get(self, path: str, **headers: str) -> Answer:
        return asyncio.run(ask(self.port, path, method="GET", headers=headers))

    def metrics(self) -> dict[str, float]:
        """What ``/metrics`` says, by name and labels as they are written there."""
        lines = self.get("/metrics").body.decode().splitlines()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    def empty(self, seconds: float = 10.0) -> None:
        """Wait until nothing is under way, and nothing is held."""
        driver = self.service.driver

        def left() -> list[object]:
            engines = [
                one.engine if hasattr(one.engine, "regions") else None for one in driver._sessions.values()
            ]
            held = [
                engine
                for engine in engines
                if engine is not None
                and (engine.busy or engine.regions.take(engine.regions.capacity) is None)
            ]
            for engine in engines:
                if engine is not None and engine not in held:
                    engine.regions.give_back(0, engine.regions.capacity)
            counts = self.service.admission
            return [*held, *driver.tickets, *driver._places] + [counts.places] * bool(counts.places)

        end = time.monotonic() + seconds
        while left():
            assert time.monotonic() < end, f"still there: {left()}"
            time.sleep(0.02)
        assert self.service.admission.latents == self.service.admission.watchers == 0


@contextmanager
def running(
    models: Mapping[str, LanguageModel] | Callable[[], Mapping[str, LanguageModel]],
    limits: Limits | None = None,
    policy: Policy | None = None,
    ready: bool = True,
    **options: Any,
) -> Iterator[Running]:
    """Serve models as ``colada serve`` does, without its signals."""
    opened: dict[str, LanguageModel] = {}

    def open_models() -> Mapping[str, Served]:
        opened.update(models() if callable(models) else models)
        return {name: served(name, model) for name, model in opened.items()}

    app = create_app(open_models, limits or Limits(), policy or Policy(log="off"), **options)
    config = uvicorn.Config(app, port=0, http="httptools", ws="none", log_level="error", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started or (ready and app.state.service.status in ("loading",)):
            assert time.monotonic() < end
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(port, app.state.service, server, opened)
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


# --- a client ------------------------------------------------------------------------------------


@contextmanager
def unharmed() -> Iterator[Running]:
    """A server that, whatever it has gone through, still answers a good request as the model alone does."""
    with running({"bytes": byte_model()}, LIMITS) as server:
        yield server
        server.empty()
        check_answer(server.post("/v1/completions", GOOD), GOOD, alone(byte_model(), GOOD))


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = b""
    events: list[Any] = field(default_factory=list)
    """A stream's: JSON, or a string that is none."""
    times: list[float] = field(default_factory=list)
    """Of the events."""
    parts: int = 0
    """In which a stream came: as often was something sent."""
    complete: bool = False
    """Whether the body came to its end."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Json:
        error: Json = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert "\n" not in error["message"], error
        return error

    def texts(self) -> dict[int, str]:
        """What a stream's deltas add up to, by choice."""
        texts: dict[int, str] = {}
        for event in self.events:
            for choice in event["choices"] if isinstance(event, dict) and "choices" in event else []:
                text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                texts[choice["index"]] = texts.get(choice["index"], "") + text
        return texts

    def reasons(self) -> dict[int, str]:
        """A stream's finish reasons, by choice."""
        return {
            choice["index"]: choice["finish_reason"]
            for event in self.events
            if isinstance(event, dict)
            for choice in event.get("choices", ())
            if choice["finish_reason"]
        }


def request_bytes(path: str, body: Any, headers: Mapping[str, str], method: str) -> bytes:
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    sent = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(data))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items()), "", ""]
    return "\r\n".join(lines).encode() + data


async def ask(
    port: int,
    path: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    method: str = "POST",
    stop_after: int | None = None,
    hold: Callable[[], Any] | None = None,
) -> Answer:
    """Ask, and read the answer; with ``stop_after`` events, close the connection, without a word."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(path, body, headers or {}, method))
        await writer.drain()
        return await read_answer(reader, stop_after)
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader, stop_after: int | None = None) -> Answer:
    status = int((await reader.readline()).split()[1])
    headers: dict[str, str] = {}
    while (line := (await reader.readline()).decode().strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    answer = Answer(status, headers)
    if "chunked" not in headers.get("transfer-encoding", ""):
        answer.body = await reader.readexactly(int(headers.get("content-length", "0")))
        answer.complete = True
        return answer
    pending = b""
    while True:
        size = int((await reader.readline()).strip() or b"0", 16)
        part = await reader.readexactly(size + 2)
        if size == 0:
            answer.complete = True
            return answer
        answer.parts += 1
        answer.body += part[:-2]
        pending += part[:-2]
        while b"\n\n" in pending:
            event, _, pending = pending.partition(b"\n\n")
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    text = line.removeprefix(b"data: ").decode()
                    answer.events.append(json.loads(text) if text != "[DONE]" else text)
                    answer.times.append(time.monotonic())
        if stop_after is not None and len(answer.events) >= stop_after:
            return answer


# --- requests of many kinds ----------------------------------------------------------------------

MALFORMED = [b"{", b'{"prompt": 5}', b'{"temperature": 1e-320}', b'{"colada": {"steps": 1000000}}', b"[]"]


def some_body(draw: random.Random, words: str, most: int = 60) -> Json:
    """A request of any settings, in few solver steps."""
    body: Json = {
        "prompt": words * draw.randint(0, 20),
        "max_tokens": draw.randint(1, most),
        "seed": draw.randrange(2**40),
        "stream": draw.random() < 0.7,
        "colada": {
            "steps": draw.choice([1, 2, 4, 8]),
            "guidance": draw.choice([0.0, 1.0, 3.0]),
            "solver": draw.choice(["euler", "ab2"]),
            "schedule": draw.choice(["uniform", "front-loaded"]),
        },
    }
    if draw.random() < 0.5:
        body |= {"temperature": draw.choice([0.5, 1.0]), "top_p": draw.choice([0.8, 1.0]), "top_k": 50}
    if draw.random() < 0.3:
        body |= {"repetition_penalty": 1.3}
    if draw.random() < 0.3:
        body |= {"stop": [draw.choice(["a", "é", "the", ".", " "])]}
    if body["stream"] and draw.random() < 0.3:
        body["colada"]["guesses"] = True
    if draw.random() < 0.2:
        body["n"] = 2
    return body


# --- what answers should be ----------------------------------------------------------------------

SETTINGS = ("temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")


def alone(model: LanguageModel, body: Json) -> list[Any]:
    """What the library gives for a request's choices, each by itself: the oracle of every answer."""
    settings = {name: body[name] for name in SETTINGS if body.get(name) is not None}
    settings |= {
        name: value
        for name, value in (body.get("colada") or {}).items()
        if name not in ("guesses", "latents", "confidence", "tokens")
    }
    if settings.get("top_k") == -1:
        settings["top_k"] = 0
    if body.get("ignore_eos"):
        settings["end_ids"] = ()
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    prompts = [body["prompt"]] if prompts and isinstance(prompts[0], int) else prompts
    done = []
    for prompt in prompts:
        for number in range(body.get("n") or 1):
            own = {**settings, "seed": settings.get("seed", 0) + number}
            done += model.generate([prompt], body.get("max_tokens", 16), **own)
    return done


REASONS = {"end": "stop", "stop": "stop", "length": "length"}


def check_answer(answer: Answer, body: Json, wanted: list[Any]) -> None:
    """Whether an answer, streamed or not, is what each of its choices is alone."""
    assert answer.status == 200, answer.body
    texts = {number: one.text for number, one in enumerate(wanted)}
    reasons = {number: REASONS[one.finish_reason] for number, one in enumerate(wanted)}
    count = sum(len(one.tokens) for one in wanted)
    if body.get("stream"):
        assert answer.events[-1] == "[DONE]"
        assert answer.complete
        assert answer.texts() == texts
        assert answer.reasons() == reasons
        if (body.get("stream_options") or {}).get("include_usage"):
            assert answer.events[-2]["choices"] == []
            assert answer.events[-2]["usage"]["completion_tokens"] == count
        return
    choices = answer.json["choices"]
    assert {choice["index"]: choice["text"] for choice in choices} == texts
    assert {choice["index"]: choice["finish_reason"] for choice in choices} == reasons
    assert answer.json["usage"]["completion_tokens"] == count
