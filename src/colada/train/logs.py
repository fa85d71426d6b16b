"""Where the metrics and samples of a run go while it runs: files, TensorBoard, or a class of your own.

A *record* is a mapping of one moment's metrics::

    {"stage": "prior", "step": 400, "split": "train", "time": unix seconds, "flow": 1.31, ...}

Its other numbers are loss terms, "grad_norm", "lr", "tokens_per_s", "mfu" (share of the peak), "memory_gb",
and of the stage so far "tokens" and "skipped" (steps). "flow_by_t" is a list, the mean flow loss of
equal bins of t in [0, T), with None for a bin without a timestep. A sample has "stage", "step", "title" and
"text".

A run resumes *at* a point of its stages: what an earlier attempt logged after that point is dropped from the
files, since it will be logged again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from colada.checks import is_whole, require_import
from colada.errors import ColadaError, nearest, shown
from colada.files import atomic_writer, open_file, parse_json

METRICS_FILE, SAMPLES_FILE, TENSORBOARD_DIR = "metrics.jsonl", "samples.jsonl", "tensorboard"
DRAWINGS_DIR = "drawings"
"""Of a run: sheets of what its model draws, ``prior-00000500.png`` and so on."""
BUILT_IN = ("jsonl", "tensorboard")

_PLACE = {"stage": "a name", "step": "an integer", "split": "a name", "time": "seconds"}
NOT_MEASURED = frozenset(_PLACE)
"""Keys of a record that say where it belongs; the others are numbers."""
_SAMPLE = {"stage": "a name", "step": "an integer", "title": "a text", "text": "a text"}


@dataclass(frozen=True)
class Point:
    """Where a run goes on.

    Attributes:
        stages: names of those that come before, and the one that goes on.
        step: of the last.
    """

    stages: tuple[str, ...]
    step: int

    def covers(self, stage: str, step: int) -> bool:
        """Whether the run has been at a step of a stage, as it goes on."""
        return stage in self.stages[:-1] or (stage == self.stages[-1] and step <= self.step)


@runtime_checkable
class Monitor(Protocol):
    """What is told of a run's metrics and samples; one of your own is made by ``Class(out, recipe)``."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a record of metrics."""

    def text(self, stage: str, step: int, title: str, text: str) -> None:
        """Take a sample."""

    def close(self) -> None:
        """Finish: no call follows."""


# --- files ---------------------------------------------------------------------------------------


class LogFiles:
    """Appends metrics and samples to a file each, a record a line of JSON; NaN and infinities become null.

    Args:
        out: the run's directory.
        resume_at: keep the records up to this point; None starts the files anew.

    Raises:
        ColadaError: if a file holds a damaged line or cannot be written.
    """

    def __init__(self, out: Path, resume_at: Point | None = None) -> None:
        self._metrics, self._samples = out / METRICS_FILE, out / SAMPLES_FILE
        for path in (self._metrics, self._samples):
            if path.is_fifo():  # Who writes to it would wait.
                raise ColadaError(f"{path} is a named pipe, expected a regular file or none")
        files = [
            (path, read(path))
            for path, read in ((self._metrics, read_records), (self._samples, read_samples))
            if path.is_file()
        ]
        for path, records in files:
            with atomic_writer(path) as file:  # The old file or the new one at any moment.
                for record in records:
                    if resume_at is not None and resume_at.covers(record["stage"], record["step"]):
                        file.write(_line(record))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record; it is in the file when this returns."""
        _append(self._metrics, record)

    def text(self, stage: str, step: int, title: str, text: str) -> None:
        """Append a sample, likewise."""
        _append(self._samples, {"stage": stage, "step": step, "title": title, "text": text})

    def close(self) -> None:
        """Nothing is open between two records."""


def write_drawings(
    out: Path, stage: str, step: int, sheet: bytes, said: Mapping[str, str], monitors: Monitors
) -> None:
    """Write a sheet of drawings, a PNG below the run's directory, and what is said of each as samples."""
    if sheet:
        (out / DRAWINGS_DIR).mkdir(exist_ok=True)
        with atomic_writer(out / DRAWINGS_DIR / f"{stage}-{step:08d}.png") as file:
            file.write(sheet)
    for caption, words in said.items():
        monitors.text(stage, step, f"drawing {caption}", words)


def require_metrics(out: Path) -> Path:
    """Return the metrics file of a run; raises ColadaError for a directory that is none's."""
    if not (out / METRICS_FILE).is_file():
        raise ColadaError(f"{out} holds no {METRICS_FILE}: not the directory of a training run")
    return out / METRICS_FILE


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, in its order; a half-written last line does not count.

    Raises:
        ColadaError: if the file cannot be read, or naming the first line that is not a record.
    """
    records = _read(path, _PLACE)
    for number, record in enumerate(records, 1):
        for key in record.keys() - NOT_MEASURED:
            values = record[key] if isinstance(record[key], list) else [record[key]]
            if not all(value is None or _is_number(value) for value in values):
                raise ColadaError(f"{path}, line {number}: {key}={shown(record[key])}, expected numbers")
    return records


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the samples of a file, in its order; raises as :func:`read_records`."""
    return _read(path, _SAMPLE)


def _read(path: Path, keys: Mapping[str, str]) -> list[dict[str, Any]]:
    with open_file(path) as file:
        *lines, _ = file.read().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            record = parse_json(line, "it")
        except ColadaError as error:
            raise ColadaError(f"{where}: damaged, expected one JSON object: {error}") from None
        if not isinstance(record, dict):
            raise ColadaError(f"{where}: expected a JSON object, got {type(record).__name__}")
        for key, expected in keys.items():
            value = record.get(key)
            if expected == "an integer":
                holds = is_whole(value) and abs(record[key]) < 2**53
            else:
                holds = _is_number(value) if expected == "seconds" else isinstance(value, str)
            if not holds:
                raise ColadaError(f"{where}: {key}={shown(value)}, expected {expected}")
        records.append(record)
    return records


def _is_number(value: Any) -> bool:
    """Whether a value is a number that plots can show, or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > 1e300


def _line(record: Mapping[str, Any]) -> bytes:
    finite = {name: _finite(value) for name, value in record.items()}
    return (json.dumps(finite, allow_nan=False, ensure_ascii=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def _finite(value: Any) -> Any:
    """Return a value of a record with None for what JSON cannot say."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, record: Mapping[str, Any]) -> None:
    try:
        with path.open("ab") as file:
            file.write(_line(record))
    except OSError as error:
        raise ColadaError(f"cannot write to {path}: {error.strerror or error}") from None


# --- TensorBoard -----------------------------------------------------------------------------------


class TensorBoard:
    """Writes event files: tags ``vae/nll``, ``vae/validation/nll``, ``prior/flow_by_t/300-400``.

    What a run that goes on logs again stands in them twice.

    Args:
        directory: for TensorBoard's ``--logdir``.

    Raises:
        ColadaError: if the tensorboard package is missing or the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ColadaError(
                'the tensorboard monitor needs a package: pip install "colada-lm[tensorboard]"'
            ) from None
        try:
            self._writer = SummaryWriter(str(directory), flush_secs=10)
        except OSError as error:
            raise ColadaError(f"cannot write to {directory}: {error.strerror or error}") from None

    def log(self, record: Mapping[str, Any]) -> None:
        """Write every number of a record as a scalar."""
        prefix = f"{record['stage']}/" + ("validation/" if record["split"] == "validation" else "")
        for name in record.keys() - NOT_MEASURED:
            for tag, value in _scalars(name, record[name]):
                self._writer.add_scalar(prefix + tag, value, record["step"], record["time"])

    def text(self, stage: str, step: int, title: str, text: str) -> None:
        """Write a sample, as it is: TensorBoard would read it as Markdown."""
        indented = "\n".join("    " + line for line in text.split("\n"))
        self._writer.add_text(f"{stage}/samples/{title}", indented, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def _scalars(name: str, value: float | list[float | None] | None) -> list[tuple[str, float]]:
    """Return the scalars of a value of a record, by tag; None is no scalar."""
    if isinstance(value, list):
        from colada.flow import T  # It imports torch, and names of monitors are checked without.

        width = int(T) // len(value)
        bins = [f"{name}/{index * width:03d}-{(index + 1) * width}" for index in range(len(value))]
        return [(tag, one) for tag, one in zip(bins, value, strict=True) if one is not None]
    return [] if value is None else [(name, value)]


# --- which monitors a run has ------------------------------------------------------------------------


class Monitors:
    """Several monitors as one."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self.monitors = tuple(monitors)

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass a record on to each."""
        for monitor in self.monitors:
            monitor.log(record)

    def text(self, stage: str, step: int, title: str, text: str) -> None:
        """Pass a sample on to each."""
        for monitor in self.monitors:
            monitor.text(stage, step, title, text)

    def close(self) -> None:
        """Close each, whether or not another one fails to."""
        with ExitStack() as closing:
            for monitor in reversed(self.monitors):
                closing.callback(monitor.close)


def load_monitor(name: str, out: Path, recipe: Mapping[str, Any]) -> Monitor:
    """Return ``Class(out, recipe)`` for a name ``package.module:Class``.

    Raises:
        ColadaError: naming what cannot be imported, is not there, or is no monitor.
    """
    monitor = require_import("monitor", name, "class")(out, recipe)
    if not isinstance(monitor, Monitor):
        raise ColadaError(f"monitor {name!r}: a monitor has the methods log, text and close")
    return monitor


def check_names(names: Sequence[str]) -> None:
    """Raise ColadaError for a name that no monitor can have."""
    for name in names:
        if name not in BUILT_IN and ":" not in name:
            raise ColadaError(
                f"unknown monitor {name!r}{nearest(name, BUILT_IN)}; "
                "expected jsonl, tensorboard or package.module:Class"
            )


def make_monitors(
    names: Sequence[str],
    out: Path,
    recipe: Mapping[str, Any],
    resume_at: Point | None = None,
    first: bool = True,
) -> Monitors:
    """Return the monitors of a run in ``out``; metrics.jsonl and samples.jsonl are always there.

    Args:
        names: "jsonl", "tensorboard" or ``package.module:Class``, in any number.
        recipe: what monitors of one's own are told of the run.
        resume_at: where the run goes on, None from the start.
        first: whether this is the rank that writes; the others have no monitor.

    Raises:
        ColadaError: for an unknown name, or whatever a monitor cannot do.
    """
    check_names(names)
    chosen = dict.fromkeys(names)
    if not first:
        return Monitors([])
    # Those that may be refused come first: until then the files of the run are as they were.
    others: list[Monitor] = [load_monitor(name, out, recipe) for name in chosen if ":" in name]
    if "tensorboard" in chosen:
        others.append(TensorBoard(out / TENSORBOARD_DIR))
    return Monitors([LogFiles(out, resume_at), *others])
