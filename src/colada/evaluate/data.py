"""Where items are from: records in local files or on the hub, or prompts that others wrote."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from colada.checks import require_choice, require_count, require_seed
from colada.data.jsonl import Fields
from colada.errors import ColadaError
from colada.evaluate.outputs import read_outputs
from colada.evaluate.tasks import (
    Item,
    Task,
    TaskRecord,
    build_items,
    choose_demonstrations,
    read_records,
)
from colada.files import as_path

HUB = "hub"

Order = Literal["file", "random"]


@dataclass(frozen=True)
class Benchmark:
    """A task with the items to ask.

    Attributes:
        task: which.
        items: in the order in which they are asked.
        source: the file, or the data set, they are from.
        fingerprint: of everything the source holds for the task, not only of these items.
        rows: how many items the source holds.
        shots: demonstrations in each prompt, None where the prompts are given.
        order: how the items were taken from the source.
    """

    task: Task
    items: tuple[Item, ...]
    source: str
    fingerprint: str
    rows: int
    shots: int | None
    order: Order

    def to_dict(self) -> dict[str, Any]:
        """Return what is asked and where it is from, for JSON."""
        facts = {name: getattr(self, name) for name in ("source", "fingerprint", "rows", "order", "shots")}
        return {**facts, "items": len(self.items)}


def load_benchmark(
    task: Task,
    data: str | Path,
    *,
    shots: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    order: Order = "file",
) -> Benchmark:
    """Return a task's items, made of records and of this project's own demonstrations.

    Args:
        task: which.
        data: a directory with ``<task>.<split>.jsonl`` or ``<task>.jsonl`` (or .gz), a file, or "hub".
        shots: demonstrations in each prompt; None for the release's number.
        seed: draws the demonstrations where ``shots`` is not the task's own number, and a random order.
        limit: how many items, the first ones in ``order``; None for all.
        order: "file", as the release did: its 1,000 MMLU items are the first rows, 8 of 57 subjects;
            or "random", MMLU taking its subjects in turn. A larger limit keeps the items of a smaller one.

    Raises:
        ColadaError: for data that is missing or malformed, naming file, line and field.
    """
    require_seed(seed)
    if limit is not None:
        require_count("limit", limit)
    require_choice("order", order, get_args(Order))
    if isinstance(data, str) and data == HUB:
        source, records = read_hub(task)
    else:
        path = find_file(as_path(data, "data"), [f"{task.data}.{task.split}", task.data])
        source, records = str(path), read_records(path, task)
    chosen = choose_demonstrations(task, shots, seed)
    ordered = records if order == "file" else _shuffled(records, f"{seed}/{task.data}")
    return Benchmark(
        task,
        build_items(task, ordered[:limit], chosen),
        source,
        fingerprint(asdict(record) for record in records),
        len(records),
        len(chosen),
        order,
    )


def load_prompts(task: Task, where: str | Path, *, limit: int | None = None) -> Benchmark:
    """Return the items of a file of records that carry their own ``few_shot_prefix`` and ``prompt``.

    With the release's published outputs, the model reads exactly what the released one read.

    Args:
        task: which.
        where: the file, or a directory with ``<task>.jsonl`` (or .gz).
        limit: how many items, the first ones; None for all.

    Raises:
        ColadaError: for a file that is missing, malformed, or another task's, naming file, line and field.
    """
    if limit is not None:
        require_count("limit", limit)
    path = find_file(as_path(where, "where"), [task.data])
    items = tuple(
        Item(output.id, output.few_shot_prefix, output.prompt, output.ground_truth, output.choices)
        for output in read_outputs(path, task, answered=False)
    )
    return Benchmark(
        task, items[:limit], str(path), fingerprint(map(asdict, items)), len(items), None, "file"
    )


def fingerprint(records: Iterable[Fields]) -> str:
    """Return the SHA-256 of some records, by their fields, in their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _shuffled(records: Sequence[TaskRecord], seed: str) -> list[TaskRecord]:
    """Return records in a random order that does not depend on the file's; subjects, if any, take turns."""

    def key(record: TaskRecord) -> bytes:
        return hashlib.sha256(f"{seed}/{record.id}".encode()).digest()

    by_subject: defaultdict[str | None, int] = defaultdict(int)
    turns = []
    for record in sorted(records, key=key):
        turns.append((by_subject[record.subject], key(record), record))
        by_subject[record.subject] += 1
    return [record for _, _, record in sorted(turns, key=lambda turn: turn[:2])]


# --- local files ---------------------------------------------------------------------------------


def find_file(where: Path, stems: Sequence[str]) -> Path:
    """Return a file, or the first of a directory's .jsonl(.gz) that has one of some names.

    Raises:
        ColadaError: if there is none, naming what is there.
    """
    if where.is_file():
        return where
    if not where.exists():
        raise ColadaError(f"{where}: no such file or directory")
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".jsonl", ".jsonl.gz")]
    for name in names:
        if (where / name).is_file():
            return where / name
    known = ", ".join(sorted(path.name for path in where.glob("*.jsonl*"))) or "none"
    raise ColadaError(f"{where}: no {' or '.join(names)}, data files there: {known}")


# --- the hub -------------------------------------------------------------------------------------


class HubSource(NamedTuple):
    """A public data set: its id, configuration and split, and what makes a record's fields of a row."""

    path: str
    config: str | None
    split: str
    fields: Callable[[dict[str, Any]], dict[str, Any]]


def _choice(choices: Sequence[str], index: int, context: str = "", question: str = "") -> dict[str, Any]:
    record = {"context": context, "question": question}
    return {**record, "choices": list(choices), "answer": choices[index], "answer_index": index}


def _lambada(row: dict[str, Any]) -> dict[str, Any]:
    *_, answer = row["text"].split()
    return {"context": "", "question": row["text"].rstrip()[: -len(answer)].rstrip(), "answer": answer}


def _mmlu(row: dict[str, Any]) -> dict[str, Any]:
    return {"subject": row["subject"], **_choice(row["choices"], row["answer"], question=row["question"])}


def _obqa(row: dict[str, Any]) -> dict[str, Any]:
    texts, index = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
    return {"id": row["id"], **_choice(texts, index, question=row["question_stem"])}


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    return _choice(row["endings"], int(row["label"]), row["ctx"])


def _race(row: dict[str, Any]) -> dict[str, Any]:
    return _choice(row["options"], "ABCD".index(row["answer"]), row["article"], row["question"])


def _siqa(row: dict[str, Any]) -> dict[str, Any]:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return _choice(choices, int(row["label"]) - 1, row["context"], row["question"])


def _squad(row: dict[str, Any]) -> dict[str, Any]:
    fields = {name: row[name] for name in ("id", "context", "question")}
    return {**fields, "answer": row["answers"]["text"][0]}


HUB_SOURCES: dict[str, HubSource] = {
    "lambada": HubSource("EleutherAI/lambada_openai", "default", "test", _lambada),
    "mmlu": HubSource("cais/mmlu", "all", "test", _mmlu),
    "obqa": HubSource("allenai/openbookqa", "main", "test", _obqa),
    "hellaswag": HubSource("Rowan/hellaswag", None, "validation", _hellaswag),
    "race": HubSource("ehovy/race", "all", "test", _race),
    "siqa": HubSource("lighteval/siqa", None, "validation", _siqa),
    "squad": HubSource("rajpurkar/squad", None, "validation", _squad),
}
"""The public data set of each task; Story Cloze has none, being given out on request. Ids are row
numbers, as in the released records, where a row has none of its own."""


def read_hub(task: Task) -> tuple[str, list[TaskRecord]]:
    """Return the name and the records of a task's public data set.

    Raises:
        ColadaError: without `datasets`, if the data set cannot be had, or for a row that is no record.
    """
    if task.data not in HUB_SOURCES:
        raise ColadaError(f"{task.name} is on no hub: give a directory with its records as data")
    source = HUB_SOURCES[task.data]
    name = f"{source.path}, {source.split}"
    try:
        from datasets import load_dataset
    except ImportError:
        raise ColadaError(f'{name}: hub data needs datasets: pip install "colada-lm[hub]"') from None
    try:
        rows = list(load_dataset(source.path, source.config, split=source.split))
    # Each file format and transport of the library raises errors of its own.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ColadaError(f"cannot read data set {name}: {reason}") from error
    records = []
    for number, row in enumerate(rows):
        place = f"{name}: row {number}"
        try:
            fields = {"id": number, **source.fields(row)}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            columns = ", ".join(row)
            raise ColadaError(
                f"{place}: not a record of {task.name} ({error!r}), columns there: {columns}"
            ) from None
        records.append(TaskRecord.of(fields, task, place))
    return name, records
