"""Configurations: what is honoured, what is refused by name, and what is written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from colada.errors import ColadaError
from colada.networks.config import DiTConfig, TextVAEConfig
from helpers import tiny_dit_config, tiny_vae_config

# The keys and values of the released files, as documented.
RELEASED_DIT: dict[str, Any] = {
    "txt_in_channels": 16,
    "txt_out_channels": 16,
    "txt_dim": 2048,
    "emb_dim": 2048,
    "heads": 16,
    "head_dim": 128,
    "expand_ratio": 4,
    "num_layers": 24,
    "norm_eps": 1e-5,
    "qk_bias": False,
    "patch_size": 1,
    "rope_dim": 96,
    "block_size": 4,
}
RELEASED_VAE: dict[str, Any] = {
    "vocab_size": 100278,
    "encoder_num_blocks": 4,
    "decoder_num_blocks": 4,
    "dim": 1536,
    "ffn_dim": 6144,
    "latent_dim": 16,
    "patch_size": 1,
    "num_heads": 12,
    "layer_norm_eps": 1e-6,
    "post_norm": True,
    "qk_bias": False,
    "qk_norm": True,
    "clip_qkv": None,
    "rope_theta": 500000,
    "bias": True,
    "act": "swiglu",
    "encoder_last_ln": True,
    "use_variation": True,
    "block_causal": True,
    "block_size": 4,
    "scaling_factor": 1.0,
    "shifting_factor": 0.0,
    "init_std": 0.02,
    "layer_norm_type": "layer_norm",
    "layer_norm_affine": True,
    "qk_norm_affine": True,
    "rope_full_precision": True,
    "init_fn": "normal",
    "init_cutoff_factor": 3,
    "shared_heads_kv": 1,
    "causal": False,
    "use_emb": True,
    "dropout": 0.0,
    "attn_dropout": 0.0,
}
# Another value for each key that only ever had one.
ONLY_ONE_VALUE: dict[str, Any] = {
    "layer_norm_type": "rms",
    "rope_full_precision": False,
    "init_fn": "mitchell",
    "shared_heads_kv": 2,
    "causal": True,
    "block_causal": False,
    "use_emb": False,
    "dropout": 0.1,
    "attn_dropout": 0.1,
}
CLASSES = [DiTConfig, TextVAEConfig]


@pytest.mark.parametrize(("cls", "released"), [(DiTConfig, RELEASED_DIT), (TextVAEConfig, RELEASED_VAE)])
def test_defaults_are_the_documented_ones_and_exactly_those_keys_are_written(
    cls: type, released: dict[str, Any]
) -> None:
    written = cls().to_dict()
    written.pop("architectures")
    written.pop("model_type")
    assert written == released
    assert cls.from_dict(released) == cls.from_dict({}) == cls()


@pytest.mark.parametrize("key", ONLY_ONE_VALUE)
def test_every_value_that_only_the_release_defines_is_refused_by_name(key: str) -> None:
    with pytest.raises(ColadaError, match=rf"\b{key}={ONLY_ONE_VALUE[key]!r} is not supported"):
        TextVAEConfig.from_dict({key: ONLY_ONE_VALUE[key]})


def test_the_list_of_such_keys_is_complete() -> None:
    assert set(TextVAEConfig.fixed) == set(ONLY_ONE_VALUE)


@pytest.mark.parametrize(
    ("cls", "key", "meant"),
    [(DiTConfig, "rope_dims", "rope_dim"), (TextVAEConfig, "laten_dim", "latent_dim")],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(cls: type, key: str, meant: str) -> None:
    with pytest.raises(ColadaError, match=rf"^file\.json: unknown key '{key}' \(did you mean '{meant}'\?\)$"):
        cls.from_dict({key: 1}, "file.json")


@pytest.mark.parametrize("cls", CLASSES)
def test_an_unknown_key_like_no_other_is_refused_without_a_guess(cls: type) -> None:
    with pytest.raises(ColadaError, match=r"unknown key 'zzqqxx'$"):
        cls.from_dict({"zzqqxx": 1})


@pytest.mark.parametrize(
    ("cls", "key", "value", "expected"),
    [
        (DiTConfig, "heads", "16", "int"),
        (DiTConfig, "heads", 16.0, "int"),
        (DiTConfig, "heads", True, "int"),
        (DiTConfig, "heads", None, "int"),
        (DiTConfig, "norm_eps", "1e-5", "float"),
        (DiTConfig, "norm_eps", True, "float"),
        (DiTConfig, "qk_bias", 1, "bool"),
        (DiTConfig, "prediction", 1, "str"),
        (TextVAEConfig, "post_norm", 0, "bool"),
        (TextVAEConfig, "act", None, "str"),
        (TextVAEConfig, "clip_qkv", "1", "float"),
        (TextVAEConfig, "clip_qkv", True, "float"),
        (TextVAEConfig, "pad_token_id", 1.0, "int"),
        (TextVAEConfig, "pad_token_id", False, "int"),
        (TextVAEConfig, "dropout", "0", "float"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(
    cls: type, key: str, value: object, expected: str
) -> None:
    with pytest.raises(ColadaError, match=rf"{key}={value!r}, expected {expected}"):
        cls.from_dict({key: value})


def test_whole_numbers_are_taken_for_floats() -> None:
    config = TextVAEConfig.from_dict({"rope_theta": 10000, "clip_qkv": 8, "init_cutoff_factor": 2})
    for value, number in ((config.rope_theta, 10000), (config.clip_qkv, 8), (config.init_cutoff_factor, 2)):
        assert type(value) is float
        assert value == number


POSITIVE_DIT = (
    "txt_in_channels txt_dim heads head_dim expand_ratio num_layers norm_eps patch_size rope_dim block_size"
)
POSITIVE_VAE = (
    "vocab_size encoder_num_blocks decoder_num_blocks dim ffn_dim latent_dim patch_size num_heads "
    "layer_norm_eps rope_theta block_size init_std init_cutoff_factor"
)


@pytest.mark.parametrize(
    ("cls", "key"),
    [(DiTConfig, key) for key in POSITIVE_DIT.split()]
    + [(TextVAEConfig, key) for key in POSITIVE_VAE.split()],
)
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_that_must_be_positive_are_refused_by_name_otherwise(cls: type, key: str, value: int) -> None:
    with pytest.raises(ColadaError, match=rf"{key}={value}(\.0)?, expected a positive number"):
        cls.from_dict({key: value})


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (DiTConfig, {"emb_dim": 1024}, r"emb_dim=1024, expected txt_dim=2048"),
        (DiTConfig, {"txt_out_channels": 8}, r"txt_out_channels=8, expected txt_in_channels=16"),
        (DiTConfig, {"rope_dim": 95}, r"rope_dim=95, expected an even number"),
        (DiTConfig, {"rope_dim": 130}, r"rope_dim=130, expected at most head_dim=128"),
        (DiTConfig, {"patch_size": 3}, r"block_size=4, expected a multiple of patch_size=3"),
        (DiTConfig, {"prediction": "noise"}, r"prediction='noise', expected 'velocity' or 'z0'"),
        (TextVAEConfig, {"num_heads": 7}, r"dim=1536, expected a multiple of num_heads=7"),
        (TextVAEConfig, {"dim": 36}, r"dim=36, expected an even width per head"),
        (TextVAEConfig, {"scaling_factor": 0}, r"scaling_factor=0\.0, expected a number other than 0"),
        (TextVAEConfig, {"clip_qkv": 0}, r"clip_qkv=0\.0, expected null or a positive number"),
        (TextVAEConfig, {"clip_qkv": -1.5}, r"clip_qkv=-1\.5, expected null or a positive number"),
        (TextVAEConfig, {"act": "relu"}, r"act='relu', expected 'swiglu', 'gelu' or 'silu'"),
        (TextVAEConfig, {"ffn_dim": 6143}, r"ffn_dim=6143, expected an even number for swiglu"),
        (TextVAEConfig, {"pad_token_id": 100278}, r"pad_token_id=100278, expected an id below vocab_size"),
        (TextVAEConfig, {"pad_token_id": -1}, r"pad_token_id=-1, expected an id below vocab_size"),
    ],
)
def test_contradictory_values_are_refused_by_name(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ColadaError, match=message) as caught:
        cls.from_dict(values, "file.json")
    assert str(caught.value).startswith("file.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["scaling_factor", "shifting_factor", "rope_theta", "layer_norm_eps"])
def test_numbers_that_are_not_finite_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ColadaError, match=rf"{key}={value}"):
        TextVAEConfig.from_dict({key: value})


def test_an_odd_ffn_dim_is_fine_without_a_gate() -> None:
    assert TextVAEConfig(act="silu", ffn_dim=33).ffn_dim == 33


@pytest.mark.parametrize(("cls", "other"), [(DiTConfig, "cola_text_vae"), (TextVAEConfig, "cola_dit")])
def test_another_model_type_is_refused(cls: type, other: str) -> None:
    with pytest.raises(ColadaError, match=rf"model_type '{other}', expected '{cls.model_type}'"):
        cls.from_dict({"model_type": other})


def test_what_the_transformers_library_writes_besides_is_accepted() -> None:
    extra = {
        "architectures": ["ColaDiTModel"],
        "auto_map": {"AutoModel": "modeling.X"},
        "torch_dtype": "float32",
        "dtype": "float32",
        "transformers_version": "4.57.0",
        "_name_or_path": "",
        "model_type": "cola_dit",
    }
    assert DiTConfig.from_dict(extra) == DiTConfig()


@pytest.mark.parametrize(
    "config",
    [
        tiny_dit_config(),
        tiny_dit_config(prediction="z0", patch_size=2, qk_bias=True),
        tiny_vae_config(),
        tiny_vae_config(pad_token_id=3, clip_qkv=8.0, act="gelu", use_variation=False, scaling_factor=1.3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_config_survives_the_way_through_json(config: DiTConfig | TextVAEConfig) -> None:
    text = json.dumps(config.to_dict())
    assert type(config).from_dict(json.loads(text)) == config


def test_extensions_are_written_only_when_they_differ_from_the_release() -> None:
    assert "prediction" not in DiTConfig().to_dict()
    assert DiTConfig(prediction="z0").to_dict()["prediction"] == "z0"
    assert "pad_token_id" not in TextVAEConfig().to_dict()
    assert TextVAEConfig(pad_token_id=0).to_dict()["pad_token_id"] == 0


def test_written_files_name_the_released_model_type_and_architecture() -> None:
    dit, vae = DiTConfig().to_dict(), TextVAEConfig().to_dict()
    assert (dit["model_type"], dit["architectures"]) == ("cola_dit", ["ColaDiTModel"])
    assert (vae["model_type"], vae["architectures"]) == ("cola_text_vae", ["ColaTextVAEModel"])


def test_the_mask_id_is_the_row_after_the_vocabulary_and_blocks_count_tokens() -> None:
    config = tiny_vae_config(vocab_size=50, patch_size=3, block_size=4)
    assert config.mask_id == 50
    assert config.block_tokens == 12
