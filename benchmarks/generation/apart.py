"""Peers in processes of their own: the threads of several libraries in one slow each other, idle ones too."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.generation.job import Job, Peer, Prompts, Turn, take_turn
from colada.errors import ColadaError


class Apart:
    """A peer that another process makes and runs; it takes its turns when it is asked to.

    Args:
        device: on which it computes.
        make: a function of a module, which returns the peer.
        arguments: of it; they are sent to the process.

    Raises:
        Exception: what ``make`` raises.
    """

    def __init__(self, device: torch.device, make: Callable[..., Peer], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self._process = context.Process(
            target=_work, args=(theirs, str(device), threads, make, arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer()

    def turn(self, prompts: Prompts, job: Job, first_tokens: int) -> Turn:
        """See :func:`take_turn`."""
        self._pipe.send((prompts, job, first_tokens))
        turn: Turn = self._answer()
        return turn

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            raise ColadaError(f"a peer's process ended with {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _work(
    pipe: Connection, device: str, threads: int, make: Callable[..., Peer], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    try:
        peer = make(*arguments)
    except Exception as error:  # Whoever waits for the peer is told.
        pipe.send(_plain(error))
        return
    pipe.send(None)
    while True:
        try:
            prompts, job, first_tokens = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(take_turn(peer, prompts, job, first_tokens, torch.device(device)))
        except Exception as error:  # Likewise.
            pipe.send(_plain(error))


def _plain(error: Exception) -> Exception:
    """Return an error that any process can read: of a kind of Python's own, torch's or this package's."""
    for kind in (torch.OutOfMemoryError, ColadaError, ValueError, RuntimeError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
