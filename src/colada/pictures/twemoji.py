"""The Twemoji: small pictures of things with names, and how well drawings of them are told apart.

They are in the npm package of ``npm pack emoji-datasource-twitter@16.0.0``, which is read packed or unpacked.
There is no test on unseen names: each has one picture.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colada.errors import ColadaError, reason
from colada.files import open_file, parse_json, require_file
from colada.pictures.load import Loaded, decode_picture
from colada.pictures.shapes import Picture

CREDIT = "Emoji graphics by Twitter, Inc and other contributors (Twemoji), CC BY 4.0"
"""What must stand beside them, and in the card of a model that was trained on them."""
CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects")
"""Of those whose names say what is to be seen."""
_NAMES, _PICTURES = "emoji.json", "img/twitter/64"


def read_twemoji(place: Path, size: int) -> tuple[list[str], list[Loaded]]:
    """Return names, in lower case, and pictures of the Twemoji of :data:`CATEGORIES`, in the package's order.

    Args:
        place: the npm package: ``.tgz``, or the folder that holds emoji.json.
        size: pixels of a picture's side.

    Raises:
        ColadaError: for what is no such package.
    """
    files = _read_folder(place) if place.is_dir() else _read_package(place)
    where = f"{place}: {_NAMES}"
    try:
        entries = [
            (str(entry["name"]).lower(), str(entry["image"]))
            for entry in parse_json(files(_NAMES), where)
            if entry["category"] in CATEGORIES
        ]
    except (TypeError, KeyError) as error:
        raise ColadaError(f"{where} is no list of emoji ({reason(error)})") from None
    if not entries:
        raise ColadaError(f"{where} has no emoji of {', '.join(CATEGORIES)}")
    pictures = [
        decode_picture(files(f"{_PICTURES}/{image}"), size, f"{place}: {image}") for _, image in entries
    ]
    return [name for name, _ in entries], pictures


def _read_folder(place: Path) -> Callable[[str], bytes]:
    """Return what reads a file of an unpacked package."""

    def read(name: str) -> bytes:
        with open_file(place / name) as file:
            return file.read()

    return read


def _read_package(place: Path) -> Callable[[str], bytes]:
    """Return what reads a file of a packed package, all of which is gone through now."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(require_file(place, "an npm package or its folder"), "r|gz") as package:
            for member in package:
                name = member.name.removeprefix("package/")
                if member.isfile() and (name == _NAMES or name.startswith(f"{_PICTURES}/")):
                    part = package.extractfile(member)
                    contents[name] = part.read() if part is not None else b""
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ColadaError(f"{place} is no readable npm package ({reason(error)})") from None

    def read(name: str) -> bytes:
        if name not in contents:
            raise ColadaError(f"{place}: {name} is missing, expected the package emoji-datasource-twitter")
        return contents[name]

    return read


def moved(picture: Picture, generator: np.random.Generator) -> Picture:
    """Return a picture shifted by up to 2 pixels each way and scaled to 90–110%, white around it."""
    shift, scale = generator.uniform(-2, 2, 2), generator.uniform(0.9, 1.1)
    size = len(picture)
    padded = np.pad(picture.astype(np.float64), ((1, 1), (1, 1), (0, 0)), constant_values=255)
    for axis in (0, 1):
        middle = (size - 1) / 2
        place = ((np.arange(size) - middle - shift[axis]) / scale + middle + 1).clip(0, size + 1)
        below = place.astype(int).clip(0, size)
        part = (place - below).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        padded = padded.take(below, axis) * (1 - part) + padded.take(below + 1, axis) * part
    return np.rint(padded).astype(np.uint8)


def ranks(drawn: NDArray[Any], named: Sequence[int], pictures: NDArray[Any]) -> NDArray[np.intp]:
    """Return how many pictures are nearer to each drawn one than the one that was named: 0 where none is.

    The share of 0 is top-1 retrieval, that below 5 top-5; chance is 1 and 5 of all pictures.

    Args:
        drawn: (n, ...) latents of drawings.
        named: the number of the picture that each should be.
        pictures: (m, ...) latents of all pictures.
    """
    flat, others = drawn.reshape(len(drawn), -1), pictures.reshape(len(pictures), -1)
    distance = (others**2).sum(1) - 2 * flat @ others.T  # Less |drawn|², which all have.
    return (distance < distance[np.arange(len(drawn)), list(named)][:, None]).sum(1)
