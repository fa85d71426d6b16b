"""Measure a model on validation text: the figures and samples of its model card.

python scripts/measure.py [MODEL] --data data/corpora --include tinystories.parquet ... prints one
JSON object. Greedy decoding and the model's own settings unless overridden with --set.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from colada import ColaDLM, load
from colada.data import Rows, find_files, read_documents, tokenize
from colada.flow import TimestepLaw, calibrated_loc
from colada.generation import block_generator
from colada.objectives import FlowSettings, VAEWeights, encode, log_snr, reconstruction, stage2_frozen_loss

OPENING = "Once upon a time"
PROMPT_WORDS = 8
BATCH = 25


def words(text: str) -> list[str]:
    """Return the words of a text, lower-case, punctuation aside."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def distinct2(texts: Iterable[Sequence[str]]) -> float:
    """Return the share of different pairs among all pairs of neighbouring words."""
    pairs = [pair for text in texts for pair in pairwise(text)]
    return len(set(pairs)) / max(1, len(pairs))


class Trigrams:
    """An interpolated word-trigram model of the training text: a cheap judge of word order."""

    def __init__(self, texts: Iterable[Sequence[str]], strength: float = 3.0) -> None:
        self.counts = [Counter[tuple[str, ...]]() for _ in range(3)]
        self.contexts = [Counter[tuple[str, ...]]() for _ in range(3)]
        self.strength = strength
        for text in texts:
            for n in range(3):
                for at in range(len(text) - n):
                    gram = tuple(text[at : at + n + 1])
                    self.counts[n][gram] += 1
                    self.contexts[n][gram[:-1]] += 1

    def nats_per_word(self, texts: Iterable[Sequence[str]]) -> float:
        """Return the mean negative log-probability of the words."""
        total, count = 0.0, 0
        for text in texts:
            for at in range(len(text)):
                p = 1 / len(self.counts[0])
                for n in range(min(at, 2) + 1):
                    gram = tuple(text[at - n : at + 1])
                    seen = self.contexts[n][gram[:-1]]
                    p = (self.counts[n][gram] + self.strength * p) / (seen + self.strength)
                total, count = total - math.log(p), count + 1
        return total / max(1, count)


@torch.inference_mode()
def validation_losses(model: ColaDLM, rows: Rows, batches: int, size: int) -> dict[str, float]:
    """Return reconstruction accuracy (of posterior means, as in generation), flow loss and log-SNR."""
    settings = FlowSettings(TimestepLaw(calibrated_loc(model.vae.config.latent_dim)), prefix_share=0.0)
    sums = Counter[str]()
    for number in range(batches):
        ids, generator = rows.batch(number, size), block_generator(0, number, 2)
        posterior = encode(model.vae, ids)
        _, accuracy = reconstruction(model.vae, posterior.mean, ids)
        loss = stage2_frozen_loss(model.vae, model.dit, ids, model.pad_id, settings, VAEWeights(), generator)
        sums.update(
            reconstruction_accuracy=float(accuracy),
            flow_loss=float(loss.terms["flow"]),
            log_snr=float(log_snr(posterior)),
        )
    return {name: value / batches for name, value in sums.items()}


def write(
    model: ColaDLM, prompts: list[str], seeds: list[int], tokens: int, settings: dict[str, Any]
) -> list[str]:
    """Return the continuations of prompts, each with its own seed."""
    texts: list[str] = []
    for at in range(0, len(prompts), BATCH):
        some = slice(at, at + BATCH)
        texts += [done.text for done in model.generate(prompts[some], tokens, seed=seeds[some], **settings)]
    return texts


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
) -> None:
    """Print the measurements as JSON."""
    lm = load(model, dtype=torch.float32)
    assert lm.tokenizer is not None
    chosen: dict[str, Any] = {
        name: yaml.safe_load(value) for name, _, value in (s.partition("=") for s in settings)
    }
    documents = list(read_documents(find_files(data, include)))
    train = [words(d.text) for d in documents if d.split == "train"]
    held_out = [d.text for d in documents if d.split == "validation"]
    stream = tokenize([d for d in documents if d.split == "validation"], lm.tokenizer)["validation"]
    result: dict[str, Any] = {"model": model or "bundled", "settings": {**lm.generation, **chosen}}
    if rows:
        result |= validation_losses(lm, Rows(stream, 128, seed=0), max(1, rows // 16), min(rows, 16))

    starts = [text.split(" ") for text in held_out[:prompts]]
    openings = [" ".join(start[:PROMPT_WORDS]) for start in starts]
    seeds = list(range(len(openings)))
    continued = [words(text) for text in write(lm, openings, seeds, tokens, chosen)]
    stories = write(lm, [OPENING] * max(prompts, samples), list(range(max(prompts, samples))), tokens, chosen)
    real = [
        words(" ".join(start[PROMPT_WORDS:]))[: len(own)]
        for start, own in zip(starts, continued, strict=True)
    ]
    known = {word for text in train for word in text}
    judge = Trigrams(train)
    for name, texts in (
        ("validation_openings", continued),
        ("once_upon_a_time", [words(text) for text in stories[:prompts]]),
        ("real_continuations", real),
    ):
        everything = [word for text in texts for word in text]
        result[name] = {
            "words": len(everything),
            "known_word_share": sum(word in known for word in everything) / max(1, len(everything)),
            "distinct2": distinct2(texts),
            "trigram_nats": judge.nats_per_word(texts),
        }
    result["samples"] = stories[:samples]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
