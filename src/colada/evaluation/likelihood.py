"""A lower bound on log p(x), from the model's own factors.

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
where it is small, else Hutchinson's estimate e . J e, whose noise averages out for K = 1; for larger K it
adds to that of the weights.
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

from colada.dit import DiT, Timesteps
from colada.errors import ColadaError
from colada.flow import Euler, T, velocity_from_z0
from colada.generation import transport
from colada.layers import History
from colada.model import ColaDLM
from colada.packing import pad_to_multiple
from colada.settings import Prompt

EXACT_NUMBERS = 64
"""Numbers in a block up to which its trace is exact."""

Velocity = Callable[[Tensor, float], Tensor]
"""z (B, L, C) and a -> v (B, L, C), each block's depending on its own z only."""


@dataclass(frozen=True)
class TextBound:
    """The bound of one text, in nats.

    Attributes:
        tokens, bytes: its size; bytes are of UTF-8, 0 for a prompt of ids.
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
        count, rate = len(self.texts), self.bits_per_byte
        if count < 2:
            return math.nan
        residuals = [-text.bound / math.log(2) - rate * text.bytes for text in self.texts]
        spread = sum(residual**2 for residual in residuals) * count / (count - 1)
        return math.sqrt(spread) / sum(text.bytes for text in self.texts)


def likelihood(
    model: ColaDLM,
    texts: Sequence[Prompt],
    *,
    samples: int = 1,
    at: float = 0.6,
    steps: int = 32,
    seed: int = 0,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Return lower bounds on the log-likelihood of texts.

    A text is padded to whole blocks, as a prompt is; its padding's latents are part of z, but only its own
    tokens are scored. Noise and probes are drawn per text and sample: results do not depend on ``batch``.

    Args:
        model: its encoder must have a variance.
        texts: texts, or lists of ids; none empty.
        samples: K.
        at: a of the latents z_a, above 0 and below 1.
        steps: of the flow from a to 1 (Heun, two evaluations each), and as many of Euler from a to 0.
        seed: text i, sample k have the stream of (seed, i, k).
        batch: texts of as many blocks that are computed together.
        progress: called after every batch with how many texts are done, and of how many.

    Raises:
        ColadaError: naming a value out of range, for an empty text, or a deterministic encoder.
    """
    for name, value in (("samples", samples), ("steps", steps), ("batch", batch)):
        if value < 1:
            raise ColadaError(f"{name}={value}, expected at least 1")
    if not 0 < at < 1:
        raise ColadaError(f"at={at}, expected a number between 0 and 1")
    if not model.vae.config.use_variation:
        raise ColadaError("a deterministic encoder (use_variation false) has no density, so no bound")
    ids = [model.ids(text) for text in texts]
    for number, own in enumerate(ids):
        if not own:
            raise ColadaError(f"text {number} has no tokens")
    found: dict[int, TextBound] = {}
    for some in _batches(ids, model.vae.config.block_tokens, batch):
        together = [ids[number] for number in some]
        each = []
        for k in range(samples):
            streams = [(seed, number, k) for number in some]
            each.append(_terms(model, together, streams, at, steps))
        terms = torch.stack(each)
        bounds = terms.sum(-1).logsumexp(0) - math.log(samples)
        for number, bound, means in zip(some, bounds.tolist(), terms.mean(0).tolist(), strict=True):
            text = texts[number]
            size = len(text.encode()) if isinstance(text, str) else 0
            found[number] = TextBound(len(ids[number]), size, bound, *means)
        if progress is not None:
            progress(len(found), len(texts))
    return Likelihood(tuple(found[number] for number in range(len(texts))), samples)


def _batches(ids: Sequence[Sequence[int]], block: int, batch: int) -> Iterator[list[int]]:
    """Yield the numbers of texts of equally many blocks, at most ``batch`` at a time."""
    by_blocks: dict[int, list[int]] = {}
    for number, own in enumerate(ids):
        by_blocks.setdefault(-(-len(own) // block), []).append(number)
    for numbers in by_blocks.values():
        for start in range(0, len(numbers), batch):
            yield numbers[start : start + batch]


def _terms(
    model: ColaDLM,
    ids: Sequence[Sequence[int]],
    streams: Sequence[tuple[int, int, int]],
    at: float,
    steps: int,
) -> Tensor:
    """Return log p(x | z0(z_a)), log p(z_a) and -log q(z_a | x) of one sample a text, float64 (B, 3)."""
    vae, device = model.vae, model.device
    size, width = vae.config.block_size, vae.config.latent_dim
    generators = [_generator(stream) for stream in streams]
    padded = torch.tensor([pad_to_multiple(own, vae.config.block_tokens, model.pad_id) for own in ids])
    rows, length = len(ids), padded.shape[1] // vae.config.patch_size
    with torch.no_grad():
        q = vae.encode(padded.flatten().to(device), [padded.shape[1]] * rows)
        assert q.logvar is not None
        noise = torch.stack([torch.randn(length, width, generator=own) for own in generators]).to(device)
        mean = (1 - at) * vae.normalise(q.mean).view_as(noise)
        sigma = (0.5 * q.logvar).exp().view_as(noise) * vae.config.scaling_factor
        deviation = ((1 - at) ** 2 * sigma**2 + at**2).sqrt()
        z = mean + deviation * noise
        entropy = (0.5 * noise.double() ** 2 + 0.5 * math.log(2 * math.pi) + deviation.double().log()).sum(
            (1, 2)
        )
        finished = finish(model.dit, z, at, steps)
        logits = vae.decode(finished.flatten(0, 1), [length] * rows).view(*padded.shape, -1)
        spelled = -F.cross_entropy(logits.transpose(1, 2).double(), padded.to(device), reduction="none")
        own = torch.arange(padded.shape[1]) < torch.tensor([len(text) for text in ids])[:, None]
        reconstruction = (spelled * own.to(device)).sum(1)
    if size * width <= EXACT_NUMBERS:
        probes = torch.eye(size * width, device=device).view(-1, 1, 1, size, width)
        probes = probes.expand(-1, rows, length // size, -1, -1).flatten(2, 3)
    else:
        signs = [torch.randint(2, (length, width), generator=own) * 2.0 - 1 for own in generators]
        probes = torch.stack(signs).to(device)[None]
    prior = log_prior(flow_velocity(model.dit, finished), z, probes, steps, at)
    return torch.stack([reconstruction, prior, entropy], -1).cpu()


def _generator(stream: tuple[int, int, int]) -> torch.Generator:
    state = np.random.SeedSequence(stream).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


# --- the prior -----------------------------------------------------------------------------------


def finish(dit: DiT, z: Tensor, at: float, steps: int) -> Tensor:
    """Return where the flow takes z_a (B, L, C) at a = 0, each block under the finished ones before it."""
    rows, length, _ = z.shape
    size = dit.config.block_size
    histories = [History() for _ in range(rows)]
    free = torch.zeros(rows, size, dtype=torch.bool, device=z.device)
    grid = [at * (1 - step / steps) for step in range(steps + 1)]
    blocks = []
    for block in z.split(size, 1):
        for done, _ in transport(
            dit, block, histories, free, torch.zeros_like(block), [1.0] * rows, grid, Euler()
        ):
            block = done
        blocks.append(block)
        if len(blocks) * size < length:
            layout = dit.layout([size] * rows, histories)
            dit(block.flatten(0, 1), torch.zeros((), device=z.device), layout, histories, committing=True)
    return torch.cat(blocks, 1)


def flow_velocity(dit: DiT, history: Tensor) -> Velocity:
    """Return v_psi(z^b, a; history^<b) of all blocks at once, in one two-copy pass.

    Args:
        history: (B, L, C), the clean latents; block b sees those before it.
    """
    rows, length, width = history.shape
    layout = dit.two_copy_layout(rows, length)
    clean = history[:, : length - dit.config.block_size]
    row = torch.cat([clean.new_zeros(clean.shape[:2]), clean.new_ones(rows, length)], 1).flatten().long()

    def velocity(z: Tensor, a: float) -> Tensor:
        times = torch.tensor([0.0, T * a], device=z.device)
        output = dit(torch.cat([clean, z], 1).flatten(0, 1), Timesteps(times, row), layout)
        output = output.view(rows, -1, width)[:, clean.shape[1] :]
        if dit.config.prediction == "velocity":
            return output
        at = torch.tensor(a, device=z.device)
        return velocity_from_z0(z.flatten(0, 1), output.flatten(0, 1), at).view_as(z)

    return velocity


def log_prior(velocity: Velocity, z: Tensor, probes: Tensor, steps: int, at: float) -> Tensor:
    """Return log p(z), the density at a = ``at`` of the flow that starts at N(0, I), float64 (B,).

    Heun's method on a geometric grid: near the data, where the flow contracts, v changes like 1 / a.

    Args:
        velocity: of each block.
        z: (B, L, C).
        probes: (R, B, L, C), for the divergence, see :func:`divergence`.
        steps: of the solver.
    """
    grid = [at ** (1 - step / steps) for step in range(steps + 1)]
    z, total = z.detach(), torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for a, a_next in pairwise(grid):
        slope, trace = divergence(velocity, z, a, probes)
        ahead, trace_ahead = divergence(velocity, z + (a_next - a) * slope, a_next, probes)
        z = z + 0.5 * (a_next - a) * (slope + ahead)
        total += 0.5 * (a_next - a) * (trace + trace_ahead).double()
    return total - (0.5 * z.double() ** 2 + 0.5 * math.log(2 * math.pi)).sum((1, 2))


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
