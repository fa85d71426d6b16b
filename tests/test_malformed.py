"""Malformed files of every kind that is read: each is read, or refused in one line, within a second."""

import gzip
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from colada import load
from colada.data.documents import read_documents
from colada.data.jsonl import read_lines
from colada.data.listing import find_files
from colada.errors import ColadaError
from colada.text.chat import read_template
from colada.text.tokenizer import Tokenizer
from colada.train.recipe import load_recipe
from helpers import tiny_model

FEW, MANY = 12, 250  # Of each kind: by default, and with -m slow.
SECONDS = 10  # Of one input: what hangs takes for ever, and a busy machine long.
NUMBERS: list[Any] = [0, -1, 10**30, -(10**400), 2**63, 1e-320, 1e400, float("nan"), 0.5, True]
VALUES: list[Any] = [*NUMBERS, None, "", "x", "\ud800", "\0", [], {}, [[]], [None], {"a": None}, "1e5", "010"]
TEXTS = ["9" * 5000, "[" * 100_000, "{" * 100_000, '{"a":' * 5000, "!!int x", "2020-13-45", "1:30", "&a [*a]"]
TEXTS += [
    "\x00",
    "\ufeff",
    "\ufeff\ufeff",
    "- - - -",
    "? ?",
    "null",
    "5",
    "[]",
    '""',
    "NaN",
    "-",
    "\t",
    "",
    "a: b: c",
]
WORDS = [".nan", "-.inf", "yes", "0o17", "010", *TEXTS, *(json.dumps(value) for value in VALUES)]


@contextmanager
def time_limit() -> Iterator[None]:
    """Fail what takes too long."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged_bytes(chance: random.Random, whole: bytes) -> bytes:
    """Return a file of which something was lost, added, overwritten or repeated."""
    at, size = chance.randrange(len(whole) + 1), chance.randint(1, 40)
    return chance.choice(
        [
            lambda: whole[:at],
            lambda: whole[at:],
            lambda: whole[:at] + chance.randbytes(size) + whole[at:],
            lambda: whole[:at] + chance.randbytes(size) + whole[at + size :],
            lambda: whole[:at] + chance.choice(TEXTS).encode() + whole[at:],
            lambda: whole + whole,
            lambda: b"\xef\xbb\xbf" + whole,
            lambda: b"\xff\xfe" + whole.decode(errors="replace").encode("utf-16-le", "surrogatepass"),
            lambda: chance.choice(TEXTS).encode("utf-8", "surrogatepass"),
        ]
    )()


def damaged_value(chance: random.Random, value: Any) -> Any:
    """Return a JSON value in which one thing is another."""
    if chance.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return chance.choice(VALUES)
    if isinstance(value, list):
        at = chance.randrange(len(value))
        return [*value[:at], damaged_value(chance, value[at]), *value[at + 1 :]]
    key = chance.choice(list(value))
    change = chance.random()
    if change < 0.15:
        return {name: part for name, part in value.items() if name != key}
    if change < 0.3:
        return {**value, chance.choice(["", "x", key + "_", "\ud800"]): value[key]}
    return {**value, key: damaged_value(chance, value[key])}


def damaged_json(chance: random.Random, whole: bytes) -> bytes:
    """Return a JSON file with another value somewhere, or one that is none."""
    if chance.random() < 0.3:
        return damaged_bytes(chance, whole)
    value = damaged_value(chance, json.loads(whole))
    if chance.random() < 0.1:
        return json.dumps(value)[:-1].encode() + b',"a":' + chance.choice(TEXTS).encode() + b"}"
    return json.dumps(value).encode()


def damaged_weights(chance: random.Random, whole: bytes) -> bytes:
    """Return a safetensors file whose header says something else, or that is none."""
    size = int.from_bytes(whole[:8], "little")
    if chance.random() < 0.3:
        return damaged_bytes(chance, whole)
    if chance.random() < 0.1:
        return chance.choice([0, 1, size - 1, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little") + whole[8:]
    header = damaged_json(chance, whole[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + whole[8 + size :]


def damaged_yaml(chance: random.Random, whole: bytes) -> bytes:
    """Return a recipe in which a key has another value, or is there twice, or that is none."""
    if chance.random() < 0.3:
        return damaged_bytes(chance, whole)
    lines = whole.decode().splitlines()
    at = chance.choice(
        [n for n, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
    )
    key = lines[at].partition(":")[0]
    lines.insert(at, f"{key}: {chance.choice(WORDS)}")
    if chance.random() < 0.8:
        del lines[at + 1]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def damaged_lines(chance: random.Random, whole: bytes) -> bytes:
    """Return a .jsonl file with another record."""
    lines = whole.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = damaged_json(chance, lines[at]).replace(b"\n", b" ")
    return b"\n".join(lines)


Damage = Callable[[random.Random, bytes], bytes]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that can be read."""
    folder = tmp_path_factory.mktemp("sound")
    tiny_model(generation={"steps": 2, "guidance_interval": [0.2, 0.8], "stop": ["a"]}).save(folder / "model")
    Tokenizer.train(["some text to learn from"], 262).save(folder / "model" / "tokenizer.json")
    (folder / "model" / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] | upper }}{{ message.content[:3] * 2 }}{% endfor %}"
    )
    rows = [
        {"text": f"text {n}", "split": "train", "messages": [{"role": "user", "content": "x"}]}
        for n in range(5)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(text)
    (folder / "data.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "data.txt").write_text("one\n<|endoftext|>\ntwo é\n")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a", "b"], "split": ["train", "dev"]}), folder / "data.parquet")
    shutil.copy(Path(__file__).parents[1] / "recipes" / "debug.yaml", folder / "recipe.yaml")
    return folder


def _model(path: Path) -> object:
    return load(path.parent if path.parent.name == "model" else path.parent.parent)


def _tokenizer(path: Path) -> object:
    tokenizer = Tokenizer.from_file(path)
    return tokenizer.decode(tokenizer.encode("some text"))


def _data(path: Path) -> object:
    return list(read_documents(find_files(path)))


KINDS: dict[str, tuple[str, Damage, Callable[[Path], object]]] = {
    "dit config": ("model/cola_dit/config.json", damaged_json, _model),
    "vae config": ("model/cola_vae/config.json", damaged_json, _model),
    "weights": ("model/cola_dit/model.safetensors", damaged_weights, _model),
    "generation": ("model/generation_config.json", damaged_json, _model),
    "tokenizer": (
        "model/tokenizer.json",
        damaged_json,
        lambda path: Tokenizer.from_file(path).encode("some text"),
    ),
    "template": ("model/chat_template.jinja", damaged_bytes, read_template),
    "recipe": ("recipe.yaml", damaged_yaml, load_recipe),
    "jsonl": ("data.jsonl", damaged_lines, _data),
    "jsonl.gz": ("data.jsonl.gz", damaged_bytes, _data),
    "txt": ("data.txt", damaged_bytes, _data),
    "parquet": ("data.parquet", damaged_bytes, _data),
    "results": ("data.jsonl", damaged_lines, lambda path: list(read_lines(path))),
}


def check(kind: str, number: int, sound: Path, place: Path) -> str | None:
    """Read a damaged file: what is said of it, None if it is read; AssertionError for anything else."""
    name, damage, read = KINDS[kind]
    chance = random.Random(f"{kind} {number}")
    if number in (0, FEW):  # What is damaged is one file, which the next number replaces.
        shutil.copytree(sound, place)
    (place / name).write_bytes(damage(chance, (sound / name).read_bytes()))
    try:
        with time_limit():
            read(place / name)
    except ColadaError as error:
        said = str(error)
        assert "\n" not in said, (kind, number)
        assert len(said) < 2000, (kind, number)
        return said
    except Exception as error:
        raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_files_are_read_or_refused_in_one_line(kind: str, sound: Path, tmp_path: Path) -> None:
    said = [check(kind, number, sound, tmp_path / "place") for number in range(FEW)]
    assert any(said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_malformed_files_are_read_or_refused_in_one_line(kind: str, sound: Path, tmp_path: Path) -> None:
    for number in range(FEW, MANY):
        check(kind, number, sound, tmp_path / "place")
