"""Writes ``tests/data/stories.txt``, the small corpus of the tests and of ``recipes/debug.yaml``.

Every story is made from the templates below by a seeded generator, so the file
can be made again at any time: ``python tests/make_stories.py``.
"""

from __future__ import annotations

import random
from pathlib import Path

STORIES = Path(__file__).parent / "data" / "stories.txt"
COUNT = 400
SEPARATOR = "\n<|endoftext|>\n"

NAMES = ["Ada", "Bo", "Cleo", "Dan", "Edda", "Finn", "Gus", "Hana", "Ivo", "Juno"]
ANIMALS = ["cat", "dog", "owl", "hen", "fox", "goat", "mole", "newt"]
COLOURS = ["red", "blue", "green", "brown", "grey", "white"]
THINGS = ["kite", "boat", "lamp", "drum", "hat", "cup", "bell", "rope"]
PLACES = [
    "by the river",
    "under the bridge",
    "in the barn",
    "on the hill",
    "near the mill",
    "behind the shed",
]
WEATHER = ["The sun was warm.", "It rained all day.", "The wind was loud.", "Snow lay on the roof."]
FEELINGS = ["glad", "proud", "calm", "tired", "brave"]


def story(rng: random.Random) -> str:
    """Return one story: someone looks for a thing, an animal helps, and it is found."""
    name, friend = rng.sample(NAMES, 2)
    animal, colour, thing, place = (rng.choice(words) for words in (ANIMALS, COLOURS, THINGS, PLACES))
    openings = [
        f"One morning {name} lost a {colour} {thing}.",
        f"{name} had a {colour} {thing}, and now it was gone.",
        f"Where was the {colour} {thing}? {name} did not know.",
    ]
    helps = [
        f"The {animal} looked {place}, and {friend} came too.",
        f'"Look {place}," said {friend} to the {animal}.',
        f"{friend} asked the {animal}, and the {animal} ran to look {place}.",
    ]
    endings = [
        f"There was the {thing}! {name} was {rng.choice(FEELINGS)}.",
        f"They found the {colour} {thing} {place}. {name} and {friend} were {rng.choice(FEELINGS)}.",
        f'"Here is the {thing}," said {friend}. {name} felt {rng.choice(FEELINGS)}.',
    ]
    return " ".join([rng.choice(openings), rng.choice(WEATHER), rng.choice(helps), rng.choice(endings)])


def corpus() -> str:
    """Return the whole file."""
    rng = random.Random(2024)
    return SEPARATOR.join(story(rng) for _ in range(COUNT)) + "\n"


if __name__ == "__main__":
    STORIES.parent.mkdir(exist_ok=True)
    STORIES.write_text(corpus(), encoding="utf-8")
