"""Pictures for people: as PNG, several on a sheet, and in a terminal's cells."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from rich.color import Color
from rich.style import Style
from rich.text import Text

from colada.checks import require_count
from colada.errors import ColadaError
from colada.pictures.shapes import Picture

MOST_SCALE = 64
"""Pixels of a PNG for one of a picture."""
GAP = 2
"""Pixels between the pictures of a sheet."""


def png(picture: Picture, scale: int = 1) -> bytes:
    """Return a picture, uint8 (H, W, 3), as a PNG file, each pixel a square of ``scale``.

    Equal pictures are equal files. Nothing is needed to write one: Pillow reads what others bring.

    Raises:
        ColadaError: for a scale out of bounds.
    """
    require_count("scale", scale, MOST_SCALE)
    large = picture.repeat(scale, 0).repeat(scale, 1)
    height, width, _ = large.shape
    # Before each row the filter of its bytes: 0 is none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), large.reshape(height, -1)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def sheet_width(columns: int, width: int) -> int:
    """Return the width in pixels of a sheet with so many pictures of a width in a row."""
    return columns * (width + GAP) - GAP


def sheet(pictures: Sequence[Picture], columns: int) -> Picture:
    """Return pictures of one size on white, in reading order, with some pixels between them.

    Raises:
        ColadaError: for no pictures.
    """
    if not pictures:
        raise ColadaError("no pictures for a sheet, expected some")
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    page = np.full((sheet_width(rows, height), sheet_width(columns, width), 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        top, left = row * (height + GAP), column * (width + GAP)
        page[top : top + height, left : left + width] = picture
    return page


def half_blocks(picture: Picture) -> Text:
    """Return a picture, uint8 (H, W, 3), as H / 2 lines of W cells, each an upper half over a lower one."""
    if len(picture) % 2:
        picture = np.concatenate([picture, np.full_like(picture[:1], 255)])
    lines = []
    for upper, lower in zip(picture[::2], picture[1::2], strict=True):
        line = Text()
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            line.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        lines.append(line)
    return Text("\n").join(lines)
