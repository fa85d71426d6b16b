"""What steps with pictures cost, counted as :mod:`colada.train.cost` counts, with texts of a nominal length.

How long captions and answers are, and where they end in their blocks, is the data's business: they count as
:data:`CAPTION` and :data:`ANSWER` tokens, rounded up to whole blocks; a prompt as :data:`PROMPT`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from colada.device import parameters_of, unallocated
from colada.networks.config import DiTConfig, TextVAEConfig
from colada.networks.packing import sees
from colada.networks.pictures import describing_cells, drawing_cells
from colada.pictures.codec import ConvVAE, codec_parameters
from colada.pictures.config import CodecConfig
from colada.train.cost import (
    Phase,
    Placement,
    Work,
    adaln_entries,
    cola_phase,
    dit_position_bytes,
    encoder_flops,
    networks,
    prior_flops,
    state_bytes,
)
from colada.train.kinds import PicturesSection, PictureVAESection

CAPTION, ANSWER, PROMPT = 12, 13, 4
"""Tokens of a text that stands for all."""


def picture_phases(
    name: str, section: PicturesSection, configs: Mapping[str, Any], work: Work, placement: Placement
) -> list[Phase]:
    """Return what the steps of each task compute and need, in the order of the section's tasks.

    Args:
        work: of a step of text.
    """
    vae, dit, image = configs["vae"], configs["dit"], configs["image"]
    total, rest = sum(section.tasks.values()), section.steps
    phases = []
    for number, (task, share) in enumerate(section.tasks.items(), start=1):
        steps = rest if number == len(section.tasks) else min(rest, round(section.steps * share / total))
        rest -= steps
        title = f"{name}, {task}"
        if task == "text":
            phases.append(cola_phase(title, steps, vae, dit, work, placement))
        else:
            phases.append(_pair_phase(title, steps, vae, dit, image, section, placement, task == "describe"))
    return phases


def _pair_phase(
    title: str,
    steps: int,
    vae: TextVAEConfig,
    dit: DiTConfig,
    image: CodecConfig,
    section: PicturesSection,
    placement: Placement,
    describes: bool,
) -> Phase:
    text, prior = networks(vae, dit)
    pairs = section.batch * section.pairs
    blocks, before = -(-(ANSWER if describes else CAPTION) // vae.block_tokens), 0
    length, size, learnt = blocks * vae.block_size, vae.block_size, describes or section.learns_captions
    if describes:
        before = -(-PROMPT // vae.block_tokens)
        row = torch.tensor([before * size]), torch.tensor([length])
        cells = describing_cells(row[0], before * size, row[1], length, image.latents, size)
    else:
        cells = drawing_cells(torch.tensor([length]), length, image.latents, size, learnt)
    (positions,) = cells.kind[0].shape
    visible = int(sees(cells.at((0, slice(None), None)), cells.at(0)).sum())
    timesteps = pairs * (blocks * learnt + (not describes)) + 1
    flops = {
        "encoder": float(pairs * sum(encoder_flops(vae, text, count) for count in (blocks, before))),
        "DiT": 3.0 * pairs * prior_flops(prior, positions, visible),
        "AdaLN": 3.0 * 2 * timesteps * adaln_entries(prior, pictures=True),
        "picture codec": pairs * _codec_flops(image)[0],
    }
    memory = state_bytes([prior], placement)
    memory["frozen networks"] = 4 * parameters_of(text) / placement.shards + 4 * _codec_numbers(image)
    rows = placement.micro_batch * section.pairs
    memory["activations"] = float(rows * positions * dit_position_bytes(dit, placement))
    memory["masks"] = float(rows * positions**2)
    tokens = pairs * blocks * vae.block_tokens
    described = {"rows": pairs, "latents": positions, "pairs": visible, "task": title}
    narrow = 6.0 * parameters_of(prior) * pairs * (length * learnt + (0 if describes else image.latents))
    return Phase(title, steps, tokens, flops, memory, placement, described, narrow)


def codec_phase(name: str, section: PictureVAESection, image: CodecConfig, placement: Placement) -> Phase:
    """Return the steps of a convolutional codec's stage."""
    with unallocated():
        codec = ConvVAE(image)
    pairs, (encoder, decoder) = section.batch * section.pairs, _codec_flops(image)
    memory = state_bytes([nn.ModuleDict({"codec": codec})], placement)
    # Each layer's input and output, and its norm's, at each resolution; features double as sides are halved.
    stored_bytes = 4 * 10 * image.width * image.size**2 * 2
    memory["activations"] = float(placement.micro_batch * section.pairs * stored_bytes)
    flops = {"encoder": 3.0 * pairs * encoder, "decoder": 3.0 * pairs * decoder}
    return Phase(name, section.steps, 0, flops, memory, placement, asdict(image) | {"rows": pairs}, 0.0)


def _codec_numbers(image: CodecConfig) -> int:
    linear = image.patch_numbers * (image.channels + 1) + image.channels
    return linear if image.kind == "patch_pca" else codec_parameters(image)


def _codec_flops(image: CodecConfig) -> tuple[float, float]:
    """Return the FLOPs of encoding a picture, and of decoding it."""
    if image.kind == "patch_pca":
        linear = 2.0 * image.latents * image.patch_numbers * image.channels
        return linear, linear
    with unallocated():
        codec = ConvVAE(image)
    flops = []
    for half, side, grows in (
        (codec.encoder, image.size, False),
        (codec.decoder, image.size // image.patch, True),
    ):
        total = 0.0
        for module in half.modules():
            if isinstance(module, nn.Upsample):
                side *= 2
            if isinstance(module, nn.Conv2d):
                side //= 1 if grows else module.stride[0]
                total += 2.0 * module.weight.numel() * side**2
        flops.append(total)
    return flops[0], flops[1]
