"""Run a parity fixture: a checkpoint with the outputs that a reference implementation gave in float32."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colada.device import find_device
from colada.errors import ColadaError, failure
from colada.files import read_json_object
from colada.generate.engine.engine import Engine, capacity_for
from colada.generate.reference import Block, BlockGenerator
from colada.generate.settings import Settings
from colada.generate.writer import Request
from colada.networks.checkpoint import open_weights, read_dit, read_vae
from colada.networks.packing import pad_to_multiple


def relative_error(tensors: list[Tensor], expected: list[Tensor]) -> float:
    """Return max |a - b| / max |b| over lists of tensors; infinite if shapes differ or a value is NaN."""
    if any(a.shape != b.shape for a, b in zip(tensors, expected, strict=True)):
        return math.inf
    tensors = [a.to(b.device) for a, b in zip(tensors, expected, strict=True)]
    # Tensor maxima, because Python's max() may pass over a NaN.
    difference = torch.stack([(a - b).abs().max() for a, b in zip(tensors, expected, strict=True)]).max()
    size = torch.stack([b.abs().max() for b in expected]).max()
    if difference == 0:
        return 0.0
    error = float(difference / size)
    return math.inf if math.isnan(error) else error


@torch.inference_mode()
def run_case(directory: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the error of every part of a fixture, and whether the generated tokens are equal.

    Args:
        device: where this implementation computes.

    Raises:
        ColadaError: if the directory is not a fixture, or there is no such device.
    """
    place = find_device(str(device))
    case = read_json_object(directory / "case.json")
    with open_weights(directory / "expected.safetensors") as handle:
        expected = {name: handle.get_tensor(name).to(place) for name in handle.keys()}  # noqa: SIM118
    try:
        return _compare(directory, case, expected, place)
    except KeyError as error:
        raise ColadaError(f"{directory} is no complete fixture: {error} is missing") from None
    except (TypeError, ValueError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        # What a reference wrote for itself is not looked at value by value.
        raise failure(f"{directory} is no fixture", error) from error


def _compare(
    directory: Path, case: dict[str, Any], expected: dict[str, Tensor], device: torch.device
) -> dict[str, Any]:
    vae, dit = read_vae(directory, torch.float32, device), read_dit(directory, torch.float32, device)
    prompts, settings, pad_id = case["prompts"], case["settings"], case["pad_token_id"]
    errors: dict[str, Any] = {}

    # Single passes: every prompt that has tokens, padded to whole blocks, all in one packed batch.
    patch, size = vae.config.patch_size, vae.config.block_size
    padded = [pad_to_multiple(ids, vae.config.block_tokens, pad_id) for ids in prompts]
    encoded = [number for number, ids in enumerate(padded) if ids]
    lengths = [len(padded[number]) // patch for number in encoded]
    if encoded:
        packed = torch.tensor([token for number in encoded for token in padded[number]], device=device)
        posterior = vae.encode(packed, [len(padded[number]) for number in encoded])
        means = [expected[f"encode.{number}.mean"] for number in encoded]
        errors["encode_mean"] = relative_error(list(posterior.mean.split(lengths)), means)
        if posterior.logvar is not None:
            logvars = [expected[f"encode.{number}.logvar"] for number in encoded]
            errors["encode_logvar"] = relative_error(list(posterior.logvar.split(lengths)), logvars)
        logits = vae.decode(torch.cat(means), lengths)
        errors["decode"] = relative_error([logits], [expected["decode.full_logits"]])
        velocity = dit(expected["dit.input"], expected["dit.timestep"], dit.layout(lengths))
        errors["velocity"] = relative_error([velocity], [expected["dit.drift"]])

    # Guided generation with the fixture's own noise, for as many blocks as it has: by the readable
    # loop, and by the engine that users run. The released code drops the prompt's tokens beyond its
    # prefix, and nothing else.
    blocks_of = range(case["n_blocks"])
    noise = [expected[f"generate.noise.{b}"].split(size) for b in blocks_of]

    chosen: Settings = {
        "guidance": settings["guidance_scale"],
        "steps": settings["timestep_num"],
        "temperature": settings["temperature"],
        "repetition_penalty": settings["repetition_penalty"],
    }
    noises = [partial(_noise, noise, number) for number in range(len(prompts))]
    loop = BlockGenerator(vae, dit, **chosen)
    requests = [
        Request(tuple(ids), len(noise) * vae.config.block_tokens, loop.settings, noise=noise_of)
        for ids, noise_of in zip(prompts, noises, strict=True)
    ]
    guidance = [loop.settings.guidance] * len(prompts)
    samples = loop.start(prompts, noises, [0] * len(prompts), guidance, pad_id)
    engine = Engine(vae, dit, capacity=capacity_for(requests, vae.config), pad_id=pad_id, keep_logits=True)
    for request in requests:
        engine.submit(request)
    written_blocks: dict[str, list[list[Block]]] = {"": [], "engine_": []}
    for _ in blocks_of:
        for _ in loop.next_block(samples):
            pass
        written_blocks[""].append([sample.block for sample in samples if sample.block is not None])
        _next_blocks(engine)
        written_blocks["engine_"].append([slot.block for slot in engine.news if slot.block is not None])
    equal = []
    for kind, generated in written_blocks.items():
        for part in ("latents", "logits"):
            results = [torch.cat([getattr(block, part) for block in blocks]) for blocks in generated]
            reference = [expected[f"generate.{part}.{b}"] for b in blocks_of]
            errors[kind + part] = relative_error(results, reference)
        for number, ids in enumerate(prompts):
            token_ids = [token for blocks in generated for token in blocks[number].ids]
            tail = max(0, len(ids) - -(-len(ids) // patch) // size * size * patch)
            equal.append(token_ids[tail:] == case["generated"][number])
    errors["tokens_equal"] = all(equal)
    return errors


def _noise(noise: Sequence[Sequence[Tensor]], sample: int, block: int, candidate: int) -> Tensor:
    return noise[block][sample]


def _next_blocks(engine: Engine) -> None:
    """Let everyone have the next block; a long grid takes several rounds."""
    while True:
        for _ in engine.next_block():
            pass
        if engine.news:
            return


def report(directory: Path, tolerance: float, device: str = "cpu") -> int:
    """Print a fixture's errors as one JSON line; return 0 if all hold, else 1."""
    errors = run_case(directory, device)
    holds = errors["tokens_equal"] and all(
        error <= tolerance for name, error in errors.items() if name != "tokens_equal"
    )
    # JSON has no infinity: a part that cannot be compared is null.
    shown = {name: None if error == math.inf else error for name, error in errors.items()}
    line = {"case": str(directory), "tolerance": tolerance, **shown, "ok": bool(holds)}
    print(json.dumps(line))
    return 0 if holds else 1
