"""How varied texts are, and how clean: counted from their tokens and words, without a model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from itertools import combinations, pairwise


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case, punctuation aside."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower())


def entropy(sequence: Iterable[Hashable]) -> float:
    """Return the entropy of a sequence's unigrams in bits, of the shares as counted; 0 of an empty one."""
    counts = Counter(sequence)
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())


def ngrams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return the n-grams of a sequence, in order."""
    return [tuple(sequence[at : at + n]) for at in range(len(sequence) - n + 1)]


def distinct(sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """Return the share of different n-grams among all n-grams within sequences; 0 if there are none."""
    grams = [gram for sequence in sequences for gram in ngrams(sequence, n)]
    return len(set(grams)) / max(1, len(grams))


def repeated(texts: Iterable[Sequence[str]]) -> float:
    """Return the share of words that are the word before them once more; 0 without words."""
    pairs = [pair for text in texts for pair in pairwise(text)]
    return sum(one == other for one, other in pairs) / max(1, len(pairs))


def known(texts: Iterable[Sequence[str]], vocabulary: Collection[str]) -> float:
    """Return the share of words that are in a vocabulary; 0 without words."""
    flat = [word for text in texts for word in text]
    return sum(word in vocabulary for word in flat) / max(1, len(flat))


def overlap(samples: Iterable[Sequence[Sequence[Hashable]]], n: int = 2) -> float | None:
    """Return how alike the samples of one prompt are: of each pair, shared n-grams over those of either.

    Args:
        samples: of each prompt.
        n: words or tokens of a gram.

    Returns: the mean over all pairs of all prompts; None if no prompt has two samples.
    """
    shares = []
    for texts in samples:
        for one, other in combinations([set(ngrams(sample, n)) for sample in texts], 2):
            shares.append(len(one & other) / max(1, len(one | other)))
    return sum(shares) / len(shares) if shares else None
