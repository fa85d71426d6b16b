"""Sources: what they read from files and from data sets, and what they refuse."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from colada.data.documents import Part, read_documents, read_records, split_file
from colada.data.listing import find_files
from colada.data.sources import Source, identity, parts, read, read_texts
from colada.errors import ColadaError

TEXTS = [f"Document {i}: naïve 東京\nsecond line, 🙂" for i in range(60)]
CHATS = [[{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"}] for i in range(12)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are prepared in a directory of the test's own."""
    datasets = pytest.importorskip("datasets", reason="needs colada-lm[hub]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts_of(source: Source, share: float = 0.0, size: int = sys.maxsize) -> list[str]:
    """The texts of all parts, in order."""
    return [r.values[0] for part in parts(source, size) for r in read(source, part, share)]


def error(source: Source, share: float = 0.1) -> str:
    """What reading a source says."""
    with pytest.raises(ColadaError) as caught:
        list(read_texts(source, share))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the recipe's part -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "expected one of them"),
        ({"path": "a", "hub": "b"}, "path='a' and hub='b'"),
        ({"path": "a", "streaming": True}, "streaming=True without hub"),
        ({"path": "a", "config": "en"}, "config='en' without hub"),
        ({"path": "a", "revision": "main"}, "revision='main' without hub"),
        ({"hub": "a", "include": ["*.txt"]}, r"include=\['\*.txt'\] without path"),
        ({"path": "a", "weight": 0}, "greater than"),
        ({"path": "a", "format": "chat"}, "messages"),
        ({"path": "a", "colunm": "x"}, "colunm"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Source(**settings)  # type: ignore[arg-type]


def test_each_format_has_its_columns() -> None:
    assert Source(path="a").columns == ("text",)
    assert Source(path="a", format="messages").columns == ("messages",)
    assert Source(path="a", format="messages", column="turns").columns == ("turns",)
    assert Source(path="a", format="pairs", prompt_column="q").columns == ("q", "completion")
    assert Source(hub="a/b", config="en").name == "a/b (en)"


def test_every_field_says_what_it_is() -> None:
    assert all(field.description for field in Source.model_fields.values())


# --- files in parts ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 999, 10**9])
@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("kind", ["txt", "crlf.txt", "jsonl", "parquet", "txt.gz", "jsonl.gz"])
def test_the_parts_of_a_file_hold_what_the_file_does(tmp_path: Path, kind: str, end: str, size: int) -> None:
    path = tmp_path / f"d.{kind}"
    rows = [{"text": text} for text in TEXTS]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        newline = "\r\n" if "crlf" in kind else "\n"
        separator = f"{newline}<|endoftext|>{newline}" if "txt" in kind else "\n"
        blank = "" if "txt" in kind else "\n"
        lines = TEXTS if "txt" in kind else [json.dumps(row) for row in rows]
        content = (blank + separator.join(lines) + end).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    whole = list(read_documents([path], validation_share=0.3))
    assert [d.text.rstrip("\r\n") for d in whole] == TEXTS
    found = split_file(path, size)
    records = [record for part in found for record in read_records(part, ["text"], 0.3)]
    documents = [r for r in records if r.values[0].strip()]
    assert [(r.values[0], r.split, r.origin) for r in documents] == [
        (d.text, d.split, d.origin) for d in whole
    ]
    assert sum(part.size for part in found) == pytest.approx(path.stat().st_size, abs=len(found))
    if kind.endswith("gz"):
        assert len(found) == 1
    elif size == 1:
        assert len(found) == (9 if kind == "parquet" else len(TEXTS) + (kind == "jsonl"))
    elif size == 999:
        assert 1 < len(found) < len(TEXTS)


def test_a_text_without_separator_stays_one_document_in_parts(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("one\ntwo\n" * 100, encoding="utf-8")
    (part,) = split_file(tmp_path / "d.txt", 10)
    assert [r.values for r in read_records(part, ["text"], 0)] == [(("one\ntwo\n" * 100)[:-1],)]


def test_an_empty_file_has_no_documents(tmp_path: Path) -> None:
    for name in ("d.txt", "d.jsonl"):
        (tmp_path / name).touch()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    assert list(read_documents(find_files(tmp_path))) == []


def test_what_is_marked_test_is_never_trained_on(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": s, "split": s} for s in ("train", "test", "validation")]
    part = Part(str(write_jsonl(tmp_path / "d.jsonl", rows)), "d:", split="train")
    assert [r.values[0] for r in read_records(part, ["text"], 0)] == ["train", "validation"]


def test_a_part_with_a_split_is_of_that_split_whatever_its_column_says(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": str(i), "split": s} for i, s in enumerate(["train", "test", "x"])
    ]
    part = Part(str(write_jsonl(tmp_path / "d.jsonl", rows)), "d:", split="validation")
    assert [(r.values[0], r.split) for r in read_records(part, ["text"], 0)] == [
        (str(i), "validation") for i in range(3)
    ]


def test_columns_of_parquet_are_taken_by_name(tmp_path: Path) -> None:
    table = pa.table({"completion": ["c0", "c1"], "other": [1, 2], "prompt": ["p0", "p1"]})
    pq.write_table(table, tmp_path / "d.parquet")
    source = Source(path=str(tmp_path), format="pairs")
    (part,) = parts(source)
    assert [r.values for r in read(source, part, 0)] == [("p0", "c0"), ("p1", "c1")]


# --- texts for a tokenizer ---------------------------------------------------------------------


def test_texts_are_those_trained_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS])
    expected = [d.text for d in read_documents([path], validation_share=0.3) if d.split == "train"]
    assert 0 < len(expected) < len(TEXTS)
    assert list(read_texts(Source(path=str(path)), 0.3)) == expected


def test_texts_of_conversations_and_pairs_are_what_was_said(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chats" / "d.jsonl", [{"messages": chat} for chat in CHATS])
    write_jsonl(tmp_path / "pairs" / "d.jsonl", [{"prompt": "p", "completion": "c", "id": "no"}])
    chats, pairs = (
        Source(path=str(tmp_path / "chats"), format="messages"),
        Source(path=str(tmp_path / "pairs"), format="pairs"),
    )
    assert list(read_texts(chats, 0)) == [text for i in range(12) for text in (f"Q{i}", f"A{i}")]
    assert list(read_texts(pairs, 0)) == ["p", "c"]


@pytest.mark.parametrize("bad", [None, 3, "text", ["text"], [{"role": "user"}], [{"content": 3}]])
def test_a_conversation_that_is_none_names_the_line(tmp_path: Path, bad: object) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": CHATS[0]}, {"messages": bad}])
    assert error(Source(path=str(path), format="messages"), 0).startswith(f"{path}:2: ")


def test_what_is_no_text_names_the_line(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}]
    )
    assert error(Source(path=str(path), format="pairs"), 0) == (
        f"{path}:2: 'completion' is of type int, expected a string"
    )
    told = f"{path}:1: no column 'promt' (did you mean 'prompt'?), columns there: prompt, completion"
    assert error(Source(path=str(path), column="promt"), 0) == told


def test_plain_text_has_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    write_jsonl(tmp_path / "b.txt.jsonl", [{"messages": CHATS[0]}])
    for form in ("messages", "pairs"):
        said = error(Source(path=str(tmp_path), format=form))  # type: ignore[arg-type]
        assert said == f"{tmp_path / 'a.txt'}: plain text with format={form!r}, expected .jsonl or .parquet"
    assert list(read_texts(Source(path=str(tmp_path), format="messages", include=("b.*",)), 0)) == [
        "Q0",
        "A0",
    ]


# --- validation --------------------------------------------------------------------------------


def test_validation_of_another_place(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": text, "split": "validation"} for text in TEXTS]
    write_jsonl(tmp_path / "a" / "d.jsonl", rows)
    write_jsonl(tmp_path / "b" / "e.jsonl", [{"text": "held out", "split": "test"}])
    source = Source(path=str(tmp_path / "a"), validation=str(tmp_path / "b"), include=("d.*",))
    found = [(r.split, r.values[0]) for part in parts(source) for r in read(source, part, 0.5)]
    assert found == [*(("train", text) for text in TEXTS), ("validation", "held out")]
    assert list(read_texts(source, 0.5)) == TEXTS


def test_identity_changes_with_files_of_either_place(tmp_path: Path) -> None:
    one, other = (
        write_jsonl(tmp_path / "a" / "d.jsonl", [{"text": "a"}]),
        write_jsonl(tmp_path / "v.jsonl", []),
    )
    source = Source(path=str(one.parent), validation=str(other))
    seen = [identity(source)]
    assert identity(source) == seen[0]
    for path in (one, other):
        write_jsonl(path, [{"text": "b"}])
        seen.append(identity(source))
    write_jsonl(one.parent / "e.jsonl", [])
    seen.append(identity(source))
    assert len({json.dumps(s) for s in seen}) == 4


# --- data sets ---------------------------------------------------------------------------------


def data_set(folder: Path, kind: str, train: int = 3) -> Path:
    """A data set in a directory: ``TEXTS`` in several files, and two more texts for validation."""
    folder.mkdir()
    for n in range(train):
        rows: list[dict[str, object]] = [{"id": i, "text": TEXTS[i]} for i in range(20 * n, 20 * n + 20)]
        if kind == "jsonl":
            write_jsonl(folder / f"train-{n}.jsonl", rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{n}.parquet")
    held_out: list[dict[str, object]] = [{"id": i, "text": f"held out {i}"} for i in range(2)]
    if kind == "jsonl":
        write_jsonl(folder / "validation.jsonl", held_out)
    else:
        pq.write_table(pa.Table.from_pylist(held_out), folder / "validation.parquet")
    return folder


@pytest.mark.parametrize("size", [1, 1000, 10**9])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_data_set_reads_like_its_files(tmp_path: Path, kind: str, streaming: bool, size: int) -> None:
    folder = data_set(tmp_path / "d", kind)
    source = Source(hub=str(folder), streaming=streaming)
    files = Source(path=str(folder), include=("train-*",))
    for share in (0.0, 0.3):
        got, expected = (
            [(r.values, r.split) for part in parts(s, size) for r in read(s, part, share)]
            for s in (source, files)
        )
        assert got == expected
    count = len(parts(source, size))
    assert count == 3 if streaming else (count == 60 if size == 1 else 1 <= count < 60)
    assert texts_of(source.model_copy(update={"split": "validation"})) == ["held out 0", "held out 1"]
    last = [r for part in parts(source, size) for r in read(source, part, 0)][-1]
    assert last.origin == f"{folder}, train: " + ("file 3, row 20" if streaming else "row 60")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_has_its_own_validation_split(tmp_path: Path, streaming: bool) -> None:
    source = Source(
        hub=str(data_set(tmp_path / "d", "parquet")), streaming=streaming, validation="validation"
    )
    found = [(r.split, r.values[0]) for part in parts(source, 999) for r in read(source, part, 0.5)]
    assert found == [
        *(("train", text) for text in TEXTS),
        ("validation", "held out 0"),
        ("validation", "held out 1"),
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_changed_data_set_is_another(tmp_path: Path, streaming: bool) -> None:
    folder = data_set(tmp_path / "d", "jsonl", train=1)
    source = Source(hub=str(folder), streaming=streaming)
    before = identity(source)
    assert texts_of(source) == TEXTS[:20]
    assert identity(source) == before
    write_jsonl(folder / "train-0.jsonl", [{"id": 1, "text": "new"}])
    assert identity(source) != before
    assert texts_of(source) == ["new"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_that_cannot_be_read_is_named(tmp_path: Path, streaming: bool) -> None:
    folder = data_set(tmp_path / "d", "jsonl")
    base = Source(hub=str(folder), streaming=streaming)
    for update, said in (
        ({"split": "trian"}, "split 'trian'"),
        ({"config": "nope"}, "nope"),
        ({"hub": str(tmp_path / "none")}, "none"),
    ):
        assert said in error(base.model_copy(update=update))
    assert error(base.model_copy(update={"column": "txt"})).endswith(
        "row 1: no column 'txt' (did you mean 'text'?), columns there: id, text"
    )
    assert "row 1: 'id' is of type int, expected a string" in error(
        base.model_copy(update={"column": "id"}), 0
    )
    (folder / "train-1.jsonl").write_text("{broken\n", encoding="utf-8")
    assert str(folder) in error(base)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error(Source(hub="a/b")) == 'a/b: hub data needs datasets: pip install "colada-lm[hub]"'
