"""Checkpoints of a run: written beside the training, atomically, readable on any number of ranks.

``checkpoints/prior-00000500/`` holds the state as ``torch.distributed.checkpoint`` writes it, the recipe,
the tokenizer, and ``state.json`` (stage, step, number, versions, commit). A checkpoint under way has a
name that begins with a dot, and gets its own only when all of it is on disk:
whatever stops the process, the last complete one stays.

Checkpoints are in the order of their numbers, which count what was written: clocks go back, and a run may go
on from an earlier step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from colada.errors import ColadaError
from colada.files import read_json_object, replace_directory, write_text

RECIPE, STATE = "recipe.yaml", "state.json"
_LITTLE = 2**26  # Bytes left on a disk that may as well be full.
# That one process is alone is no news; said by the writing thread too, so not only here and there.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
_NAME = re.compile(r"([a-z][a-z0-9_]*)-(\d{1,18})")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


_STATE_VALUES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        "stage",
        "a stage's name",
        lambda value: isinstance(value, str) and bool(_NAME.fullmatch(f"{value}-0")),
    ),
    *((name, "a whole number of at least 0", _is_count) for name in ("step", "tokens", "skipped", "number")),
    ("data", "a list of digests", lambda value: isinstance(value, list)),
    ("generation", "an object", lambda value: isinstance(value, dict)),
    ("made_with", "an object", lambda value: isinstance(value, dict)),
)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn a failed write under ``out`` (no space, no permission) into a ColadaError."""
    try:
        yield
    except OSError as error:
        raise ColadaError(f"cannot write to {out}: {error.strerror or error}") from None


@dataclass(frozen=True)
class Place:
    """Where in a run a checkpoint was made: after ``step`` steps of a stage."""

    stage: str
    step: int

    @property
    def name(self) -> str:
        """The checkpoint's directory name."""
        return f"{self.stage}-{self.step:08d}"


class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: where they are.
        keep_last: how many stay.
        keep_every: those at multiples of so many steps stay too; 0: none.
        first: whether this rank writes what is written once.
    """

    def __init__(self, directory: Path, keep_last: int, keep_every: int, first: bool) -> None:
        self.directory = directory
        self.keep_last, self.keep_every, self.first = keep_last, keep_every, first
        # Its own: the ranks talk in it while they train in the other. Checkpoints are written from the CPU.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._writing: Future[Any] | None = None
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._number: int | None = None  # Of the last one written; None: not yet looked up.

    def save(
        self,
        place: Place,
        tensors: dict[str, Any],
        state: Mapping[str, Any],
        files: Mapping[str, str],
        wait: bool,
    ) -> None:
        """Write a checkpoint; training goes on meanwhile unless ``wait``.

        Args:
            tensors: networks and optimisers by name; copied before this returns.
            state: what ``state.json`` says besides the checkpoint's number.
            files: texts by file name, written with it.
            wait: return only when it is complete.

        Raises:
            ColadaError: if this one, with ``wait``, or the one before could not be written.
        """
        self.finish()
        partial = self.directory / f".{place.name}.partial"
        texts = dict(files)
        if self.first:
            if self._number is None:
                self._number = max((number for number, _ in _written(self.directory)), default=0)
            self._number += 1
            texts[STATE] = json.dumps({**state, "number": self._number}, indent=2)
            with disk_errors(self.directory):
                for leftover in self.directory.glob(".*"):  # By runs that were killed while they wrote.
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True, exist_ok=True)  # Another rank's writer may have made it already.
        self._finished.clear()
        writing = async_save(
            tensors, checkpoint_id=partial, process_group=self._group, no_dist=self._group is None
        )
        assert isinstance(writing, Future)
        self._writing = writing
        writing.add_done_callback(lambda done: self._complete(done, place, partial, texts))
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint under way, if there is one, is complete.

        Raises:
            ColadaError: if it could not be written.
        """
        if self._writing is None:
            return
        self._finished.wait()
        self._writing, error, self._error = None, self._error, None
        if isinstance(error, OSError | CheckpointException | RuntimeError):
            raise ColadaError(f"cannot write to {self.directory}: {_reason(error)}{_space(self.directory)}")
        if error is not None:
            raise error

    def settle(self) -> None:
        """Let the checkpoint under way come to its end, good or bad."""
        if self._writing is not None:
            self._finished.wait()

    def _complete(self, done: Future[Any], place: Place, partial: Path, texts: Mapping[str, str]) -> None:
        # Runs in the writing thread, where an exception would be lost: ``finish`` raises it.
        try:
            done.result()
            if self.first:
                for name, text in texts.items():
                    write_text(partial / name, text)
                replace_directory(partial, self.directory / place.name)
                self._prune()
        except BaseException as error:
            self._error = error
        finally:
            self._finished.set()

    def _prune(self) -> None:
        for place in places(self.directory)[: -self.keep_last]:
            if not self.keep_every or place.step % self.keep_every:
                # Under another name first: what is listed is whole.
                os.rename(self.directory / place.name, self.directory / f".{place.name}.pruned")
        for gone in self.directory.glob(".*.pruned"):
            shutil.rmtree(gone)


def places(directory: Path) -> list[Place]:
    """Return the places of the complete checkpoints in a directory, in the order in which they were written.

    That is the order of the run, unless it went back to an earlier one.

    Raises:
        ColadaError: naming one whose ``state.json`` is damaged.
    """
    return [place for _, place in _written(directory)]


def _written(directory: Path) -> list[tuple[int, Place]]:
    """Return the complete checkpoints' places with their numbers, in order of these."""
    complete = []
    for path in directory.glob("*-*"):
        match = _NAME.fullmatch(path.name)
        if not match or not os.path.lexists(path / STATE):
            continue
        try:
            number = read_state(path)["number"]
        except ColadaError:
            if path.exists():
                raise
            continue  # It was pruned meanwhile.
        complete.append((number, Place(match[1], int(match[2]))))
    return sorted(complete, key=lambda entry: entry[0])


def find(out: Path, resume: str) -> Path | None:
    """Return the checkpoint to resume from.

    Args:
        out: the run's directory.
        resume: "auto" for the newest one if there is any, a step number (of the stage that
            had it last), a name such as prior-00000500, or a checkpoint's directory.

    Raises:
        ColadaError: if there is no such checkpoint.
    """
    directory = out / "checkpoints"
    known_places = places(directory)
    if resume == "auto":
        return directory / known_places[-1].name if known_places else None
    if resume.isdecimal():
        matching = [place for place in known_places if place.step == int(resume)]
        chosen = directory / matching[-1].name if matching else None
    else:
        chosen = next((path for path in (directory / resume, Path(resume)) if (path / STATE).is_file()), None)
    if chosen is None:
        names = ", ".join(place.name for place in known_places) or "none"
        raise ColadaError(f"no checkpoint {resume!r}, expected a step, a directory or one of: {names}")
    return chosen


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what ``state.json`` of a checkpoint says.

    Raises:
        ColadaError: if there is none, or it is damaged.
    """
    file = checkpoint / STATE
    if not os.path.lexists(file):
        raise ColadaError(f"{checkpoint} is no checkpoint: it has no {STATE}")
    try:
        state = read_json_object(file)
        for name, expected, holds in _STATE_VALUES:
            if not holds(state.get(name)):
                raise ColadaError(f"{name}={state.get(name)!r}, expected {expected}")
    except ColadaError as error:
        raise ColadaError(f"{file} is damaged: {error}") from None
    return state


def read_tensors(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Fill tensors, of any sharding, from a checkpoint; other values are replaced.

    Raises:
        ColadaError: if the checkpoint is damaged or of other networks.
    """
    reader = FileSystemReader(checkpoint)
    try:
        reader.read_metadata()  # ``load`` would print a stack trace, and look for another file.
    except Exception as error:  # It is a pickle: damaged, it may raise anything.
        raise ColadaError(f"{checkpoint} is damaged: .metadata cannot be read ({_reason(error)})") from None
    try:
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, CheckpointException) as error:
        raise ColadaError(f"{checkpoint} is damaged or of another model: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """Return the cause of an error in one line; a failed distributed write carries those of its ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    # Torch's writer fails anew while it closes the file that could not be written.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def _space(directory: Path) -> str:
    """Return how little is free on a directory's disk, where that may be why it cannot be written to."""
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    return f" (the disk has {free:,} bytes left)" if free < _LITTLE else ""
