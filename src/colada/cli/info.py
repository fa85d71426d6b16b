"""What a model consists of and what it takes to hold: counted from its configurations, not its weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from colada.files import read_json_object
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
from colada.networks.config import DecoderConfig, DiTConfig, NetworkConfig, TextVAEConfig
from colada.networks.dit import DiT
from colada.networks.vae import TextVAE
from colada.pictures.codec import codec_parameters, read_codec_config
from colada.text.tokenizer import Tokenizer
from colada.train.cost import networks

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
}
"""Name of a part -> which parameters it has. Every parameter is in exactly one."""
OF_PICTURES = ("DiT for pictures", "Picture codec")
"""Those that a model of text has not."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def count_parameters(vae: TextVAE, dit: DiT) -> dict[str, int]:
    """Return the number of parameters of each of :data:`PARTS`; the networks may be on the meta device."""
    counts = dict.fromkeys(PARTS, 0)
    for network, module in (("vae", vae), ("dit", dit)):
        for name, parameter in module.named_parameters():
            part = next(part for part, names in PARTS.items() if re.match(names, f"{network}.{name}"))
            counts[part] += parameter.numel()
    return counts


def count_decoder_parameters(config: DecoderConfig) -> dict[str, int]:
    """Return the number of parameters of a baseline's parts."""
    embedding, head = config.embeddings * config.dim, config.vocab_size * config.dim
    rest = config.parameters - embedding - head
    return {"Embedding": embedding, "Layers": rest, "Head": head}


def history_values(vae: TextVAEConfig, dit: DiTConfig) -> float:
    """Return how many numbers a latent adds to the histories: keys and values per DiT and decoder layer."""
    prior = dit.num_layers * 2 * dit.heads * dit.head_dim / dit.patch_size
    return prior + vae.decoder_num_blocks * 2 * vae.dim


@dataclass(frozen=True)
class ModelInfo:
    """A model directory in numbers.

    Attributes:
        origin: as the user named it.
        directory: where it is on this machine.
        parameters: by part, see :data:`PARTS`.
        configs: by folder of the directory.
        history: numbers that one latent, or token of a baseline, adds to the histories.
        dtypes: types of the stored tensors, in the file format's words ("F32", "BF16").
        generation: the settings it generates with unless told otherwise.
        tokenizer: file and number of entries, or None.
        files: size in bytes by path within the directory.
    """

    origin: str
    directory: Path
    parameters: dict[str, int]
    configs: Mapping[str, NetworkConfig]
    history: float
    dtypes: tuple[str, ...]
    generation: Mapping[str, Any]
    tokenizer: tuple[Path, int] | None
    files: dict[str, int]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    def weight_bytes(self, dtype: str) -> int:
        """Return the memory of all weights in a type of :data:`BYTES`."""
        return self.total * BYTES[dtype]

    def history_bytes(self, dtype: str) -> float:
        """Return the memory that one latent or token of one sample adds to the histories."""
        return self.history * BYTES[dtype]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "origin": self.origin,
            "directory": str(self.directory),
            "parameters": {**self.parameters, "total": self.total},
            "weight_bytes": {dtype: self.weight_bytes(dtype) for dtype in BYTES},
            "history_bytes_per_latent": {dtype: self.history_bytes(dtype) for dtype in BYTES},
            "stored_dtypes": self.dtypes,
            **{folder: config.to_dict() for folder, config in self.configs.items()},
            "generation": self.generation,
            "tokenizer": self.tokenizer and {"file": str(self.tokenizer[0]), "entries": self.tokenizer[1]},
            "files": self.files,
        }


def describe(where: str | Path | None = None, revision: str | None = None) -> ModelInfo:
    """Return what is known of a model without reading its weights; arguments as :func:`colada.load`.

    Raises:
        ColadaError: if the model cannot be found, or a file cannot be read.
    """
    directory = locate(BUNDLED if where is None else where, revision)
    configs: dict[str, NetworkConfig]
    if (directory / DECODER_DIR).is_dir():
        decoder = read_decoder_config(directory)
        configs, parameters = {DECODER_DIR: decoder}, count_decoder_parameters(decoder)
        defaults = MODELS[decoder.objective].defaults
        # A LLaDA model keeps no history: every pass reads all tokens.
        history = 2.0 * decoder.num_layers * decoder.dim if decoder.objective == "ar" else 0.0
    else:
        vae, dit = read_configs(directory)
        configs, defaults, history = {VAE_DIR: vae, DIT_DIR: dit}, RELEASED_SETTINGS, history_values(vae, dit)
        parameters = count_parameters(*networks(vae, dit))
        if dit.img_channels:
            configs[IMAGE_DIR] = image = read_codec_config(directory)
            parameters["Picture codec"] = codec_parameters(image)
        else:
            parameters = {part: count for part, count in parameters.items() if part not in OF_PICTURES}
    settings, tokenizer = directory / GENERATION_FILE, find_tokenizer(directory)
    inside = (file for folder in configs for file in (directory / folder).glob("*"))
    beside = [*directory.glob("*.json"), *directory.glob("*.jinja"), *directory.glob("*.safetensors")]
    files = sorted([*beside, *inside])
    return ModelInfo(
        origin="bundled" if where is None else str(where),
        directory=directory,
        parameters=parameters,
        configs=configs,
        history=history,
        dtypes=_dtypes(directory, configs),
        generation={**defaults, **(read_json_object(settings) if os.path.lexists(settings) else {})},
        tokenizer=(tokenizer, Tokenizer.from_file(tokenizer).vocab_size) if tokenizer is not None else None,
        files={str(file.relative_to(directory)): file.stat().st_size for file in files if file.is_file()},
    )


def _dtypes(directory: Path, folders: Iterable[str]) -> tuple[str, ...]:
    """Return the types of the stored tensors, from the headers of the weight files."""
    dtypes: set[str] = set()
    inside = [file for folder in folders for file in (directory / folder).glob("*.safetensors")]
    for file in sorted([*directory.glob("*.safetensors"), *inside]):
        with open_weights(file) as handle:
            dtypes.update(handle.get_slice(name).get_dtype() for name in handle.keys())  # noqa: SIM118
    return tuple(sorted(dtypes))


# --- for a reader ------------------------------------------------------------------------------


def show(model: ModelInfo) -> None:
    """Print everything as tables."""
    console = Console(highlight=False, soft_wrap=True)

    def table(*columns: str, rows: Sequence[Sequence[str]]) -> None:
        grid = Table(*columns[:1], box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
        for column in columns[1:]:
            grid.add_column(column, justify="right")
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
        console.print()

    def values(title: str, mapping: dict[str, Any]) -> None:
        table(title, "", rows=[(name, json.dumps(value)) for name, value in mapping.items()])

    tokenizer = f"{model.tokenizer[0]} ({model.tokenizer[1]:,} entries)" if model.tokenizer else "none"
    for name, value in (
        ("model", model.origin),
        ("directory", model.directory),
        ("tokenizer", tokenizer),
        ("stored as", ", ".join(model.dtypes)),
    ):
        console.print(f"[bold]{name:<12}[/bold]", end="")
        console.print(value, markup=False)
    console.print()
    shares = [(part, f"{n:,}", f"{n / model.total:.1%}") for part, n in model.parameters.items()]
    table("Part", "Parameters", "Share", rows=[*shares, ("Total", f"{model.total:,}", "100.0%")])
    memory = [(name, size(model.weight_bytes(name)), size(model.history_bytes(name))) for name in BYTES]
    per = "token" if DECODER_DIR in model.configs else "latent"
    table("Memory", "Weights", f"History per {per}", rows=memory)
    titles = {VAE_DIR: "Text VAE", DIT_DIR: "DiT", DECODER_DIR: "Decoder", IMAGE_DIR: "Picture codec"}
    for folder, config in model.configs.items():
        values(titles[folder], config.to_dict())
    values("Generation", dict(model.generation))
    table("File", "Size", rows=[(name, size(count)) for name, count in model.files.items()])


def size(count: float) -> str:
    """Return a number of bytes for a reader: "1,536 B", "12.3 MiB"."""
    units = ["KiB", "MiB", "GiB", "TiB"]
    if count < 10 * 1024:
        return f"{count:,.0f} B"
    while (count := count / 1024) >= 1024 and len(units) > 1:
        units.pop(0)
    return f"{count:.1f} {units[0]}"
