"""Flow matching of text and pictures: the errors of drawing from a caption and of describing a picture.

L = lambda_I · mean ‖v(z_a^I, a; C) − u_I‖² + lambda_N · L_text, the second term as for text alone. Latents
are normalised: text (B, L, C), pictures (B, M, C). Clean text is posterior means, at t = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colada.flow import PREDICTIONS, T, interpolate
from colada.networks.dit import DiT, Timesteps
from colada.networks.packing import Layout
from colada.networks.pictures import describing_layout, drawing_layout, widened


def drawing_errors(
    dit: DiT,
    captions: Tensor,
    lengths: Tensor,
    pictures: Tensor,
    noise: Tensor | None,
    picture_noise: Tensor,
    timestep: Tensor | None,
    picture_timestep: Tensor,
    alone: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return the errors per latent number of pictures given captions, and of the captions themselves.

    Args:
        captions: (B, L, C).
        lengths: int64 (B,), latents of each caption, in whole blocks; the others are padding.
        pictures: (B, M, P), P at most C.
        noise, picture_noise: as ``captions`` and ``pictures``; no noise: captions are not learnt.
        timestep: (B, L), constant within a block, of captions that are.
        picture_timestep: (B,).
        alone: bool (B,), pictures that do not see their caption, for guidance.

    Returns: (B, M) of the pictures and (B, L) of the captions, 0 in padding; None of captions not learnt.
    """
    length, latents = captions.shape[1], pictures.shape[1]
    learnt = noise is not None and timestep is not None
    layout = drawing_layout(lengths, length, latents, dit.config.block_size, alone, learnt)
    width, narrow = captions.shape[2], pictures.shape[2]
    times = picture_timestep[:, None].expand(-1, latents)
    target, noises = widened(pictures, width).to(picture_noise.dtype), widened(picture_noise, width)
    if noise is not None and timestep is not None:
        times, target = torch.cat([times, timestep], 1), torch.cat([target, captions], 1)
        noises = torch.cat([noises, noise], 1)
    errors = _errors(dit, captions, target, noises, times, layout)
    picture = errors[:, :latents] * (width / narrow)  # What it is widened by has no error.
    if not learnt:
        return picture, None
    text = errors[:, latents:]
    return picture, text.masked_fill(torch.arange(length, device=text.device) >= lengths[:, None], 0.0)


def describing_errors(
    dit: DiT,
    prompts: Tensor,
    prompt_lengths: Tensor,
    pictures: Tensor,
    answers: Tensor,
    lengths: Tensor,
    noise: Tensor,
    timestep: Tensor,
) -> Tensor:
    """Return the errors per latent number of answers given prompts and pictures, which are clean.

    Args:
        prompts: (B, P, C).
        prompt_lengths: int64 (B,), latents of each prompt, in whole blocks; the others are padding.
        pictures: (B, M, P), P at most C.
        answers: (B, L, C).
        lengths: int64 (B,), the same of each answer.
        noise: as ``answers``.
        timestep: (B, L), constant within a block.

    Returns: (B, L), 0 in padding.
    """
    length, size = answers.shape[1], dit.config.block_size
    layout = describing_layout(prompt_lengths, prompts.shape[1], lengths, length, pictures.shape[1], size)
    shown = widened(pictures, answers.shape[2])
    clean = torch.cat([prompts, shown, answers[:, : length - size]], 1)
    errors = _errors(dit, clean, answers, noise, timestep, layout)
    return errors.masked_fill(torch.arange(length, device=errors.device) >= lengths[:, None], 0.0)


def _errors(dit: DiT, clean: Tensor, z0: Tensor, noise: Tensor, timestep: Tensor, layout: Layout) -> Tensor:
    """Return the errors (B, n) of noisy cells after clean ones, which carry no gradient."""
    a = timestep / T
    packed = torch.cat([clean.detach(), interpolate(z0, noise, a)], 1).flatten(0, 1)
    times = torch.cat([timestep.new_zeros(clean.shape[:2]), timestep], 1).flatten()
    values, row = times.unique(return_inverse=True)
    output = dit(packed, Timesteps(values, row), layout, noisy_only=True)
    error = PREDICTIONS[dit.config.prediction].error(output.view_as(z0), z0.detach(), noise, a)
    return error.square().mean(-1)
