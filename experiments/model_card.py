"""Measure a model on validation text: the figures and samples of its model card.

python -m experiments.model_card [MODEL] --data data/corpora --include tinystories.parquet ... prints one
JSON object. Greedy decoding and the model's own settings unless overridden with --set.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from colada import ColaDLM
from colada.data.documents import read_documents
from colada.data.listing import find_files
from colada.data.rows import StreamRows, batch
from colada.data.shards import prepare
from colada.data.sources import Source
from colada.evaluate.variety import distinct, words
from colada.flow import TimestepLaw, calibrated_loc
from colada.generate.settings import Settings, TextRequest
from colada.models.cola import load_cola
from colada.strict_yaml import parse_yaml
from colada.train.losses import encode, readable, reconstruction, rows_layout, stage2_frozen_loss
from colada.train.noise import FlowSettings, VAEWeights, draw_randomness

OPENING = "Once upon a time"
PROMPT_WORDS = 8
BATCH = 25


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
def validation_losses(model: ColaDLM, rows: StreamRows, batches: int, size: int) -> dict[str, float]:
    """Return reconstruction accuracy (of posterior means, as in generation), flow loss and log-SNR."""
    vae, weights = model.vae, VAEWeights(mask=0.0)
    settings = FlowSettings(TimestepLaw(calibrated_loc(vae.config.latent_dim)), prefix_share=0.0)
    sums = Counter[str]()
    for number in range(batches):
        numbers = range(number * size, (number + 1) * size)
        some = batch(rows, numbers)
        generators = [torch.Generator().manual_seed(row) for row in numbers]
        draws = draw_randomness(generators, vae.config, rows.length, weights, settings)
        layout = rows_layout(vae, some)
        _, right = reconstruction(vae, encode(vae, some.ids, layout).mean, some, layout)
        terms = readable(stage2_frozen_loss(vae, model.dit, some, draws, weights, model.pad_id).terms)
        sums.update(  # type: ignore[call-overload]  # it counts floats
            reconstruction_accuracy=float(right) / some.ids.numel(),
            flow_loss=terms["flow"],
            log_snr=terms["log_snr"],
        )
    return {name: value / batches for name, value in sums.items()}


def write(
    model: ColaDLM, prompts: list[str], seeds: list[int], tokens: int, settings: dict[str, Any]
) -> list[str]:
    """Return the continuations of prompts, each with its own seed."""
    requests = [
        TextRequest(prompt, tokens, cast(Settings, {**settings, "seed": seed}))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return [done.text for done in model.complete_all(requests, BATCH)]


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
    lm = load_cola(model, dtype=torch.float32)
    assert lm.tokenizer is not None
    chosen: dict[str, Any] = {
        name: parse_yaml(value, f"--set {name}") for name, _, value in (s.partition("=") for s in settings)
    }
    documents = list(read_documents(find_files(data, include)))
    train = [words(d.text) for d in documents if d.split == "train"]
    held_out = [d.text for d in documents if d.split == "validation"]
    result: dict[str, Any] = {"model": model or "bundled", "settings": {**lm.generation, **chosen}}
    if rows:
        source = Source(path=str(data), include=tuple(include))
        with tempfile.TemporaryDirectory() as cache:
            stream = prepare(source, Path(cache), lm.tokenizer, validation_share=0.02)["validation"]
            taken = StreamRows(stream, 128, seed=0)
            result |= validation_losses(lm, taken, max(1, rows // 16), min(rows, 16))

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
            "distinct2": distinct(texts, 2),
            "trigram_nats": judge.nats_per_word(texts),
        }
    result["samples"] = stories[:samples]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
