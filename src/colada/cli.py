"""The command line: a typed function per command, importing what it needs only when it runs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colada import __version__
from colada.bench.commands import bench_app
from colada.errors import ColadaError
from colada.evaluation.commands import eval_app
from colada.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    QuantiseOption,
    RevisionOption,
    load_cola,
    load_model,
)
from colada.study.commands import study_app
from colada.training import commands

if TYPE_CHECKING:
    from rich.console import Console

    from colada.info import ModelInfo
    from colada.language_model import LanguageModel
    from colada.settings import Settings
    from colada.streaming import Completion
    from colada.tokenizer import Tokenizer

app = typer.Typer(
    help="Colada: Cola DLM, the continuous latent diffusion language model.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = typer.Typer(help="Train a tokenizer, and see what one does.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench", help="Measure speed.")
app.add_typer(study_app, name="study")
for command in (commands.train, commands.recipe, commands.report, commands.export, commands.ledger):
    app.command()(command)

# typer exports no other name for click's usage errors, and only newer versions carry their own click.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_OWN = "Default: the model's own."

TextArgument = Annotated[
    str | None,
    typer.Argument(help="The text. Without one, or with -, all of standard input but its last line break."),
]
FileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="Take each line that is not empty as a text; - is standard input."),
]
LinesOption = Annotated[bool, typer.Option("--lines", help="Take each line of standard input as a text.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for what the user can mend, 130 for an interrupt."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # Where a terminal cannot show a character.
    try:
        command = typer.main.get_command(app)
        code = command.main(args, prog_name="colada", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        return _fail(_usage(error))
    except ColadaError as error:
        return _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except OSError as error:
        # What is left in the buffer cannot be written: the interpreter would try at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if isinstance(error, BrokenPipeError) else _fail(str(error))


def _usage(error: Any) -> str:
    """Return a usage error in one line, with the value at fault and where to read on."""
    message = error.format_message()
    # Newer typers let pydantic convert, whose message leaves out the value.
    details = getattr(error.__cause__, "errors", None)
    if details is not None:
        message += f", not {details()[0]['input']!r}"
    return f"{message} (see {error.ctx.command_path} --help)" if error.ctx is not None else message


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


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


# --- generate ----------------------------------------------------------------------------------


@app.command()
def generate(
    prompt: TextArgument = None,
    file: FileOption = None,
    lines: LinesOption = False,
    model: ModelOption = None,
    revision: RevisionOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="How many tokens, unless the text ends before.")
    ] = 64,
    steps: Annotated[int | None, typer.Option(help=f"Solver steps per block. {_OWN}")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "-g", help=f"Guidance scale; 1 is off. {_OWN}")
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help=f"Guide only while a = t / T is between these. {_OWN}"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help=f"Of token sampling; 0 picks the likeliest. {_OWN}")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help=f"Sample among the k likeliest tokens; 0 is off. {_OWN}")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help=f"Sample among the likeliest tokens that reach this probability; 1 is off. {_OWN}"),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help=f"Above 1, tokens seen before are less likely; 1 is off. {_OWN}")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Prompt i, from 0, has seed + i (seed + 1000 i with released noise).")
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help=f"End the text before this string; may be repeated. {_OWN}")
    ] = None,
    solver: Annotated[str | None, typer.Option(metavar="NAME", help=f"euler or ab2. {_OWN}")] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"uniform, front-loaded or logit-normal. {_OWN}")
    ] = None,
    noise: Annotated[str | None, typer.Option(metavar="NAME", help=f"per-sample or released. {_OWN}")] = None,
    dtype: DtypeOption = None,
    quantise: QuantiseOption = None,
    device: DeviceOption = "cpu",
    batch: Annotated[int, typer.Option(help="How many prompts are continued together.")] = 16,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take each text as a user's message, and print the answer alone.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a prompt, each on its line.")
    ] = False,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print a text when it is finished, not as it grows.")
    ] = False,
) -> None:
    """Continue a text, or several.

    On a terminal a single text is shown as it forms: what is finished, and the
    block under way as it would read after each solver step.
    """
    texts = _texts(prompt, file, lines)
    if batch < 1:
        raise ColadaError(f"batch={batch}, expected at least 1")
    network = load_model(model, revision, dtype, device, quantise)
    prompts = texts
    if chat:
        prompts = [network.chat_prompt([{"role": "user", "content": text}]) for text in texts]

    from colada.flow import choose
    from colada.generation import SEED_STRIDE
    from colada.settings import TextRequest

    given: Settings = {
        "steps": steps,
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "solver": solver,
        "schedule": schedule,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
        "noise": noise,
    }
    chosen = {**network.chosen(given), "max_new_tokens": max_new_tokens}
    del chosen["seed"]  # Every prompt has its own.
    stride = choose("noise", chosen.get("noise", "per-sample"), SEED_STRIDE)
    seeds = [seed + stride * number for number in range(len(prompts))]

    if len(prompts) == 1 and not as_json and not no_stream:
        shown = "" if chat else prompts[0]
        _stream(network, prompts[0], shown, max_new_tokens, {**given, "seed": seed}, chosen.get("steps"))
        return
    requests = [
        TextRequest(own, max_new_tokens, {**given, "seed": own_seed})
        for own, own_seed in zip(prompts, seeds, strict=True)
    ]
    errors: dict[int, str] = {}  # by prompt; the others are finished and printed first
    for number, done in enumerate(_in_order(network.complete(requests, batch))):
        if done.error is not None:
            errors[number] = done.error
        if as_json:
            fields: dict[str, Any] = {"text": done.text, "tokens": done.tokens}
            if done.error is not None:
                fields = {"error": done.error}
            fields["finish_reason"] = done.finish_reason
            line = {"prompt": texts[number], **fields, "seed": seeds[number], "settings": chosen}
            print(json.dumps(line), flush=True)
        else:
            shown = "" if chat else prompts[number]
            print("\n" * (number > 0) + shown + done.text, flush=True)
    if errors:
        which, why = min(errors.items())
        raise ColadaError(f"{len(errors)} of {len(prompts)} prompts failed, first number {which}: {why}")


def _in_order(completions: Iterator[tuple[int, Completion]]) -> Iterator[Completion]:
    """Yield completions in the order of their numbers, each once all before it are finished."""
    waiting: dict[int, Completion] = {}
    next_one = 0
    for number, done in completions:
        waiting[number] = done
        while next_one in waiting:
            yield waiting.pop(next_one)
            next_one += 1


def _stream(
    network: LanguageModel,
    prompt: str,
    shown: str,
    max_new_tokens: int,
    settings: Settings,
    steps: int | None,
) -> None:
    """Print what is shown of one prompt, and its continuation as it grows; on a terminal, with guesses."""
    from rich.console import Console

    from colada.terminal import PROMPT_STYLE, LiveText

    console = Console(highlight=False)
    live = sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal
    chunks = network.stream(prompt, max_new_tokens, guesses=live, **settings)
    error: str | None = None
    if not live:
        print(shown, end="", flush=True)
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
            error = chunk.error
        print()
        if error is not None:
            raise ColadaError(error)
        return
    tokens, begin = 0, time.perf_counter()
    with LiveText(console) as view:
        view.write(shown, PROMPT_STYLE)
        for chunk in chunks:
            if chunk.step is None:
                tokens += len(chunk.tokens)
                view.write(chunk.text)
                error = chunk.error
            else:
                rate = tokens / (time.perf_counter() - begin)
                status = (
                    f"block {chunk.block + 1} · step {chunk.step}/{steps} · {tokens} tokens ({rate:.0f}/s)"
                )
                view.guess(chunk.text, status)
    if error is not None:
        raise ColadaError(error)


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
    texts = _texts(text, file, lines)
    network = load_cola(model, revision, dtype, device)
    for own in texts:
        back = network.reconstruct(own)
        if as_json:
            fields = {"reconstruction": back.text, "tokens": back.tokens, "accuracy": back.accuracy}
            print(json.dumps({"text": own, **fields}))
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
    from colada.info import describe

    found = describe(model, revision)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        from rich.console import Console

        _print_info(found, Console(highlight=False, soft_wrap=True))


def _print_info(found: ModelInfo, console: Console) -> None:
    from rich.table import Table

    from colada.info import BYTES
    from colada.locate import DECODER_DIR, DIT_DIR, VAE_DIR

    def table(*columns: str, rows: Sequence[Sequence[str]]) -> None:
        grid = Table(*columns[:1], box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
        for column in columns[1:]:
            grid.add_column(column, justify="right")
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
        console.print()

    def values(title: str, mapping: dict[str, Any]) -> None:
        table(title, "", rows=[(name, json.dumps(value)) for name, value in mapping.items()])

    tokenizer = f"{found.tokenizer[0]} ({found.tokenizer[1]:,} entries)" if found.tokenizer else "none"
    for name, value in (
        ("model", found.origin),
        ("directory", found.directory),
        ("tokenizer", tokenizer),
        ("stored as", ", ".join(found.dtypes)),
    ):
        console.print(f"[bold]{name:<12}[/bold]", end="")
        console.print(value, markup=False)
    console.print()
    shares = [(part, f"{n:,}", f"{n / found.total:.1%}") for part, n in found.parameters.items()]
    table("Part", "Parameters", "Share", rows=[*shares, ("Total", f"{found.total:,}", "100.0%")])
    memory = [(name, _size(found.weight_bytes(name)), _size(found.history_bytes(name))) for name in BYTES]
    per = "token" if DECODER_DIR in found.configs else "latent"
    table("Memory", "Weights", f"History per {per}", rows=memory)
    titles = {VAE_DIR: "Text VAE", DIT_DIR: "DiT", DECODER_DIR: "Decoder"}
    for folder, config in found.configs.items():
        values(titles[folder], config.to_dict())
    values("Generation", dict(found.generation))
    table("File", "Size", rows=[(name, _size(size)) for name, size in found.files.items()])


def _size(count: float) -> str:
    """Return a number of bytes for a reader: "1,536 B", "12.3 MiB"."""
    units = ["KiB", "MiB", "GiB", "TiB"]
    if count < 10 * 1024:
        return f"{count:,.0f} B"
    while (count := count / 1024) >= 1024 and len(units) > 1:
        units.pop(0)
    return f"{count:.1f} {units[0]}"


@app.command()
def parity(
    cases: Annotated[
        list[Path], typer.Argument(metavar="CASE_DIR...", help="Directories of parity fixtures.")
    ],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest relative error, max |a - b| / max |b|, that holds.")
    ] = 1e-5,
) -> None:
    """Compare this implementation with a reference: one JSON line a case, exit status 1 if any fails."""
    from colada.parity import report

    codes = [report(case, tolerance) for case in cases]
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
    from colada.data.documents import find_files, read_documents
    from colada.tokenizer import Tokenizer

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
    (text,) = _texts(text, None, False)
    tokenizer = _tokenizer(model, file)
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
    tokenizer = _tokenizer(model, file)
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise ColadaError(f"id {token}, expected whole numbers from 0 to {tokenizer.vocab_size - 1}")
    print(tokenizer.decode(ids, skip_special=False))


def _tokenizer(model: str | None, file: Path | None) -> Tokenizer:
    from colada.tokenizer import Tokenizer

    if file is not None:
        if model is not None:
            raise ColadaError(f"--model {model} and --file {file}, expected one of them")
        return Tokenizer.from_file(file)

    from colada.locate import BUNDLED, find_tokenizer, locate

    directory = locate(BUNDLED if model is None else model)
    found = find_tokenizer(directory)
    if found is None:
        raise ColadaError(f"{directory} has no tokenizer.json")
    return Tokenizer.from_file(found)


# --- what commands share -----------------------------------------------------------------------


def _texts(text: str | None, file: Path | None, lines: bool) -> list[str]:
    """Return the texts that a command is given: its argument, the lines of a file, or standard input."""
    if text not in (None, "-"):
        if file is not None or lines:
            other = f"--file {file}" if file is not None else "--lines"
            raise ColadaError(f"a text ({text!r}) and {other}, expected one of them")
        return [str(text)]
    if file is not None and str(file) != "-":
        name, raw = str(file), _read(file)
    elif text is None and file is None and sys.stdin.isatty():
        raise ColadaError("no text: give one as argument, with --file, or on standard input")
    else:
        name, raw = "standard input", sys.stdin.buffer.read()
    try:
        content = raw.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise ColadaError(f"{name}: {byte} is not UTF-8, expected UTF-8 text") from None
    if file is None and not lines:
        texts = [content.removesuffix("\n").removesuffix("\r")]
    else:
        texts = [line.removesuffix("\r") for line in content.split("\n") if line.strip()]
    if not any(texts):
        raise ColadaError(f"{name} is empty, expected text")
    return texts


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ColadaError(f"cannot read {file}: {error.strerror}") from None
