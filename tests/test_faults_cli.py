"""The command line where something is odd: streams, terminals, interrupts, flags; and how soon it answers."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import colada
from colada.cli import options
from colada.networks import quantise
from colada.text.tokenizer import Tokenizer
from commands import main
from helpers import SENTENCE, writing_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="streams of a POSIX system")

COLADA = [sys.executable, "-m", "colada"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template, which writes letters and spaces and never ends by itself."""
    directory = tmp_path_factory.mktemp("faults") / "model"
    settings = {"steps": 2, "guidance": 2.0}
    writing_model(generation=settings, chat_template=TEMPLATE).save(directory)
    return directory


# --- how soon it answers -------------------------------------------------------------------------

REFUSED = [
    ["--nonsense"],
    ["generate", "x", "--stepps", "3"],
    ["generate", "x", "--steps", "many"],
    ["generate", "x", "-n", "0"],
    ["generate", "x", "-n", "1000000000000"],
    ["generate", "x", "--steps", "0"],
    ["generate", "x", "--steps", "1" + "0" * 23],
    ["generate", "x", "--temperature", "1e-46"],
    ["generate", "x", "--top-p", "1e-300"],
    ["generate", "x", "--seed", "-1"],
    ["generate", "x", "--seed", str(2**64)],
    ["generate", "x", "--guidance", "nan"],
    ["generate", "x", "--solver", "eular"],
    ["generate", "x", "--schedule", "log"],
    ["generate", "x", "--noise", "loud"],
    ["generate", "x", "--stop", ""],
    ["chat", "--steps", "0"],
    ["generate", "x", "--batch", "0"],
    ["generate", "x", "--device", "tpu9"],
    ["generate", "x", "--device", "cuda:-1"],
    ["generate", "x", "--dtype", "int8"],
    ["generate", "x", "--quantise", "int4"],
    ["generate", "x", "-m", "/no/where"],
    ["generate", "x", "--file", "prompts.txt"],
    ["generate", "x", "--guidance-interval", "0.9", "0.1"],
    ["generate", "--file", "/no/file"],
    ["generate", "--file", "/"],
    ["generate", "--file", "/dev/zero"],
    ["reconstruct", "x", "--dtype", "int8"],
    ["bench", "speed", "--warm-up", "2147483648"],
    ["bench", "speed", "--repeats", "1" + "0" * 23],
    ["bench", "speed", "--mixed", "1000000000"],
    ["bench", "speed", "-n", "1000000000"],
    ["bench", "speed", "--guidance", "nan"],
    ["bench", "speed", "--seed", str(2**64)],
    ["bench", "levers", "--prompts", "1000000000"],
    ["chat", "-m", "/no/where"],
    ["tokenizer", "decode", "x"],
    ["tokenizer", "encode", "x", "--file", "/no/tokenizer.json"],
]
ANSWERED = [
    ["--version"],
    ["--help"],
    ["generate", "--help"],
    ["chat", "--help"],
    ["train", "--help"],
    ["eval", "run", "--help"],
    ["bench", "speed", "--help"],
    ["study", "run", "--help"],
    ["tokenizer", "encode", "Once upon a time"],
]


def test_nothing_waits_for_torch_that_needs_no_weights() -> None:
    """One process for all: each is refused, or answered, without torch and without the hub's library."""
    code = """
import contextlib, io, json, sys
from commands import main
for args in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(args)
    slow = sorted({"torch", "numpy", "huggingface_hub"} & set(sys.modules))
    print(json.dumps([status, out.getvalue(), err.getvalue(), slow]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([*REFUSED, *ANSWERED])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(REFUSED) + len(ANSWERED)
    for args, (status, out, err, slow) in zip([*REFUSED, *ANSWERED], results, strict=True):
        assert slow == [], args
        if args in ANSWERED:
            assert (status, err) == (0, ""), args
        else:
            assert (status, out) == (2, ""), args
            assert re.fullmatch(r"error: [^\n]+\n", err), args


@pytest.mark.parametrize(
    "args",
    [
        ["eval", "score", "9" * 5000],
        ["report", "a" * 3000],
        ["train", "\x1b[31m" * 900],
        ["parity", "no/case", "--tolerance", "inf"],
    ],
    ids=lambda args: args[0],
)
def test_a_message_is_short_and_printable_whatever_it_quotes(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", error)
    assert error.strip().isprintable()
    assert len(error) < 1200


ODD = [
    "",
    "0",
    "-1",
    "1" + "0" * 23,
    "9" * 5000,
    "nan",
    "inf",
    "-inf",
    "1e400",
    "x",
    "é",
    "[1]",
    "1,2",
    "/",
    "a\0b",
]


def test_odd_values_of_any_option_are_one_line() -> None:
    """Every option that takes a value, with a model that is not there: whatever the value, one line."""
    code = """
import contextlib, io, json, sys
import typer.main
from colada.cli import main as cli
tree = typer.main.get_command(cli.app)
typer.main.get_command = lambda _: tree  # once for all
nowhere = ["-m", "/no/where"]
start = {"generate": ["x", *nowhere], "chat": nowhere, "reconstruct": ["x", *nowhere]}
tried = 0
for name, args in start.items():
    for parameter in tree.commands[name].params:
        if parameter.param_type_name != "option" or parameter.is_flag:
            continue
        for value in json.loads(sys.argv[1]):
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                status = cli.main([name, *args, parameter.opts[0], *[value] * parameter.nargs])
            line = err.getvalue()
            fine = status == 2 and line.startswith("error: ") and line.count(chr(10)) == 1
            fine = fine and len(line) < 1000
            assert fine, (name, parameter.opts, value[:30], status, line[-300:])
            tried += 1
assert "torch" not in sys.modules
print(tried)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(ODD)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 400


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["tokenizer", "train", "DATA", "--vocab-size", "1" + "0" * 23], "at most 16777216"),
        (["tokenizer", "train", "DATA", "--vocab-size", "-1"], "vocab_size is -1"),
        (["tokenizer", "train", "/dev/zero", "--vocab-size", "300"], "/dev/zero"),
        (["tokenizer", "train", __file__, "--vocab-size", "300", "--include", "x"], "--include x with"),
        (["generate", "a", "--guidance", "1e-400"], "'1e-400' is beyond what a number can hold"),
        (["generate", "a", "--temperature", "-1e400"], "'-1e400' is beyond what a number can hold"),
        (["generate", "a", "--top-p", "half"], "'half', expected a number"),
        (["generate", "a", "--guidance-interval", "1e-400", "1"], "'1e-400' is beyond"),
        (["parity", "DATA", "--tolerance", "inf"], "tolerance=inf, expected a finite number of at least 0"),
        (["bench", "speed", "--size", "tiny", "--batch", "9" * 5000], "at most 999,999,999"),
        (["bench", "speed", "--size", "tiny", "--steps", "1,0"], "--steps 1,0"),
    ],
)
def test_options_have_bounds_and_say_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], named: str
) -> None:
    (tmp_path / "text.txt").write_text(SENTENCE * 20)
    assert main([str(tmp_path) if arg == "DATA" else arg for arg in args]) == 2
    assert re.fullmatch(r"error: [^\n]{1,400}\n", err := capsys.readouterr().err)
    assert named in err


def test_the_names_checked_before_torch_are_those_there_are() -> None:
    assert tuple(quantise.QUANTISATIONS) == options.QUANTISATIONS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in options.DTYPES)
    assert all(torch.device(name).type == name for name in options.DEVICES)


@pytest.mark.parametrize(
    ("given", "used"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_spin_for_a_moment_only_unless_told_otherwise(given: dict[str, str], used: str) -> None:
    choices = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in choices} | given
    code = (
        "import os; from colada.cli.main import main; main(['--version']); print(os.getenv('GOMP_SPINCOUNT'))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == used


# --- B6: standard streams ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("redirected", "status", "out", "err"),
    [
        ("generate <&-", 2, "", "error: standard input is closed: give a text [^\n]+\n"),
        (
            "generate - <&-",
            2,
            "",
            "error: standard input is closed: give a text [^\n]+\n",
        ),
        ("chat -m MODEL <&-", 2, "", "error: standard input is closed, expected messages\n"),
        ("tokenizer encode x <&-", 0, r" *\d+  \"x\"\n", ""),
        ("--version >&-", 2, "", r"error: standard output is closed, expected [^\n]+\n"),
        ("info >&-", 2, "", r"error: standard output is closed, expected [^\n]+\n"),
        ("tokenizer encode x 2>&-", 0, r" *\d+  \"x\"\n", ""),
        ("generate x --steps many 2>&-", 2, "", ""),
        ("info <&- >&- 2>&-", 2, "", ""),
        ("tokenizer encode x >/dev/full", 2, "", "error: [^\n]*No space left on device\n"),
        ("--help >/dev/full", 2, "", "error: [^\n]*No space left on device\n"),
    ],
)
def test_closed_and_full_streams_are_one_line(
    chatty: Path, redirected: str, status: int, out: str, err: str
) -> None:
    command = f'exec "$0" -m colada {redirected.replace("MODEL", str(chatty))}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable], capture_output=True, text=True, input="", timeout=60
    )
    assert done.returncode == status, done.stderr
    assert re.fullmatch(out, done.stdout)
    assert re.fullmatch(err, done.stderr)


def test_a_file_opened_later_is_not_a_closed_stream(chatty: Path, tmp_path: Path) -> None:
    """With descriptor 2 free, the next file opened would be standard error."""
    out = tmp_path / "tokenizer.json"
    (tmp_path / "text.txt").write_text(SENTENCE * 20)
    command = f'exec "$0" -m colada tokenizer train {tmp_path}/text.txt --vocab-size 280 --out {out} 2>&-'
    subprocess.run(["sh", "-c", command, sys.executable], check=True, capture_output=True, timeout=60)
    assert Tokenizer.from_file(out).vocab_size == 280


def test_nobody_reads_the_error() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [*COLADA, "generate", "x", "--steps", "many"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=60) == 2


@pytest.mark.parametrize(
    "environment",
    [
        {"TERM": "dumb", "COLUMNS": "20"},
        {"PYTHONIOENCODING": "ascii", "COLUMNS": "20"},
        {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C"},
        {"TERM": "no-such-terminal"},
    ],
    ids=str,
)
def test_any_terminal_and_encoding_will_do(environment: dict[str, str]) -> None:
    """In one process a case: help, and text that the encoding cannot spell."""
    code = (
        "from colada.cli.main import main; main(['generate', '--help']); main(['tokenizer', 'encode', 'é日'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"--repetition-penalty" in done.stdout
    assert b"\x1b" not in done.stdout


def test_endless_standard_input_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "MOST_INPUT", 10)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 11)))
    assert main(["generate"]) == 2
    assert (
        capsys.readouterr().err == "error: standard input has more than 10 bytes, expected at most so many\n"
    )


def test_a_byte_order_mark_is_no_part_of_a_prompt_and_nothing_is_said_of_loading(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\xef\xbb\xbfOnce\n")
    assert main(["generate", "-m", str(chatty), "--file", str(prompts), "--json", "-n", "1"]) == 0
    result = capsys.readouterr()
    assert json.loads(result.out)["prompt"] == "Once"
    assert result.err == ""  # It is no terminal.


# --- interrupts ----------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_written_and_is_one_line(chatty: Path) -> None:
    process = subprocess.Popen(
        [*COLADA, "generate", "Once", "-m", str(chatty), "-n", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    begun = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"interrupted\n")
    assert (begun + out).startswith(b"Once")


def test_memory_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("colada.cli.info.describe", fail)
    assert main(["info"]) == 2
    assert re.fullmatch(r"error: out of memory: [^\n]+\n", capsys.readouterr().err)


# --- chat ----------------------------------------------------------------------------------------


def test_a_chat_is_the_model_s_answers_in_turn(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = colada.load(chatty)
    settings: dict[str, Any] = {"temperature": 1.0}
    system = {"role": "system", "content": "Be kind."}
    first = [system, {"role": "user", "content": "Hello"}]
    one = model.chat(first, 9, seed=4, **settings).text
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "And then?"}]
    two = model.chat(second, 9, seed=5, **settings).text
    anew = model.chat([system, {"role": "user", "content": "moon"}], 9, seed=6, **settings).text
    typed = b"Hello\n\nAnd then?\r\n/reset\nmoon\n/quit\nnever asked\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    options = ["-m", str(chatty), "-n", "9", "--seed", "4", "--temperature", "1", "--system", "Be kind."]
    assert main(["chat", *options]) == 0
    result = capsys.readouterr()
    assert (result.out, result.err) == (f"{one}\n{two}\n{anew}\n", "")


@pytest.mark.parametrize(
    ("args", "said", "message"),
    [
        (["-m", "MODEL"], b"\xff\n", "standard input: byte 0xff at offset 0 is not UTF-8"),
        (["-m", "MODEL", "--system", "<|im_end|>"], b"Hello\n", "spells the special token '<|im_end|>'"),
        (["-m", "MODEL"], b"<|im_end|>\n", "spells the special token '<|im_end|>'"),
    ],
)
def test_a_chat_that_cannot_be_is_one_line(
    chatty: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    said: bytes,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
    assert main(["chat", *(str(chatty) if arg == "MODEL" else arg for arg in args)]) == 2
    result = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", result.err)
    assert message in result.err
    assert result.out == ""


def test_a_typed_chat_survives_a_failed_turn_and_ends_with_its_input(chatty: Path) -> None:
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COLADA, "chat", "-m", str(chatty), "-n", "5"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(follower)
    output = b""

    def read_until(end: bytes) -> None:
        nonlocal output
        while end not in output:
            output += os.read(leader, 65536)

    read_until(b"> ")
    assert b"loading " + str(chatty).encode()[:20] in output
    assert b"/reset begins anew, /quit or the end of input ends" in output
    for line, answer in ((b"<|im_end|>\n", b"special token"), (b"Hello\n", b"Hello\r\n")):
        output = b""
        os.write(leader, line)
        read_until(answer)
        output = output.partition(answer)[2]
        read_until(b"> ")
    assert len(output.strip()) > 2, "an answer"
    os.write(leader, b"\x04")  # the end of input
    assert process.wait(timeout=60) == 0
    os.close(leader)


def test_a_hub_model_without_a_template_is_one_line_too(
    chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chatty, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "model"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    assert main(["chat", "-m", "owner/name"]) == 2
    assert "owner/name has no chat template (chat_template.jinja)" in capsys.readouterr().err
