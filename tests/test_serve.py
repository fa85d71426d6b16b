"""The server's API: fields, answers and streams, as OpenAI's clients know them."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colada.models.autoregressive import AutoregressiveLM
from colada.models.cola import ColaDLM
from colada.models.masked import MaskedLM
from colada.networks.decoder import Decoder, DecoderConfig
from colada.serve.admission import Limits
from serving import Json, Running, alone, ask, byte_model, check_answer, running

LIMITS = Limits(capacity=512, max_tokens=256, slots=8)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running({"bytes": byte_model()}, LIMITS) as server:
        yield server
        server.empty()


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return byte_model()


BODIES: list[Json] = [
    {"prompt": "Once upon", "max_tokens": 13},
    {"prompt": ""},
    {"prompt": [1, 2, 3, 4, 5], "max_tokens": 5, "seed": 7, "temperature": 1.0},
    {"prompt": ["a", "bcd"], "n": 3, "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seed": 2**53},
    {"prompt": [[1, 2], [3]], "max_tokens": 4, "top_k": 3, "temperature": 2.0, "seed": 1},
    {"prompt": "x" * 100, "max_tokens": 21, "repetition_penalty": 1.5},
    {"prompt": "steps", "colada": {"steps": 2, "guidance": 0.5, "solver": "euler", "schedule": "uniform"}},
    {"prompt": "interval", "colada": {"guidance_interval": [0.2, 0.8], "noise": "released", "end_ids": []}},
    {"prompt": "ends", "max_tokens": 40, "temperature": 3.0, "seed": 3, "stop": ["a", "é"]},
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body["prompt"])[:12])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_what_the_library_writes(
    server: Running, model: ColaDLM, body: Json, stream: bool
) -> None:
    body = {**body, "stream": stream}
    check_answer(server.post("/v1/completions", body), body, alone(model, body))


def test_an_answer_says_what_is_needed_to_repeat_it(server: Running) -> None:
    body = {"prompt": "again", "temperature": 1.0, "max_tokens": 12}
    first = server.post("/v1/completions", body).json
    details = first["choices"][0]["colada"]
    assert 0 <= details["seed"] < 2**53
    assert first["system_fingerprint"].startswith("colada-")
    assert first["system_fingerprint"].endswith("-0123456789ab-float32-cpu")
    again = server.post("/v1/completions", {**body, "seed": details["seed"]}).json
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    assert details["settings"]["steps"] == 3
    assert details["settings"]["temperature"] == 1.0
    # Unless it is sampled, nothing is drawn.
    body = {"prompt": "again"}
    assert server.post("/v1/completions", body).json["choices"][0]["colada"]["seed"] == 0


def test_a_stream_reads_as_openai_writes_it(server: Running) -> None:
    body: Json = {"prompt": "abcd", "max_tokens": 6, "stream": True}
    plain = server.post("/v1/completions", body)
    assert plain.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert plain.headers["cache-control"] == "no-store"
    assert plain.headers["x-accel-buffering"] == "no"
    *events, last = plain.events
    assert last == "[DONE]"
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    assert events[0]["id"].startswith("cmpl-")
    assert events[0]["object"] == "text_completion"
    # Who does not ask has no event without a choice, whose choices[0] would fail.
    assert all(event["choices"] and "usage" not in event for event in events)
    asked = server.post("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    *events, usage, _ = asked.events
    assert all(event["usage"] is None and event["choices"] for event in events)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}


def test_a_chat_is_its_template_continued(server: Running, model: ColaDLM) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body: Json = {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 11}
    wanted = model.chat([{"role": "user", "content": "hello"}], 11)
    answer = server.post("/v1/chat/completions", body).json
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": wanted.text, "refusal": None}
    stream = server.post("/v1/chat/completions", {**body, "stream": True, "n": 2})
    assert [event["choices"][0]["delta"] for event in stream.events[:2]] == [
        {"role": "assistant", "content": ""}
    ] * 2
    assert stream.texts()[0] == wanted.text
    assert all(event["object"] == "chat.completion.chunk" for event in stream.events[:-1])
    # 256 where nothing is said, or what fits.
    short = server.post("/v1/chat/completions", {"messages": body["messages"]}).json
    assert short["usage"]["completion_tokens"] == 256


def test_a_chat_that_cannot_be_is_refused_by_name(server: Running) -> None:
    for content, code, param in [
        ("<|im_end|>", "invalid_value", "messages"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "invalid_value", "messages.0.content"),
    ]:
        error = server.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}
        ).error
        assert error["code"] == code
        assert error["param"].startswith(param)
    assert server.post("/v1/chat/completions", {"messages": []}).error["param"] == "messages"
    assert server.post("/v1/chat/completions", {"messages": [{"role": "x", "content": ""}]}).status == 400
    plain = byte_model()
    plain.chat_template = None
    with running({"plain": plain}, LIMITS) as other:
        refused = other.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
        assert (refused.status, refused.error["code"]) == (400, "no_chat_template")


def test_a_suffix_makes_it_a_hole(server: Running, model: ColaDLM) -> None:
    body = {"prompt": "before ", "suffix": " after", "max_tokens": 6, "seed": 5}
    wanted = model.infill("before ", " after", 6, seed=5)
    assert server.post("/v1/completions", body).json["choices"][0]["text"] == wanted.text
    stream = server.post("/v1/completions", {**body, "stream": True, "colada": {"guesses": True}})
    assert stream.texts() == {0: wanted.text}
    assert server.post("/v1/completions", {**body, "stop": "a"}).error["param"] == "stop"


def test_echo_comes_first(server: Running) -> None:
    body = {"prompt": ["né", "b"], "max_tokens": 5, "n": 2}
    plain = server.post("/v1/completions", body).json["choices"]
    echoed = server.post("/v1/completions", {**body, "echo": True}).json["choices"]
    stream = server.post("/v1/completions", {**body, "echo": True, "stream": True})
    for number, prompt in enumerate(["né", "né", "b", "b"]):
        assert echoed[number]["text"] == prompt + plain[number]["text"] == stream.texts()[number]


def test_candidates_and_whole_sentences_are_as_in_python(server: Running) -> None:
    model = server.models["bytes"]
    settings = {"candidates": 3, "whole_sentences": True, "steps": 2}
    sent = server.post("/v1/completions", {"prompt": "abc", "max_tokens": 9, "seed": 5, "colada": settings})
    (choice,) = sent.json["choices"]
    (wanted,) = model.generate("abc", 9, seed=5, **settings)
    assert (choice["text"], choice["finish_reason"]) == (wanted.text, "length")
    assert choice["colada"]["settings"]["candidates"] == 3
    too_many = server.post("/v1/completions", {"prompt": "abc", "colada": {"candidates": 17}})
    assert too_many.error["param"] == "colada.candidates"


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({"steps": 2, "solver": "heun"}, [0.5, 0.5, 0.0]),
        ({"steps": 4, "early_end": 0.6}, [0.75, 0.0]),
        ({"schedule": [1, 0.9, 0.3, 0]}, [0.9, 0.3, 0.0]),
    ],
    ids=["two evaluations a step", "an early end", "a schedule of its own"],
)
def test_a_guess_says_where_its_evaluation_has_led(
    server: Running, settings: dict[str, Any], times: list[float]
) -> None:
    colada = {"guesses": True, "solver": "euler", "schedule": "uniform", **settings}
    body = {"prompt": "abcde", "max_tokens": 3, "stream": True, "colada": colada}
    told = [
        event["colada"] for event in server.post("/v1/completions", body).events[:-1] if "colada" in event
    ]
    guesses = [one for one in told if one["type"] == "guess" and one["block"] == 0]
    assert [one["a"] for one in guesses] == times


def test_guesses_show_a_block_come_into_focus(server: Running) -> None:
    colada = {
        "guesses": True,
        "latents": "pca",
        "steps": 5,
        "solver": "euler",
        "tokens": True,
        "confidence": True,
    }
    body = {"prompt": "abcde", "max_tokens": 9, "stream": True, "colada": colada}
    stream = server.post("/v1/completions", body)
    told = [event["colada"] for event in stream.events[:-1] if "colada" in event]
    guesses = [one for one in told if one["type"] == "guess"]
    blocks = [one for one in told if one["type"] == "block"]
    assert [(one["block"], one["step"]) for one in guesses] == [(b, s) for b in range(3) for s in range(1, 6)]
    assert all(one["steps"] == 5 and one["index"] == 0 for one in guesses)
    assert [one["a"] for one in guesses[:5]] == [0.8, 0.6, 0.4, 0.2, 0.0]
    for one in [*guesses, *blocks]:
        assert all(0 <= probability <= 1 for _, _, probability in one["tokens"])
    for one in guesses:
        assert len(base64.b64decode(one["latents"])) == 3 * len(one["tokens"])  # Three bytes a latent.
    for block in blocks:  # Without noise left, the last guess is the block.
        last = [one for one in guesses if one["block"] == block["block"]][-1]
        assert [token for token, _, _ in last["tokens"]] == [token for token, _, _ in block["tokens"]]
    details = stream.events[-2]["choices"][0]["colada"]
    assert details["tokens"] == [token for block in blocks for token, _, _ in block["tokens"]]
    assert details["confidence"] == [p for block in blocks for _, _, p in block["tokens"]]
    assert (
        stream.texts()[0]
        == server.post(
            "/v1/completions",
            {**body, "stream": False, "colada": {**colada, "guesses": False, "latents": None}},
        ).json["choices"][0]["text"]
    )
    full = server.post("/v1/completions", {**body, "colada": {**colada, "latents": "full"}})
    data = next(event["colada"]["latents"] for event in full.events if "colada" in event)
    assert np.isfinite(np.frombuffer(base64.b64decode(data), np.float16).reshape(3, 8)).all()


def test_who_watches_first_waits_for_no_colours(server: Running) -> None:
    (served,) = server.service.driver.models.values()
    assert "directions" in vars(served)  # Made while it was loaded: a text of 128 tokens holds everybody up.


def test_only_so_many_watch_at_once(server: Running) -> None:
    admission = server.service.admission
    admission.watchers += LIMITS.watchers
    try:
        body = {"prompt": "a", "stream": True, "colada": {"guesses": True}}
        refused = server.post("/v1/completions", body)
        assert (refused.status, refused.error["code"]) == (429, "too_many_watchers")
        assert refused.headers["retry-after"] == "1"
        assert server.post("/v1/completions", {"prompt": "a", "stream": True}).status == 200
    finally:
        admission.watchers -= LIMITS.watchers


REFUSED: list[tuple[Json, str, str]] = [
    ({"frequency_penalty": 0.1}, "frequency_penalty", "unsupported_parameter"),
    ({"presence_penalty": -1}, "presence_penalty", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
    ({"logprobs": 1}, "logprobs", "unsupported_parameter"),
    ({"logprobs": 0}, "logprobs", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"min_p": 0.1}, "min_p", "unsupported_parameter"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"service_tier": "flex"}, "service_tier", "unsupported_parameter"),
    ({"min_tokens": 1}, "min_tokens", "unsupported_parameter"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "unsupported_parameter"),
    ({"priority": True}, "priority", "unsupported_parameter"),
    ({"tools": [1]}, "tools", "unsupported_parameter"),
    ({"maxtokens": 5}, "maxtokens", "unknown_parameter"),
    ({"colada": {"step": 5}}, "colada.step", "unknown_parameter"),
    ({"colada": {"steps": 65}}, "colada.steps", "invalid_value"),
    ({"colada": {"steps": 0}}, "colada.steps", "invalid_value"),
    ({"colada": {"schedule": [1 - k / 65 for k in range(66)]}}, "colada.schedule", "invalid_value"),
    ({"colada": {"guidance": 101}}, "colada.guidance", "invalid_value"),
    ({"colada": {"solver": "rk4"}}, "colada.solver", "invalid_value"),
    ({"colada": {"guidance_interval": [1, 0]}}, "colada.guidance_interval", "invalid_value"),
    ({"colada": {"end_ids": [260]}}, "colada.end_ids", "invalid_value"),
    ({"colada": {"guesses": True}}, "colada.guesses", "invalid_value"),
    ({"colada": {"latents": "pca"}, "stream": True}, "colada.latents", "invalid_value"),
    ({"colada": 5}, "colada", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 257}, "max_tokens", "invalid_value"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
    ({"max_tokens": 5.0}, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, "max_tokens", "invalid_value"),
    ({"n": 17}, "n", "invalid_value"),
    ({"n": 16, "prompt": ["a"] * 5}, "n", "invalid_value"),
    ({"prompt": ["a"] * 65}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
    ({"prompt": [True, 1]}, "prompt", "invalid_value"),
    ({"prompt": [260]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": {}}, "prompt", "invalid_value"),
    ({"prompt": "a" * 512}, "prompt", "context_length_exceeded"),
    ({"prompt": "a" * 400, "max_tokens": 113}, "max_tokens", "context_length_exceeded"),
    ({"temperature": 0.001}, "temperature", "invalid_value"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"temperature": 101}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"top_k": 261}, "top_k", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"seed": -1}, "seed", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": 2**63 - 1, "n": 2}, "seed", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": [""]}, "stop", "invalid_value"),
    ({"stop": "a" * 257}, "stop", "invalid_value"),
    ({"stop": [1]}, "stop", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more", "unknown_parameter"),
    ({"ignore_eos": True, "colada": {"end_ids": [1]}}, "ignore_eos", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_honoured_is_refused_by_name(
    server: Running, fields: Json, param: str, code: str
) -> None:
    for stream in [False, True]:  # A stream is refused before it begins, with the same status.
        body = {"prompt": "a", "stream": stream, **fields}
        refused = server.post("/v1/completions", body)
        if stream and fields.get("stream_options") == {"include_usage": True}:
            continue
        if stream and fields.get("colada") == {"guesses": True}:
            continue
        assert refused.status == 400
        assert (refused.error["param"], refused.error["code"]) == (param, code), refused.error
        assert refused.error["type"] == "invalid_request_error"


TAKEN: list[Json] = [
    {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": None, "best_of": 1},
    {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "request_id": "5"},
    {"min_tokens": 0, "skip_special_tokens": True, "include_stop_str_in_output": False, "priority": 0},
    {"max_tokens": 3, "max_completion_tokens": 3, "stop": None, "ignore_eos": True, "top_k": -1},
    {"stream": True, "stream_options": None, "colada": None, "n": None, "temperature": None},
    {"model": "bytes", "top_p": 1, "repetition_penalty": 1, "colada": {}},
]


@pytest.mark.parametrize("fields", TAKEN, ids=lambda fields: next(iter(fields)))
def test_fields_that_ask_for_nothing_are_taken(server: Running, model: ColaDLM, fields: Json) -> None:
    body = {"prompt": "a", "max_tokens": 3, **fields}
    answer = server.post("/v1/completions", body)
    check_answer(answer, body, alone(model, body))


def test_the_longest_request_is_taken_and_one_token_more_is_not(server: Running) -> None:
    body: Json = {"prompt": "a" * 500, "max_tokens": 12}
    assert server.post("/v1/completions", body).status == 200
    assert (
        server.post("/v1/completions", {**body, "max_tokens": 13}).error["code"] == "context_length_exceeded"
    )


def test_a_lenient_server_names_what_it_leaves_out() -> None:
    with running({"bytes": byte_model()}, LIMITS, lenient=True) as server:
        answer = server.post("/v1/completions", {"prompt": "a", "x": 1, "y": 2})
        assert answer.status == 200
        assert answer.headers["x-colada-ignored"] == "'x', 'y'"
        assert server.post("/v1/completions", {"prompt": "a", "colada": {"x": 1}}).status == 400


def test_models_are_told_and_asked_for_by_name(server: Running) -> None:
    (card,) = server.get("/v1/models").json["data"]
    assert card == server.get("/v1/models/bytes").json
    assert (card["id"], card["object"], card["owned_by"], card["created"]) == (
        "bytes",
        "model",
        "colada",
        1_700_000_000,
    )
    details = card["colada"]
    assert (details["arch"], details["block"], details["patch"], details["max_context"]) == (
        "cola",
        4,
        1,
        512,
    )
    assert (details["defaults"]["steps"], details["infill"], details["chat"]) == (3, True, True)
    for answer in [server.get("/v1/models/other"), server.post("/v1/completions", {"model": "other"})]:
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")


def test_tokens_of_a_text_and_text_of_tokens(server: Running, model: ColaDLM) -> None:
    answer = server.post("/tokenize", {"prompt": "né<|pad|>"}).json
    assert answer == {"tokens": model.ids("né<|pad|>"), "count": 4, "max_model_len": 512}
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json == {"prompt": "né<|pad|>"}
    assert server.post("/detokenize", {"tokens": [260]}).error["param"] == "tokens"
    assert server.post("/tokenize", {}).error["code"] == "missing_parameter"


def test_latents_of_a_text_and_text_of_latents(server: Running, model: ColaDLM) -> None:
    wanted = model.encode("hello there").numpy()
    packed = server.post("/colada/encode", {"input": "hello there"}).json
    assert packed["shape"] == [11, 8]
    latents = np.frombuffer(base64.b64decode(packed["latents"]), np.float32).reshape(11, 8)
    assert np.array_equal(latents, wanted)
    numbers = server.post("/colada/encode", {"input": "hello there", "encoding_format": "float"}).json
    assert np.allclose(numbers["latents"], wanted, atol=1e-7)
    ids = model.decode(model.encode("hello there"))
    for value in (packed["latents"], numbers["latents"]):
        assert server.post("/colada/decode", {"latents": value}).json["tokens"] == ids
    for bad in ["?", "AAAA", [[1.0]], [[1e300] * 8], [[1.0] * 8] * 3000]:
        refused = server.post("/colada/decode", {"latents": bad})
        assert refused.status == 400, bad
        assert refused.error["param"] == "latents"


def test_what_others_serve_says_where_to_go(server: Running) -> None:
    for path, where in [
        ("/v1/embeddings", "/colada/encode"),
        ("/v1/responses", "/v1/chat"),
        ("/infill", "suffix"),
    ]:
        answer = server.post(path, {})
        assert (answer.status, answer.error["code"]) == (404, "not_supported")
        assert where in answer.error["message"]
    assert server.get("/nothing").error["code"] == "not_found"
    wrong = server.get("/v1/completions")
    assert (wrong.status, wrong.error["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")


def test_health_metrics_and_the_description_are_told(server: Running) -> None:
    for path in ("/health", "/ready"):
        assert server.get(path).json == {
            "status": "ready",
            "running": 0,
            "waiting": 0,
            "slots": 8,
            "key": False,
        }
    assert server.get("/live").json == {"status": "live"}
    server.post("/v1/completions", {"prompt": "abc", "max_tokens": 5})
    text = server.get("/metrics").body.decode()
    for name in (
        'colada_requests_total{endpoint="/v1/completions",status="200"}',
        'colada_tokens_total{kind="completion",model="bytes"}',
        'colada_open{what="places"} 0.0',
        "colada_first_block_seconds_count",
        "colada_engine_heartbeat_seconds",
    ):
        assert name in text, name
    described = server.get("/openapi.json").json
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/health"} <= set(described["paths"])
    assert "422" not in json.dumps(described["paths"])


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {
        name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)
    }


def test_metrics_count_what_is_written(server: Running) -> None:
    before = server.metrics()
    colada = {"guesses": True, "steps": 5, "guidance": 1.0}
    body = {"prompt": "abcd", "max_tokens": 8, "n": 2, "ignore_eos": True, "stream": True, "colada": colada}
    answer = server.post("/v1/completions", body)
    guesses = sum(
        event != "[DONE]" and event.get("colada", {}).get("type") == "guess" for event in answer.events
    )
    server.empty()
    more = grown(before, server.metrics())
    # Two choices of two blocks in five steps; the second may begin a block after the first.
    assert more["colada_blocks_total"] == 4
    assert more["colada_rows_per_pass_sum"] == 4 * 5
    assert more["colada_rows_per_pass_count"] == more["colada_solver_steps_total"]
    assert 10 <= more["colada_solver_steps_total"] <= 20
    assert more['colada_guesses_total{what="sent"}'] == guesses == 4 * 5
    assert more["colada_queue_seconds_count"] == 2
    assert more["colada_first_block_seconds_count"] == more["colada_block_interval_seconds_count"] == 2
    assert more['colada_tokens_total{kind="completion",model="bytes"}'] == 16
    assert more['colada_tokens_total{kind="prompt",model="bytes"}'] == 4
    assert more['colada_choices_total{finish="length",model="bytes"}'] == 2
    assert more["colada_wakeups_total"] <= more["colada_step_seconds_count"]
    now = server.metrics()
    (info,) = [name for name in now if name.startswith("colada_info{")]
    for label in ('model="bytes"', 'device="cpu"', 'dtype="float32"', 'fingerprint="colada-', 'version="'):
        assert label in info
    assert now[info] == 1
    assert now["process_resident_memory_bytes"] > 2**20
    assert "colada_engine_restarts_total" in now


def test_every_answer_has_an_id(server: Running) -> None:
    assert server.get("/live", x_request_id="my-id.5").headers["x-request-id"] == "my-id.5"
    for odd in ("a b", "x" * 129, "né"):
        assert len(server.get("/live", x_request_id=odd).headers["x-request-id"]) == 32


def test_two_models_share_the_thread_and_each_answers_for_itself() -> None:
    models: dict[str, Any] = {"one": byte_model(), "two": byte_model(steps=5, guidance=1.0)}
    with running(models, LIMITS) as server:

        async def both() -> list[Any]:
            bodies = [{"model": name, "prompt": "abc", "max_tokens": 30} for name in ("one", "two") * 4]
            return await asyncio.gather(*[ask(server.port, "/v1/completions", body) for body in bodies])

        for answer in asyncio.run(both()):
            wanted = models[answer.json["model"]].generate(["abc"], 30)[0]
            assert answer.json["choices"][0]["text"] == wanted.text
        missing = server.post("/v1/completions", {"prompt": "a"})
        assert (missing.status, missing.error["param"]) == (400, "model")
        server.empty()


def test_files_of_the_page_come_with_a_strict_policy(server: Running) -> None:
    page = Path(__file__).parents[1] / "src/colada/serve/playground/index.html"
    if not page.is_file():
        pytest.skip("no playground here")
    answer = server.get("/")
    assert answer.body == page.read_bytes()
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert server.get("/playground/../app.py").status == 404


@pytest.mark.parametrize("arch", ["ar", "llada"])
def test_a_baseline_is_served_too(arch: str) -> None:
    config = DecoderConfig(objective=arch, vocab_size=260, dim=32, num_layers=2, num_heads=4, ffn_dim=64)
    decoder = Decoder(config)
    decoder.init_weights(torch.Generator().manual_seed(0))
    kind = {"ar": AutoregressiveLM, "llada": MaskedLM}[arch]
    model: Any = kind(decoder.eval(), byte_model().tokenizer)
    bodies: list[Json] = [
        {"prompt": "abc", "max_tokens": 13, "temperature": 1.0, "seed": 3, "stream": True},
        {"prompt": ["", "b" * 40], "max_tokens": 7, "n": 2, "ignore_eos": True},
        {"prompt": [1, 2], "max_tokens": 30, "stop": ["a", "e"], "stream": True},
    ]
    with running({arch: model}, LIMITS) as server:

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*[ask(server.port, "/v1/completions", body) for body in bodies])

        for body, answer in zip(bodies, asyncio.run(all_of_them()), strict=True):
            check_answer(answer, body, alone(model, body))
        refused = server.post("/v1/completions", {"prompt": "a", "colada": {"guidance": 2}})
        assert (refused.status, refused.error["param"]) == (400, "colada.guidance")
        assert server.post("/v1/completions", {"prompt": "a", "suffix": "b"}).error["param"] == "suffix"
        assert server.post("/colada/encode", {"input": "a"}).error["param"] == "model"
        assert server.get("/v1/models").json["data"][0]["colada"]["arch"] == arch
        server.empty()


def test_the_tests_that_the_page_names_are_there() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"`(test_\w+)`", (tests.parent / "docs" / "serving.md").read_text())
    there = set(
        re.findall(r"^def (test_\w+)", "".join(file.read_text() for file in tests.glob("test_*.py")), re.M)
    )
    assert named
    assert set(named) <= there
