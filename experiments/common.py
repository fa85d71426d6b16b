"""What studies share: the names and numbers that their options give, their results, and a model's line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from colada.data.jsonl import read_lines
from colada.errors import ColadaError, nearest
from colada.evaluate.generative import ModelJudge, frontier, real_passages
from colada.evaluate.texts import Text, require_tokenizer
from colada.models.base import LanguageModel

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
TEMPERATURES = (0.6, 0.8, 1.0)
PROMPT_TOKENS, NEW_TOKENS = 16, 64
RESULTS = "results.jsonl"

Number = TypeVar("Number", int, float)


def read_results(out: Path) -> list[dict[str, Any]]:
    """Return the results in a study's directory; one that is half-written is not there."""
    path = out / RESULTS
    return [row for _, row in read_lines(path, unfinished=True)] if path.is_file() else []


def append_result(out: Path, row: Mapping[str, Any]) -> None:
    """Add a result to those in a study's directory."""
    with (out / RESULTS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def some_of(names: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """Return the names that ``--only`` gives, or all that are known; raises ColadaError for another."""
    for name in names or ():
        if name not in known:
            raise ColadaError(f"--only {name!r}{nearest(name, known)}, expected some of {', '.join(known)}")
    return list(dict.fromkeys(names or known))


def numbers(text: str, option: str, kind: type[Number]) -> list[Number]:
    """Return the numbers that an option gives, with commas between; raises ColadaError for others."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ColadaError(f"{option} {text!r}, expected numbers with commas between") from None


def line(
    model: LanguageModel,
    judge: LanguageModel,
    texts: Sequence[Text],
    vocabulary: set[str],
    documents: int,
    settings: Mapping[str, Any],
    guidance: Sequence[float] = GUIDANCE,
    seed: int = 0,
) -> dict[str, Any]:
    """Return a model's points, as :func:`colada.evaluate.generative.frontier`.

    One a guidance scale; of a model that has none, such as an AR model, one a temperature.
    """
    tokenizer = require_tokenizer(model, "judges read text")
    real = real_passages(tokenizer, texts, PROMPT_TOKENS, NEW_TOKENS)[:documents]
    scales: Sequence[dict[str, Any]] = [{**settings, "guidance": scale} for scale in guidance]
    if "guidance" not in model.defaults:
        scales = [{"temperature": temperature} for temperature in TEMPERATURES]
    writers = [(model, scales)]
    reader = ModelJudge(judge, tokenizer, seed=0, batch=16)
    return frontier(writers, real, reader, tokenizer, NEW_TOKENS, vocabulary=vocabulary, seed=seed)
