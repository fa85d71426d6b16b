"""``colada serve`` as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from colada.cli import main as cli
from serving import Answer, ask, byte_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("serve") / "tiny"
    byte_model().save(directory)
    return directory


@contextmanager
def process(*args: str, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server at a free port, ready; ended by force if it has not ended."""
    command = [sys.executable, "-m", "colada", "serve", "--port", "0", *args]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"http://[^ ]*:(\d+)", line)
        assert found, line + server.stderr.read()
        port = int(found[1])
        threading.Thread(target=server.stderr.read, daemon=True).start()  # So that it never waits.
        end = time.monotonic() + 60
        while status(port) != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        yield server, port
    finally:
        server.kill()
        server.wait()


def status(port: int) -> int:
    try:
        return asyncio.run(ask(port, "/ready", method="GET")).status
    except (OSError, IndexError):
        return 0


async def streams(port: int, count: int, tokens: int) -> list[asyncio.Task[Answer]]:
    """Streams that have begun."""
    body = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    asked = [asyncio.ensure_future(ask(port, "/v1/completions", body)) for _ in range(count)]
    while (await ask(port, "/ready", method="GET")).json["running"] < count:
        await asyncio.sleep(0.02)
    return asked


def test_at_sigterm_everybody_is_answered_and_nobody_is_taken(saved: Path) -> None:
    with process(str(saved)) as (server, port):

        async def end() -> None:
            asked = await streams(port, 10, 400)
            server.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
            ready = await ask(port, "/ready", method="GET")
            assert (ready.status, ready.json["status"]) == (503, "draining")
            refused = await ask(port, "/v1/completions", {"prompt": "a"})
            assert (refused.status, refused.error["code"]) == (503, "draining")
            assert "retry-after" in refused.headers
            for answer in await asyncio.gather(*asked):
                assert answer.events[-1] == "[DONE]"
                assert answer.complete

        asyncio.run(end())
        assert server.wait(10) == 0


@pytest.mark.slow
def test_who_is_not_finished_in_time_is_told(saved: Path) -> None:
    with process(str(saved), "--drain", "0.2") as (server, port):

        async def end() -> None:
            asked = await streams(port, 3, 4000)
            server.send_signal(signal.SIGINT)
            for answer in await asyncio.gather(*asked):
                assert answer.events[-1]["error"]["code"] == "shutting_down"
                assert answer.complete

        asyncio.run(end())
        assert server.wait(10) == 0


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(saved: Path) -> None:
    with process(str(saved), "--drain", "60") as (server, port):

        async def end() -> None:
            asked = await streams(port, 3, 8000)
            server.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            server.send_signal(signal.SIGTERM)
            await asyncio.gather(*asked, return_exceptions=True)

        begin = time.monotonic()
        asyncio.run(end())
        server.wait(10)
        assert time.monotonic() - begin < 15


@pytest.mark.slow
def test_killed_it_breaks_streams_off_without_an_end_and_its_port_is_free(saved: Path) -> None:
    with process(str(saved)) as (server, port):

        async def end() -> None:
            asked = await streams(port, 3, 8000)
            server.kill()
            for answer in await asyncio.gather(*asked, return_exceptions=True):
                # Neither a body that ends nor an event that says so: a client cannot take it for an answer.
                assert (
                    isinstance(answer, OSError | asyncio.IncompleteReadError | IndexError)
                    or not answer.complete
                )
                assert isinstance(answer, BaseException) or "[DONE]" not in answer.events

        asyncio.run(end())
        assert server.wait(10) == -signal.SIGKILL
    with process(str(saved), "--port", str(port)) as (_, again):
        assert again == port
        assert asyncio.run(ask(port, "/v1/completions", {"prompt": "a"})).status == 200


def test_keys_of_the_environment_are_asked_for(saved: Path) -> None:
    with process(f"mine={saved}", env={"COLADA_API_KEYS": "one, two"}) as (_, port):
        assert asyncio.run(ask(port, "/v1/models", method="GET")).status == 401
        answer = asyncio.run(ask(port, "/v1/models", method="GET", headers={"Authorization": "Bearer two"}))
        assert answer.json["data"][0]["id"] == "mine"


def test_idle_connections_keep_no_probe_out(saved: Path) -> None:
    with process(str(saved), "--max-connections", "2") as (_, port):
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for path in ("/live", "/ready", "/health"):
            assert asyncio.run(ask(port, path, method="GET")).status == 200
        for one in idle:
            one.close()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["nowhere"], "no model at 'nowhere'"),
        (["a=nowhere"], "no model at 'nowhere'"),
        (["--host", "0.0.0.0"], "host=0.0.0.0 and no key"),
        (["--log", "loud"], "log='loud'"),
        (["--device", "tpu"], "device='tpu'"),
        (["--dtype", "int3"], "dtype='int3'"),
        (["--slots", "0"], "greater than or equal to 1, not '0'"),
        (["--port", "65536"], "less than or equal to 65535, not '65536'"),
        (["--api-key-file", "/nowhere"], "/nowhere"),
        (["--api-key-file", "{empty}"], "has no key"),
        (["--host", "192.0.2.1", "--no-key"], "cannot listen at 192.0.2.1:8000"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_one_line(
    args: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "keys"
    empty.write_text("# none\n")
    assert cli.main(["serve", *[arg.replace("{empty}", str(empty)) for arg in args]]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_two_models_of_one_name_and_a_broken_one_end_with_status_2(saved: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    byte_model().save(broken)
    (broken / "cola_dit" / "model.safetensors").write_bytes(b"")
    for args, named in [([f"{saved}", f"tiny={saved}"], "'tiny'"), ([str(broken)], "model.safetensors")]:
        ended = subprocess.run(
            [sys.executable, "-m", "colada", "serve", "--port", "0", *args],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[-1].startswith("error: ")
        assert named in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr


def test_settings_are_checked_before_torch_is_imported() -> None:
    code = (
        "import sys; from colada.cli.main import main; main(['serve', '--log', 'loud']);"
        "assert not {'torch', 'fastapi', 'uvicorn'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_keys_are_read_again_at_sighup_and_metrics_have_a_port_of_their_own(
    saved: Path, tmp_path: Path
) -> None:
    keys, metrics = tmp_path / "keys.txt", free_port()
    keys.write_text("one\n")
    with process(
        *(str(saved), "--api-key-file", str(keys), "--metrics-port", str(metrics), "--reproducible")
    ) as (server, port):

        def asked(key: str) -> int:
            sent = {"Authorization": f"Bearer {key}"}
            return asyncio.run(ask(port, "/v1/models", method="GET", headers=sent)).status

        assert (asked("one"), asked("two")) == (200, 401)
        assert asyncio.run(ask(port, "/ready", method="GET")).json["slots"] == 1
        keys.write_text("# none is right\ntw o\n")
        server.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert (asked("one"), asked("two")) == (200, 401)
        keys.write_text("two\n")
        server.send_signal(signal.SIGHUP)
        end = time.monotonic() + 10
        while asked("two") != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert asked("one") == 401
        shown = asyncio.run(ask(metrics, "/metrics", method="GET"))
        assert shown.status == 200
        assert b'colada_open{what="places"} 0.0' in shown.body
        assert b"colada_engine_heartbeat_seconds" in shown.body


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
