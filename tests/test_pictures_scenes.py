"""Scenes, their captions and the reader: every true picture is read right, and what is wrong is said."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from colada.errors import ColadaError
from colada.pictures import reader, shapes
from colada.pictures.reader import judge, read
from colada.pictures.shapes import (
    COLOURS,
    HELD_OUT,
    OPPOSITES,
    SHAPES,
    SIZE,
    Description,
    Picture,
    Placed,
    Scene,
    Thing,
    example,
    held_out,
    parse,
)

MANY = 300
"""Scenes of a test; the documentation has 1,500 of each kind."""


def draw_scene(
    seed: int, number: int, things: int | None = None, unseen: bool | None = False, on_grid: bool = False
) -> Scene:
    """The scene of an example, with its things' places."""
    return shapes._draw(np.random.default_rng((seed, number)), things, unseen, on_grid)


def scene_of(*placed: tuple[str, float, float, float]) -> Scene:
    """A scene of things in their pure colours: words, x, y, radius."""
    items = []
    for words, x, y, radius in placed:
        (thing,) = parse(words).things
        items.append(Placed(thing, x, y, radius, COLOURS[thing.colour]))
    return Scene(tuple(items), shapes.GROUND)


def reading(*placed: tuple[str, float, float, float]) -> reader.Reading:
    return reader.Reading(scene_of(*placed).placed)


# --- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_of_each_pixel_what_its_samples_say_one_by_one(shape: str) -> None:
    x, y, r = 13.37, 17.71, 5.9
    inside = {
        "circle": lambda u, v: math.hypot(u, v) <= r,
        "square": lambda u, v: max(abs(u), abs(v)) <= 0.9 * r,
        "triangle": lambda u, v: -r <= v <= r and abs(u) <= (v + r) / 2,
    }[shape]
    expected = np.zeros((SIZE, SIZE))
    for row in range(SIZE):
        for column in range(SIZE):
            for i in range(4):
                for j in range(4):
                    u, v = column + (i + 0.5) / 4 - x, row + (j + 0.5) / 4 - y
                    expected[row, column] += inside(u, v) / 16
    np.testing.assert_array_equal(shapes.coverage(shape, x, y, r), expected)


def test_a_picture_is_ground_and_things_blended_at_their_edges() -> None:
    scene = scene_of(
        ("small red square", 10.0, 20.0, 40 / 9)
    )  # From 6 to 14, and from 16 to 24: whole pixels.
    expected = np.full((SIZE, SIZE, 3), round(255 * 0.93))
    expected[16:24, 6:14] = np.rint(255 * np.array(COLOURS["red"]))
    np.testing.assert_array_equal(scene.picture(), expected)
    blended = scene_of(("small red square", 10.5, 20.0, 40 / 9)).picture()
    half = 255 * (np.array(COLOURS["red"]) + 0.93) / 2
    np.testing.assert_allclose(blended[20, 6], half, atol=0.51)


def test_everything_follows_from_seed_and_number() -> None:
    one, same, other = (example(seed, 5) for seed in (3, 3, 4))
    assert (one.caption, one.answer) == (same.caption, same.answer)
    np.testing.assert_array_equal(one.picture, same.picture)
    assert any(example(3, n).answer != example(4, n).answer for n in range(5)), other


@pytest.mark.parametrize("on_grid", [False, True])
@pytest.mark.parametrize("things", [None, 3])
def test_things_keep_their_distance_and_lie_as_the_caption_says(things: int | None, on_grid: bool) -> None:
    for number in range(100):
        scene = draw_scene(0, number, things, on_grid=on_grid)
        assert len(scene.placed) == (things or len(scene.placed))
        for item in scene.placed:
            assert item.radius + 1 <= min(item.x, item.y, SIZE - item.x, SIZE - item.y) or on_grid
            if on_grid:
                assert item.x % 8 == item.y % 8 == (4 if item.thing.size == "small" else 0)
        pairs = [(a, b) for n, a in enumerate(scene.placed) for b in scene.placed[:n]]
        for one, other in pairs:
            along, across = sorted((abs(one.x - other.x), abs(one.y - other.y)), reverse=True)
            assert along >= one.radius + other.radius + 2.5
            assert along >= across + 1
        for relation, (one, other) in zip(scene.description.relations, pairwise(scene.placed), strict=True):
            signs = {
                "left of": other.x - one.x,
                "right of": one.x - other.x,
                "above": other.y - one.y,
                "below": one.y - other.y,
            }
            assert signs[relation] == max(signs.values())


def test_shares_are_as_documented() -> None:
    examples = [example(7, number) for number in range(1000)]
    alone = sum(len(parse(item.caption).things) == 1 for item in examples)
    sized = sum(parse(item.caption).things[0].size is not None for item in examples)
    plain = sum(str(parse(item.caption)) == item.caption for item in examples)
    for count, share in ((alone, 0.3), (sized, 0.5), (plain, 0.8)):
        assert abs(count - 1000 * share) < 4 * math.sqrt(1000 * share * (1 - share))


# --- captions ----------------------------------------------------------------------------------


def test_a_caption_says_what_the_scene_holds_and_is_understood_again() -> None:
    synonyms = set()
    for number in range(MANY):
        item = example(1, number)
        scene = draw_scene(1, number)
        said, full = parse(item.caption), scene.description
        assert said.relations == full.relations
        for thing, named in zip(full.things, said.things, strict=True):
            assert named in (thing, thing._replace(size=None))
        assert item.answer == str(parse(item.answer)) == str(scene.answer)
        synonyms |= set(item.caption.split())
    assert synonyms == set(shapes.VOCABULARY)


def test_the_answer_does_not_depend_on_the_caption_s_order() -> None:
    scene = scene_of(("small blue circle", 24.0, 10.0, 4.0), ("large red square", 8.0, 12.0, 6.3))
    assert str(scene.description) == "a small blue circle right of a large red square"
    assert str(scene.answer) == "a large red square left of a small blue circle"
    assert scene.answer.relations[0] == OPPOSITES[scene.description.relations[0]]
    turned = Scene(scene.placed[::-1], scene.ground)
    assert turned.answer == scene.answer


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a red circle", Description((Thing("red", "circle"),))),
        ("  The LARGE green   square. ", Description((Thing("green", "square", "large"),))),
        (
            "red circle under one small blue triangle to the left of a red square",
            Description(
                (Thing("red", "circle"), Thing("blue", "triangle", "small"), Thing("red", "square")),
                ("below", "left of"),
            ),
        ),
    ],
)
def test_captions_of_the_grammar(caption: str, said: Description) -> None:
    assert parse(caption) == said


@pytest.mark.parametrize(
    ("caption", "part"),
    [
        ("a red circel", "'circel' (did you mean 'circle'?)"),
        ("a purple circle", "'purple'"),
        ("a circle red", "'a circle red'"),
        ("a red circle left of", "''"),
        ("", "''"),
        ("a red circle a blue square", "'a red circle a blue square'"),
    ],
)
def test_other_captions_are_refused_by_word(caption: str, part: str) -> None:
    with pytest.raises(ColadaError) as caught:
        parse(caption)
    assert part in str(caught.value)
    assert "expected such as" in str(caught.value)


# --- what training never sees ------------------------------------------------------------------


def test_training_scenes_hold_no_held_out_combination_and_all_others() -> None:
    seen, together = set(), set()
    for number in range(2000):
        pairs = frozenset((item.thing.colour, item.thing.shape) for item in draw_scene(0, number).placed)
        seen |= pairs
        together.add(pairs)
    assert ("green", "triangle") not in seen
    assert ("yellow", "circle") not in seen
    assert len(seen) == 10
    assert frozenset({("red", "square"), ("blue", "circle")}) not in together
    # Of pairs of ten kinds in all, one is held out; nearly all of the others come.
    assert sum(len(pairs) == 2 for pairs in together) > 40


def test_unseen_scenes_hold_one_each_and_every_one_comes() -> None:
    names = {held_out([item.thing for item in draw_scene(0, n, unseen=True).placed]) for n in range(100)}
    assert names == set(HELD_OUT)


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("things", "on_grid", "count"),
    [(None, False, 1500), (None, True, MANY), (3, False, MANY), (3, True, MANY)],
)
def test_true_pictures_are_read_right(things: int | None, on_grid: bool, count: int) -> None:
    for number in range(count):
        item = example(2, number, things, unseen=None, on_grid=on_grid)
        found = read(item.picture)
        assert str(found) == item.answer
        assert found.stray == 0
        assert judge(found, parse(item.caption)).right
        for one, other in zip(
            sorted(found.placed, key=lambda item: item.thing),
            sorted(draw_scene(2, number, things, None, on_grid).placed, key=lambda item: item.thing),
            strict=True,
        ):
            assert math.dist((one.x, one.y), (other.x, other.y)) < 0.3
            assert abs(one.radius - other.radius) < 0.3
            # Half of a small triangle's pixels are edges.
            most = 0.08 if one.thing.shape == "triangle" else 0.01
            assert np.abs(np.subtract(one.shade, other.shade)).max() < most


def test_chance_is_below_one_in_fifty() -> None:
    examples = [example(3, number) for number in range(MANY)]
    readings = [read(item.picture) for item in examples]
    captions = [parse(item.caption) for item in examples]
    right = [
        judge(readings[n], captions[(n + shift) % MANY]).right for shift in (1, 2, 3) for n in range(MANY)
    ]
    assert 0 < sum(right) < 0.02 * len(right)


def test_a_verdict_tells_what_is_wrong() -> None:
    found = reading(("small red circle", 8.0, 8.0, 4.0), ("large blue square", 24.0, 9.0, 6.3))
    cases: list[tuple[str, tuple[str, ...]]] = [
        ("a red circle left of a blue square", ()),
        ("a blue square right of a red circle", ()),
        ("a red circle", ("2 things, expected 1",)),
        ("a small red circle left of a small blue square", ("the blue square is large, expected small",)),
        (
            "a red circle above a blue square",
            ("the small red circle is left of the large blue square, expected above",),
        ),
        ("a red circle left of a blue circle", ("no blue circle",)),
        ("a green circle", ("2 things, expected 1", "no green circle")),
    ]
    for caption, reasons in cases:
        verdict = judge(found, parse(caption))
        assert verdict.reasons == reasons
        assert verdict.right == (not reasons)
    swapped = judge(found, parse("a blue circle left of a red square"))
    assert swapped.swapped
    assert swapped.count
    assert swapped.bound == 0
    assert not swapped.sizes
    assert not swapped.relations
    half = judge(found, parse("a red circle left of a green square"))
    assert half.bound == 0.5
    assert not half.swapped


def test_things_that_are_named_alike_are_told_apart_by_size_and_place() -> None:
    found = reading(("small red circle", 24.0, 8.0, 4.0), ("large red circle", 8.0, 8.0, 6.3))
    assert judge(found, parse("a red circle left of a red circle")).right
    assert judge(found, parse("a large red circle left of a small red circle")).right
    assert judge(found, parse("a small red circle right of a large red circle")).right
    assert not judge(found, parse("a small red circle left of a large red circle")).right
    assert judge(
        reading(("small red circle", 8.0, 8.0, 4.0)), parse("red circle left of red circle")
    ).reasons == (
        "1 things, expected 2",
        "no red circle",
    )


def blank() -> Picture:
    return np.full((SIZE, SIZE, 3), 237, np.uint8)


def test_pictures_of_nothing_and_of_no_shape() -> None:
    assert str(read(blank())) == "nothing"
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    verdict = judge(noise, parse("a red circle"))
    # Among so many patches some are a small red circle.
    assert verdict.bound == 1
    assert not verdict.right
    assert verdict.reasons[-1].endswith("coloured pixels belong to nothing")
    stripe = blank()
    stripe[15:17] = np.rint(255 * np.array(COLOURS["blue"]))
    found = read(stripe)
    assert found.placed == ()
    assert found.stray == 64
    full = np.zeros_like(blank())
    full[:] = np.rint(255 * np.array(COLOURS["red"]))
    assert not judge(full, parse("a green circle")).right


def test_components_are_joined_by_sides_not_by_corners() -> None:
    colours = np.array([[1, 1, 0, 2], [0, 1, 0, 2], [1, 0, 1, 1], [1, 1, 1, 0]])
    labels = reader.components(colours)
    parts = {frozenset(map(tuple, np.argwhere(labels == label))) for label in np.unique(labels[colours > 0])}
    assert parts == {
        frozenset({(0, 0), (0, 1), (1, 1)}),
        frozenset({(0, 3), (1, 3)}),
        frozenset({(2, 0), (3, 0), (3, 1), (3, 2), (2, 2), (2, 3)}),
    }


@pytest.mark.parametrize(
    "picture", [np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3)), np.zeros((8, 8, 3), "u1")]
)
def test_what_is_no_picture_of_a_scene_is_refused(picture: Picture) -> None:
    with pytest.raises(ColadaError, match=r"expected uint8 \(32, 32, 3\)"):
        read(picture)
