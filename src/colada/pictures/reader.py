"""What is in a picture of a scene, exactly: the measure of drawing from a caption.

True pictures of :mod:`colada.pictures.shapes` are read right, and nearly all of those that have been through
a codec. Of other pictures whatever is found is said. Nothing here is learnt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from colada.errors import ColadaError
from colada.pictures.shapes import (
    COLOURS,
    GROUND,
    SHAPES,
    SIZE,
    Description,
    Floats,
    Picture,
    Placed,
    Thing,
    canonical,
    coverage,
    describe,
)

LEAST_AREA = 14.0
"""Pixels of the smallest thing."""
MOST_ERROR = 0.5
"""Of a thing against the best template, as a share of its area."""
LARGE = 5.3
"""The least radius that is called large."""

_PALETTE = np.array([(GROUND,) * 3, *COLOURS.values()])
# A circle's area is πr², a square's (1.8 r)², a triangle's 2r² and its centroid r/3 below its centre.
_AREAS = {"circle": np.pi, "square": 3.24, "triangle": 2.0}
_CENTROID_BELOW = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}


@dataclass(frozen=True)
class Reading:
    """What was found in a picture.

    Attributes:
        placed: things, each with its place, radius and median shade.
        stray: pixels of a thing's colour that belong to none of them.
    """

    placed: tuple[Placed, ...]
    stray: int = 0

    @property
    def answer(self) -> Description | None:
        """The full description, as :attr:`colada.pictures.shapes.Scene.answer`; None of an empty picture."""
        return canonical(self.placed) if self.placed else None

    def __str__(self) -> str:
        return str(self.answer or "nothing")


def read(picture: Picture) -> Reading:
    """Return the things in a picture, uint8 (32, 32, 3).

    Pixels take the nearest colour of the palette, and neighbours of one colour make a component. How much of
    each pixel it covers is the pixel's projection on the way from the ground to the component's colour; the
    shape is the one whose template of the same area at the same centroid differs least.

    Raises:
        ColadaError: for a picture of another shape or type.
    """
    if picture.shape != (SIZE, SIZE, 3) or picture.dtype != np.uint8:
        raise ColadaError(
            f"a picture of shape {picture.shape} and type {picture.dtype}, expected uint8 ({SIZE}, {SIZE}, 3)"
        )
    pixels = picture / 255.0
    nearest = np.square(pixels[:, :, None] - _PALETTE).sum(-1).argmin(-1)
    ground = np.median(pixels[nearest == 0], 0) if (nearest == 0).any() else _PALETTE[0]
    labels = components(nearest)
    things, explained = list[Placed](), nearest == 0
    for label in np.unique(labels[nearest > 0]):
        inside = labels == label
        shade = np.median(pixels[inside], 0)
        way = shade - ground
        cover = ((pixels - ground) @ way / (way @ way)).clip(0, 1) * _grown(inside)
        area = float(cover.sum())
        if area < LEAST_AREA:
            continue
        error, shape, x, y, radius = min(_fits(cover, area))
        if error > MOST_ERROR:
            continue
        colour = list(COLOURS)[nearest[inside][0] - 1]
        thing = Thing(colour, shape, "large" if radius >= LARGE else "small")
        red, green, blue = map(float, shade)
        things.append(Placed(thing, x, y, radius, (red, green, blue)))
        explained |= coverage(shape, x, y, radius + 1) > 0  # With its blended edge.
    return Reading(tuple(things), int((~explained).sum()))


def components(colours: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return a number for each pixel, equal for those joined by neighbours (of four) of one colour but 0."""
    labels = np.arange(colours.size).reshape(colours.shape)
    down = (colours[1:] == colours[:-1]) & (colours[1:] > 0)
    right = (colours[:, 1:] == colours[:, :-1]) & (colours[:, 1:] > 0)
    while True:
        before = labels.copy()
        for along, same in ((labels, down), (labels.T, right.T)):
            # Views: what is written to them is written to the labels.
            for one, other in ((along[1:], along[:-1]), (along[:-1], along[1:])):
                np.copyto(one, np.maximum(one, other), where=same)
        if (labels == before).all():
            return labels


def _grown(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return pixels and their neighbours, of eight."""
    padded = np.pad(inside, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _fits(cover: Floats, area: float) -> list[tuple[float, str, float, float, float]]:
    """Return error, shape, x, y and radius of each shape of this area at this centroid."""
    middle = np.arange(SIZE) + 0.5
    x, y = float(cover.sum(0) @ middle / area), float(cover.sum(1) @ middle / area)
    fits = []
    for shape in SHAPES:
        radius = float(np.sqrt(area / _AREAS[shape]))
        centre = y - _CENTROID_BELOW[shape] * radius
        error = float(np.abs(coverage(shape, x, centre, radius) - cover).sum() / area)
        fits.append((error, shape, x, centre, radius))
    return fits


# --- judging -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a picture shows of what its caption says.

    Attributes:
        reasons: what is wrong, in words; none where all is right.
        count: whether there are as many things as named.
        bound: the share of named things that are there, with their colour and their shape.
        sizes: whether every named thing is there, in its size where that is named.
        relations: whether every named thing is there, and they lie as said.
        swapped: whether all named colours and all named shapes are there, but not in these pairs.
    """

    reasons: tuple[str, ...]
    count: bool
    bound: float
    sizes: bool
    relations: bool
    swapped: bool

    @property
    def right(self) -> bool:
        """Whether everything that the caption says is so, and nothing else is there."""
        return not self.reasons


def judge(picture: Picture | Reading, caption: Description) -> Verdict:
    """Return whether a picture shows what a caption says.

    Raises:
        ColadaError: for a picture that :func:`read` does not take.
    """
    reading = picture if isinstance(picture, Reading) else read(picture)
    placed, named = reading.placed, caption.things
    options: list[list[Placed | None]] = [
        [item for item in placed if item.thing[:2] == thing[:2]] or [None] for thing in named
    ]
    # Only a caption that names one colour and shape twice leaves a choice.
    choices = (_distinct(choice) for choice in product(*options))
    missing, sizes, relations = min((_wrong(caption, choice) for choice in choices), key=_count)
    count = [] if len(placed) == len(named) else [f"{len(placed)} things, expected {len(named)}"]
    stray = [] if reading.stray < LEAST_AREA else [f"{reading.stray} coloured pixels belong to nothing"]
    return Verdict(
        (*count, *missing, *sizes, *relations, *stray),
        count=not count,
        bound=1 - len(missing) / len(named),
        sizes=not missing and not sizes,
        relations=not missing and not relations,
        swapped=bool(missing) and _parts(item.thing for item in placed) == _parts(named),
    )


def _parts(things: Iterable[Thing]) -> tuple[Counter[str], Counter[str]]:
    """Return how often each colour and each shape is among things."""
    listed = list(things)
    return Counter(thing.colour for thing in listed), Counter(thing.shape for thing in listed)


_Choice = tuple[Placed | None, ...]


def _distinct(choice: _Choice) -> _Choice:
    """Return things of a picture, each only where it is named first."""
    return tuple(None if item in choice[:number] else item for number, item in enumerate(choice))


def _wrong(caption: Description, choice: _Choice) -> tuple[list[str], list[str], list[str]]:
    """Return the named things that are not there, are of another size, or lie otherwise, in words.

    Args:
        caption: what is named.
        choice: the thing of the picture that each named one is.
    """
    pairs = list(zip(caption.things, choice, strict=True))
    missing = [f"no {thing.colour} {thing.shape}" for thing, item in pairs if item is None]
    sizes = [
        f"the {item.thing.colour} {item.thing.shape} is {item.thing.size}, expected {thing.size}"
        for thing, item in pairs
        if item is not None and thing.size not in (None, item.thing.size)
    ]
    relations = []
    for named, (one, other) in zip(caption.relations, pairwise(choice), strict=True):
        if one is not None and other is not None:
            actual = describe((one, other)).relations[0]
            if actual != named:
                relations.append(f"the {one.thing} is {actual} the {other.thing}, expected {named}")
    return missing, sizes, relations


def _count(wrong: tuple[list[str], ...]) -> int:
    return sum(map(len, wrong))
