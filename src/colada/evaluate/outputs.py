"""Files of outputs, in the released records' fields and a few more: one line an item.

The released ones are ``id``, ``prompt``, ``generate`` (the output up to the first newline after a word),
``ground_truth``, ``few_shot_prefix``, ``choices`` where there are options, and ``others``
(what followed that newline). Ours are ``task``, ``seed``, ``tokens`` and ``finish_reason``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colada.data.jsonl import Fields, get, get_optional, get_texts, read_lines
from colada.errors import ColadaError
from colada.evaluate.scoring import cut
from colada.evaluate.tasks import TASKS, Item, Task, check_options, find_task
from colada.text.transcript import Completion

_CUES = tuple({task.cue for task in TASKS.values() if task.cue})


@dataclass(frozen=True)
class Output:
    """What a model wrote for an item.

    Attributes:
        id, prompt, ground_truth, choices, few_shot_prefix: the item.
        generate: what is scored.
        others: what followed the newline that it was cut at; None if it was not cut.
        seed, tokens, finish_reason: of the generation; None where they are not known.
    """

    id: str
    prompt: str
    generate: str
    ground_truth: str
    choices: tuple[str, ...]
    few_shot_prefix: str = ""
    others: str | None = None
    seed: int | None = None
    tokens: tuple[int, ...] | None = None
    finish_reason: str | None = None

    @classmethod
    def of_completion(cls, item: Item, completion: Completion) -> Output:
        """Return the output that a completion of an item's prompt gives."""
        answer, rest = cut(completion.text)
        return cls(
            item.id,
            item.prompt,
            answer,
            item.answer,
            item.choices,
            item.prefix,
            rest,
            completion.seed,
            completion.tokens,
            completion.finish_reason,
        )

    @classmethod
    def of_fields(cls, fields: Fields, task: Task, place: str, answered: bool = True) -> Output:
        """Return the output that some fields hold.

        Raises:
            ColadaError: naming the place and the field that is missing, of another kind, or not the task's.
        """
        if fields.get("task", task.name) != task.name:
            raise ColadaError(f"{place}: an output of task {fields['task']!r}, expected {task.name!r}")
        choices = get_texts(fields, "choices", place)
        truth = get(fields, "ground_truth", "a string", place)
        prompt = get(fields, "prompt", "a string", place)
        prefix = get_optional(fields, "few_shot_prefix", "a string", place) or ""
        tokens = get_optional(fields, "tokens", "a list", place)
        check_options(task, choices, place)
        if choices and truth not in choices:
            raise ColadaError(f"{place}: 'ground_truth' {truth!r} is none of the choices of {task.name}")
        cue = next((cue for cue in _CUES if prompt.endswith(cue)), "")
        if cue != task.cue:
            raise ColadaError(f"{place}: 'prompt' ends in cue {cue!r}, expected {task.cue!r} for {task.name}")
        if prefix and not prefix.endswith(task.lead):
            raise ColadaError(f"{place}: 'few_shot_prefix' ends in no {task.lead!r}, as {task.name}'s do")
        return cls(
            str(get(fields, "id", "a string or a whole number", place)),
            prompt,
            get(fields, "generate", "a string", place) if answered else "",
            truth,
            choices,
            prefix,
            get_optional(fields, "others", "a string", place),
            get_optional(fields, "seed", "a whole number", place),
            None if tokens is None else tuple(tokens),
            get_optional(fields, "finish_reason", "a string", place),
        )

    def line(self, task: Task) -> str:
        """Return the output as a line of a file, its line break included."""
        fields: dict[str, Any] = {
            "id": self.id,
            "prompt": self.prompt,
            "generate": self.generate,
            "ground_truth": self.ground_truth,
            "choices": list(self.choices) or None,
            "others": self.others,
            "few_shot_prefix": self.few_shot_prefix,
            "task": task.name,
            "seed": self.seed,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
        }
        known = {name: value for name, value in fields.items() if value is not None}
        return json.dumps(known, ensure_ascii=False) + "\n"


def read_outputs(path: Path, task: Task, *, answered: bool = True, unfinished: bool = False) -> list[Output]:
    """Return the outputs of a file, in its order.

    Args:
        path: the file.
        task: whose outputs they must be.
        answered: whether they must have been generated; else ``generate`` may be missing, and is empty.
        unfinished: the file is still being written: a last line without a line break does not count.

    Raises:
        ColadaError: naming file, line and field; also for outputs of another task, and an item twice there.
    """
    outputs: dict[str, Output] = {}
    for place, fields in read_lines(path, unfinished):
        output = Output.of_fields(fields, task, place, answered)
        if output.id in outputs:
            raise ColadaError(f"{place}: item {output.id!r} is there twice")
        outputs[output.id] = output
    if not outputs and not unfinished:
        raise ColadaError(f"{path} holds no output")
    return list(outputs.values())


def find_outputs(paths: Sequence[Path], name: str | None) -> list[tuple[Task, Path]]:
    """Return files of outputs with their tasks.

    Args:
        paths: files, or directories: of these, the files whose name is a task's.
        name: the task of a single file; None for what its name begins with.

    Raises:
        ColadaError: for a directory without any, a file whose task is not known, two of one task.
    """
    files: list[tuple[Task, Path]] = []
    for path in paths:
        if not path.is_dir():
            files.append((_task_of(path, name), path))
            continue
        names = [path / f"{task}{suffix}" for task in TASKS for suffix in (".jsonl", ".jsonl.gz")]
        of_directory = [(_task_of(file, None), file) for file in names if file.is_file()]
        if not of_directory:
            raise ColadaError(f"{path}: no <task>.jsonl or <task>.jsonl.gz in this directory")
        files += of_directory
    if name is not None and len(files) > 1:
        raise ColadaError(f"--task {name} with {len(files)} files, expected one")
    for task, _ in files:
        twice = [str(path) for other, path in files if other is task]
        if len(twice) > 1:
            raise ColadaError(f"{' and '.join(twice)}: both are outputs of {task.name}, expected one of them")
    return files


def _task_of(path: Path, name: str | None) -> Task:
    """Return the task of that name, or else the one that a file's name begins with."""
    if name is not None:
        return find_task(name)
    try:
        return find_task(path.name.partition(".")[0])
    except ColadaError as error:
        raise ColadaError(f"{path}: {error}; or give --task") from None
