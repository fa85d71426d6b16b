"""What a Cola DLM writes, with the latents that it has written: what training on its own answers needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from colada.generate.settings import TextRequest
from colada.models.cola import ColaDLM
from colada.text.transcript import Completion


def roll_out(model: ColaDLM, requests: Sequence[TextRequest], batch: int = 64) -> list[Completion]:
    """Return answers, written ``batch`` at a time, with their latents and the ids of whole blocks.

    Raises:
        ColadaError: for a request that cannot be.
        GenerationError: if some failed.
    """
    opened = []
    for prompt, max_new_tokens, settings in requests:
        request, transcript = model._open(prompt, max_new_tokens, settings)
        opened.append((replace(request, latents=True), transcript))
    return model._session_for(opened, batch).completions()
