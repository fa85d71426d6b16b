"""Measure: contestants take turns, so that whatever slows the machine down meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.generation.contestants import AR, ENGINE, Contestant, Prompts
from benchmarks.generation.machine import Rates, synchronise
from benchmarks.generation.work import Job, Work, generation_work, limit, prompt_latents
from colada.errors import ColadaError
from colada.models.cola import ColaDLM


@dataclass(frozen=True)
class Spread:
    """The median, least and greatest of repeated measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Turn:
    """One generation of a batch.

    Attributes:
        seconds: of all of it, prompts included.
        first: seconds until a sample had its first block's tokens.
        memory: greatest bytes allocated on the GPU meanwhile; None on a CPU.
    """

    seconds: float
    first: float
    memory: int | None


@dataclass(frozen=True)
class Result:
    """What one contestant did in one cell.

    Attributes:
        name: of the contestant.
        turns: that count.
        rate: new tokens per second, of the whole batch.
        first: seconds to the first block.
        block: seconds for each further block's tokens; None where the first block was all.
        memory: greatest bytes allocated on the GPU; None on a CPU.
        of_limit: least possible seconds / seconds; None for another kind of model.
        of_matmul: FLOPs of the work / seconds / the machine's measured rate; likewise.
    """

    name: str
    turns: tuple[Turn, ...]
    rate: Spread
    first: Spread
    block: Spread | None
    memory: int | None
    of_limit: Spread | None
    of_matmul: Spread | None


@dataclass(frozen=True)
class Cell:
    """A point of the sweep.

    Attributes:
        job: what was generated.
        work: its FLOPs and bytes by part.
        least_seconds: in which this machine could do it at best.
        results: by contestant, in the order of their turns.
        speedups: how many times faster the engine was than each opponent, turn by turn.
        out_of_memory: contestants that did not fit on the device.
    """

    job: Job
    work: dict[str, Work]
    least_seconds: float
    results: dict[str, Result]
    speedups: dict[str, Spread]
    out_of_memory: tuple[str, ...]

    @property
    def total(self) -> Work:
        """The work of all parts."""
        return sum(self.work.values(), Work())


def random_prompts(job: Job, vocab_size: int, seed: int) -> Prompts:
    """Return a batch of prompts of random ids."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = torch.randint(
        vocab_size, (job.batch, job.context), generator=generator
    ).tolist()
    return prompts


def take_turn(
    contestant: Contestant, prompts: Prompts, job: Job, first_tokens: int, device: torch.device
) -> Turn:
    """Let a contestant generate, and time it.

    Args:
        first_tokens: of one sample, that count as its first block.

    Raises:
        ColadaError: if it did not generate what it was asked for.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    got, first = [0] * job.batch, 0.0
    begin = time.perf_counter()
    for chunk in contestant(prompts, job):
        got[chunk.index] += len(chunk.tokens)
        if not first and got[chunk.index] >= first_tokens:
            first = time.perf_counter() - begin
    synchronise(device)
    seconds = time.perf_counter() - begin
    if got != [job.new_tokens] * job.batch:
        raise ColadaError(f"{sum(got)} tokens were generated, expected {job.tokens}")
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Turn(seconds, first, memory)


def measure_cell(
    model: ColaDLM,
    contestants: Mapping[str, Contestant],
    job: Job,
    rates: Rates,
    *,
    repeats: int,
    warm_up: int,
    seed: int = 0,
) -> Cell:
    """Let the contestants take turns at one job.

    Args:
        model: what is generated with; the work is its own.
        contestants: by name, the engine among them.
        rates: of the machine.
        repeats, warm_up: turns of each that count, and that come before.
        seed: of the prompts.

    Raises:
        ColadaError: if a contestant generates another number of tokens than it was asked for.
    """
    vae, dit = model.vae.config, model.dit.config
    prompts = random_prompts(job, vae.vocab_size, seed)
    tail = prompt_latents(vae, job.context)[1] * vae.patch_size
    first_tokens = min(job.new_tokens, vae.block_tokens - tail)
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    for number in range(warm_up + repeats):
        for name in list(turns):
            try:
                turn = take_turn(contestants[name], prompts, job, first_tokens, model.device)
            except torch.OutOfMemoryError:
                del turns[name]
                torch.cuda.empty_cache()
                continue
            if number >= warm_up:
                turns[name].append(turn)
    work = generation_work(vae, dit, job, model.dit.txt_in.proj.weight.element_size())
    least = limit(work, rates)
    rest = (job.new_tokens - first_tokens) / vae.block_tokens
    flops = sum(part.flops for part in work.values())
    results = {}
    for name, own in turns.items():
        seconds = [turn.seconds for turn in own]
        ours = name != AR  # The work is not that of another kind of model.
        results[name] = Result(
            name,
            tuple(own),
            Spread.of(job.tokens / took for took in seconds),
            Spread.of(turn.first for turn in own),
            Spread.of((turn.seconds - turn.first) / rest for turn in own) if rest else None,
            max((turn.memory for turn in own if turn.memory is not None), default=None),
            Spread.of(least / took for took in seconds) if ours else None,
            Spread.of(flops / took / rates.matmul for took in seconds) if ours else None,
        )
    speedups = {
        name: Spread.of(
            theirs.seconds / ours.seconds for theirs, ours in zip(own, turns[ENGINE], strict=True)
        )
        for name, own in turns.items()
        if name != ENGINE and ENGINE in turns
    }
    return Cell(job, work, least, results, speedups, tuple(name for name in contestants if name not in turns))


def sweep(
    batches: Sequence[int], contexts: Sequence[int], steps: Sequence[int], new_tokens: int, guided: bool
) -> Iterator[Job]:
    """Yield every combination, the first varying slowest."""
    for batch in batches:
        for context in contexts:
            for number in steps:
                yield Job(batch, context, new_tokens, number, guided)
