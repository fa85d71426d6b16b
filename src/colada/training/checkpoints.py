"""Checkpoints of a run: written beside the training, atomically, readable on any number of ranks.

``checkpoints/stage2-00000500/`` holds the state as ``torch.distributed.checkpoint`` writes it, the recipe,
the tokenizer, and ``state.json`` (stage, step, versions, commit). A checkpoint under way has a
name that begins with a dot, and gets its own only when all of it is on disk:
whatever stops the process, the last complete one stays.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from colada.errors import ColadaError

RECIPE, STATE = "recipe.yaml", "state.json"
# That one process is alone is no news; said by the writing thread too, so not only here and there.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
_NAME = re.compile(r"stage([12])-(\d+)")


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn a failed write under ``out`` (no space, no permission) into a ColadaError."""
    try:
        yield
    except OSError as error:
        raise ColadaError(f"cannot write to {out}: {error.strerror or error}") from None


@dataclass(frozen=True, order=True)
class Place:
    """Where in a run a checkpoint was made: after ``step`` steps of a stage."""

    stage: int
    step: int

    @property
    def name(self) -> str:
        """The checkpoint's directory name."""
        return f"stage{self.stage}-{self.step:08d}"


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

    def save(self, place: Place, state: dict[str, Any], files: Mapping[str, str], wait: bool) -> None:
        """Write a checkpoint; training goes on meanwhile unless ``wait``.

        Args:
            state: networks and optimisers by name; copied before this returns.
            files: texts by file name, written with it.
            wait: return only when it is complete.

        Raises:
            ColadaError: if this one, with ``wait``, or the one before could not be written.
        """
        self.finish()
        partial = self.directory / f".{place.name}.partial"
        with disk_errors(self.directory):
            if self.first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True, exist_ok=True)  # Another rank's writer may have made it already.
        self._finished.clear()
        writing = async_save(
            state, checkpoint_id=partial, process_group=self._group, no_dist=self._group is None
        )
        assert isinstance(writing, Future)
        self._writing = writing
        writing.add_done_callback(lambda done: self._complete(done, place, partial, files))
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
        self._writing = None
        if self._error is not None:
            raise ColadaError(f"cannot write to {self.directory}: {_reason(self._error)}")

    def settle(self) -> None:
        """Let the checkpoint under way come to its end, good or bad."""
        if self._writing is not None:
            self._finished.wait()

    def _complete(self, done: Future[Any], place: Place, partial: Path, files: Mapping[str, str]) -> None:
        # Runs in the writing thread; an exception here would be lost.
        try:
            done.result()
            if self.first:
                for name, text in files.items():
                    _write_through(partial / name, text)
                final = self.directory / place.name
                if final.exists():
                    shutil.rmtree(final)
                os.rename(partial, final)
                _sync(self.directory)
                self._prune()
        except (OSError, CheckpointException, RuntimeError) as error:
            self._error = error
        finally:
            self._finished.set()

    def _prune(self) -> None:
        for place in self.places()[: -self.keep_last]:
            if not self.keep_every or place.step % self.keep_every:
                # Under another name first: what is listed is whole.
                os.rename(self.directory / place.name, self.directory / f".{place.name}.pruned")
        for gone in self.directory.glob(".*.pruned"):
            shutil.rmtree(gone)

    def places(self) -> list[Place]:
        """Return where there are complete checkpoints, see :func:`places`."""
        return places(self.directory)


def places(directory: Path) -> list[Place]:
    """Return the places of the complete checkpoints in a directory, in the order in which they were written.

    That is the order of the run, unless it went back to an earlier one.
    """
    there = []
    for path in directory.glob("stage*"):
        match = _NAME.fullmatch(path.name)
        if not match or not (path / STATE).is_file():
            continue
        try:
            written = read_state(path)["written"]
        except ColadaError:
            if path.exists():
                raise
            continue  # It was pruned meanwhile.
        there.append((written, Place(int(match[1]), int(match[2]))))
    return [place for _, place in sorted(there)]


def find(out: Path, resume: str) -> Path | None:
    """Return the checkpoint to resume from.

    Args:
        out: the run's directory.
        resume: "auto" for the newest one if there is any, a step number (of the later stage that has
            it), a name such as stage2-00000500, or a checkpoint's directory.

    Raises:
        ColadaError: if there is no such checkpoint.
    """
    directory = out / "checkpoints"
    there = places(directory)
    if resume == "auto":
        return directory / there[-1].name if there else None
    if resume.isdecimal():
        matching = [place for place in there if place.step == int(resume)]
        chosen = directory / max(matching).name if matching else None
    else:
        chosen = next((path for path in (directory / resume, Path(resume)) if (path / STATE).is_file()), None)
    if chosen is None:
        names = ", ".join(place.name for place in there) or "none"
        raise ColadaError(f"no checkpoint {resume!r}, expected a step, a directory or one of: {names}")
    return chosen


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what ``state.json`` of a checkpoint says.

    Raises:
        ColadaError: if there is none, or it is damaged.
    """
    file = checkpoint / STATE
    if not file.is_file():
        raise ColadaError(f"{checkpoint} is no checkpoint: it has no {STATE}")
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ColadaError(f"{file} is damaged: {error}") from None
    return state


def read_tensors(checkpoint: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of a state, of any sharding, from a checkpoint; other values are replaced.

    Raises:
        ColadaError: if the checkpoint is damaged or of other networks.
    """
    try:
        load(state, checkpoint_id=checkpoint, no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, CheckpointException) as error:
        raise ColadaError(f"{checkpoint} is damaged or of another model: {_reason(error)}") from None


def _write_through(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """Return the cause of an error in one line; a failed distributed write carries those of its ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]
