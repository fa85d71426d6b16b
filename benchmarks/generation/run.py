"""Measure: peers take turns at a job; and requests of mixed lengths against slots that are always full."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.generation.apart import Apart
from benchmarks.generation.cost import Cost, generation_cost, limit, prompt_latents
from benchmarks.generation.job import Job, Peer, Prompts, Turn, take_turn
from benchmarks.generation.peers import COLA, DISTILLED, ENGINE, fixed_settings
from benchmarks.machine import Rates
from benchmarks.measure import Spread, ratios, seconds_of, take_turns
from colada.errors import ColadaError
from colada.generate.settings import TextRequest
from colada.models.cola import ColaDLM


@dataclass(frozen=True)
class Cell:
    """A point of the sweep.

    Attributes:
        job: what was generated.
        cost: its FLOPs and bytes by part.
        rates: of the machine.
        further_blocks: of each sample, after its first; part of one counts as such.
        turns: that count, by peer.
        out_of_memory: peers that did not fit on the device.
    """

    job: Job
    cost: dict[str, Cost]
    rates: Rates
    further_blocks: float
    turns: dict[str, list[Turn]]
    out_of_memory: list[str]

    @property
    def least_seconds(self) -> float:
        """In which this machine could do the work at best."""
        return limit(self.cost, self.rates)

    @property
    def total(self) -> Cost:
        """The cost of all parts."""
        return sum(self.cost.values(), Cost())

    def rows(self) -> list[dict[str, Any]]:
        """Return what is shown of each peer, the machine's limit first.

        "% limit" is the least possible seconds over those taken, "% products" FLOPs over seconds and the
        machine's rate, both of the medians; "engine is" how many times as fast the engine was, turn by turn,
        and "distilled is", where a distilled model took part, how many times as fast that was.
        """
        point = {"batch": self.job.batch, "context": self.job.context, "steps": self.job.steps}
        rate = self.job.tokens / self.least_seconds
        names = ["first, ms", "block, ms", "% limit", "% products", "engine is"]
        names += [*(["distilled is"] if DISTILLED in self.turns else []), "GB"]
        rows = [{**point, "peer": "limit", "tokens/s": rate, **dict.fromkeys(names)}]
        for name, turns in self.turns.items():
            seconds = [turn.seconds for turn in turns]
            speed = Spread.of(self.job.tokens / took for took in seconds)
            row: dict[str, Any] = {**rows[0], "peer": name, "tokens/s": speed}
            row["first, ms"] = Spread.of(1e3 * turn.first for turn in turns)
            if self.further_blocks:
                further = (1e3 * (turn.seconds - turn.first) / self.further_blocks for turn in turns)
                row["block, ms"] = Spread.of(further)
            if name in COLA:  # The work is not that of another kind of model.
                flops = self.total.flops / self.job.tokens
                row["% limit"] = 100 * speed.median / rate
                row["% products"] = 100 * speed.median * flops / self.rates.matmul
            for other, ratio in ((ENGINE, "engine is"), (DISTILLED, "distilled is")):
                if name != other and other in self.turns:
                    row[ratio] = ratios(seconds, [turn.seconds for turn in self.turns[other]])
            if turns[0].memory is not None:
                row["GB"] = max(turn.memory or 0 for turn in turns) / 1e9
            rows.append(row)
        return rows


def random_prompts(job: Job, vocab_size: int, seed: int) -> Prompts:
    """Return a batch of prompts of random ids."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = torch.randint(
        vocab_size, (job.batch, job.context), generator=generator
    ).tolist()
    return prompts


def measure_cell(
    model: ColaDLM,
    peers: Mapping[str, Peer | Apart],
    job: Job,
    rates: Rates,
    *,
    repeats: int,
    warm_up: int,
    seed: int = 0,
) -> Cell:
    """Let peers take turns at one job, on prompts of random ids.

    Args:
        model: whose work is counted.
        peers: by name, the engine among them.
        rates: of the machine.
        repeats, warm_up: turns of each that count, and that come before.
        seed: of the prompts.

    Raises:
        ColadaError: if a peer generates another number of tokens than it was asked for.
    """
    vae, dit = model.vae.config, model.dit.config
    prompts = random_prompts(job, vae.vocab_size, seed)
    tail = prompt_latents(vae, job.context)[1] * vae.patch_size
    first = min(job.new_tokens, vae.block_tokens - tail)

    def turn_of(peer: Peer | Apart) -> Turn:
        if isinstance(peer, Apart):
            return peer.turn(prompts, job, first)
        return take_turn(peer, prompts, job, first, model.device)

    turns = take_turns({name: partial(turn_of, peer) for name, peer in peers.items()}, repeats, warm_up)
    cost = generation_cost(vae, dit, job, model.dit.txt_in.proj.weight.element_size())
    further = (job.new_tokens - first) / vae.block_tokens
    return Cell(job, cost, rates, further, turns, [name for name in peers if name not in turns])


def sweep(
    batches: Sequence[int], contexts: Sequence[int], steps: Sequence[int], new_tokens: int, guided: bool
) -> list[Job]:
    """Return every combination, the first varying slowest."""
    return [
        Job(batch, context, new_tokens, number, guided)
        for batch, context, number in product(batches, contexts, steps)
    ]


# --- requests of mixed lengths -------------------------------------------------------------------

Serve = Callable[[Sequence[TextRequest], int], int]
"""Runs all requests, at most so many at once, and returns how many new tokens there were."""


def mixed_requests(count: int, job: Job, vocab_size: int, seed: int) -> list[TextRequest]:
    """Return requests whose lengths are uniform between half and one and a half times the job's."""
    generator = torch.Generator().manual_seed(seed)

    def lengths(mean: int, least: int) -> list[int]:
        low = max(least, mean - mean // 2)
        return torch.randint(low, mean + mean // 2 + 1, (count,), generator=generator).tolist()

    def ids(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    pairs = zip(lengths(job.context, 0), lengths(job.new_tokens, 1), strict=True)
    return [TextRequest(ids(length), new, {}) for length, new in pairs]


def full_batch(requests: Sequence[TextRequest], slots: int, vocab_size: int, seed: int) -> list[TextRequest]:
    """Return requests of the average lengths, one for each slot, of random ids."""
    context = round(sum(len(request.prompt) for request in requests) / len(requests))
    new_tokens = max(1, round(sum(request.max_new_tokens for request in requests) / len(requests)))
    prompts = random_prompts(Job(slots, context, new_tokens), vocab_size, seed)
    return [TextRequest(ids, new_tokens, {}) for ids in prompts]


def measure_mixed(
    serve: Serve,
    requests: Sequence[TextRequest],
    slots: int,
    device: torch.device,
    *,
    vocab_size: int,
    repeats: int,
    warm_up: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Serve mixed requests and a full batch in turns, and return the row of what came out.

    "% ideal" is the seconds that the tokens would have taken at the full batch's rate, as if slots had
    always been full, over those they took.

    Raises:
        ColadaError: if ``serve`` generates another number of tokens than it was asked for.
    """
    full = full_batch(requests, slots, vocab_size, seed)

    def served(requests: Sequence[TextRequest]) -> float:
        seconds = seconds_of(lambda: written.append(serve(requests, slots)), device)
        if written[-1] != tokens_of(requests):
            raise ColadaError(f"{written[-1]} tokens were generated, expected {tokens_of(requests)}")
        return seconds

    def tokens_of(requests: Sequence[TextRequest]) -> int:
        return sum(request.max_new_tokens for request in requests)

    written: list[int] = []
    turns = take_turns({"full": partial(served, full), "mixed": partial(served, requests)}, repeats, warm_up)
    tokens, scale = tokens_of(requests), 100 * tokens_of(requests) / tokens_of(full)
    share = ratios([scale * seconds for seconds in turns["full"]], turns["mixed"])
    speed = Spread.of(tokens / seconds for seconds in turns["mixed"])
    return {"requests": len(requests), "slots": slots, "tokens/s": speed, "% ideal": share}


def engine_serve(model: ColaDLM, steps: int, guidance: float, seed: int) -> Serve:
    """Return continuous batching by the model, in so many slots at once."""

    def serve(requests: Sequence[TextRequest], slots: int) -> int:
        seeded = [
            request._replace(settings=fixed_settings(steps, guidance, seed + number))
            for number, request in enumerate(requests)
        ]
        return sum(len(completion.tokens) for completion in model.generate(seeded, batch=slots))

    return serve
