"""Drawing in the readable loop: from a caption's latents to a picture's, which are one block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.flow import evaluations_of
from colada.generate.reference import transport
from colada.generate.settings import RequestSettings
from colada.networks.dit import DiT
from colada.networks.layers import History
from colada.networks.packing import Layout


def draw_latents(
    dit: DiT, captions: Sequence[Tensor], noise: Tensor, guidance: Sequence[float], settings: RequestSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Integrate noise to the latents of a picture for each caption.

    The caption is appended to a KV cache of its own at t = 0; the picture has the first position after it.
    Guidance is against a picture without a caption.

    Args:
        dit: a network that has pictures.
        captions: of each sample, normalised text latents (L, C) in whole blocks; none draws whatever comes.
        noise: (B, M, C).
        guidance: scale per sample; 1 is off.
        settings: solver, schedule and steps, and how guidance is bounded.

    Yields: after every evaluation z and the z0 that its velocity points at, each (B, M, C).

    Raises:
        ColadaError: for a network without pictures, or captions that are no whole blocks.
    """
    size, lengths = dit.config.block_size, [len(caption) for caption in captions]
    if dit.config.img_grid is None:
        raise ColadaError(f"this model has no pictures: img_channels={dit.config.img_channels}")
    for length in lengths:
        if length % size:
            raise ColadaError(f"a caption of {length} latents, expected a multiple of block_size={size}")
    histories = [History() for _ in captions]
    if any(lengths):
        layout = dit.layout(lengths, histories)
        dit(
            torch.cat(list(captions)),
            torch.zeros((), device=noise.device),
            layout,
            histories,
            committing=True,
        )
    latents = noise.shape[1]
    picture = torch.ones(latents, dtype=torch.bool, device=noise.device)

    def lay_out(seen: Sequence[History | None]) -> Layout:
        before = [len(history or ()) for history in seen]
        places = [torch.full((latents,), position, device=noise.device) for position in before]
        return Layout.one_block(places, size, before, [picture] * len(seen))

    nothing = torch.zeros(noise.shape[:2], dtype=torch.bool, device=noise.device)
    evaluations = evaluations_of(settings.solver, settings.schedule, settings.steps, settings.early_end)
    yield from transport(
        dit, noise, histories, nothing, torch.zeros_like(noise), guidance, evaluations, settings, lay_out
    )
