"""Configurations of the two networks, with the keys of the released ``config.json`` files.

Every key is either honoured or, where only the released value has a meaning
here, refused by name. Keys that this project adds have the released behaviour
as their default, so a released file never needs them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_type_hints

from colada.errors import ColadaError, nearest, shown

# Keys that the transformers library writes into every config.json; they do not describe the network.
_METADATA_KEYS = frozenset(
    {
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "model_type",
    }
)


# The largest whole numbers, by key; others may be 2**20. No network that a machine can hold comes near them.
_MOST = {"ffn_dim": 2**31, "vocab_size": 2**24, "pad_token_id": 2**24, "bos_token_id": 2**24}
_MOST |= dict.fromkeys(("num_layers", "encoder_num_blocks", "decoder_num_blocks"), 1000)


class NetworkConfig:
    """What both configurations share: checked construction, and reading and writing a mapping."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    # Keys whose other values the released model never uses and nobody has defined.
    fixed: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, kind = getattr(self, field.name), hints[field.name]
            if kind is float and type(value) is int:
                value = _as_float(value)
                object.__setattr__(self, field.name, value)
            elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                name = getattr(kind, "__name__", str(kind))
                raise ColadaError(f"{self.model_type}: {field.name}={shown(value)}, expected {name}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ColadaError(f"{self.model_type}: {field.name}={value!r}, expected a finite number")
            if isinstance(value, float) and value and not 1e-30 <= abs(value) <= 1e30:
                expected = "0 or a size from 1e-30 to 1e30"
                raise ColadaError(f"{self.model_type}: {field.name}={value!r}, expected {expected}")
            most = _MOST.get(field.name, 2**20)
            if isinstance(value, int) and abs(value) > most:
                raise ColadaError(f"{self.model_type}: {field.name}={shown(value)}, expected at most {most}")
        for name, only in self.fixed.items():
            if getattr(self, name) != only:
                raise ColadaError(
                    f"{self.model_type}: {name}={getattr(self, name)!r} is not supported, only {only!r}"
                )

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ColadaError(f"{self.model_type}: {name}={shown(getattr(self, name))}, expected {expected}")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) > 0, name, "a positive number")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "config") -> Self:
        """Build a configuration from the contents of a ``config.json``.

        Missing keys take their class default, as in the released code.

        Raises:
            ColadaError: for another ``model_type``, an unknown key or a value that is not supported.
        """
        if not isinstance(values, Mapping):
            raise ColadaError(f"{origin} is {shown(values)}, expected keys and values")
        found = values.get("model_type", cls.model_type)
        if not isinstance(found, str) or found != cls.model_type:
            raise ColadaError(f"{origin}: model_type {shown(found)}, expected {cls.model_type!r}")
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
            if not (field.metadata.get("extension") and value == field.default):
                values[field.name] = value
        return values


def _as_float(number: int) -> float:
    """Return a whole number as a float; one beyond all floats is infinite, which is refused."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def extension(default: Any) -> Any:
    """Return a field beyond the released keys, which is written only where it differs from its default."""
    return dataclasses.field(default=default, metadata={"extension": True})


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """The block-causal Diffusion Transformer (``model_type`` "cola_dit"); defaults are the released 1.8B.

    Three are extensions: ``prediction``, "velocity" (released) or "z0", what the network's output means;
    ``self_conditioning``, whether it takes its last guess of z0 as a second input; and ``training_length``,
    tokens of the rows it was trained on where that is known.
    Raises :class:`ColadaError` for values that contradict each other.
    """

    model_type: ClassVar[str] = "cola_dit"
    architecture: ClassVar[str] = "ColaDiTModel"

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
    prediction: str = extension("velocity")
    self_conditioning: bool = extension(False)
    training_length: int | None = extension(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("txt_in_channels", "txt_dim", "heads", "head_dim", "expand_ratio")
        self._require_positive("num_layers", "norm_eps", "patch_size", "rope_dim", "block_size")
        self._require(self.emb_dim == self.txt_dim, "emb_dim", f"txt_dim={self.txt_dim}")
        self._require(
            self.txt_out_channels == self.txt_in_channels,
            "txt_out_channels",
            f"txt_in_channels={self.txt_in_channels}",
        )
        self._require(self.rope_dim % 2 == 0, "rope_dim", "an even number")
        self._require(self.rope_dim <= self.head_dim, "rope_dim", f"at most head_dim={self.head_dim}")
        self._require(
            self.block_size % self.patch_size == 0,
            "block_size",
            f"a multiple of patch_size={self.patch_size}",
        )
        self._require(self.prediction in ("velocity", "z0"), "prediction", "'velocity' or 'z0'")
        self._require((self.training_length or 1) > 0, "training_length", "a positive number")


@dataclass(frozen=True)
class TextVAEConfig(NetworkConfig):
    """The Text VAE (``model_type`` "cola_text_vae"); defaults are the released 0.5B.

    ``pad_token_id`` is an extension for models whose tokenizer does not name its
    padding token, ``log_snr`` for models whose posterior has the variances that make log(E mu^2 / E sigma^2)
    of each latent this, in place of learnt ones. Raises :class:`ColadaError` for values that contradict
    each other.
    """

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
    pad_token_id: int | None = extension(None)
    log_snr: float | None = extension(None)

    def __post_init__(self) -> None:
        for name in ("clip_qkv", "log_snr"):
            if type(getattr(self, name)) is int:
                object.__setattr__(self, name, _as_float(getattr(self, name)))
        super().__post_init__()
        self._require_positive("vocab_size", "encoder_num_blocks", "decoder_num_blocks", "dim", "ffn_dim")
        self._require_positive("latent_dim", "patch_size", "num_heads", "layer_norm_eps", "rope_theta")
        self._require_positive("block_size", "init_std", "init_cutoff_factor")
        self._require(self.dim % self.num_heads == 0, "dim", f"a multiple of num_heads={self.num_heads}")
        self._require((self.dim // self.num_heads) % 2 == 0, "dim", "an even width per head")
        self._require(self.scaling_factor != 0, "scaling_factor", "a number other than 0")
        self._require(self.clip_qkv is None or self.clip_qkv > 0, "clip_qkv", "null or a positive number")
        self._require(self.act in ("swiglu", "gelu", "silu"), "act", "'swiglu', 'gelu' or 'silu'")
        self._require(self.act != "swiglu" or self.ffn_dim % 2 == 0, "ffn_dim", "an even number for swiglu")
        self._require(
            self.log_snr is None or (self.use_variation and abs(self.log_snr) <= 50),
            "log_snr",
            "null, or with use_variation a number from -50 to 50",
        )
        self._require(
            self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
            "pad_token_id",
            f"an id below vocab_size={self.vocab_size}",
        )

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked input token: the embedding's extra last row."""
        return self.vocab_size

    @property
    def block_tokens(self) -> int:
        """Tokens in one block: ``patch_size * block_size``."""
        return self.patch_size * self.block_size


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
