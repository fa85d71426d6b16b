"""Pictures with captions to train on: a folder, parquet files, or generated scenes.

Files are read whole before anything else is done, so that what is wrong with one is said at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

import numpy as np

from colada.data.documents import read_records, split_file, text_of
from colada.errors import ColadaError, nearest, shown
from colada.files import as_path, decode, read_lines, require_file
from colada.pictures.config import words_of
from colada.pictures.load import Loaded, decode_picture, load_picture
from colada.pictures.shapes import SIZE, VOCABULARY, Picture, example

CAPTIONS = "captions.tsv"
"""The file of a folder that has a line for each picture: its name, a tab, its caption."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
SHAPES = "shapes:"
_THINGS = {"one": 1, "two": 2, "three": 3}
_SCENE_WORDS = (*_THINGS, "grid", "unseen")
_VALIDATION = 2**62
"""The number of the first scene to validate with: no training comes that far."""


class Pair(NamedTuple):
    """A picture, the caption to draw it from, and what is to be answered of it."""

    caption: str
    picture: Picture
    answer: str


@dataclass(frozen=True)
class Scenes:
    """Generated scenes without end, see :func:`colada.pictures.shapes.example`.

    Attributes:
        name: as users gave it.
        first: number of the first one.
    """

    name: str
    seed: int = 0
    things: int | None = None
    unseen: bool = False
    on_grid: bool = False
    first: int = 0

    count: None = None
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """What tells these pairs from others."""
        return f"{self.name} of seed {self.seed}"

    def pair(self, number: int) -> Pair:
        """Return a scene by its number, from 0."""
        return Pair(*example(self.seed, self.first + number, self.things, self.unseen, self.on_grid))

    @property
    def words(self) -> frozenset[str]:
        """All words of the captions."""
        return VOCABULARY

    def split(self, share: float) -> tuple[Scenes, Scenes | None]:
        """Return what is trained on, and others to validate with, if a share is wanted for that."""
        if share == 0:
            return self, None
        return self, replace(self, first=self.first + _VALIDATION)


@dataclass(frozen=True)
class PictureFiles:
    """Pairs that were read from files.

    Attributes:
        name: as users gave it.
        captions: of each pair.
        pictures: uint8 (n, S, S, 3).
        notes: what was changed in pictures, in words.
        validation: of each pair, whether its file says that it is for validation; None where it does not say.
    """

    name: str
    captions: tuple[str, ...]
    pictures: Picture
    notes: tuple[str, ...] = ()
    validation: tuple[bool, ...] | None = None

    @property
    def count(self) -> int:
        """Pairs in all."""
        return len(self.captions)

    @cached_property
    def digest(self) -> str:
        """What tells these pairs from others."""
        content = sha1("\0".join(self.captions).encode(), usedforsecurity=False)
        content.update(self.pictures.tobytes())
        return content.hexdigest()

    @property
    def words(self) -> frozenset[str]:
        """All words of the captions."""
        return frozenset(word for caption in self.captions for word in words_of(caption))

    def pair(self, number: int) -> Pair:
        """Return a pair by its number, from 0; after the last comes the first."""
        number %= len(self.captions)
        return Pair(self.captions[number], self.pictures[number], self.captions[number])

    def split(self, share: float) -> tuple[PictureFiles, PictureFiles | None]:
        """Return what is trained on, and what to validate with: what the file says, or about a share.

        Equal pairs land on the same side. Where a share would leave a side without any, it has one that is
        least or greatest in the order by which they are chosen; None where nothing is to be validated with.

        Raises:
            ColadaError: if there is nothing to train on.
        """
        if self.validation is not None:
            chosen = self.validation
            if all(chosen):
                raise ColadaError(f"{self.name}: every picture is for validation, expected some to train on")
        else:
            places = [self._fraction(number) for number in range(self.count)]
            least, greatest = min(places), max(places)
            if share > 0 and least == greatest:
                raise ColadaError(
                    f"{self.name}: one picture, expected a second one to validate with, or"
                    " data.validation_share=0"
                )
            # Between two of the places, whatever the share: neither side is empty.
            chosen = tuple(share > 0 and (place == least or place < min(share, greatest)) for place in places)
        return self._of(not one for one in chosen), self._of(chosen) if any(chosen) else None

    def _fraction(self, number: int) -> float:
        content = self.captions[number].encode() + self.pictures[number].tobytes()
        return int.from_bytes(sha1(content, usedforsecurity=False).digest(), "big") / 2**160

    def _of(self, chosen: Iterable[bool]) -> PictureFiles:
        numbers = [number for number, one in enumerate(chosen) if one]
        captions = tuple(self.captions[number] for number in numbers)
        return replace(self, captions=captions, pictures=self.pictures[numbers], validation=None)


PairSource = Scenes | PictureFiles


def open_source(name: str, size: int = SIZE, seed: int = 0) -> PairSource:
    """Return the pairs of a source, by what users call it.

    ``shapes:`` are generated scenes; ``shapes:one,grid`` those of one thing (or ``two``, ``three``) on the
    patch grid, ``unseen`` those with a combination that is held out. Anything else is a folder of pictures
    with a ``captions.tsv``, a parquet file with columns ``image`` (a picture file's bytes) and ``caption``,
    or a folder of such.

    Args:
        name: of the source.
        size: pixels of a picture's side.
        seed: of generated scenes.

    Raises:
        ColadaError: in one line that names what is wrong.
    """
    if name.startswith(SHAPES):
        return _scenes(name, size, seed)
    place = as_path(name)
    if not place.is_dir():
        expected = "a folder of pictures, a .parquet file or shapes:"
        require_file(place, expected)
        if place.suffix.lower() != ".parquet":
            raise ColadaError(f"{place}, expected {expected}")
        return _parquet(name, [place], size)
    tables = sorted(place.glob("*.parquet"))
    if tables and not (place / CAPTIONS).exists():
        return _parquet(name, tables, size)
    return _folder(name, place, size)


def _scenes(name: str, size: int, seed: int) -> Scenes:
    if size != SIZE:
        raise ColadaError(f"{name} are pictures of {SIZE} pixels, expected size={SIZE}, not {size}")
    words = [word.strip() for word in name.removeprefix(SHAPES).split(",") if word.strip()]
    for word in words:
        if word not in _SCENE_WORDS:
            known = ", ".join(_SCENE_WORDS)
            raise ColadaError(f"{name}: {shown(word)}{nearest(word, _SCENE_WORDS)}, expected some of {known}")
    things = [word for word in words if word in _THINGS]
    if len(things) > 1:
        raise ColadaError(f"{name}: {' and '.join(things)}, expected one of them")
    count = _THINGS[things[0]] if things else None
    return Scenes(name, seed, count, "unseen" in words, "grid" in words)


def _folder(name: str, folder: Path, size: int) -> PictureFiles:
    captions = _read_captions(folder)
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    }
    for picture, (number, _) in captions.items():
        if picture not in paths:
            where = f"{folder / CAPTIONS}:{number}"
            raise ColadaError(f"{where}: no picture {shown(picture)}{nearest(picture, paths)} in {folder}")
    without = [picture for picture in paths if picture not in captions]
    if without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        raise ColadaError(f"{folder}: {shown(without[0])}{more} without a caption in {CAPTIONS}")
    loaded = [load_picture(paths[picture], size) for picture in captions]
    return files_of(name, [caption for _, caption in captions.values()], loaded)


def _read_captions(folder: Path) -> dict[str, tuple[int, str]]:
    """Return line and caption of each picture that a folder's captions name."""
    file = folder / CAPTIONS
    if not file.exists():
        raise ColadaError(
            f"{folder}: no {CAPTIONS} in this folder, expected a line for each picture: name, tab, caption"
        )
    captions: dict[str, tuple[int, str]] = {}
    for number, raw in read_lines(file):
        line = decode(raw, f"{file}:{number}").strip("\r\n")
        if not line.strip():
            continue
        picture, tab, caption = line.partition("\t")
        if not tab or not picture or not caption.strip() or "\t" in caption:
            raise ColadaError(f"{file}:{number}: {shown(line)}, expected a picture's name, a tab, a caption")
        if picture in captions:
            before = captions[picture][0]
            raise ColadaError(f"{file}:{number}: {shown(picture)} is there twice, first in line {before}")
        captions[picture] = number, caption.strip()
    if not captions:
        raise ColadaError(f"{file} holds no captions, expected a line for each picture")
    return captions


def _parquet(name: str, tables: list[Path], size: int) -> PictureFiles:
    captions, loaded, splits, stated = list[str](), list[Loaded](), list[bool](), False
    for path in tables:
        for part in split_file(path):
            for record in read_records(part, ("image", "caption"), 0.0):
                image, caption = record.values
                # The way in which `datasets` writes pictures.
                content = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(content, bytes):
                    kind = "null" if content is None else f"of type {type(content).__name__}"
                    raise ColadaError(f"{record.origin}: 'image' is {kind}, expected a picture file's bytes")
                text = text_of(caption, "caption", record.origin).strip()
                if not text:
                    raise ColadaError(f"{record.origin}: 'caption' is empty, expected text")
                captions.append(text)
                loaded.append(decode_picture(content, size, record.origin))
                splits.append(record.split == "validation")
                stated |= record.stated
    if not captions:
        raise ColadaError(f"{name} holds no pictures, expected some")
    return replace(files_of(name, captions, loaded), validation=tuple(splits) if stated else None)


def files_of(name: str, captions: list[str], loaded: list[Loaded]) -> PictureFiles:
    """Return pairs that were read from files, with how many pictures were changed in what way."""
    kinds = Counter(change.kind for one in loaded for change in one.changes)
    notes = tuple(f"{count} of {len(loaded)} pictures {kind}" for kind, count in kinds.items())
    return PictureFiles(name, tuple(captions), np.stack([one.picture for one in loaded]), notes)
