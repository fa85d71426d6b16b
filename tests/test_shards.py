"""Token shards against plain tokenising, and everything that may happen to them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colada.data import shards
from colada.data.documents import Split, find_files, read_documents
from colada.data.shards import prepare
from colada.data.sources import Source, read_texts
from colada.data.stream import TokenStream
from colada.errors import ColadaError
from colada.tokenizer import Tokenizer

TEXTS = [f"Story {n}. " + "One morning the cat sat on the mat. " * (1 + n % 5) for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 280)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three kinds of files with the same sixty texts, twenty each."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20])
    (folder / "a.jsonl").write_text(lines)
    pq.write_table(pa.table({"text": TEXTS[20:40]}), folder / "b.parquet", row_group_size=6)
    (folder / "c.txt").write_text("\n<|endoftext|>\n".join(TEXTS[40:]) + "\n")
    return folder


def make(
    source: Source | Path, cache: Path, tokenizer: Tokenizer, **options: Any
) -> dict[Split, TokenStream]:
    own = Source(path=str(source)) if isinstance(source, Path) else source
    return prepare(own, cache, tokenizer, **{"validation_share": 0.3, "workers": 1, **options})


def plain(folder: Path, tokenizer: Tokenizer, split: Split, share: float = 0.3) -> list[list[int]]:
    """What a split holds: every document's ids with the end token, in order."""
    documents = read_documents(find_files(folder), validation_share=share)
    return [[*tokenizer.encode(d.text), tokenizer.eos_id] for d in documents if d.split == split]


def samples(stream: TokenStream) -> list[list[int]]:
    ends = [*stream.starts[1:], len(stream)]
    return [stream.read(int(b), int(e - b)).tolist() for b, e in zip(stream.starts, ends, strict=True)]


def unit_files(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*/unit-*")}


def test_shards_hold_every_document_in_order(tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    made = make(texts, tmp_path / "cache", tokenizer)
    for split in ("train", "validation"):
        assert samples(made[split]) == plain(texts, tokenizer, split)  # type: ignore[arg-type]
        assert made[split].prompts is None
    assert {part.dtype for part in made["train"].parts} == {np.dtype(np.uint16)}


def test_every_sample_says_where_it_is_from(tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    made = make(texts, tmp_path / "cache", tokenizer)
    documents = list(read_documents(find_files(texts), validation_share=0.3))
    for split, stream in made.items():
        origins = [document.origin for document in documents if document.split == split]
        assert [stream.describe(n) for n in range(len(stream.starts))] == origins


def test_processes_and_pieces_change_nothing(
    tmp_path: Path, texts: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(texts, tmp_path / "one", tokenizer)
    monkeypatch.setattr(shards, "UNIT_BYTES", 700)
    seen: list[tuple[int, int]] = []
    cut = make(texts, tmp_path / "two", tokenizer, workers=3, progress=lambda *at: seen.append(at))
    assert len(cut["train"].parts) > 6
    for split, stream in whole.items():
        assert samples(cut[split]) == samples(stream)
        origins = [[s.describe(n) for n in range(len(s.starts))] for s in (stream, cut[split])]
        assert origins[0] == origins[1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_what_is_there_is_not_made_again(tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    make(texts, tmp_path, tokenizer)
    before = unit_files(tmp_path)
    said: list[str] = []
    make(texts, tmp_path, tokenizer, say=said.append)
    assert unit_files(tmp_path) == before
    assert [line.partition(" in ")[0] for line in said] == [f"{texts}: reusing the shards"]
    # How often a source is used does not change its tokens.
    make(Source(path=str(texts), weight=3.0), tmp_path, tokenizer)
    assert unit_files(tmp_path) == before


@pytest.mark.parametrize("change", ["tokenizer", "share", "column", "content", "include"])
def test_what_changes_the_tokens_makes_other_shards(
    tmp_path: Path, texts: Path, tokenizer: Tokenizer, change: str
) -> None:
    cache = tmp_path / "cache"
    make(texts, cache, tokenizer)
    source, share = Source(path=str(texts)), 0.3
    if change == "tokenizer":
        tokenizer = Tokenizer.train(TEXTS, 270)
    elif change == "share":
        share = 0.5
    elif change == "column":
        source = Source(path=str(texts), column="text")
    elif change == "include":
        source = Source(path=str(texts), include=("*.jsonl",))
    else:
        with (texts / "a.jsonl").open("a") as file:
            file.write('{"text": "more"}\n')
    made = make(source, cache, tokenizer, validation_share=share)
    assert len(list(cache.glob("*/plan.json"))) == 2
    if change == "content":
        assert samples(made["train"]) == plain(texts, tokenizer, "train")


@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_shard_that_changed_is_refused_by_name(
    tmp_path: Path, texts: Path, tokenizer: Tokenizer, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "UNIT_BYTES", 700)
    make(texts, tmp_path, tokenizer)
    (victim,) = tmp_path.glob("*/unit-00001.train.ids")
    whole = victim.read_bytes()
    said = {
        "cut": r"has \d+ bytes, expected \d+",
        "flip": "changed since it was made: its SHA-256",
        "delete": "cannot be read",
    }[damage]
    if damage == "delete":
        victim.unlink()
    else:
        victim.write_bytes(whole[:-2] if damage == "cut" else bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ColadaError, match=said) as caught:
        make(texts, tmp_path, tokenizer)
    assert "unit-00001.train.ids" in str(caught.value)
    assert f"delete {victim.parent}" in str(caught.value)


def test_a_shard_that_was_only_copied_is_accepted(tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    made = make(texts, tmp_path, tokenizer)
    for file in tmp_path.glob("*/unit-*"):
        os.utime(file, (1, 1))
    assert samples(make(texts, tmp_path, tokenizer)["train"]) == samples(made["train"])


KILLED = """
import os, signal, sys
from pathlib import Path
from colada.data import shards
from colada.data.sources import Source
from colada.tokenizer import Tokenizer

folder, cache, tokenizer, number = sys.argv[1:]
shards.UNIT_BYTES = 700
samples, made = shards._samples, 0

def counted(*arguments):
    global made
    for sample in samples(*arguments):
        made += 1
        if made == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        yield sample

shards._samples = counted
source, tokenizer = Source(path=folder), Tokenizer.from_file(tokenizer)
shards.prepare(source, Path(cache), tokenizer, validation_share=0.3, workers=1)
"""


def test_tokenising_that_was_killed_goes_on_with_what_is_missing(
    tmp_path: Path, texts: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, texts, cache, tmp_path / "tokenizer.json", "47"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    before = unit_files(cache)
    finished = {name for name in before if name.endswith(".json")}
    assert finished
    assert list(cache.glob("*/making-*"))
    made = make(texts, cache, tokenizer)
    for split, stream in made.items():
        assert samples(stream) == plain(texts, tokenizer, split)
    after = unit_files(cache)
    assert all(after[name] == before[name] for name in before)
    assert len([name for name in after if name.endswith(".json")]) > len(finished)
    assert not list(cache.glob("*/making-*"))


TWO = """
import sys
from pathlib import Path
from colada.data.shards import prepare
from colada.data.sources import Source
from colada.tokenizer import Tokenizer

made = prepare(Source(path=sys.argv[1]), Path(sys.argv[2]), Tokenizer.from_file(sys.argv[3]),
               validation_share=0.3, workers=1, say=print)
print(len(made["train"]))
"""


def test_of_two_processes_one_makes_the_shards(tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    command = [sys.executable, "-c", TWO, texts, tmp_path / "cache", tmp_path / "tokenizer.json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].splitlines() for process in both]
    count = sum(map(len, plain(texts, tokenizer, "train")))
    assert [output[-1] for output in outputs] == [str(count)] * 2
    said = [line for output in outputs for line in output[:-1]]
    assert len([line for line in said if line.startswith("tokenising")]) == 1


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"txt": "a"}\n',
            r"bad\.jsonl:1: no column 'text' \(did you mean 'txt'\?\)|bad\.jsonl:1: no column 'text'",
        ),
        ('{"text": "a"}\n{"text": 3}\n', r"bad\.jsonl:2: 'text' is of type int, expected a string"),
        ('{"text": "a"}\n\nnot json\n', r"bad\.jsonl:3: not JSON"),
        ('{"text": "a"}\n{"text": null}\n', r"bad\.jsonl:2: 'text' is null"),
    ],
)
def test_bad_records_are_named_with_their_line(
    tmp_path: Path,
    texts: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    said: str,
    workers: int,
) -> None:
    monkeypatch.setattr(shards, "UNIT_BYTES", 700)
    (texts / "bad.jsonl").write_text(content)
    with pytest.raises(ColadaError, match=said) as caught:
        make(texts, tmp_path / "cache", tokenizer, workers=workers)
    assert "\n" not in str(caught.value)


def test_a_source_without_training_samples_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "split": "validation"}\n{"text": "  "}\n')
    with pytest.raises(
        ColadaError, match=r"a\.jsonl: 0 samples to train on \(1 for validation\), expected some"
    ):
        make(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer)


def test_validation_text_of_its_own(tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "held-out.jsonl").write_text('{"text": "held out"}\n{"text": "and this"}\n')
    source = Source(path=str(texts), validation=str(tmp_path / "held-out.jsonl"))
    made = make(source, tmp_path / "cache", tokenizer)
    assert samples(made["train"]) == plain(texts, tokenizer, "train", 0.0)
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in ("held out", "and this")]
    assert samples(made["validation"]) == expected


def test_pairs_and_messages_become_samples_with_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "One ", "completion": "morning"}\n')
    made = make(Source(path=str(tmp_path / "pairs.jsonl"), format="pairs"), tmp_path / "cache", tokenizer)
    prompt, completion = tokenizer.encode("One "), tokenizer.encode("morning")
    both = {**made}
    stream = both["train"] if len(both["train"]) else both["validation"]
    assert samples(stream) == [[*prompt, *completion, tokenizer.eos_id]]
    assert stream.prompts is not None
    assert stream.prompts.tolist() == [len(prompt)]
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(record) + "\n")
    template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    source = Source(path=str(tmp_path / "chats.jsonl"), format="messages")
    made = make(source, tmp_path / "cache", tokenizer, template=template, validation_share=0.0)
    decoded = [tokenizer.decode(ids, skip_special=False) for ids in samples(made["train"])]
    assert decoded == ["a;b;<|endoftext|>", "a;b;c;d;<|endoftext|>"]
    assert made["train"].describe(1) == f"{tmp_path / 'chats.jsonl'}:1"


def test_text_files_hold_no_messages(tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    source = Source(path=str(texts / "c.txt"), format="messages")
    with pytest.raises(
        ColadaError, match=r"c\.txt: plain text with format='messages', expected \.jsonl or \.parquet"
    ):
        make(source, tmp_path / "cache", tokenizer, template="x")


# --- hub data sets, from a directory -------------------------------------------------------------


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS[:40]}), folder / "train-00000.parquet")
    pq.write_table(pa.table({"text": TEXTS[40:]}), folder / "validation-00000.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_equals_its_files(
    tmp_path: Path, data_set: Path, tokenizer: Tokenizer, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    source = Source(hub=str(data_set), streaming=streaming, validation="validation")
    made = make(source, tmp_path / "cache", tokenizer)
    for split, part in (("train", TEXTS[:40]), ("validation", TEXTS[40:])):
        expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in part]
        assert samples(made[split]) == expected  # type: ignore[index]
    where = "file 1, row" if streaming else "row"
    assert made["train"].describe(3) == f"{data_set}, train: {where} 4"
    assert list(read_texts(source, 0.3)) == TEXTS[:40]
    # By the hash of the text where the data set is not split.
    made = make(Source(hub=str(data_set), streaming=streaming), tmp_path / "cache", tokenizer)
    both = [text for split in made.values() for text in samples(split)]
    assert sorted(both) == sorted([*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS[:40])
    assert len(samples(made["validation"])) > 3


def test_a_data_set_that_cannot_be_had_is_one_line(
    tmp_path: Path, data_set: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ColadaError, match=r"cannot read data set .*set, split 'tran'") as caught:
        make(Source(hub=str(data_set), split="tran"), tmp_path / "cache", tokenizer)
    assert "\n" not in str(caught.value)
    with pytest.raises(ColadaError, match=r"train: row 1: no column 'body'"):
        make(Source(hub=str(data_set), column="body"), tmp_path / "cache", tokenizer)


# --- what a source may say -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "expected one of them"),
        ({"path": "a", "hub": "b"}, "expected one of them"),
        ({"path": "a", "streaming": True}, "streaming=True without hub"),
        ({"path": "a", "config": "x"}, "config='x' without hub"),
        ({"hub": "a", "include": ("*.txt",)}, "without path"),
        ({"path": "a", "weight": 0}, "greater than 0"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Source(**keys)


def test_a_tokenizer_learns_from_training_text_of_every_format(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n")
    assert list(read_texts(Source(path=str(tmp_path / "c.jsonl"), format="messages"), 0.0)) == ["hi", "ho"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert list(read_texts(Source(path=str(tmp_path / "p.jsonl"), format="pairs"), 0.0)) == ["a", "b"]
    (tmp_path / "t.jsonl").write_text('{"text": "x", "split": "train"}\n{"text": "y", "split": "dev"}\n')
    assert list(read_texts(Source(path=str(tmp_path / "t.jsonl")), 0.0)) == ["x"]
