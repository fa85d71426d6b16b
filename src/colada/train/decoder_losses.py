"""What the baselines minimise, in nats per token.

AR: -log p(x_i | x_<i), every token, the first of a sample after ``bos_token_id``.
LLaDA: of the n tokens of a row, l masked at random, l uniform on 1..n, and n/l * sum over masked i of
-log p(x_i | the unmasked). That has the expectation of masking each token with probability t ~ U(0, 1) and a
weight of 1/t (arXiv 2502.09992, equations 3 and 6), without the rows in which next to nothing is masked and
1/t is huge. A small share of rows is cut to a random length.

As in :mod:`colada.train.losses`, what is random is drawn first, row by row, and sums are divided by counts of
the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from colada.data.rows import FILLING, Batch, RowTensors
from colada.networks.config import DecoderConfig
from colada.networks.decoder import Decoder
from colada.train.losses import Loss
from colada.train.noise import Counts


@dataclass(frozen=True)
class MaskNoise(RowTensors):
    """Everything random in the loss of a LLaDA batch; an AR one has nothing random.

    Attributes:
        share: (B,), uniform on (0, 1]: which share of a row's tokens is masked.
        order: (B, L), uniform: the tokens with the least are masked.
        length: (B,), tokens that the row is cut to.
    """

    share: Tensor | None = None
    order: Tensor | None = None
    length: Tensor | None = None


def draw_masks(generators: Sequence[torch.Generator], length: int, random_length: float) -> MaskNoise:
    """Draw shares, orders and lengths, each row from a CPU generator of its own.

    Args:
        generators: one a row.
        length: tokens a row.
        random_length: share of rows that are cut to a length uniform on 1..length.
    """
    shares, orders, lengths = [], [], []
    for generator in generators:
        shares.append(1 - torch.rand((), generator=generator))
        orders.append(torch.rand(length, generator=generator))
        cut = torch.rand((), generator=generator) < random_length
        shorter = torch.randint(1, length + 1, (), generator=generator)
        lengths.append(torch.where(cut, shorter, length))
    return MaskNoise(torch.stack(shares), torch.stack(orders), torch.stack(lengths))


def learnt_tokens(batch: Batch, noise: MaskNoise) -> Tensor:
    """Return which tokens are learnt, masked or not: bool (B, L), no prompts, filling, or what is cut off."""
    learnt = torch.ones_like(batch.ids, dtype=torch.bool) if batch.trained is None else batch.trained
    if batch.sample is not None:
        learnt = learnt & (batch.sample != FILLING)
    if noise.length is not None:
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        learnt = learnt & (position < noise.length[:, None])
    return learnt


def count(batch: Batch, noise: MaskNoise) -> Counts:
    """Return a batch's share in the counts of its step: tokens with a loss."""
    return Counts(float(learnt_tokens(batch, noise).sum()), 0.0, 0.0)


def first_tokens(batch: Batch) -> Tensor:
    """Return which tokens begin a sample, bool (B, L)."""
    first = torch.zeros_like(batch.ids, dtype=torch.bool)
    first[:, 0] = True
    if batch.sample is not None:
        first[:, 1:] = batch.sample[:, 1:] != batch.sample[:, :-1]
    return first


def decoder_loss(decoder: Decoder, batch: Batch, noise: MaskNoise, counts: Counts | None = None) -> Loss:
    """Return the loss of rows by the decoder's objective.

    Args:
        batch: rows of L tokens.
        noise: of :func:`draw_masks` for "llada", empty for "ar".
        counts: of the whole step; None where the batch is the step.
    """
    counts = counts or count(batch, noise)
    config, (rows, length) = decoder.config, batch.ids.shape
    learnt = learnt_tokens(batch, noise)
    inputs, where, weights = _visible(config, batch, noise, learnt)
    sample = batch.sample
    if noise.length is not None and bool((noise.length < length).any()):
        # What is cut off is a sample of its own, that the rest does not see.
        sample_of = torch.zeros_like(batch.ids) if sample is None else sample
        position = torch.arange(length, device=sample_of.device)
        sample = sample_of.masked_fill(position >= noise.length[:, None], FILLING)
    layout = decoder.rows_layout(rows, length, sample)
    at = where.flatten().nonzero().squeeze(1)
    ids = batch.ids.flatten()[at]
    logits = decoder(inputs.flatten(), layout, at)
    nll = F.cross_entropy(logits, ids, reduction="none")
    total = (nll * weights.flatten()[at]).sum() / counts.tokens
    right = (logits.argmax(-1) == ids).float() * weights.flatten()[at]
    return Loss(total, {"nll": total.detach(), "accuracy": right.sum() / counts.tokens})


def _visible(
    config: DecoderConfig, batch: Batch, noise: MaskNoise, learnt: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the decoder reads (B, L), which outputs have a loss, bool, and how much each counts."""
    if config.objective == "ar":
        inputs = batch.ids.roll(1, 1).masked_fill(first_tokens(batch), config.bos_token_id)
        return inputs, learnt, torch.ones_like(learnt, dtype=torch.float32)
    assert noise.order is not None
    assert noise.share is not None
    tokens = learnt.sum(1)
    count = (noise.share * tokens).ceil()
    rank = noise.order.masked_fill(~learnt, 2.0).argsort(1).argsort(1)
    masked = learnt & (rank < count[:, None])
    inputs = batch.ids.masked_fill(masked, config.mask_id)
    return inputs, masked, (tokens / count.clamp(min=1))[:, None].expand(batch.ids.shape)
