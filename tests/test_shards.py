"""Token shards: what they hold, and that neither workers, kills nor damage change it unnoticed."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from colada.data import shards
from colada.data.documents import Split, read_documents
from colada.data.listing import find_files
from colada.data.shards import prepare
from colada.data.sources import Source
from colada.data.stream import TokenStream
from colada.errors import ColadaError
from colada.text.chat import DEFAULT_TEMPLATE, encode_messages, encode_pair
from colada.text.tokenizer import Tokenizer

TEXTS = [f"Story {i}. " + "The cat saw a naïve dog. " * (i % 5) for i in range(90)]
TOKENIZER = Tokenizer.train(TEXTS, 300)
SPLITS: tuple[Split, ...] = ("train", "validation")

Streams = dict[Split, TokenStream]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "UNIT_BYTES", 500)


def corpus(folder: Path) -> Path:
    """The texts in files of every kind, with an empty file and a white-space document."""
    folder.mkdir()
    (folder / "a.txt").write_text("\n<|endoftext|>\n".join([*TEXTS[:20], " \n"]), encoding="utf-8")
    rows = [{"text": text} for text in TEXTS]
    (folder / "b.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[20:50]), encoding="utf-8")
    (folder / "c.jsonl").touch()
    pq.write_table(pa.Table.from_pylist(rows[50:]), folder / "d.parquet", row_group_size=7)
    return folder


def made(source: Source, cache: Path, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> Streams:
    return prepare(source, cache, tokenizer, **{"validation_share": 0.3, "workers": 1, **options})


def samples(stream: TokenStream) -> list[list[int]]:
    """The ids of every sample."""
    bounds = [*stream.starts.tolist(), len(stream)]
    return [stream.read(b, e - b).tolist() for b, e in pairwise(bounds)]


def content(streams: Streams) -> dict[Split, Any]:
    """All that a pair of streams says, apart from where samples are from."""
    return {
        split: (samples(s), None if s.prompts is None else s.prompts.tolist()) for split, s in streams.items()
    }


def only(cache: Path) -> Path:
    (directory,) = cache.iterdir()
    return directory


def data_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("unit-*.*.*")}


def test_streams_hold_every_document_in_order(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "data")
    streams = made(Source(path=str(folder)), tmp_path / "cache")
    documents = list(read_documents(find_files(folder), validation_share=0.3))
    assert len(documents) == 90
    assert list(streams) == ["train", "validation"]
    for split, stream in streams.items():
        expected = [d for d in documents if d.split == split]
        assert samples(stream) == [[*TOKENIZER.encode(d.text), TOKENIZER.eos_id] for d in expected]
        assert [stream.describe(i) for i in range(len(expected))] == [d.origin for d in expected]
        assert stream.prompts is None
        assert stream.starts.dtype == np.int64
        assert all(isinstance(part, np.memmap) and part.dtype == np.uint16 for part in stream.parts)


@pytest.mark.parametrize("unit", [1, 500, 10**9])
def test_neither_workers_nor_units_change_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: int
) -> None:
    source = Source(path=str(corpus(tmp_path / "data")))
    expected = made(source, tmp_path / "expected")
    monkeypatch.setattr(shards, "UNIT_BYTES", unit)
    one, three = (made(source, tmp_path / name, workers=n) for name, n in (("one", 1), ("three", 3)))
    assert content(one) == content(three) == content(expected)
    files = data_files(only(tmp_path / "one"))
    assert files == data_files(only(tmp_path / "three"))
    assert (len(files) // 4 == 1) if unit == 10**9 else (len(files) // 4 > 10)
    described = [
        [s.describe(i) for s in (one["train"], expected["train"])] for i in range(len(one["train"].starts))
    ]
    assert all(a == b for a, b in described)


def test_small_files_share_a_unit(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text("x" * 100, encoding="utf-8")
    stream = made(Source(path=str(folder)), tmp_path / "cache", validation_share=0)["train"]
    assert len(list(only(tmp_path / "cache").glob("unit-*.json"))) == 8  # of five files of 100 bytes
    assert [stream.describe(i) for i in (0, 4, 5, 39)] == [f"{folder}/{i:02d}.txt:1" for i in (0, 4, 5, 39)]


@pytest.mark.parametrize("characters", [1, 200, 10**6])
def test_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: int) -> None:
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", characters)
    folder = corpus(tmp_path / "data")
    stream = made(Source(path=str(folder)), tmp_path / "cache", validation_share=0)["train"]
    assert samples(stream) == [[*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in TEXTS]


def test_a_large_vocabulary_takes_four_bytes_an_id(tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(65534)} | {"<|endoftext|>": 65534, "<|pad|>": 65535}
    for more, dtype in ((0, np.uint16), (1, np.uint32)):
        vocabulary = words | {f"x{i}": 65536 + i for i in range(more)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        (tmp_path / "d.txt").write_text("w3 w65533 x0", encoding="utf-8")
        source = Source(path=str(tmp_path / "d.txt"))
        stream = made(source, tmp_path / "cache", Tokenizer(inner), validation_share=0)["train"]
        assert stream.parts[0].dtype == dtype
        assert samples(stream) == [[3, 65533, 65536 if more else 0, 65534]]


def test_validation_of_another_place(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out", encoding="utf-8")
    source = Source(path=str(corpus(tmp_path / "data")), validation=str(tmp_path / "held.txt"))
    streams = made(source, tmp_path / "cache", validation_share=0.9)
    assert samples(streams["train"]) == [[*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in TEXTS]
    assert samples(streams["validation"]) == [[*TOKENIZER.encode("held out"), TOKENIZER.eos_id]]
    assert streams["validation"].describe(0) == f"{tmp_path / 'held.txt'}:1"


def test_conversations_and_pairs_keep_their_prompts(tmp_path: Path) -> None:
    chats = [
        [{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant") * (1 + i % 2)]
        for i in range(20)
    ]
    pairs = [(f"question {i}", f"answer {i}") for i in range(20)]
    rows: list[dict[str, Any]] = [
        {"messages": chat, "prompt": prompt, "completion": completion}
        for chat, (prompt, completion) in zip(chats, pairs, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=3)
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    expected = {
        "messages": [s for chat in chats for s in encode_messages(chat, TOKENIZER, DEFAULT_TEMPLATE, "")],
        "pairs": [encode_pair(*pair, TOKENIZER, "") for pair in pairs],
    }
    assert len(expected["messages"]) == 30
    for name in ("d.parquet", "d.jsonl"):
        for form, wanted in expected.items():
            source = Source(path=str(tmp_path / name), format=form)  # type: ignore[arg-type]
            stream = made(source, tmp_path / "cache", validation_share=0, template=DEFAULT_TEMPLATE)["train"]
            assert samples(stream) == [ids for ids, _ in wanted]
            assert stream.prompts is not None
            assert stream.prompts.tolist() == [prompt for _, prompt in wanted]
    stream = made(
        Source(path=str(tmp_path / "d.jsonl"), format="messages"),
        tmp_path / "cache",
        template=DEFAULT_TEMPLATE,
    )["train"]
    # Records lie in one split whole, and every answer of one names its line.
    lines = [int(stream.describe(i).rpartition(":")[2]) for i in range(len(stream.starts))]
    assert all(lines.count(line) == 1 + (line - 1) % 2 for line in lines)


def test_conversations_without_a_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match="no chat template"):
        made(Source(path=str(tmp_path), format="messages"), tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_gives_what_its_files_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    pytest.importorskip("datasets", reason="needs colada-lm[hub]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))  # of the workers
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(3):
        rows = [{"text": text} for text in TEXTS[30 * n : 30 * n + 30]]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{n}.parquet")
    expected = content(made(Source(path=str(folder)), tmp_path / "files"))
    said = list[str]()
    source = Source(hub=str(folder), streaming=streaming)
    assert content(made(source, tmp_path / "cache", workers=2, say=said.append)) == expected
    assert said[0].endswith("processes: 2")


# --- stopping and sharing ----------------------------------------------------------------------

# Says what it is told and how far it is, and stops where a file "hold" is until there is one "go".
SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
from colada.data import shards
from colada.data.sources import Source
from colada.text.tokenizer import Tokenizer

def progress(done, total):
    print("done", done, *[child.pid for child in multiprocessing.active_children()], flush=True)
    while Path("hold").exists() and not Path("go").exists():
        time.sleep(0.01)

if __name__ == "__main__":
    shards.UNIT_BYTES = 500
    shards.prepare(
        Source(path=sys.argv[1]), Path("cache"), Tokenizer.from_file("tokenizer.json"), validation_share=0.3,
        workers=int(sys.argv[2]), progress=progress, say=lambda line: print(line, flush=True),
    )
"""


def start(folder: Path, data: Path, workers: int) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    TOKENIZER.save(folder / "tokenizer.json")
    arguments = [sys.executable, "script.py", str(data), str(workers)]
    process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(60, process.kill)  # Rather than wait for ever.
    timer.daemon = True
    timer.start()
    return process


def lines_until(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> list[str]:
    assert process.stdout is not None
    lines = list[str]()
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if wanted(lines[-1]):
            return lines
    raise AssertionError(f"it ended after {lines}")


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_kill_only_what_is_missing_is_made(tmp_path: Path, workers: int) -> None:
    data = corpus(tmp_path / "data")
    expected = content(made(Source(path=str(data)), tmp_path / "expected"))
    (tmp_path / "hold").touch()
    process = start(tmp_path, data, workers)
    last = lines_until(process, lambda line: line.startswith("done"))[-1]
    process.kill()
    process.wait()
    directory = only(tmp_path / "cache")
    children = [int(pid) for pid in last.split()[2:]]
    assert len(children) == (0 if workers == 1 else 2)
    deadline = time.monotonic() + 20
    while not all(map(ended, children)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(map(ended, children))
    if workers == 1:
        assert len(list(directory.glob("unit-*.json"))) == 1
    # As if the last unit were under way: its files are there, but its manifest is not.
    last_made = max(directory.glob("unit-*.json"))
    last_made.unlink()
    left = directory / "making-left"
    left.mkdir()
    (left / "unit-00007.train.ids").write_bytes(b"half")
    (directory / "unit-00007.train.ids").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in directory.glob("unit-*.json")}
    seen = list[tuple[int, int]]()
    said = list[str]()
    streams = made(
        Source(path=str(data)), tmp_path / "cache", progress=lambda *x: seen.append(x), say=said.append
    )
    assert content(streams) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before
    total = len(list(directory.glob("unit-*.json")))
    assert seen == [(done, total) for done in range(len(before) + 1, total + 1)]
    assert f"{total - len(before)} of {total} units" in said[0]
    assert data_files(directory) == data_files(only(tmp_path / "expected"))
    assert not list(directory.glob("making-*"))
    assert made(Source(path=str(data)), tmp_path / "cache", say=said.append)
    assert "reusing" in said[-1]


def test_of_two_processes_one_makes_the_shards(tmp_path: Path) -> None:
    data = corpus(tmp_path / "data")
    (tmp_path / "hold").touch()
    one = start(tmp_path, data, 1)
    lines_until(one, lambda line: line.startswith("done"))
    two = start(tmp_path, data, 1)
    assert lines_until(two, lambda line: True) == [f"waiting for another process, which tokenises {data}"]
    (tmp_path / "go").touch()
    (_, _), (rest, _) = one.communicate(timeout=60), two.communicate(timeout=60)
    assert (one.returncode, two.returncode, rest) == (0, 0, "")
    expected = made(Source(path=str(data)), tmp_path / "expected")
    assert content(made(Source(path=str(data)), tmp_path / "cache")) == content(expected)


def test_a_killed_worker_is_an_error(tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    source = Source(path=str(corpus(tmp_path / "data")))
    with pytest.raises(ColadaError, match=r"data: a process that tokenised it was killed.*data\.workers"):
        made(source, tmp_path / "cache", workers=2, progress=kill)
    assert content(made(source, tmp_path / "cache")) == content(made(source, tmp_path / "expected"))


def test_a_full_disk_is_an_error_and_what_is_finished_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(path=str(corpus(tmp_path / "data")))

    def full(done: int, total: int) -> None:
        if done == 3:
            monkeypatch.setattr(os, "fsync", fail)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ColadaError, match=r"^cannot write shards to .*cache.*: No space left on device$"):
        made(source, tmp_path / "cache", progress=full)
    monkeypatch.undo()
    assert len(list(only(tmp_path / "cache").glob("unit-*.json"))) == 3
    assert not list(only(tmp_path / "cache").glob("making-*"))


# --- fingerprints ------------------------------------------------------------------------------


def test_all_that_decides_the_ids_decides_the_directory(tmp_path: Path) -> None:
    data, cache = tmp_path / "d.jsonl", tmp_path / "cache"
    data.write_text('{"text": "a", "other": "b"}\n', encoding="utf-8")
    source = Source(path=str(data))
    made(source, cache, validation_share=0)

    def another(change: Source = source, **options: Any) -> bool:
        before = len(list(cache.iterdir()))
        made(change, cache, **{"validation_share": 0, **options})
        return len(list(cache.iterdir())) == before + 1

    assert not another()
    assert not another(source.model_copy(update={"weight": 3.0}))
    assert not another(workers=2)
    assert not another(template="unused by texts")
    assert another(tokenizer=Tokenizer.train(TEXTS, 301))
    assert another(source.model_copy(update={"column": "other"}))
    assert another(validation_share=1e-9)
    assert another(source.model_copy(update={"validation": str(data)}))
    time.sleep(0.01)  # The clock of file times is coarse.
    data.write_text('{"text": "c", "other": "b"}\n', encoding="utf-8")
    assert another()
    assert samples(made(source, cache, validation_share=0)["train"]) == [
        [*TOKENIZER.encode("c"), TOKENIZER.eos_id]
    ]
    assert not another()


# --- damage ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip, "changed since it was made: its SHA-256 begins"),
        (cut, r"has \d+ bytes, expected \d+"),
        (Path.unlink, "cannot be read"),
    ],
)
@pytest.mark.parametrize("name", ["unit-00002.train.ids", "unit-00003.validation.samples.npy"])
def test_a_changed_shard_is_named(tmp_path: Path, name: str, harm: Callable[[Path], None], said: str) -> None:
    source = Source(path=str(corpus(tmp_path / "data")))
    expected = content(made(source, tmp_path / "cache"))
    directory = only(tmp_path / "cache")
    harm(directory / name)
    with pytest.raises(ColadaError, match=rf"^{directory / name} {said}.*; delete {directory} to"):
        made(source, tmp_path / "cache")
    shutil.rmtree(directory)
    assert content(made(source, tmp_path / "cache")) == expected


@pytest.mark.parametrize("name", ["unit-00002.json", "plan.json"])
@pytest.mark.parametrize("text", ["", "{", "{}", '{"files": {"x": {}}}', '{"units": [[{"x": 1}]]}', "[]"])
def test_a_damaged_manifest_is_named(tmp_path: Path, name: str, text: str) -> None:
    source = Source(path=str(corpus(tmp_path / "data")))
    made(source, tmp_path / "cache")
    (only(tmp_path / "cache") / name).write_text(text, encoding="utf-8")
    with pytest.raises(ColadaError, match=rf"{name} is damaged.*; delete "):
        made(source, tmp_path / "cache")


def test_a_copied_cache_is_read_as_it_is(tmp_path: Path) -> None:
    source = Source(path=str(corpus(tmp_path / "data")))
    expected = content(made(source, tmp_path / "cache"))
    shutil.copytree(tmp_path / "cache", tmp_path / "copy", copy_function=shutil.copyfile)  # without times
    said = list[str]()
    assert content(made(source, tmp_path / "copy", say=said.append)) == expected
    assert "reusing" in said[0]


# --- errors in the data ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{broken", "is not valid JSON"),
        ("[1]", "holds a list, expected a JSON object"),
        ('{"text": 3}', "'text' is of type int, expected a string"),
        ('{"texts": "a"}', r"no column 'text' \(did you mean 'texts'\?\), columns there: texts"),
        ('{"text": "\\ud800"}', "'text' holds a lone surrogate"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_read_is_named_from_any_process(
    tmp_path: Path, bad: str, said: str, workers: int
) -> None:
    data = tmp_path / "d.jsonl"
    good = "".join(f"{json.dumps({'text': text})}\n" for text in TEXTS)
    data.write_text(f"{good}{bad}\n{good}", encoding="utf-8")
    with pytest.raises(ColadaError, match=rf"^{data}:91:? ?{said}"):
        made(Source(path=str(data)), tmp_path / "cache", workers=workers)
    data.write_text(good, encoding="utf-8")
    assert made(Source(path=str(data)), tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "share", "held_out"), [("", 0.3, 0), ('{"text": " "}\n', 0.3, 0), ('{"text": "a"}\n', 1.0, 1)]
)
def test_a_source_with_nothing_to_train_on_is_named(
    tmp_path: Path, text: str, share: float, held_out: int
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(text, encoding="utf-8")
    for _ in range(2):
        with pytest.raises(
            ColadaError, match=rf"^{data}: 0 samples to train on \({held_out} for validation\)"
        ):
            made(Source(path=str(data)), tmp_path / "cache", validation_share=share)


def test_workers_need_no_torch() -> None:
    script = "import sys, colada.data.shards; print(sorted({'torch', 'datasets'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert printed.stdout.strip() == "[]"
