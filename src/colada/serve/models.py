"""A model as it is served: its name, what is told of it, and what a request of it takes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from colada import __version__
from colada.errors import ColadaError
from colada.serve.admission import Limits

if TYPE_CHECKING:
    from torch import Tensor

    from colada.models.base import LanguageModel
    from colada.text.transcript import Chunk

PICTURED_TOKENS = 128
"""Of the text whose latents give the directions of :meth:`Served.picture`."""
PICTURE_SCALE = 40.0
"""Steps of a colour in one unit of a latent: three standard deviations of noise are nearly all of them."""


@dataclass
class Served:
    """A model and the name that requests have for it.

    Attributes:
        created: when its weights were written, in seconds.
        sha256: of its weights' files.
    """

    name: str
    model: LanguageModel
    created: int
    sha256: str
    _directions: Tensor | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str:
        """What an answer depends on beside its request."""
        kind = str(self._weight.dtype).removeprefix("torch.")
        return f"colada-{__version__}-{self.sha256[:12]}-{kind}-{self.model.device.type}"

    @property
    def _weight(self) -> Tensor:
        network = getattr(self.model, "dit", None) or self.model.decoder  # type: ignore[attr-defined]
        return next(iter(network.parameters()))

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens in a latent, and latents in a block; 1 where there are no such things."""
        config = self.model.vae.config if self.model.arch == "cola" else None  # type: ignore[attr-defined]
        return (1, 1) if config is None else (config.patch_size, config.block_size)

    def latents(self, prompt: int, new: int) -> int:
        """Return the latents that a request takes of so many tokens: of its prompt, and to be written."""
        patch, size = self.sizes
        return -(-(-(-prompt // patch) - (-new // patch)) // size) * size

    def context(self, limits: Limits) -> int:
        """Return how many tokens the longest request has, with its prompt."""
        patch, size = self.sizes
        return limits.history // size * size * patch

    def most_new(self, prompt: int, limits: Limits) -> int:
        """Return how many tokens at most may follow a prompt of so many; 0 or less: none may."""
        patch, _ = self.sizes
        return min(limits.max_tokens, self.context(limits) - -(-prompt // patch) * patch)

    def card(self, limits: Limits) -> dict[str, Any]:
        """Return what ``/v1/models`` tells."""
        from colada.generate.settings import SCHEDULE_NAMES, SOLVER_NAMES

        model = self.model
        cola = model.arch == "cola"
        patch, size = self.sizes
        networks = [model.vae, model.dit] if cola else [model.decoder]  # type: ignore[attr-defined]
        details = {
            "arch": model.arch,
            "parameters": sum(weight.numel() for network in networks for weight in network.parameters()),
            "block": size,
            "patch": patch,
            "latent_dim": model.vae.config.latent_dim if cola else None,  # type: ignore[attr-defined]
            "max_context": self.context(limits),
            "max_tokens": limits.max_tokens,
            "max_steps": limits.max_steps,
            "dtype": str(self._weight.dtype).removeprefix("torch."),
            "device": str(model.device),
            "defaults": model.chosen({}),
            "solvers": SOLVER_NAMES if cola else [],
            "schedules": SCHEDULE_NAMES if cola else [],
            "infill": cola,
            "chat": model.chat_template is not None and model.tokenizer is not None,
            "weights_sha256": self.sha256,
        }
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "colada"}
        return {**card, "colada": details}

    # --- in the engine thread ------------------------------------------------------------------

    def prepare_pictures(self) -> None:
        """Find the three directions in which latents of the model's own text differ most."""
        import torch

        if self.model.arch != "cola":
            return
        (text,) = self.model.generate([[]], PICTURED_TOKENS, end_ids=(), seed=0)
        latents = self.model.encode(text.tokens).float().cpu()  # type: ignore[attr-defined]
        directions = torch.linalg.svd(latents - latents.mean(0), full_matrices=False).Vh[:3].T  # (C, 3)
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        self._directions = directions * largest.sign()  # So that a latent has one colour in every run.

    def picture(self, guess: Chunk, prompt: int, kind: Literal["pca", "full"]) -> str:
        """Return the latents of a guess's tokens in base64: three bytes each, 128 is 0, or all as float16.

        Args:
            prompt: tokens that stand before the first block, of which the last may be in it.
        """
        assert guess.latents is not None
        patch, size = self.sizes
        pinned = -(-prompt // patch) % size if guess.block == 0 else 0
        rows = guess.latents.detach().float().cpu()[pinned:][: -(-len(guess.tokens) // patch)]
        if kind == "full":
            return base64.b64encode(rows.half().numpy().tobytes()).decode()
        assert self._directions is not None
        colours = (128 + PICTURE_SCALE * (rows @ self._directions)).nan_to_num(0).clamp(0, 255)
        return base64.b64encode(colours.byte().numpy().tobytes()).decode()


def open_served(
    name: str | None,
    where: str | None,
    revision: str | None,
    dtype: str | None,
    device: str,
    quantise: str | None,
) -> Served:
    """Load a model; arguments as :func:`colada.cli.options.load_model`.

    Raises:
        ColadaError: as there.
    """
    import torch

    from colada.locate import BUNDLED, locate
    from colada.models.cola import load

    directory = locate(BUNDLED if where is None else where, revision)
    model = load(
        where, revision=revision, device=device, dtype=None if dtype is None else getattr(torch, dtype)
    )
    if quantise is not None:
        if model.arch != "cola":
            raise ColadaError(f"quantise={quantise!r} with {model.origin}: expected a Cola DLM")
        model.quantise(quantise)  # type: ignore[attr-defined]
    files = sorted(directory.glob("*/*.safetensors"))
    served = Served(
        name or _name(where), model, int(max(path.stat().st_mtime for path in files)), _hash(files)
    )
    served.prepare_pictures()
    return served


def _name(where: str | None) -> str:
    """Return the name of a model that was given none: its directory's, or a hub's id."""
    if where is None:
        return "colada"
    return Path(where).resolve().name if Path(where).exists() else where


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(2**22):
                digest.update(part)
    return digest.hexdigest()
