"""The study of docs/LOG.md: single changes to a base recipe, each with several seeds.

python -m experiments.ablations run recipes/study.yaml --out runs/study    train what is missing, measure it
python -m experiments.ablations table runs/study                           a table: means and standard errors

Two variants differ from the base in one thing, except where their names say more. A variant is measured on
continuations of validation documents: the share of its words that occur in the training text, distinct-2, and
the cross-entropy of a word-trigram model of the training text, beside those of the real continuations.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from colada.cli.main import run as run_app
from colada.data.documents import read_documents
from colada.data.listing import find_files
from colada.data.sources import read_texts
from colada.evaluate.variety import words
from colada.models.load import load_cola
from colada.report.table import Table
from colada.train.display import Display
from colada.train.recipe import Recipe, load_recipe
from colada.train.trainer import Trainer
from experiments.common import append_result, read_results, some_of
from experiments.quality import Trigrams, figures, write

NARROW, SHIFTED = "model.vae.latent_dim=16", "stages.prior.loc=1.6931"
VELOCITY = "model.dit.prediction=velocity"
VARIANTS: dict[str, list[str]] = {
    "base: width 64, shift, z0, frozen, block 4": [],
    "no timestep shift": ["stages.prior.loc=1.0"],
    "width 16 (no shift)": [NARROW],
    "width 16, with the shift of 64": [NARROW, SHIFTED],
    "velocity": [VELOCITY],
    "width 16, velocity": [NARROW, VELOCITY],
    "joint Text VAE": ["stages.prior.kind=joint", "stages.prior.vae_lr=0.1"],
    "block 16": ["model.vae.block_size=16"],
}
GUIDANCE = (1.0, 3.0, 7.0)
PROMPTS, PROMPT_WORDS, NEW_TOKENS, REAL_WORDS = 64, 8, 60, 45

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    recipe: Path,
    out: Annotated[Path, typer.Option(help="Directory of all runs.")] = Path("runs/study"),
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Variants by name; all if left out.")] = None,
) -> None:
    """Train and measure every variant with every seed; what is in the results already is left out."""
    names, base = some_of(only, VARIANTS), load_recipe(recipe)
    text = [words(text) for source in base.data.sources for text in read_texts(source, 0.02)]
    judge, known = Trigrams(text), {word for own in text for word in own}
    held_out = [own for own in _validation(base) if len(own.split()) > PROMPT_WORDS + REAL_WORDS][:PROMPTS]
    prompts = [" ".join(own.split()[:PROMPT_WORDS]) for own in held_out]
    real = [words(" ".join(own.split()[PROMPT_WORDS : PROMPT_WORDS + REAL_WORDS])) for own in held_out]

    out.mkdir(parents=True, exist_ok=True)
    done = {(row["variant"], row["seed"]) for row in read_results(out)}
    for seed in range(seeds):
        for variant in names:
            if (variant, seed) in done:
                continue
            directory = out / f"{folder(variant)}-{seed}"
            made = load_recipe(recipe, [f"seed={seed}", *VARIANTS[variant]])
            Trainer(made, directory, Display(Console(stderr=True))).run()
            model = load_cola(directory / "model")
            for guidance in GUIDANCE:
                texts = write(model, prompts, NEW_TOKENS, {"guidance": guidance}, 1000 * seed)
                quality = figures([words(text) for text in texts], judge, known)
                append_result(out, {"variant": variant, "seed": seed, "guidance": guidance, **quality})
    append_result(
        out,
        {"variant": "real continuations", "seed": 0, "guidance": None, **figures(real, judge, known)},
    )


def folder(variant: str) -> str:
    """Return a variant's name as one of a directory: variants before it may come and go."""
    return re.sub("[^a-z0-9]+", "-", variant.lower()).strip("-")


def _validation(recipe: Recipe) -> list[str]:
    """Return the validation documents of a recipe's files."""
    places = [(Path(source.path), source.include) for source in recipe.data.sources if source.path]
    files = [path for where, include in places for path in find_files(where, include)]
    return [document.text for document in read_documents(files) if document.split == "validation"]


@app.command()
def table(out: Path) -> None:
    """Print the results as a Markdown table: mean ± standard error over seeds."""
    by = defaultdict(list)
    for row in read_results(out):
        by[row["variant"], row["guidance"]].append(row)
    shown = Table(("variant", "guidance", "seeds", "known words, %", "distinct-2", "trigram nats"))
    for (variant, guidance), rows in by.items():
        cells = []
        for name, factor, digits in (("known", 100, 1), ("distinct2", 1, 3), ("trigram", 1, 3)):
            mean, error = (factor * value for value in _mean([row[name] for row in rows]))
            cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
        shown.row(variant, str(guidance or ""), str(len(rows)), *cells)
    print(shown.markdown())


def _mean(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


if __name__ == "__main__":
    sys.exit(run_app(app, None, "python -m experiments.ablations"))
