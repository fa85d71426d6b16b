"""The eight tasks: what a record of one holds, and how it becomes a prompt.

A prompt is one text: demonstrations, each with its answer, and the question, up to the cue that the
answer follows. As in the released records it is kept in two parts, ``few_shot_prefix`` and ``prompt``,
parted after the word that opens a question ("Question: ").
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from string import ascii_uppercase

from colada.checks import choose, is_whole
from colada.data.jsonl import Fields, get, get_texts, read_lines
from colada.errors import ColadaError, shown
from colada.evaluate.scoring import ScoringRule

DEMONSTRATIONS = Path(__file__).parent / "demonstrations.jsonl"


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: on the command line and in file names.
        title: for readers.
        split: which split it is scored on.
        rule: how it is scored.
        shots: how many demonstrations the release gave.
        options: how many options a record has, 0 for none.
        published: the released model's score, in per cent of its items; None where it has none.
        body: a question, made of ``{context}``, ``{question}`` and ``{options}``.
        lead: the word that opens a question.
        cue: what the answer follows.
        header: what a prompt with demonstrations or without begins with.
        shown: the body of a demonstration, where it is another.
        records: its records' file name, before the split, where that is not its name.
    """

    name: str
    title: str
    split: str
    rule: ScoringRule
    shots: int
    options: int
    published: float | None
    body: str = "{question}\n{options}\n"
    lead: str = "Question: "
    cue: str = "Answer:"
    header: str = ""
    shown: str = ""
    records: str = ""

    @property
    def data(self) -> str:
        """Its records' file name, before the split."""
        return self.records or self.name

    @property
    def chance(self) -> float | None:
        """The share that picking any option gets right, None without options."""
        return 1 / self.options if self.options else None


_ENDINGS = "{context}\n{options}\n"
_ARTICLE = "{context} {question}\nOptions:\n{options}\n"
_PASSAGE = "{context}\nQuestion: {question}\n"
_READ = "Read the following article and answer the question.\n\n"
_SIQA = Task("siqa", "SIQA", "validation", "option", 2, 3, 28.90, "{context} {question}\n{options}\n")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("lambada", "LAMBADA", "test", "first word", 0, 0, 50.80, "{question}", lead="", cue=""),
        Task("mmlu", "MMLU", "test", "option", 2, 4, 19.30),
        Task("obqa", "OBQA", "test", "option", 2, 4, 23.00),
        Task("hellaswag", "HellaSwag", "validation", "text", 2, 4, 10.70, _ENDINGS, "Context: "),
        Task("race", "RACE", "test", "option", 1, 4, 19.60, _ARTICLE, "Article: ", header=_READ),
        _SIQA,
        Task("squad", "SQuAD", "validation", "text", 1, 0, 30.90, _PASSAGE, "Context: "),
        Task("story_cloze", "Story Cloze", "test", "text", 2, 2, 30.77, _ENDINGS, "Story: ", "End:"),
        # The release left the situation out of its questions, though not out of its demonstrations.
        replace(
            _SIQA,
            name="siqa-released",
            title="SIQA (released prompts)",
            body="{question}\n{options}\n",
            shown=_SIQA.body,
            records="siqa",
        ),
    )
}
"""Every task by its name. ``siqa-released`` is a variant, asked for by name."""

THE_EIGHT = ("lambada", "mmlu", "obqa", "hellaswag", "race", "siqa", "squad", "story_cloze")


def find_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        ColadaError: for an unknown name, with the nearest.
    """
    return choose("task", name, TASKS)


def find_tasks(names: str | None) -> list[Task]:
    """Return the tasks of names with commas between them, the eight for None.

    Raises:
        ColadaError: for an unknown task, or one that is there twice.
    """
    task_names = list(THE_EIGHT) if names is None else [name.strip() for name in names.split(",")]
    for name in task_names:
        if task_names.count(name) > 1:
            raise ColadaError(f"--tasks {names}: {name!r} is there twice")
    return [find_task(name) for name in task_names]


# --- records -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskRecord:
    """One question of a task.

    Attributes:
        id: unique within the task's data.
        context: passage, story or situation; may be empty.
        question: may be empty.
        choices: the options' texts, none for a task without.
        answer: the text that is right.
        answer_index: which option that is, None without options.
        subject: MMLU's, else None.
    """

    id: str
    context: str
    question: str
    choices: tuple[str, ...]
    answer: str
    answer_index: int | None
    subject: str | None = None

    @classmethod
    def of(cls, fields: Fields, task: Task, place: str) -> TaskRecord:
        """Return the record of a task that some fields hold.

        Raises:
            ColadaError: naming the place and the field that is missing, of another kind, or not the task's.
        """
        choices = get_texts(fields, "choices", place)
        check_options(task, choices, place)
        answer = get(fields, "answer", "a string", place)
        index = get(fields, "answer_index", "a whole number", place) if task.options else None
        if index is not None and not 0 <= index < len(choices):
            raise ColadaError(f"{place}: 'answer_index' is {index}, expected 0 to {len(choices) - 1}")
        if index is not None and choices[index] != answer:
            raise ColadaError(f"{place}: 'answer' is {answer!r}, but choice {index} is {choices[index]!r}")
        record = cls(
            str(get(fields, "id", "a string or a whole number", place)),
            get(fields, "context", "a string", place),
            get(fields, "question", "a string", place),
            choices,
            answer,
            index,
            get(fields, "subject", "a string", place) if task.name == "mmlu" else None,
        )
        for name in ("context", "question"):
            if f"{{{name}}}" in task.body and not getattr(record, name).strip():
                raise ColadaError(f"{place}: {name!r} is empty, and {task.name} needs it")
        return record


def check_options(task: Task, choices: Sequence[str], place: str) -> None:
    """Raise ColadaError if there are more or fewer options than a record of the task has."""
    if len(choices) != task.options:
        expected = f"{task.options} choices" if task.options else "no choices"
        raise ColadaError(f"{place}: {len(choices)} choices, expected {expected} for {task.name}")


def read_records(path: Path, task: Task) -> list[TaskRecord]:
    """Return the records of a file, in its order.

    Raises:
        ColadaError: naming file, line and field.
    """
    places: dict[str, str] = {}
    records = []
    for place, fields in read_lines(path):
        record = TaskRecord.of(fields, task, place)
        if record.id in places:
            raise ColadaError(f"{place}: id {record.id!r} is that of {places[record.id]} too")
        places[record.id] = place
        records.append(record)
    if not records:
        raise ColadaError(f"{path} holds no record")
    return records


# --- prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """What a model is asked, and what is right.

    Attributes:
        id: unique within the task.
        prefix: demonstrations, up to the word that opens the question.
        prompt: the question, up to the cue; the model continues ``prefix + prompt``.
        answer: the text that is right.
        choices: the options' texts, none for a task without.
    """

    id: str
    prefix: str
    prompt: str
    answer: str
    choices: tuple[str, ...]


def build_items(
    task: Task, records: Iterable[TaskRecord], demonstrations: Sequence[TaskRecord]
) -> tuple[Item, ...]:
    """Return the items of some records, all with the same demonstrations."""
    shown = [
        f"{task.lead}{_fill(task.shown or task.body, record)}{task.cue} {record.answer}\n\n"
        for record in demonstrations
    ]
    prefix = task.header + "".join(shown) + task.lead
    return tuple(
        Item(record.id, prefix, _fill(task.body, record) + task.cue, record.answer, record.choices)
        for record in records
    )


def _fill(body: str, record: TaskRecord) -> str:
    options = "\n".join(map("({}) {}".format, ascii_uppercase, record.choices))
    return body.format(context=record.context, question=record.question, options=options)


@cache
def own_demonstrations(task: Task) -> tuple[TaskRecord, ...]:
    """Return the demonstrations written for this project: of no benchmark's records."""
    return tuple(
        TaskRecord.of(fields, task, place)
        for place, fields in read_lines(DEMONSTRATIONS)
        if fields["task"] == task.data
    )


def choose_demonstrations(task: Task, shots: int | None, seed: int) -> tuple[TaskRecord, ...]:
    """Return so many demonstrations: the first ones for the task's own number, else drawn with the seed.

    Raises:
        ColadaError: if there are not so many.
    """
    demonstrations = own_demonstrations(task)
    shots = task.shots if shots is None else shots
    if not is_whole(shots) or not 0 <= shots <= len(demonstrations):
        raise ColadaError(f"shots={shown(shots)}, expected 0 to {len(demonstrations)} for {task.name}")
    if shots == task.shots:
        return demonstrations[:shots]
    return tuple(random.Random(f"{seed}/{task.name}").sample(demonstrations, shots))
