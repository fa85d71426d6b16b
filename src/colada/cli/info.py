"""What a model consists of and what it takes to hold: counted from its configurations, not its weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from colada.files import read_json_object
from colada.generate.engine.engine import cache_bytes
from colada.generate.settings import RELEASED_SETTINGS
from colada.locate import (
    BUNDLED,
    DECODER_DIR,
    DIT_DIR,
    GENERATION_FILE,
    IMAGE_DIR,
    VAE_DIR,
    find_tokenizer,
    locate,
)
from colada.models.load import MODELS, read_decoder_config
from colada.networks.checkpoint import open_weights, read_configs
from colada.networks.config import NetworkConfig
from colada.pictures.codec import codec_parameters, read_codec_config
from colada.report.table import Table
from colada.text.tokenizer import Tokenizer
from colada.train.cost import decoder_network, networks, scaled

PARTS = {
    "Text VAE encoder": r"vae\.encoder\.",
    "Text VAE decoder": r"vae\.decoder\.",
    "DiT attention": r"dit\.blocks\.\d+\.msa\.",
    "DiT MLP": r"dit\.blocks\.\d+\.mlp\.",
    "DiT AdaLN": r"dit\.(blocks\.\d+\.ada|txt_out_ada)\.",
    "DiT timestep embedding": r"dit\.emb_in2?\.",
    "DiT input and output": r"dit\.txt_(in|out|out_norm)\.",
    "DiT for pictures": r"dit\.(img_|blocks\.\d+\.image\.)",
    "Picture codec": r"image\.",
    "Embedding": r"decoder\.wte\.",
    "Layers": r"decoder\.(blocks|final_norm)\.",
    "Head": r"decoder\.lm_head\.",
}
"""Name of a part -> which parameters it has. Every parameter is in exactly one."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def count_parameters(**networks: nn.Module) -> dict[str, int]:
    """Return the number of parameters of those of :data:`PARTS` that there are, also on the meta device."""
    counts = dict.fromkeys(PARTS, 0)
    for network, module in networks.items():
        for name, parameter in module.named_parameters():
            part = next(part for part, names in PARTS.items() if re.match(names, f"{network}.{name}"))
            counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def describe(where: str | Path | None = None, revision: str | None = None) -> dict[str, Any]:
    """Return what is known of a model without reading its weights, for JSON.

    Arguments as :func:`colada.load`. ``parameters`` are by part (see :data:`PARTS`) and in all; bytes of the
    weights, and those that a latent of one sample (a token of a baseline) adds to the KV caches, by type;
    types of the stored tensors in the file format's words ("F32", "BF16"); configurations by folder.

    Raises:
        ColadaError: if the model cannot be found, or a file cannot be read.
    """
    directory = locate(BUNDLED if where is None else where, revision)
    configs: dict[str, NetworkConfig]
    if (directory / DECODER_DIR).is_dir():
        decoder = read_decoder_config(directory)
        configs = {DECODER_DIR: decoder}
        parameters = count_parameters(decoder=decoder_network(decoder))
        defaults = MODELS[decoder.objective].defaults
        numbers = float(decoder.cache_numbers)
    else:
        vae, dit = read_configs(directory)
        configs, defaults = {VAE_DIR: vae, DIT_DIR: dit}, RELEASED_SETTINGS
        text, prior = networks(vae, dit)  # In float32.
        parameters = count_parameters(vae=text, dit=prior)
        numbers = cache_bytes(text, prior, 1) / BYTES["float32"]
        if dit.img_channels:
            configs[IMAGE_DIR] = image = read_codec_config(directory)
            parameters["Picture codec"] = codec_parameters(image)
    settings, tokenizer = directory / GENERATION_FILE, find_tokenizer(directory)
    inside = [file for folder in configs for file in (directory / folder).glob("*")]
    weights = [*directory.glob("*.safetensors"), *(file for file in inside if file.suffix == ".safetensors")]
    files = sorted({*directory.glob("*.json"), *directory.glob("*.jinja"), *weights, *inside})
    total, entries = sum(parameters.values()), None
    if tokenizer is not None:
        entries = {"file": str(tokenizer), "entries": Tokenizer.from_file(tokenizer).vocab_size}
    return {
        "origin": "bundled" if where is None else str(where),
        "directory": str(directory),
        "parameters": {**parameters, "total": total},
        "weight_bytes": {dtype: total * size for dtype, size in BYTES.items()},
        "cache_bytes_per_latent": {dtype: numbers * size for dtype, size in BYTES.items()},
        "stored_dtypes": _dtypes(sorted(weights)),
        **{folder: config.to_dict() for folder, config in configs.items()},
        "generation": {**defaults, **(read_json_object(settings) if os.path.lexists(settings) else {})},
        "tokenizer": entries,
        "files": {str(file.relative_to(directory)): file.stat().st_size for file in files if file.is_file()},
    }


def _dtypes(files: Iterable[Path]) -> list[str]:
    """Return the types of the stored tensors, from the headers of weight files."""
    dtypes: set[str] = set()
    for file in files:
        with open_weights(file) as handle:
            dtypes.update(handle.get_slice(name).get_dtype() for name in handle.keys())  # noqa: SIM118
    return sorted(dtypes)


def show(model: Mapping[str, Any]) -> None:
    """Print what :func:`describe` returns as tables."""
    console = Console(highlight=False, soft_wrap=True)

    def table(*columns: str, rows: Iterable[Sequence[str]]) -> None:
        Table(columns, list(rows)).print(console)
        console.print()

    tokenizer = model["tokenizer"]
    named = f"{tokenizer['file']} ({tokenizer['entries']:,} entries)" if tokenizer else "none"
    facts = {"tokenizer": named, "stored as": ", ".join(model["stored_dtypes"])}
    for name, value in {"model": model["origin"], "directory": model["directory"], **facts}.items():
        console.print(f"[bold]{name:<12}[/bold]", end="")
        console.print(value, markup=False)
    console.print()
    total, memory = model["parameters"]["total"], ("weight_bytes", "cache_bytes_per_latent")
    shares = [(part, f"{n:,}", f"{n / total:.1%}") for part, n in model["parameters"].items()]
    table("Part", "Parameters", "Share", rows=shares)
    per = "token" if DECODER_DIR in model else "latent"
    rows = [(dtype, *(scaled(model[kind][dtype], "B") for kind in memory)) for dtype in BYTES]
    table("Memory", "Weights", f"KV cache per {per}", rows=rows)
    titles = {VAE_DIR: "Text VAE", DIT_DIR: "DiT", DECODER_DIR: "Decoder", IMAGE_DIR: "Picture codec"}
    titles["generation"] = "Generation"
    for key, title in titles.items():
        if key in model:
            table(title, "", rows=[(name, json.dumps(value)) for name, value in model[key].items()])
    table("File", "Size", rows=[(name, scaled(count, "B")) for name, count in model["files"].items()])
