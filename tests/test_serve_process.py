"""``colada serve`` as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from colada.cli import main as cli
from colada.cli.serve import KERNELS, KEYS_VARIABLE, serve
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


def both(*options: str | None) -> list[tuple[str | None, ...]]:
    """Return what is opened where no model is named: that of texts, and that of chats."""
    return [(None, None, None, *options), ("colada-chat", "bundled-chat", None, *options)]


# By option: what is written, where it is to be found in what is served, and what stands there.
NAMES = ["localhost", "127.0.0.1", "[::1]", "mine"]
WIRED: dict[str, tuple[str, str, Any]] = {
    "models": ("one={saved}", "opened", [("one", "{saved}", None, None, "cpu", None)]),
    "host": ("--host localhost", "host", "localhost"),
    "port": ("--port 81", "port", 81),
    "api_key_file": ("--api-key-file {keys}", "policy.keys", ["first", "second"]),
    "api_key_file, away": ("--api-key-file {keys} --host 0.0.0.0", "policy.hosts", ["*"]),
    "allowed_host, keys": ("--api-key-file {keys} --host 0.0.0.0 --allowed-host Mine", "policy.hosts", NAMES),
    "no_key": ("--host 0.0.0.0 --no-key", "policy.hosts", ["*"]),
    "allowed_host": ("--allowed-host Mine", "policy.hosts", NAMES),
    "cors_origin": (
        "--cors-origin http://a --cors-origin http://b",
        "policy.origins",
        ("http://a", "http://b"),
    ),
    "slots": ("--slots 3", "limits.slots", 3),
    "capacity": ("--capacity 5", "limits.capacity", 5),
    "max_waiting": ("--max-waiting 0", "limits.waiting", 0),
    "max_context": ("--max-context 7", "limits.context", 7),
    "max_tokens": ("--max-tokens 9", "limits.max_tokens", 9),
    "max_steps": ("--max-steps 11", "limits.max_steps", 11),
    "watchers": ("--watchers 0", "limits.watchers", 0),
    "timeout": ("--timeout 13.5", "limits.timeout", 13.5),
    "queue_timeout": ("--queue-timeout 15", "limits.queue", 15.0),
    "reader_timeout": ("--reader-timeout 17", "limits.reader", 17.0),
    "max_connections": ("--max-connections 19", "policy.connections", 19),
    "ping": ("--ping 0", "limits.ping", 0.0),
    "stall": ("--stall 21", "limits.stall", 21.0),
    "drain": ("--drain 0", "limits.drain", 0.0),
    "threads": ("--threads 2", "threads", 2),
    "reproducible": ("--reproducible --slots 5", "limits.slots", 1),
    "lenient": ("--lenient", "lenient", True),
    "metrics_public": ("--metrics-public", "policy.public_metrics", True),
    "metrics_port": ("--metrics-port 82", "metrics_port", 82),
    "log": ("--log json", "policy.log", "json"),
    "log_prompts": ("--log-prompts", "policy.log_prompts", True),
    "forwarded_allow_ips": ("--forwarded-allow-ips 10.0.0.1,10.0.0.2", "proxies", "10.0.0.1,10.0.0.2"),
    "root_path": ("--root-path /llm", "root_path", "/llm"),
    "open_page": ("--open", "page", True),
    "dtype": ("--dtype float32", "opened", both("float32", "cpu", None)),
    "device": ("--device cpu", "opened", both(None, "cpu", None)),
    "quantise": ("--quantise int8", "opened", both(None, "cpu", "int8")),
}


@pytest.mark.parametrize("option", {**inspect.signature(serve).parameters, **WIRED})
def test_every_option_comes_to_where_it_counts(
    option: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from colada.serve import models, run

    (tmp_path / "keys").write_text("first # the one\nsecond\n")
    places = {"{saved}": str(saved), "{keys}": str(tmp_path / "keys")}
    served: dict[str, Any] = {}

    def take(listener: Any, open_models: Any, limits: Any, policy: Any, **more: Any) -> int:
        served.update(host=listener[0], port=listener[1], opened=open_models(), limits=limits, policy=policy)
        served.update(more)
        return 0

    monkeypatch.setattr(run, "listen", lambda *address: address)
    monkeypatch.setattr(run, "run", take)
    monkeypatch.setattr(models, "open_served", lambda *asked: asked)
    for name in (KERNELS[0], KEYS_VARIABLE):
        monkeypatch.setenv(name, "")
    written, place, wanted = WIRED[option]
    assert (
        cli.main(
            ["serve", *[places.get(word, word.replace("{saved}", str(saved))) for word in written.split()]]
        )
        == 0
    )
    name, _, attribute = place.partition(".")
    value = getattr(served[name], attribute) if attribute else served[name]
    if option == "models":
        wanted = [tuple(places.get(str(one), one) for one in wanted[0])]
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_proxys_headers_count_if_it_is_trusted(saved: Path, trusted: bool) -> None:
    """Behind a proxy that takes TLS and a prefix off, links lead back through both."""
    args = ["--root-path", "/llm", *["--forwarded-allow-ips", "127.0.0.1"] * trusted]
    with process(str(saved), *args, env={"COLADA_API_KEYS": "one"}) as (_, port):

        def asked(path: str, **headers: str) -> Answer:
            return asyncio.run(ask(port, path, method="GET", headers=headers))

        sent = {"Host": "mine.example", "Authorization": "Bearer one"}
        moved = asked("/ready/", X_Forwarded_Proto="https", **sent)
        scheme = "https" if trusted else "http"
        assert (moved.status, moved.headers["location"]) == (307, f"{scheme}://mine.example/llm/ready")
        assert asked("/playground/playground.js").status == asked("/").status == asked("/ready").status == 200
        assert asked("/v1/models").status == 401
        elsewhere = asked("/v1/embeddings", Authorization="Bearer one")
        assert (elsewhere.status, elsewhere.error["code"]) == (404, "not_supported")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_open_files_are_allowed_for_as_many_connections_or_it_is_said() -> None:
    code = (
        "import resource, sys, logging; logging.basicConfig();"
        "from colada.serve.run import allow_connections;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 500));"
        "allow_connections(int(sys.argv[1])); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    for count, most, said in [(100, "456", False), (200, "500", False), (1024, "500", True)]:
        ended = subprocess.run(
            [sys.executable, "-c", code, str(count)], capture_output=True, text=True, timeout=120, check=True
        )
        assert ended.stdout.strip() == most
        assert ("too few for 1024 connections" in ended.stderr) == said


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


@pytest.mark.slow
def test_behind_nginx_streams_come_event_by_event_and_only_a_killed_replicas_are_lost(
    saved: Path, tmp_path: Path
) -> None:
    nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    front = free_port()
    with process(str(saved)) as (first, one), process(str(saved)) as (_, two):
        config = (Path(__file__).parents[1] / "deploy" / "nginx.conf").read_text()
        for shipped, own in {"8001": one, "8002": two, "8080": front}.items():
            config = config.replace(shipped, str(own))
        file = tmp_path / "nginx.conf"
        file.write_text(config.replace("/tmp/colada-nginx.pid", str(tmp_path / "pid")))
        subprocess.run([nginx, "-t", "-c", file], check=True, capture_output=True)
        with subprocess.Popen([nginx, "-c", file, "-g", "daemon off;"], stderr=subprocess.DEVNULL) as proxy:
            try:
                end = time.monotonic() + 20
                while status(front) != 200:
                    assert time.monotonic() < end
                    time.sleep(0.1)
                asyncio.run(lose_one(front, (one, two), first))
                assert asyncio.run(ask(front, "/metrics", method="GET")).status == 403
            finally:
                proxy.terminate()


async def lose_one(front: int, replicas: tuple[int, int], first: subprocess.Popen[str]) -> None:
    """Stream through a proxy, and kill the first of the two replicas behind it."""
    body = {"prompt": "a", "max_tokens": 600, "ignore_eos": True, "stream": True, "colada": {"steps": 16}}
    alone = await ask(front, "/v1/completions", body)
    assert alone.events[-1] == "[DONE]"
    began, ended = alone.times[0], alone.times[-1]
    assert sum(began + (ended - began) / 4 < at < ended - (ended - began) / 4 for at in alone.times) > 20
    asked = [asyncio.ensure_future(ask(front, "/v1/completions", body)) for _ in range(8)]

    async def running() -> list[int]:
        return [(await ask(port, "/ready", method="GET")).json["running"] for port in replicas]

    while sum(shares := await running()) < 8:
        await asyncio.sleep(0.02)
    assert 0 < shares[0] < 8
    first.kill()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    whole = [
        one for one in answers if isinstance(one, Answer) and one.complete and one.events[-1:] == ["[DONE]"]
    ]
    assert len(whole) == shares[1]
    later = [ask(front, "/v1/completions", {"prompt": "a", "max_tokens": 4}) for _ in range(8)]
    assert [answer.status for answer in await asyncio.gather(*later)] == [200] * 8


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
