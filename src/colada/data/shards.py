"""A source's samples as token ids on disk: made once, in parallel, resumably, and then memory-mapped.

A directory named by a fingerprint of all that decides the ids (tokenizer, source, its files, settings) holds
``plan.json``, which cuts the source into *units*, and each unit's files: per split the ids, and for each
sample where it starts, how much of it is a prompt, and which record it was. A unit exists once its manifest
does, which is renamed into place last; so whatever stops the process, finished units stay, and the next run
makes the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from colada.data.documents import Cut, Holdout, Part, Record, Split, text_of
from colada.data.sources import Source, identity, parts, read
from colada.data.stream import TokenStream
from colada.errors import ColadaError, reason
from colada.files import locked, read_json_object, write_json
from colada.text.chat import encode_messages, encode_pair, encode_preference
from colada.text.tokenizer import Tokenizer

FORMAT = 2  # Of the files; part of the fingerprint.
UNIT_BYTES = 32 * 2**20  # Of the source's data, about: seconds of work, of which a stop loses one a worker.
_BATCH_CHARACTERS = 2**20  # Encoded at once: documents are as short as a line or as long as a book.
_SPLITS: tuple[Split, ...] = ("train", "validation")
_TOKENIZER, _PLAN = "tokenizer.json", "plan.json"
_FILES = ("ids", "samples.npy")  # Of each split of a unit.
_STATED = ("size", "mtime", "sha256")  # What a manifest says of each file.

Unit = Sequence[Part]


@dataclass(frozen=True)
class ShardJob:
    """What all units of a source share."""

    source: Source
    directory: Path
    validation_share: Holdout
    template: str | None


def prepare(
    source: Source,
    cache: Path,
    tokenizer: Tokenizer,
    *,
    validation_share: Holdout,
    template: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[Split, TokenStream]:
    """Return a source's token streams by split, in the order of its records, making what ``cache`` lacks.

    Several processes may ask at once: one makes them, the others wait.

    Args:
        cache: directory of all sources' shards.
        validation_share: see :func:`documents.read_records`; not used if the source has a ``validation``.
        template: for conversations.
        workers: processes; by default one a CPU core. A single unit is tokenised in this process.
        progress: called with the units done and how many there are.
        say: told what happens, in lines.

    Raises:
        ColadaError: for what cannot be read, with its file and line or row; a source without training
            samples; shards that changed since they were made; a full disk.
    """
    if source.conversations and template is None:
        raise ColadaError(f"{source.name}: no chat template, expected one for conversations")
    held_out = asdict(validation_share) if isinstance(validation_share, Cut) else validation_share
    made_from = {
        "format": FORMAT,
        "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
        "source": source.model_dump(mode="json", exclude={"weight"}),
        "content": identity(source),
        "validation_share": None if source.validation is not None else held_out,
        "template": template if source.format not in ("text", "pairs") else None,
    }
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    job = ShardJob(source, cache / fingerprint, validation_share, template)
    try:
        units = _planned(job.directory)
        # What is complete stays so: only its makers need the lock, and its readers no right to write.
        if units is None or _missing(job.directory, units):
            job.directory.mkdir(parents=True, exist_ok=True)
            busy = f"waiting for another process, which tokenises {source.name}"
            lock = locked(job.directory / "lock", busy, say)
            try:
                units = _make(job, tokenizer, made_from, workers, progress, say)
            finally:
                lock.release()
        else:
            say(f"{source.name}: reusing the shards in {job.directory}")
    except OSError as error:
        raise ColadaError(f"cannot write shards to {job.directory}: {error.strerror or error}") from error
    for number in range(len(units)):
        _check(job.directory, number)
    streams = {split: _open(job.directory, split, units, _dtype(tokenizer)) for split in _SPLITS}
    if not len(streams["train"]):
        held_out = len(streams["validation"].starts)
        raise ColadaError(f"{source.name}: 0 samples to train on ({held_out} for validation), expected some")
    return streams


# --- making ------------------------------------------------------------------------------------


def _make(
    job: ShardJob,
    tokenizer: Tokenizer,
    made_from: dict[str, Any],
    workers: int | None,
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], None],
) -> list[Unit]:
    """Make the units that are missing, and the plan if there is none; return it."""
    directory = job.directory
    for leftover in directory.glob("making-*"):  # By a process that was killed.
        shutil.rmtree(leftover, ignore_errors=True)
    units = _planned(directory)
    if units is None:
        units = _group(parts(job.source, UNIT_BYTES))
        tokenizer.save(directory / _TOKENIZER)
        plan = {"made_from": made_from, "units": [[asdict(part) for part in unit] for unit in units]}
        write_json(directory / _PLAN, plan)
    todo = _missing(directory, units)  # None if another process made them while this one waited.
    if todo:
        total, processes = len(units), min(workers or os.cpu_count() or 1, len(todo))
        say(f"tokenising {job.source.name}: {len(todo)} of {total} units, processes: {processes}")
        for done, _ in enumerate(_made(job, units, todo, processes), total - len(todo) + 1):
            if progress is not None:
                progress(done, total)
    return units


def _group(pieces: Iterable[Part]) -> list[Unit]:
    """Return parts as units: small files share one."""
    units, unit, room = list[Unit](), list[Part](), -1  # No unit yet.
    for part in pieces:
        if part.size > room:
            unit, room = [], UNIT_BYTES
            units.append(unit)
        unit.append(part)
        room -= part.size
    return units


def _made(job: ShardJob, units: Sequence[Unit], todo: Sequence[int], processes: int) -> Iterator[None]:
    """Make units, and yield after each."""
    if processes == 1:
        for number in todo:
            _tokenise(job, number, units[number])
            yield
        return
    # Spawned: forking a process that computes with threads is not safe.
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker) as pool:
        running = [pool.submit(_tokenise, job, number, units[number]) for number in todo]
        try:
            for future in as_completed(running):
                future.result()
                yield
        except BrokenProcessPool as error:
            raise ColadaError(
                f"{job.source.name}: a process that tokenised it was killed, perhaps for memory;"
                " finished units are kept, and fewer data.workers need less"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Keep a worker to one core, leave Ctrl-C to its parent, and end it with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=end_with_parent, daemon=True).start()


def _tokenise(job: ShardJob, number: int, unit: Unit) -> None:
    """Write a unit: its files in a directory of its own, then those in place, then its manifest."""
    tokenizer = _tokenizer(job.directory / _TOKENIZER)
    sizes = dict.fromkeys(_SPLITS, 0)
    rows = {split: array("q") for split in _SPLITS}  # Of the table of samples, end to end.
    with TemporaryDirectory(prefix="making-", dir=job.directory) as making:
        ids_paths, table_paths = (
            {split: Path(making) / _name(number, split, what) for split in _SPLITS} for what in _FILES
        )
        with ExitStack() as stack:
            files = {split: stack.enter_context(path.open("wb")) for split, path in ids_paths.items()}
            for at, part in enumerate(unit):
                for record, ids, prompt in _samples(job, part, tokenizer):
                    rows[record.split].extend((sizes[record.split], prompt, at, record.number))
                    files[record.split].write(np.array(ids, _dtype(tokenizer)).tobytes())
                    sizes[record.split] += len(ids)
        for split, path in table_paths.items():
            np.save(path, np.array(rows[split], np.int64).reshape(-1, 4))
        paths = [*ids_paths.values(), *table_paths.values()]
        stated = {path.name: _settled(path) for path in paths}
        for path in paths:
            os.replace(path, job.directory / path.name)
    write_json(_manifest(job.directory, number), {"files": stated})


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(path)


def _samples(job: ShardJob, part: Part, tokenizer: Tokenizer) -> Iterator[tuple[Record, list[int], int]]:
    """Yield a part's samples: the record, the ids with the end token, and how many of them are a prompt."""
    source, records = job.source, read(job.source, part, job.validation_share)
    if source.format == "text":
        for some in _batches(records, source.columns[0]):
            texts = [text for _, text in some]
            for (record, _), ids in zip(some, tokenizer.encode_batch(texts), strict=True):
                yield record, [*ids, tokenizer.eos_id], 0
        return
    for record in records:
        if source.format == "pairs":
            prompt, completion = record.values
            yield record, *encode_pair(prompt, completion, tokenizer, record.origin)
        elif source.format == "preferences":
            prompt, *answers = record.values
            for sample in encode_preference(prompt, answers, tokenizer, job.template, record.origin):
                yield record, *sample
        else:
            assert job.template is not None
            (messages,) = record.values
            for sample in encode_messages(messages, tokenizer, job.template, record.origin):
                yield record, *sample


def _batches(records: Iterable[Record], column: str) -> Iterator[list[tuple[Record, str]]]:
    """Yield the records with text, in lists of about as many characters."""
    batch, characters = list[tuple[Record, str]](), 0
    for record in records:
        text = text_of(record.values[0], column, record.origin)
        if text.strip():
            batch.append((record, text))
            characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _settled(path: Path) -> dict[str, Any]:
    """Write a file through to the disk and return what the manifest says of it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return dict(zip(_STATED, (path.stat().st_size, path.stat().st_mtime_ns, _digest(path)), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- opening -----------------------------------------------------------------------------------


def _planned(directory: Path) -> list[Unit] | None:
    """Return the units of a directory, None if they are not planned yet."""
    path = directory / _PLAN
    if not path.is_file():
        return None
    with _undamaged(path):
        return [[Part(**part) for part in unit] for unit in read_json_object(path)["units"]]


def _missing(directory: Path, units: Sequence[Unit]) -> list[int]:
    """Return the numbers of the units that are not made."""
    return [number for number in range(len(units)) if not _manifest(directory, number).is_file()]


def _open(directory: Path, split: Split, units: Sequence[Unit], dtype: Any) -> TokenStream:
    """Return a split of all units, its ids mapped from their files."""
    ids, starts, prompts = [], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    size = 0
    for number in range(len(units)):
        table = _table(directory, split, number)
        starts.append(size + table[:, 0])
        prompts.append(table[:, 1])
        if len(table):  # An empty file cannot be mapped.
            ids.append(np.memmap(directory / _name(number, split, _FILES[0]), dtype, "r"))
            size += len(ids[-1])
    ends = np.cumsum([len(part) for part in starts[1:]])

    def describe(sample: int) -> str:
        number = int(np.searchsorted(ends, sample, side="right"))
        _, _, part, record = _table(directory, split, number)[sample - int(ends[number])]  # From its end.
        return f"{units[number][part].place}{record}"

    read = np.concatenate(prompts)
    return TokenStream(
        ids, np.concatenate(starts), read if read.any() else None, describe, _content(directory, split, units)
    )


def _content(directory: Path, split: Split, units: Sequence[Unit]) -> str:
    """Return a digest of a split's ids, from the manifests."""
    digest = hashlib.sha256()
    for number in range(len(units)):
        files = read_json_object(_manifest(directory, number))["files"]
        digest.update(files[_name(number, split, _FILES[0])]["sha256"].encode())
    return digest.hexdigest()[:16]


def _table(directory: Path, split: Split, number: int) -> npt.NDArray[np.int64]:
    """Return (samples, 4): where each starts, how many of its ids are a prompt, its part, its record."""
    table: npt.NDArray[np.int64] = np.load(directory / _name(number, split, _FILES[1]), mmap_mode="r")
    return table


def _check(directory: Path, number: int) -> None:
    """Check that a unit's files are as they were written; content is compared where the time differs.

    Raises:
        ColadaError: naming the file that is not.
    """
    with _undamaged(_manifest(directory, number)):
        files = read_json_object(_manifest(directory, number))["files"]
        stated = [(directory / name, *(file[key] for key in _STATED)) for name, file in files.items()]
    advice = f"delete {directory} to have it made again"
    for path, size, mtime, digest in stated:
        try:
            stat = path.stat()
            changed = stat.st_size == size and stat.st_mtime_ns != mtime
            digest_now = _digest(path) if changed else digest
        except OSError as error:
            raise ColadaError(f"{path} cannot be read ({error.strerror}); {advice}") from error
        if stat.st_size != size:
            raise ColadaError(f"{path} has {stat.st_size} bytes, expected {size}; {advice}")
        if digest_now != digest:
            hashes = f"its SHA-256 begins {digest_now[:8]}, expected {digest[:8]}"
            raise ColadaError(f"{path} changed since it was made: {hashes}; {advice}")


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Name a file of ours that does not hold what was written."""
    try:
        yield
    except (ColadaError, AttributeError, ValueError, KeyError, TypeError) as error:
        advice = f"delete {path.parent} to have it made again"
        raise ColadaError(f"{path} is damaged ({reason(error)}); {advice}") from error


def _name(number: int, split: Split, what: str) -> str:
    return f"unit-{number:05d}.{split}.{what}"


def _manifest(directory: Path, number: int) -> Path:
    return directory / f"unit-{number:05d}.json"


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
