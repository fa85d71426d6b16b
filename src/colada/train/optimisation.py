"""Optimisers, the learning rate as a function of the step, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from colada.networks.dit import DiT
from colada.train.kinds import FlowTerms, StageSection
from colada.train.lora import LowRankAdamW


def learning_rate(step: int, section: StageSection) -> float:
    """Return the factor on the learning rate of a step, from 0.

    Linear warm-up; then half a cosine down, or (wsd) 1 until the last ``decay`` of the steps, which go down
    in a line. The last step has ``final_lr``, unless it is one of the warm-up; a constant one stays 1.
    """
    if step < section.warmup:
        return (step + 1) / section.warmup
    if section.schedule == "constant":
        return 1.0
    if step + 1 >= section.steps:
        return section.final_lr  # The cosine's would be a step later.
    start = section.warmup
    if section.schedule == "wsd":
        start = max(start, section.steps - round(section.decay * section.steps))
        shape = 1 - max(0, step + 1 - start) / max(1, section.steps - start)
    else:
        shape = 0.5 * (1 + math.cos(math.pi * (step - start) / (section.steps - start)))
    return section.final_lr + (1 - section.final_lr) * shape


def set_learning_rate(optimisers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to ``factor`` times the one it was made with."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * factor


def make_optimisers(network: nn.Module, section: StageSection, lr: float) -> list[torch.optim.Optimizer]:
    """Return a network's optimisers; weight decay is on matrices only, AdaLN and embeddings are AdamW's."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    if isinstance(section, FlowTerms) and section.train == "lora" and isinstance(network, DiT):
        matrices = [p for _, p in named]
        factors = LowRankAdamW(matrices, section.rank, lr, section.betas, section.weight_decay)
        return [_initial(factors, lr)]
    blocks = [p for name, p in named if p.ndim == 2 and "blocks." in name and ".ada." not in name]
    if section.optimiser == "adamw":
        blocks = []
    inside = {id(parameter) for parameter in blocks}
    matrices = [p for _, p in named if p.ndim > 1 and id(p) not in inside]
    vectors = [p for _, p in named if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=lr, betas=section.betas, weight_decay=section.weight_decay, fused=True)
    ]
    if blocks:
        muon = torch.optim.Muon(
            blocks, lr=lr, weight_decay=section.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimisers.append(muon)
    return [_initial(optimiser, lr) for optimiser in optimisers]


def _initial(optimiser: torch.optim.Optimizer, lr: float) -> torch.optim.Optimizer:
    for group in optimiser.param_groups:
        group["initial_lr"] = lr
    return optimiser


def average_weights(network: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a network; its decay grows to ``decay`` at first."""

    def update(averaged: Any, current: Any, count: Any) -> None:
        n = int(count)
        torch._foreach_lerp_(local(averaged), local(current), 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, multi_avg_fn=update)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's part of each tensor."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
