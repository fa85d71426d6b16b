"""What is lost before anything is learnt: by the reader, the codecs, and the Text VAE over captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from colada.evaluate.statistics import wilson
from colada.models.cola import ColaDLM
from colada.pictures.codec import Codec, fit
from colada.pictures.config import CodecConfig
from colada.pictures.reader import judge, read
from colada.pictures.shapes import Example, example, parse
from colada.pictures.sources import PictureFiles
from colada.report.table import Table
from experiments.pictures import twemoji

NOISE = (0.0, 0.1, 0.2, 0.3)
"""Of the latents, whose mean square is 1."""
CODECS = [(8, 64), (8, 48), (8, 32), (4, 16), (4, 24)]
"""Patch and channels of each linear codec; the first is the default."""
VALIDATION, SHUFFLES = 2**62, 3
TEST = VALIDATION + 10**6
"""First of the scenes that models are measured on; settings are chosen on those from VALIDATION on."""


def share(successes: int, trials: int) -> str:
    """Return a share with Wilson's 95% interval."""
    low, high = wilson(successes, trials)
    return f"{successes / trials:.3f} [{low:.3f}, {high:.3f}]"


def scenes(
    count: int,
    things: int | None = None,
    unseen: bool | None = None,
    grid: bool = False,
    first: int = VALIDATION,
) -> list[Example]:
    """Return scenes that no training draws, from a number on.

    Args:
        unseen: only those of combinations that training leaves out, or (False) of others; None is both.
    """
    return [example(0, first + n, things, unseen, grid) for n in range(count)]


def stack(examples: Sequence[Example]) -> Tensor:
    """Return the pictures of scenes as one tensor."""
    return torch.from_numpy(np.stack([item.picture for item in examples]))


def training_pictures(count: int) -> Iterator[Tensor]:
    """Yield batches of the first scenes that training draws."""
    size = 1000
    for first in range(0, count, size):
        yield stack([example(0, n) for n in range(first, min(first + size, count))])


# --- the reader --------------------------------------------------------------------------------


def reader_table(count: int) -> Table:
    """Return how often true pictures are read right, and how often a caption of another is."""
    table = Table(["scenes", "right", "with another's caption"])
    for things, grid in ((None, False), (None, True), (3, False), (3, True)):
        examples = scenes(count, things, grid=grid)
        readings = [read(item.picture) for item in examples]
        captions = [parse(item.caption) for item in examples]
        right = sum(
            str(reading) == item.answer and judge(reading, caption).right
            for reading, item, caption in zip(readings, examples, captions, strict=True)
        )
        by_chance = sum(
            judge(readings[n], captions[(n + shift) % count]).right
            for shift in range(1, SHUFFLES + 1)
            for n in range(count)
        )
        name = f"{things or '1 or 2'} things, {'on the patch grid' if grid else 'free places'}"
        table.row(name, share(right, count), share(by_chance, SHUFFLES * count))
    return table


# --- codecs ------------------------------------------------------------------------------------


class Quality(NamedTuple):
    """What a codec keeps of pictures: variance, decibels, and the share read right at each of NOISE."""

    variance: float
    decibels: float
    right: list[float]


def psnr(pictures: Tensor, others: Tensor) -> float:
    """Return the peak signal-to-noise ratio of uint8 pictures: −10 log10 of the mean square error in 0..1."""
    error = ((pictures.double() - others.double()) / 255).square().mean()
    return float(-10 * error.log10())


def quality(codec: Codec, examples: Sequence[Example]) -> Quality:
    """Return what a codec keeps of scenes."""
    pictures = stack(examples)
    pixels, latents = pictures.double() / 255, codec.encode(pictures)
    lost = (codec.pixels_of(latents).double() - pixels).square().mean()
    variance = 1 - lost / (pixels - pixels.mean(0)).square().mean()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    right = []
    for scale in NOISE:
        coded = codec.decode(latents + scale * noise).numpy()
        answers = [str(read(picture)) for picture in coded]
        right.append(
            sum(answer == item.answer for answer, item in zip(answers, examples, strict=True)) / len(answers)
        )
    return Quality(float(variance), psnr(pictures, codec.decode(latents)), right)


@torch.no_grad()
def codec_table(fitted_on: int, count: int, whitening: float, codecs: Sequence[Codec] = ()) -> Table:
    """Return a row for each linear codec, and for others that are trained already."""
    noise = [f"right, noise {scale:g}" if scale else "read right" for scale in NOISE]
    table = Table(["codec", "latents", "numbers", "variance kept", "PSNR dB", *noise])
    pictures = list(training_pictures(fitted_on))
    configs = [CodecConfig(patch=patch, channels=channels, whitening=whitening) for patch, channels in CODECS]
    examples = scenes(count)
    for codec in (*(fit(pictures, config) for config in configs), *codecs):
        config, kept = codec.config, quality(codec, examples)
        numbers = sum(tensor.numel() for tensor in codec.state_dict().values())
        name = f"{config.kind} {config.patch} × {config.patch}"
        shape, right = f"{config.latents} × {config.channels}", (f"{one:.3f}" for one in kept.right)
        table.row(name, shape, f"{numbers:,}", f"{kept.variance:.3f}", f"{kept.decibels:.1f}", *right)
    return table


# --- Twemoji -----------------------------------------------------------------------------------


@torch.no_grad()
def twemoji_table(source: PictureFiles, fitted_on: int) -> Table:
    """Return what linear codecs keep of the Twemoji, and how often a moved one is nearest to itself.

    They are fitted to the Twemoji and as many scenes as make them a half of all pictures, or fewer.
    """
    table = Table(["codec", "latents", "PSNR dB, Twemoji", "PSNR dB, scenes", "moved: top 1", "top 5"])
    emoji, others = torch.from_numpy(source.pictures), list(training_pictures(fitted_on))
    generator = np.random.default_rng(0)
    moved = torch.from_numpy(np.stack([twemoji.moved(picture, generator) for picture in source.pictures]))
    times = max(1, fitted_on // len(emoji))
    for patch, channels in CODECS:
        codec = fit([*others, *[emoji] * times], CodecConfig(patch=patch, channels=channels))
        shown = stack(scenes(300))
        # Distances between pictures as the codec keeps them: of pixels, in which no component is magnified.
        kept, kept_moved = (codec.pixels_of(codec.encode(one)).numpy() for one in (emoji, moved))
        rank = twemoji.ranks(kept_moved, range(len(emoji)), kept)
        decibels = (f"{psnr(one, codec.decode(codec.encode(one))):.1f}" for one in (emoji, shown))
        shares = (share(int((rank < most).sum()), len(rank)) for most in (1, 5))
        name, shape = f"patch_pca {patch} × {patch}", f"{codec.config.latents} × {channels}"
        table.row(name, shape, *decibels, *shares)
    return table


# --- captions ----------------------------------------------------------------------------------


def captions_table(model: ColaDLM, captions: Sequence[str]) -> Table:
    """Return how well a model's Text VAE spells captions back, by tokens and by whole captions."""
    tokens = right = whole = 0
    count = len(captions)
    for caption in captions:
        back = model.reconstruct(caption)
        tokens += len(back.tokens)
        right += round(back.accuracy * len(back.tokens))
        whole += back.accuracy == 1
    table = Table(["captions", "tokens", "tokens right", "captions right"])
    return table.row(f"{count:,}", f"{tokens / count:.1f} each", share(right, tokens), share(whole, count))
