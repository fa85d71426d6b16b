"""What follows a drawing, in the place of a transcript: latents of a picture, as they become final."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from colada.device import plain_torch
from colada.errors import ColadaError
from colada.pictures.codec import Codec
from colada.pictures.shapes import Picture
from colada.text.transcript import Completion


class Canvas:
    """Follows one picture.

    Args:
        codec: what makes pixels of latents.

    Attributes:
        picture: uint8 (S, S, 3), once it is finished.
        finish_reason: then "drawn", or "error".
    """

    skip = 0
    """No token repeats any prompt's."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.picture: Picture | None = None
        self.finish_reason: str | None = None

    def look(self, latents: Tensor | None) -> Picture:
        """Return how latents (M, C) look, of which a picture's are the first numbers.

        Raises:
            ColadaError: for none, or what is not finite.
        """
        if latents is None or not bool(latents.isfinite().all()):
            raise ColadaError("no latents of a picture, expected finite ones")
        with plain_torch():
            picture: Picture = self._codec.decode(latents[None, :, : self._codec.config.channels])[0].numpy()
        return picture

    def finish(self, latents: Tensor | None) -> None:
        """Take the finished latents (M, C); raises as :meth:`look`."""
        self.picture, self.finish_reason = self.look(latents), "drawn"

    def add(self, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Return that a picture has no text."""
        return "", ()

    guess = add

    def completion(self, seed: int, error: str | None = None) -> Completion:
        """Return what was drawn."""
        reason = "error" if error is not None else "drawn"
        return Completion("", (), reason, seed, error, self.picture)
