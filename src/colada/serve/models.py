"""A model as it is served: its name, what is told of it, and what a request of it takes."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colada import __version__
from colada.generate.settings import AGAINST_NAMES, SCHEDULE_NAMES, SOLVER_NAMES
from colada.serve.admission import Limits

if TYPE_CHECKING:
    from torch import Tensor

    from colada.text.transcript import Chunk

PICTURED_TOKENS = 128
"""Of the text whose latents give :attr:`Served.directions`."""
PICTURE_SCALE = 40.0
"""Steps of a colour in one unit of a latent: three standard deviations of noise are nearly all of them."""


@dataclass
class Served:
    """A language model, the name that requests have for it, and its weights' age and hash."""

    name: str
    model: Any
    created: int
    sha256: str

    def __post_init__(self) -> None:
        self._cola = self.model.arch == "cola"
        self._networks = [self.model.vae, self.model.dit] if self._cola else [self.model.decoder]
        *_, last = self._networks[-1].parameters()
        self._dtype = str(last.dtype).removeprefix("torch.")

    @property
    def fingerprint(self) -> str:
        """What an answer depends on beside its request."""
        return f"colada-{__version__}-{self.sha256[:12]}-{self._dtype}-{self.model.device.type}"

    @property
    def marks(self) -> tuple[str, str, str, str]:
        """The version, the fingerprint, and the type and device of the weights."""
        return __version__, self.fingerprint, self._dtype, self.model.device.type

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens in a latent, and latents in a block; 1 where there are no such things."""
        config = self.model.vae.config if self._cola else None
        return (1, 1) if config is None else (config.patch_size, config.block_size)

    def latents(self, prompt: int, new: int, candidates: int = 1) -> int:
        """Return the latents that a request takes of so many tokens: of its prompt, and to be written."""
        from colada.generate.engine.slots import room_for

        patch, size = self.sizes
        return room_for(-(-prompt // patch) - (-new // patch), candidates, size)

    def context(self, limits: Limits, candidates: int = 1) -> int:
        """Return how many tokens the longest request has, with its prompt."""
        patch, size = self.sizes
        most = (limits.capacity // size - candidates + 1) * size * patch
        return most if limits.context is None else min(most, limits.context)

    def most_new(self, prompt: int, limits: Limits, candidates: int = 1) -> int:
        """Return how many tokens at most may follow a prompt of so many; 0 or less: none may."""
        patch, _ = self.sizes
        return min(limits.max_tokens, self.context(limits, candidates) - -(-prompt // patch) * patch)

    def card(self, limits: Limits) -> dict[str, Any]:
        """Return what ``/v1/models`` tells."""
        from colada.device import parameters_of

        model, cola = self.model, self._cola
        patch, size = self.sizes
        details = {
            "arch": model.arch,
            "parameters": sum(map(parameters_of, self._networks)),
            "block": size,
            "patch": patch,
            "latent_dim": model.vae.config.latent_dim if cola else None,
            "max_context": self.context(limits),
            "max_tokens": limits.max_tokens,
            "max_steps": limits.max_steps,
            "dtype": self._dtype,
            "device": str(model.device),
            "defaults": model.chosen({}),
            "solvers": SOLVER_NAMES if cola else [],
            "schedules": SCHEDULE_NAMES if cola else [],
            "against": AGAINST_NAMES if cola else [],
            "infill": cola,
            "chat": model.chat_template is not None and model.tokenizer is not None,
            "weights_sha256": self.sha256,
        }
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "colada"}
        return {**card, "colada": details}

    @cached_property
    def directions(self) -> Tensor:
        """The three directions (C, 3) in which latents of the model's own text differ most."""
        import torch

        (text,) = self.model.generate([[]], PICTURED_TOKENS, end_ids=(), seed=0)
        latents = self.model.encode(text.tokens).float().cpu()
        directions = torch.linalg.svd(latents - latents.mean(0), full_matrices=False).Vh[:3].T
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        return directions * largest.sign()  # So that a latent has one colour in every run.

    def picture(self, guess: Chunk, prompt: int, kind: str) -> str:
        """Return the latents of a guess's tokens in base64, for the engine thread.

        Args:
            prompt: tokens that stand before the first block, of which the last may be in it.
            kind: "full" is float16; "pca" three bytes a latent, where 128 is 0.
        """
        assert guess.latents is not None
        patch, size = self.sizes
        pinned = -(-prompt // patch) % size if guess.block == 0 else 0
        rows = guess.latents.detach().float().cpu()[pinned:][: -(-len(guess.tokens) // patch)]
        if kind == "full":
            return base64.b64encode(rows.half().numpy().tobytes()).decode()
        colours = (128 + PICTURE_SCALE * (rows @ self.directions)).nan_to_num(0).clamp(0, 255)
        return base64.b64encode(colours.byte().numpy().tobytes()).decode()


def open_served(
    name: str | None,
    where: str | None,
    revision: str | None,
    dtype: str | None = None,
    device: str = "cpu",
    quantise: str | None = None,
) -> Served:
    """Load a model, under its directory's name or hub id if it is given none.

    Raises:
        ColadaError: if it cannot be loaded or quantised.
    """
    import torch

    from colada.locate import BUNDLED, locate
    from colada.models.load import load

    torch_dtype = None if dtype is None else getattr(torch, dtype)
    model: Any = load(where, revision=revision, device=device, dtype=torch_dtype)
    if quantise is not None:
        model.quantise(quantise)
    directory = locate(BUNDLED if where is None else where, revision)
    folders = [directory, *(directory / name for name in model.networks)]  # A difference has none of its own.
    files = sorted(file for folder in folders for file in folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(2**22):
                digest.update(part)
    if name is None:
        local = where is not None and Path(where).exists()
        name = "colada" if where is None else Path(where).resolve().name if local else where
    return Served(name, model, int(max(path.stat().st_mtime for path in files)), digest.hexdigest())
