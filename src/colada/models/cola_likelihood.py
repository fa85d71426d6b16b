"""A lower bound on log p(x), or on log p(x | context), from the model's own factors.

Generation without guidance maps noise to latents by a flow, so the latents on its way, at any a = t / T
above 0, are as good a hidden variable as the noise itself, and x is spelled from where the flow takes them.
With z_a for them,

    log p(x) >= E_q[ log p_theta(x | z0(z_a)) + log p_psi(z_a) - log q(z_a | x) ],

q(z_a | x) = N((1 - a) mu, (1 - a)^2 sigma^2 + a^2) being the encoder's posterior carried along the path. It
is a bound of the same model for every a; near a = 0, where a deterministic flow has contracted its density
to less than the posterior's width, it is a very loose one. With K samples: the importance-weighted
log (1/K) sum_k w_k (Burda et al., arXiv 1509.00519).

The prior's term: log p(z_a) = log N(z_1) + integral of div v from a to 1 (Chen et al., arXiv 1806.07366),
block by block under the finished blocks before. The divergence is the exact trace of the block's Jacobian
where it is small or K > 1, else Hutchinson's estimate e . J e, whose noise averages out for K = 1 but would
lift the log of a mean of K weights above the bound.

A context is given as a prompt is to generation: padded and encoded alone, as posterior means. Its whole
blocks are in the KV cache. The latents of its tail are pinned in the first block of x, at timestep 0: they
are no hidden variable, so they have neither density nor entropy, and the flow does not move them. As in
generation, x begins at a whole latent, after the padding that fills the context's last one. Only q sees
context and x together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from colada.device import plain_torch, require_memory
from colada.errors import ColadaError
from colada.flow import adams_bashforth2
from colada.generate.engine.engine import cache_bytes
from colada.generate.engine.memory import round_up
from colada.generate.reference import encode
from colada.models.cola import ColaDLM
from colada.models.prior import BlockFlow, Passes, Pins, log_prior
from colada.networks.config import TextVAEConfig
from colada.networks.layers import KVCache
from colada.networks.packing import pad_to_multiple
from colada.networks.vae import TextVAE
from colada.randomness import generator_of

EXACT_NUMBERS = 64
"""Numbers in a block up to which its trace is exact for K = 1, too."""

BATCH_LATENTS = 2**15
"""Latents of the texts that are measured together; one longer text is measured alone."""

GROUP_LATENTS = 128
"""Latents of a text that are differentiated, and spelled, together."""

CACHE_SHARE = 0.5
"""Of the memory, what a text's keys and values may take: what is differentiated needs about as much."""

FINISHING = 0.2
"""The share of the work that takes the latents to the data, about; only progress depends on it."""


@plain_torch(inference=False)
def cola_bounds(
    model: ColaDLM,
    contexts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    streams: Sequence[tuple[int, ...]],
    samples: int,
    at: float,
    steps: int,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[float], list[dict[str, float]]]:
    """Return the bound on each text's log-likelihood given its context, and the means of its three terms.

    A text is padded to whole blocks, as a prompt is; its padding's latents are part of z, but only its own
    tokens are scored. The arguments are those of :func:`~colada.models.likelihood.measure`, once checked.

    Args:
        model: its encoder must have a variance.
        contexts, texts: ids; contexts may be empty.
        streams: sample k of a text has the stream (*its own, k) of noise and probes.
        batch: samples of texts of as many blocks, after as many, that are computed together; of long texts
            fewer.

    Returns: bounds of all samples of a text together, and by name the means over samples of
    log p(x | z0(z_a)), log p(z_a) and -log q(z_a | x), which add up to the bound of one sample.

    Raises:
        ColadaError: for a deterministic encoder, a text too long for the memory, or velocities that are
            not finite.
    """
    config = model.vae.config
    if not config.use_variation:
        raise ColadaError("a deterministic encoder (use_variation false) has no density, so no bound")
    shapes = [_shape(*pair, config) for pair in zip(contexts, texts, strict=True)]
    latents = max((shape.prefix + shape.length for shape in shapes), default=0)
    longest = f"the KV cache of a text of {latents * config.patch_size:,} tokens"
    require_memory(cache_bytes(model.vae, model.dit, latents), model.device, longest, CACHE_SHARE)
    exact = samples > 1 or config.block_size * config.latent_dim <= EXACT_NUMBERS
    measurement = _Measurement(model, Passes(model.dit), at, steps, exact)
    tokens, done = sum(map(len, texts)), 0.0
    terms: dict[Row, Tensor] = {}
    for rows in _batches(shapes, samples, batch):
        size = sum(len(texts[number]) for number, _ in rows) / samples

        def advance(share: float, size: float = size) -> None:
            nonlocal done
            done = min(done + share * size, tokens)
            if progress is not None:
                progress(round(done), tokens)

        rows_terms = measurement.terms(
            [(contexts[number], texts[number]) for number, _ in rows],
            [(*streams[number], sample) for number, sample in rows],
            advance,
        )
        terms |= dict(zip(rows, rows_terms, strict=True))
    bounds, parts = [], []
    for number in range(len(texts)):
        sums = torch.stack([terms[number, sample] for sample in range(samples)])
        bounds.append(sums.sum(-1).logsumexp(0).item() - math.log(samples))
        if not math.isfinite(bounds[-1]):
            raise ColadaError(
                f"text {number} has a bound of {bounds[-1]}: the model's velocities are not finite"
            )
        parts.append(dict(zip(("reconstruction", "prior", "entropy"), sums.mean(0).tolist(), strict=True)))
    return bounds, parts


@dataclass(frozen=True)
class _TextShape:
    """Latents of a text: of the context's whole blocks, of its tail, and of all blocks after the former."""

    prefix: int
    tail: int
    length: int


def _shape(context: Sequence[int], text: Sequence[int], config: TextVAEConfig) -> _TextShape:
    latents, length = (-(-len(ids) // config.patch_size) for ids in (context, text))
    prefix = latents // config.block_size * config.block_size
    tail = latents - prefix
    return _TextShape(prefix, tail, round_up(tail + length, config.block_size))


Row = tuple[int, int]
"""Number of a text, and of one of its samples."""


def _batches(shapes: Sequence[_TextShape], samples: int, batch: int) -> Iterator[list[Row]]:
    """Yield rows of equally many latents after equally many: at most ``batch``, fewer of long texts."""
    alike: dict[tuple[int, int], list[Row]] = {}
    for number, shape in enumerate(shapes):
        rows = alike.setdefault((shape.prefix, shape.length), [])
        rows += [(number, sample) for sample in range(samples)]
    for latents, rows in alike.items():
        most = max(1, min(batch, BATCH_LATENTS // sum(latents)))
        for start in range(0, len(rows), most):
            yield rows[start : start + most]


def _group(rows: int, size: int) -> int:
    """Return how many latents of each row are differentiated, or spelled, together: whole blocks."""
    return max(1, min(GROUP_LATENTS, 4 * GROUP_LATENTS // rows) // size) * size


@dataclass(frozen=True)
class _Measurement:
    """How texts are measured: everything but the texts.

    Attributes:
        model, at, steps: see :func:`~colada.models.likelihood.measure`.
        passes: of the model's DiT.
        exact: take the trace itself for the divergence, not an estimate.
    """

    model: ColaDLM
    passes: Passes
    at: float
    steps: int
    exact: bool

    def terms(
        self,
        asked: Sequence[tuple[Sequence[int], Sequence[int]]],
        streams: Sequence[tuple[int, ...]],
        advance: Callable[[float], None],
    ) -> Tensor:
        """Return log p(x | z0(z_a)), log p(z_a) and -log q(z_a | x) of one sample a row, float64 (B, 3).

        Args:
            asked: contexts and texts, with equally many latents of prefix and blocks after it.
            streams: of each row's noise.
            advance: told what further share of the work is done.
        """
        model, at = self.model, self.at
        vae, device, config = model.vae, model.device, model.vae.config
        width, patch = config.latent_dim, config.patch_size
        shapes = [_shape(context, text, config) for context, text in asked]
        rows, prefix, length = len(asked), shapes[0].prefix, shapes[0].length
        generators = [generator_of(*stream) for stream in streams]
        whole = [[*pad_to_multiple(context, patch, model.pad_id), *text] for context, text in asked]
        padded = torch.tensor([pad_to_multiple(ids, config.block_tokens, model.pad_id) for ids in whole])
        with torch.no_grad():
            context_latents = encode(vae, [context for context, _ in asked], model.pad_id)
            clean = torch.stack([latents[:prefix] for latents in context_latents])
            tails = [
                latents[prefix : prefix + one.tail]
                for latents, one in zip(context_latents, shapes, strict=True)
            ]
            pins = Pins.first(tails, length)
            q = vae.encode(padded.flatten().to(device), [padded.shape[1]] * rows)
            assert q.logvar is not None
            noise = torch.stack(
                [torch.randn(length, width, generator=generator) for generator in generators]
            ).to(device)
            mean, logvar = (
                tensor.view(rows, -1, width)[:, prefix:] for tensor in (vae.normalise(q.mean), q.logvar)
            )
            sigma = (0.5 * logvar).exp() * config.scaling_factor
            deviation = ((1 - at) ** 2 * sigma**2 + at**2).sqrt()
            z = pins.put((1 - at) * mean + deviation * noise)
            entropy = pins.free_sum(
                0.5 * noise.double() ** 2 + 0.5 * math.log(2 * math.pi) + deviation.double().log()
            )
            flow = BlockFlow(self.passes, rows, prefix + length)
            flow.append(clean)
            # More steps to the data cost more and do not tighten the bound: see docs/evaluation.md.
            count = -(-self.steps // 2)
            grid = [at * (1 - step / count) for step in range(count + 1)]
            share = FINISHING * config.block_size / length
            finished = flow.finish(z, grid, adams_bashforth2, prefix, pins, lambda number: advance(share))
            begin = [(prefix + shape.tail) * patch for shape in shapes]
            end = [len(ids) for ids in whole]
            latents = torch.cat([clean, finished], 1)
            reconstruction = spelled(vae, latents, padded.to(device), begin, end)
        # Unit vectors of a block in all blocks at once, or random signs: see divergence.
        group, signs = _group(rows, config.block_size), None
        if not self.exact:
            signs = torch.stack(
                [torch.randint(2, (length, width), generator=generator) for generator in generators]
            )
            signs = (2.0 * signs - 1).to(device)
        prior = torch.zeros(rows, dtype=torch.float64, device=device)
        for start in range(0, length, group):
            group_latents = z[:, start : start + group]
            share = (1 - FINISHING) * group_latents.shape[1] / length / self.steps
            here = pins.part(start, start + group)
            prior += log_prior(
                flow.velocity(prefix + start, group_latents.shape[1], here.where),
                group_latents,
                _unit_probes(config.block_size, group_latents)
                if signs is None
                else signs[None, :, start : start + group],
                self.steps,
                at,
                here,
                lambda number, share=share: advance(share),  # type: ignore[misc]
            )
        return torch.stack([reconstruction, prior, entropy], -1).cpu()


def _unit_probes(size: int, z: Tensor) -> Tensor:
    """Return the unit vectors of a block, in all blocks of z (B, L, C) at once: (size * C, B, L, C)."""
    rows, length, width = z.shape
    probes = torch.eye(size * width, device=z.device).view(-1, 1, 1, size, width)
    return probes.expand(-1, rows, length // size, -1, -1).flatten(2, 3)


def spelled(vae: TextVAE, latents: Tensor, ids: Tensor, begin: Sequence[int], end: Sequence[int]) -> Tensor:
    """Return the sums of log p(token | latents) of tokens ``begin`` to ``end`` of each row, float64 (B,).

    A few blocks are decoded at a time, under those before them.

    Args:
        latents: (B, L, C).
        ids: (B, L * patch_size).
    """
    rows, patch, size = len(latents), vae.config.patch_size, vae.config.block_size
    caches = [KVCache() for _ in range(rows)]
    total = torch.zeros(rows, dtype=torch.float64, device=latents.device)
    group = _group(rows, size)
    first, last = (torch.tensor(bounds, device=latents.device)[:, None] for bounds in (begin, end))
    for start in range(0, latents.shape[1], group):
        part = latents[:, start : start + group]
        layout = vae.layout([part.shape[1]] * rows, caches)
        hidden = vae.decoder(part.flatten(0, 1), layout, caches)
        token = torch.arange(start * patch, (start + part.shape[1]) * patch, device=latents.device)
        scored = (token >= first) & (token < last)
        logits = vae.decoder.logits(hidden).view(rows, len(token), -1)[scored]
        values = -F.cross_entropy(logits.double(), ids[:, token][scored], reduction="none")
        total.index_add_(0, scored.nonzero()[:, 0], values)
    return total
