"""What generating has to compute and to move, once everything avoidable is avoided, and how fast that can be.

Counted is what the mathematics of section 4 leaves after the exact levers: conditional and
unconditional rows share a pass; AdaLN is a table of the schedule's timesteps; a block is appended
in the pass of its successor's first step; the vocabulary head sees new latents only; the prefix is run
once. With a multiply-add as two FLOPs,

- a matrix of W entries costs 2 W FLOPs a position, and is read once a pass;
- attention costs 4 * width FLOPs a layer and visible query-key pair, and reads the KV cache's keys and
  values, 2 * width * layers numbers a position, once a pass and sample; an append writes as many.

Not counted are norms, activations, softmax and rotary positions, and moving anything that fits into caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from benchmarks.generation.job import Job
from benchmarks.machine import Rates
from colada.networks.config import DiTConfig, TextVAEConfig
from colada.train.cost import adaln_entries, block_causal_pairs, matrix_entries, networks


@dataclass(frozen=True)
class Cost:
    """FLOPs of products and bytes of memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, rates: Rates) -> float:
        """Return the least time it can take: max(FLOPs / rate, bytes / bandwidth)."""
        return max(self.flops / rates.matmul, self.bytes / rates.bandwidth)


@dataclass(frozen=True)
class Stack:
    """Transformer layers as far as work goes.

    Attributes:
        entries: of the matrices that every position is multiplied by.
        cache_numbers: numbers of a position's keys and values in all layers, which a KV cache holds.
    """

    entries: int
    cache_numbers: int

    def run(self, positions: int, pairs: int, seen: int, written: int, itemsize: int) -> Cost:
        """Return the work of one pass.

        Args:
            positions: of the pass, over all samples.
            pairs: visible query-key pairs, likewise.
            seen, written: positions of KV cache that are read and added, likewise.
            itemsize: bytes of a number.
        """
        flops = 2 * positions * self.entries + 2 * self.cache_numbers * pairs
        return Cost(flops, itemsize * (self.entries + (seen + written) * self.cache_numbers))


@lru_cache(maxsize=4)
def stacks(vae: TextVAEConfig, dit: DiTConfig) -> tuple[Stack, Stack, Stack, int, int]:
    """Return the encoder, the decoder and the DiT, and the entries of the two output matrices.

    These two are in no stack, and neither is AdaLN, which is a table.
    """
    text, prior = networks(vae, dit)
    head, output = matrix_entries(text.decoder.final_layer), matrix_entries(prior.txt_out)
    layers = matrix_entries(prior) - output - adaln_entries(prior)
    return (
        Stack(matrix_entries(text.encoder), 2 * vae.encoder_num_blocks * vae.dim),
        Stack(matrix_entries(text.decoder) - head, vae.cache_numbers),
        Stack(layers, dit.cache_numbers),
        head,
        output,
    )


def prompt_latents(vae: TextVAEConfig, context: int) -> tuple[int, int]:
    """Return the latents of a prompt's prefix and of its tail."""
    latents = -(-context // vae.patch_size)
    return latents // vae.block_size * vae.block_size, latents % vae.block_size


def blocks_of(vae: TextVAEConfig, job: Job) -> int:
    """Return how many blocks each sample generates; the first of them repeats the prompt's tail."""
    tail = prompt_latents(vae, job.context)[1] * vae.patch_size
    return -(-(tail + job.new_tokens) // vae.block_tokens)


def generation_cost(vae: TextVAEConfig, dit: DiTConfig, job: Job, itemsize: int) -> dict[str, Cost]:
    """Return the work of a whole generation by part.

    With B samples, blocks of s latents (positions of the DiT), h latents in the KV cache before a block, W
    the entries of the DiT's or decoder's matrices, and g = 1 where a block is guided and h > 0, else 0:

    - "prompt": the encoder over whole blocks; DiT and decoder over the prefix, without output and head
    - "transport": each step 2 B s (1 + g) W FLOPs and B s (h + s + g s) pairs; the first step of every
      block but the first also appends, 2 B s W FLOPs and B s h pairs that read no weights
    - "decoder": each block 2 B s W + 2 B s patch_size dim V FLOPs and B s (h + s) pairs

    Returns: the parts; they follow each other, so their times add up.
    """
    encoder, decoder, prior, head, output = stacks(vae, dit)
    table = (6 * dit.num_layers + 2) * dit.txt_dim  # Numbers of a row of the AdaLN table.
    batch, size, patch = job.batch, vae.block_size, dit.patch_size
    cells = size // patch  # Positions of the DiT in a block.
    prefix, _ = prompt_latents(vae, job.context)
    blocks = -(-job.context // vae.block_tokens)
    prompt = Cost()
    if blocks:
        prompt += encoder.run(batch * blocks * size, batch * block_causal_pairs(blocks, size), 0, 0, itemsize)
    for stack, length, block in ((prior, prefix // patch, cells), (decoder, prefix, size)):
        if length:
            pairs = batch * block_causal_pairs(length // block, block)
            prompt += stack.run(batch * length, pairs, 0, batch * length, itemsize)
    transport, decoding = Cost(), Cost()
    for number in range(blocks_of(vae, job)):
        cached = prefix + number * size
        past = cached // patch
        rows = batch * cells
        branches = 1 + (job.guided and cached > 0)
        pairs = rows * (past + branches * cells)
        step = prior.run(branches * rows, pairs, batch * past, 0, itemsize)
        step += Cost(2 * branches * rows * output, itemsize * (output + table))
        transport += Cost(job.steps * step.flops, job.steps * step.bytes)
        if number:
            added = prior.run(rows, rows * past, 0, rows, itemsize)
            transport += Cost(added.flops, added.bytes - itemsize * prior.entries)
        new = batch * size
        decoding += decoder.run(new, new * (cached + size), batch * cached, new, itemsize)
        decoding += Cost(2 * new * vae.patch_size * head, itemsize * head)
    return {"prompt": prompt, "transport": transport, "decoder": decoding}


def limit(parts: dict[str, Cost], rates: Rates) -> float:
    """Return the least seconds that parts, one after the other, take on a machine."""
    return sum(part.seconds(rates) for part in parts.values())
