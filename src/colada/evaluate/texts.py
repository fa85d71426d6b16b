"""Texts to measure, and what their log-likelihoods say, however these were computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colada.checks import MOST_CHARACTERS, MOST_TOKENS, is_whole, require_count
from colada.data.documents import read_records, split_file, text_of
from colada.data.listing import find_files
from colada.errors import ColadaError, shown
from colada.evaluate.statistics import ratio_error
from colada.models.bound import LikelihoodKind, TextScore

if TYPE_CHECKING:
    from colada.text.tokenizer import Tokenizer

TRANSFORMERS = "hf:"
"""What the name of a judge from ``transformers`` begins with."""


@dataclass(frozen=True)
class Text:
    """A text, and its place: file and line or row, from 1."""

    text: str
    origin: str


def read_texts(
    files: Sequence[Path],
    field: str = "text",
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Text]:
    """Return the texts of .txt, .jsonl and .parquet files or folders, in order, of every split but test.

    White-space-only ones are left out, and counted.

    Args:
        files: files or folders.
        field: key or column of the text.
        limit: the first so many; None for all.
        say: called with a line about texts that are left out.

    Raises:
        ColadaError: naming file and line, for what cannot be read, or is longer than a prompt may be; if
            there is no text.
    """
    parts = (part for where in files for path in find_files(where) for part in split_file(path))
    records = (record for part in parts for record in read_records(part, [field], 0.0))
    texts: list[Text] = []
    blank = 0
    for record in records:
        text = text_of(record.values[0], field, record.origin)
        if not text.strip():
            blank += 1
            continue
        if len(text) > MOST_CHARACTERS:
            raise ColadaError(
                f"{record.origin}: a text of {len(text)} characters, expected at most {MOST_CHARACTERS}"
            )
        texts.append(Text(text, record.origin))
        if len(texts) == limit:
            break
    if blank:
        say(f"left out: {blank} {'text' if blank == 1 else 'texts'} of nothing but white space")
    if not texts:
        raise ColadaError(f"{', '.join(map(str, files)) or 'no file'}: no text")
    return texts


def check_lengths(prompt_tokens: Any, new_tokens: Any) -> None:
    """Check how many tokens of a text are a prompt, and how many are written after it.

    Raises:
        ColadaError: naming the value that is out of its bounds.
    """
    require_count("new_tokens", new_tokens, MOST_TOKENS)
    if not is_whole(prompt_tokens) or not 0 <= prompt_tokens <= MOST_TOKENS:
        expected = f"a whole number from 0 (no prompt) to {MOST_TOKENS}"
        raise ColadaError(f"prompt_tokens={shown(prompt_tokens)}, expected {expected}")


def summarise(scores: Sequence[TextScore], kind: LikelihoodKind) -> dict[str, Any]:
    """Return the figures of some texts, all bytes counting alike, for JSON.

    ``bits_per_byte`` is -log2 p(x) over all texts / their bytes, an upper bound where ``kind`` is "bound";
    ``standard_error`` is that of this ratio over texts, None for a single one.
    ``parts_per_token`` is in nats.
    """
    size, tokens = sum(score.bytes for score in scores), sum(score.tokens for score in scores)
    bits = [-score.log_likelihood / math.log(2) for score in scores]
    return {
        "kind": kind,
        "bits_per_byte": sum(bits) / size,
        "standard_error": ratio_error(bits, [score.bytes for score in scores]),
        "bits_per_token": sum(bits) / tokens,
        "texts": len(scores),
        "tokens": tokens,
        "bytes": size,
        "parts_per_token": {
            name: sum(score.parts[name] for score in scores) / tokens for name in scores[0].parts
        },
    }


def require_tokenizer(model: Any, why: str) -> Tokenizer:
    """Return a model's tokenizer. Raises ColadaError, saying why, if it has none."""
    if model.tokenizer is None:
        raise ColadaError(f"{model.origin or 'this model'} has no tokenizer.json, and {why}")
    tokenizer: Tokenizer = model.tokenizer
    return tokenizer
