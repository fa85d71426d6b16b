"""Who is let in: hosts, pages and keys, what a log says of them, and limits. Others go on."""

from __future__ import annotations

import asyncio
import json

import pytest

from colada.serve.admission import Limits, Policy
from serving import LIMITS, Answer, Running, ask, byte_model, running


def test_a_foreign_host_or_page_is_refused(server: Running) -> None:
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example"):
        answer = server.get("/v1/models", Host=host)
        assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1:80", "[::1]:80", "LOCALHOST"):
        assert server.get("/v1/models", Host=host).status == 200
    answer = server.post("/v1/completions", {"prompt": "a"}, Origin="http://evil.example")
    assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
    same_origin = server.post(
        "/v1/completions", {"prompt": "a", "max_tokens": 1}, Origin="http://localhost", Host="localhost"
    )
    assert same_origin.status == 200
    assert "access-control-allow-origin" not in same_origin.headers


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
    with running({"bytes": byte_model()}, Limits(capacity=64, context=20)) as server:
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
    with running({"bytes": byte_model()}, Limits(slots=1, capacity=512, queue=0.3)) as server:
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
