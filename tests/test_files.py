"""Files: what is read whole or refused in one line, and what is written whole or not at all."""

import errno
import gzip
import json
import os
import random
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from colada import files, strict_yaml
from colada.errors import ColadaError
from faults import refused

yaml = pytest.importorskip("yaml", reason="needs colada-lm[train]")


READERS = [
    files.require_file,
    files.read_text,
    files.read_json,
    files.read_json_object,
    strict_yaml.read_yaml,
]
READERS += [lambda path: list(files.read_lines(path))]


@pytest.mark.parametrize("read", READERS)
def test_only_regular_files_are_read(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path, kind in (
        (tmp_path / "pipe", "a named pipe"),
        (tmp_path / "link", "a named pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path, "a directory"),
        (tmp_path / "none", "no such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "null\0", "null"),
    ):
        said = refused(lambda path=path: read(path))
        assert kind in said
        assert str(path).replace("\0", "\\x00") in said


def test_a_byte_order_mark_is_no_text_wherever_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content, read, expected in (
        (b"text\r\n", files.read_text, "text\r\n"),
        (b'{"a": 1}', files.read_json_object, {"a": 1}),
        (b"a: 1", strict_yaml.read_yaml, {"a": 1}),
        (
            b"one\ntwo",
            lambda path: [files.decode(line, "") for _, line in files.read_lines(path)],
            ["one\n", "two"],
        ),
    ):
        file.write_bytes(b"\xef\xbb\xbf" + content)
        assert read(file) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "byte 0xff at offset 0"),
        (b"ab\xc3", "byte 0xc3 at offset 2"),
        (b"\xef\xbb\xbfa\xff", "byte 0xff at offset 1"),
    ],
)
def test_what_is_not_utf_8_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "text").write_bytes(content)
    assert said in refused(lambda: files.read_text(tmp_path / "text"))


def test_what_is_too_large_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**36)  # Sparse: it has no bytes on disk.
    for read in (files.read_json, strict_yaml.read_yaml):
        assert "more than 268435456 bytes" in refused(lambda read=read: read(tmp_path / "large"))


def test_damaged_packed_files_are_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(random.Random(0).randbytes(10**4))
    for damaged in (b"plain", whole[:-20], whole[:100] + bytes([whole[100] ^ 255]) + whole[101:], whole[:5]):
        (tmp_path / "x.gz").write_bytes(damaged)
        assert "cannot be read" in refused(lambda: list(files.read_lines(tmp_path / "x.gz")))


JSON_FAULTS = ["", "{", "nul", '{"a" 1}', "[1,]", "[" * 10**5, '{"a":' * 10**5, "[" * 101 + "]" * 101]
JSON_FAULTS += [f"[{'9' * 5000}]", f"-{'1' * 10**5}", '{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]', "\x00"]


@pytest.mark.parametrize("text", JSON_FAULTS, ids=range(len(JSON_FAULTS)))
def test_json_that_its_parser_fails_on_is_one_line(text: str) -> None:
    assert refused(lambda: files.parse_json(text, "here:3")).startswith("here:3")
    assert len(refused(lambda: files.parse_json(text, "here:3"))) < 200


@pytest.mark.parametrize("value", [None, 5, [], "x", 1.5, True])
def test_a_json_object_is_one(tmp_path: Path, value: object) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert files.read_json(tmp_path / "x.json") == value
    assert "expected a JSON object" in refused(lambda: files.read_json_object(tmp_path / "x.json"))


YAML_FAULTS = [
    "a: [",
    "\ta: 1",
    "a: 1\n b: 2",
    "%bad",
    "&a [*a]",
    "*a",
    "--- 1\n--- 2",
    "[" * 10**5,
    "{a: " * 10**4,
    "- " * 10**4,
    "[" * 101 + "]" * 101,
    "a: " + "9" * 5000,
    "!!int x",
    "!!int 010x",
    "!!int 1:30",
    "!!float x",
    "!!bool x",
    "!!bool [1]",
    "!!timestamp 2020-13-45",
    "!!binary x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!python/object:os.system x",
    "!mine x",
    "!!str [1]",
    "!!map [1]",
    "!!seq {a: 1}",
    "a: 1\nb: 2\na: 3",
    "a: {b: 1, b: 2}",
    "1: 2",
    "true: 2",
    "[1]: 2",
    "{a: 1}: 2",
    "? ",
    "!!merge <<: {a: 1}",
    "a: 010",
    "a: -007",
    "a: 08",
    "a: 00.5",
    "a: \x07",
    "a: '\ud800",
    "x: &x [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}' if i else '*x'] * 10)}]\n" for i in range(9)),
    "a: 1\n" * 10**6,
]


@pytest.mark.parametrize("text", YAML_FAULTS, ids=range(len(YAML_FAULTS)))
def test_yaml_that_its_parser_fails_on_or_guesses_at_is_one_line(text: str) -> None:
    assert refused(lambda: strict_yaml.parse_yaml(text, "here")).startswith("here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", 10),
        ("-3", -3),
        ("1_000", 1000),
        ("0", 0),
        ("0.5", 0.5),
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("5.", 5.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("2020-01-01", "2020-01-01"),
        ("yes", "yes"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'010'", "010"),
        ("<<", "<<"),
        ("[a, {b: *c}]".replace("*c", "[1]"), ["a", {"b": [1]}]),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
    ],
)
def test_yaml_is_read_by_the_rules_of_its_newer_version(text: str, expected: object) -> None:
    value = strict_yaml.parse_yaml(text, "here")
    assert value == expected
    assert type(value) is type(expected)


def test_dumped_yaml_is_read_as_what_it_was_by_either_version() -> None:
    chance = random.Random(0)
    plain = ["1e5", "010", "08", "1:30", "yes", "null", "~", "", "0x1f", "<<", "=", "2020-01-01", "1_0", ".5"]
    plain += [
        "-",
        "- a",
        "a: b",
        "#",
        "&a",
        "*a",
        "!x",
        "%",
        "@",
        "é",
        "\u2028",
        "🙂",
        "x" * 300,
        "a\nb",
        " a ",
    ]
    plain += ["".join(chance.choices("01_.eE-+:xo", k=chance.randint(1, 6))) for _ in range(300)]
    for text in plain:
        for flow in (True, False):
            dumped = strict_yaml.dump_yaml({"a": [text, 1, 1e-5, None, True, 1e300]}, flow)
            expected = {"a": [text, 1, 1e-5, None, True, 1e300]}
            assert strict_yaml.parse_yaml(dumped, "here") == expected == yaml.safe_load(dumped)


@pytest.mark.parametrize(
    ("quoted", "shown"),
    [
        ("a\nb\r\nc", "a b c"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\udc80", "\\udc80"),
        ("\u2028x", "x"),
        ("naïve 東京 🙂", "naïve 東京 🙂"),
    ],
)
def test_an_error_is_a_line_of_printable_characters(quoted: str, shown: str) -> None:
    assert str(ColadaError(f"x: {quoted}")) == f"x: {shown}"


def test_a_long_error_has_its_beginning_and_its_end() -> None:
    said = str(ColadaError(f"file: {'9' * 10**6}, expected fewer"))
    assert said.startswith("file: 999")
    assert said.endswith("999, expected fewer")
    assert len(said) < 1000


# --- writing -----------------------------------------------------------------------------------


def failing(file: IO[bytes]) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(error: Callable[[IO[bytes]], None]) -> None:
        with files.atomic_writer(path) as file:
            error(file)

    assert "No space left" in refused(lambda: write(failing))

    def interrupted(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(interrupted)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_reads_while_it_is_written_sees_a_whole_file(tmp_path: Path) -> None:
    path, stop, seen = tmp_path / "file", threading.Event(), set[str]()
    files.write_text(path, "0" * 10**5)

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for digit in "123456789":
        files.write_text(path, digit * 10**5)
    stop.set()
    reader.join()
    assert seen <= {digit * 10**5 for digit in "0123456789"}


def test_a_written_file_keeps_its_mode_and_a_link_its_target(tmp_path: Path) -> None:
    target, link, new = tmp_path / "target", tmp_path / "link", tmp_path / "new"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    files.write_text(new, "")
    (tmp_path / "plain").write_text("")
    assert new.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_places_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path, "a directory"),
        (tmp_path / "pipe", "a named pipe"),
        (tmp_path / "none" / "x", "No such file"),
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "null\0", "expected a path"),
    ):
        assert said in refused(lambda path=path: files.write_text(path, "x"))
    files.write_text("/dev/null", "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_lone_surrogates_are_written_as_json_escapes_them(tmp_path: Path) -> None:
    files.write_text(tmp_path / "x", json.dumps({"a": "\udc80é"}, ensure_ascii=False))
    assert (tmp_path / "x").read_bytes() == b'{"a": "\\udc80\xc3\xa9"}'
    assert files.read_json(tmp_path / "x") == {"a": "\udc80é"}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_replaced_directory_is_never_seen_half_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    def make(path: Path, word: str) -> None:
        path.mkdir()
        for name in "ab":
            (path / name).write_text(word)

    final, partial = tmp_path / "final", tmp_path / "partial"
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    removed = list[Any]()
    remove = files.shutil.rmtree

    def watched(path: Path) -> None:
        removed.append({name: (final / name).read_text() for name in "ab"})
        assert not re.match("final", Path(path).name)
        remove(path)

    monkeypatch.setattr(files.shutil, "rmtree", watched)
    for word in ("old", "new"):
        make(partial, word)
        files.replace_directory(partial, final)
        assert {name: (final / name).read_text() for name in "ab"} == {"a": word, "b": word}
    assert removed == [{"a": "new", "b": "new"}]  # The old one goes once the new one stands.
    assert list(tmp_path.iterdir()) == [final]
