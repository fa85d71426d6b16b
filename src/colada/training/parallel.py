"""Several ranks: the process group, and how the networks are laid over it. The networks know nothing of this.

Started by ``torchrun``, every rank computes its rows of the same global batch; the gradients are
averaged over all ranks. Weights, gradients and optimiser states are sharded (FSDP2), inside
groups of ranks if ``replicas`` is above 1 (hybrid sharding), or not at all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from colada.baselines.decoder import Decoder
from colada.device import find_device
from colada.dit import DiT
from colada.errors import ColadaError
from colada.vae import TextVAE


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank, size: its number, and how many there are.
        device: where it computes.
        mesh: how FSDP lays the networks out; None where they are not sharded.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

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
        own = count // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def world_size() -> int:
    """Return how many ranks ``torchrun`` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str, shard: bool, replicas: int) -> Iterator[Ranks]:
    """Join the process group that ``torchrun`` describes, if it does, and leave it at the end.

    Raises:
        ColadaError: for an unusable device, or replicas that do not divide the ranks.
    """
    size = world_size()
    place = run_device(device)
    if size == 1:
        yield Ranks(0, 1, place)
        return
    if size % replicas:
        raise ColadaError(f"run.replicas={replicas}, expected a divisor of the {size} ranks")
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    # Both, where there is a GPU: checkpoints are written from the CPU while it computes.
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        mesh = None
        if shard and replicas > 1:
            shape = (replicas, size // replicas)
            mesh = init_device_mesh(place.type, shape, mesh_dim_names=("replicate", "shard"))
        elif shard:
            mesh = init_device_mesh(place.type, (size,), mesh_dim_names=("shard",))
        yield Ranks(dist.get_rank(), size, place, mesh)
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


def average_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Average the gradients of networks that are not sharded over the ranks."""
    if ranks.mesh is not None or ranks.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks.size


def recompute(network: DiT | Decoder) -> None:
    """Compute each block again in the backward pass instead of keeping its activations."""
    for block in network.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(network: DiT | Decoder) -> None:
    """Compile each block by itself: they share one compiled function."""
    for block in network.blocks:
        block.compile()
