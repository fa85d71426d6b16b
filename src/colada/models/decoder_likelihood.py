"""log p(x) of the baselines: exact for AR, LLaDA's own lower bound.

AR: sum over i of log p(x_i | x_<i). LLaDA (arXiv 2502.09992, equation 6): with l uniform on 1..L and l of the
L tokens masked at random,

    log p(x) >= E_l E_mask [ L / l * sum over masked i of log p(x_i | the unmasked) ]

A given context is visible throughout, and never masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from colada.device import plain_torch
from colada.generate.noise import block_generator
from colada.models.decoder import DecoderLM
from colada.networks.layers import Pass

LOGITS_ROWS = 1024
"""Tokens whose logits are computed together."""


@plain_torch()
def decoder_likelihoods(
    model: DecoderLM,
    contexts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    streams: Sequence[tuple[int, ...]],
    samples: int,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> list[float]:
    """Return log p(text | context) of each text, in nats: exact for AR, the mean of a bound for LLaDA.

    The arguments are those of :func:`~colada.models.likelihood.measure`, once checked.

    Args:
        contexts, texts: ids; contexts may be empty.
        streams: seed and number of each text, or a seed of its own, for a bound's masks.
    """
    values: list[float] = []
    for begin in range(0, len(texts), batch):
        some = slice(begin, begin + batch)
        if model.arch == "ar":
            values += _exact(model, contexts[some], texts[some])
        else:
            drawn = [_masked(model, contexts[some], texts[some], streams[some], k) for k in range(samples)]
            values += torch.stack(drawn).mean(0).tolist()
        if progress is not None:
            progress(sum(map(len, texts[: len(values)])), sum(map(len, texts)))
    return values


def _exact(
    model: DecoderLM, contexts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[float]:
    bos = model.decoder.config.bos_token_id
    rows = [[bos, *context, *text][:-1] for context, text in zip(contexts, texts, strict=True)]
    return _sums(model, rows, texts, [torch.arange(len(text)) for text in texts]).tolist()


def _masked(
    model: DecoderLM,
    contexts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    streams: Sequence[tuple[int, ...]],
    sample: int,
) -> Tensor:
    """Return one sample of the bound of each text, float64 (B,)."""
    mask, rows, chosen, weights = model.decoder.config.mask_id, [], [], []
    for (seed, *number), context, text in zip(streams, contexts, texts, strict=True):
        # Like those of blocks, whose purposes are 0 and 1.
        generator = block_generator(seed, number[0] if number else 0, 2 + sample)
        count = int(torch.randint(1, len(text) + 1, (), generator=generator))
        where = torch.randperm(len(text), generator=generator)[:count].sort().values
        ids = torch.tensor(text)
        ids[where] = mask
        rows.append([*context, *ids.tolist()])
        chosen.append(where)
        weights.append(len(text) / count)
    return _sums(model, rows, texts, chosen) * torch.tensor(weights, dtype=torch.float64)


def _sums(
    model: DecoderLM, rows: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], chosen: Sequence[Tensor]
) -> Tensor:
    """Return the sum of log p of the chosen tokens of each text, float64 (B,); texts end where rows do."""
    device = model.device
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    where = torch.cat(
        [end - len(text) + indices for end, text, indices in zip(ends, texts, chosen, strict=True)]
    ).to(device)
    targets = torch.cat(
        [torch.tensor(text)[indices] for text, indices in zip(texts, chosen, strict=True)]
    ).to(device)
    packed = torch.tensor([token for row in rows for token in row], device=device)
    layout = model.decoder.layout([len(row) for row in rows])
    hidden = model.decoder.run(packed, Pass(layout, model.decoder.table(layout.positions)))
    # A few at a time: of a long text, logits over the whole vocabulary would take most of the memory.
    parts = zip(hidden.index_select(0, where).split(LOGITS_ROWS), targets.split(LOGITS_ROWS), strict=True)
    each = torch.cat(
        [
            -F.cross_entropy(model.decoder.logits(hidden_part).double(), ids, reduction="none").cpu()
            for hidden_part, ids in parts
        ]
    )
    return torch.stack([losses.sum() for losses in each.split([len(losses) for losses in chosen])])
