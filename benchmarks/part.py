"""A part of what benchmarks/gpu.sh shows: its time, the commands it runs, and the file of its results."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import made_with
from colada.errors import ColadaError
from colada.files import write_json
from colada.train.checkpoints import find

ROOT = Path(__file__).resolve().parents[1]
SEED = 0


class Failed(Exception):
    """A command of a part did not end as it should."""


class OutOfMemory(Exception):
    """A command wanted more memory than the GPU has."""


@dataclass
class Part:
    """One part under way.

    Attributes:
        name: of the part, and of its file.
        out, kit: folders of the results and of what was gathered.
        debug: at debug size, on a CPU.
        seconds: that the part may take.
        pieces: MiB of the files that a model is packed into; None leaves it a folder.
        run: directory of the training run, or of the study.
        overrides: further settings of the training run's recipe, or of the study's.
        train_for: seconds after which training stops; as many as there are if None.
        results: what was measured so far.
        errors: what went wrong so far.
        over: whether it came to its end.
    """

    name: str
    out: Path
    kit: Path
    debug: bool
    seconds: float
    pieces: int | None
    run: Path
    overrides: Sequence[str]
    train_for: float | None = None
    results: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    over: bool = False

    def __post_init__(self) -> None:
        self.begin = time.monotonic()
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.device = torch.device("cpu" if self.debug else "cuda")
        self.memory = 0

    @property
    def left(self) -> float:
        """Seconds until the part has to be over."""
        return self.seconds - (time.monotonic() - self.begin)

    @property
    def training_time(self) -> float:
        """Seconds after which training is asked to stop, so that what follows it is done in time too."""
        return min(self.left - min(75.0, self.seconds / 4), self.train_for or self.seconds)

    def write(self) -> None:
        """Write what there is."""
        record = {
            "part": self.name,
            "ok": self.over and not self.errors,
            "over": self.over,
            "errors": self.errors,
            "debug": self.debug,
            "made_with": made_with(self.device),
            "seed": SEED,
            "started": self.started,
            "wall_s": time.monotonic() - self.begin,
            "peak_memory_bytes": self.memory,
            "results": self.results,
        }
        write_json(self.out / f"{self.name}.json", record, sort=False)

    def add(self, name: str, measure: Callable[[], Any]) -> Any:
        """Measure something and write it down; what fails is an error of the part, and the next goes on."""
        print(f"{self.name}: {name}", flush=True)
        result = None
        try:
            result = self.results[name] = measure()
        except (
            Failed,
            ColadaError,
            OSError,
            ValueError,
            KeyError,
            subprocess.SubprocessError,
            ElementTree.ParseError,
        ) as error:
            self.errors.append(f"{name}: {error}")
            print(f"{self.name}: {name} failed: {error}", file=sys.stderr, flush=True)
        self.write()
        return result

    def command(
        self, *words: str, good: Sequence[int] = (0,), stop_after: float | None = None
    ) -> tuple[int, str]:
        """Run Python with these arguments, and return its exit status and what it printed.

        Args:
            good: exit statuses that are no failure.
            stop_after: ask it to stop (SIGINT) after so many seconds; otherwise it is ended with the part.

        Raises:
            Failed: if it ends otherwise, or is not over in time.
            OutOfMemory: if that is why.
        """
        line = [sys.executable, *words]
        with (self.out / "gpu.log").open("a") as log, tempfile.TemporaryFile("w+") as printed:
            log.write(f"$ {' '.join(words)}\n")
            log.flush()
            start = log.tell()
            process = subprocess.Popen(line, stdout=printed, stderr=log, start_new_session=True, cwd=ROOT)
            try:
                if stop_after is not None:
                    try:
                        process.wait(max(1.0, stop_after))
                    except subprocess.TimeoutExpired:
                        process.send_signal(signal.SIGINT)
                status = process.wait(max(1.0, self.left))
            except subprocess.TimeoutExpired:
                raise Failed("not over in time") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            printed.seek(0)
            text = printed.read()
            log.write(text)
        if status not in good:
            said = (self.out / "gpu.log").read_bytes()[start:].decode(errors="replace").removesuffix(text)
            lines = (said.strip() or text.strip()).splitlines()
            if any("OutOfMemoryError" in line for line in lines):
                raise OutOfMemory
            raise Failed(f"exit status {status}: {lines[-1] if lines else 'it said nothing'}")
        return status, text

    def record(self, *words: str) -> Any:
        """Run a benchmark on the part's device, and return the record that it writes; see :meth:`command`."""
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "record.json"
            self.command("-m", *words, "--device", self.device.type, "--json", str(file))
            return json.loads(file.read_text())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep the most memory in use: of the whole GPU, or of the largest process on a CPU."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.2):
                free, total = torch.cuda.mem_get_info()
                self.memory = max(self.memory, total - free)

        watcher = threading.Thread(target=look, daemon=True)
        if self.device.type == "cuda":
            watcher.start()
        try:
            yield
        finally:
            over.set()
            if self.device.type == "cpu":
                self.memory = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def reached(run: Path) -> dict[str, Any]:
    """Return where a run stands: its last checkpoint, last validation and speed.

    Raises:
        Failed: if it has no checkpoint.
    """
    checkpoint = find(run, "auto")
    if checkpoint is None:
        raise Failed(f"no checkpoint in {run}")
    state = json.loads((checkpoint / "state.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stage = state["stage"]
    last: dict[str, dict[str, Any]] = {"validation": {}, "train": {}}
    for record in records:
        if record["stage"] == stage and record["split"] in last:
            last[record["split"]] = record
    speed = {name: last["train"].get(name) for name in ("tokens_per_s", "mfu", "memory_gb")}
    where = {name: state[name] for name in ("stage", "step", "tokens")}
    return {
        **where,
        "checkpoint": str(checkpoint),
        "validation_flow": last["validation"].get("flow"),
        **speed,
    }
