"""What a model draws of captions and says of pictures, measured by the exact reader."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from colada.errors import ColadaError
from colada.models.cola import ColaDLM
from colada.pictures.reader import Verdict, judge, read
from colada.pictures.shapes import COLOURS, HELD_OUT, Description, Example, Picture, example, held_out, parse
from colada.pictures.sources import PictureFiles
from colada.report.style import GREEN, RED
from colada.report.table import Table
from experiments.pictures import twemoji
from experiments.pictures.measures import TEST, VALIDATION, scenes, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GUIDANCE, STEPS = (1.0, 2.0, 3.0, 5.0), (1, 2, 4, 8, 16, 24)
SEEDS = 16
"""Drawings of a caption, whose differences are its diversity."""
FRESH = "runs/pictures-fresh"
ABLATIONS: dict[str, Sequence[str]] = {
    "fresh DiT": [f"model.init={FRESH}"],
    "codec 64 × 24": ["model.image={patch: 4, channels: 24}"],
    "codec, whitening 0": ["model.image={patch: 8, whitening: 0}"],
    "codec, whitening 1": ["model.image={patch: 8, whitening: 1}"],
    "dual stream, 2 layers": ["stages.pictures.dual_layers=2"],
    "dual stream, text as it was": ["stages.pictures.dual_layers=6", "stages.pictures.train=pictures"],
    "no axial positions": ["stages.pictures.axial=false"],
    "picture_loc 1.7": ["stages.pictures.picture_loc=1.7"],
    "picture_loc 2.7": ["stages.pictures.picture_loc=2.7"],
    "no caption dropout": ["stages.pictures.caption_dropout=0"],
    "caption dropout 0.2": ["stages.pictures.caption_dropout=0.2"],
    "no text beside pictures": ["stages.pictures.caption_weight=0"],
    "errors of z0": ["stages.pictures.space=z0"],
}
"""What is changed in :data:`BASE`."""
BASE = [
    "stages.pictures.tasks={draw: 1}",
    "data.pictures=[{path: 'shapes:grid'}]",
    "stages.pictures.dual_layers=0",
    "stages.pictures.train=all",
]
"""What all of them change in ``recipes/pictures.yaml``: drawing alone, on the patch grid, single stream."""


def seen(count: int, things: int | None = None, grid: bool = False, first: int = TEST) -> list[Example]:
    """Return scenes that no training draws, of combinations that it does."""
    return scenes(count, things, False, grid, first)


def of_held_out(name: str, count: int, grid: bool = False) -> list[Example]:
    """Return scenes that hold one combination that no training scene has."""
    found: list[Example] = []
    number = 0
    while len(found) < count:
        one = example(1, TEST + number, None, True, grid)
        if held_out(parse(one.answer).things) == name:
            found.append(one)
        number += 1
    return found


# --- drawing -----------------------------------------------------------------------------------


def verdicts(drawn: Sequence[Picture], examples: Sequence[Example]) -> list[Verdict]:
    """Return what drawings show of the captions they were drawn from."""
    return [judge(picture, parse(one.caption)) for picture, one in zip(drawn, examples, strict=True)]


def colour_or_shape(drawn: Picture, one: Example) -> tuple[bool, bool]:
    """Return whether a named colour is nowhere, and else whether one is there in another shape than named."""
    named, there = parse(one.caption).things, [item.thing for item in read(drawn).placed]
    nowhere = bool({thing.colour for thing in named} - {thing.colour for thing in there})
    pairs = {thing[:2] for thing in named} - {thing[:2] for thing in there}
    return nowhere, bool(pairs) and not nowhere


def colour_error(drawn: Sequence[Picture], examples: Sequence[Example]) -> float:
    """Return the mean distance of the shades of right drawings from their palette's, a channel in 0..1."""
    errors = []
    for picture, verdict in zip(drawn, verdicts(drawn, examples), strict=True):
        if verdict.right:
            for item in read(picture).placed:
                errors.append(np.abs(np.subtract(item.shade, COLOURS[item.thing.colour])).mean())
    return float(np.mean(errors)) if errors else float("nan")


def drawing_row(table: Table, name: str, drawn: Sequence[Picture], examples: Sequence[Example]) -> None:
    """Add what drawings show, in parts, so that what is bound wrongly is told from what is missing."""
    judged = verdicts(drawn, examples)
    parts = (
        sum(verdict.right for verdict in judged),
        sum(verdict.count for verdict in judged),
        sum(verdict.bound == 1 for verdict in judged),
        sum(verdict.sizes for verdict in judged),
        sum(verdict.relations for verdict in judged),
        *map(sum, zip(*map(colour_or_shape, drawn, examples), strict=True)),
        sum(verdict.swapped for verdict in judged),
    )
    table.row(name, *(share(part, len(judged)) for part in parts), f"{colour_error(drawn, examples):.3f}")


DRAWN = ["captions", "right", "count", "all things", "sizes", "relations"]
DRAWN += ["colour missing", "shape wrong", "swapped", "colour error"]


def drawing_table(model: ColaDLM, count: int, grid: bool, settings: Mapping[str, Any]) -> Table:
    """Return how much of captions is drawn right, seeds in order: seen combinations, and those held out."""
    table, rare = Table(DRAWN), max(10, 3 * count // 10)
    sets = {f"{n} thing{'s' * (n > 1)}": seen(count, n, grid) for n in (1, 2)}
    sets = {"1 or 2 things": seen(count, grid=grid), **sets, "3 things": seen(rare, 3, grid)}
    sets |= {f"unseen: {name}": of_held_out(name, rare, grid) for name in HELD_OUT}
    unseen: tuple[list[Picture], list[Example]] = [], []
    for name, examples in sets.items():
        drawn = model.draw([one.caption for one in examples], seed=0, **settings)
        drawing_row(table, name, drawn, examples)
        if name.startswith("unseen"):
            unseen[0].extend(drawn)
            unseen[1].extend(examples)
    drawing_row(table, "unseen: all", *unseen)
    others = seen(count, grid=grid)
    shuffled = [judge(read(one.picture), parse(others[n - 1].caption)).right for n, one in enumerate(others)]
    table.row("chance: another's caption", share(sum(shuffled), count), *[""] * 8)
    return table


def comparison_table(models: Mapping[str, ColaDLM], count: int, grid: bool) -> Table:
    """Return how much models draw right of the same captions, seeds in order, with guidance and without."""
    table, examples = Table(DRAWN), seen(count, grid=grid)
    for name, model in models.items():
        for guidance in (1.0, 3.0):
            drawn = model.draw([one.caption for one in examples], seed=0, guidance=guidance)
            drawing_row(table, f"{name}, guidance {guidance:g}", drawn, examples)
    return table


def gallery(model: ColaDLM, count: int, columns: int, grid: bool, settings: Mapping[str, Any]) -> Figure:
    """Return drawings of the first captions, each with its caption and what is wrong with it."""
    from matplotlib.figure import Figure

    examples = seen(count, grid=grid)
    drawn = model.draw([one.caption for one in examples], seed=0, **settings)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(1.9 * columns, 2.45 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for place in places:
        place.set_axis_off()
    for place, picture, verdict, one in zip(places, drawn, verdicts(drawn, examples), examples, strict=False):
        place.imshow(picture, interpolation="nearest")
        place.set_title(textwrap.fill(one.caption, 30), fontsize=7, fontweight="normal", loc="center")
        said = "right" if verdict.right else textwrap.fill(", ".join(verdict.reasons), 32)
        colour = GREEN if verdict.right else RED
        place.text(
            0.5, -0.04, said, transform=place.transAxes, ha="center", va="top", fontsize=7, color=colour
        )
    return figure


def sweep_table(model: ColaDLM, count: int, grid: bool) -> Table:
    """Return the share drawn right by guidance and steps, of other captions than those of other tables."""
    examples = seen(count, grid=grid, first=VALIDATION)
    table = Table(["guidance", *(f"{steps} steps" for steps in STEPS)])
    for guidance in GUIDANCE:
        cells = []
        for steps in STEPS:
            drawn = model.draw([one.caption for one in examples], seed=0, guidance=guidance, steps=steps)
            cells.append(share(sum(one.right for one in verdicts(drawn, examples)), count))
        table.row(f"{guidance:g}", *cells)
    return table


def spread(pictures: Sequence[Picture]) -> float:
    """Return the mean root mean square difference of two of some pictures, in 0..1."""
    pairs = combinations([picture / 255.0 for picture in pictures], 2)
    return float(np.mean([np.sqrt(np.square(one - other).mean()) for one, other in pairs]))


def diversity_table(model: ColaDLM, count: int, grid: bool, settings: Mapping[str, Any]) -> Table:
    """Return how much right drawings of one caption differ, and how much true pictures of it do."""
    table = Table(["", "captions", "right", "spread of right drawings", "spread of true pictures"])
    for things in (1, 2):
        right, drawn_spread, true_spread = 0, list[float](), list[float]()
        for number, one in enumerate(seen(count, things, grid)):
            drawn = model.draw([one.caption] * SEEDS, seed=SEEDS * number, **settings)
            good = [picture for picture in drawn if judge(picture, parse(one.caption)).right]
            right += len(good)
            if len(good) > 1:
                drawn_spread.append(spread(good))
                true_spread.append(spread([item.picture for item in _alike(one, SEEDS, grid)]))
        values = (f"{np.mean(values):.3f}" if values else "" for values in (drawn_spread, true_spread))
        name = f"{things} thing{'s' * (things > 1)}, {SEEDS} seeds"
        table.row(name, f"{count}", share(right, SEEDS * count), *values)
    return table


def _alike(scene: Example, count: int, grid: bool) -> Iterator[Example]:
    """Yield true scenes of what a scene's caption says."""
    caption, number = parse(scene.caption), 0
    named = sorted(thing[:2] for thing in caption.things)
    while count:
        one = example(2, TEST + number, len(caption.things), None, grid)
        number += 1
        things = sorted(thing[:2] for thing in parse(one.answer).things)
        if things == named and judge(read(one.picture), caption).right:
            count -= 1
            yield one


# --- describing --------------------------------------------------------------------------------


def said(text: str) -> Description | None:
    """Return what an answer says; None for what is no description."""
    try:
        return parse(text)
    except ColadaError:
        return None


def describing_table(model: ColaDLM, count: int, grid: bool, settings: Mapping[str, Any]) -> Table:
    """Return how often answers are the one full description, name all things, and tell where they are."""
    examples = seen(count, grid=grid)
    answers = model.describe([one.picture for one in examples], seed=0, **settings)
    exact = things = relations = pairs = 0
    for one, answer in zip(examples, answers, strict=True):
        true, told = parse(one.answer), said(answer.text)
        exact += answer.text.strip() == one.answer
        things += told is not None and sorted(map(str, told.things)) == sorted(map(str, true.things))
        if len(true.things) == 2:
            pairs += 1
            relations += told == true
    table = Table(["pictures", "exact", "all things", "things and relation, of two"])
    table.row(f"{count:,}", share(exact, count), share(things, count), share(relations, max(1, pairs)))
    # Whoever says the same of every picture is right this often; of four relations one.
    ((_, commonest),) = Counter(one.answer for one in examples).most_common(1)
    return table.row("chance: always the commonest", share(commonest, count), "", "")


def round_trip_table(model: ColaDLM, count: int, grid: bool, settings: Mapping[str, Any]) -> Table:
    """Return how often what is drawn of a full description, with some settings, is described as that."""
    examples = seen(count, grid=grid)
    drawn = model.draw([one.answer for one in examples], seed=0, **settings)
    answers = model.describe(drawn, seed=0)
    same = sum(answer.text.strip() == one.answer for one, answer in zip(examples, answers, strict=True))
    return Table(["captions", "described as drawn"]).row(f"{count:,}", share(same, count))


# --- Twemoji -----------------------------------------------------------------------------------


@torch.no_grad()
def retrieval_table(model: ColaDLM, source: PictureFiles) -> Table:
    """Return how often the named picture is the nearest of all to what is drawn of its name.

    And how often a picture that is moved, as no training has seen it, is told its name.
    """
    codec = model.codec()
    drawn = torch.from_numpy(np.stack(model.draw(list(source.captions), seed=0)))
    kept = codec.pixels_of(codec.encode(torch.from_numpy(source.pictures))).numpy()
    rank = twemoji.ranks(codec.pixels_of(codec.encode(drawn)).numpy(), range(source.count), kept)
    generator = np.random.default_rng(0)
    moved = [twemoji.moved(picture, generator) for picture in source.pictures]
    told = [
        [answer.text.strip() for answer in model.describe(list(pictures), seed=0)]
        for pictures in (source.pictures, moved)
    ]
    table = Table(["names", "drawn: top 1", "top 5", "chance", "described", "described, moved"])
    shares = (share(int((rank < most).sum()), source.count) for most in (1, 5))
    named = (sum(map(str.__eq__, names, source.captions)) for names in told)
    exact = (share(right, source.count) for right in named)
    return table.row(f"{source.count:,}", *shares, f"1 in {source.count}", *exact)
