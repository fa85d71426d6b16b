"""Measure a model on validation text: the figures and samples of its model card.

python -m experiments.model_card [MODEL] --data data/corpora --include tinystories.parquet ... prints one
JSON object; with --judge, the line of its perplexity over distinct-2 too, and the points of the models
--beside it (the AR model of equal size, say). Greedy decoding and the model's own settings unless overridden
with --set.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from colada.cli.main import run
from colada.data.documents import read_documents
from colada.data.listing import find_files
from colada.data.rows import StreamRows
from colada.data.shards import prepare
from colada.data.sources import Source
from colada.evaluate.texts import Text
from colada.evaluate.variety import words
from colada.models.load import load, load_cola
from colada.strict_yaml import parse_yaml
from experiments.common import line
from experiments.quality import (
    Trigrams,
    figures,
    guesses_by_noise,
    named_child,
    pronouns,
    validation_losses,
    write,
)

OPENING = "Once upon a time"
PROMPT_WORDS = 8
CHILD_WORDS = 16
"""Words of an opening in which a girl or a boy is named."""


def main(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id; the bundled model if left out.")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of the training corpora.")] = Path("data/corpora"),
    include: Annotated[list[str], typer.Option(help="File name patterns.")] = [],  # noqa: B006
    prompts: Annotated[int, typer.Option(help="Validation documents to continue.")] = 100,
    tokens: Annotated[int, typer.Option(help="New tokens each.")] = 64,
    rows: Annotated[int, typer.Option(help="Validation rows of 128 tokens for the losses.")] = 256,
    samples: Annotated[int, typer.Option(help="Samples to show, seeds from 0.")] = 10,
    settings: Annotated[list[str], typer.Option("--set", help="Generation setting, name=value.")] = [],  # noqa: B006
    judge_model: Annotated[str | None, typer.Option("--judge", help="Whose perplexity is measured.")] = None,
    beside: Annotated[list[str], typer.Option(help="Models that the judge reads too.")] = [],  # noqa: B006
) -> None:
    """Print the measurements as JSON."""
    lm = load_cola(model, dtype=torch.float32)
    assert lm.tokenizer is not None
    chosen: dict[str, Any] = {
        name: parse_yaml(value, f"--set {name}") for name, _, value in (s.partition("=") for s in settings)
    }
    documents = list(read_documents(find_files(data, include)))
    train = [words(document.text) for document in documents if document.split == "train"]
    held_out = [document.text for document in documents if document.split == "validation"]
    result: dict[str, Any] = {"model": model or "bundled", "settings": lm.chosen(chosen)}
    if rows:
        source = Source(path=str(data), include=tuple(include))
        with tempfile.TemporaryDirectory() as cache:
            stream = prepare(source, Path(cache), lm.tokenizer, validation_share=0.02)["validation"]
            taken = StreamRows(stream, 128, seed=0)
            result |= validation_losses(lm, taken, max(1, rows // 16), min(rows, 16))
            result["guesses_by_noise"] = guesses_by_noise(lm, taken, min(rows, 24), result["settings"])

    judge, vocabulary = Trigrams(train), {word for text in train for word in text}

    def continued(openings: list[str]) -> list[list[str]]:
        return [words(text) for text in write(lm, openings, tokens, chosen)]

    def split(texts: list[str], count: int) -> tuple[list[str], list[list[str]]]:
        parts = [text.split(" ") for text in texts]
        openings = [" ".join(part[:count]) for part in parts]
        return openings, [words(" ".join(part[count:])) for part in parts]

    openings, rest = split(held_out[:prompts], PROMPT_WORDS)
    written = continued(openings)
    real = [own[: len(other)] for own, other in zip(rest, written, strict=True)]
    stories = write(lm, [OPENING] * max(prompts, samples), tokens, chosen)
    for name, texts in (
        ("validation_openings", written),
        ("once_upon_a_time", [words(text) for text in stories[:prompts]]),
        ("real_continuations", real),
    ):
        result[name] = figures(texts, judge, vocabulary)

    children = [text for text in held_out if named_child(" ".join(text.split(" ")[:CHILD_WORDS]))]
    openings, rest = split(children[:prompts], CHILD_WORDS)
    written = continued(openings)
    real = [own[: len(other)] for own, other in zip(rest, written, strict=True)]
    result["pronouns"] = {"generated": pronouns(openings, written), "real": pronouns(openings, real)}
    if judge_model is not None:
        reader = load(judge_model)
        documents_read = [Text(text, str(number)) for number, text in enumerate(held_out)]
        points, real_point = list[dict[str, Any]](), dict[str, Any]()
        for own in (lm, *map(load, beside)):
            found = line(own, reader, documents_read, vocabulary, prompts, chosen if own is lm else {})
            points += found["points"]
            real_point = real_point or found["real"]
        result["frontier"] = {
            "judge": judge_model,
            "real": _bare(real_point),
            "points": [_bare(point) for point in points],
        }
    result["samples"] = stories[:samples]
    print(json.dumps(result, indent=2))


def _bare(point: dict[str, Any]) -> dict[str, Any]:
    """Return a point's figures, without its texts."""
    return {name: value for name, value in point.items() if name != "records"}


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    sys.exit(run(app, None, "python -m experiments.model_card"))
