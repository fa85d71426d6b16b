"""Levers that change the result, and their price: one block from the same noise, against the exact flow."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Spread, take_turns
from colada.errors import ColadaError
from colada.flow import SCHEDULES
from colada.generate.engine.engine import Engine, capacity_for
from colada.generate.settings import RequestSettings
from colada.generate.writer import Request
from colada.models.cola import ColaDLM

EXACT = {"steps": 256, "solver": "ab2", "schedule": "front-loaded", "guidance_interval": (0.0, 1.0)}
"""So many steps that more change nothing: what the solvers approximate."""

Make = Callable[[], ColaDLM]


@dataclass(frozen=True)
class Lever:
    """A way to generate: its name, its settings, and what it does to the model."""

    name: str
    settings: Mapping[str, Any]
    change: Callable[[ColaDLM], ColaDLM] = lambda model: model


def levers(quantised: bool) -> list[Lever]:
    """Return the levers that are measured; int8 only where torchao is there."""
    uniform = {"solver": "euler", "schedule": "uniform"}
    front = {"solver": "ab2", "schedule": "front-loaded"}
    int8 = Lever("int8 weights", {**front, "steps": 16}, lambda model: model.quantise("int8"))
    return [
        *(Lever(f"Euler, uniform, {n}", {**uniform, "steps": n}) for n in (16, 8, 32)),
        Lever("AB2, uniform, 16", {"solver": "ab2", "schedule": "uniform", "steps": 16}),
        Lever("Euler, front-loaded, 16", {"solver": "euler", "schedule": "front-loaded", "steps": 16}),
        *(Lever(f"AB2, front-loaded, {n}", {**front, "steps": n}) for n in (16, 12, 8, 6, 4)),
        *(
            Lever(
                f"guided from a={high:g} to {low:g}", {**front, "steps": 16, "guidance_interval": (low, high)}
            )
            for low, high in ((0.25, 1.0), (0.5, 1.0), (0.75, 1.0), (0.0, 0.75), (0.0, 0.5))
        ),
        Lever("bfloat16", {**front, "steps": 16}, lambda model: model.to(dtype=torch.bfloat16)),
        *([int8] if quantised else []),
    ]


def own_prompts(model: ColaDLM, count: int, tokens: int, seed: int) -> list[tuple[int, ...]]:
    """Return beginnings of texts that the model itself writes from nothing: in its domain, and seeded."""
    completions = model.generate([[]] * count, tokens, seed=seed, end_ids=())
    return [completion.tokens for completion in completions]


def next_blocks(
    model: ColaDLM, prompts: Sequence[Sequence[int]], guidance: float, settings: Mapping[str, Any], seed: int
) -> tuple[Tensor, Tensor, float]:
    """Return latents (B, block, C) and ids (B, tokens) of the block that follows each prompt.

    The third is the seconds it took, prompts included.
    """
    config = model.vae.config
    requests = [
        Request(tuple(ids), 1, RequestSettings(guidance=guidance, seed=seed + number, **settings))
        for number, ids in enumerate(prompts)
    ]
    capacity = capacity_for(requests, config)
    engine = Engine(model.vae, model.dit, capacity=capacity, pad_id=model.pad_id)
    for request in requests:
        engine.submit(request)
    begin = time.perf_counter()
    while not engine.news:  # A long grid takes several rounds.
        for _ in engine.next_block():
            pass
    seconds = time.perf_counter() - begin
    blocks = [slot.block for slot in engine.under_way if slot.block is not None]
    if len(blocks) != len(requests):
        raise ColadaError(
            f"{len(blocks)} blocks were generated, expected one for each of {len(requests)} prompts"
        )
    latents, ids = torch.stack([block.latents for block in blocks]), [block.ids for block in blocks]
    return latents, torch.tensor(ids), seconds


def measure_levers(
    make: Make, chosen: Sequence[Lever], *, count: int, context: int, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Measure every lever on the block after the same prompts, from the same noise, and return its row.

    - "passes": blocks of rows that a guided block sends through the DiT, two a guided step, one another
    - "time, s": of one block of the whole batch
    - "error": |z - z_exact| / |z_exact| over the finished latents
    - "% same": the share of tokens that the exact flow spells too; "±" is its standard error over prompts
    - "entropy": of the block's tokens over all prompts, in bits
    - "% pairs": distinct pairs of neighbouring tokens, as a share of all pairs

    Args:
        make: loads the model anew, since some levers change it.
        chosen: the levers.
        count, context: prompts, and tokens of each.
        repeats: turns that count; one comes before.
        seed: of prompts and noise.
    """
    model = make()
    guidance = float(model.generation.get("guidance", 7.0))
    prompts = own_prompts(model, count, context, seed)
    exact, exact_ids, _ = next_blocks(model, prompts, guidance, EXACT, seed)
    turns = take_turns(
        {
            lever.name: partial(next_blocks, lever.change(make()), prompts, guidance, lever.settings, seed)
            for lever in chosen
        },
        repeats,
        warm_up=1,
    )
    rows = []
    for lever in chosen:
        latents, ids, _ = turns[lever.name][-1]
        same = 100 * (ids == exact_ids).double().mean(1)
        low, high = lever.settings.get("guidance_interval", (0.0, 1.0))
        grid = SCHEDULES[lever.settings["schedule"]](lever.settings["steps"]).tolist()[:-1]
        entropy, pairs = _variety(ids.tolist())
        rows.append(
            {
                "lever": lever.name,
                "passes": sum(2 if low <= a <= high else 1 for a in grid),
                "time, s": Spread.of(seconds for _, _, seconds in turns[lever.name]),
                "error": float((latents - exact).norm() / exact.norm()),
                "% same": float(same.mean()),
                "±": float(same.std() / math.sqrt(len(same))),
                "entropy": entropy,
                "% pairs": 100 * pairs,
            }
        )
    return rows


def _variety(blocks: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the entropy of tokens in bits and the share of distinct neighbouring pairs."""
    counts = Counter(token for block in blocks for token in block)
    total = counts.total()
    entropy = -sum(n / total * math.log2(n / total) for n in counts.values())
    pairs = [pair for block in blocks for pair in pairwise(block)]
    return entropy, len(set(pairs)) / max(1, len(pairs))
