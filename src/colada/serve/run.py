"""One process that serves: uvicorn, torch's threads, and an end that leaves nobody without an answer."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import start_http_server

from colada.errors import ColadaError
from colada.serve.admission import Limits, Policy, Refusal
from colada.serve.app import create_app
from colada.serve.driver import Models
from colada.serve.models import Served

logger = logging.getLogger("colada.serve")

SPARE_FILES = 256
"""Open files of the process beside its connections, at most."""


class Server(uvicorn.Server):
    """At the first signal, takes no more requests and lets those finish that it has; at the second, ends."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._service = app.state.service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        if self._service.draining or self._service.status != "ready":
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        asyncio.get_running_loop().call_soon_threadsafe(lambda: asyncio.ensure_future(self._end()))

    async def _end(self) -> None:
        driver = self._service.driver
        logger.info("draining: %d requests are under way", len(driver.tickets))
        for _ in range(round(self._service.limits.drain / 0.05)):
            if not driver.tickets:
                break
            await asyncio.sleep(0.05)
        driver.fail_all(Refusal(503, "shutting_down", "the server ends"))
        await asyncio.sleep(0.05)  # In which the last events leave.
        self.should_exit = True


def run(
    listener: socket.socket,
    open_models: Callable[[], list[Served]],
    limits: Limits,
    policy: Policy,
    *,
    lenient: bool,
    threads: int | None,
    root_path: str,
    page: bool,
    metrics_port: int | None = None,
    proxies: str | None = None,
    read_keys: Callable[[], list[str]] = list,
) -> int:
    """Serve until told to end, and return the exit status: 1 where the engine has failed.

    Args:
        threads: torch's; None is the cores less one.
        page: open the playground in a browser.
        metrics_port: show the metrics there, at the same address and without a key.
        proxies: addresses, with commas, whose X-Forwarded headers count; "*" is any.
        read_keys: called at SIGHUP for the keys that count from then on.

    Raises:
        ColadaError: if a model cannot be loaded, two have one name, or the port of the metrics is taken.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)

    def named_models() -> Models:
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores - 1))
        served = open_models()
        models = {one.name: one for one in served}
        if len(models) < len(served):
            names = ", ".join(repr(one.name) for one in served)
            raise ColadaError(f"models called {names}, expected different names, as NAME=WHERE")
        # What is loaded stays: to look through all of it for garbage would hold every stream up.
        gc.collect()
        gc.freeze()
        return models

    app = create_app(named_models, limits, policy, lenient=lenient, on_end=lambda: end())
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=proxies is not None,
        forwarded_allow_ips=proxies,
        root_path=root_path,
        timeout_graceful_shutdown=5,
    )
    server = Server(config, app)
    allow_connections(policy.connections)

    def end() -> None:
        server.should_exit = True

    def reload(*_: object) -> None:
        try:
            policy.keys[:] = read_keys()
        except ColadaError as mistake:
            logger.error("the keys stay as they are: %s", mistake)
        else:
            logger.info("%d keys are read again", len(policy.keys))

    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, reload)
    host, port = listener.getsockname()[:2]
    if metrics_port is not None:
        try:
            start_http_server(metrics_port, host, app.state.service.metrics.registry)
        except OSError as mistake:
            reason = mistake.strerror or mistake
            raise ColadaError(f"cannot show metrics at {host}:{metrics_port}: {reason}") from None
    address = f"http://{'localhost' if host in ('127.0.0.1', '::1') else host}:{port}"
    logger.info("serving at %s (the models are being loaded)", address)
    if page:
        webbrowser.open(address)
    server.run([listener])
    error = app.state.service.driver.error
    if isinstance(error, ColadaError):
        raise error
    return 0 if error is None else 1


def allow_connections(count: int) -> None:
    """Let this process have so many connections, idle ones and files beside them, or say that it may not."""
    if sys.platform == "win32":  # There, no such limit.
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 2 * count + SPARE_FILES
    most = files if hard == resource.RLIM_INFINITY else min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < count + SPARE_FILES:
        logger.warning("the system allows %d open files, too few for %d connections", most, count)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound. Raises ColadaError where that cannot be."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ColadaError(f"cannot listen at {host}:{port}: {error.strerror or error}") from None
    return listener
