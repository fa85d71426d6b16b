"""Any picture file that users give, as a small square of pixels; what had to be changed is said."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colada.errors import ColadaError, reason
from colada.files import open_file
from colada.pictures.shapes import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""What is read: some others would start programs of their own."""
MOST_BYTES = 2**28
"""Of a picture file."""
MOST_PIXELS = 2**26
"""Of a picture: unpacked, they take four bytes each."""

_ORIENTATION = 0x0112
"""The EXIF tag of how a camera was held."""
_PNG, _PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24
"""How a PNG begins, and which of its bytes says how many bits a channel has."""


@dataclass(frozen=True)
class Change:
    """What was done to a picture: in a word, as one speaks of many, and in full."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind, self.detail)))


@dataclass(frozen=True)
class Loaded:
    """A picture, uint8 (S, S, 3), and what was changed."""

    picture: Picture
    changes: tuple[Change, ...]


def load_picture(path: str | Path, size: int) -> Loaded:
    """Return the picture in a file; see :func:`decode_picture`.

    Raises:
        ColadaError: also for what is no regular file.
    """
    with open_file(path, "a picture") as file:
        data = file.read(MOST_BYTES + 1)
    return decode_picture(data, size, str(path))


def decode_picture(data: bytes, size: int, origin: str) -> Loaded:
    """Return a picture file's first frame: upright, on white, its middle square, of size × size pixels.

    Args:
        data: the file.
        size: pixels of the result's side.
        origin: what errors call the file.

    Raises:
        ColadaError: naming ``origin``, for what is no picture, is broken, too large or has pixels of an
            unknown range.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise ColadaError(f'{origin}: pictures need Pillow: pip install "colada-lm[pictures]"') from None
    if len(data) > MOST_BYTES:
        raise ColadaError(f"{origin} has more than {MOST_BYTES} bytes, expected a smaller picture")
    changes = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About what is refused here, or does not matter: metadata.
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ColadaError(f"{origin} has {width} × {height} pixels, expected at most {MOST_PIXELS}")
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                changes.append(Change("taken from an animation", f"as the first of {frames} frames"))
            image.load()
            if image.getexif().get(_ORIENTATION, 1) != 1:
                changes.append(Change("turned upright"))
                image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ColadaError(f"{origin} is no picture, expected one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ColadaError(
            f"{origin} has more than {MOST_PIXELS} pixels, expected a smaller picture"
        ) from None
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, EOFError, struct.error) as error:
        # Each format's reader raises what its fields make it raise.
        raise ColadaError(f"{origin} is a broken picture ({reason(error)})") from None
    # Of colours with 16 bits the library itself leaves the upper eight.
    if image.mode.startswith("I;16") or (data.startswith(_PNG) and data[_PNG_DEPTH] == 16):
        changes.append(Change("reduced", "from 16 bits a channel to 8"))
    colours = _to_rgb(image, changes, origin)
    side = min(width, height)
    if width != height:
        whole = f"{colours.width} × {colours.height}"
        changes.append(Change("cropped", f"from {whole} to its middle {side} × {side}"))
        left, top = (colours.width - side) // 2, (colours.height - side) // 2
        colours = colours.crop((left, top, left + side, top + side))
    if side != size:
        changes.append(Change("scaled", f"from {side} × {side} to {size} × {size}"))
        method = Image.Resampling.BOX if side > size else Image.Resampling.BILINEAR
        colours = colours.resize((size, size), method)
    return Loaded(np.asarray(colours, np.uint8).copy(), tuple(changes))


def _to_rgb(image: Image, changes: list[Change], origin: str) -> Image:
    """Return a picture in eight bits a channel, without transparency; a change of that is added."""
    from PIL import Image as Images

    if image.mode == "F":
        raise ColadaError(f"{origin} has pixels of floating point, expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            span = f"from {values.min()} to {values.max()}"
            raise ColadaError(f"{origin} has pixels {span}, expected 8 or 16 bits a channel")
        return Images.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() != (255, 255):
        changes.append(Change("laid on white", "where it is transparent"))
    return Images.alpha_composite(Images.new("RGBA", image.size, "white"), image).convert("RGB")
