"""Drawing and describing pictures, of a Cola DLM that has learnt them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from colada.checks import MOST_TOKENS, require_count, require_flag
from colada.device import plain_torch
from colada.errors import ColadaError, ColadaWarning, shown
from colada.generate.canvas import Canvas
from colada.generate.reference import TransportStep
from colada.generate.session import Session
from colada.generate.settings import Prompt, RequestSettings, Settings, settings_of_each, several
from colada.generate.writer import Request
from colada.models.base import BATCH, LanguageModel
from colada.networks.dit import DiT
from colada.networks.vae import TextVAE
from colada.pictures.codec import Codec
from colada.pictures.config import words_of
from colada.pictures.load import load_picture
from colada.pictures.shapes import Picture
from colada.text.transcript import Chunk, Completion, Transcript

DRAWING: Settings = {
    "guidance": 2.0,
    "guidance_against": "block",  # Whatever the model's texts are guided against.
    "steps": 24,
    "solver": "ab2",
    "schedule": "front-loaded",
    "early_end": 0.1,  # Pictures' timesteps are near the noise: a network has hardly seen those below.
}
"""With what pictures are drawn unless a model's codec says otherwise."""
DESCRIBING: Settings = {
    "guidance": 1.0,
    "steps": 16,
    "solver": "ab2",
    "schedule": "front-loaded",
    "early_end": 0.1,
}
"""With what they are described."""


class PictureModel(LanguageModel):
    """What a model with pictures can do beside text."""

    vae: TextVAE
    dit: DiT
    image: Codec | None

    # --- drawing ---------------------------------------------------------------------------

    def draw(
        self,
        captions: Prompt | Sequence[Prompt],
        *,
        batch: int = BATCH,
        callback: Callable[[TransportStep], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **settings: Unpack[Settings],
    ) -> list[Picture]:
        """Draw a picture of every caption.

        A picture depends on its own caption, settings and seed, not on who shares the batch.

        Args:
            captions: texts, or lists of ids; one or several. An empty one draws whatever comes.
            batch, callback, progress: as in :meth:`generate`.
            settings: see :class:`Settings`; those of tokens do not apply.

        Returns: uint8 (S, S, 3) each, in order.

        Raises:
            ColadaError: naming the argument at fault, before anything is drawn, or for a model without
                pictures.
            GenerationError: if some failed; it carries the completions of the others.
        """
        session = self._drawing_session(captions, batch, settings, guesses=False)
        done = session.completions(callback, progress)
        return [picture for one in done if (picture := one.picture) is not None]

    def stream_drawing(
        self,
        captions: Prompt | Sequence[Prompt],
        *,
        batch: int = BATCH,
        guesses: bool = True,
        callback: Callable[[TransportStep], None] | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Chunk]:
        """Yield chunks with the picture of every caption as it forms; arguments as :meth:`draw`.

        With ``guesses``, there is one after every solver step, whose ``picture`` is what the step points at.
        A caption's last chunk has its finished picture.
        """
        guesses = require_flag("guesses", guesses)
        return self._drawing_session(captions, batch, settings, guesses).chunks(callback)

    def drawing(self, caption: Prompt, **settings: Unpack[Settings]) -> tuple[Request, Canvas]:
        """Return what :meth:`Session.add` takes to draw a caption beside other requests of a session.

        Raises:
            ColadaError: as :meth:`draw`.
        """
        (request_settings,) = settings_of_each(self._chosen_for_pictures("drawing", settings), 1)
        return self._drawing(caption, request_settings)

    def _drawing(self, caption: Prompt, settings: RequestSettings) -> tuple[Request, Canvas]:
        codec = self.codec()
        ids = self.ids(caption)
        unseen = self.unseen(caption) if isinstance(caption, str) else []
        if unseen:
            unknown_words = ", ".join(map(repr, unseen))
            warnings.warn(
                f"caption {shown(caption)}: in none that the model has learnt from: {unknown_words}",
                ColadaWarning,
                stacklevel=3,
            )
        return Request(tuple(ids), 0, settings, draws=codec.config.latents), Canvas(codec)

    def _drawing_session(
        self, captions: Any, batch: int, settings: Mapping[str, Any], guesses: bool
    ) -> Session:
        batch, chosen = require_count("batch", batch), self._chosen_for_pictures("drawing", settings)
        listed = several(captions)
        opened = list(map(self._drawing, listed, settings_of_each(chosen, len(listed))))
        return self._session_for(opened, batch, guesses)

    # --- describing ------------------------------------------------------------------------

    def describe(
        self,
        pictures: Picture | str | Path | Sequence[Picture | str | Path],
        max_new_tokens: int = 48,
        *,
        prompt: Prompt = "",
        batch: int = BATCH,
        callback: Callable[[TransportStep], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **settings: Unpack[Settings],
    ) -> list[Completion]:
        """Say what is in every picture.

        Args:
            pictures: uint8 (S, S, 3) each, or files, which are cut to their middle square and scaled: a
                warning says what was changed in each; one or several.
            max_new_tokens: how many tokens each answer gets at most.
            prompt: what is asked of each.
            batch, callback, progress, settings: as in :meth:`generate`.

        Returns: one completion a picture, in order.

        Raises:
            ColadaError: naming the argument at fault, before anything is written, or for a model without
                pictures.
            GenerationError: if some failed; it carries the completions of the others.
        """
        batch = require_count("batch", batch)
        if isinstance(pictures, str | Path) or (isinstance(pictures, np.ndarray) and pictures.ndim != 4):
            pictures = [pictures]
        if not isinstance(pictures, Iterable):
            what = "a file or uint8 (S, S, 3), or several of these"
            raise ColadaError(f"pictures={shown(pictures)}, expected {what}")
        listed = list(pictures)
        chosen = self._chosen_for_pictures("describing", settings)
        each = settings_of_each(chosen, len(listed))
        opened = [
            self._describing(picture, max_new_tokens, prompt, request_settings)
            for picture, request_settings in zip(listed, each, strict=True)
        ]
        return self._session_for(opened, batch).completions(callback, progress)

    def describing(
        self,
        picture: Picture | str | Path,
        max_new_tokens: int = 48,
        *,
        prompt: Prompt = "",
        **settings: Unpack[Settings],
    ) -> tuple[Request, Transcript]:
        """Return what :meth:`Session.add` takes to describe a picture beside other requests of a session.

        Raises:
            ColadaError: as :meth:`describe`.
        """
        (request_settings,) = settings_of_each(self._chosen_for_pictures("describing", settings), 1)
        return self._describing(picture, max_new_tokens, prompt, request_settings)

    def _describing(
        self, picture: Any, max_new_tokens: int, prompt: Prompt, settings: RequestSettings
    ) -> tuple[Request, Transcript]:
        codec, count = self.codec(), require_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
        size = codec.config.size
        if isinstance(picture, str | Path):
            loaded = load_picture(picture, size)
            if loaded.changes:
                changed = ", ".join(map(str, loaded.changes))
                warnings.warn(f"{picture}: {changed}", ColadaWarning, stacklevel=3)
            picture = loaded.picture
        if not isinstance(picture, np.ndarray):
            raise ColadaError(f"picture {shown(picture)}, expected a file or uint8 ({size}, {size}, 3)")
        if picture.dtype != np.uint8 or picture.shape != (size, size, 3):
            what = f"of shape {picture.shape} and type {picture.dtype}"
            raise ColadaError(f"a picture {what}, expected uint8 ({size}, {size}, 3), or a file")
        with plain_torch():
            latents = codec.encode(torch.from_numpy(np.ascontiguousarray(picture))[None])[0]
        stop, end_ids = self.endings(settings)
        # Nothing is asked for by "" also of a model without a tokenizer.
        ids = [] if isinstance(prompt, str) and not prompt else self.ids(prompt)
        request = Request(tuple(ids), count, settings, picture=latents)
        return request, Transcript(
            self.tokenizer, 0, count, stop, end_ids, whole_sentences=settings.whole_sentences
        )

    def unseen(self, caption: str) -> list[str]:
        """Return the words of a caption that the model has learnt nothing of, as far as it knows."""
        known, words = self.codec().config.words, dict.fromkeys(words_of(caption))
        return [] if known is None else [word for word in words if word not in known]

    # --- both ------------------------------------------------------------------------------

    def codec(self) -> Codec:
        """Return the picture codec; raises ColadaError for a model that has text only."""
        if self.image is None:
            name = self.origin or "this model"
            raise ColadaError(f"{name} has no pictures: img_channels=0 (recipes/pictures.yaml trains one)")
        return self.image

    def _chosen_for_pictures(self, task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return all settings of drawing or describing: those given, the codec's, or the usual ones."""
        config = self.codec().config
        stored = config.drawing if task == "drawing" else config.describing
        usual: Mapping[str, Any] = DRAWING if task == "drawing" else DESCRIBING
        if self.dit.config.distilled is not None:  # It has guidance and steps built in.
            usual = {}
        asked = self.check(settings)
        if task == "drawing" and asked.get("candidates", 1) != 1:
            raise ColadaError(
                f"candidates={asked['candidates']} of a picture, expected 1: only text has more"
            )
        stored_settings = self.check(stored or {}, f"{self.origin}: cola_image: {task}")
        return self.chosen({**usual, "candidates": 1, **stored_settings, **asked})
