"""``ColaDLM``: the two networks and their tokenizer as one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, Unpack

import torch

from colada.checks import MOST_TOKENS, require_count
from colada.device import plain_torch, require_memory
from colada.errors import ColadaError
from colada.generate.engine.engine import GPU_BUCKET, Engine, capacity_for
from colada.generate.engine.memory import round_up
from colada.generate.reference import encode
from colada.generate.settings import RELEASED_SETTINGS, Prompt, RequestSettings, Settings
from colada.generate.writer import Request
from colada.locate import DIT_DIR, IMAGE_DIR, VAE_DIR
from colada.models.base import require_kind
from colada.models.cola_pictures import PictureModel
from colada.networks.config import check_pair
from colada.networks.dit import DiT
from colada.networks.quantise import quantise
from colada.networks.vae import TextVAE
from colada.pictures.codec import Codec, check_codec
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Completion, Transcript

CHECKED_TOKENS = 4096
"""Shorter prompts are encoded without asking how much memory there is."""
ENCODER_ACTIVATIONS = 6
"""Vectors of either width that the encoder's pass holds at once for a token."""
MOST_LOGITS = 2**24
"""That are computed at once when a text is decoded."""


@dataclass(frozen=True)
class Reconstruction:
    """Tokens through the Text VAE and back: the text, its ids, and the share that equal the original's."""

    text: str
    tokens: tuple[int, ...]
    accuracy: float


class ColaDLM(PictureModel):
    """A continuous latent diffusion language model, ready to use.

    Args:
        vae, dit: the networks; their widths and block sizes must agree.
        tokenizer, origin, generation, chat_template: see :class:`LanguageModel`.
        image: the picture codec of a model that has pictures.

    Raises:
        ColadaError: if the parts do not fit each other.
    """

    arch = "cola"
    defaults = RELEASED_SETTINGS

    def __init__(
        self,
        vae: TextVAE,
        dit: DiT,
        tokenizer: Tokenizer | None = None,
        *,
        origin: str = "",
        generation: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        image: Codec | None = None,
    ) -> None:
        require_kind("vae", vae, TextVAE)
        require_kind("dit", dit, DiT)
        require_kind("image", image, Codec, optional=True)
        check_pair(vae.config, dit.config)
        check_codec(None if image is None else image.config, dit.config)
        self.image = image if image is None else image.eval()
        self.vae, self.dit = vae.eval(), dit.eval()
        super().__init__(tokenizer, origin, generation, chat_template)
        self.quantised: str | None = None
        self._kept: list[Engine] = []  # One that nobody has, at most.

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return self.vae.config.vocab_size

    @property
    def networks(self) -> dict[str, Any]:
        """The DiT, the Text VAE and the codec of pictures if there is one, by folder."""
        image = {} if self.image is None else {IMAGE_DIR: self.image}
        return {DIT_DIR: self.dit, VAE_DIR: self.vae, **image}

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or convert the weights in place, and return self; a picture codec stays in float32."""
        self._kept.clear()
        return super().to(device, dtype)

    def quantise(self, name: str) -> ColaDLM:
        """Quantise the weights of the transformer layers that generate, in place, and return self.

        Args:
            name: "int8", int8 weights by output channel; experimental on a GPU, where it was never measured.

        Raises:
            ColadaError: as :func:`colada.networks.quantise.quantise`; or if that was done before.
        """
        if self.quantised is not None:
            raise ColadaError(f"{self.origin or 'the model'} is quantised already, to {self.quantised}")
        self._kept.clear()
        with plain_torch(inference=False):
            quantise((self.dit, self.vae.decoder), name)
        self.quantised = name
        return self

    def save(self, directory: str | Path, int8: bool = False) -> None:
        """Write the model in the released format, with its tokenizer; see :meth:`LanguageModel.save`.

        Raises:
            ColadaError: for a quantised model, which the format cannot hold; or as ``write_model``.
        """
        if self.quantised is not None:
            raise ColadaError(f"a model quantised to {self.quantised} cannot be saved: save it before")
        super().save(directory, int8)

    def shares_vae(self, other: ColaDLM) -> bool:
        """Return whether another model has the same Text VAE, in any type that both are exact in."""
        if self.vae.config != other.vae.config:
            return False
        pairs = zip(self.vae.parameters(), other.vae.parameters(), strict=True)
        return all(torch.equal(weight.float(), other_weight.float()) for weight, other_weight in pairs)

    # --- tokens and latents ----------------------------------------------------------------

    @property
    def pad_id(self) -> int:
        """The padding id: the tokenizer's, or ``pad_token_id`` of the Text VAE's config."""
        if self.tokenizer is not None:
            return self.tokenizer.pad_id
        if self.vae.config.pad_token_id is None:
            raise ColadaError(
                "no padding id is known: the model has no tokenizer, its config no pad_token_id"
            )
        return self.vae.config.pad_token_id

    @plain_torch()
    def encode(self, text: Prompt) -> torch.Tensor:
        """Return the normalised posterior means of a text, float32 (ceil(tokens / patch_size), C)."""
        ids = self.ids(text)
        if not ids:
            return torch.zeros(0, self.vae.config.latent_dim, device=self.device)
        latents = encode(self.vae, [ids], self.pad_id)[0]
        return latents[: -(-len(ids) // self.vae.config.patch_size)]

    @plain_torch()
    def decode(self, latents: torch.Tensor) -> list[int]:
        """Return the likeliest ids of normalised latents (L, C): L * patch_size of them.

        Raises:
            ColadaError: for anything else, or where latents or logits are not finite.
        """
        width, kind = self.vae.config.latent_dim, type(latents).__name__
        if not isinstance(latents, torch.Tensor) or latents.layout != torch.strided or latents.is_meta:
            raise ColadaError(f"latents of type {kind}, expected a tensor of shape (L, {width})")
        if latents.ndim != 2 or latents.shape[1] != width or not latents.is_floating_point():
            shape = f"{tuple(latents.shape)} and type {latents.dtype}"
            raise ColadaError(f"latents of shape {shape}, expected floating-point (L, {width})")
        if len(latents) > MOST_TOKENS:
            raise ColadaError(f"{len(latents)} latents, expected at most {MOST_TOKENS}")
        if len(latents) == 0:
            return []
        latents = latents.to(self.device, torch.float32)
        if not bool(latents.isfinite().all()):
            raise ColadaError("latents that are not finite, expected numbers to decode")
        ids: list[int] = []
        for logits in self._logits(latents):
            if not bool(logits.isfinite().all()):
                raise ColadaError(f"{self.origin or 'the model'}: the decoder's logits are not finite")
            ids += logits.argmax(-1).tolist()
        return ids

    def _logits(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the decoder's logits (n, V) of latents (L, C), no more at a time than fit into memory."""
        decoder = self.vae.decoder
        hidden = decoder(latents, self.vae.layout([len(latents)]))
        for part in hidden.split(max(1, MOST_LOGITS // self.vocab_size)):
            yield decoder.logits(part)

    def reconstruct(self, text: Prompt) -> Reconstruction:
        """Send a text through the Text VAE and back.

        Raises:
            ColadaError: for an empty text.
        """
        ids = self.ids(text)
        if not ids:
            raise ColadaError("nothing to reconstruct: the text has no tokens")
        out = self.decode(self.encode(ids))[: len(ids)]
        correct = sum(a == b for a, b in zip(ids, out, strict=True))
        text = self.tokenizer.decode(out, skip_special=False) if self.tokenizer is not None else ""
        return Reconstruction(text, tuple(out), correct / len(ids))

    @property
    def built_in(self) -> Mapping[str, Any] | None:
        """What a distilled prior has inside: ``distilled`` of its config."""
        return self.dit.config.distilled

    # --- generation ------------------------------------------------------------------------

    def _writer(self, capacity: int, slots: int | None) -> Engine:
        return self._engine(capacity, slots, self.pad_id)

    def _writer_for(self, requests: Sequence[Request], slots: int) -> Engine:
        """Return the engine that is kept if it fits, else a new one; nobody else gets it, in no thread."""
        capacity = capacity_for(requests, self.vae.config, slots)
        # Without a token to pad, no padding id is needed.
        pad_id = self.pad_id if any(request.ids for request in requests) else 0
        if self.device.type == "cuda":  # A next call that is a little longer then finds it large enough.
            capacity = round_up(capacity, 8 * GPU_BUCKET)
        try:
            engine = self._kept.pop()
            same = (engine.slots, engine.pad_id) == (slots, pad_id)
            if same and not engine.busy and engine.regions.capacity >= capacity:
                return engine
        except IndexError:
            pass
        return self._engine(capacity, slots, pad_id)

    def _engine(self, capacity: int, slots: int | None, pad_id: int) -> Engine:
        with plain_torch(inference=False):
            return Engine(self.vae, self.dit, capacity=capacity, slots=slots, pad_id=pad_id)

    def _keep(self, writer: Engine) -> None:
        """Let an engine serve the next call: what a GPU replays is worth keeping."""
        if writer.graphs is not None:
            self._kept[:] = [writer]

    def _request(
        self, ids: Sequence[int], max_new_tokens: int, settings: RequestSettings
    ) -> tuple[Request, int]:
        self._check_length(ids)
        patch = self.vae.config.patch_size
        # Of the first block, those tokens are told that are not the prompt's pinned latents.
        skip = -(-len(ids) // patch) % self.vae.config.block_size * patch
        return Request(tuple(ids), max_new_tokens, settings), skip

    def _hole(
        self, prompt: Prompt, suffix: Prompt, max_new_tokens: int, settings: RequestSettings
    ) -> tuple[Request, Transcript]:
        count = require_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
        before, after, patch = self.ids(prompt), self.ids(suffix), self.vae.config.patch_size
        if len(before) % patch or count % patch:
            raise ColadaError(
                f"a hole of {count} tokens after {len(before)}, expected multiples of patch_size={patch}"
            )
        ids = [*before, *[self.vae.config.mask_id] * count, *after]
        self._check_length(ids)
        first = len(before) // patch
        request = Request(tuple(ids), count, settings, (first, first + count // patch))
        skip = first % self.vae.config.block_size * patch
        return request, Transcript(self.tokenizer, skip, count, (), (), before)

    def infill(self, before: Prompt, after: Prompt, tokens: int, **settings: Unpack[Settings]) -> Completion:
        """Fill a hole of exactly ``tokens`` tokens between two texts.

        The hole's latents are generated with their neighbours in the same blocks pinned; the
        surroundings are encoded with the hole's tokens masked. Blocks being causal, what comes
        after the hole's last block is not seen. Sampling settings as :meth:`generate`; ``stop``,
        ``end_ids`` and ``whole_sentences`` do not apply.

        Raises:
            ColadaError: as :meth:`generate`; or if the hole does not fall on whole latents (patch_size > 1).
        """
        tokens = require_count("tokens", tokens, MOST_TOKENS)
        request, transcript = self._open(before, tokens, settings, self.ids(after))
        return self._session_for([(request, transcript)], 1).completions()[0]

    def _check_length(self, ids: Sequence[int]) -> None:
        """Raise ColadaError for a text whose encoding needs more memory than there is."""
        if len(ids) > CHECKED_TOKENS:
            config = self.vae.config
            widths = ENCODER_ACTIVATIONS * (config.dim + config.ffn_dim)
            size = len(ids) * widths * self.vae.encoder.wte.weight.element_size()
            require_memory(size, self.device, f"a prompt of {len(ids)} tokens")
