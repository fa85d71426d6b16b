"""One process that serves: threads, models, uvicorn, and an end that leaves nobody without an answer."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from colada.errors import ColadaError
from colada.serve.admission import Limits, Refusal
from colada.serve.app import create_app
from colada.serve.driver import Models
from colada.serve.edge import Policy
from colada.serve.models import open_served

logger = logging.getLogger("colada.serve")


@dataclass(frozen=True)
class Options:
    """Where a server listens, and what it serves; see ``colada serve --help``."""

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    root_path: str = ""
    lenient: bool = False
    open_page: bool = False
    models: Sequence[tuple[str | None, str | None, str | None]] = ((None, None, None),)
    dtype: str | None = None
    device: str = "cpu"
    quantise: str | None = None

    def open_models(self) -> Models:
        """Load the models. Raises ColadaError if one cannot be, or two have one name."""
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(self.threads or max(1, cores - 1))
        models = {}
        for name, where, revision in self.models:
            begin = time.monotonic()
            served = open_served(name, where, revision, self.dtype, self.device, self.quantise)
            if served.name in models:
                raise ColadaError(f"two models are called {served.name!r}: give names, as NAME=WHERE")
            models[served.name] = served
            logger.info("loaded %s in %.1f s", served.name, time.monotonic() - begin)
        return models


class Server(uvicorn.Server):
    """Lets requests finish before it ends: at the first signal, none are taken; at the second, it ends."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain: float) -> None:
        super().__init__(config)
        self._service, self._drain = app.state.service, drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        if self._service.draining or self._service.driver.state != "ready":
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        asyncio.get_running_loop().call_soon_threadsafe(lambda: asyncio.ensure_future(self._end()))

    async def _end(self) -> None:
        driver, begin = self._service.driver, time.monotonic()
        logger.info("draining: %d requests are under way", driver.open_tickets)
        while driver.open_tickets and time.monotonic() - begin < self._drain:
            await asyncio.sleep(0.05)
        driver.fail_all(Refusal(503, "shutting_down", "the server ends"))
        await asyncio.sleep(0.05)  # In which the last events leave.
        self.should_exit = True


def run(options: Options, limits: Limits, policy: Policy) -> int:
    """Serve until told to end, and return the exit status: 1 where the engine has failed.

    Raises:
        ColadaError: if nothing can listen there, or a model cannot be loaded.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server: Server | None = None

    def end() -> None:
        if server is not None:
            server.should_exit = True

    app = create_app(options.open_models, limits, policy, lenient=options.lenient, on_end=end)
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        root_path=options.root_path,
        limit_concurrency=limits.connections * 5 // 4,
        timeout_graceful_shutdown=5,
    )
    server = Server(config, app, limits.drain)
    listener = _listen(options.host, options.port)
    port = listener.getsockname()[1]
    address = f"http://{'localhost' if options.host in ('127.0.0.1', '::1') else options.host}:{port}"
    logger.info("serving at %s (the models are being loaded)", address)
    if options.open_page:
        webbrowser.open(address)
    server.run([listener])
    driver = app.state.service.driver
    if isinstance(driver.error, ColadaError):
        raise driver.error
    return 0 if driver.error is None else 1


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound. Raises ColadaError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ColadaError(f"cannot listen at {host}:{port}: {error.strerror or error}") from None
    return listener
