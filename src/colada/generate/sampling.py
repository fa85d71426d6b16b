"""From logits to tokens: repetition penalty, then temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.generate.settings import RequestSettings

COLDEST = 2.0**-126
"""Temperatures below it have the same distribution: a GPU multiplies by the inverse, which must exist."""


def pick(
    logits: Tensor, settings: RequestSettings, seen: Collection[int], generator: torch.Generator
) -> Tensor:
    """Pick one token per row of logits (n, V) of one sample; ``seen`` are the ids to penalise.

    Returns: int64 (n,) on the CPU.

    Raises:
        ColadaError: for logits that are no numbers: what is picked from them means nothing.
    """
    if not bool(logits.isfinite().all()):
        raise ColadaError("logits that are not finite")
    penalty = settings.repetition_penalty
    if penalty != 1 and seen:
        ids = torch.tensor(sorted(seen), device=logits.device)
        logits = logits.float()  # Half precision has no room for a penalty of 100.
        known = logits[:, ids]
        logits = logits.index_copy(1, ids, torch.where(known > 0, known / penalty, known * penalty))
    if settings.temperature == 0:
        return logits.argmax(-1).cpu()
    # Drawn on the CPU, from the sample's own generator, so that devices agree.
    return torch.multinomial(probabilities(logits, settings).cpu(), 1, generator=generator).squeeze(-1)


def probabilities(logits: Tensor, settings: RequestSettings) -> Tensor:
    """Return the distribution (n, V) that tempered, cut-off logits (n, V) define."""
    # The largest logit at 0, so that the smallest temperature cannot overflow.
    logits = (logits.float() - logits.float().amax(-1, keepdim=True)) / max(settings.temperature, COLDEST)
    if 0 < settings.top_k < logits.shape[-1]:
        threshold = logits.topk(settings.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    shares = logits.softmax(-1)
    if settings.top_p < 1:
        ordered, order = shares.sort(-1, descending=True)
        # A token stays while the likelier ones have not reached p: the first always does.
        beyond = ordered.cumsum(-1) - ordered >= settings.top_p
        shares = torch.zeros_like(shares).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
        shares = shares / shares.sum(-1, keepdim=True)
    return shares


def surest(logits: Tensor, free: Tensor) -> int:
    """Return which of a block's candidates the decoder is surest of, by its likeliest tokens.

    That is the one with the highest mean of max log p(token | latents) over tokens that are not pinned; of
    equal ones the first. One that is not finite is the least.

    Args:
        logits: (K, n, V).
        free: bool (n,), tokens that are not pinned.
    """
    if len(logits) == 1:
        return 0
    mean = logits.float().log_softmax(-1).amax(-1)[:, free].mean(-1)
    return int(mean.nan_to_num(-math.inf).argmax())


def confidence(logits: Tensor, ids: Tensor) -> tuple[float, ...]:
    """Return the probability of each id (n,) under its row of untempered logits (n, V)."""
    probabilities = logits.float().softmax(-1).gather(1, ids.to(logits.device)[:, None])
    return tuple(probabilities.squeeze(1).tolist())
