"""What commands share: their options, the texts these name, and the one way to the model that they name."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colada.checks import require_choice
from colada.errors import ColadaError
from colada.files import decode, read_text
from colada.generate.settings import AGAINST_NAMES, NOISE_NAMES, SCHEDULE_NAMES, SOLVER_NAMES
from colada.locate import local

if TYPE_CHECKING:
    from colada.models.base import LanguageModel
    from colada.models.cola import ColaDLM
    from colada.text.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
QUANTISATIONS = ("int8",)
DEVICES = ("cpu", "cuda", "mps", "xpu")
MOST_INPUT = 2**28
"""Bytes of standard input that are read."""
MOST_MESSAGE = 2**20
"""Bytes of one message of a chat."""


def number(text: str | float) -> float:
    """Return what an option's text spells; refuses what is no number, or would silently be 0 or infinite."""
    if not isinstance(text, str):
        return text  # The option's default.
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected a number") from None
    digits = text.lower().partition("e")[0]
    if (value == 0 and re.search("[1-9]", digits)) or (abs(value) == float("inf") and "i" not in digits):
        raise typer.BadParameter(f"{text!r} is beyond what a number can hold")
    return value


def number_option(*names: str, help: str, metavar: str = "NUMBER") -> Any:
    """Return an option that takes a :func:`number`."""
    return typer.Option(*names, parser=number, metavar=metavar, help=help)


TextArgument = Annotated[
    str | None,
    typer.Argument(help="The text. Without one, or with -, all of standard input but its last line break."),
]
FileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="Take each line that is not empty as a text; - is standard input."),
]
LinesOption = Annotated[bool, typer.Option("--lines", help="Take each line of standard input as a text.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="WHERE",
        help="Model directory, or hub id of the form owner/name. Default: the bundled model.",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub model. Default: its main branch.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Compute in float32, bfloat16 or float16. Default: as stored; the bundled model float32.",
    ),
]
DeviceOption = Annotated[str, typer.Option(metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, mps.")]
QuantiseOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="int8: layers with such weights take less memory, and are less exact."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


# --- settings of a generation ------------------------------------------------------------------


def _own(text: str) -> str:
    return f"{text} Default: the model's own."


def _named(names: Sequence[str]) -> Any:
    """Return the option of a setting that has a name."""
    return typer.Option(metavar="NAME", help=_own(f"{', '.join(names[:-1])} or {names[-1]}."))


SolverOption = Annotated[str | None, _named(SOLVER_NAMES)]
ScheduleOption = Annotated[str | None, _named(SCHEDULE_NAMES)]

_SETTINGS: dict[str, Any] = {
    "steps": Annotated[int | None, typer.Option(help=_own("Solver steps per block."))],
    "guidance": Annotated[
        float | None, number_option("--guidance", "-g", help=_own("Guidance scale; 1 is off."))
    ],
    "guidance_interval": Annotated[
        tuple[float, float] | None,
        number_option(metavar="LOW HIGH", help=_own("Guide only while a = t / T is between these.")),
    ],
    "guidance_against": Annotated[str | None, _named(AGAINST_NAMES)],
    "guidance_cap": Annotated[
        float | None,
        number_option(help=_own("Most size (root mean square) of a latent of a guided guess; 0 is off.")),
    ],
    "guidance_rescale": Annotated[
        float | None,
        number_option(help=_own("Share, 0 to 1, to which a guided guess is scaled to the plain one.")),
    ],
    "early_end": Annotated[
        float | None, number_option(help=_own("Below this a the last step goes straight to the end."))
    ],
    "candidates": Annotated[
        int | None,
        typer.Option(help=_own("Draw every block so many times, and keep the one the decoder is surest of.")),
    ],
    "temperature": Annotated[
        float | None, number_option(help=_own("Of token sampling; 0 picks the likeliest."))
    ],
    "top_k": Annotated[int | None, typer.Option(help=_own("Sample among the k likeliest tokens; 0 is off."))],
    "top_p": Annotated[
        float | None,
        number_option(help=_own("Sample among the likeliest tokens that reach this probability; 1 is off.")),
    ],
    "repetition_penalty": Annotated[
        float | None, number_option(help=_own("Above 1, tokens seen before are less likely; 1 is off."))
    ],
    "stop": Annotated[
        list[str] | None, typer.Option(help=_own("End the text before this string; may be repeated."))
    ],
    "whole_sentences": Annotated[
        bool | None,
        typer.Option(
            "--whole-sentences/--exact-length",
            help=_own(
                "A text that comes to its length: cut after its last whole sentence, or exactly there."
            ),
        ),
    ],
    "solver": SolverOption,
    "schedule": ScheduleOption,
    "noise": Annotated[str | None, _named(NOISE_NAMES)],
}
"""The option of each setting but the seed, which commands count from in their own ways."""


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting; it takes those that are given as ``**settings``."""

    @wraps(command)
    def call(**arguments: Any) -> None:
        left_out = {name for name in _SETTINGS if arguments[name] in (None, [])}
        command(**{name: value for name, value in arguments.items() if name not in left_out})

    keyword = inspect.Parameter.KEYWORD_ONLY
    *parameters, _ = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [parameter.replace(kind=keyword) for parameter in parameters]
    settings = [
        inspect.Parameter(name, keyword, default=None, annotation=option)
        for name, option in _SETTINGS.items()
    ]
    after = 1 + [parameter.name for parameter in parameters].index("max_new_tokens")
    signature = inspect.Signature([*parameters[:after], *settings, *parameters[after:]])
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say on a terminal's standard error what is being loaded, and take it away once that is done.

    By hand: rich itself would keep it waiting.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    width = 0
    with suppress(OSError):
        width = os.get_terminal_size(sys.stderr.fileno()).columns
    # One row: what is wrapped cannot be taken away.
    text = f"loading {what} ..."[: max(1, (width or 80) - 1)]
    print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"\r{' ' * len(text)}\r", end="", file=sys.stderr, flush=True)


def load_model(
    model: str | None, revision: str | None, dtype: str | None, device: str, quantise: str | None = None
) -> LanguageModel:
    """Load the model that the options name, of whatever architecture.

    Raises:
        ColadaError: for an unknown type or device, if the model cannot be loaded, or not be quantised.
    """
    check_model_options(model, revision, dtype, device, quantise)
    with loading(model or "the bundled model"):
        import torch

        from colada.device import find_device
        from colada.models.cola import ColaDLM
        from colada.models.load import load

        kind = getattr(torch, dtype) if dtype is not None else None
        network = load(model, revision=revision, device=find_device(device), dtype=kind)
    if quantise is None:
        return network
    if not isinstance(network, ColaDLM):
        raise ColadaError(f"quantise={quantise!r} with {network.origin}: expected a Cola DLM")
    return network.quantise(quantise)


def load_cola(model: str | None, revision: str | None, dtype: str | None, device: str) -> ColaDLM:
    """Load the Cola DLM that the options name, for what only such a model can do.

    Raises:
        ColadaError: as :func:`load_model`; or for a model of another architecture.
    """
    network = load_model(model, revision, dtype, device)
    from colada.models.load import require_cola

    return require_cola(network)


def load_tokenizer(model: str | None, file: Path | None) -> Tokenizer:
    """Return the tokenizer of a file, or of a model without its weights.

    Raises:
        ColadaError: if both are given, or there is none.
    """
    from colada.text.tokenizer import Tokenizer

    if file is not None:
        if model is not None:
            raise ColadaError(f"--model {model} and --file {file}, expected one of them")
        return Tokenizer.from_file(file)

    from colada.locate import BUNDLED, find_tokenizer, locate

    directory = locate(BUNDLED if model is None else model)
    path = find_tokenizer(directory)
    if path is None:
        raise ColadaError(f"{directory} has no tokenizer.json")
    return Tokenizer.from_file(path)


def check_model_options(
    model: str | None,
    revision: str | None,
    dtype: str | None,
    device: str = "cpu",
    quantise: str | None = None,
) -> None:
    """Refuse at once, without torch, what :func:`load_model` would refuse for its name.

    Raises:
        ColadaError: for an unknown type, kind of device or quantisation, or a path that holds no model.
    """
    for kind, name, names in (("dtype", dtype, DTYPES), ("quantise", quantise, QUANTISATIONS)):
        if name is not None:
            require_choice(kind, name, names)
    if not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d{{1,3}})?", device, re.ASCII):
        raise ColadaError(f"device={device!r}, expected 'cpu', 'cuda', 'cuda:1' or 'mps'")
    if model is not None:
        local(model, revision)


def read_texts(text: str | None, file: Path | None, lines: bool) -> list[str]:
    """Return the texts that a command is given: its argument, the lines of a file, or standard input.

    Raises:
        ColadaError: if there is none, it is given in two ways, or is no UTF-8 text.
    """
    if text not in (None, "-"):
        if file is not None or lines:
            other = f"--file {file}" if file is not None else "--lines"
            raise ColadaError(f"a text ({text!r}) and {other}, expected one of them")
        return [str(text)]
    if file is not None and str(file) != "-":
        name, content = str(file), read_text(file)
    else:
        name, content = "standard input", _standard_input(waiting=text is None and file is None)
    if file is None and not lines:
        texts = [content.removesuffix("\n").removesuffix("\r")]
    else:
        texts = [line.removesuffix("\r") for line in content.split("\n") if line.strip()]
    if not any(texts):
        raise ColadaError(f"{name} is empty, expected text")
    return texts


def read_message(typed: bool) -> str | None:
    """Return the next line of standard input without its line break, or None at its end.

    Args:
        typed: a person at a terminal types it, after a prompt and with line editing.

    Raises:
        ColadaError: for a line that is no UTF-8 text, or longer than anybody types.
    """
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  its import gives input() line editing; not every system has it
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except UnicodeDecodeError:
            raise ColadaError("the line is not UTF-8, expected UTF-8 text") from None
    line: bytes = sys.stdin.buffer.readline(MOST_MESSAGE + 1)
    if len(line) > MOST_MESSAGE:
        raise ColadaError(f"a message has more than {MOST_MESSAGE} bytes, expected at most so many")
    return decode(line, "standard input").rstrip("\r\n") if line else None


def _standard_input(waiting: bool) -> str:
    """Return all of standard input; ``waiting``: nobody has said that it will be typed at a terminal."""
    if sys.stdin is None:
        raise ColadaError("standard input is closed: give a text as argument, or with --file")
    if waiting and sys.stdin.isatty():
        raise ColadaError("no text: give one as argument, with --file, or on standard input")
    data = sys.stdin.buffer.read(MOST_INPUT + 1)
    if len(data) > MOST_INPUT:
        raise ColadaError(f"standard input has more than {MOST_INPUT} bytes, expected at most so many")
    return decode(data, "standard input")
