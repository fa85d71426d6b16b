"""A recipe's pictures with captions: several sources by weight, each pair a pure function of its number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from colada.data.order import Permutation, turn_of
from colada.errors import ColadaError
from colada.pictures.shapes import SIZE
from colada.pictures.sources import Pair, PairSource, open_source
from colada.text.tokenizer import Tokenizer
from colada.train.kinds import PicturesSection
from colada.train.recipe import Recipe

LOOKED_AT = 1024
"""Scenes without end of which captions are measured."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of several sources, one split of them.

    Attributes:
        sources: with their weights.
        seed: of the order in which they come.
    """

    sources: tuple[tuple[PairSource, float], ...]
    seed: int

    def pair(self, number: int) -> Pair:
        """Return a pair by its number: of files each once before any again, of scenes never one twice."""
        which, turn = turn_of(tuple(weight for _, weight in self.sources), self.seed, number)
        source, _ = self.sources[which]
        if source.count is None:
            return source.pair(turn)
        epoch, index = divmod(turn, source.count)
        return source.pair(Permutation(source.count, self.seed, epoch)[index])

    def pairs(self, count: int) -> Iterator[Pair]:
        """Yield the first pairs; of files alone, no more than they hold, though some may come twice."""
        counts = [source.count for source, _ in self.sources]
        known = [one for one in counts if one is not None]
        most = count if len(known) < len(counts) else min(count, sum(known))
        return (self.pair(number) for number in range(most))


@dataclass(frozen=True)
class PairSplits:
    """What is trained on, and what is validated with; None where nothing is.

    Attributes:
        words: of all captions that are trained on, and of what is asked.
        digests: of each source by its name, what tells its pairs from others.
        notes: what was changed in pictures, in words.
    """

    training: Pairs
    validation: Pairs | None
    words: frozenset[str]
    digests: dict[str, str]
    notes: tuple[str, ...]


def open_pairs(recipe: Recipe) -> PairSplits | None:
    """Return a recipe's pictures, read once in a process; None where it has none.

    Raises:
        ColadaError: in one line that names what is wrong.
    """
    if not recipe.data.pictures:
        return None
    size = recipe.model.image.get("size", SIZE)
    if not isinstance(size, int):
        raise ColadaError(f"recipe: model.image.size={size!r}, expected a number of pixels")
    named = tuple((source.path, source.weight) for source in recipe.data.pictures)
    return _opened(named, size, recipe.seed, recipe.data.validation_share)


@lru_cache(maxsize=2)
def _opened(named: Sequence[tuple[str, float]], size: int, seed: int, share: float) -> PairSplits:
    opened = [(open_source(name, size, seed), weight) for name, weight in named]
    training: list[tuple[PairSource, float]] = []
    validation: list[tuple[PairSource, float]] = []
    for source, weight in opened:
        first, second = source.split(share)
        training.append((first, weight))
        if second is not None:
            validation.append((second, weight))
    return PairSplits(
        Pairs(tuple(training), seed),
        Pairs(tuple(validation), seed) if validation else None,
        frozenset[str]().union(*(source.words for source, _ in training)),
        {source.name: source.digest for source, _ in opened},
        tuple(f"{source.name}: {note}" for source, _ in opened for note in source.notes),
    )


def cut_texts(recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    """Return a line for each stage of pictures and source of them some of whose texts lose their end."""
    splits = open_pairs(recipe)
    if splits is None:
        return []
    lines = []
    for source, _ in splits.training.sources:
        count = source.count or LOOKED_AT
        texts = [(pair.caption, pair.answer) for pair in map(source.pair, range(count))]
        tokens = {text: len(tokenizer.encode(text)) for pair in texts for text in pair}
        for name, section in recipe.trained.items():
            if not isinstance(section, PicturesSection) or not section.steps:
                continue
            most, cut = section.caption_length, []
            tasks = [task for task, share in section.tasks.items() if share]
            # An answer's last token says that it ends.
            for task, what, number, room in (
                ("draw", "captions", 0, most),
                ("describe", "answers", 1, most - 1),
            ):
                longer = sum(tokens[pair[number]] > room for pair in texts)
                if longer and task in tasks:
                    cut.append(f"{longer:,} {what}")
            if cut:
                of = f"{'' if source.count else 'the first '}{count:,}"
                lines.append(
                    f"{source.name}: {' and '.join(cut)} of {of} lose their end: "
                    f"stages.{name}.caption_length={most} tokens"
                )
    return lines
