"""The recipe: one typed YAML file that says all a training run depends on.

Every key has a default here; ``recipes/`` holds commented examples. A key that
does not exist is refused with the nearest name that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from colada.checkpoint import check_pair
from colada.config import DiTConfig, TextVAEConfig
from colada.errors import ColadaError, nearest
from colada.flow import TimestepLaw, calibrated_loc
from colada.objectives import FlowSettings, JointWeights, VAEWeights


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(_Section):
    """Where the text is and how it becomes rows."""

    path: str = "data"
    include: list[str] = []
    column: str = "text"
    validation_share: float = Field(0.02, ge=0, lt=1)
    align: float = Field(0.5, ge=0, le=1)


class TokenizerSection(_Section):
    """Train a byte-level BPE of ``vocab_size`` entries, or use the ``file`` of another."""

    vocab_size: int = Field(8192, ge=260)
    file: str | None = None


class ModelSection(_Section):
    """Keywords of TextVAEConfig and DiTConfig; vocabulary and channels are filled in."""

    vae: dict[str, Any] = {}
    dit: dict[str, Any] = {}


class OptimiserSection(_Section):
    """Length of a stage, its rows, and its optimiser: warm-up, then a cosine to ``final_lr`` times the rate.

    "muon" orthogonalises the updates of the transformer blocks' matrices and leaves the rest to AdamW;
    its updates are scaled to AdamW's size, so that both share one learning rate.
    """

    steps: int = Field(1000, ge=0)
    batch: int = Field(32, ge=1)
    length: int = Field(128, ge=1)
    optimiser: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    final_lr: float = Field(0.05, ge=0, le=1)
    warmup: int = Field(100, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    ema: float = Field(0.0, ge=0, lt=1)


class Stage1Section(OptimiserSection):
    """The Text VAE alone."""

    beta: float = Field(1e-3, ge=0)
    mask: float = Field(0.5, ge=0)
    mask_ratio: float = Field(0.15, ge=0, lt=1)
    log_snr: float | None = None


class Stage2Section(OptimiserSection):
    """The DiT, with the Text VAE frozen or trained along (joint)."""

    vae: Literal["frozen", "joint"] = "frozen"
    vae_lr: float = Field(1.0, ge=0)
    loc: float | None = None
    scale: float = Field(1.0, gt=0)
    timestep_per: Literal["block", "row"] = "block"
    prefix_share: float = Field(0.05, ge=0, le=1)
    lambda_vae: float = Field(1.0, ge=0)
    lambda_fm: float = Field(1.0, ge=0)
    lambda_ref: float = Field(0.1, ge=0)


class RunSection(_Section):
    """How often things happen, in steps (0: never), and on what the run computes."""

    log_every: int = Field(20, ge=1)
    validate_every: int = Field(500, ge=0)
    validation_rows: int = Field(64, ge=1)
    save_every: int = Field(500, ge=1)
    sample_every: int = Field(1000, ge=0)
    sample_prompts: list[str] = ["Once upon a time"]
    sample_tokens: int = Field(48, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"


class Recipe(_Section):
    """A whole training run."""

    seed: int = Field(0, ge=0)
    data: DataSection = DataSection()
    tokenizer: TokenizerSection = TokenizerSection()
    model: ModelSection = ModelSection()
    stage1: Stage1Section = Stage1Section()
    stage2: Stage2Section = Stage2Section()
    run: RunSection = RunSection()
    generation: dict[str, Any] = {}

    def configs(self, vocab_size: int, pad_id: int) -> tuple[TextVAEConfig, DiTConfig]:
        """Return both configurations, completed with what the tokenizer decides and checked together.

        Raises:
            ColadaError: naming the key at fault.
        """
        vae_keys = {"vocab_size": vocab_size, "pad_token_id": pad_id, **self.model.vae}
        vae = TextVAEConfig.from_dict(vae_keys, "recipe: model.vae")
        channels = {"txt_in_channels": vae.latent_dim, "txt_out_channels": vae.latent_dim}
        dit = DiTConfig.from_dict(
            {**channels, "block_size": vae.block_size, **self.model.dit}, "recipe: model.dit"
        )
        check_pair(vae, dit, "recipe: model")
        if vae.vocab_size != vocab_size:
            raise ColadaError(
                f"recipe: model.vae.vocab_size={vae.vocab_size}, the tokenizer has {vocab_size}"
            )
        for stage, section in (("stage1", self.stage1), ("stage2", self.stage2)):
            if section.length % vae.block_tokens:
                raise ColadaError(
                    f"recipe: {stage}.length={section.length}, expected a multiple of "
                    f"patch_size * block_size = {vae.block_tokens}"
                )
        return vae, dit

    def vae_weights(self) -> VAEWeights:
        """Return the weights of the Text VAE's terms."""
        s = self.stage1
        return VAEWeights(beta=s.beta, mask=s.mask, mask_ratio=s.mask_ratio, log_snr=s.log_snr)

    def joint_weights(self) -> JointWeights:
        """Return the weights of the joint loss."""
        s = self.stage2
        return JointWeights(vae=s.lambda_vae, flow=s.lambda_fm, reference=s.lambda_ref)

    def flow_settings(self, latent_dim: int) -> FlowSettings:
        """Return how flow matching draws examples; an unset loc is the paper's for this latent width."""
        s = self.stage2
        law = TimestepLaw(calibrated_loc(latent_dim) if s.loc is None else s.loc, s.scale)
        return FlowSettings(law, s.timestep_per == "block", s.prefix_share)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with ``section.key=value`` overrides (values in YAML).

    Raises:
        ColadaError: one line naming the file and the key, for anything that is not a recipe.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ColadaError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ColadaError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ColadaError(f"{path} holds a {type(values).__name__}, expected sections such as 'data:'")
    for override in overrides:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ColadaError(f"{path}: {_first_problem(error)}") from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe with every key spelled out."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def difference(old: Recipe, new: Recipe) -> str | None:
    """Return the first key that makes ``new`` another run than ``old``, with both values, or None."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section in ("seed", "data", "tokenizer", "model", "stage1", "stage2"):
        if isinstance(before[section], dict):
            for key, value in before[section].items():
                if after[section][key] != value:
                    return f"{section}.{key} was {value!r} and is now {after[section][key]!r}"
        elif before[section] != after[section]:
            return f"{section} was {before[section]!r} and is now {after[section]!r}"
    return None


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ColadaError(f"override {override!r}, expected section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ColadaError(f"override {override!r}: {section!r} is not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ColadaError(f"override {override!r}: {text!r} is not a YAML value") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where}={problem['input']!r}: {problem['msg'].lower()}"
    section: Any = Recipe
    for part in problem["loc"][:-1]:
        section = section.model_fields[part].annotation
    return f"unknown key {where!r}{nearest(str(problem['loc'][-1]), section.model_fields)}"
