"""Bits per byte of a study's own validation text: a score that a model has before it can answer anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from colada.data.sources import read_texts
from colada.errors import ColadaError
from colada.evaluate.data import fingerprint
from colada.evaluate.texts import summarise
from colada.files import read_json_object, write_json
from colada.models.base import LanguageModel
from colada.models.likelihood import bound_settings, kind, measure
from colada.train.inputs import held_out
from colada.train.recipe import Recipe

LIKELIHOOD_FILE = "likelihood.json"
TEXTS_SEED = 0  # Of which texts: the same ones for every model.
CHARACTERS = 512  # Of a text: fewer tokens than a training row, beyond which no model knows positions.


def validation_texts(recipe: Recipe, size: int) -> list[str]:
    """Return beginnings of documents that a recipe's sources hold out, about ``size`` bytes of UTF-8.

    Each source has its weight's share of the bytes, so that the text is what is trained on. Its documents
    come in a random order, until there are as many bytes.

    Raises:
        ColadaError: for a source that cannot be read, or holds out too little.
    """
    sources = recipe.data.sources
    total = sum(source.weight for source in sources)
    chosen: list[str] = []
    for source in sources:
        texts = [
            text for text in read_texts(source, held_out(recipe, source), split="validation") if text.strip()
        ]
        Random(TEXTS_SEED).shuffle(texts)
        share = size * source.weight / total
        room = share
        for text in texts:
            if room <= 0:
                break
            chosen.append(text[:CHARACTERS])
            room -= len(chosen[-1].encode())
        if room > 0:
            raise ColadaError(
                f"{source.name} holds out {share - room:.0f} bytes of validation text, expected {share:.0f};"
                " give fewer --text-bytes (0: none)"
            )
    return chosen


def measured(model: LanguageModel, texts: Sequence[str], seed: int, directory: Path) -> dict[str, Any]:
    """Return bits per byte of some texts under a model, from ``directory/likelihood.json`` if it has them.

    Args:
        model: what :func:`~colada.models.likelihood.measure` finds of it says "kind": of AR log p(x), of the
            others a lower bound on it, so that bits per byte are at most so many.
        texts: at least one.
        seed: of a bound's randomness.
        directory: the model's own: another model's numbers would be taken for this one's.

    Raises:
        ColadaError: for a damaged file, or a disk that is full.
    """
    bound = bound_settings(model)
    made_of = {"fingerprint": fingerprint({"text": text} for text in texts), "seed": seed, "settings": bound}
    path = directory / LIKELIHOOD_FILE
    if path.is_file():
        there = read_json_object(path)
        if {name: there.get(name) for name in made_of} == made_of:
            return there
    record = summarise(measure(model, texts, seed=seed, **bound), kind(model)) | made_of
    write_json(path, record, sort=False)
    return record
