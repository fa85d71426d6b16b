import gzip
import json
import re
import subprocess
import sys
from hashlib import sha1
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colada.data.documents import Record, read_documents
from colada.data.listing import find_files
from colada.errors import ColadaError

TEXTS = [f"Document {i}: naïve 東京\nsecond line, 🙂" for i in range(40)]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def read_error(path: Path, **options: object) -> str:
    """The message reading ``path`` ends in; always one line that names the file."""
    with pytest.raises(ColadaError) as caught:
        list(read_documents([path], **options))  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


# --- files -----------------------------------------------------------------


def test_find_files_is_recursive_sorted_and_knows_its_kinds(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "x.jsonl").mkdir()  # a folder is not a file, whatever its name
    for name in ("z.txt", "b/c.jsonl.gz", "b/a.parquet", "a.txt.gz", "m.JSONL", "skip.csv", "skip.gz", "txt"):
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path)]
    assert names == sorted(["a.txt.gz", "b/a.parquet", "b/c.jsonl.gz", "m.JSONL", "z.txt"])
    assert find_files(tmp_path / "z.txt") == [tmp_path / "z.txt"]


def test_find_files_include(tmp_path: Path) -> None:
    for name in ("a-1.txt", "a-2.txt", "b.jsonl", "c.txt"):
        (tmp_path / name).touch()
    names = [path.name for path in find_files(tmp_path, ["a-*", "*.jsonl", "a-1*"])]
    assert names == ["a-1.txt", "a-2.txt", "b.jsonl"]
    with pytest.raises(ColadaError, match=r"'b\.jsnl' matches no data file in .*did you mean 'b\.jsonl'"):
        find_files(tmp_path, ["a-*", "b.jsnl"])


def test_find_files_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()
    for where in (tmp_path / "none", tmp_path, tmp_path / "x.csv"):
        with pytest.raises(ColadaError, match=re.escape(str(where)) + r".*\.parquet"):
            find_files(where)


# --- documents ---------------------------------------------------------------


def test_all_kinds_give_the_same_documents(tmp_path: Path) -> None:
    joined = "\n<|endoftext|>\n".join(TEXTS) + "\n"
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS)
    (tmp_path / "d.txt").write_text(joined, encoding="utf-8")
    (tmp_path / "d.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(joined.encode()))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_parquet(tmp_path / "d.parquet", {"id": [1] * 40, "text": list(TEXTS)})
    files = find_files(tmp_path)
    assert len(files) == 5
    expected = None
    for path in files:
        documents = [(d.text, d.split) for d in read_documents([path], validation_share=0.3)]
        assert [text for text, _ in documents] == TEXTS
        assert expected in (None, documents)
        expected = documents
    assert len(list(read_documents(files))) == 5 * len(TEXTS)


def test_text_separator_must_be_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(
        b"one <|endoftext|>\n <|endoftext|>\n\n<|endoftext|>\r\n<|endoftext|>\n  \n<|endoftext|>\ntwo\r\n"
    )
    documents = list(read_documents([path]))
    assert [d.text for d in documents] == ["one <|endoftext|>\n <|endoftext|>\n", "two"]
    assert [d.origin for d in documents] == [f"{path}:1", f"{path}:8"]


def test_a_text_without_separator_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("a\n\nb\n\n", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    assert [d.text for d in read_documents(find_files(tmp_path))] == ["a\n\nb\n"]


def test_origin_counts_skipped_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": " \\n"}\n\n{"text": "a"}\n', encoding="utf-8")
    assert list(read_documents([path], validation_share=0)) == [Record(("a",), "train", 3, f"{path}:3")]


def test_split_column_is_respected(tmp_path: Path) -> None:
    given: list[object] = ["train", "validation", "valid", "val", "dev", "test", "train"]
    texts: list[object] = [f"t{i}" for i in range(7)]
    expected = [("t0", "train"), *((f"t{i}", "validation") for i in (1, 2, 3, 4)), ("t6", "train")]
    rows: list[dict[str, object]] = [{"text": t, "split": s} for t, s in zip(texts, given, strict=True)]
    write_jsonl(tmp_path / "d.jsonl", rows)
    write_parquet(tmp_path / "d.parquet", {"split": given, "text": texts})
    for name in ("d.jsonl", "d.parquet"):
        for share in (0, 1):
            found = read_documents([tmp_path / name], validation_share=share)
            assert [(d.text, d.split) for d in found] == expected


def test_validation_share_is_the_sha1_of_the_text(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(2000)]
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    splits = {d.text: d.split for d in read_documents([path], validation_share=0.25)}
    # 0.25 is 0x40 in the first byte of the digest.
    assert all((splits[t] == "validation") == (sha1(t.encode()).digest()[0] < 0x40) for t in texts)
    assert 400 < sum(split == "validation" for split in splits.values()) < 600
    for share, only in ((0, "train"), (1, "validation")):
        assert {d.split for d in read_documents([path], validation_share=share)} == {only}


def test_parquet_is_read_in_batches_of_any_string_type(tmp_path: Path) -> None:
    texts = [f"t{i}" for i in range(3000)]
    strings = pa.array(texts)
    for array in (strings, strings.cast(pa.large_string()), strings.dictionary_encode()):
        pq.write_table(pa.table({"body": array}), tmp_path / "d.parquet", row_group_size=700)
        found = list(read_documents([tmp_path / "d.parquet"], column="body"))
        assert [d.text for d in found] == texts
        assert found[2999].origin.endswith("d.parquet:row 3000")


@pytest.mark.parametrize("name", ["d.txt", "d.jsonl", "d.txt.gz"])
def test_bad_utf8_names_line_and_byte(tmp_path: Path, name: str) -> None:
    content = b'{"text": "fine"}\n{"text": "\xc3\xa9\xff"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    message = read_error(tmp_path / name)
    assert f"{name}:2: byte 0xff at offset 12" in message


@pytest.mark.parametrize("bad", ["{", "{'text': 1}", '{"text": "a"} x', "[" * 200_000])
def test_bad_json_names_the_line(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n' + bad + "\n", encoding="utf-8")
    assert read_error(path).startswith(f"{path}:3 is not valid JSON")


def test_json_that_is_no_object_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n["text"]\n', encoding="utf-8")
    assert read_error(path) == f"{path}:2 holds a list, expected a JSON object"


def test_missing_column_lists_those_there_and_the_nearest(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "a"}, {"id": 1, "texts": "a"}]
    jsonl = write_jsonl(tmp_path / "d.jsonl", rows)
    parquet = write_parquet(tmp_path / "d.parquet", {"id": [1], "texts": ["a"]})
    told = "no column 'text' (did you mean 'texts'?), columns there: id, texts"
    assert read_error(jsonl) == f"{jsonl}:2: {told}"
    assert read_error(parquet) == f"{parquet}: {told}"


@pytest.mark.parametrize(("bad", "said"), [(None, "null"), (7, "of type int"), ([1], "of type list")])
def test_text_that_is_no_string_names_the_row(tmp_path: Path, bad: object, said: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}, {"text": bad}])
    assert read_error(path) == f"{path}:2: 'text' is {said}, expected a string"


def test_parquet_text_that_is_no_string_names_the_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", {"text": ["a", "b", None]})
    assert read_error(path) == f"{path}:row 3: 'text' is null, expected a string"
    path = write_parquet(tmp_path / "e.parquet", {"text": [1.5]})
    assert read_error(path) == f"{path}:row 1: 'text' is of type float, expected a string"


@pytest.mark.parametrize("bad", ["trian", None, 3, ["train"]])
def test_unknown_split_names_value_and_row(tmp_path: Path, bad: object) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "a", "split": "dev"}, {"text": "a", "split": bad}])
    message = read_error(path)
    assert message.startswith(f"{path}:2: split={bad!r}")
    assert ("did you mean 'train'" in message) == (bad == "trian")
    if bad is None or isinstance(bad, str):
        parquet = write_parquet(tmp_path / "d.parquet", {"text": ["a", "a"], "split": ["dev", bad]})
        assert read_error(parquet).startswith(f"{parquet}:row 2: split={bad!r}")


def test_a_lone_surrogate_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "ok"}\n{"text": "a\\ud800"}\n', encoding="utf-8")
    assert read_error(path).startswith(f"{path}:2: 'text' holds a lone surrogate")


def test_parquet_bad_utf8_names_the_row(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"a\xff"]).cast(pa.binary())
    text = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": text}), tmp_path / "d.parquet")
    assert "row 2: not UTF-8" in read_error(tmp_path / "d.parquet")


def test_corrupt_files_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "whole.parquet", {"text": [f"{i} " * 50 for i in range(500)]})
    content = (tmp_path / "whole.parquet").read_bytes()
    damaged = content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :]
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name, data in (
        ("empty.parquet", b""),
        ("cut.parquet", content[: len(content) // 2]),
        ("damaged.parquet", damaged),
        ("plain.jsonl.gz", b'{"text": "a"}\n'),
        ("cut.jsonl.gz", packed[: len(packed) // 2]),
        ("damaged.txt.gz", packed[:12] + b"\xff" * 20 + packed[32:]),
    ):
        (tmp_path / name).write_bytes(data)
        assert "read" in read_error(tmp_path / name)
    assert "unknown kind" in read_error(tmp_path / "x.csv")
    assert "no such file" in read_error(tmp_path / "none.txt")


def test_missing_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "d.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "colada-lm[train]" in read_error(path)


def test_import_brings_in_neither_torch_nor_pyarrow() -> None:
    script = "import sys, colada.data; print(sorted({'torch', 'pyarrow'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert printed.stdout.strip() == "[]"
