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
blocks are clean history. The latents of its tail are pinned in the first block of x, at timestep 0: they are
no hidden variable, so they have neither density nor entropy, and the flow does not move them. As in
generation, x begins at a whole latent, after the padding that fills the context's last one. Only q sees
context and x together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from colada.checks import require_count, require_function
from colada.device import memory_of, plain_torch
from colada.errors import ColadaError
from colada.evaluate.texts import check_bound, ratio_error
from colada.flow import AdamsBashforth2
from colada.generate.engine.memory import round_up
from colada.generate.reference import encode
from colada.generate.settings import Prompt, check_settings, several
from colada.models.cola import ColaDLM
from colada.models.prior import BlockFlow, Passes, Pins, log_prior
from colada.networks.config import TextVAEConfig
from colada.networks.layers import History
from colada.networks.packing import pad_to_multiple
from colada.networks.vae import TextVAE

EXACT_NUMBERS = 64
"""Numbers in a block up to which its trace is exact for K = 1, too."""

BATCH_LATENTS = 2**15
"""Latents of the texts that are measured together; one longer text is measured alone."""

GROUP_LATENTS = 128
"""Latents of a text that are differentiated, and spelled, together."""

PASS_COST = 1e8
"""FLOPs whose time a pass over a single block takes beside its own; only progress depends on it."""


@dataclass(frozen=True)
class TextBound:
    """The bound of one text, given its context, in nats.

    Attributes:
        tokens, bytes: the text's size; bytes are of UTF-8, 0 for a prompt of ids.
        bound: on log p(x), of all samples together.
        reconstruction, prior, entropy: means of log p(x | z0(z_a)), log p(z_a) and -log q(z_a | x); they
            add up to the bound of one sample.
    """

    tokens: int
    bytes: int
    bound: float
    reconstruction: float
    prior: float
    entropy: float


@dataclass(frozen=True)
class Likelihood:
    """Bounds of several texts.

    Attributes:
        texts: one each.
        samples: K.
    """

    texts: tuple[TextBound, ...]
    samples: int

    @property
    def bits_per_byte(self) -> float:
        """An upper bound on the texts' bits per byte, all bytes counting alike."""
        return -sum(text.bound for text in self.texts) / math.log(2) / sum(text.bytes for text in self.texts)

    @property
    def bits_per_token(self) -> float:
        """An upper bound on the texts' bits per token."""
        return -sum(text.bound for text in self.texts) / math.log(2) / sum(text.tokens for text in self.texts)

    @property
    def error(self) -> float:
        """The standard error of :attr:`bits_per_byte` over texts (of a ratio), NaN for a single one."""
        bits = [-text.bound / math.log(2) for text in self.texts]
        error = ratio_error(bits, [text.bytes for text in self.texts])
        return math.nan if error is None else error


@plain_torch(inference=False)
def likelihood(
    model: ColaDLM,
    texts: Sequence[Prompt],
    given: Sequence[Prompt] | None = None,
    *,
    samples: int = 1,
    at: float = 0.6,
    steps: int = 16,
    seed: int | Sequence[int] = 0,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Return lower bounds on the log-likelihood of texts, each given its context.

    A text is padded to whole blocks, as a prompt is; its padding's latents are part of z, but only its own
    tokens are scored. Noise and probes are drawn per text and sample: results do not depend on ``batch``.

    Args:
        model: its encoder must have a variance.
        texts: texts, or lists of ids; none empty.
        given: what each text follows, see the module; an empty one is none, as is None for all.
        samples: K.
        at: a of the latents z_a, above 0 and below 1.
        steps: of the flow from a to 1 (Heun, two evaluations each), and half as many of AB2 from a to 0.
        seed: text i, sample k have the stream of (seed, i, k); or of (seed[i], k), with one each.
        batch: samples of texts of as many blocks, after as many, that are computed together; of long texts
            fewer.
        progress: called every now and then with how many tokens' work is done, and of how many.

    Raises:
        ColadaError: naming a value out of range, for an empty text, other than one context or seed a text,
            or a deterministic encoder.
    """
    texts = several(texts)
    given = [[] for _ in texts] if given is None else several(given)
    check_bound(samples, at, steps)
    samples, steps = require_count("samples", samples), require_count("steps", steps)
    batch = require_count("batch", batch)
    seed = check_settings({"seed": seed}).get("seed", 0)
    require_function("progress", progress)
    if not model.vae.config.use_variation:
        raise ColadaError("a deterministic encoder (use_variation false) has no density, so no bound")
    if len(given) != len(texts):
        raise ColadaError(f"{len(given)} contexts for {len(texts)} texts, expected one each")
    stems = (
        [(seed, number) for number in range(len(texts))] if isinstance(seed, int) else [(s,) for s in seed]
    )
    if len(stems) != len(texts):
        raise ColadaError(f"{len(stems)} values of seed for {len(texts)} texts, expected one, or one each")
    ids, contexts = [model.ids(text) for text in texts], [model.ids(context) for context in given]
    for number, own in enumerate(ids):
        if not own:
            raise ColadaError(f"text {number} has no tokens")
    config = model.vae.config
    exact = samples > 1 or config.block_size * config.latent_dim <= EXACT_NUMBERS
    measured = _Measurement(model, Passes(model.dit), at, steps, exact)
    batches = list(
        _batches([_shape(*own, config) for own in zip(contexts, ids, strict=True)], samples, batch)
    )
    for shape, _ in batches:
        measured.check_memory(shape)
    meter = _Meter(measured, batches, sum(map(len, ids)), progress)
    terms: dict[tuple[int, int], Tensor] = {}
    for _, rows in batches:
        asked = [(contexts[number], ids[number]) for number, _ in rows]
        streams = [(*stems[number], sample) for number, sample in rows]
        found = measured.terms(asked, streams, meter)
        terms |= dict(zip(rows, found, strict=True))
    bounds = []
    for number, text in enumerate(texts):
        parts = torch.stack([terms[number, sample] for sample in range(samples)])
        bound = parts.sum(-1).logsumexp(0).item() - math.log(samples)
        if not math.isfinite(bound):
            raise ColadaError(f"text {number} has a bound of {bound}: the model's velocities are not finite")
        size = len(text.encode(errors="surrogatepass")) if isinstance(text, str) else 0
        bounds.append(TextBound(len(ids[number]), size, bound, *parts.mean(0).tolist()))
    return Likelihood(tuple(bounds), samples)


@dataclass(frozen=True)
class _Shape:
    """Latents of a text: of the context's whole blocks, of its tail, and of all blocks after the former."""

    prefix: int
    tail: int
    length: int


def _shape(context: Sequence[int], text: Sequence[int], config: TextVAEConfig) -> _Shape:
    latents, length = (-(-len(ids) // config.patch_size) for ids in (context, text))
    prefix = latents // config.block_size * config.block_size
    tail = latents - prefix
    return _Shape(prefix, tail, round_up(tail + length, config.block_size))


Row = tuple[int, int]
"""Number of a text, and of one of its samples."""


def _batches(shapes: Sequence[_Shape], samples: int, batch: int) -> Iterator[tuple[_Shape, list[Row]]]:
    """Yield rows of equally many latents after equally many: at most ``batch``, fewer of long texts."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, own in enumerate(shapes):
        alike.setdefault((own.prefix, own.length), []).append(number)
    for (prefix, length), numbers in alike.items():
        rows = [(number, sample) for number in numbers for sample in range(samples)]
        most = max(1, min(batch, BATCH_LATENTS // (prefix + length)))
        for start in range(0, len(rows), most):
            some = rows[start : start + most]
            yield _Shape(prefix, 0, length), some


class _Meter:
    """Tells how many tokens are done, by the FLOPs of what is done: long texts take more for each token."""

    def __init__(
        self,
        measured: _Measurement,
        batches: Sequence[tuple[_Shape, list[Row]]],
        tokens: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._tokens, self._progress, self._done = tokens, progress, 0.0
        self._whole = sum(
            cost
            for shape, rows in batches
            for cost in (measured.finish_cost(shape, len(rows)), measured.prior_cost(shape, len(rows)))
        )

    def add(self, cost: float) -> None:
        """Count some more FLOPs as done."""
        self._done += cost
        if self._progress is not None:
            self._progress(round(self._tokens * min(1.0, self._done / self._whole)), self._tokens)


class _Measurement:
    """How texts are measured: everything but the texts.

    Attributes:
        model, at, steps: see :func:`likelihood`.
        passes: of the model's DiT.
        exact: take the trace itself for the divergence, not an estimate.
    """

    def __init__(self, model: ColaDLM, passes: Passes, at: float, steps: int, exact: bool) -> None:
        self.model, self.passes, self.at, self.steps, self.exact = model, passes, at, steps, exact
        # More steps to the data cost more and do not tighten the bound: see docs/evaluation.md.
        finishing = -(-steps // 2)
        self._grid = [at * (1 - step / finishing) for step in range(finishing + 1)]
        config = model.dit.config
        self._row_cost = 2.0 * sum(
            own.numel() for name, own in model.dit.named_parameters() if "ada." not in name
        )
        self._key_cost = 4.0 * config.num_layers * config.heads * config.head_dim

    # --- what it costs ---------------------------------------------------------------------

    def check_memory(self, shape: _Shape) -> None:
        """Raise ColadaError if the keys and values of one text are more than the machine's memory."""
        config, vae = self.model.dit.config, self.model.vae.config
        width = config.num_layers * config.heads * config.head_dim + vae.decoder_num_blocks * vae.dim
        latents = shape.prefix + shape.length
        needed = 2 * latents * width * self.model.dit.txt_in.proj.weight.element_size()
        there = memory_of(self.model.device)
        if there is not None and needed > there / 2:
            raise ColadaError(
                f"a text of {latents * vae.patch_size:,} tokens needs {needed / 2**30:.1f} GiB for its keys"
                f" and values, expected at most half of the {there / 2**30:.1f} GiB there are: cut it up"
            )

    def _group(self, rows: int) -> int:
        """Return how many latents of each row are differentiated together, whole blocks."""
        size = self.model.dit.config.block_size
        return max(1, min(GROUP_LATENTS, 4 * GROUP_LATENTS // rows) // size) * size

    def finish_cost(self, shape: _Shape, rows: int) -> float:
        """Return the FLOPs of transporting the blocks of rows to the data, one after the other."""
        size = self.model.dit.config.block_size
        each = self._row_cost + self._key_cost * (shape.prefix + shape.length / 2)
        return shape.length // size * (len(self._grid) - 1) * (PASS_COST + rows * size * each)

    def prior_cost(self, shape: _Shape, rows: int) -> float:
        """Return the FLOPs of the prior's term of rows."""
        each = self._row_cost + self._key_cost * (shape.prefix + shape.length / 2 + self._group(rows))
        probes = self.model.dit.config.block_size * self.model.vae.config.latent_dim if self.exact else 1
        return 2 * self.steps * rows * shape.length * each * (1 + 2 * probes)

    # --- the terms -------------------------------------------------------------------------

    def terms(
        self,
        asked: Sequence[tuple[Sequence[int], Sequence[int]]],
        streams: Sequence[tuple[int, ...]],
        meter: _Meter,
    ) -> Tensor:
        """Return log p(x | z0(z_a)), log p(z_a) and -log q(z_a | x) of one sample a row, float64 (B, 3).

        Args:
            asked: contexts and texts, with equally many latents of prefix and blocks after it.
            streams: of each row's noise.
            meter: told what is done.
        """
        model, at = self.model, self.at
        vae, device, config = model.vae, model.device, model.vae.config
        width, patch = config.latent_dim, config.patch_size
        shapes = [_shape(context, text, config) for context, text in asked]
        rows, prefix, length = len(asked), shapes[0].prefix, shapes[0].length
        shape = _Shape(prefix, 0, length)
        generators = [_generator(stream) for stream in streams]
        whole = [[*pad_to_multiple(context, patch, model.pad_id), *text] for context, text in asked]
        padded = torch.tensor([pad_to_multiple(ids, config.block_tokens, model.pad_id) for ids in whole])
        with torch.no_grad():
            known = encode(vae, [context for context, _ in asked], model.pad_id)
            clean = torch.stack([own[:prefix] for own in known])
            tails = [own[prefix : prefix + one.tail] for own, one in zip(known, shapes, strict=True)]
            pins = Pins.first(tails, length)
            q = vae.encode(padded.flatten().to(device), [padded.shape[1]] * rows)
            assert q.logvar is not None
            noise = torch.stack([torch.randn(length, width, generator=own) for own in generators]).to(device)
            mean, logvar = (
                own.view(rows, -1, width)[:, prefix:] for own in (vae.normalise(q.mean), q.logvar)
            )
            sigma = (0.5 * logvar).exp() * config.scaling_factor
            deviation = ((1 - at) ** 2 * sigma**2 + at**2).sqrt()
            z = pins.put((1 - at) * mean + deviation * noise)
            entropy = pins.free_sum(
                0.5 * noise.double() ** 2 + 0.5 * math.log(2 * math.pi) + deviation.double().log()
            )
            flow = BlockFlow(self.passes, rows, prefix + length)
            flow.commit(clean)
            block_cost = self.finish_cost(shape, rows) / (length // config.block_size)
            finished = flow.finish(
                z, self._grid, AdamsBashforth2, prefix, pins, lambda number: meter.add(block_cost)
            )
            begin = [(prefix + own.tail) * patch for own in shapes]
            end = [len(ids) for ids in whole]
            latents = torch.cat([clean, finished], 1)
            reconstruction = spelled(vae, latents, padded.to(device), begin, end)
        # Unit vectors of a block in all blocks at once, or random signs: see divergence.
        size, group, signs = config.block_size, self._group(rows), None
        if not self.exact:
            signs = torch.stack([torch.randint(2, (length, width), generator=own) for own in generators])
            signs = (2.0 * signs - 1).to(device)
        prior = torch.zeros(rows, dtype=torch.float64, device=device)
        step_cost = self.prior_cost(shape, rows) / length / self.steps
        for start in range(0, length, group):
            own = z[:, start : start + group]
            cost = step_cost * own.shape[1]
            here = pins.part(start, start + group)
            prior += log_prior(
                flow.velocity(prefix + start, own.shape[1], here.where),
                own,
                _unit_probes(size, own) if signs is None else signs[None, :, start : start + group],
                self.steps,
                at,
                here,
                lambda number, cost=cost: meter.add(cost),  # type: ignore[misc]
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
    histories = [History() for _ in range(rows)]
    total = torch.zeros(rows, dtype=torch.float64, device=latents.device)
    group = max(1, min(GROUP_LATENTS, 4 * GROUP_LATENTS // rows) // size) * size
    first, last = (torch.tensor(own, device=latents.device)[:, None] for own in (begin, end))
    for start in range(0, latents.shape[1], group):
        part = latents[:, start : start + group]
        layout = vae.layout([part.shape[1]] * rows, histories)
        hidden = vae.decoder(part.flatten(0, 1), layout, histories)
        token = torch.arange(start * patch, (start + part.shape[1]) * patch, device=latents.device)
        scored = (token >= first) & (token < last)
        logits = vae.decoder.logits(hidden).view(rows, len(token), -1)[scored]
        values = -F.cross_entropy(logits.double(), ids[:, token][scored], reduction="none")
        total.index_add_(0, scored.nonzero()[:, 0], values)
    return total


def _generator(stream: tuple[int, ...]) -> torch.Generator:
    state = np.random.SeedSequence(stream).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
