"""The command line: a typed function per command, importing what it needs only when it runs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from colada import __version__
from colada.cli import train
from colada.cli.evaluate import eval_app
from colada.cli.measure import generative, likelihood
from colada.cli.options import (
    DeviceOption,
    DtypeOption,
    FileOption,
    JsonOption,
    LinesOption,
    ModelOption,
    RevisionOption,
    TextArgument,
    check_model_options,
    load_cola,
    load_tokenizer,
    number_option,
    read_texts,
)
from colada.cli.pictures import describe, draw
from colada.cli.rewards import pairs, reward
from colada.cli.serve import serve
from colada.cli.write import chat, generate
from colada.errors import ColadaError, ColadaWarning


class Commands(typer.core.TyperGroup):
    """All commands; says so where one is interrupted and has nothing of its own to say."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102  typer's own
        with _interrupts_said():
            return super().make_context(*args, **kwargs)

    def invoke(self, context: Any) -> Any:  # noqa: D102
        with _interrupts_said():
            return super().invoke(context)


@contextmanager
def _interrupts_said() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted")
        raise


app = typer.Typer(
    cls=Commands,
    help="Colada: Cola DLM, the continuous latent diffusion language model.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = typer.Typer(help="Train a tokenizer, and see what one does.")
app.add_typer(tokenizer_app, name="tokenizer")
eval_app.command("likelihood")(likelihood)
eval_app.command("generative")(generative)
eval_app.command("reward")(reward)
app.add_typer(eval_app, name="eval")
for command in (generate, chat, draw, describe, serve):
    app.command()(command)
for of_runs in (train.train, train.recipe, train.report, train.export, train.cost, train.distil, pairs):
    app.command()(of_runs)

# typer exports no other name for click's usage errors, and only newer versions carry their own click.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

SPINS = "10000"
"""How often a thread of GNU OpenMP looks for work before it sleeps: microseconds, in place of milliseconds.
Not at all (``OMP_WAIT_POLICY=PASSIVE``) makes generation on an idle machine three times slower."""

_TABLES_WIDTH = 60  # Narrower, the tables of rich's help cut the options' names.


def main(args: Sequence[str] | None = None) -> int:
    """Run ``colada`` and return its exit status."""
    return run(app, args, "colada")


def run(app: typer.Typer, args: Sequence[str] | None, name: str) -> int:
    """Run a command line and return its exit status: 2 for what the user can mend, 130 for an interrupt.

    Args:
        app: its commands.
        args: the command's arguments; the process's own if None.
        name: what the command is called, in its help.
    """
    # Before torch is imported. Threads that spin for long starve each other where cores are shared.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    code = _run(app, args, name)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer cannot be written: the interpreter would try at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        gone = isinstance(error, BrokenPipeError)
        code = code or (1 if gone else _fail(f"cannot write to standard output: {error.strerror}"))
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:  # Nobody reads it; the interpreter's end would make another status of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return code


_show_warning = warnings.showwarning


def _note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Print a warning of this package as a note, without the place in the code that it is from."""
    if not issubclass(category, ColadaWarning):
        _show_warning(message, category, *place, **more)
    elif sys.stderr is not None:
        print("note:", message, file=sys.stderr)


def _run(app: typer.Typer, args: Sequence[str] | None, name: str) -> int:
    try:
        _check_streams()
        if shutil.get_terminal_size().columns < _TABLES_WIDTH:
            app.rich_markup_mode = None
        command = typer.main.get_command(app)
        with warnings.catch_warnings():
            warnings.showwarning = _note
            code = command.main(args, prog_name=name, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        return _fail(_usage(error))
    except ColadaError as error:
        return _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'cannot read or write'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for it on a CPU.
        if not isinstance(error, MemoryError) and not re.search(r"out of memory|allocate memory", str(error)):
            raise
        return _fail(f"out of memory: {str(error) or 'this machine has too little for what was asked'}")


def _check_streams() -> None:
    """Make the standard streams ones that can be used.

    Raises:
        ColadaError: if standard output is closed: what a command prints would be lost.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else a file that is opened later would be this stream.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    if sys.stdout is None:
        raise ColadaError("standard output is closed, expected a place for it (> /dev/null throws it away)")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # Where a terminal cannot show a character.


def _usage(error: Any) -> str:
    """Return a usage error in one line, with the value at fault and where to read on."""
    message = error.format_message()
    # Newer typers let pydantic convert, whose message leaves out the value.
    details = getattr(error.__cause__, "errors", None)
    if details is not None:
        value = repr(details()[0]["input"])
        message += f", not {value if len(value) <= 60 else value[:57] + '...'}"
    return f"{message} (see {error.ctx.command_path} --help)" if error.ctx is not None else message


def _fail(message: str) -> int:
    # As every other one is shown: the system's errors quote paths of any length and content.
    _say(f"error: {' '.join(str(ColadaError(message)).split())}")
    return 2


def _say(line: str) -> None:
    # Where nobody reads standard error, the exit status still says it.
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@app.callback(invoke_without_command=True)
def colada(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Colada: Cola DLM, the continuous latent diffusion language model."""
    if version:
        print(f"colada {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# --- reconstruct, info, parity -----------------------------------------------------------------


@app.command()
def reconstruct(
    text: TextArgument = None,
    file: FileOption = None,
    lines: LinesOption = False,
    model: ModelOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Send a text through the Text VAE and back, and count the tokens that survive."""
    check_model_options(model, revision, dtype, device)
    texts = read_texts(text, file, lines)
    network = load_cola(model, revision, dtype, device)
    for original in texts:
        back = network.reconstruct(original)
        if as_json:
            fields = {"reconstruction": back.text, "tokens": back.tokens, "accuracy": back.accuracy}
            print(json.dumps({"text": original, **fields}))
        else:
            count = len(back.tokens)
            correct = round(back.accuracy * count)
            print(f"{back.text}\naccuracy {back.accuracy:.1%} ({correct} of {count} tokens)")


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Argument(help="Model directory, or hub id of the form owner/name. Default: the bundled model."),
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model's parameters, memory, configuration and files. Its weights are not loaded."""
    from colada.cli.info import describe, show

    description = describe(model, revision)
    if as_json:
        print(json.dumps(description, indent=2))
    else:
        show(description)


@app.command()
def parity(
    cases: Annotated[
        list[Path], typer.Argument(metavar="CASE_DIR...", help="Directories of parity fixtures.")
    ],
    tolerance: Annotated[
        float, number_option(help="Largest relative error, max |a - b| / max |b|, that holds.")
    ] = 1e-5,
    device: DeviceOption = "cpu",
) -> None:
    """Compare this implementation with a reference: one JSON line a case, exit status 1 if any fails."""
    if not 0 <= tolerance < math.inf:
        raise ColadaError(f"tolerance={tolerance}, expected a finite number of at least 0")
    from colada.cli.parity import report

    codes = [report(case, tolerance, device) for case in cases]
    raise typer.Exit(max(codes))


# --- tokenizer ---------------------------------------------------------------------------------

TokenizerFile = Annotated[
    Path | None, typer.Option("--file", "-f", help="A tokenizer.json. Default: the one of the model.")
]


@tokenizer_app.command("train")
def tokenizer_train(
    path: Annotated[Path, typer.Argument(help="Text, .jsonl or .parquet file, or a folder of them.")],
    vocab_size: Annotated[
        int, typer.Option(help="Entries: 256 bytes, 4 special tokens, and the merges learnt.")
    ],
    out: Annotated[Path, typer.Option(help="Where to write it; replaced if it exists.")] = Path(
        "tokenizer.json"
    ),
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only files whose name matches; may be repeated."),
    ] = None,
    column: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
) -> None:
    """Learn a byte-level BPE from text, leaving out the validation documents as training does."""
    from colada.data.documents import read_documents
    from colada.data.listing import find_files
    from colada.text.tokenizer import Tokenizer

    if include and path.is_file():
        raise ColadaError(f"--include {include[0]} with {path}, expected a folder: a file is read as it is")
    documents = read_documents(find_files(path, include or ()), column=column)
    texts = (document.text for document in documents if document.split == "train")
    Tokenizer.train(texts, vocab_size, progress=sys.stderr.isatty()).save(out)
    print(f"wrote {out}: {vocab_size:,} entries")


@tokenizer_app.command("encode")
def tokenizer_encode(
    text: TextArgument = None,
    model: ModelOption = None,
    file: TokenizerFile = None,
    as_json: JsonOption = False,
) -> None:
    """Print a text's ids and what each spells; U+FFFD stands for part of a character."""
    (text,) = read_texts(text, None, False)
    tokenizer = load_tokenizer(model, file)
    ids = tokenizer.encode(text)
    pieces = [tokenizer.decode([token], skip_special=False) for token in ids]
    if as_json:
        print(json.dumps({"ids": ids, "pieces": pieces}))
    else:
        for token, piece in zip(ids, pieces, strict=True):
            print(f"{token:>7}  {json.dumps(piece, ensure_ascii=False)}")


@tokenizer_app.command("decode")
def tokenizer_decode(
    ids: Annotated[list[int], typer.Argument(metavar="ID...", help="Token ids.")],
    model: ModelOption = None,
    file: TokenizerFile = None,
) -> None:
    """Print the text of token ids, special tokens included."""
    tokenizer = load_tokenizer(model, file)
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise ColadaError(f"id {token}, expected whole numbers from 0 to {tokenizer.vocab_size - 1}")
    print(tokenizer.decode(ids, skip_special=False))
