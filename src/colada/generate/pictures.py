"""Drawing and describing in the readable loop: latents of captions to those of pictures, and back.

A picture is one block, whose latents all see each other. It has the first position after the text before it,
and text after it begins with the next block.

:func:`draw_latents`, :func:`describe_block` and :func:`append_block` are the readable loop, with which tests
compare the engine; the engine itself uses :func:`show` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.flow import evaluations_of
from colada.generate.reference import transport
from colada.generate.settings import RequestSettings
from colada.networks.dit import DiT
from colada.networks.layers import KVCache
from colada.networks.packing import Layout
from colada.networks.pictures import widened


@dataclass
class Context:
    """What a block follows: a KV cache, and the position after it, which is a block's first."""

    cache: KVCache = field(default_factory=KVCache)
    position: int = 0


def draw_latents(
    dit: DiT, captions: Sequence[Tensor], noise: Tensor, guidance: Sequence[float], settings: RequestSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Integrate noise to the latents of a picture for each caption.

    Guidance is against a picture without a caption.

    Args:
        dit: a network that has pictures.
        captions: of each sample, normalised text latents (L, C) in whole blocks; none draws whatever comes.
        noise: (B, M, P), P at most C.
        guidance: scale per sample; 1 is off.
        settings: solver, schedule and steps, and how guidance is bounded.

    Yields: after every evaluation z and the z0 that its velocity points at, each (B, M, P).

    Raises:
        ColadaError: for a network without pictures, or captions that are no whole blocks.
    """
    lengths = _check(dit, captions)
    contexts = [Context(position=length) for length in lengths]
    caches = [context.cache for context in contexts]
    if any(lengths):
        _append(dit, captions, dit.layout(lengths, caches), contexts)
    wide = widened(noise, dit.config.txt_in_channels)
    for z, z0 in _transport(dit, contexts, wide, guidance, settings, picture=True):
        yield z[..., : noise.shape[2]], z0[..., : noise.shape[2]]


def show(dit: DiT, prompts: Sequence[Tensor], pictures: Tensor) -> list[Context]:
    """Return what an answer follows: each prompt and its picture, which see each other, in one pass at t = 0.

    Args:
        dit: a network that has pictures.
        prompts: of each sample, normalised text latents (L, C) in whole blocks, or none.
        pictures: (B, M, P), P at most C.

    Raises:
        ColadaError: for a network without pictures, or prompts that are no whole blocks.
    """
    lengths = _check(dit, prompts)
    pictures = widened(pictures, dit.config.txt_in_channels)
    latents, device = pictures.shape[1], pictures.device
    contexts = [Context(position=length + dit.config.block_size) for length in lengths]
    places = [
        torch.cat([torch.arange(length, device=device), torch.full((latents,), length, device=device)])
        for length in lengths
    ]
    kinds = [torch.arange(length + latents, device=device) >= length for length in lengths]
    layout = Layout.one_block(places, dit.config.block_size, [0] * len(lengths), kinds)
    joined = [torch.cat([prompt, picture]) for prompt, picture in zip(prompts, pictures, strict=True)]
    _append(dit, joined, layout, contexts)
    return contexts


def describe_block(
    dit: DiT, contexts: Sequence[Context], noise: Tensor, guidance: Sequence[float], settings: RequestSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Integrate noise to the next block of each answer; guidance is against a block that follows nothing.

    Args:
        dit, contexts: of :func:`show`; finished blocks are appended by :func:`append_block`.
        noise: (B, block, C).
        guidance, settings: as in :func:`draw_latents`.

    Yields: after every evaluation z and the z0 that its velocity points at, each (B, block, C).
    """
    yield from _transport(dit, contexts, noise, guidance, settings, picture=False)


def append_block(dit: DiT, contexts: Sequence[Context], latents: Tensor) -> None:
    """Append finished blocks of text (B, block, C) to what the next ones follow."""
    _append(dit, list(latents), _blocks(dit, contexts, [latents.shape[1]] * len(contexts), False), contexts)
    for context in contexts:
        context.position += latents.shape[1]


def _check(dit: DiT, texts: Sequence[Tensor]) -> list[int]:
    """Return how long texts are."""
    size = dit.config.block_size
    for text in texts:
        if len(text) % size:
            raise ColadaError(f"a text of {len(text)} latents, expected a multiple of block_size={size}")
    return [len(text) for text in texts]


def _append(dit: DiT, latents: Sequence[Tensor], layout: Layout, contexts: Sequence[Context]) -> None:
    clean = torch.zeros((), device=layout.device)
    caches = [context.cache for context in contexts]
    dit(torch.cat(list(latents)), clean, layout, caches, appending=True)


def _blocks(dit: DiT, contexts: Sequence[Context], lengths: Sequence[int], picture: bool) -> Layout:
    """Return the layout of a block, or a latent, a sample, of a picture or of text."""
    device = dit.txt_in.proj.weight.device
    counts = [torch.arange(length, device=device) * (not picture) for length in lengths]
    places = [context.position + count for context, count in zip(contexts, counts, strict=True)]
    kinds = [torch.full((length,), picture, device=device) for length in lengths]
    cached = [len(context.cache) for context in contexts]
    return Layout.one_block(places, dit.config.block_size, cached, kinds)


def _transport(
    dit: DiT,
    contexts: Sequence[Context],
    noise: Tensor,
    guidance: Sequence[float],
    settings: RequestSettings,
    picture: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    def lay_out(lengths: Sequence[int], seen: Sequence[KVCache | None]) -> Layout:
        # Those that are guided against come last; where what sees only itself stands is all one.
        rows = [*contexts, *[Context() for _ in seen[len(contexts) :]]]
        return _blocks(dit, rows, lengths, picture)

    nothing = torch.zeros(noise.shape[:2], dtype=torch.bool, device=noise.device)
    evaluations = evaluations_of(settings.solver, settings.schedule, settings.steps, settings.early_end)
    caches = [context.cache for context in contexts]
    yield from transport(
        dit, noise, caches, nothing, torch.zeros_like(noise), guidance, evaluations, settings, lay_out
    )
