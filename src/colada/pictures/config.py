"""The configuration of a picture codec; nothing here waits for torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from colada.networks.config import ConfigRule, NetworkConfig, extension

GROUPS = 8
"""Of a convolutional codec's GroupNorm; its features are a multiple of it."""
KINDS = ("patch_pca", "conv_vae")
MOST_SIZE = 1024
"""Pixels of the side of the largest pictures."""

DRAWING = extension(None, "settings with which the model draws")
DESCRIBING = extension(None, "settings with which it describes")
WORDS = extension(None, "the words of the captions that it learnt from, where they are not too many")
MOST_WORDS = 8192
"""Words that a configuration holds; of captions with more of them, none."""


def words_of(caption: str) -> list[str]:
    """Return the words of a caption, in lower case."""
    return re.findall(r"[^\W\d_]+", caption.lower())


@dataclass(frozen=True)
class CodecConfig(NetworkConfig):
    """A picture codec (``model_type`` "cola_image_codec").

    ``size`` is of a picture's side and ``patch`` of what becomes one latent of ``channels`` numbers, both in
    pixels.
    """

    model_type: ClassVar[str] = "cola_image_codec"
    architecture: ClassVar[str] = "ColaImageCodec"
    positive: ClassVar[str] = "size patch channels"
    rules: ClassVar[Sequence[ConfigRule]] = (
        ("kind", lambda c: c.kind in KINDS, " or ".join(map(repr, KINDS))),
        ("size", lambda c: c.size <= MOST_SIZE, f"at most {MOST_SIZE}"),
        ("patch", lambda c: c.size % c.patch == 0, "a divisor of size={c.size}"),
        (
            "patch",
            lambda c: c.kind == "patch_pca" or c.patch & (c.patch - 1) == 0,
            "a power of 2 for kind='conv_vae'",
        ),
        (
            "channels",
            lambda c: c.kind == "conv_vae" or c.channels <= c.patch_numbers,
            "at most {c.patch_numbers}, the numbers of a patch",
        ),
        (
            "width",
            lambda c: c.width % GROUPS == 0 and (c.width > 0) == (c.kind == "conv_vae"),
            f"0 for kind='patch_pca', else a multiple of {GROUPS}",
        ),
    )

    kind: str = "patch_pca"
    size: int = 32
    patch: int = 8
    channels: int = 64
    width: int = extension(0, "features of a convolutional codec at full size")
    drawing: dict | None = DRAWING  # type: ignore[type-arg]  # Its type is checked as it stands here.
    describing: dict | None = DESCRIBING  # type: ignore[type-arg]
    words: list | None = WORDS  # type: ignore[type-arg]
    whitening: float = extension(
        0.5,
        "power of their standard deviations that principal components are divided by: 0 leaves them, 1 makes"
        " them equal",
        lambda power: 0 <= power <= 1,
        "a number from 0 to 1",
    )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's latents, which are in reading order."""
        return self.size // self.patch, self.size // self.patch

    @property
    def latents(self) -> int:
        """Latents M of a picture."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_numbers(self) -> int:
        """Numbers of a patch of pixels."""
        return self.patch * self.patch * 3
