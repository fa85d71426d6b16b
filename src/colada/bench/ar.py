"""The AR opponent: a decoder-only model with as many parameters as DiT and decoder together have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from colada.bench.contestants import Contestant, Prompts
from colada.bench.work import Job
from colada.errors import ColadaError
from colada.model import ColaDLM
from colada.streaming import Chunk


def matched_parameters(model: ColaDLM) -> int:
    """Return the parameters that generating a token takes: the DiT's and the Text VAE's decoder's."""
    networks = (model.dit, model.vae.decoder)
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def streaming(stream: Callable[..., Iterator[Chunk]], seed: int) -> Contestant:
    """Return a contestant of a model's ``stream``, greedy and without an end."""

    def contestant(prompts: Prompts, job: Job) -> Iterator[Chunk]:
        return stream(prompts, job.new_tokens, temperature=0.0, seed=seed, stop=(), end_ids=())

    return contestant


def ar(model: ColaDLM, guidance: float, seed: int) -> Contestant:
    """Return an AR decoder of the model's size, random weights, on its device and in its type.

    Raises:
        ColadaError: always, until there is such a decoder.
    """
    raise ColadaError(f"--opponents ar: no AR decoder of {matched_parameters(model):,} parameters is there")
