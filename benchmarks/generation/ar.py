"""The AR opponent: a decoder-only model with as many parameters as DiT and decoder together have."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.generation.contestants import Contestant, Prompts
from benchmarks.generation.work import Job
from colada.models.autoregressive import AutoregressiveLM
from colada.models.cola import ColaDLM
from colada.networks.decoder import Decoder
from colada.networks.decoder_config import matched_config
from colada.text.transcript import Chunk


def matched_parameters(model: ColaDLM) -> int:
    """Return the parameters that generating a token takes: the DiT's and the Text VAE's decoder's."""
    networks = (model.dit, model.vae.decoder)
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def ar(model: ColaDLM, guidance: float, seed: int) -> Contestant:
    """Return an AR decoder of the model's size, random weights, on its device and in its type.

    Raises:
        ColadaError: if no network of usual proportions has that size.
    """
    with torch.device("meta"):
        decoder = Decoder(matched_config(matched_parameters(model), model.vae.config.vocab_size))
    weight = model.dit.txt_in.proj.weight
    decoder.to(weight.dtype).to_empty(device=weight.device)
    decoder.init_weights(torch.Generator(weight.device).manual_seed(seed))
    opponent = AutoregressiveLM(decoder)

    def stream(prompts: Prompts, job: Job) -> Iterator[Chunk]:
        return opponent.stream(prompts, job.new_tokens, end_ids=())

    return stream
