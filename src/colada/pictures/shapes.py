"""Pictures of simple scenes with captions: unlimited, and exactly checkable by :mod:`colada.pictures.reader`.

A scene holds one to three things, each of a colour, a shape and a size, and says of every two neighbours in
its caption where one is from the other. Everything follows from (seed, number). Places are in pixels from the
upper left corner, x to the right and y down; a picture is uint8 (32, 32, 3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colada.errors import ColadaError, nearest, shown

Picture = NDArray[np.uint8]
Floats = NDArray[np.float64]

SIZE = 32
"""Pixels of a picture's side."""
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.95, 0.80, 0.10),
}
GROUND = 0.93
"""The grey that things lie on."""
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITES)

_COLOUR_SPREAD, _GROUND_SPREAD = 0.04, 0.03
_RADII = {"small": (3.8, 4.6), "large": (6.0, 6.6)}
_GRID_RADII = {"small": (3.3, 3.6), "large": (6.0, 6.6)}
_GRID_PLACES = {"small": (4.0, 12.0, 20.0, 28.0), "large": (8.0, 16.0, 24.0)}
_GAP = 2.5
"""Least pixels between two things: with fewer, the blended edges of neighbours are read as things."""
_CLEARER = 1.0
"""Least pixels by which two things are further apart along one axis than along the other."""
_MARGIN = 1.0
"""Least pixels between a thing and the picture's edge."""
_SUPERSAMPLING = 4
_ALONE, _SIZE_NAMED, _OTHER_WORDS = 0.3, 0.5, 0.2
_TRIES = 256
"""Places that are drawn at once; a scene that none of them suits is drawn anew."""
_ARTICLES = ("one", "the")
_OTHER_RELATIONS = {
    "left of": ("to the left of", "on the left of"),
    "right of": ("to the right of", "on the right of"),
    "above": ("over",),
    "below": ("under", "beneath"),
}


class Thing(NamedTuple):
    """What a caption says of one thing; the size may be left open."""

    colour: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.shape)))


class Description(NamedTuple):
    """What a caption says: things, and how each but the last lies to the next one."""

    things: tuple[Thing, ...]
    relations: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the plainest caption that says this."""
        words = [f"a {self.things[0]}"]
        for relation, thing in zip(self.relations, self.things[1:], strict=True):
            words.append(f"{relation} a {thing}")
        return " ".join(words)


HELD_OUT: dict[str, tuple[Thing, ...]] = {
    "green triangle": (Thing("green", "triangle"),),
    "yellow circle": (Thing("yellow", "circle"),),
    "red square with blue circle": (Thing("red", "square"), Thing("blue", "circle")),
}
"""Combinations that no training scene holds, in whatever order: a scene has none, only its caption does."""


def held_out(things: Sequence[Thing]) -> str | None:
    """Return the name of a combination of :data:`HELD_OUT` that a scene's things hold, None if none."""
    pairs = {(thing.colour, thing.shape) for thing in things}
    for name, combination in HELD_OUT.items():
        if all((thing.colour, thing.shape) in pairs for thing in combination):
            return name
    return None


@dataclass(frozen=True)
class Placed:
    """A thing of a scene, where it is, and its own shade of its colour (r, g, b in 0..1)."""

    thing: Thing
    x: float
    y: float
    radius: float
    shade: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """Things on grey ground, in the order of the caption, which are held to lie as ``relations`` says."""

    placed: tuple[Placed, ...]
    ground: float

    @property
    def description(self) -> Description:
        """All of the scene, in a caption's order."""
        return describe(self.placed)

    @property
    def answer(self) -> Description:
        """All of the scene, in the order that follows from the things themselves: of colours, then shapes."""
        return canonical(self.placed)

    def picture(self) -> Picture:
        """Return the scene as drawn: edges are smooth by 4 × 4 samples a pixel."""
        pixels = np.full((SIZE, SIZE, 3), self.ground)
        for item in self.placed:
            cover = coverage(item.thing.shape, item.x, item.y, item.radius)
            pixels += cover[..., None] * (np.array(item.shade) - self.ground)
        return np.rint(pixels * 255).astype(np.uint8)


_AXIS = (np.arange(SIZE * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING


def coverage(shape: str, x: float, y: float, radius: float) -> Floats:
    """Return which part of each pixel a shape covers: float64 (32, 32) in steps of 1/16.

    With (u, v) from its centre: a circle is u² + v² <= r², a square max(|u|, |v|) <= .9 r, a triangle, with
    its apex up, -r <= v <= r and |u| <= (v + r) / 2.
    """
    u, v = _AXIS[None] - x, _AXIS[:, None] - y
    if shape == "circle":
        inside = u * u + v * v <= radius * radius
    elif shape == "square":
        inside = (np.abs(u) <= 0.9 * radius) & (np.abs(v) <= 0.9 * radius)
    else:
        inside = (np.abs(v) <= radius) & (2 * np.abs(u) <= v + radius)
    rows = inside.reshape(SIZE, _SUPERSAMPLING, -1).sum(1, dtype=np.uint8)
    return rows.reshape(SIZE, SIZE, _SUPERSAMPLING).sum(-1) / _SUPERSAMPLING**2


def relation(x: float, y: float, other_x: float, other_y: float) -> str:
    """Return where a place is from another: along the axis on which they are further apart."""
    if abs(x - other_x) > abs(y - other_y):
        return "left of" if x < other_x else "right of"
    return "above" if y < other_y else "below"


def describe(placed: Sequence[Placed]) -> Description:
    """Return what there is to say of things at places, in this order."""
    relations = tuple(relation(one.x, one.y, other.x, other.y) for one, other in pairwise(placed))
    return Description(tuple(item.thing for item in placed), relations)


def canonical(placed: Sequence[Placed]) -> Description:
    """Return what there is to say of things at places, ordered by colour, shape, size and place."""
    return describe(sorted(placed, key=lambda item: (*_order(item.thing), item.x, item.y)))


def _order(thing: Thing) -> tuple[int, int, int]:
    colours = list(COLOURS)
    return colours.index(thing.colour), SHAPES.index(thing.shape), SIZES.index(thing.size or SIZES[0])


# --- scenes from (seed, number) ----------------------------------------------------------------


class Example(NamedTuple):
    """A picture, a caption to draw it from, and the one full description that answers what is in it."""

    caption: str
    picture: Picture
    answer: str


def example(
    seed: int, number: int, things: int | None = None, unseen: bool | None = False, on_grid: bool = False
) -> Example:
    """Return example ``number`` of a seed.

    Args:
        seed: together with ``number``, all that is drawn follows from it.
        number: from 0.
        things: how many; None: one in 30% of the scenes, else two.
        unseen: whether it holds a combination of :data:`HELD_OUT`; None: either.
        on_grid: small things in the middle of an 8 × 8 patch, large ones where four patches meet.
    """
    generator = np.random.default_rng((seed, number))
    scene = _draw(generator, things, unseen, on_grid)
    return Example(_words(scene.description, generator), scene.picture(), str(scene.answer))


def _draw(generator: np.random.Generator, things: int | None, unseen: bool | None, on_grid: bool) -> Scene:
    count = things or (1 if generator.random() < _ALONE else 2)
    radii = _GRID_RADII if on_grid else _RADII
    while True:
        kinds = generator.choice(len(COLOURS) * len(SHAPES), count, replace=False)
        colours = [list(COLOURS)[kind // len(SHAPES)] for kind in kinds]
        sizes = [SIZES[n] for n in generator.integers(len(SIZES), size=count)]
        drawn = tuple(
            Thing(colour, SHAPES[kind % len(SHAPES)], size)
            for kind, colour, size in zip(kinds, colours, sizes, strict=True)
        )
        if unseen is not None and (held_out(drawn) is not None) != unseen:
            continue
        radius = np.array([generator.uniform(*radii[size]) for size in sizes])
        relations = [RELATIONS[n] for n in generator.integers(len(RELATIONS), size=count - 1)]
        places = _places(generator, sizes, radius, relations, on_grid)
        if places is not None:
            break
    shades = np.array([COLOURS[colour] for colour in colours])
    shades += generator.uniform(-_COLOUR_SPREAD, _COLOUR_SPREAD, shades.shape)
    ground = GROUND + generator.uniform(-_GROUND_SPREAD, _GROUND_SPREAD)
    placed = (
        Placed(thing, float(x), float(y), float(r), (float(shade[0]), float(shade[1]), float(shade[2])))
        for thing, (x, y), r, shade in zip(drawn, places, radius, shades, strict=True)
    )
    return Scene(tuple(placed), ground)


def _places(
    generator: np.random.Generator, sizes: list[str], radius: Floats, relations: list[str], on_grid: bool
) -> Floats | None:
    """Return places (things, 2) that are as far apart as things must be and lie as wanted, if any was drawn.

    Any two things are along one axis further apart than their radii and a gap, and clearly more than along
    the other.
    """
    if on_grid:
        axes = [generator.choice(_GRID_PLACES[size], (_TRIES, 2)) for size in sizes]
        tries = np.stack(axes, 1)
    else:
        edge = (radius + _MARGIN)[:, None]
        tries = generator.uniform(edge, SIZE - edge, (_TRIES, len(sizes), 2))
    suits = np.ones(_TRIES, bool)
    for one in range(len(sizes)):
        for other in range(one):
            apart = np.abs(tries[:, one] - tries[:, other])
            suits &= apart.max(-1) >= radius[one] + radius[other] + _GAP
            suits &= np.abs(apart[:, 0] - apart[:, 1]) >= _CLEARER
    for number in np.flatnonzero(suits):
        if [relation(*one, *other) for one, other in pairwise(tries[number])] == relations:
            return tries[number]
    return None


# --- captions ----------------------------------------------------------------------------------


def _words(description: Description, generator: np.random.Generator) -> str:
    """Return a caption: with sizes in half of all, and other articles and relations in a fifth."""
    if generator.random() >= _SIZE_NAMED:
        things = tuple(thing._replace(size=None) for thing in description.things)
        description = description._replace(things=things)
    if generator.random() >= _OTHER_WORDS:
        return str(description)
    article = _ARTICLES[generator.integers(len(_ARTICLES))]
    words = [f"{article} {description.things[0]}"]
    for name, thing in zip(description.relations, description.things[1:], strict=True):
        others = _OTHER_RELATIONS[name]
        words.append(f"{others[generator.integers(len(others))]} {article} {thing}")
    return " ".join(words)


_RELATION_WORDS = {words: name for name in RELATIONS for words in (name, *_OTHER_RELATIONS[name])}
_RELATION = re.compile("|".join(rf"\b{words}\b" for words in sorted(_RELATION_WORDS, key=len, reverse=True)))
_THING = re.compile(
    rf"(?:(?:a|{'|'.join(_ARTICLES)}) )?(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
)
VOCABULARY = frozenset(("a", *_ARTICLES, *SIZES, *COLOURS, *SHAPES)).union(
    *(words.split() for words in _RELATION_WORDS)
)
"""Every word of the captions."""


def parse(caption: str) -> Description:
    """Return what a caption says: ``[a] [size] colour shape``, then more of these, each after a relation.

    Raises:
        ColadaError: naming what is not of this form.
    """
    text = " ".join(caption.lower().split()).removesuffix(".")
    things = []
    for part in _RELATION.split(text):
        match = _THING.fullmatch(part.strip())
        if match is None:
            unknown = next((word for word in part.split() if word not in VOCABULARY), part.strip())
            raise ColadaError(
                f"caption {shown(caption)}: {shown(unknown)}{nearest(unknown, VOCABULARY)},"
                f" expected such as 'a small red circle left of a blue square'"
            )
        size, colour, shape = match.groups()
        things.append(Thing(colour, shape, size))
    relations = [_RELATION_WORDS[match.group()] for match in _RELATION.finditer(text)]
    return Description(tuple(things), tuple(relations))
