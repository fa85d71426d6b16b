"""Faults of training data: what is no text is named, and little text is still split in two."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from colada.data.documents import Cut, Holdout, read_documents, read_records, split_file
from colada.data.listing import find_files, list_files
from colada.data.sources import Source, check_sources, hold_out, parts, read
from colada.errors import ColadaError
from colada.train.inputs import prepare_inputs, train_tokenizer
from colada.train.recipe import Recipe
from faults import refused

# --- data --------------------------------------------------------------------------------------


def texts(where: Path, share: float = 0.0) -> list[str]:
    return [document.text for document in read_documents(find_files(where), validation_share=share)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"\xef\xbb\xbf<|endoftext|>\none\n<|endoftext|>\ntwo", ["one", "two"]),
        ("a.txt", b"one\n\xef\xbb\xbf<|endoftext|>\n\xef\xbb\xbftwo", ["one", "two"]),
        ("a.txt.gz", gzip.compress(b"\xef\xbb\xbfone", mtime=0), ["one"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}', ["one", "two"]),
        ("a.jsonl.gz", gzip.compress(b'\xef\xbb\xbf{"text": "one"}', mtime=0), ["one"]),
    ],
)
def test_a_byte_order_mark_is_never_trained_on(
    tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    """A21: also in parts that begin within a file."""
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path) == expected
    parts = split_file(tmp_path / name, 1)
    assert [
        r.values[0] for part in parts for r in read_records(part, ["text"], 0.0) if r.values[0]
    ] == expected


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    """A22."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "a", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text(folder.name)
    (data / "linked").symlink_to(elsewhere)
    (data / "again").symlink_to(elsewhere)
    (data / "inside").symlink_to(data / "a")
    (data / "a" / "up").symlink_to(data)
    (elsewhere / "deep" / "around").symlink_to(tmp_path)
    (elsewhere / "deep" / "own").symlink_to(".")
    listing = list_files(data)
    assert listing.files == [data / "a" / "x.txt", data / "again" / "deep" / "x.txt"]
    assert listing.left_out == {"linked folder that is read elsewhere": 5}


def test_files_that_are_left_out_are_counted_with_the_reason(tmp_path: Path) -> None:
    """A24."""
    for name in ("a.txt", "b.csv", "c.csv", "README", ".hidden.txt", ".ipynb_checkpoints/a.txt", "d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    said = str(list_files(tmp_path, ["*.txt"]))
    assert said == (
        f"{tmp_path}: 1 file to read, 8 left out: 2 .csv, 1 broken link, 2 hidden, 1 no regular file,"
        " 1 not included, 1 without a suffix"
    )
    for name in ("a.txt", "d.jsonl"):
        (tmp_path / name).unlink()
    assert "2 .csv" in refused(lambda: list_files(tmp_path))


def test_a_run_is_no_data_of_itself(tmp_path: Path) -> None:
    """A23."""
    data = tmp_path / "data"
    for name in ("texts/a.txt", "run/recipe.yaml", "run/metrics.jsonl", "run/samples.jsonl", "recipe.yaml"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    source = Source(path=str(data))
    assert check_sources([source], data / "run") == [
        f"{data}: 1 file to read, 2 left out: 1 .yaml, 1 directory of a training run"
    ]
    assert "expected another one to write to" in refused(
        lambda: check_sources([source], data / "texts" / "..")
    )
    assert "a training run's directory" in refused(lambda: find_files(data / "run"))


@pytest.mark.parametrize("key", ["path", "validation"])
def test_data_that_is_not_there_is_said_with_what_to_give(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.txt").touch()
    source = Source.model_validate({"path": str(tmp_path), key: str(tmp_path / "corpora")})
    said = refused(lambda: check_sources([Source(path=str(tmp_path)), source]))
    assert (
        f"{tmp_path / 'corpora'}: no such file or folder (data.sources.1.{key}); give yours with --data"
        in said
    )
    assert "the corpora that" not in said  # Another place was meant.


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colada.files.MOST_LINE", 2**16)
    path = tmp_path / "endless.txt"
    path.touch()
    os.truncate(path, 2**40)  # Sparse: it takes no room on the disk.
    line = r"endless.txt:1: a line of 65536 bytes or more"
    with pytest.raises(ColadaError, match=line):
        split_file(path, 2**20)
    with pytest.raises(ColadaError, match=line):
        list(read_documents([path]))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet", "x.txt.gz"])
def test_special_files_are_no_data(tmp_path: Path, name: str) -> None:
    """B4: given by name; in a folder they are left out."""
    os.mkfifo(tmp_path / name)
    assert "a named pipe" in refused(lambda: find_files(tmp_path / name))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "a device" in refused(lambda: find_files(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("5", "a int"),
        ("null", "null"),
        ("[]", "a list"),
        ('{"text": 5}', "expected a string"),
        ('{"text": null}', "expected a string"),
        ('{"text": "a", "text": "b"}', "twice"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"text": ' + "9" * 5000 + "}", "thousands of digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "[" * 200 + "]" * 200 + "}", "within one another"),
        ('{"txt": "a"}', "did you mean 'txt'"),
        ('{"text": "a", "split": 5}', "split=5"),
        ("\x00", "not valid JSON"),
    ],
)
def test_lines_that_are_no_records_are_named(tmp_path: Path, line: str, said: str) -> None:
    """B2, B3."""
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    found = refused(lambda: texts(tmp_path))
    assert f"{tmp_path / 'a.jsonl'}:2" in found
    assert said in found


def _parquet(path: Path, columns: list[tuple[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, values = [name for name, _ in columns], [values for _, values in columns]
    pq.write_table(pa.Table.from_arrays(values, names=names), path)


def test_parquet_that_python_cannot_convert_is_named_by_row_and_column(tmp_path: Path) -> None:
    """B9."""
    import pyarrow as pa

    words = pa.array(["a"])
    late = pa.array([10**15], pa.timestamp("s"))
    zoned = pa.array([0], pa.timestamp("s", tz="Mars/Olympus"))
    days = pa.array([2**31 - 1], pa.date32())
    path = tmp_path / "x.parquet"
    for columns, said in (
        ([("text", words), ("text", words)], "'text' is there twice"),
        ([("text", words), ("split", words), ("split", words)], "'split' is there twice"),
        ([("text", late)], "row 1: 'text' cannot be converted"),
        ([("text", zoned)], "row 1: 'text' cannot be converted"),
        ([("text", days)], "row 1: 'text' cannot be converted"),
        ([("text", words), ("split", late)], "row 1: 'split' cannot be converted"),
        ([("text", pa.array([b"\xff"], pa.binary()).cast(pa.string(), safe=False))], "not UTF-8"),
        ([("body", words)], "no column 'text'"),
        ([("text", pa.array([1]))], "expected a string"),
    ):
        _parquet(path, columns)
        assert said in refused(lambda: texts(tmp_path))
    for damaged in (b"", b"PAR1", path.read_bytes()[:-9], b"PAR1" + b"\xff" * 50 + b"PAR1"):
        path.write_bytes(damaged)
        assert "not a readable parquet file" in refused(lambda: texts(tmp_path))


# --- small data --------------------------------------------------------------------------------


def prose(characters: int, seed: int = 0) -> str:
    """Lines of words."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefgh ", k=60)) for _ in range(500)]
    return "\n".join(chance.choices(words, k=characters // 60))


def held_out(where: Path, share: float, least: int) -> tuple[list[str], list[str], Holdout]:
    """Training and validation texts."""
    source = Source(path=str(where))
    holdout = hold_out(source, share, least)
    records = [r for part in parts(source) for r in read(source, part, holdout)]
    found = ([r.values[0] for r in records if r.split == split] for split in ("train", "validation"))
    return (*found, holdout)  # type: ignore[return-value]


@pytest.mark.parametrize("names", [["input.txt"], ["a.txt", "b.txt", "c.txt"], ["x.jsonl"], ["x.txt.gz"]])
def test_few_long_documents_have_validation_text(tmp_path: Path, names: list[str]) -> None:
    """590 KB: nothing is lost, and no word is cut."""
    originals = [prose(590_000 // len(names), number) for number, _ in enumerate(names)]
    for name, text in zip(names, originals, strict=True):
        if name.endswith(".txt"):
            (tmp_path / name).write_text(text)
        else:
            (tmp_path / name).write_bytes(
                gzip.compress(text.encode()) if name.endswith("gz") else json.dumps({"text": text}).encode()
            )
    trained, validation, holdout = held_out(tmp_path, 0.02, 4096)
    assert isinstance(holdout, Cut)
    size = sum(map(len, validation))
    assert max(4096, 0.02 * 590_000) <= size < 0.04 * 590_000
    assert sum(map(len, trained)) + size == sum(map(len, originals))
    assert all(any(text in original for original in originals) for text in (*trained, *validation))
    assert all(text.endswith("\n") or any(map(str.endswith, originals, [text] * 9)) for text in trained)
    # Neighbours stay together: only what is held out cuts a text.
    assert len(trained) <= len(validation) + len(names)


def test_validation_pieces_do_not_depend_on_the_files_order(tmp_path: Path) -> None:
    found = []
    for order in ("abc", "cab"):
        folder = tmp_path / order
        folder.mkdir()
        for number, name in enumerate(order):
            (folder / f"{number}.txt").write_text(prose(50_000, ord(name)))
        found.append(sorted(held_out(folder, 0.02, 1024)[1]))
    assert found[0] == found[1] != []


@pytest.mark.parametrize(
    ("documents", "share", "expected"),
    [
        ([prose(200, n) for n in range(400)], 0.05, 0.05),  # Enough as it is.
        ([prose(3000)], 0.02, 0.0),  # So little that nothing is held out.
        ([prose(200_000)], 0.0, 0.0),  # Nothing is asked for.
        ([], 0.02, 0.02),
    ],
)
def test_documents_stay_whole_where_cutting_would_not_help(
    tmp_path: Path, documents: list[str], share: float, expected: float
) -> None:
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents))
    trained, validation, holdout = held_out(tmp_path, share, 1024)
    assert holdout in (share, expected)
    assert sorted(text for text in (*trained, *validation) if text) == sorted(documents)
    assert trained


def test_a_split_that_data_state_is_left_alone(tmp_path: Path) -> None:
    rows = [{"text": prose(9000, n), "split": "train"} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained, validation, holdout = held_out(tmp_path, 0.02, 1024)
    assert (len(trained), validation, holdout) == (5, [], 0.02)


@pytest.mark.parametrize(("characters", "left_out"), [(1500, True), (60_000, False)])
def test_training_goes_without_validation_text_where_there_is_too_little(
    tmp_path: Path, characters: int, left_out: bool
) -> None:
    (tmp_path / "input.txt").write_text(prose(characters))
    sections = {
        "stages": {"vae": {"length": 64}, "prior": {"length": 64}},
        "tokenizer": {"vocab_size": 260},
    }
    recipe = Recipe.model_validate({"data": {"sources": [{"path": str(tmp_path)}], "workers": 1}, **sections})
    said = list[str]()
    inputs = prepare_inputs(recipe, train_tokenizer(recipe), None, tmp_path / "shards", said.append)
    inputs.rows("train", recipe.stages["vae"], 0, 4)
    assert (inputs.validation_rows(recipe.stages["vae"], 0, 4, said.append) is None) == left_out
    assert any(line.startswith("validation is left out: ") for line in said) == left_out
