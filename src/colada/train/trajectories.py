"""A teacher's trajectories over fixed rows of the data: made once by the engine, kept in files, read by row.

Each block of a row is taken from noise to data after the row's own latents, and where it is at each of some
values of a is kept, in float16. A student that learns from them takes no pass of its teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from colada.data.rows import Batch
from colada.device import plain_torch
from colada.errors import ColadaError, shown
from colada.files import atomic_writer, read_json_object, write_json
from colada.flow import Evaluation
from colada.generate.engine.memory import Memory
from colada.generate.engine.slots import LatentSlot
from colada.generate.engine.transport import Transport
from colada.generate.reference import Block
from colada.generate.settings import RequestSettings
from colada.generate.writer import Request
from colada.networks.checkpoint import open_weights
from colada.networks.dit import DiT
from colada.networks.vae import TextVAE
from colada.train.flow_matching import Pinned
from colada.train.losses import frozen_latents
from colada.train.noise import StepNoise, sample_of_latents
from colada.train.teaching_terms import TrajectorySection

PART = 32
"""Rows of a file, which are made together."""
_HEADER = "trajectories.json"


def digest(network: nn.Module) -> str:
    """Return what tells a network's weights from others."""
    state = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        state.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def fine_grid(section: TrajectorySection) -> tuple[float, ...]:
    """Return the grid of the teacher's solver: so many equal steps from each kept value to the next."""
    steps = section.substeps
    inner = (a + (b - a) * step / steps for a, b in pairwise(section.grid) for step in range(steps))
    return (*inner, section.grid[-1])


class Trajectories:
    """The trajectories of a directory, part by part; parts that were written before are there again.

    Args:
        directory: made if need be.
        rows: how many, in parts of :data:`PART`.
        made_of: what decides them, for JSON: the teacher's weights, its settings, the rows.

    Raises:
        ColadaError: if the directory's are of something else, naming the first thing that differs.
    """

    def __init__(self, directory: Path, rows: int, made_of: Mapping[str, Any]) -> None:
        self.directory, self.rows = directory, rows
        header = directory / _HEADER
        if not header.exists():
            if directory.exists() and any(directory.iterdir()):
                raise ColadaError(f"{directory} holds no {_HEADER}, expected trajectories, or nothing")
            directory.mkdir(parents=True, exist_ok=True)
            write_json(header, made_of)
        header_read = read_json_object(header)
        for name, now in made_of.items():
            if header_read.get(name) != now:
                was = f"{name} {shown(header_read.get(name))}"
                raise ColadaError(
                    f"{directory} holds trajectories of {was}, this stage's are of {shown(now)}:"
                    " give another path, or remove them"
                )

    @property
    def parts(self) -> int:
        """How many files there are once all are written."""
        return -(-self.rows // PART)

    def numbers(self, part: int) -> range:
        """Return the rows of a part."""
        return range(part * PART, min(self.rows, (part + 1) * PART))

    @property
    def missing(self) -> list[int]:
        """The parts that are still to be made."""
        return [part for part in range(self.parts) if not self._file(part).exists()]

    def keep(self, part: int, batch: Batch, states: Tensor) -> None:
        """Write a part at once: its rows, and where their blocks are, (B, M, P, C)."""
        tensors = {"ids": batch.ids, "sample": batch.sample, "trained": batch.trained}
        parts = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
        with atomic_writer(self._file(part)) as file:
            file.write(save({**parts, "states": states.half().cpu().contiguous()}))

    def read(self, numbers: Sequence[int]) -> tuple[Batch, Tensor]:
        """Return rows by number, from the first one again after the last, and their states (B, M, P, C).

        Raises:
            ColadaError: for a file that is damaged.
        """
        rows = [number % self.rows for number in numbers]
        each = [self._row(row // PART, row % PART) for row in rows]
        names = each[0].keys()
        tensors = {name: torch.stack([row_tensors[name] for row_tensors in each]) for name in names}
        return Batch(tensors["ids"], tensors.get("sample"), tensors.get("trained")), tensors["states"]

    def _row(self, part: int, row: int) -> dict[str, Tensor]:
        with open_weights(self._file(part)) as file:
            return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 - no mapping

    def _file(self, part: int) -> Path:
        return self.directory / f"part-{part:06}.safetensors"


def _samples(batch: Batch, patch: int) -> Iterator[tuple[int, int, int]]:
    """Yield row, begin and end, in latents, of each sample of a batch."""
    sample, length = sample_of_latents(batch, patch), batch.ids.shape[1] // patch
    for row in range(len(batch)):
        if sample is None:
            yield row, 0, length
            continue
        numbers, counts = sample[row].unique_consecutive(return_counts=True)
        begin = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number >= 0:
                yield row, begin, begin + count
            begin += count


@plain_torch()
def roll_out(
    vae: TextVAE,
    dit: DiT,
    batch: Batch,
    noise: StepNoise,
    settings: RequestSettings,
    stops: Sequence[float],
    pad_id: int,
) -> Tensor:
    """Return where the blocks of rows are at each of some values of a on their way from noise to data.

    Every block follows the clean latents of its own sample, the student's history too, with the drawn
    prefixes pinned; one engine takes all rows from block to block.

    Args:
        batch: B rows.
        noise: of these rows; of z1 the first copy.
        settings: of the solver and its guidance.
        stops: from 1 to 0, of the solver's grid.

    Returns: (B, M, P, C), 0 in filling.
    """
    assert noise.z1 is not None
    _, (clean, pinned, _) = frozen_latents(vae, batch, noise, pad_id)
    width, size, patch = vae.config.latent_dim, vae.config.block_size, dit.config.patch_size
    z1, length = noise.z1[:, 0], clean.shape[1]
    config, weight = dit.config, dit.txt_in.proj.weight
    memory = Memory(
        *(config.num_layers, len(batch) * length // patch, config.heads, config.head_dim),
        weight.dtype,
        weight.device,
        0,
    )
    transport = Transport(dit, memory, size)
    slots = []
    for row, begin, end in _samples(batch, vae.config.patch_size):
        slot = _slot(row * length + begin, end - begin, size, settings, clean[row, :0], pinned, row, begin)
        slots.append((slot, row, begin))
    slots.sort(
        key=lambda member: -member[0].block_count
    )  # Equal KV caches are neighbours, which attend in one call.
    states = clean.new_zeros(len(batch), length, len(stops), width)
    for number in range(max((slot.block_count for slot, _, _ in slots), default=0)):
        going = [member for member in slots if number < member[0].block_count]
        here = [(row, slice(begin + number * size, begin + (number + 1) * size)) for _, row, begin in going]
        z = torch.stack([z1[row, block] for row, block in here])
        for column, states_at in enumerate(_along(transport, [slot for slot, _, _ in going], z, stops)):
            for (row, block), latents in zip(here, states_at, strict=True):
                states[row, block, column] = latents
        for (slot, _, _), (row, block) in zip(going, here, strict=True):
            # What follows sees the row's own latents, not what was made here.
            slot.block = Block(clean[row, block], None, [])
            slot.blocks += 1
    return states


def _slot(
    start: int,
    length: int,
    size: int,
    settings: RequestSettings,
    nothing: Tensor,
    pinned: Pinned | None,
    row: int,
    begin: int,
) -> LatentSlot:
    """Return a sample of a row as a request without prompt, which is under way."""
    span = slice(begin, begin + length)
    where = nothing.new_zeros(0, dtype=torch.bool) if pinned is None else pinned.where[row, span]
    return LatentSlot(
        Request((), length, settings),
        start=start,
        length=length,
        prefix=0,
        tail=len(where),
        block_count=length // size,
        where=where,
        prompt=len(where),
        latents=nothing if pinned is None else pinned.latents[row, span],
    )


def _along(
    transport: Transport, slots: Sequence[LatentSlot], z: Tensor, stops: Sequence[float]
) -> list[Tensor]:
    """Return the coming blocks of slots (B, block, C) at each stop, the first of which is their noise z."""
    evaluations: Sequence[Evaluation] = slots[0].evaluations
    reached = {1.0: z}
    number = 0
    while number < len(evaluations):  # A very long grid is several rounds.
        for latents, _ in transport.run(slots, z):
            number += 1
            z = latents
            # A solver of several evaluations a step is where its last one of the step leads.
            reached[evaluations[number].a if number < len(evaluations) else 0.0] = z
    return [reached[stop] for stop in stops]


def sampler(section: TrajectorySection, guided: Mapping[str, Any]) -> RequestSettings:
    """Return the settings of the trajectories of a teacher that is guided so."""
    grid = fine_grid(section)
    return RequestSettings(steps=len(grid) - 1, schedule=grid, solver=section.solver, **guided)
