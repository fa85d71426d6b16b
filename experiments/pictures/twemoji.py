"""The Twemoji: small pictures of things with names, and how well drawings of them are told apart.

They are in the npm package of ``npm pack emoji-datasource-twitter@16.0.0``, which is read packed or unpacked.
There is no test on unseen names: each has one picture.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colada.errors import ColadaError, reason
from colada.files import parse_json, require_file, write_text
from colada.pictures.load import decode_picture
from colada.pictures.shapes import SIZE, Picture
from colada.pictures.show import png
from colada.pictures.sources import CAPTIONS, PictureFiles, files_of

CREDIT = "Emoji graphics by Twitter, Inc and other contributors (Twemoji), CC BY 4.0"
"""What must stand beside them, and in the card of a model that was trained on them."""
CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects")
"""Of those whose names say what is to be seen."""
_NAMES, _PICTURES = "emoji.json", "img/twitter/64"


def read_twemoji(place: Path, size: int = SIZE) -> PictureFiles:
    """Return the Twemoji of :data:`CATEGORIES` with their names, in lower case, in the package's order.

    Args:
        place: the npm package: ``.tgz``, or the folder that holds emoji.json.
        size: pixels of a picture's side.

    Raises:
        ColadaError: for what is no such package.
    """
    contents = {} if place.is_dir() else _unpacked(place)

    def content(name: str) -> bytes:
        if place.is_dir():
            return require_file(place / name).read_bytes()
        if name not in contents:
            raise ColadaError(f"{place}: {name} is missing, expected the package emoji-datasource-twitter")
        return contents[name]

    where = f"{place}: {_NAMES}"
    try:
        images = [
            (str(entry["name"]).lower(), str(entry["image"]))
            for entry in parse_json(content(_NAMES), where)
            if entry["category"] in CATEGORIES
        ]
    except (TypeError, KeyError) as error:
        raise ColadaError(f"{where} is no list of emoji ({reason(error)})") from None
    if not images:
        raise ColadaError(f"{where} has no emoji of {', '.join(CATEGORIES)}")
    loaded = [
        decode_picture(content(f"{_PICTURES}/{image}"), size, f"{place}: {image}") for _, image in images
    ]
    return files_of(str(place), [name for name, _ in images], loaded)


def _unpacked(place: Path) -> dict[str, bytes]:
    """Return names and pictures of a packed package."""
    try:
        with tarfile.open(require_file(place, "an npm package or its folder"), "r|gz") as package:
            return {
                member.name.removeprefix("package/"): part.read()
                for member in package
                if (part := package.extractfile(member)) is not None
            }
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ColadaError(f"{place} is no readable npm package ({reason(error)})") from None


def write_folder(source: PictureFiles, folder: Path) -> None:
    """Write pictures, names and whom they are owed to as a folder that a recipe's ``data.pictures`` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:04d}.png" for number in range(source.count)]
    for name, picture in zip(names, source.pictures, strict=True):
        (folder / name).write_bytes(png(picture))
    lines = [f"{name}\t{caption}\n" for name, caption in zip(names, source.captions, strict=True)]
    write_text(folder / CAPTIONS, "".join(lines))
    write_text(folder / "CREDIT.txt", f"{CREDIT}.\n")


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
