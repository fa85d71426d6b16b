"""What a server costs beside the session in it: ``python -m benchmarks.serving``, on a machine that is idle.

Server (a process of its own) and session (in this one) take turns with the same requests and slots. A turn is
so many streams at once. Told are tokens a second of both and their ratio, CPU seconds likewise, and when text
comes: first byte, first block, between blocks, whole request, each as median and 99th percentile; at the end,
the server's memory over many requests. The client shares the machine with the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.measure import Row, Spread, ratios, show, take_turns, write_record
from benchmarks.options import JsonOption
from colada.cli.main import run
from colada.errors import ColadaError
from colada.models.load import load_cola

PROMPT = "Once upon a time"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@dataclass
class Turn:
    """Streams at once: what they took together, and each one's times in seconds."""

    seconds: float = 0.0
    cpu: float = 0.0
    tokens: int = 0
    first_byte: list[float] = field(default_factory=list)
    first_block: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Served:
    """A server's process and port."""

    process: subprocess.Popen[str]
    port: int

    def resident(self) -> int:
        """Bytes of memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmRSS:\s*(\d+)", status)[0])

    def cpu(self) -> float:
        """Seconds of CPU used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """Return a figure that the server tells of itself."""
        text = asyncio.run(ask(self.port, "/metrics", None))[1]
        return float(re.findall(rf"^{name} (\S+)", text, re.M)[0])


@contextmanager
def serving(model: str | None, slots: int) -> Iterator[Served]:
    """Start a server, and end it."""
    command = [sys.executable, "-m", "colada", "serve", "--port", "0", "--log", "off", "--slots", str(slots)]
    command += [model] if model is not None else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = re.search(r":(\d+)", line := process.stderr.readline())
            if address is None:
                raise ColadaError(f"no server: {line.strip()}")
            served = Served(process, int(address[1]))
            while not ready(served.port):
                time.sleep(0.2)
            yield served
        finally:
            process.terminate()
            process.communicate()


def ready(port: int) -> bool:
    """Whether a server takes requests."""
    try:
        return asyncio.run(ask(port, "/ready", None))[0] == 200
    except (OSError, IndexError):
        return False


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ask(
    port: int,
    path: str,
    body: dict[str, Any] | None,
    turn: Turn | None = None,
    connection: Connection | None = None,
) -> tuple[int, str]:
    """Ask, and return status and body; what is streamed is timed into a turn."""
    reader, writer = connection or await asyncio.open_connection("127.0.0.1", port)
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\n"
    head += "" if connection else "Connection: close\r\n"
    begin = last = time.perf_counter()
    writer.write(
        f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    )
    status = int((await reader.readline()).split()[1])
    lines, blocks = [], 0
    while (line := await reader.readline()) and line != b"0\r\n":  # The last chunk's size.
        now = time.perf_counter()
        lines.append(line)
        if turn is None:
            continue
        if len(lines) == 1:
            turn.first_byte.append(now - begin)
        if b'"text":"' in line and b'"text":""' not in line:
            (turn.between if blocks else turn.first_block).append(now - (last if blocks else begin))
            last, blocks = now, blocks + 1
        if b'"completion_tokens"' in line:
            turn.tokens += int(re.findall(rb'"completion_tokens":(\d+)', line)[0])
    if connection is None:
        writer.close()
    if turn is not None:
        turn.whole.append(time.perf_counter() - begin)
    text = b"".join(lines).decode()
    return status, text.partition("\r\n\r\n")[2]


def served_turn(served: Served, streams: int, tokens: int, steps: int) -> Turn:
    """So many streams at once, over HTTP; connections are there already, as clients keep them."""
    turn = Turn()
    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "colada": {"steps": steps}}
    body |= {"stream": True, "stream_options": {"include_usage": True}}

    async def all_of_them() -> None:
        connections = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(streams)]
        requests = [{**body, "seed": seed} for seed in range(streams)]
        cpu, begin = served.cpu(), time.perf_counter()
        asked = [
            ask(served.port, "/v1/completions", request, turn, connection)
            for request, connection in zip(requests, connections, strict=True)
        ]
        await asyncio.gather(*asked)
        turn.seconds, turn.cpu = time.perf_counter() - begin, served.cpu() - cpu
        for _, writer in connections:
            writer.close()

    asyncio.run(all_of_them())
    return turn


def session_turn(session: Any, streams: int, tokens: int, steps: int) -> Turn:
    """The same requests in a session of this process."""
    turn, cpu, begin = Turn(), time.process_time(), time.perf_counter()
    for seed in range(streams):
        session.submit(PROMPT, tokens, seed=seed, steps=steps, end_ids=())
    while session.busy:
        for chunk in session.step():
            if chunk.completion is not None:
                turn.tokens += len(chunk.completion.tokens)
    turn.seconds, turn.cpu = time.perf_counter() - begin, time.process_time() - cpu
    return turn


def percentile(turns: Sequence[Turn], name: str, share: float) -> Spread:
    """Return a percentile of each turn's times in milliseconds, over the turns."""
    values = [sorted(getattr(turn, name)) or [0.0] for turn in turns]
    return Spread.of(1000 * times[min(len(times) - 1, int(share * len(times)))] for times in values)


def row(streams: int, turns: dict[str, list[Turn]], lag: float) -> Row:
    """Return what is told of some streams at once."""
    ours, theirs = turns["server"], turns["session"]
    rates = [[turn.rate for turn in some] for some in (ours, theirs)]
    times = {
        f"{name.replace('_', ' ')}, {label} (ms)": percentile(ours, name, share)
        for name in ("first_byte", "first_block", "between", "whole")
        for label, share in (("p50", 0.5), ("p99", 0.99))
    }
    return {
        "streams": streams,
        "server (tok/s)": Spread.of(rates[0]),
        "session (tok/s)": Spread.of(rates[1]),
        "server / session": ratios(*rates),
        "CPU, server / session": ratios([turn.cpu for turn in ours], [turn.cpu for turn in theirs]),
        **times,
        "loop lag (ms)": 1000 * lag,
    }


@app.command()
def serve(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the bundled one.")] = None,
    streams: Annotated[str, typer.Option(help="At once, with commas between.")] = "1,8,32,200",
    tokens: Annotated[int, typer.Option(min=1, help="New ones of each.")] = 24,
    steps: Annotated[int, typer.Option(min=1, help="Solver steps a block.")] = 8,
    slots: Annotated[int, typer.Option(min=1)] = 32,
    turns: Annotated[int, typer.Option(min=1)] = 7,
    requests: Annotated[int, typer.Option(min=0, help="Over which memory is looked at.")] = 5000,
    json_file: JsonOption = None,
) -> None:
    """Measure a server and the session in it, in turns."""
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", streams):
        raise ColadaError(f"streams={streams!r}, expected numbers with commas between")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))  # As the server does.
    rows: list[Row] = []
    memory: list[float] = []
    with serving(model, slots) as served:
        session = load_cola(model).session(slots=slots)
        for count in map(int, streams.split(",")):
            variants = {
                "server": lambda count=count: served_turn(served, count, tokens, steps),
                "session": lambda count=count: session_turn(session, count, tokens, steps),
            }
            rows.append(row(count, take_turns(variants, turns, 1), served.metric("colada_loop_lag_seconds")))
        for number in range(requests // 100):
            if number % max(1, requests // 1000) == 0:
                memory.append(served.resident() / 2**20)
            served_turn(served, 100, 4, 1)
        memory.append(served.resident() / 2**20)
    load = f"load average {os.getloadavg()[0]:.1f}"
    title = f"Serving: {tokens} tokens, {steps} steps a block, {slots} slots, {turns} turns, {load}"
    console, split = Console(highlight=False), 5
    show(title, [dict(list(one.items())[:split]) for one in rows], console)
    for begin in (split, split + 4):  # As much as a terminal is wide.
        show(
            "",
            [{"streams": one["streams"], **dict(list(one.items())[begin : begin + 4])} for one in rows],
            console,
        )
    print("loop lag, at most (ms):", ", ".join(f"{one['loop lag (ms)']:.1f}" for one in rows))
    # Before, kernels of all sizes that occur come into their cache.
    kept = 1000 * (memory[-1] - memory[len(memory) * 2 // 3]) / max(1, requests // 3)
    print(f"\nmemory (MiB) over {requests} requests: {', '.join(f'{one:.0f}' for one in memory)}")
    print(f"in the last third {kept:+.2f} MiB for 1,000 requests")
    if json_file is not None:
        write_record(json_file, title, torch.device("cpu"), rows, memory_mib=memory)


if __name__ == "__main__":
    sys.exit(run(app, None, "python -m benchmarks.serving"))
