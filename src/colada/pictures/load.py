"""Any picture file that users give, as a small square of pixels; what had to be changed is said."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colada.errors import ColadaError, reason
from colada.files import open_file
from colada.pictures.shapes import Picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""What is read: some others would start programs of their own."""
MOST_BYTES = 2**28
"""Of a picture file."""
MOST_PIXELS = 2**26
"""Of a picture: unpacked, they take four bytes each."""

_ORIENTATION = 0x0112
"""The EXIF tag of how a camera was held."""
_PNG_DEPTH = 24
"""Which byte of a PNG says how many bits a channel has."""
_TIFF_DEPTH, _TIFF_MEANING, _TIFF_PLANES = 258, 262, 284
"""The TIFF tags of bits a channel, of what numbers mean, and of how channels are stored."""


@dataclass(frozen=True)
class Change:
    """What was done to a picture: in a word, as one speaks of many, and in full."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind, self.detail)))


@dataclass(frozen=True)
class _Stored:
    """How a file stores its channels: bits of each, whether 0 is white, and whether they lie in planes."""

    bits: int = 8
    inverted: bool = False
    planes: bool = False


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
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise ColadaError(f"{origin} has {width} × {height} pixels, expected at most {MOST_PIXELS}")
            stored = _stored(opened, data)
            frames = getattr(opened, "n_frames", 1)
            if frames > 1:
                changes.append(Change("taken from an animation", f"as the first of {frames} frames"))
            opened.load()
            image: Image.Image = opened
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
    colours = _to_rgb(image, opened.format, stored, changes, origin)
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


def _stored(opened: ImageFile, data: bytes) -> _Stored:
    """Return how a file stores its channels, of which the pixels have not been read yet."""
    if opened.format == "PNG":
        if data[12:16] != b"IHDR":
            raise SyntaxError("it does not begin with its header")
        return _Stored(data[_PNG_DEPTH])
    if opened.format == "TIFF":
        tags: Any = getattr(opened, "tag_v2", {})
        planes = opened.tile[0].codec_name == "raw" and tags.get(_TIFF_PLANES, 1) == 2
        return _Stored(max(tags.get(_TIFF_DEPTH, (1,))), tags.get(_TIFF_MEANING) == 0, planes)
    if opened.format == "PPM" and opened.mode in ("I", "L", "RGB"):
        coding = opened.tile[0].args
        most = coding[1] if isinstance(coding, tuple) else 65535 if opened.mode == "I" else 255
        return _Stored(int(most).bit_length())
    return _Stored()


def _to_rgb(image: Image, kind: str | None, stored: _Stored, changes: list[Change], origin: str) -> Image:
    """Return a picture in eight bits a channel, without transparency; what that changes is added."""
    from PIL import Image as Images

    if image.mode == "F":
        raise ColadaError(f"{origin} has pixels of floating point, expected 8 or 16 bits a channel")
    if stored.bits > 16:
        raise ColadaError(f"{origin} has {stored.bits} bits a channel, expected 8 or 16")
    transparent = image.info.get("transparency")
    if stored.bits > 8:
        # What Pillow makes of these is neither said nor right.
        if stored.planes:
            raise ColadaError(
                f"{origin} has planes of {stored.bits} bits a channel, expected 8 bits, or pixels"
            )
        if image.mode == "RGB" and transparent is not None:
            what = f"a transparent colour of {stored.bits} bits a channel"
            raise ColadaError(f"{origin} has {what}, expected 8 bits, or an alpha channel")
        changes.append(Change("reduced", f"from {stored.bits} bits a channel to 8"))
    if image.mode.startswith("I"):
        image = _eight_bits(image, kind, stored, origin)
    elif image.mode == "L" and kind == "PNG" and isinstance(transparent, int):
        # Pillow spreads two or four bits over eight, but not the number that is transparent.
        image.info["transparency"] = transparent * (255 // (2 ** min(stored.bits, 8) - 1))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() != (255, 255):
        changes.append(Change("laid on white", "where it is transparent"))
    return Images.alpha_composite(Images.new("RGBA", image.size, "white"), image).convert("RGB")


def _eight_bits(image: Image, kind: str | None, stored: _Stored, origin: str) -> Image:
    """Return a grey picture of more bits in eight, with an alpha channel where one grey is transparent."""
    from PIL import Image as Images

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        span = f"from {values.min()} to {values.max()}"
        raise ColadaError(f"{origin} has pixels {span}, expected 8 or 16 bits a channel")
    # Of PPM, Pillow makes shares of the largest number; in colours, the nearest of eight bits.
    upper = (values / 257).round() if kind == "PPM" else values >> (stored.bits - 8)
    grey = Images.fromarray((255 - upper if stored.inverted else upper).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    alpha = Images.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Images.merge("LA", (grey, alpha))
