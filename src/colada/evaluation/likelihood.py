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
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from colada.config import TextVAEConfig
from colada.dit import DiT, Timesteps
from colada.errors import ColadaError
from colada.evaluation.texts import ratio_error
from colada.flow import Euler, T, velocity_from_z0
from colada.generation import encode, transport
from colada.layers import History
from colada.model import ColaDLM
from colada.packing import pad_to_multiple
from colada.settings import Prompt

EXACT_NUMBERS = 64
"""Numbers in a block up to which its trace is exact for K = 1, too."""

Velocity = Callable[[Tensor, float], Tensor]
"""z (B, L, C) and a -> v (B, L, C), each block's depending on its own z only."""


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


def likelihood(
    model: ColaDLM,
    texts: Sequence[Prompt],
    given: Sequence[Prompt] | None = None,
    *,
    samples: int = 1,
    at: float = 0.6,
    steps: int = 32,
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
        steps: of the flow from a to 1 (Heun, two evaluations each), and as many of Euler from a to 0.
        seed: text i, sample k have the stream of (seed, i, k); or of (seed[i], k), with one each.
        batch: texts of as many blocks, after as many, that are computed together.
        progress: called after every batch with how many texts are done, and of how many.

    Raises:
        ColadaError: naming a value out of range, for an empty text, other than one context or seed a text,
            or a deterministic encoder.
    """
    given = [[] for _ in texts] if given is None else given
    for name, value in (("samples", samples), ("steps", steps), ("batch", batch)):
        if value < 1:
            raise ColadaError(f"{name}={value}, expected at least 1")
    if not 0 < at < 1:
        raise ColadaError(f"at={at}, expected a number between 0 and 1")
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
    numbers = model.vae.config.block_size * model.vae.config.latent_dim
    exact = samples > 1 or numbers <= EXACT_NUMBERS
    found: dict[int, TextBound] = {}
    for some in _batches(contexts, ids, model.vae.config, batch):
        asked = [(contexts[number], ids[number]) for number in some]
        each = []
        for k in range(samples):
            streams = [(*stems[number], k) for number in some]
            each.append(_terms(model, asked, streams, at, steps, exact))
        terms = torch.stack(each)
        bounds = terms.sum(-1).logsumexp(0) - math.log(samples)
        for number, bound, means in zip(some, bounds.tolist(), terms.mean(0).tolist(), strict=True):
            text = texts[number]
            size = len(text.encode()) if isinstance(text, str) else 0
            found[number] = TextBound(len(ids[number]), size, bound, *means)
        if progress is not None:
            progress(len(found), len(texts))
    return Likelihood(tuple(found[number] for number in range(len(texts))), samples)


def _shape(context: Sequence[int], text: Sequence[int], config: TextVAEConfig) -> tuple[int, int, int]:
    """Return how many latents are prefix, how many the context's tail pins, and how many blocks follow."""
    latents, length = (-(-len(ids) // config.patch_size) for ids in (context, text))
    prefix = latents // config.block_size * config.block_size
    tail = latents - prefix
    return prefix, tail, -(-(tail + length) // config.block_size)


def _batches(
    contexts: Sequence[Sequence[int]], ids: Sequence[Sequence[int]], config: TextVAEConfig, batch: int
) -> Iterator[list[int]]:
    """Yield the numbers of texts of equally many blocks after equally many, at most ``batch`` at a time."""
    by_blocks: dict[tuple[int, int], list[int]] = {}
    for number, (context, own) in enumerate(zip(contexts, ids, strict=True)):
        prefix, _, blocks = _shape(context, own, config)
        by_blocks.setdefault((prefix, blocks), []).append(number)
    for numbers in by_blocks.values():
        for start in range(0, len(numbers), batch):
            yield numbers[start : start + batch]


def _terms(
    model: ColaDLM,
    asked: Sequence[tuple[Sequence[int], Sequence[int]]],
    streams: Sequence[tuple[int, ...]],
    at: float,
    steps: int,
    exact: bool,
) -> Tensor:
    """Return log p(x | z0(z_a)), log p(z_a) and -log q(z_a | x) of one sample a text, float64 (B, 3).

    Args:
        asked: contexts and texts, with equally many latents of prefix and blocks after it.
        streams: of each text's noise.
        exact: take the trace itself for the divergence, not an estimate.
    """
    vae, device, config = model.vae, model.device, model.vae.config
    size, width, patch = config.block_size, config.latent_dim, config.patch_size
    shapes = [_shape(context, text, config) for context, text in asked]
    rows, prefix, length = len(asked), shapes[0][0], shapes[0][2] * size
    generators = [_generator(stream) for stream in streams]
    whole = [[*pad_to_multiple(context, patch, model.pad_id), *text] for context, text in asked]
    padded = torch.tensor([pad_to_multiple(ids, config.block_tokens, model.pad_id) for ids in whole])
    token = torch.arange(prefix * patch, padded.shape[1])
    begin = torch.tensor([(prefix + tail) * patch for _, tail, _ in shapes])[:, None]
    end = torch.tensor([len(ids) for ids in whole])[:, None]
    scored = ((token >= begin) & (token < end)).to(device)
    with torch.no_grad():
        known = encode(vae, [context for context, _ in asked], model.pad_id)
        clean = torch.stack([own[:prefix] for own in known])
        pins = _pins(
            [own[prefix : prefix + tail] for own, (_, tail, _) in zip(known, shapes, strict=True)], length
        )
        q = vae.encode(padded.flatten().to(device), [padded.shape[1]] * rows)
        assert q.logvar is not None
        noise = torch.stack([torch.randn(length, width, generator=own) for own in generators]).to(device)
        mean, logvar = (own.view(rows, -1, width)[:, prefix:] for own in (vae.normalise(q.mean), q.logvar))
        sigma = (0.5 * logvar).exp() * config.scaling_factor
        deviation = ((1 - at) ** 2 * sigma**2 + at**2).sqrt()
        z = pins.put((1 - at) * mean + deviation * noise)
        own_entropy = 0.5 * noise.double() ** 2 + 0.5 * math.log(2 * math.pi) + deviation.double().log()
        entropy = pins.free_sum(own_entropy)
        histories = prefix_histories(model.dit, clean)
        finished = finish(model.dit, z, at, steps, histories, pins)
        latents = torch.cat([clean, finished], 1)
        hidden = vae.decoder(latents.flatten(0, 1), vae.layout([prefix + length] * rows))
        hidden = hidden.view(*padded.shape, -1)[:, prefix * patch :]
        logits = vae.decoder.logits(hidden.flatten(0, 1)).view(rows, len(token), -1)
        expected = padded[:, prefix * patch :].to(device)
        spelled = -F.cross_entropy(logits.transpose(1, 2).double(), expected, reduction="none")
        reconstruction = (spelled * scored).sum(1)
    if exact:
        probes = torch.eye(size * width, device=device).view(-1, 1, 1, size, width)
        probes = probes.expand(-1, rows, length // size, -1, -1).flatten(2, 3)
    else:
        signs = [torch.randint(2, (length, width), generator=own) * 2.0 - 1 for own in generators]
        probes = torch.stack(signs).to(device)[None]
    prior = log_prior(flow_velocity(model.dit, finished, histories, pins), z, probes, steps, at, pins)
    return torch.stack([reconstruction, prior, entropy], -1).cpu()


def _generator(stream: tuple[int, ...]) -> torch.Generator:
    state = np.random.SeedSequence(stream).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


# --- the prior -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pins:
    """Latents that are the context's and stay as they are: where (B, L) bool, their values (B, L, C)."""

    where: Tensor
    values: Tensor

    def put(self, z: Tensor) -> Tensor:
        """Return z (B, L, C) with the pinned latents in their places."""
        return torch.where(self.where[..., None], self.values, z)

    def free_sum(self, values: Tensor) -> Tensor:
        """Return the sums of values (B, L, C) over the free latents, (B,)."""
        return values.masked_fill(self.where[..., None], 0.0).sum((1, 2))


def _pins(tails: Sequence[Tensor], length: int) -> Pins:
    """Return tails (n, C), each pinned at the beginning of ``length`` latents."""
    values = tails[0].new_zeros(len(tails), length, tails[0].shape[1])
    where = torch.zeros(len(tails), length, dtype=torch.bool, device=values.device)
    for row, tail in enumerate(tails):
        values[row, : len(tail)], where[row, : len(tail)] = tail, True
    return Pins(where, values)


def no_pins(z: Tensor) -> Pins:
    """Return what pins none of the latents z (B, L, C)."""
    return Pins(torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device), torch.zeros_like(z))


def prefix_histories(dit: DiT, clean: Tensor) -> list[History]:
    """Return the histories of prefixes (B, P, C), whole blocks; empty ones for P = 0."""
    histories = [History() for _ in clean]
    if clean.shape[1]:
        _commit(dit, clean, histories)
    return histories


def _commit(dit: DiT, latents: Tensor, histories: Sequence[History]) -> None:
    layout = dit.layout([latents.shape[1]] * len(latents), histories)
    dit(latents.flatten(0, 1), torch.zeros((), device=latents.device), layout, histories, committing=True)


def finish(
    dit: DiT,
    z: Tensor,
    at: float,
    steps: int,
    histories: Sequence[History] | None = None,
    pins: Pins | None = None,
) -> Tensor:
    """Return where the flow takes z_a (B, L, C) at a = 0, each block under the finished ones before it.

    Args:
        histories: of what comes before, which stay as they are; none by default.
        pins: latents that do not move; none by default.
    """
    rows, length, _ = z.shape
    size, pins = dit.config.block_size, pins or no_pins(z)
    histories = [history.copy() for history in histories] if histories else [History() for _ in range(rows)]
    grid = [at * (1 - step / steps) for step in range(steps + 1)]
    blocks = []
    for block, where, values in zip(
        z.split(size, 1), pins.where.split(size, 1), pins.values.split(size, 1), strict=True
    ):
        for done, _ in transport(dit, block, histories, where, values, [1.0] * rows, grid, Euler()):
            block = done
        blocks.append(block)
        if len(blocks) * size < length:
            _commit(dit, block, histories)
    return torch.cat(blocks, 1)


def flow_velocity(
    dit: DiT, history: Tensor, histories: Sequence[History] | None = None, pins: Pins | None = None
) -> Velocity:
    """Return v_psi(z^b, a; history^<b) of all blocks at once, in one two-copy pass.

    Args:
        history: (B, L, C), the clean latents; block b sees those before it.
        histories: of equally much that comes before them all; none by default.
        pins: latents at timestep 0, whose velocity is 0; none by default.
    """
    rows, length, width = history.shape
    pins = pins or no_pins(history)
    before = len(histories[0]) * dit.config.patch_size if histories else 0
    layout = dit.two_copy_layout(rows, length, history=before)
    clean = history[:, : length - dit.config.block_size]
    row = torch.cat([torch.zeros_like(pins.where[:, : clean.shape[1]]), ~pins.where], 1).flatten().long()

    def velocity(z: Tensor, a: float) -> Tensor:
        times = torch.tensor([0.0, T * a], device=z.device)
        packed = torch.cat([clean, z], 1).flatten(0, 1)
        output = dit(packed, Timesteps(times, row), layout, histories)
        output = output.view(rows, -1, width)[:, clean.shape[1] :]
        if dit.config.prediction == "z0":
            at = torch.tensor(a, device=z.device)
            output = velocity_from_z0(z.flatten(0, 1), output.flatten(0, 1), at).view_as(z)
        return output.masked_fill(pins.where[..., None], 0.0)

    return velocity


def log_prior(
    velocity: Velocity, z: Tensor, probes: Tensor, steps: int, at: float, pins: Pins | None = None
) -> Tensor:
    """Return log p(z), the density at a = ``at`` of the flow that starts at N(0, I), float64 (B,).

    Heun's method on a geometric grid: near the data, where the flow contracts, v changes like 1 / a.

    Args:
        velocity: of each block; 0 at pinned latents.
        z: (B, L, C).
        probes: (R, B, L, C), for the divergence, see :func:`divergence`.
        steps: of the solver.
        pins: latents that are given: the density is of the others; none by default.
    """
    pins = pins or no_pins(z)
    # Along a pinned latent nothing is probed: its velocity is 0, but it acts on the others'.
    probes = probes.masked_fill(pins.where[..., None], 0.0)
    grid = [at ** (1 - step / steps) for step in range(steps + 1)]
    z, total = z.detach(), torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for a, a_next in pairwise(grid):
        slope, trace = divergence(velocity, z, a, probes)
        ahead, trace_ahead = divergence(velocity, z + (a_next - a) * slope, a_next, probes)
        z = z + 0.5 * (a_next - a) * (slope + ahead)
        total += 0.5 * (a_next - a) * (trace + trace_ahead).double()
    return total - pins.free_sum(0.5 * z.double() ** 2 + 0.5 * math.log(2 * math.pi))


def divergence(velocity: Velocity, z: Tensor, a: float, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Return v (B, L, C) and the sum over probes e of e . (dv / dz) e, (B,).

    With the unit vectors of a block, in all blocks at once, that is the exact trace, since a block's velocity
    depends on no other noisy block; with one vector of random signs, Hutchinson's estimate.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        v = velocity(z, a)
        trace = torch.zeros(len(z), device=z.device)
        for number, probe in enumerate(probes):
            (product,) = torch.autograd.grad(v, z, probe, retain_graph=number + 1 < len(probes))
            trace = trace + (product * probe).sum((1, 2))
    return v.detach(), trace
