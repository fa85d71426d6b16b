"""The command line on several ranks: forks of a process that has imported torch, unlike torchrun's."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["colada.cli.train", "colada.train.trainer", "torch.distributed.checkpoint"])


@dataclass(frozen=True)
class Done:
    """How several ranks ended: their worst status, and what all of them printed."""

    returncode: int
    output: str


def started(ranks: int, arguments: Sequence[str], log: Path) -> list[BaseProcess]:
    """Start ``colada ARGUMENTS`` once a rank; what rank N prints is in the file ``log``.N."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        environment["MASTER_ADDR"] = "127.0.0.1"
        target = (list(arguments), environment, log.with_name(f"{log.name}.{rank}"))
        processes.append(_CONTEXT.Process(target=_rank, args=target))
        processes[-1].start()
    return processes


def on_ranks(ranks: int, arguments: Sequence[str], log: Path, seconds: float = 240) -> Done:
    """Run ``colada ARGUMENTS`` on several ranks to the end; one that fails ends those that wait for it."""
    processes, end = started(ranks, arguments, log), time.monotonic() + seconds
    while any(process.is_alive() for process in processes):
        if time.monotonic() > end or any(process.exitcode for process in processes):
            time.sleep(1)  # The others may be about to say the same.
            for process in processes:
                process.terminate()
        time.sleep(0.02)
    output = "".join(log.with_name(f"{log.name}.{rank}").read_text() for rank in range(ranks))
    return Done(next((process.exitcode for process in processes if process.exitcode), 0), output)


def _rank(arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from colada.cli.main import main

    sys.exit(main(arguments))
