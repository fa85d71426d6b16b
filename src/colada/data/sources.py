"""Where training data is from: a file, a folder, or a data set of the hub, and what a record of it holds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from colada.data.documents import (
    Cut,
    Holdout,
    Part,
    Record,
    Split,
    check_columns,
    cut,
    fraction,
    read_documents,
    read_records,
    records_of,
    split_file,
    text_of,
)
from colada.data.instructions import check_tasks, default_tasks, instructions
from colada.data.listing import find_files, list_files
from colada.errors import ColadaError, failure

TURNS = 4
"""One in so many conversations of tasks has two questions and answers."""

Format = Literal["text", "messages", "pairs", "preferences", "tasks"]


class Section(BaseModel):
    """A section of a recipe: its keys only, each of its type as it is written, and finite.

    A number is no string that spells one, and true is no 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, values: Any) -> Any:
        """YAML has lists where the recipe has tuples, also one in another."""
        if not isinstance(values, dict):
            return values
        return {key: _as_tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _as_tuple(values: list[Any]) -> tuple[Any, ...]:
    return tuple(_as_tuple(value) if isinstance(value, list) else value for value in values)


class Source(Section):
    """A file or folder (``path``), or a data set (``hub``)."""

    path: str | None = Field(
        None, min_length=1, description="File or folder of .txt, .jsonl, .parquet (or .gz of the first two)."
    )
    hub: str | None = Field(
        None, min_length=1, description="Or a data set's hub id or directory, read by `datasets`."
    )
    config: str | None = Field(None, description="hub: which of the data set's configurations.")
    revision: str | None = Field(None, description="hub: branch, tag or commit.")
    split: str = Field("train", description="hub: which split to train on.")
    streaming: bool = Field(
        False, description="hub: read it over the network instead of downloading it first."
    )
    limit: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="hub: only so many of a split's records: its first, of a stream as many of each file.",
    )
    validation: str | None = Field(
        None,
        description="Validation text: a file or folder, or a split of hub; unset: a share of the samples.",
    )
    include: tuple[str, ...] = Field(
        (), description="path: only files whose name matches a pattern, such as *.txt."
    )
    format: Format = Field(
        "text",
        description="What a record holds: text; a conversation (messages); prompt and completion (pairs);"
        " prompt, chosen and rejected (preferences); or text that samples of tasks are cut from (tasks).",
    )
    tasks: tuple[str, ...] = Field(
        (), description="tasks: which, of colada.data.instructions; none: all that need no questions."
    )
    samples: int = Field(2000, ge=1, le=10**7, description="tasks: of each task, as far as there are any.")
    questions: str | None = Field(
        None, description="tasks: file of questions on stories (.jsonl), for the task story_questions."
    )
    column: str | None = Field(
        None, description="Key or column of the text or messages; unset: text, or messages."
    )
    prompt_column: str = Field("prompt", description="pairs, preferences: key or column of the prompt.")
    completion_column: str = Field("completion", description="pairs: key or column of the completion.")
    weight: float = Field(
        1.0, ge=1e-9, le=1e9, description="Share of the rows, relative to the other sources'."
    )

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"path={self.path!r} and hub={self.hub!r}, expected one of them")
        for key in ("config", "revision", "streaming", "limit"):
            if getattr(self, key) and self.hub is None:
                raise ValueError(f"{key}={getattr(self, key)!r} without hub: it is of hub data sets")
        if self.include and self.path is None:
            raise ValueError(f"include={list(self.include)} without path: it is of files")
        if self.format == "tasks":
            if self.path is None or self.validation is not None:
                raise ValueError("format='tasks' with hub or validation, expected a path alone")
            check_tasks(self.tasks, self.questions)
        elif self.tasks or self.questions is not None:
            raise ValueError(f"tasks={list(self.tasks)} with format={self.format!r}, expected 'tasks'")
        return self

    @property
    def name(self) -> str:
        """What errors and messages call it."""
        return self.path or f"{self.hub}{f' ({self.config})' if self.config else ''}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys or columns that a record must have."""
        if self.format == "pairs":
            return (self.prompt_column, self.completion_column)
        if self.format == "preferences":
            return (self.prompt_column, "chosen", "rejected")
        return (self.column or ("text" if self.format == "tasks" else self.format),)

    @property
    def conversations(self) -> bool:
        """Whether its samples are conversations, which a chat template spells."""
        return self.format in ("messages", "tasks")


# --- reading -----------------------------------------------------------------------------------


def read_texts(
    source: Source, validation_share: Holdout, some: Sequence[Part] | None = None, split: Split = "train"
) -> Iterator[str]:
    """Yield what a source's records of a split say: for a tokenizer to learn from, or a model to be measured.

    Args:
        some: those of its parts that are read; None for all.

    Raises:
        ColadaError: for what cannot be read or is no text, with its file and line or row.
    """
    for part in parts(source) if some is None else some:
        for record in read(source, part, validation_share):
            if record.split == split:
                yield from _texts(source, record)


def _texts(source: Source, record: Record) -> list[str]:
    if source.conversations:
        (messages,) = record.values
        try:
            return [text_of(message["content"], "content", record.origin) for message in messages]
        except (TypeError, KeyError):
            raise ColadaError(
                f"{record.origin}: {source.columns[0]!r} is no list of messages with role and content"
            ) from None
    if source.format == "preferences" and isinstance(record.values[0], list):
        (prompt, *answers) = record.values
        spoken = [message.get("content") for message in prompt if isinstance(message, dict)]
        return [text_of(value, source.prompt_column, record.origin) for value in (*spoken, *answers)]
    pairs = zip(source.columns, record.values, strict=True)
    return [text_of(value, column, record.origin) for column, value in pairs]


def parts(source: Source, size: int = sys.maxsize) -> list[Part]:
    """Return the parts of a source, in order; those of its own ``validation`` come last.

    With a ``validation`` of its own, all else but what a ``split`` column calls test is trained on.

    Args:
        size: of a part, in bytes, about; a stream's parts are its files.

    Raises:
        ColadaError: if there is no such data.
    """
    _dataset.cache_clear()  # It may have changed since this process last read it.
    training = _parts_of(source, source.path or source.split, size)
    if source.validation is None:
        return training
    validation = _parts_of(source, source.validation, size)
    return [replace(part, split="train") for part in training] + [
        replace(part, split="validation") for part in validation
    ]


def _parts_of(source: Source, where: str, size: int) -> list[Part]:
    """Return the parts of a file, a folder or a data set's split."""
    if source.path is not None:
        # The pattern is of the training data's names; another place has its own.
        files = find_files(Path(where), source.include if where == source.path else ())
        text = next((path for path in files if path.name.lower().endswith((".txt", ".txt.gz"))), None)
        if source.format == "tasks":
            return [Part(where, f"{where}: sample ", size=sum(path.stat().st_size for path in files))]
        if text is not None and source.format != "text":
            raise ColadaError(
                f"{text}: plain text with format={source.format!r}, expected .jsonl or .parquet"
            )
        return [part for path in files for part in split_file(path, size)]
    data = _dataset(source, where)
    place = f"{source.name}, {where}: "
    if source.streaming:
        return [Part(where, f"{place}file {n + 1}, row ", n, n + 1, 0, size) for n in range(data.num_shards)]
    rows = min(len(data), source.limit or len(data))
    nbytes = data.data.nbytes * rows // max(1, len(data))
    each = max(1, rows * size // max(nbytes, 1))
    begins = range(0, rows, each)
    return [Part(where, f"{place}row ", n, min(n + each, rows), n, nbytes // len(begins)) for n in begins]


def identity(source: Source) -> list[object]:
    """Return what changes with a source's content.

    For files: path, size and modification time, since reading everything at each start would cost more than
    now and then tokenising a copy anew. For a data set: its builder's hash, which is of the revision's
    commit or, for a local directory, of the files' names and times.

    Raises:
        ColadaError: if there is no such data.
    """
    if source.hub is not None:
        return [_builder(source).hash]
    files = [path for _, where, include in _places(source) for path in find_files(Path(where), include)]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _places(source: Source) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return the files or folders of a source: its key, where it is, and which patterns hold there."""
    places = [("path", source.path, source.include), ("validation", source.validation, ())]
    places.append(("questions", source.questions, ()))
    return [] if source.hub else [(key, where, include) for key, where, include in places if where]


def read(source: Source, part: Part, validation_share: Holdout) -> Iterator[Record]:
    """Yield the records of a part, of both splits.

    Raises:
        ColadaError: for what cannot be read, with its file and line or row.
    """
    if source.format == "tasks":
        yield from _task_records(source, part, validation_share)
        return
    if source.path is not None:
        yield from read_records(part, source.columns, validation_share)
        return
    for number, row in enumerate(_rows(source, part), part.before + 1):
        check_columns(f"{part.place}{number}", source.columns, list(row))
        yield from records_of(row, part, number, source.columns, validation_share)


def stories(path: Path, include: Sequence[str] = (), column: str = "text") -> list[str]:
    """Return the texts of files that are trained on: what samples of tasks are cut from.

    Raises:
        ColadaError: for what cannot be read.
    """
    documents = read_documents(find_files(path, include), column=column)
    return [document.text for document in documents if document.split == "train"]


def _task_records(source: Source, part: Part, validation_share: Holdout) -> Iterator[Record]:
    """Yield the samples of tasks as conversations, cut from the texts of a source."""
    texts = stories(Path(part.where), source.include, source.columns[0])
    questions = None if source.questions is None else Path(source.questions)
    turns_of = [
        [
            {"role": "user", "content": instruction.prompt},
            {"role": "assistant", "content": instruction.answer},
        ]
        for task in source.tasks or default_tasks(questions)
        for instruction in instructions(texts, task, source.samples, questions=questions)
    ]
    for number, turns in enumerate(turns_of):
        # Some follow another: what was said before is no reason to answer otherwise.
        before = turns_of[number * 7919 % len(turns_of)] if number % TURNS == 0 else []
        fields = {source.columns[0]: [*before, *turns]}
        yield from records_of(fields, part, number + 1, source.columns, validation_share)


# --- before anything else is done --------------------------------------------------------------


def check_sources(sources: Sequence[Source], out: Path | None = None) -> list[str]:
    """Look for the files that sources name, and return a line on each file or folder: what is read of it.

    Args:
        out: where a run is going to write.

    Raises:
        ColadaError: if one is not there or holds no data, or is where the run would write.
    """
    lines = []
    for number, source in enumerate(sources):
        for key, where, include in _places(source):
            if not os.path.lexists(where):
                corpora = ", or get the corpora that docs/training.md names"
                raise ColadaError(
                    f"{where}: no such file or folder (data.sources.{number}.{key})"
                    f"{'' if key == 'questions' else '; give yours with --data'}"
                    f"{corpora if Path(where).is_relative_to('data/corpora') else ''}"
                )
            if out is not None and os.path.realpath(out) == os.path.realpath(where):
                raise ColadaError(f"{out} is the data's own folder, expected another one to write to")
            lines.append(str(list_files(Path(where), include)))
    return lines


def hold_out(source: Source, share: float, least: int) -> Holdout:
    """Return what of a source is to be held out, so that there is text to train on and to validate with.

    That is the given share of its documents, unless what falls into it is less than ``least`` characters or
    far more than that share: there are too few documents, or too long ones. Then it is that share of pieces
    of them, at least ``least`` characters and at most a quarter of all: the same pieces in
    whatever order its files are. Where even that is too little, nothing but the given share.

    Raises:
        ColadaError: for what cannot be read.
    """
    if source.format != "text" or source.validation is not None or source.streaming or share == 0:
        return share

    def texts(share: float) -> Iterator[tuple[str, Record]]:
        for part in parts(source):
            for record in read(source, part, share):
                yield _texts(source, record)[0], record

    held_out, total = 0, 0
    for text, record in texts(share):
        total += len(text)
        held_out += len(text) * (record.split == "validation")
        if record.stated or least <= held_out <= 4 * share * total:
            return share
    least_characters = max(least, round(share * total))
    if least_characters > total / 4:
        return share if held_out <= total / 2 else 0.0
    size = max(1, min(least_characters // 4, 2**15))
    pieces = sorted((fraction(piece), len(piece)) for text, _ in texts(0.0) for piece in cut(text, size))
    held_out = 0
    for place, length in pieces:
        if held_out >= least_characters:
            return Cut(size, place)
        held_out += length
    return share


# --- data sets ---------------------------------------------------------------------------------


def _rows(source: Source, part: Part) -> Iterator[dict[str, object]]:
    data = _dataset(source, part.where)
    with _named(source, part.where):
        if source.streaming:
            files = data.num_shards
            data = data.shard(files, part.begin)
            if source.limit is not None:
                data = data.take(source.limit // files + (part.begin < source.limit % files))
        else:
            data = data.select(range(len(data))[part.begin : part.end])
        yield from data


@lru_cache(maxsize=4)  # Workers read many parts of the same split.
def _dataset(source: Source, split: str) -> Any:
    """Return a hub data set's split.

    Raises:
        ColadaError: without `datasets`, or if the data set cannot be had.
    """
    builder = _builder(source)
    with _named(source, split):
        if source.streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def _builder(source: Source) -> Any:
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise ColadaError(f'{source.name}: hub data needs datasets: pip install "colada-lm[hub]"') from None
    with _named(source, source.split):
        return load_dataset_builder(source.hub, source.config, revision=source.revision)


@contextmanager
def _named(source: Source, split: str) -> Iterator[None]:
    """Name the data set in whatever is raised."""
    try:
        yield
    # Each file format and transport of the library raises errors of its own.
    except Exception as error:
        raise failure(f"cannot read data set {source.name}, split {split!r}", error) from error
