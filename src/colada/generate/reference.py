"""The readable generation loop: prefix pass, then block by block transport, decode and append.

This is section 4 of the specification on token ids and latents; text, stop
strings and end tokens are :mod:`colada.text.transcript`'s business. Every sample
carries its own noise, so results do not depend on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Unpack

import torch
from torch import Tensor

from colada.errors import ColadaError, failure
from colada.flow import Evaluation, T, advance, evaluations_of, memory
from colada.generate.guidance import Guidance, against_latents, estimate, is_bounded, is_guided
from colada.generate.noise import Noise, block_generator
from colada.generate.sampling import pick, surest
from colada.generate.settings import RequestSettings, Settings, check_settings
from colada.networks.dit import DiT
from colada.networks.layers import KVCache
from colada.networks.packing import Layout, pad_to_multiple
from colada.networks.vae import TextVAE

# --- state -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A finished block of one sample: latents (block, C), logits (block * patch, V) if kept, token ids."""

    latents: Tensor
    logits: Tensor | None
    ids: list[int]


@dataclass
class Sample:
    """One sample under way.

    Attributes:
        noise: its noise, by block.
        seed: of its token draws.
        guidance: scale s.
        known: bool (M,), which of the latents still to come are pinned: a prompt's
            tail, or what surrounds a hole. Latents from M on are free.
        pinned: (M, C), their values, normalised.
        blocks: number of blocks generated so far.
        seen: ids decoded in those blocks.
        block: the last of them.
        error: why it failed; no more blocks come.
    """

    noise: Noise
    seed: int
    guidance: float
    known: Tensor
    pinned: Tensor
    blocks: int = 0
    seen: set[int] = field(default_factory=set)
    prior_cache: KVCache = field(default_factory=KVCache)
    decoder_cache: KVCache = field(default_factory=KVCache)
    block: Block | None = None
    error: ColadaError | None = None

    def pinned_block(self, size: int) -> tuple[Tensor, Tensor]:
        """Return which latents of the next block are pinned (block,), and to what (block, C)."""
        start = self.blocks * size
        known, pinned = self.known[start : start + size], self.pinned[start : start + size]
        where = known.new_zeros(size)
        values = pinned.new_zeros(size, self.pinned.shape[-1])
        where[: len(known)], values[: len(known)] = known, pinned
        return where, values


@dataclass(frozen=True)
class TransportStep:
    """The latents of the samples under way, after an evaluation of the network.

    Where a block has several candidates, they count as so many samples, one after the other.

    Attributes:
        step, steps: evaluations done, and of how many (solver steps, but for solvers that ask for more).
        latents: (B, block, C), z_t after it; of drawings (B, M, C), a picture's numbers first, then 0.
        z0: of the same shape, the finished latents that the last velocity points at.
    """

    step: int
    steps: int
    latents: Tensor
    z0: Tensor


def encode(
    vae: TextVAE,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    caches: Sequence[KVCache | None] | None = None,
) -> list[Tensor]:
    """Return the normalised posterior means (L, C) of ids padded to whole blocks, one tensor a prompt.

    With ``caches``, prompts go on where those of the encoder end; see :meth:`TextVAE.encode`.
    """
    padded = [pad_to_multiple(ids, vae.config.block_tokens, pad_id) for ids in prompts]
    lengths = [len(ids) for ids in padded]
    device = vae.encoder.wte.weight.device
    if not any(lengths):
        return [torch.zeros(0, vae.config.latent_dim, device=device) for _ in prompts]
    packed = torch.tensor([token for ids in padded for token in ids], device=device)
    mean = vae.normalise(vae.encode(packed, lengths, caches).mean)
    return list(mean.split([length // vae.config.patch_size for length in lengths]))


# --- transport ---------------------------------------------------------------------------------


def transport(
    dit: DiT,
    noise: Tensor,
    caches: Sequence[KVCache],
    where: Tensor,
    pinned: Tensor,
    guidance: Sequence[float],
    evaluations: Sequence[Evaluation],
    settings: RequestSettings,
    lay_out: Callable[[Sequence[int], Sequence[KVCache | None]], Layout] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Integrate dz/da = v from noise to the latents of one block of every sample.

    Conditional rows and unconditional ones (no KV cache; only of samples that are guided) share each pass;
    guided against latents, an unconditional row is a sample of each latent. Pinned latents are put back
    before and after every evaluation, at timestep 0. A network with self-conditioning is given the
    conditional guess of z0 of the evaluation before.

    Args:
        noise: (B, block, C).
        where, pinned: (B, block) bool and (B, block, C).
        guidance: scale per sample; 1 is off.
        evaluations: of the solver.
        settings: of all samples; how guidance is bounded is in them.
        lay_out: packs samples of these lengths with these caches, if they are not of text.

    Yields: after every evaluation z and the z0 that its velocity points at, each (B, block, C).
    """
    size, patch = noise.shape[1], dit.config.patch_size
    alone = [patch] * (size // patch) if against_latents(settings) else [size]
    lay_out = lay_out or dit.layout
    each = [replace(settings, guidance=scale) for scale in guidance]
    free, mask = ~where, where[..., None]
    z, past, guess = noise, list[Tensor](), torch.zeros_like(noise)
    for evaluation in evaluations:
        a = evaluation.a
        numbers = [row for row, one in enumerate(each) if is_guided(one, a, len(caches[row]) > 0)]
        rows = torch.tensor(numbers, dtype=torch.int64, device=noise.device)
        z = torch.where(mask, pinned, z)
        both, noisy = torch.cat([z, z[rows]]), torch.cat([free, free[rows]])
        seen = [*caches, *[None] * (len(alone) * len(rows))]
        layout = lay_out([*[size] * len(z), *alone * len(rows)], seen)
        times, ends = ((T * at * noisy.float()).flatten() for at in (a, evaluation.end))
        guesses = torch.cat([guess, guess[rows]]).flatten(0, 1)
        output = dit.velocity(both.flatten(0, 1), times, layout, seen, guesses, ends)
        conditional, unconditional = output.view_as(both).split([len(z), len(rows)])
        scales = Guidance.of([each[row] for row in numbers], noise.device)
        bounds = free if is_bounded(settings) else None
        velocity, z0 = estimate(z, a, conditional, unconditional, rows, scales, bounds)
        guess = torch.where(mask, pinned, z - a * conditional)
        z_factor = evaluation.z_factor
        past = [velocity if z_factor is None else z0, *past][: memory(evaluations)]
        z = torch.where(
            mask, pinned, advance(z if z_factor is None else z_factor * z, past, evaluation.weights)
        )
        yield z, torch.where(mask, pinned, z0)


# --- the loop ----------------------------------------------------------------------------------


class BlockGenerator:
    """Generates blocks for a changing set of samples.

    Args:
        vae, dit: the two networks.
        settings: of all samples alike, but for noise, seed and guidance, which :meth:`start` takes.

    Raises:
        ColadaError: naming a setting out of range.
    """

    def __init__(self, vae: TextVAE, dit: DiT, **settings: Unpack[Settings]) -> None:
        self.vae, self.dit = vae, dit
        self.settings = RequestSettings(**check_settings(settings))
        checked = self.settings
        self.evaluations = evaluations_of(checked.solver, checked.schedule, checked.steps, checked.early_end)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.dit.txt_in.proj.weight.device

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        noises: Sequence[Noise],
        seeds: Sequence[int],
        guidance: Sequence[float],
        pad_id: int,
    ) -> list[Sample]:
        """Encode the prompts, pin their tails and run the prefix pass.

        Latents that hold only padding are dropped, one that holds some is kept.
        """
        patch, size = self.vae.config.patch_size, self.vae.config.block_size
        latents = self.encode(prompts, pad_id)
        samples, prefixes = [], []
        for number, ids in enumerate(prompts):
            prompt_latents = latents[number][: -(-len(ids) // patch)]
            prefix = len(prompt_latents) // size * size
            tail = prompt_latents[prefix:]
            known = torch.ones(len(tail), dtype=torch.bool, device=self.device)
            samples.append(Sample(noises[number], seeds[number], guidance[number], known, tail))
            prefixes.append(prompt_latents[:prefix])
        self.prefix_pass(samples, prefixes)
        return samples

    def encode(self, prompts: Sequence[Sequence[int]], pad_id: int) -> list[Tensor]:
        """Return the prompts' latents, see :func:`encode`."""
        return encode(self.vae, prompts, pad_id)

    def prefix_pass(self, samples: Sequence[Sample], prefixes: Sequence[Tensor]) -> None:
        """Append each sample's prefix (L, C) to the KV caches of the DiT (at t = 0) and the decoder."""
        self._append([sample.prior_cache for sample in samples], prefixes)
        lengths = [len(prefix) for prefix in prefixes]
        if any(lengths):
            caches = [sample.decoder_cache for sample in samples]
            self.vae.decoder(torch.cat(list(prefixes)), self.vae.layout(lengths, caches), caches)

    def _append(self, caches: Sequence[KVCache], latents: Sequence[Tensor]) -> None:
        lengths = [len(block) for block in latents]
        if any(lengths):
            layout = self.dit.layout(lengths, caches)
            clean = torch.zeros((), device=self.device)
            self.dit(torch.cat(list(latents)), clean, layout, caches, appending=True)

    def next_block(self, samples: Sequence[Sample]) -> Iterator[TransportStep]:
        """Generate the next block of every sample given, yielding after every solver step.

        When the iterator ends, each sample's ``block`` is its new block, or it has an ``error``: its
        logits are not finite. Those that have one already get nothing. A block enters the
        DiT's KV cache only when its sample goes on, so the last one never does. Of several candidates, only
        the chosen one enters any KV cache.
        """
        samples = [sample for sample in samples if sample.error is None]
        if not samples:
            return
        waiting = [(sample, sample.block) for sample in samples if sample.block is not None]
        self._append([sample.prior_cache for sample, _ in waiting], [block.latents for _, block in waiting])
        size, patch, count = self.vae.config.block_size, self.vae.config.patch_size, self.settings.candidates
        pins = [sample.pinned_block(size) for sample in samples for _ in range(count)]
        z = torch.stack([sample.noise(sample.blocks, k) for sample in samples for k in range(count)])
        steps = transport(
            self.dit,
            z,
            [sample.prior_cache for sample in samples for _ in range(count)],
            torch.stack([where for where, _ in pins]),
            torch.stack([values for _, values in pins]),
            [sample.guidance for sample in samples for _ in range(count)],
            self.evaluations,
            self.settings,
        )
        for number, (z, z0) in enumerate(steps, start=1):
            yield TransportStep(number, len(self.evaluations), z, z0)
        caches = [sample.decoder_cache.copy() for sample in samples for _ in range(count)]
        logits = self.vae.decode(z.flatten(0, 1), [size] * len(z), caches)
        candidates = logits.unflatten(0, (len(samples), count, size * patch))
        for number, (sample, logits_of) in enumerate(zip(samples, candidates, strict=True)):
            free = ~pins[number * count][0].repeat_interleave(patch)
            chosen = surest(logits_of, free)
            latents, block_logits = z[number * count + chosen], logits_of[chosen]
            sample.decoder_cache = caches[number * count + chosen]
            generator = block_generator(sample.seed, sample.blocks, 1)
            try:
                ids = pick(block_logits, self.settings, sample.seen, generator).tolist()
            except ColadaError as error:
                sample.error = failure(f"block {sample.blocks} has no tokens", error)
                continue
            sample.seen.update(ids)
            sample.block = Block(latents, block_logits, ids)
            sample.blocks += 1
