"""In-domain text: benchmarks' training splits as documents in the form that the evaluation asks in.

A model far smaller than the released one answers no benchmark it has never seen the form of. With such
documents among its text it can be measured: it is then fitted to those tasks, and its scores are not
comparable with those of a model that is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from colada.errors import ColadaError, reason
from colada.evaluate.data import find_file, fingerprint
from colada.evaluate.scoring import normalise
from colada.evaluate.tasks import THE_EIGHT, Item, TaskRecord, build_items, find_task, read_records
from colada.files import write_json, write_text

RECORD_FILE = "in-domain.json"


LICENCES: dict[str, str] = {
    "obqa": "Apache-2.0",
    "hellaswag": "MIT as released, texts under it are CC BY-NC-SA: local experiments only, ship no weights",
    "siqa": "no explicit licence: local experiments only, ship no weights",
}
"""Of the training splits, by task, and what follows for weights trained on them. The other tasks have no
training split, so nothing of them is in-domain."""

SPLIT = "train"
"""What may be trained on: never the split that a task is scored on."""


@dataclass(frozen=True)
class Written:
    """The documents of one task.

    Attributes:
        task: what they are of.
        source: the file of the records.
        file: what was written.
        fingerprint: of all records of the source.
        documents: how many were written.
        scored: how many records were left out because their question is among those the task is scored on.
        characters: of all documents.
        licence: see :data:`LICENCES`.
    """

    task: str
    source: str
    file: str
    fingerprint: str
    documents: int
    scored: int
    characters: int
    licence: str


def document(item: Item, letter: bool = False) -> str:
    """Return an item as a text: what a model is asked, and then the answer, if asked after its letter.

    The release's scoring reads a letter in brackets where the output is short: a model that has learnt no
    more than the form can then be right by chance.
    """
    option = f" ({ascii_uppercase[item.choices.index(item.answer)]})" if letter and item.choices else ""
    return f"{item.prefix}{item.prompt}{option} {item.answer}"


def write_documents(
    benchmarks: Path,
    out: Path,
    tasks: Sequence[str] = tuple(LICENCES),
    say: Callable[[str], None] = lambda line: None,
    letters: bool = False,
) -> list[Written]:
    """Write ``out/<task>.<split>.jsonl``, a document a line under "text", and ``out/in-domain.json``.

    Prompts have no demonstrations. A record whose question is also among those the task is scored on is
    left out.

    Args:
        benchmarks: a directory with ``<task>.<split>.jsonl`` (or .gz) of the training and the scored splits.
        out: made if need be.
        tasks: of which; all that have a training split by default.
        say: called with a line for each task, and one for the tasks without.
        letters: put an option's letter before its text in the answers of tasks whose scoring reads it, see
            :func:`document`.

    Raises:
        ColadaError: for a task without a training split, or records that are missing or malformed.
    """
    chosen = list(map(find_task, tasks))
    for task in chosen:
        if task.name not in LICENCES:
            raise ColadaError(f"{task.name} has no training split, expected some of {', '.join(LICENCES)}")
    if not benchmarks.is_dir():
        raise ColadaError(f"{benchmarks}: no such directory, expected one of <task>.<split>.jsonl(.gz) files")
    texts: dict[str, str] = {}
    written = []
    for task in chosen:
        source = find_file(benchmarks, [f"{task.data}.{SPLIT}"])
        records = read_records(source, task)
        scored = read_records(find_file(benchmarks, [f"{task.data}.{task.split}"]), task)
        asked = {_question(record) for record in scored}
        allowed = [record for record in records if _question(record) not in asked]
        if not allowed:
            raise ColadaError(f"{source}: every record is among those that {task.name} is scored on")
        documents = [
            document(item, letters and task.rule == "option") for item in build_items(task, allowed, ())
        ]
        one = Written(
            task.name,
            str(source),
            f"{task.data}.{SPLIT}.jsonl",
            fingerprint(asdict(record) for record in records),
            len(allowed),
            len(records) - len(allowed),
            sum(map(len, documents)),
            LICENCES[task.name],
        )
        written.append(one)
        texts[one.file] = "".join(json.dumps({"text": own}, ensure_ascii=False) + "\n" for own in documents)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ColadaError(f"{out}: cannot be made ({reason(error)})") from None
    for one in written:
        write_text(out / one.file, texts[one.file])
        said = f", {one.scored} left out that are scored on" if one.scored else ""
        say(f"{one.file}: {one.documents:,} documents, {one.characters:,} characters{said} ({one.licence})")
    without = [name for name in THE_EIGHT if name not in LICENCES]
    say(f"nothing in-domain, there being no training split: {', '.join(without)}")
    record: dict[str, Any] = {
        "letters": letters,
        "files": [asdict(one) for one in written],
        "without": without,
    }
    write_json(out / RECORD_FILE, record, sort=False)
    return written


def _question(record: TaskRecord) -> str:
    return normalise(f"{record.context} {record.question}")
