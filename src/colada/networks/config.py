"""Configurations of the networks, those of Cola DLM with the keys of the released ``config.json`` files.

Every key is either honoured or, where only the released value has a meaning
here, refused by name. Keys that this project adds have the released behaviour
as their default, so a released file never needs them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_type_hints

from colada.errors import ColadaError, nearest, shown

# Keys that the transformers library writes into every config.json; they do not describe the network.
_METADATA_KEYS = frozenset({"architectures", "auto_map", "dtype", "torch_dtype", "model_type"})
_METADATA_KEYS |= {"transformers_version", "_name_or_path"}
# The largest whole numbers, by key; others may be 2**20. No network that a machine can hold comes near them.
_MOST = {"ffn_dim": 2**31, "vocab_size": 2**24, "pad_token_id": 2**24, "bos_token_id": 2**24}
_MOST |= dict.fromkeys(("num_layers", "encoder_num_blocks", "decoder_num_blocks"), 1000)

ConfigRule = tuple[str, Callable[[Any], bool], str]
"""A key, whether a configuration ``c`` is right in it, and what is expected, with values of ``c``."""


def extension(
    default: Any, meaning: str, holds: Callable[[Any], bool] = lambda value: True, expected: str = ""
) -> Any:
    """Return a field beyond the released keys: written only where it differs from what the release does.

    Args:
        default: what the release does.
        meaning: what the key says.
        holds: whether a value of the right type may be.
        expected: which may be, in words.
    """
    metadata = {"meaning": meaning, "holds": holds, "expected": expected}
    # Some are lists or tables, which have no hash; equal configurations have equal ones without them too.
    return dataclasses.field(default=default, metadata=metadata, hash=False)


class NetworkConfig:
    """What all configurations share: checked construction, and reading and writing a mapping.

    Raises :class:`ColadaError` for values of another type, out of bounds, or that contradict each other.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Keys whose other values the released model never uses and nobody has defined."""
    positive: ClassVar[str] = ""
    """Keys of numbers above 0."""
    rules: ClassVar[Sequence[ConfigRule]] = ()

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            self._check_type(field.name, hints[field.name])
        for name, only in self.fixed.items():
            if getattr(self, name) != only:
                raise ColadaError(
                    f"{self.model_type}: {name}={getattr(self, name)!r} is not supported, only {only!r}"
                )
        for name in self.positive.split():
            self._require(getattr(self, name) > 0, name, "a positive number")
        for name, holds, expected in self.rules:
            self._require(holds(self), name, expected)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.metadata:
                holds, expected = field.metadata["holds"], field.metadata["expected"]
                self._require(holds(getattr(self, field.name)), field.name, expected)

    def _check_type(self, name: str, kind: Any) -> None:
        value = getattr(self, name)
        if kind in (float, float | None) and type(value) is int:
            value = float(value) if abs(value) < 2**1023 else math.inf  # Which is refused.
            object.__setattr__(self, name, value)
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self._require(False, name, getattr(kind, "__name__", str(kind)))
        if isinstance(value, float):
            self._require(math.isfinite(value), name, "a finite number")
            self._require(not value or 1e-30 <= abs(value) <= 1e30, name, "0 or a size from 1e-30 to 1e30")
        most = _MOST.get(name, 2**20)
        self._require(not isinstance(value, int) or abs(value) <= most, name, f"at most {most}")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            value = shown(getattr(self, name))
            raise ColadaError(f"{self.model_type}: {name}={value}, expected {expected.format(c=self)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "config") -> Self:
        """Build a configuration from the contents of a ``config.json``.

        Missing keys take their class default, as in the released code.

        Raises:
            ColadaError: for another ``model_type``, an unknown key or a value that is not supported.
        """
        if not isinstance(values, Mapping):
            raise ColadaError(f"{origin} is {shown(values)}, expected keys and values")
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ColadaError(f"{origin}: model_type {shown(model_type)}, expected {cls.model_type!r}")
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known and key not in _METADATA_KEYS:
                raise ColadaError(f"{origin}: unknown key {shown(key)}{nearest(key, known)}")
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except ColadaError as error:
            raise ColadaError(f"{origin}: {error}") from None

    @classmethod
    def require(cls, config: object) -> None:
        """Raise ColadaError for what is no such configuration."""
        if not isinstance(config, cls):
            raise ColadaError(f"config={shown(config)}, expected a {cls.__name__}")

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a ``config.json``; extensions are left out while they have their default."""
        values: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not (field.metadata and value == field.default):
                values[field.name] = value
        return values


def _are_grids(grids: Any) -> bool:
    if grids is None:
        return True
    return isinstance(grids, list) and all(
        isinstance(grid, list) and len(grid) > 1 and all(isinstance(a, int | float) for a in grid)
        for grid in grids
    )


IMG_GRID = extension(
    None,
    "rows and columns of a picture's latents",
    lambda grid: grid is None or (len(grid) == 2 and all(type(n) is int and 0 < n <= 64 for n in grid)),
    "two numbers from 1 to 64, such as [4, 4]",
)
DISTILLED = extension(
    None,
    "what a distilled prior has inside: guidance, its bounds, and the grids of a few evaluations",
    lambda inside: (
        inside is None
        or (isinstance(inside.get("guidance"), int | float) and _are_grids(inside.get("grids")))
    ),
    "null, or guidance and what else is built in, grids as lists of numbers",
)
TRAINING_LENGTH = extension(
    None,
    "tokens of the rows it was trained on, where that is known",
    lambda length: length is None or length > 0,
    "a positive number",
)


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """The block-causal Diffusion Transformer (``model_type`` "cola_dit"); defaults are the released 1.8B."""

    model_type: ClassVar[str] = "cola_dit"
    architecture: ClassVar[str] = "ColaDiTModel"
    positive: ClassVar[str] = (
        "txt_in_channels txt_dim heads head_dim expand_ratio num_layers norm_eps patch_size rope_dim"
        " block_size"
    )
    rules: ClassVar[Sequence[ConfigRule]] = (
        ("emb_dim", lambda c: c.emb_dim == c.txt_dim, "txt_dim={c.txt_dim}"),
        (
            "txt_out_channels",
            lambda c: c.txt_out_channels == c.txt_in_channels,
            "txt_in_channels={c.txt_in_channels}",
        ),
        ("rope_dim", lambda c: c.rope_dim % 2 == 0, "an even number"),
        ("rope_dim", lambda c: c.rope_dim <= c.head_dim, "at most head_dim={c.head_dim}"),
        ("block_size", lambda c: c.block_size % c.patch_size == 0, "a multiple of patch_size={c.patch_size}"),
        (
            "img_channels",
            lambda c: 0 <= c.img_channels <= c.txt_in_channels,
            "0, or at most txt_in_channels={c.txt_in_channels}: all latents are packed in one tensor",
        ),
        (
            "img_grid",
            lambda c: (c.img_grid is None) == (c.img_channels == 0),
            "null without img_channels, else two numbers",
        ),
        ("patch_size", lambda c: c.patch_size == 1 or c.img_channels == 0, "1 with img_channels"),
        ("img_axial", lambda c: c.img_channels > 0 or not c.img_axial, "false without img_channels"),
        (
            "dual_layers",
            lambda c: 0 <= c.dual_layers <= (c.num_layers if c.img_channels else 0),
            "0 without img_channels, else at most num_layers={c.num_layers}",
        ),
    )

    txt_in_channels: int = 16
    txt_out_channels: int = 16
    txt_dim: int = 2048
    emb_dim: int = 2048
    heads: int = 16
    head_dim: int = 128
    expand_ratio: int = 4
    num_layers: int = 24
    norm_eps: float = 1e-5
    qk_bias: bool = False
    patch_size: int = 1
    rope_dim: int = 96
    block_size: int = 4
    prediction: str = extension(
        "velocity",
        "what its output is: the velocity, or a guess of z0",
        lambda name: name in ("velocity", "z0"),
        "'velocity' or 'z0'",
    )
    self_conditioning: bool = extension(False, "whether it takes its last guess of z0 as a second input")
    landing_time: bool = extension(False, "whether it is told where a step ends, beside the timestep")
    distilled: dict | None = DISTILLED  # type: ignore[type-arg]  # As it stands here, its type is checked.
    img_channels: int = extension(0, "width of a picture's latents; 0: it has text only")
    img_grid: list | None = IMG_GRID  # type: ignore[type-arg]  # Its type is checked as it stands here.
    img_axial: bool = extension(
        False, "whether rotary positions tell rows and columns of a picture's latents"
    )
    dual_layers: int = extension(0, "its first layers that have weights of their own for pictures")
    training_length: int | None = TRAINING_LENGTH

    @property
    def cache_numbers(self) -> int:
        """Numbers that the KV cache holds of one position, which is ``patch_size`` latents."""
        return 2 * self.num_layers * self.heads * self.head_dim


@dataclass(frozen=True)
class TextVAEConfig(NetworkConfig):
    """The Text VAE (``model_type`` "cola_text_vae"); defaults are the released 0.5B."""

    model_type: ClassVar[str] = "cola_text_vae"
    architecture: ClassVar[str] = "ColaTextVAEModel"
    fixed: ClassVar[Mapping[str, Any]] = {
        "layer_norm_type": "layer_norm",
        "rope_full_precision": True,
        "init_fn": "normal",
        "shared_heads_kv": 1,
        "causal": False,
        "block_causal": True,
        "use_emb": True,
        "dropout": 0.0,
        "attn_dropout": 0.0,
    }
    positive: ClassVar[str] = (
        "vocab_size encoder_num_blocks decoder_num_blocks dim ffn_dim latent_dim patch_size num_heads"
        " layer_norm_eps rope_theta block_size init_std init_cutoff_factor"
    )
    rules: ClassVar[Sequence[ConfigRule]] = (
        ("dim", lambda c: c.dim % c.num_heads == 0, "a multiple of num_heads={c.num_heads}"),
        ("dim", lambda c: c.dim // c.num_heads % 2 == 0, "an even width per head"),
        ("scaling_factor", lambda c: c.scaling_factor != 0, "a number other than 0"),
        ("clip_qkv", lambda c: c.clip_qkv is None or c.clip_qkv > 0, "null or a positive number"),
        ("act", lambda c: c.act in ("swiglu", "gelu", "silu"), "'swiglu', 'gelu' or 'silu'"),
        ("ffn_dim", lambda c: c.act != "swiglu" or c.ffn_dim % 2 == 0, "an even number for swiglu"),
        (
            "log_snr",
            lambda c: c.log_snr is None or (c.use_variation and abs(c.log_snr) <= 50),
            "null, or with use_variation a number from -50 to 50",
        ),
        (
            "pad_token_id",
            lambda c: c.pad_token_id is None or 0 <= c.pad_token_id < c.vocab_size,
            "an id below vocab_size={c.vocab_size}",
        ),
    )

    vocab_size: int = 100278
    encoder_num_blocks: int = 4
    decoder_num_blocks: int = 4
    dim: int = 1536
    ffn_dim: int = 6144
    latent_dim: int = 16
    patch_size: int = 1
    num_heads: int = 12
    layer_norm_eps: float = 1e-6
    post_norm: bool = True
    qk_bias: bool = False
    qk_norm: bool = True
    clip_qkv: float | None = None
    rope_theta: float = 500000.0
    bias: bool = True
    act: str = "swiglu"
    encoder_last_ln: bool = True
    use_variation: bool = True
    block_causal: bool = True
    block_size: int = 4
    scaling_factor: float = 1.0
    shifting_factor: float = 0.0
    init_std: float = 0.02
    layer_norm_type: str = "layer_norm"
    layer_norm_affine: bool = True
    qk_norm_affine: bool = True
    rope_full_precision: bool = True
    init_fn: str = "normal"
    init_cutoff_factor: float = 3.0
    shared_heads_kv: int = 1
    causal: bool = False
    use_emb: bool = True
    dropout: float = 0.0
    attn_dropout: float = 0.0
    pad_token_id: int | None = extension(None, "the padding token, where the tokenizer does not name it")
    log_snr: float | None = extension(
        None, "log(E mu^2 / E sigma^2) of each latent, of variances that are fixed in place of learnt"
    )

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked input token: the embedding's extra last row."""
        return self.vocab_size

    @property
    def block_tokens(self) -> int:
        """Tokens in one block: ``patch_size * block_size``."""
        return self.patch_size * self.block_size

    @property
    def cache_numbers(self) -> int:
        """Numbers that the decoder's KV cache holds of one latent; the encoder has none."""
        return 2 * self.decoder_num_blocks * self.dim


def check_pair(vae: TextVAEConfig, dit: DiTConfig, origin: str = "model") -> None:
    """Raise ColadaError if a Text VAE and a DiT cannot be parts of one model."""
    if dit.txt_in_channels != vae.latent_dim:
        raise ColadaError(
            f"{origin}: cola_dit txt_in_channels={dit.txt_in_channels} contradicts "
            f"cola_vae latent_dim={vae.latent_dim}"
        )
    if dit.block_size != vae.block_size:
        raise ColadaError(
            f"{origin}: cola_dit block_size={dit.block_size} contradicts cola_vae block_size={vae.block_size}"
        )


# --- the baselines' decoder -----------------------------------------------------------------------

HEAD = 64  # Channels of a head, where the width allows it.
OBJECTIVES = ("ar", "llada")
_ASPECT = 64  # Width per layer of a matched network, as GPT-2's family has about.


@dataclass(frozen=True)
class DecoderConfig(NetworkConfig):
    """A LLaMA-style decoder (``model_type`` "colada_decoder").

    ``objective`` says what it is trained for: "ar", the next token under causal visibility, or "llada",
    masked tokens under full visibility. ``bos_token_id`` precedes every text of an AR model;
    ``block_size`` tokens are decoded together by a LLaDA model, blocks from left to right.
    """

    model_type: ClassVar[str] = "colada_decoder"
    architecture: ClassVar[str] = "ColadaDecoderModel"
    positive: ClassVar[str] = (
        "vocab_size dim num_layers num_heads ffn_dim norm_eps rope_theta init_std block_size"
    )
    rules: ClassVar[Sequence[ConfigRule]] = (
        ("objective", lambda c: c.objective in OBJECTIVES, "'ar' or 'llada'"),
        (
            "bos_token_id",
            lambda c: 0 <= c.bos_token_id < c.vocab_size,
            "an id below vocab_size={c.vocab_size}",
        ),
        ("dim", lambda c: c.dim % c.num_heads == 0, "a multiple of num_heads={c.num_heads}"),
        ("dim", lambda c: c.dim // c.num_heads % 2 == 0, "an even width per head"),
    )

    objective: str = "ar"
    vocab_size: int = 32000
    dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    ffn_dim: int = 1408
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    init_std: float = 0.02
    bos_token_id: int = 0
    block_size: int = 16
    training_length: int | None = TRAINING_LENGTH

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token of a LLaDA model: the embedding's extra last row."""
        return self.vocab_size

    @property
    def embeddings(self) -> int:
        """Rows of the embedding: the vocabulary, and a LLaDA model's mask."""
        return self.vocab_size + (self.objective == "llada")

    @property
    def cache_numbers(self) -> int:
        """Numbers that the KV cache holds of one token: none of a LLaDA model, whose passes read all."""
        return 2 * self.num_layers * self.dim if self.objective == "ar" else 0

    @property
    def parameters(self) -> int:
        """How many parameters the network has; embedding and output are two matrices."""
        rows = self.embeddings + self.vocab_size
        return _decoder_parameters(rows, self.dim, self.num_layers, self.ffn_dim)


def _decoder_parameters(rows: int, dim: int, layers: int, ffn_dim: int) -> int:
    """Return the parameters of a decoder whose embedding and output have so many rows together."""
    return rows * dim + layers * (4 * dim**2 + 3 * dim * ffn_dim + 2 * dim) + dim


def matched_config(parameters: int, vocab_size: int, **others: Any) -> DecoderConfig:
    """Return a network of a wanted number of parameters, of proportions as usual as that allows.

    Heads have 64 channels. Of all widths and depths, the one whose MLP comes out nearest to 8/3 of the
    width and whose width is nearest to 64 a layer, both by ratio.

    Args:
        parameters: wanted.
        vocab_size: of the tokenizer.
        others: further keys of the configuration.

    Raises:
        ColadaError: if none is within 3%.
    """
    best: tuple[float, dict[str, Any]] | None = None
    embeddings = vocab_size + (others.get("objective") == "llada")
    for dim in range(HEAD, 8193, HEAD):
        for layers in range(max(1, dim // (4 * _ASPECT)), 4 * dim // _ASPECT + 1):
            rest = parameters - _decoder_parameters(2 * vocab_size, dim, layers, 0)
            ffn_dim = max(8, round(rest / (3 * dim * layers) / 8) * 8)
            strange = abs(math.log(ffn_dim / (8 * dim / 3))) + 0.5 * abs(math.log(dim / (_ASPECT * layers)))
            count = _decoder_parameters(embeddings + vocab_size, dim, layers, ffn_dim)
            if (best is None or strange < best[0]) and abs(count - parameters) <= 0.03 * parameters:
                shape = {"dim": dim, "num_layers": layers, "num_heads": dim // HEAD, "ffn_dim": ffn_dim}
                best = strange, shape
    if best is None:
        raise ColadaError(f"no decoder with vocab_size={vocab_size} has {parameters:,} parameters")
    return DecoderConfig(**others, vocab_size=vocab_size, **best[1])
