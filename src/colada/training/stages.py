"""What a stage of a run is to the trainer, and what an architecture brings to a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from colada.config import NetworkConfig
from colada.data.rows import Batch
from colada.language_model import LanguageModel
from colada.objectives import Counts, Loss
from colada.training.recipe import Recipe
from colada.training.sections import OptimiserSection

Network = TypeVar("Network", bound=nn.Module)

LayOut = Callable[[dict[str, nn.Module]], nn.ModuleDict]
"""Lays networks over the ranks, and puts them on the device."""


def row_generator(seed: int, stage: int, row: int) -> torch.Generator:
    """Return the CPU generator of one row: the same in any batch, on any rank, resumed or not."""
    state = np.random.SeedSequence([seed, stage, row]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def owned(network: Network) -> Network:
    """Return a network to go on training, float32, with weights of its own: a file's are read-only."""
    network.float().train()
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    return network


@contextmanager
def modes_kept(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Put networks that are used meanwhile back into the modes, training or not, that they were in."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Draws(Protocol):
    """Everything random in the loss of a batch."""

    def to(self, device: torch.device) -> Draws:
        """Return the draws on a device."""

    def rows(self, begin: int, end: int) -> Draws:
        """Return the draws of some rows, for a micro-batch."""


class Stage(ABC):
    """A stage of a run.

    Attributes:
        number: 1 or 2.
        recipe: what it depends on.
        networks: those that learn, by name.
        optimisers: theirs.
        resting: networks that do not learn and that a checkpoint holds, by name.
    """

    def __init__(
        self,
        number: int,
        recipe: Recipe,
        networks: nn.ModuleDict,
        optimisers: list[torch.optim.Optimizer],
        resting: dict[str, nn.Module],
    ) -> None:
        self.number, self.recipe, self.networks = number, recipe, networks
        self.optimisers, self.resting = optimisers, resting

    @property
    def section(self) -> OptimiserSection:
        """Its section of the recipe."""
        return self.recipe.stage(self.number)

    @abstractmethod
    def draw(self, rows: Sequence[int]) -> Draws:
        """Return what the loss of rows with these numbers draws; B is their number."""

    @abstractmethod
    def count(self, rows: Batch, draws: Any) -> Counts:
        """Return a batch's share in the counts of its step."""

    @abstractmethod
    def loss(self, networks: nn.ModuleDict, rows: Batch, draws: Any, counts: Counts, step: int) -> Loss:
        """Return the loss of rows in a step, with the networks that learn or their average."""

    @abstractmethod
    def flops(self, step: int) -> float:
        """Return the useful FLOPs of a step."""


class System(ABC):
    """An architecture in a run: its networks, and the stages in which they learn.

    Attributes:
        recipe: what it depends on.
        networks: all that are saved, by name.
        numbers: of the stages.
        block_tokens: rows are whole numbers of so many tokens.
    """

    recipe: Recipe
    networks: dict[str, nn.Module]
    numbers: tuple[int, ...]
    block_tokens: int

    @abstractmethod
    def prepare(self, lay_out: LayOut, recompute: bool, compiled: bool) -> None:
        """Lay out what the first stage needs; activations may be computed again, blocks be compiled."""

    @abstractmethod
    def stage(self, number: int, lay_out: LayOut) -> Stage:
        """Return a stage over these networks; a later one takes those of earlier ones as they are now."""

    @abstractmethod
    def model(self, networks: Mapping[str, nn.Module], **parts: Any) -> LanguageModel:
        """Return networks, by name, as a model; ``parts`` as :class:`LanguageModel` takes them."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """Return the configuration of each network."""
        found = {name: network.config for name, network in self.networks.items()}
        return {name: own.to_dict() for name, own in found.items() if isinstance(own, NetworkConfig)}
