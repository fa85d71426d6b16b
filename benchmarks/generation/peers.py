"""Who is compared: ways to continue a batch of prompts of one length greedily, without an end.

``engine`` is :meth:`ColaDLM.stream`, what users run, and ``readable`` the loop that it is proved against. The
others are one autoregressive decoder with as many parameters as DiT and VAE decoder together, with the same
random weights, each in a process of its own: this package's, and in the libraries of
:mod:`benchmarks.generation.libraries`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch

from benchmarks.generation.apart import Apart
from benchmarks.generation.cost import blocks_of, prompt_latents
from benchmarks.generation.job import Job, Peer, Prompts, Write
from colada.device import parameters_of
from colada.errors import ColadaError, nearest
from colada.generate.noise import sample_noise
from colada.generate.reference import BlockGenerator
from colada.generate.settings import Settings
from colada.models.autoregressive import AutoregressiveLM
from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.models.load import load_cola
from colada.networks.config import DecoderConfig, matched_config
from colada.networks.decoder import Decoder

ENGINE = "engine"
COLA = (ENGINE, "readable")
"""Peers that run the model itself, to whose cost the limit belongs."""
DISTILLED = "distilled"
LIBRARIES = {
    "transformers": "transformers",
    "ctranslate2": "ctranslate2",
    "onnxruntime-genai": "onnxruntime_genai",
}
"""Peers that need a package of benchmarks/requirements.txt, and its module."""
PEERS = ("readable", "ar", *LIBRARIES)


def check_peers(text: str) -> list[str]:
    """Return the peers that a list separated by commas names, or none for "none".

    Raises:
        ColadaError: for unknown and repeated names, and packages that are not installed.
    """
    import importlib.util

    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PEERS:
            known = [*PEERS, "none"]
            expected = f"some of {', '.join(known)}{nearest(name, known)}"
            raise ColadaError(f"--peers {text}: {name!r}, expected {expected}")
        if names.count(name) > 1:
            raise ColadaError(f"--peers {text}: {name!r} is there twice")
        if name in LIBRARIES and importlib.util.find_spec(LIBRARIES[name]) is None:
            raise ColadaError(f"--peers {name} is not installed: pip install -r benchmarks/requirements.txt")
    return names


def make_peers(
    model: ColaDLM, names: Sequence[str], guidance: float, seed: int, distilled: str | None = None
) -> dict[str, Peer | Apart]:
    """Return the engine and the peers of these names, in the order of their turns.

    Those that are not the model itself have processes of their own.

    Args:
        distilled: a model distilled from this one, beside which it is shown.

    Raises:
        ColadaError: if no decoder of usual proportions has the model's size, or a library lacks the type.
    """
    weight = model.dit.txt_in.proj.weight
    peers: dict[str, Peer | Apart] = {ENGINE: engine(model, guidance, seed)}
    if distilled is not None:
        peers[DISTILLED] = Apart(weight.device, student, distilled, weight.dtype, weight.device, seed)
    for name in names:
        if name in COLA:
            peers[name] = readable(model, guidance, seed)
            continue
        config = matched_config(matched_parameters(model), model.vae.config.vocab_size)
        try:
            peers[name] = Apart(weight.device, decoder_peer, name, config, weight.dtype, weight.device, seed)
        except (ValueError, RuntimeError) as error:  # As they say what they cannot compute in, or where.
            reason = str(error).partition("\n")[0]
            raise ColadaError(f"--peers {name}: {weight.dtype} on {weight.device}: {reason}") from error
    return peers


def decoder_peer(
    name: str, config: DecoderConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> Peer:
    """Return an AR decoder of random weights, in this package or in a library."""
    decoder = random_decoder(config, dtype, device, seed)
    if name == "ar":
        return autoregressive(decoder)
    from benchmarks.generation.libraries import MAKERS

    return MAKERS[name](decoder)


def student(where: str, dtype: torch.dtype, device: torch.device, seed: int) -> Peer:
    """Return a distilled model's own ``stream``, in the steps that it has learnt."""
    model = load_cola(where, dtype=dtype, device=device)
    fixed = fixed_settings(1, 1.0, seed)
    settings = cast(Settings, {key: fixed[key] for key in ("temperature", "stop", "end_ids", "seed")})
    return streamed(model, lambda job: settings)


def fixed_settings(steps: int, guidance: float, seed: int) -> Settings:
    """Return what all share: the released solver and grid, greedy, without an end."""
    return {
        "steps": steps,
        "guidance": guidance,
        "solver": "euler",
        "schedule": "uniform",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "stop": (),
        "end_ids": (),
        "seed": seed,
        "noise": "per-sample",
    }


def streamed(model: LanguageModel, settings: Callable[[Job], Settings]) -> Peer:
    """Return a model's own ``stream``, with the settings of each job."""

    def run(prompts: Prompts, job: Job, write: Write) -> None:
        for chunk in model.stream(prompts, job.new_tokens, batch=job.batch, **settings(job)):
            if chunk.error is not None:
                raise ColadaError(chunk.error)
            write(chunk.index, chunk.tokens)

    return run


def engine(model: ColaDLM, guidance: float, seed: int) -> Peer:
    """Return the model's own ``stream``."""
    return streamed(model, lambda job: fixed_settings(job.steps, guidance, seed))


def readable(model: ColaDLM, guidance: float, seed: int) -> Peer:
    """Return the readable loop, :class:`~colada.generate.reference.BlockGenerator`."""
    vae = model.vae.config

    @torch.inference_mode()
    def run(prompts: Prompts, job: Job, write: Write) -> None:
        generator = BlockGenerator(model.vae, model.dit, steps=job.steps)
        seeds = [seed + number for number in range(job.batch)]
        noises = [sample_noise(one, (vae.block_size, vae.latent_dim), model.device) for one in seeds]
        pad_id = model.pad_id if job.context else 0
        samples = generator.start(prompts, noises, seeds, [guidance] * job.batch, pad_id)
        skipped = prompt_latents(vae, job.context)[1] * vae.patch_size  # The first block repeats the tail.
        left = job.new_tokens
        for _ in range(blocks_of(vae, job)):
            for _ in generator.next_block(samples):
                pass
            for index, sample in enumerate(samples):
                if sample.block is not None:
                    write(index, sample.block.ids[skipped : skipped + left])
            left -= vae.block_tokens - skipped
            skipped = 0

    return run


def matched_parameters(model: ColaDLM) -> int:
    """Return the parameters that generating a token takes: the DiT's and the Text VAE's decoder's."""
    return parameters_of(model.dit) + parameters_of(model.vae.decoder)


def random_decoder(config: DecoderConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Decoder:
    """Return an AR decoder of random weights."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to(dtype).to_empty(device=device)
    decoder.init_weights(torch.Generator(device).manual_seed(seed))
    return decoder


def autoregressive(decoder: Decoder) -> Peer:
    """Return this package's AR baseline."""
    return streamed(AutoregressiveLM(decoder), lambda job: {"end_ids": ()})
