"""Who takes part: ways to continue a batch of equal prompts greedily, block by block.

``engine`` is :meth:`ColaDLM.stream`, what users run. The others are what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.generation.plain import PlainGenerator
from benchmarks.generation.work import Job, blocks_of, prompt_latents
from colada.generate.reference import BlockGenerator, sample_noise
from colada.generate.settings import Settings
from colada.models.cola import ColaDLM
from colada.networks.config import TextVAEConfig
from colada.text.transcript import Chunk, Transcript

Prompts = Sequence[Sequence[int]]

Contestant = Callable[[Prompts, Job], Iterator[Chunk]]
"""Continues every prompt by exactly ``job.new_tokens`` tokens."""

ENGINE, AR = "engine", "ar"


def fixed_settings(steps: int, guidance: float, seed: int) -> Settings:
    """Return what all contestants share: the released solver and grid, greedy, without an end."""
    return {
        "steps": steps,
        "guidance": guidance,
        "solver": "euler",
        "schedule": "uniform",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "stop": (),
        "end_ids": (),
        "seed": seed,
        "noise": "per-sample",
    }


def engine(model: ColaDLM, guidance: float, seed: int) -> Contestant:
    """Return the model's own ``stream``, with the settings that all contestants share."""

    def stream(prompts: Prompts, job: Job) -> Iterator[Chunk]:
        return model.stream(prompts, job.new_tokens, **fixed_settings(job.steps, guidance, seed))

    return stream


def reference(model: ColaDLM, guidance: float, seed: int) -> Contestant:
    """Return the readable loop, :class:`~colada.generate.reference.BlockGenerator`."""
    shape = (model.vae.config.block_size, model.vae.config.latent_dim)

    @torch.inference_mode()
    def blocks(prompts: Prompts, job: Job) -> Iterator[list[list[int]]]:
        generator = BlockGenerator(model.vae, model.dit, steps=job.steps)
        seeds = [seed + number for number in range(job.batch)]
        noises = [sample_noise(own, shape, model.device) for own in seeds]
        pad_id = model.pad_id if job.context else 0
        samples = generator.start(prompts, noises, seeds, [guidance] * job.batch, pad_id)
        for _ in range(blocks_of(model.vae.config, job)):
            for _ in generator.next_block(samples):
                pass
            yield [sample.block.ids for sample in samples if sample.block is not None]

    return lambda prompts, job: _chunks(model.vae.config, job, blocks(prompts, job))


def plain(model: ColaDLM, guidance: float, seed: int) -> Contestant:
    """Return the plain way, :class:`~benchmarks.generation.plain.PlainGenerator`."""

    def blocks(prompts: Prompts, job: Job) -> Iterator[list[list[int]]]:
        generator = PlainGenerator(model.vae, model.dit, job.steps, guidance)
        seeds = [seed + number for number in range(job.batch)]
        pad_id = model.pad_id if job.context else 0
        count = blocks_of(model.vae.config, job)
        for _, ids in generator.blocks(prompts, count, seeds, pad_id):
            yield ids.tolist()

    return lambda prompts, job: _chunks(model.vae.config, job, blocks(prompts, job))


def _chunks(vae: TextVAEConfig, job: Job, blocks: Iterator[list[list[int]]]) -> Iterator[Chunk]:
    """Yield the chunks of each block's ids, as :meth:`ColaDLM.stream` cuts them."""
    tail = prompt_latents(vae, job.context)[1] * vae.patch_size
    transcripts = [Transcript(None, tail, job.new_tokens, (), ()) for _ in range(job.batch)]
    for number, ids in enumerate(blocks):
        for index, (own, transcript) in enumerate(zip(ids, transcripts, strict=True)):
            text, tokens = transcript.add(own)
            yield Chunk(index, number, None, text, tokens, transcript.finish_reason)
