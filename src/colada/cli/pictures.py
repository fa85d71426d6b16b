"""The commands for models that have pictures: ``draw`` and ``describe``."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colada.checks import MOST_TOKENS, require_count
from colada.cli.options import (
    DeviceOption,
    DtypeOption,
    FileOption,
    LinesOption,
    ModelOption,
    RevisionOption,
    ScheduleOption,
    SolverOption,
    TextArgument,
    check_model_options,
    load_cola,
    number_option,
    read_texts,
)
from colada.errors import ColadaError
from colada.files import atomic_writer, require_file
from colada.generate.settings import Settings, check_settings, one_each

if TYPE_CHECKING:
    from rich.console import Console

    from colada.models.cola import ColaDLM
    from colada.pictures.shapes import Picture
    from colada.text.transcript import Chunk, Completion

MOST_DRAWINGS = 4096
_USUAL = "Default: the model's, or what draws well."

StepsOption = Annotated[int | None, typer.Option(help=f"Solver steps of a picture or a block. {_USUAL}")]
GuidanceOption = Annotated[
    float | None, number_option("--guidance", "-g", help=f"Guidance scale; 1 is off. {_USUAL}")
]


def draw(
    caption: TextArgument = None,
    file: FileOption = None,
    lines: LinesOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="PNG to write; - is standard output.")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="ROWSxCOLUMNS",
            help="A sheet of so many drawings, of all captions in turn; seeds in order.",
        ),
    ] = None,
    scale: Annotated[int, typer.Option(help="Pixels of the PNG for one of a picture.")] = 8,
    model: ModelOption = None,
    revision: RevisionOption = None,
    seed: Annotated[int, typer.Option(help="Drawing i, from 0, has seed + i.")] = 0,
    guidance: GuidanceOption = None,
    steps: StepsOption = None,
    solver: SolverOption = None,
    schedule: ScheduleOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    batch: Annotated[int, typer.Option(help="How many are drawn together.")] = 64,
) -> None:
    """Draw a caption, or several.

    On a terminal, the picture is shown as it forms, after each solver step. Several are on one sheet.
    """
    from rich.console import Console

    from colada.pictures.show import MOST_SCALE, png, sheet, sheet_width

    settings: Settings = {
        "steps": steps,
        "guidance": guidance,
        "solver": solver,
        "schedule": schedule,
        "seed": seed,
    }
    check_settings(settings)
    require_count("batch", batch)
    require_count("scale", scale, MOST_SCALE)
    rows, columns = _grid(grid)
    if out is not None and out.suffix.lower() not in ("", ".png"):
        raise ColadaError(f"--out {out}, expected a name that ends in .png: a PNG is written")
    check_model_options(model, revision, dtype, device)
    console = Console(highlight=False)
    piped, to_terminal = str(out) == "-", sys.stdout.isatty()
    live = to_terminal and not piped and console.is_terminal and not console.is_dumb_terminal
    if out is None and not live:
        what = "a terminal that shows no pictures" if to_terminal else "no terminal"
        raise ColadaError(f"standard output is {what}: give -o FILE, or -o - for the bytes of a PNG")
    all_lines = grid is not None and caption in (None, "-") and file is None
    captions = read_texts(caption, file, lines or all_lines)
    if grid is not None:
        captions = [captions[number % len(captions)] for number in range(rows * columns)]
    else:
        columns = math.ceil(math.sqrt(len(captions)))
    network = load_cola(model, revision, dtype, device)
    width = sheet_width(columns, network.codec().config.size)
    if out is None and width > console.width:
        where = f"a sheet of {width} columns, more than the terminal's {console.width}"
        raise ColadaError(f"{where}: give -o FILE, or fewer pictures in a row with --grid")
    chunks = network.stream_drawing(captions, batch=batch, guesses=live, **settings)
    drawn = _watched(chunks, captions, columns, console if live else None)
    if out is None:
        return
    content = png(sheet(drawn, columns), scale)
    if piped:
        sys.stdout.buffer.write(content)
        return
    with atomic_writer(out) as target:
        target.write(content)


def _grid(text: str | None) -> tuple[int, int]:
    """Return the rows and columns that an option names."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"(\d{1,4})[x×](\d{1,4})", text)
    rows, columns = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= rows * columns <= MOST_DRAWINGS:
        raise ColadaError(
            f"grid={text!r}, expected rows x columns such as 4x4, at most {MOST_DRAWINGS} drawings"
        )
    return rows, columns


def _watched(
    chunks: Iterator[Chunk], captions: list[str], columns: int, console: Console | None
) -> list[Picture]:
    """Return the drawings of all captions, shown on a terminal while they form.

    Raises:
        ColadaError: if any failed.
    """
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from colada.pictures.show import half_blocks, sheet

    drawn: dict[int, Picture] = {}
    errors: dict[int, str] = {}
    finished = 0
    with nullcontext() if console is None else Live(console=console, auto_refresh=False) as view:
        for chunk in chunks:
            if chunk.picture is not None:
                drawn[chunk.index] = chunk.picture
            if chunk.error is not None:
                errors[chunk.index] = chunk.error
            finished += chunk.completion is not None
            if console is None or view is None:
                continue
            step = f"step {chunk.step}/{chunk.steps}" if chunk.step is not None else captions[chunk.index]
            count = f" · {finished}/{len(captions)}" if len(captions) > 1 else ""
            lines = [Text(step + count, "dim")]
            page = sheet([drawn[number] for number in sorted(drawn)], columns) if drawn else None
            if page is not None and page.shape[1] <= console.width:
                lines.insert(0, half_blocks(page))
            view.update(Group(*lines), refresh=True)
    if errors:
        which, why = min(errors.items())
        raise ColadaError(f"{len(errors)} of {len(captions)} drawings failed, first number {which}: {why}")
    return [drawn[number] for number in range(len(captions))]


def describe(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Picture files of any kind.")],
    prompt: Annotated[str, typer.Option(help="What is asked of each.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="How many tokens an answer has at most.")
    ] = 48,
    model: ModelOption = None,
    revision: RevisionOption = None,
    seed: Annotated[int, typer.Option(help="Answer i, from 0, has seed + i.")] = 0,
    guidance: GuidanceOption = None,
    steps: StepsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a picture, each on its line.")
    ] = False,
) -> None:
    """Say what is in pictures; what is cut off or scaled of one is said on standard error.

    So is what is wrong with a file, and the others are described.
    """
    settings: Settings = {"steps": steps, "guidance": guidance}
    check_settings({**settings, "seed": seed})
    require_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
    check_model_options(model, revision, dtype, device)
    seeds = one_each("seed", seed, len(pictures), 1)
    errors: dict[int, str] = {}  # by picture; the others are described
    noted = partial(_noted, errors, len(pictures))
    for number, path in enumerate(pictures):  # Before a model is loaded.
        with noted(number):
            require_file(path, "a picture")
    loaded: dict[int, tuple[Picture, list[str]]] = {}
    answers: dict[int, Completion] = {}
    if len(errors) < len(pictures):
        network = load_cola(model, revision, dtype, device)
        size = network.codec().config.size
        for number, path in enumerate(pictures):
            if number not in errors:
                with noted(number):
                    loaded[number] = _read(path, size)
        own = [seeds[number] for number in loaded]
        shown = [picture for picture, _ in loaded.values()]
        done = _described(network, shown, max_new_tokens, prompt=prompt, **{**settings, "seed": own})
        for number, answer in zip(loaded, done, strict=True):
            with noted(number):
                if isinstance(answer, str):
                    raise ColadaError(f"{pictures[number]}: {answer}")
                answers[number] = answer
    for number, path in enumerate(pictures):
        one = answers.get(number)
        if as_json:
            fields: dict[str, Any] = {"error": errors.get(number), "finish_reason": "error"}
            if one is not None:
                fields = {"text": one.text, "changes": loaded[number][1], "finish_reason": one.finish_reason}
            print(json.dumps({"picture": str(path), **fields, "seed": seeds[number]}))
        elif one is not None:
            print(f"{path}: {one.text}" if len(pictures) > 1 else one.text)
    if errors:
        raise ColadaError(f"{len(errors)} of {len(pictures)} pictures failed")


@contextmanager
def _noted(errors: dict[int, str], count: int, number: int) -> Iterator[None]:
    """Say what is wrong with one of several pictures, and go on; of a single one, raise it."""
    try:
        yield
    except ColadaError as error:
        if count == 1:
            raise
        errors[number] = str(error)
        print("error:", error, file=sys.stderr)


def _read(path: Path, size: int) -> tuple[Picture, list[str]]:
    """Return a picture as the model takes it, and what was changed, which is said."""
    from colada.pictures.load import load_picture

    loaded = load_picture(path, size)
    changes = [str(change) for change in loaded.changes]
    if changes:
        print(f"note: {path}: {', '.join(changes)}", file=sys.stderr)
    return loaded.picture, changes


def _described(
    network: ColaDLM, pictures: list[Picture], tokens: int, **settings: Any
) -> list[Completion | str]:
    """Return an answer to each picture, or why there is none."""
    from colada.text.transcript import GenerationError

    if not pictures:
        return []
    try:
        return list(network.describe(pictures, tokens, **settings))
    except GenerationError as error:
        return [
            error.errors[number] if answer is None else answer
            for number, answer in enumerate(error.completions)
        ]
