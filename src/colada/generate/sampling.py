"""From logits to tokens: repetition penalty, then temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.generate.settings import check_settings

COLDEST = 2.0**-126
"""Temperatures below it have the same distribution: a GPU multiplies by the inverse, which must exist."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked.

    Attributes:
        temperature: 0 picks the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set whose probability reaches p; 1 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of
            tokens decoded in earlier blocks; 1 is off.

    Raises:
        ColadaError: naming a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_settings(asdict(self))

    def pick(self, logits: Tensor, seen: Collection[int], generator: torch.Generator) -> Tensor:
        """Pick one token per row of logits (n, V) of one sample; ``seen`` are the ids to penalise.

        Returns: int64 (n,) on the CPU.

        Raises:
            ColadaError: for logits that are no numbers: what is picked from them means nothing.
        """
        if not bool(logits.isfinite().all()):
            raise ColadaError("logits that are not finite")
        if self.repetition_penalty != 1 and seen:
            ids = torch.tensor(sorted(seen), device=logits.device)
            logits = logits.float()  # Half precision has no room for a penalty of 100.
            known = logits[:, ids]
            penalty = self.repetition_penalty
            logits = logits.index_copy(1, ids, torch.where(known > 0, known / penalty, known * penalty))
        if self.temperature == 0:
            return logits.argmax(-1).cpu()
        probabilities = self.probabilities(logits)
        # Drawn on the CPU, from the sample's own generator, so that devices agree.
        return torch.multinomial(probabilities.cpu(), 1, generator=generator).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution (n, V) that tempered, cut-off logits (n, V) define."""
        # The largest logit at 0, so that the smallest temperature cannot overflow.
        logits = (logits.float() - logits.float().amax(-1, keepdim=True)) / max(self.temperature, COLDEST)
        if 0 < self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < threshold, -math.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            # A token stays while the likelier ones have not reached p: the first always does.
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            kept = ordered.masked_fill(beyond, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities


def confidence(logits: Tensor, ids: Tensor) -> tuple[float, ...]:
    """Return the probability of each id (n,) under its row of untempered logits (n, V)."""
    probabilities = logits.float().softmax(-1).gather(1, ids.to(logits.device)[:, None])
    return tuple(probabilities.squeeze(1).tolist())
