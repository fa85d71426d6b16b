"""What a stage of a run is to the trainer, and what an architecture brings to a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from colada.data.rows import Batch, Rows, RowTensors
from colada.device import unallocated
from colada.errors import ColadaError
from colada.models.base import LanguageModel
from colada.models.load import load
from colada.networks.config import DiTConfig, NetworkConfig
from colada.networks.decoder import Decoder
from colada.networks.dit import DiT
from colada.networks.vae import TextVAE
from colada.pictures.codec import Codec
from colada.randomness import generator_of
from colada.train.cost import Phase, Placement
from colada.train.display import Display
from colada.train.kinds import FlowTerms, StageSection
from colada.train.lora import choose
from colada.train.losses import Loss
from colada.train.noise import Counts
from colada.train.optimisation import make_optimisers
from colada.train.parallel import Ranks, compile_blocks, fill, recompute
from colada.train.recipe import Recipe

Network = TypeVar("Network", bound=nn.Module)

VALIDATION_ROW = 2**40
"""The first row's number of a validation, in its noise: no training run comes that far."""

LayOut = Callable[[dict[str, nn.Module]], nn.ModuleDict]
"""Lays networks over the ranks, and puts them on the device."""

Configs = Mapping[str, Any]
"""The configuration of each network, by its name."""

FirstWeights = Callable[[str, Tensor], Tensor]
"""Returns a parameter of a network by its name, given an uninitialised tensor of its shape on the CPU."""


def drawn(network: TextVAE | DiT | Decoder | Codec, generator: torch.Generator) -> FirstWeights:
    """Return the first weights of a new network, drawn one parameter after the other."""

    def value(name: str, tensor: Tensor) -> Tensor:
        network.init_parameter(name, tensor, generator)
        return tensor

    return value


def copied(network: nn.Module, more: FirstWeights | None = None) -> FirstWeights:
    """Return first weights that are those of another network, as float32, and ``more`` for those it lacks.

    What it may lack is a second input (self-conditioning, landing times), whose first output is 0: the copy
    computes the same.
    """
    parameters = dict(network.named_parameters())

    def value(name: str, tensor: Tensor) -> Tensor:
        if name in parameters or more is None:
            return tensor.copy_(parameters[name].detach())
        return more(name, tensor)

    return value


def network_of(networks: Any, name: str, kind: type[Network]) -> Network:
    """Return one of several networks by its name; what it is follows from that."""
    network = networks[name]
    assert isinstance(network, kind)
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


class System(ABC):
    """An architecture in a run: its networks, which the stages share.

    Attributes:
        recipe: what it depends on.
        networks: all that are saved, by name.
        teacher: the frozen DiT that the last stage with one has learnt from.
        distilled: what the DiT had built in as the run began.
        block_tokens: rows are whole numbers of so many tokens.
        pad_id: fills up what is encoded apart.

    Args:
        whole: give the networks memory and weights at once; else when a stage first needs them, laid over
            the ranks.
    """

    networks: dict[str, nn.Module]
    teacher: nn.Module | None = None
    distilled: dict[str, Any] | None = None
    block_tokens: int = 1

    def __init__(self, recipe: Recipe, pad_id: int, whole: bool = True) -> None:
        self.recipe, self.pad_id, self._whole = recipe, pad_id, whole
        self._first: dict[str, FirstWeights] = {}
        self._laid_out: set[str] = set()

    def made(self, make: Callable[[], Network]) -> Network:
        """Return a new network; without memory if it is to be laid out first."""
        with nullcontext() if self._whole else unallocated():
            return make()

    def _begin(self, networks: dict[str, nn.Module], first: dict[str, FirstWeights]) -> None:
        """Take networks and their first weights."""
        self.networks, self._first = networks, first
        if self._whole:
            for name in networks:
                fill(networks[name], self._first.pop(name))

    def prepare(self) -> None:
        """Let the deep network compute activations again, or compile its blocks, as the recipe says."""
        network = self.networks["dit" if "dit" in self.networks else "decoder"]
        assert isinstance(network, DiT | Decoder)
        if self.recipe.run.checkpoint_activations:
            recompute(network)
        if self.recipe.run.compile:
            compile_blocks(network)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of a step's passes, which compute in the recipe's precision."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.run.precision == "bfloat16")

    def ready(self, name: str, lay_out: LayOut) -> nn.Module:
        """Return a network, laid over the ranks with its weights; before, it has taken no memory."""
        network = self.networks[name]
        if name not in self._laid_out:
            lay_out({name: network})
            if name in self._first:
                fill(network, self._first.pop(name))
            self._laid_out.add(name)
        return network

    def frozen_copy(self, name: str, lay_out: LayOut, where: str | None = None) -> nn.Module:
        """Return a frozen copy of a network as it is now; or ``where`` names a model, of its.

        Raises:
            ColadaError: if that model has no such network.
        """
        network = self.networks[name]
        copy = self.made(lambda: type(network)(network.config))
        lay_out({name: copy})
        copy.requires_grad_(False)
        if where is None:
            copy.load_state_dict(network.state_dict())
        else:
            other = getattr(load(where), name, None)
            if not isinstance(other, nn.Module) or _shape(other.config) != _shape(network.config):
                raise ColadaError(f"teacher {where}: its {name} is not of the configuration that is trained")
            fill(copy, copied(other, _zero))
        return copy

    @abstractmethod
    def model(self, networks: Mapping[str, nn.Module], **parts: Any) -> LanguageModel:
        """Return networks, by name, as a model; ``parts`` as :class:`LanguageModel` takes them."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """Return the configuration of each network."""
        configs = {name: network.config for name, network in self.networks.items()}
        return {
            name: config.to_dict() for name, config in configs.items() if isinstance(config, NetworkConfig)
        }


@dataclass(frozen=True)
class Beginning:
    """What a stage may need before its first step, beside its networks.

    Attributes:
        rows: the rows of its training text, from a seed.
        text: what tells this text from other, a digest a source.
        whole: gathers networks on the first rank; None on the others. All must call it.
        model: makes a model of networks, which writes as that of the run does.
        ranks, display: of the run.
        stopped: whether the run is asked to stop: what takes long then ends early, and is gone on with later.
    """

    rows: Callable[[int], Rows]
    text: Sequence[str]
    whole: Callable[[Mapping[str, nn.Module]], dict[str, nn.Module] | None]
    model: Callable[[Mapping[str, nn.Module]], LanguageModel]
    ranks: Ranks
    display: Display
    stopped: Callable[[], bool]


def _shape(config: Any) -> Any:
    """Return a configuration without what changes no weight that two networks have in common."""
    if not isinstance(config, DiTConfig):
        return config
    return replace(config, distilled=None, landing_time=False, training_length=None)


def _zero(name: str, tensor: Tensor) -> Tensor:
    return tensor.zero_()


class Stage(ABC):
    """A stage of a run; a kind of training is a subclass, named by its section of :mod:`colada.train.kinds`.

    Attributes:
        learns: names of the networks that learn, in the order of their optimisers.
        uses: of those that do not.
        teachers: frozen copies that are made when the stage begins, each by the network that it is a copy of.
        writes: whether samples of the model are worth a look.

        name, number, section, recipe: which stage it is, see :class:`Recipe`.
        networks: those that learn, by name.
        frozen: those that do not and that a checkpoint holds, by name.
        memory: further tensors that a checkpoint holds and a resumed run is given back, in place: what a
            stage that makes its own data keeps from step to step.
        optimisers: of the networks.
        best: the networks, or their averages where the stage has such; the trainer sets it.
    """

    learns: ClassVar[tuple[str, ...]]
    uses: ClassVar[tuple[str, ...]] = ()
    teachers: ClassVar[Mapping[str, str]] = {}
    writes: ClassVar[bool] = True

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        self.system, self.recipe, self.name = system, system.recipe, name
        self.section, self.number = self.recipe.stages[name], self.recipe.number(name)
        self.networks = nn.ModuleDict({network: system.ready(network, lay_out) for network in self.learns})
        for network in self.networks.values():
            train = self.section.train if isinstance(self.section, FlowTerms) else "all"
            choose(network, train, getattr(self.section, "landing_time", False))
        self.frozen = {
            network: system.ready(network, lay_out).requires_grad_(False)
            for network in frozen_in(self.recipe, name)
        }
        for role, teacher_of in self.teachers.items():
            self.frozen[role] = self.teacher(teacher_of, lay_out)
        self.memory: dict[str, Tensor] = {}
        self.best = self.networks
        self.optimisers: list[torch.optim.Optimizer] = []
        for network_name, network in self.networks.items():
            self.optimisers += make_optimisers(network, self.section, self.rate(network_name))
        configs = {network_name: network.config for network_name, network in system.networks.items()}
        phases = self.phases(self.recipe, name, self.section, configs, Placement(1))
        self._flops = [sum(phase.flops.values()) for phase in phases]
        self._tokens = [phase.tokens for phase in phases]

    def teacher(self, network: str, lay_out: LayOut) -> nn.Module:
        """Return a frozen copy of a network; by default as it is when the stage begins."""
        return self.system.frozen_copy(network, lay_out)

    def rate(self, network: str) -> float:
        """Return the highest learning rate of a network."""
        return self.section.lr

    def generators(self, rows: Sequence[int]) -> list[torch.Generator]:
        """Return the generators of rows by number."""
        return [generator_of(self.recipe.seed, self.number, row) for row in rows]

    def begin(self, beginning: Beginning) -> None:  # noqa: B027 - most need nothing
        """Make what the steps need, once weights and memory are those of the first or the resumed step."""

    @abstractmethod
    def draw(self, rows: Sequence[int]) -> RowTensors:
        """Return the noise of the loss of rows with these numbers; B is their number."""

    @abstractmethod
    def count(self, rows: Batch, noise: Any) -> Counts:
        """Return a batch's share in the counts of its step."""

    @abstractmethod
    def loss(self, networks: nn.ModuleDict, rows: Batch, noise: Any, counts: Counts, step: int) -> Loss:
        """Return the loss of rows in a step, with the networks that learn or their average."""

    def rollouts(self, step: int, rows: Batch, noise: Any) -> tuple[Batch, Any]:
        """Return what a step learns from, given this rank's rows of the data and their noise.

        By default those themselves. It is called when the step before is done, so what the networks of now
        write may be in it. To resume exactly it must follow from them, ``memory`` and the step alone.
        """
        return rows, noise

    def learnt(self, step: int, terms: Mapping[str, Tensor], add_up: Callable[[Tensor], Tensor]) -> None:
        """Take what a step came to into ``memory``; by default nothing.

        Args:
            terms: of the loss, this rank's share.
            add_up: sums a tensor over the ranks; all must call it alike.
        """
        return

    @classmethod
    @abstractmethod
    def phases(
        cls, recipe: Recipe, name: str, section: Any, configs: Configs, placement: Placement
    ) -> list[Phase]:
        """Return what the steps of a stage of this kind compute and need, by the networks' configurations."""

    def phase_of(self, step: int) -> int:
        """Return which of the phases a step belongs to."""
        return 0

    def flops(self, step: int) -> float:
        """Return the useful FLOPs of a step."""
        return self._flops[self.phase_of(step)]

    def tokens(self, step: int) -> int:
        """Return the tokens of a step, over all ranks."""
        return self._tokens[self.phase_of(step)]


def stage_class(section: StageSection) -> type[Stage]:
    """Return the class of a stage's kind."""
    module, _, name = section.stage.partition(":")
    kind: type[Stage] = getattr(import_module(module), name)
    return kind


def frozen_in(recipe: Recipe, name: str) -> list[str]:
    """Return the networks that a stage uses frozen, and those that stages before it have trained."""
    kind = stage_class(recipe.stages[name])
    names = dict.fromkeys(kind.uses)
    for other, section in recipe.trained.items():
        if other == name:
            break
        if section.steps:
            names |= dict.fromkeys(stage_class(section).learns)
    return [network for network in names if network not in kind.learns]


def make_stage(system: System, name: str, lay_out: LayOut) -> Stage:
    """Return a stage of a run over its networks, as they are now."""
    return stage_class(system.recipe.stages[name])(system, name, lay_out)
