"""What goes wrong on the wire: bodies and bytes that are no request. Others go on."""

from __future__ import annotations

import gzip
import json
import socket
import time

import pytest

from colada.serve.admission import Limits
from colada.serve.edge import MOST_BODY
from serving import Running, byte_model, running

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
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        answer = server.post("/v1/completions", body)
        seconds.append(time.process_time() - begin)
        assert (answer.status, answer.error["code"]) == (status, code), answer.error
        assert len(answer.error["message"]) < 1200
    # The client's and the loop's; 50 ms on an idle machine. The least has no garbage collection in it.
    assert min(seconds) < 0.25


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
