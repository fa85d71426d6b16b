"""Several ranks: the process group, and how the networks are laid over it. The networks know nothing of this.

Started by ``torchrun``, every rank computes its rows of the same global batch; the gradients are
averaged over all ranks. Weights, gradients and optimiser states are sharded (FSDP2), inside
groups of ranks if ``replicas`` is above 1 (hybrid sharding), or in groups of one rank, which is not at all.
No rank builds a whole network: its shards are made, and filled one parameter at a time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import register_dataclass
from torch.utils.checkpoint import checkpoint

from colada.device import find_device
from colada.errors import ColadaError
from colada.networks.decoder import Decoder
from colada.networks.dit import DiT
from colada.networks.solver import LearntSolver
from colada.networks.vae import Posterior, TextVAE
from colada.pictures.codec import Codec, ConvVAE
from colada.train.environment import local_rank, world_size

Network = TypeVar("Network", bound=nn.Module)

# FSDP2 gathers weights for the backward pass when the gradient of a network's output comes. In torch 2.11 it
# does not find outputs in a dataclass by itself.
register_dataclass(Posterior)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank, size: its number, and how many there are.
        device: where it computes.
        mesh: how FSDP lays the networks out; None for a rank alone.
        patient: the group in which ranks wait for one that has long work to do.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    patient: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of ``count`` rows of a step are this rank's: equal, consecutive shares.

        Raises:
            ColadaError: if they cannot be shared equally.
        """
        if count % self.size:
            raise ColadaError(f"a batch of {count} rows, expected a multiple of the {self.size} ranks")
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks."""
        if self.size > 1:
            values = values.to(self.device)
            with _together():
                dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait for all ranks, days if need be."""
        if self.size > 1:
            with _together():
                dist.barrier(self.patient)


def added_up(values: Tensor) -> Tensor:
    """Return a tensor of the CPU summed over the ranks of the run, if there are several."""
    if dist.is_initialized():
        with _together():
            dist.all_reduce(values)
    return values


def of_all(value: Any) -> list[Any]:
    """Return what each rank of the run has brought, in their order; of a rank alone, that."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with _together():
        dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def gathered(network: Network, copy: Network | None = None) -> Network:
    """Return a network that is whole on every rank: itself, or a copy of one that lies over the ranks.

    Args:
        copy: what an earlier call has returned, to take the weights of now.
    """
    parts = dict(network.named_parameters())
    if not any(isinstance(part, DTensor) for part in parts.values()):
        return network
    device = next(iter(parts.values())).device
    whole: Network = type(network)(network.config).to(device) if copy is None else copy
    for name, parameter in whole.named_parameters():
        part = parts[name]
        parameter.copy_(part.full_tensor() if isinstance(part, DTensor) else part)
    return whole.requires_grad_(False)


@contextmanager
def _together() -> Iterator[None]:
    """Say in one line that another rank is gone; what it failed of, it says itself."""
    try:
        yield
    except dist.DistError as error:
        raise _gone(error) from None
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error) and "gloo" not in str(error):
            raise
        raise _gone(error) from None


def _gone(error: Exception) -> ColadaError:
    return ColadaError(f"another rank has ended, or cannot be reached: {str(error).partition(chr(10))[0]}")


@contextmanager
def joined(device: str, shard: bool, replicas: int) -> Iterator[Ranks]:
    """Join the process group that ``torchrun`` describes, if it does, and leave it at the end.

    Raises:
        ColadaError: for an unusable device or environment, or replicas that do not divide the ranks.
    """
    size = world_size()
    place = run_device(device)
    if size == 1:
        yield Ranks(0, 1, place)
        return
    if size % replicas:
        raise ColadaError(f"run.replicas={replicas}, expected a divisor of the {size} ranks")
    if place.type == "cuda":
        place = torch.device("cuda", local_rank(torch.cuda.device_count()))
        torch.cuda.set_device(place)
    # Both, where there is a GPU: checkpoints are written from the CPU while it computes.
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]
        raise ColadaError(f"the {size} ranks cannot join at {where}: {reason}") from None
    try:
        groups = replicas if shard else size
        if groups > 1:
            shape = (groups, size // groups)
            mesh = init_device_mesh(place.type, shape, mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(place.type, (size,), mesh_dim_names=("shard",))
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        yield Ranks(dist.get_rank(), size, place, mesh, patient)
    finally:
        dist.destroy_process_group()


def run_device(name: str) -> torch.device:
    """Return the device that ``run.device`` means; auto is a GPU if there is one.

    Raises:
        ColadaError: if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return find_device(name, "run.device")


def lay_out(networks: nn.ModuleDict, ranks: Ranks, precision: torch.dtype) -> None:
    """Shard networks over the ranks, block by block; gathered for computing in ``precision``."""
    if ranks.mesh is None:
        return
    # It warns of views because changing one in place would be wrong; nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    # Inputs stay as they are: timesteps and latents are float32 whatever the matrices are.
    policy = MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False)
    # What is outside blocks too: averaged weights would stay gathered after a validation.
    shard = partial(fully_shard, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True)
    for network in networks.values():
        if isinstance(network, Codec):  # A linear one has no parameters.
            for part in [network.encoder, network.decoder] if isinstance(network, ConvVAE) else []:
                shard(part)
            continue
        if isinstance(network, LearntSolver):
            fully_shard(network, mesh=ranks.mesh)
            continue
        halves = [network.encoder, network.decoder] if isinstance(network, TextVAE) else [network]
        for half in halves:
            assert isinstance(half.blocks, nn.ModuleList)
            for block in half.blocks:
                shard(block)
        if isinstance(network, TextVAE):
            # Called apart from the decoder's forward, by ``logits``.
            shard(network.decoder.final_norm)
            shard(network.decoder.final_layer)
        for half in halves:
            shard(half)


def allocate(networks: nn.Module, device: torch.device) -> None:
    """Give networks that were made without memory their own, uninitialised; buffers, which are real, stay."""
    buffers = {name: buffer for name, buffer in networks.named_buffers() if not buffer.is_meta}
    networks.to_empty(device=device)
    for name, buffer in networks.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


@torch.no_grad()
def fill(network: nn.Module, value: Callable[[str, Tensor], Tensor]) -> None:
    """Set every parameter, or this rank's part of it, one after the other.

    Args:
        value: returns a whole parameter by its name, on the CPU, given an uninitialised tensor of its shape.
    """
    for name, parameter in network.named_parameters():
        whole = value(name, torch.empty(parameter.shape))
        if isinstance(parameter, DTensor):
            # Every rank has the same values: nothing is sent.
            part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(whole)


def recompute(network: DiT | Decoder) -> None:
    """Compute each block again in the backward pass instead of keeping its activations."""
    for block in network.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(network: DiT | Decoder) -> None:
    """Compile each block by itself: they share one compiled function."""
    for block in network.blocks:
        block.compile()
