"""What a stage of a run is to the trainer, and what an architecture brings to a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from colada.data.rows import Batch
from colada.device import unallocated
from colada.models.base import LanguageModel
from colada.networks.config import NetworkConfig
from colada.networks.decoder import Decoder
from colada.networks.dit import DiT
from colada.networks.vae import TextVAE
from colada.train.losses import Loss
from colada.train.noise import Counts
from colada.train.parallel import fill
from colada.train.recipe import Recipe
from colada.train.sections import OptimiserSection

Network = TypeVar("Network", bound=nn.Module)

LayOut = Callable[[dict[str, nn.Module]], nn.ModuleDict]
"""Lays networks over the ranks, and puts them on the device."""


def row_generator(seed: int, stage: int, row: int) -> torch.Generator:
    """Return the CPU generator of one row: the same in any batch, on any rank, resumed or not."""
    state = np.random.SeedSequence([seed, stage, row]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


FirstWeights = Callable[[str, Tensor], Tensor]
"""Returns a parameter of a network by its name, given an uninitialised tensor of its shape on the CPU."""


def drawn(network: TextVAE | DiT | Decoder, generator: torch.Generator) -> FirstWeights:
    """Return the first weights of a new network, drawn one parameter after the other."""

    def value(name: str, tensor: Tensor) -> Tensor:
        network.init_parameter(name, tensor, generator)
        return tensor

    return value


def copied(network: nn.Module) -> FirstWeights:
    """Return first weights that are those of another network, as float32."""
    parameters = dict(network.named_parameters())
    return lambda name, tensor: tensor.copy_(parameters[name].detach())


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

    Args:
        whole: give the networks memory and weights at once; else once they are laid over the ranks.
    """

    recipe: Recipe
    networks: dict[str, nn.Module]
    numbers: tuple[int, ...]
    block_tokens: int

    def __init__(self, recipe: Recipe, whole: bool = True) -> None:
        self.recipe, self._whole = recipe, whole
        self._first: dict[str, FirstWeights] = {}

    def _made(self, make: Callable[[], Network]) -> Network:
        """Return a new network; without memory if it is to be laid out first."""
        with nullcontext() if self._whole else unallocated():
            return make()

    def _begin(self, networks: dict[str, nn.Module], first: dict[str, FirstWeights]) -> None:
        """Take networks and their first weights."""
        self.networks, self._first = networks, first
        if self._whole:
            self._fill(networks)

    def _fill(self, networks: Iterable[str]) -> None:
        for name in networks:
            if name in self._first:
                fill(self.networks[name], self._first.pop(name))

    def _laid_out(self, name: str, lay_out: LayOut) -> None:
        """Lay a network over the ranks, with its first weights."""
        lay_out({name: self.networks[name]})
        self._fill([name])

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
