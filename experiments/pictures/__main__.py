"""Pictures, measured: ``python -m experiments.pictures reader``, ``codec``, ``twemoji`` and others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from colada.cli.main import Commands, run
from colada.report.table import Table

pictures_app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    help="What is lost before anything is learnt, and what models draw and say, by the exact reader.",
)

Count = Annotated[int, typer.Option(min=10, help="Scenes that are measured; no training draws them.")]
FittedOn = Annotated[int, typer.Option(min=1000, help="Scenes that the linear codecs are fitted to.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]


def show(table: Table, markdown: bool) -> None:
    """Print a table."""
    if markdown:
        print(table.markdown())
    else:
        table.print(Console())


@pictures_app.command()
def reader(count: Count = 1500, markdown: Markdown = False) -> None:
    """Count how often true pictures are read right, and how often a shuffled caption is (chance)."""
    from experiments.pictures.measures import reader_table

    show(reader_table(count), markdown)


@pictures_app.command()
def codec(
    count: Count = 300,
    fitted_on: FittedOn = 20_000,
    whitening: Annotated[float, typer.Option(min=0, max=1, help="Of the principal components.")] = 0.5,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="A model whose codec is measured too, a trained one say; may be repeated."
        ),
    ] = None,
    markdown: Markdown = False,
) -> None:
    """Measure what codecs keep: variance, PSNR, and whether the scene can still be read, also under noise."""
    from colada.locate import locate
    from colada.pictures.codec import read_codec
    from experiments.pictures.measures import codec_table

    others = [read_codec(locate(model)) for model in models or ()]
    show(codec_table(fitted_on, count, whitening, others), markdown)


@pictures_app.command()
def twemoji(
    package: Annotated[Path, typer.Argument(help="npm's emoji-datasource-twitter, packed or unpacked.")],
    fitted_on: FittedOn = 5_000,
    markdown: Markdown = False,
) -> None:
    """Measure what linear codecs keep of the Twemoji, and how often a moved one is the nearest to itself."""
    from experiments.pictures.measures import twemoji_table
    from experiments.pictures.twemoji import read_twemoji

    show(twemoji_table(read_twemoji(package), fitted_on), markdown)


@pictures_app.command("twemoji-folder")
def twemoji_folder(
    package: Annotated[Path, typer.Argument(help="npm's emoji-datasource-twitter, packed or unpacked.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, for a recipe's data.pictures.")],
    size: Annotated[int, typer.Option(min=1, max=64, help="Pixels of a picture's side.")] = 32,
) -> None:
    """Write the Twemoji as a folder of pictures with captions, to train on."""
    from experiments.pictures.twemoji import CREDIT, read_twemoji, write_folder

    source = read_twemoji(package, size)
    write_folder(source, out)
    print(f"wrote {out}: {source.count} pictures. {CREDIT}")


@pictures_app.command()
def captions(
    model: Annotated[str | None, typer.Argument(help="A model; the bundled one if left out.")] = None,
    count: Count = 2000,
    source: Annotated[str, typer.Option(help="What colada.pictures.sources opens.")] = "shapes:",
    markdown: Markdown = False,
) -> None:
    """Measure how well a model's Text VAE spells captions back, before it is made to draw them."""
    from colada.models.load import load_cola
    from colada.pictures.sources import open_source
    from experiments.pictures.measures import captions_table

    opened = open_source(source)
    count = count if opened.count is None else min(count, opened.count)
    texts = [opened.pair(number).caption for number in range(count)]
    show(captions_table(load_cola(model), texts), markdown)


Model = Annotated[str | None, typer.Argument(help="A model that has pictures.")]
Drawn = Annotated[int, typer.Option("--count", min=10, help="Captions or pictures; no training draws them.")]
Grid = Annotated[bool, typer.Option("--grid", help="Scenes on the patch grid.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the model's own if left out.")]
Steps = Annotated[int | None, typer.Option(help="Solver steps; the model's own if left out.")]


def _add(name: str, table: str, count: int, about: str) -> None:
    """Add a command that shows one of the tables of :mod:`experiments.pictures.drawn`."""

    def measure(
        model: Model = None,
        count: Drawn = count,
        grid: Grid = False,
        guidance: Guidance = None,
        steps: Steps = None,
        markdown: Markdown = False,
    ) -> None:
        from colada.models.load import load_cola
        from experiments.pictures import drawn

        settings = {"guidance": guidance, "steps": steps}
        show(getattr(drawn, table)(load_cola(model), count, grid, settings), markdown)

    pictures_app.command(name, help=about)(measure)


for measured in (
    (
        *("draw", "drawing_table", 1000),
        "Measure how much of captions a model draws right, in parts, also of combinations it has never seen.",
    ),
    (
        *("describe", "describing_table", 1000),
        "Measure how often a model's answer is the one full description of a picture.",
    ),
    (
        *("round-trip", "round_trip_table", 300),
        "Measure how often what is drawn of a description is described as that.",
    ),
    (
        *("diversity", "diversity_table", 20),
        "Measure how much right drawings of one caption differ from seed to seed.",
    ),
):
    _add(*measured)


@pictures_app.command()
def sweep(model: Model = None, count: Drawn = 300, grid: Grid = False, markdown: Markdown = False) -> None:
    """Measure how much is drawn right against guidance and steps."""
    from colada.models.load import load_cola
    from experiments.pictures.drawn import sweep_table

    show(sweep_table(load_cola(model), count, grid), markdown)


@pictures_app.command()
def gallery(
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    model: Annotated[str | None, typer.Option(help="A model that has pictures.")] = None,
    count: Annotated[int, typer.Option(min=1, max=256, help="Captions; no training draws them.")] = 16,
    columns: Annotated[int, typer.Option(min=1, max=16, help="In a row.")] = 4,
    grid: Grid = False,
    guidance: Guidance = None,
    steps: Steps = None,
) -> None:
    """Show drawings with their captions and what the reader says of each, seeds in order, none left out."""
    from colada.models.load import load_cola
    from colada.report.style import require_matplotlib, styled
    from experiments.pictures import drawn

    require_matplotlib("a gallery")
    settings = {"guidance": guidance, "steps": steps}
    with styled():
        drawn.gallery(load_cola(model), count, columns, grid, settings).savefig(out)


@pictures_app.command()
def retrieval(
    package: Annotated[Path, typer.Argument(help="npm's emoji-datasource-twitter, packed or unpacked.")],
    model: Annotated[str | None, typer.Option(help="A model that has learnt the Twemoji.")] = None,
    markdown: Markdown = False,
) -> None:
    """Measure how often the named Twemoji is the nearest to what is drawn of it, and is told its name."""
    from colada.models.load import load_cola
    from experiments.pictures.drawn import retrieval_table
    from experiments.pictures.twemoji import read_twemoji

    network = load_cola(model)
    show(retrieval_table(network, read_twemoji(package, network.codec().config.size)), markdown)


@pictures_app.command()
def ablations(steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 600) -> None:
    """Print the commands of the ablations: recipes/pictures.yaml with one thing changed, and their table."""
    import re
    import shlex

    from experiments.pictures.drawn import ABLATIONS, BASE, FRESH

    command, runs = ("python", "-m", "experiments.pictures"), []
    print(shlex.join([*command, "fresh", FRESH]))
    for name, overrides in {"base": (), **ABLATIONS}.items():
        runs.append("runs/pictures-" + re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-"))
        changes = (f"stages.pictures.steps={steps}", *BASE, *overrides)
        sets = [part for one in changes for part in ("--set", one)]
        print(shlex.join(["colada", "train", "recipes/pictures.yaml", "--out", runs[-1], *sets]))
    print(shlex.join([*command, "compare", *(f"{run}/model" for run in runs), "--grid"]))


@pictures_app.command()
def fresh(
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    model: Annotated[str | None, typer.Option(help="A text model; the bundled one if left out.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the new weights.")] = 0,
) -> None:
    """Write a text model whose DiT has learnt nothing, to start the ablation of its weights from."""
    import torch

    from colada.models.load import load_cola

    network = load_cola(model)
    network.dit.init_weights(torch.Generator().manual_seed(seed))
    network.save(out)


@pictures_app.command()
def beside(
    text: Annotated[str, typer.Argument(help="The model whose text it is to have, to the bit.")],
    pictures: Annotated[str, typer.Argument(help="The model whose weights pictures are to begin with.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    int8: Annotated[bool, typer.Option("--int8", help="Store matrices as int8, as the bundled are.")] = False,
) -> None:
    """Put the pictures of one model beside the text of another, all layers dual: to be learnt on from."""
    from colada.models.load import load_cola
    from experiments.pictures.joined import beside

    beside(load_cola(text), load_cola(pictures)).save(out, int8)


@pictures_app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Models that have pictures.")],
    count: Drawn = 200,
    grid: Grid = False,
    markdown: Markdown = False,
) -> None:
    """Measure how much several models draw right of the same captions, with guidance 3 and without."""
    from colada.models.load import load_cola
    from experiments.pictures.drawn import comparison_table

    show(comparison_table({name: load_cola(name) for name in models}, count, grid), markdown)


@pictures_app.command("sheet")
def sheet_of_scenes(
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    count: Annotated[int, typer.Option(min=1, max=1024, help="Scenes, in the order of their numbers.")] = 32,
    columns: Annotated[int, typer.Option(min=1, max=64, help="In a row.")] = 8,
    source: Annotated[str, typer.Option(help="What colada.pictures.sources opens.")] = "shapes:",
    terminal: Annotated[bool, typer.Option("--show", help="Show the first one in the terminal too.")] = False,
) -> None:
    """Draw pictures of a source on one sheet, to be looked at."""
    from colada.files import atomic_writer
    from colada.pictures.show import half_blocks, png, sheet
    from colada.pictures.sources import open_source

    opened = open_source(source)
    count = count if opened.count is None else min(count, opened.count)
    pairs = [opened.pair(number) for number in range(count)]
    with atomic_writer(out) as file:
        file.write(png(sheet([pair.picture for pair in pairs], columns), 4))
    if terminal:
        Console().print(half_blocks(pairs[0].picture), pairs[0].caption, sep="\n")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run(pictures_app, args, "python -m experiments.pictures")


if __name__ == "__main__":
    sys.exit(main())
