"""Which parameters of a DiT learn: all, its modulation's, pictures', or low-rank factors of its matrices.

With low rank (LoRA, arXiv:2106.09685) a matrix is W = W0 + B A, A (rank, inputs) and B (outputs, rank);
B begins at 0. The network always holds W itself: the factors are the optimiser's, which takes the gradient of
W, moves them along B^T dW and dW A^T, and writes their product back. So every pass, average, sample and saved
model is of an ordinary network, and nothing is merged at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from colada.networks.dit import DiT

_FIRST = 0x10A4  # Seeds the first factors, together with a matrix's place among the others.


def is_modulation(name: str) -> bool:
    """Return whether a parameter of the DiT is one of AdaLN's, or of the landing times that it goes by."""
    return "ada." in name or name.startswith("emb_in2.")


def is_of_pictures(name: str) -> bool:
    """Return whether a parameter of the DiT is one that text alone does not use."""
    return name.startswith("img_") or ".image." in name


def has_factors(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter of the DiT is a matrix that low rank is learnt of: those of its blocks."""
    return parameter.ndim == 2 and name.startswith("blocks.")


def learning(network: nn.Module, train: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a network that learn, by name; ``train`` says which of a DiT's do."""
    named = dict(network.named_parameters())
    if not isinstance(network, DiT) or train == "all":
        return named
    if train in ("adaln", "pictures"):
        learns = is_modulation if train == "adaln" else is_of_pictures
        return {name: parameter for name, parameter in named.items() if learns(name)}
    return {name: parameter for name, parameter in named.items() if has_factors(name, parameter)}


def choose(network: nn.Module, train: str, landing: bool = False) -> None:
    """Let those parameters of a DiT learn that ``train`` names, and no others; of other networks, all.

    Args:
        landing: the stage tells where steps end; else what listens to that stays as it is, at first silent.
    """
    names = learning(network, train)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in names and (landing or not name.startswith("emb_in2.")))


def learning_entries(network: nn.Module, train: str) -> int:
    """Return how many numbers of a network learn, or of which low-rank products do."""
    return sum(parameter.numel() for parameter in learning(network, train).values())


def factor_entries(network: nn.Module, rank: int) -> int:
    """Return how many numbers the factors of a DiT's matrices are."""
    matrices = [p for name, p in network.named_parameters() if has_factors(name, p)]
    return sum(min(rank, *p.shape) * sum(p.shape) for p in matrices)


class LowRankAdamW(torch.optim.Optimizer):
    """AdamW on the factors of matrices, which are W0 + B A after every step.

    Weights that are sharded by their outputs have B sharded as they are, and A whole on every rank.

    Args:
        parameters: matrices (outputs, inputs); W0 is what they are at the first step.
        rank: of the products; no more than a matrix's own.
        lr, betas, weight_decay, eps: AdamW's, of the factors.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        rank: int,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(parameters, {**defaults, "rank": rank})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move the factors, and write W0 + B A into the matrices."""
        for group in self.param_groups:
            for number, matrix in enumerate(group["params"]):
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state.update(_begin(matrix, group["rank"], number))
                a, b, gradient = state["a"], state["b"], matrix.grad
                gradients = {"a": _whole(b.T @ gradient), "b": gradient @ a.T}
                state["step"] += 1
                for name, factor in (("a", a), ("b", b)):
                    _adamw(factor, gradients[name], state, name, group)
                matrix.copy_(state["base"] + b @ a)


def _begin(matrix: Tensor, rank: int, number: int) -> dict[str, Tensor]:
    """Return the first state of a matrix: A uniform within 1 / sqrt(inputs), B zero."""
    outputs, inputs = matrix.shape
    rank = min(rank, outputs, inputs)
    generator = torch.Generator().manual_seed((_FIRST << 20) + number)
    drawn = (2 * torch.rand(rank, inputs, generator=generator) - 1) * inputs**-0.5
    a, b = drawn.to(matrix.device), torch.zeros(outputs, rank, device=matrix.device)
    if isinstance(matrix, DTensor):
        mesh = matrix.device_mesh
        a = distribute_tensor(a, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
        b = distribute_tensor(b, mesh, matrix.placements, src_data_rank=None)
    state = {"base": matrix.detach().clone(), "a": a, "b": b, "step": torch.zeros((), device="cpu")}
    for name, factor in (("a", a), ("b", b)):
        state |= {f"{name}_mean": torch.zeros_like(factor), f"{name}_square": torch.zeros_like(factor)}
    return state


def _whole(gradient: Tensor) -> Tensor:
    """Return a gradient of which every rank has a part, added up on all."""
    if isinstance(gradient, DTensor):
        return gradient.redistribute(placements=[Replicate()] * gradient.device_mesh.ndim)
    return gradient


def _adamw(factor: Tensor, gradient: Tensor, state: dict[str, Any], name: str, group: dict[str, Any]) -> None:
    """Take AdamW's step (arXiv:1711.05101) of one factor, in place."""
    mean, square, count = state[f"{name}_mean"], state[f"{name}_square"], float(state["step"])
    first, second = group["betas"]
    mean.lerp_(gradient, 1 - first)
    square.lerp_(gradient.square(), 1 - second)
    size = (square / (1 - second**count)).sqrt() + group["eps"]
    factor.mul_(1 - group["lr"] * group["weight_decay"])
    factor.sub_(group["lr"] / (1 - first**count) * mean / size)
