"""Run a model over benchmarks: resumable, on any number of ranks, the same outputs whatever the grouping.

An output directory holds, for each task, ``<task>.jsonl`` (its outputs, a line an item) and
``<task>.settings.json`` (what they were made with, which has to stay the same); at the end,
``results.json`` of all. While several ranks are at work each appends to ``<task>.rank<r>of<n>.jsonl``;
whichever finds a task complete joins these files. Ranks only share the directory: they may start at
different times, and need not talk to each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock
from torch import Tensor, nn

from colada.checks import MOST_TOKENS, is_whole, require_count, require_seed
from colada.errors import ColadaError, reason, shown
from colada.evaluate.data import Benchmark
from colada.evaluate.outputs import Output, read_outputs
from colada.evaluate.scoring import normalise
from colada.evaluate.statistics import Score, score, summary
from colada.evaluate.tasks import Item, Task
from colada.evaluate.texts import require_tokenizer
from colada.files import as_path, locked, read_json_object, require_file, write_json, write_text
from colada.generate.settings import Settings, TextRequest, check_settings
from colada.models.base import LanguageModel, require_kind
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Completion
from colada.train.display import Display
from colada.train.provenance import provenance

RESULTS_FILE = "results.json"
MAX_NEW_TOKENS = 32  # as the release

_CHECKED_ITEMS = 16  # of each task, to see that the tokenizer spells them
_SAMPLED_WEIGHTS = 256  # of each tensor, for the fingerprint


@dataclass(frozen=True)
class EvaluationRank:
    """One of the processes that share a run: rank ``rank`` takes items rank, rank + world, ..."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("world", self.world)):
            if not is_whole(value):
                raise ColadaError(f"{name}={shown(value)}, expected a whole number")
        if not 0 <= self.rank < self.world:
            raise ColadaError(f"rank {self.rank} of {self.world}, expected 0 to {self.world - 1}")

    def file(self, out: Path, task: Task) -> Path:
        """Return the file that this process appends to."""
        rank = f".rank{self.rank}of{self.world}" if self.world > 1 else ""
        return out / f"{task.name}{rank}.jsonl"


@dataclass(frozen=True)
class Results:
    """What became of a run.

    Attributes:
        scores: in the order of the benchmarks.
        outputs: by task name, in the order of the items.
        record: what ``results.json`` holds.
    """

    scores: list[Score]
    outputs: dict[str, list[Output]]
    record: dict[str, Any]


def item_seed(seed: int, task: Task, item: Item) -> int:
    """Return the seed of an item's generation, the same in any batch, on any rank, and for any limit."""
    digest = hashlib.sha256(f"{seed}/{task.data}/{item.id}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def evaluate(
    model: LanguageModel,
    benchmarks: Sequence[Benchmark],
    out: Path,
    *,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch: int = 16,
    part: EvaluationRank | None = None,
    display: Display | None = None,
    **settings: Any,
) -> Results | None:
    """Generate what ``out`` does not have yet, greedily, score it, and write ``results.json``.

    Args:
        model: of any kind.
        benchmarks: the tasks and their items.
        out: the output directory; what is there already is kept, and not generated again.
        seed: of the run; every item has its own, made of it.
        max_new_tokens: of an item. The output is cut at the first newline after a word.
        batch: how many items are generated together; outputs do not depend on it.
        part: which share of the items is this process's.
        display: where progress is shown.
        settings: of generation, over the model's own.

    Returns: the results; None while other ranks' items are missing.

    Raises:
        ColadaError: if the tokenizer does not fit, if ``out`` was begun with other settings or has outputs of
            other items, or cannot be written.
    """
    part, display = EvaluationRank() if part is None else part, display or Display()
    require_kind("part", part, EvaluationRank)
    if not isinstance(benchmarks, list | tuple):
        raise ColadaError(f"benchmarks={shown(benchmarks)}, expected a list of Benchmark")
    for benchmark in benchmarks:
        require_kind("benchmark", benchmark, Benchmark)
    if not callable(getattr(model, "stream", None)):
        raise ColadaError(f"model={shown(model)}, expected a model that generates")
    out = as_path(out, "out")
    require_count("batch", batch)
    require_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
    require_seed(seed)
    check_settings(settings)
    tokenizer = require_tokenizer(model, "the benchmarks are text")
    changed = {name: value for name, value in settings.items() if value is not None}
    chosen = {**model.generation, "temperature": 0.0, **changed}
    made_with = {
        "weights": fingerprint(model),
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        **{name: value for name, value in chosen.items() if name != "seed"},
    }
    quantised = getattr(model, "quantised", None)
    if quantised is not None:
        made_with["quantised"] = quantised
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ColadaError(f"{out}: cannot be made ({reason(error)})") from None
    with _locked(out, part):
        # All that can be wrong is found before the first item is generated.
        waiting = []
        for benchmark in benchmarks:
            check_spelling(tokenizer, benchmark, model.origin)
            _begin(out, benchmark, made_with)
            waiting.append(_waiting(out, benchmark, seed, part, display))
        for benchmark, items in zip(benchmarks, waiting, strict=True):
            task = benchmark.task
            requests = [
                TextRequest(
                    item.prefix + item.prompt,
                    max_new_tokens,
                    cast(Settings, {**chosen, "seed": item_seed(seed, task, item)}),
                )
                for item in items
            ]
            if items:
                chunks = model.stream(requests, batch=batch)
                finished = (
                    (chunk.index, chunk.completion) for chunk in chunks if chunk.completion is not None
                )
                with display.task(task.name, total=len(items), unit="items"):
                    _write_outputs(finished, task, items, part.file(out, task), display)
            _join(out, benchmark)
        outputs = {benchmark.task.name: _outputs(out, benchmark) for benchmark in benchmarks}
        if any(len(outputs[benchmark.task.name]) < len(benchmark.items) for benchmark in benchmarks):
            display.say(f"rank {part.rank} of {part.world} is done; the last of them writes {RESULTS_FILE}")
            return None
        scores = [score(benchmark.task, outputs[benchmark.task.name]) for benchmark in benchmarks]
        record = {
            **summary(scores),
            "model": model.origin,
            "settings": {**made_with, "batch": batch, "ranks": part.world},
            "data": {benchmark.task.name: benchmark.to_dict() for benchmark in benchmarks},
            "made_with": provenance(model.device),
        }
        write_json(out / RESULTS_FILE, record, sort=False)
        return Results(scores, outputs, record)


# --- the model -----------------------------------------------------------------------------------


def check_spelling(tokenizer: Tokenizer, benchmark: Benchmark, origin: str) -> None:
    """Raise ColadaError if prompts or answers, as scoring reads them, do not survive the tokenizer.

    Such a model neither sees the question nor can it write the answer. The first few items are tried.
    """
    for item in benchmark.items[:_CHECKED_ITEMS]:
        for text in (item.prefix + item.prompt, *item.choices, item.answer):
            back = tokenizer.decode(tokenizer.encode(text), skip_special=False)
            if normalise(back) != normalise(text):
                raise ColadaError(
                    f"{origin or 'this model'}: its tokenizer does not fit {benchmark.task.name}: of item"
                    f" {item.id!r} it makes {_clip(back)!r} from {_clip(text)!r}"
                )


def _clip(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:30]} … {text[-30:]}"


def fingerprint(model: LanguageModel) -> str:
    """Return the SHA-256 of the names, shapes, types and some evenly spaced values of a model's weights.

    Enough to tell trained models apart without reading gigabytes.
    """
    digest = hashlib.sha256()
    networks = {name: part for name, part in vars(model).items() if isinstance(part, nn.Module)}
    for attribute, network in networks.items():
        for name, tensor in network.state_dict().items():
            for inner, part in _stored(name, tensor):
                digest.update(f"{attribute}.{inner} {tuple(part.shape)} {part.dtype}".encode())
                flat = part.detach().reshape(-1)
                some = flat[:: max(1, len(flat) // _SAMPLED_WEIGHTS)]
                digest.update(some.cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _stored(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or what a quantised one is made of, by name."""
    if type(tensor) in (Tensor, nn.Parameter):
        yield name, tensor
        return
    parts, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for part in parts:
        yield from _stored(f"{name}.{part}", getattr(tensor, part))


# --- generation ----------------------------------------------------------------------------------


def _write_outputs(
    completions: Iterator[tuple[int, Completion]],
    task: Task,
    items: Sequence[Item],
    file: Path,
    display: Display,
) -> None:
    """Append the outputs of some items to a file, each as it is finished.

    Raises:
        ColadaError: if the file cannot be written; or if items failed, once all others are written.
    """
    errors: dict[str, str] = {}
    for done, (number, completion) in enumerate(completions, 1):
        item = items[number]
        if completion.error is None:
            line = Output.of_completion(item, completion).line(task)
            try:
                # Lone surrogates as JSON escapes them.
                with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                    stream.write(line)
            except OSError as error:
                raise ColadaError(f"{file}: cannot be written ({reason(error)})") from None
        else:
            errors[item.id] = completion.error
        display.advance(done, len(items))
    if errors:
        which, why = next(iter(errors.items()))
        raise ColadaError(
            f"{len(errors)} of {len(items)} items of {task.name} failed, first {which!r}: {why}"
        )


# --- the output directory ------------------------------------------------------------------------


@contextmanager
def _locked(out: Path, part: EvaluationRank) -> Iterator[None]:
    """Hold a directory as one of the processes that share it: alone, or as a rank of as many.

    Raises:
        ColadaError: if another process holds it as the same rank, or among another number of ranks.
    """

    def hold(rank: str, world: str) -> FileLock:
        who = "another process" if world == "1" else f"rank {rank} of {world}"
        busy = f"{out}: {who} is at work there: wait for it, or give another directory"
        return locked(out / f".rank{rank}of{world}.lock", busy)

    lock = hold(str(part.rank), str(part.world))
    try:
        for other in sorted(out.glob(".rank*of*.lock")):
            rank, world = other.name.removeprefix(".rank").removesuffix(".lock").split("of")
            if world != str(part.world):
                hold(rank, world).release()
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _begin(out: Path, benchmark: Benchmark, made_with: Mapping[str, Any]) -> None:
    """Write down what a task's outputs are made with, or see that it is what they were begun with."""
    path = out / f"{benchmark.task.name}.settings.json"
    asked = {"data": benchmark.fingerprint, "order": benchmark.order, "shots": benchmark.shots}
    settings = json.loads(json.dumps({**made_with, **asked}))  # as it will be read: tuples are lists
    if not os.path.lexists(path):
        write_json(path, settings, sort=False)
        return
    try:
        begun = read_json_object(path)
    except ColadaError as error:
        raise ColadaError(f"{path}: not the settings of a run ({error})") from None
    changed = [
        f"{name}={settings.get(name)!r}, begun with {begun.get(name)!r}"
        for name in {**begun, **settings}
        if settings.get(name) != begun.get(name)
    ]
    if changed:
        raise ColadaError(f"{path}: {'; '.join(changed)}: keep the settings, or choose another directory")


def _waiting(
    out: Path, benchmark: Benchmark, seed: int, part: EvaluationRank, display: Display
) -> list[Item]:
    """Return the items of this process that no file has; a half-written line of its own file is dropped."""
    task = benchmark.task
    file = part.file(out, task)
    if os.path.lexists(file):
        require_file(file, "a file of outputs, or none")  # To append to a named pipe waits for ever.
    if file.is_file() and _drop_half_line(file):
        display.say(f"{file}: the last line was half-written; its item is generated again")
    expected = {item.id: item for item in benchmark.items}
    done = set()
    for path in _files(out, task):
        for output in read_outputs(path, task, unfinished=True):
            item = expected.get(output.id)
            if item is None:
                raise ColadaError(
                    f"{path}: item {output.id!r} is none of this run's {len(expected)} of {benchmark.source}:"
                    " give the limit it was begun with, or a larger one, or choose another directory"
                )
            asked = (output.few_shot_prefix, output.prompt, output.seed)
            if asked != (item.prefix, item.prompt, item_seed(seed, task, item)):
                raise ColadaError(f"{path}: item {output.id!r} has another prompt or seed than in this run")
            done.add(output.id)
    return [item for item in benchmark.items[part.rank :: part.world] if item.id not in done]


def _drop_half_line(path: Path) -> bool:
    """Cut off a last line without a line break, and return whether there was one."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == len(content):
        return False
    with path.open("r+b") as file:
        file.truncate(whole)
    return True


def _files(out: Path, task: Task) -> list[Path]:
    """Return the files with outputs of a task: the joined one first, then the ranks'."""
    joined = out / f"{task.name}.jsonl"
    return [*([joined] if joined.is_file() else []), *sorted(out.glob(f"{task.name}.rank*of*.jsonl"))]


def _outputs(out: Path, benchmark: Benchmark) -> list[Output]:
    """Return the outputs there are of a benchmark's items, in their order."""
    by_item: dict[str, Output] = {}
    for path in _files(out, benchmark.task):
        try:
            outputs = read_outputs(path, benchmark.task, unfinished=True)
        except ColadaError:
            if path.is_file():
                raise
            continue  # Another rank has just joined the files.
        by_item = {output.id: output for output in outputs} | by_item
    return [by_item[item.id] for item in benchmark.items if item.id in by_item]


def _join(out: Path, benchmark: Benchmark) -> None:
    """Put all outputs into one file, in the order of the items, once they are there."""
    task = benchmark.task
    joined = out / f"{task.name}.jsonl"
    outputs = _outputs(out, benchmark)
    if len(outputs) < len(benchmark.items):
        return
    if _files(out, task) != [joined] or read_outputs(joined, task) != outputs:
        write_text(joined, "".join(output.line(task) for output in outputs))
    for path in out.glob(f"{task.name}.rank*of*.jsonl"):
        path.unlink(missing_ok=True)
