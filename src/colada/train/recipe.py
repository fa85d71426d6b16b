"""The recipe: one typed YAML file that says all a training run depends on.

Every key has a default and a description in its section, from which ``recipes/reference.yaml`` and the recipe
saved with a run are written. A key that does not exist is refused with the nearest name that does.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from colada.data.sources import Section
from colada.errors import ColadaError, nearest
from colada.files import write_text
from colada.generate.settings import check_settings
from colada.networks.config import DiTConfig, TextVAEConfig, check_pair
from colada.networks.decoder_config import DecoderConfig
from colada.strict_yaml import dump_yaml, parse_yaml, read_yaml
from colada.train.sections import (
    BaselineSection,
    DataSection,
    ModelSection,
    OptimiserSection,
    RunSection,
    Stage1Section,
    Stage2Section,
    TokenizerSection,
)

if TYPE_CHECKING:  # They import torch, which settings are checked without.
    from colada.train.losses import JointWeights
    from colada.train.noise import FlowSettings, VAEWeights


class Recipe(Section):
    """A whole training run."""

    seed: int = Field(0, ge=0, le=2**62, description="Decides weights, rows, noise and timesteps.")
    data: DataSection = DataSection()
    tokenizer: TokenizerSection = TokenizerSection()
    model: ModelSection = ModelSection()
    stage1: Stage1Section = Stage1Section()
    stage2: Stage2Section = Stage2Section()
    baseline: BaselineSection = BaselineSection()
    run: RunSection = RunSection()
    generation: dict[str, Any] = Field(
        {}, description="Settings stored with the model and used for samples: steps, guidance, solver, ..."
    )

    @model_validator(mode="before")
    @classmethod
    def _finite(cls, values: Any) -> Any:
        _check_finite(
            values, ""
        )  # Sections check their own; those of configurations and settings have no type.
        return values

    @model_validator(mode="after")
    def _settings(self) -> Recipe:
        check_settings(self.generation, "generation")
        check_settings(self.baseline.generation, "baseline.generation")
        return self

    def stage(self, number: int) -> OptimiserSection:
        """Return the section of a stage, 1 or 2; a baseline has one stage."""
        if self.model.arch != "cola":
            return self.baseline
        return self.stage1 if number == 1 else self.stage2

    @property
    def own_generation(self) -> dict[str, Any]:
        """The settings stored with what is trained."""
        return self.generation if self.model.arch == "cola" else self.baseline.generation

    def configs(self, vocab_size: int, pad_id: int) -> tuple[TextVAEConfig, DiTConfig]:
        """Return both configurations, completed with what the tokenizer decides and checked together.

        Raises:
            ColadaError: naming the key at fault.
        """
        vae_keys = {"vocab_size": vocab_size, "pad_token_id": pad_id, "log_snr": self.stage1.log_snr}
        vae_keys |= self.model.vae
        vae = TextVAEConfig.from_dict(vae_keys, "recipe: model.vae")
        channels = {"txt_in_channels": vae.latent_dim, "txt_out_channels": vae.latent_dim}
        dit = DiTConfig.from_dict(
            {**channels, "block_size": vae.block_size, **self.model.dit}, "recipe: model.dit"
        )
        self.check_configs(vae, dit, vocab_size)
        return vae, dit

    def decoder_config(self, vocab_size: int, bos_id: int) -> DecoderConfig:
        """Return the configuration of a baseline, completed with what the tokenizer decides.

        Raises:
            ColadaError: naming the key at fault.
        """
        filled = {"vocab_size": vocab_size, "bos_token_id": bos_id, "objective": self.model.arch}
        config = DecoderConfig.from_dict({**filled, **self.model.decoder}, "recipe: model.decoder")
        for name, value in (("vocab_size", vocab_size), ("objective", self.model.arch)):
            if getattr(config, name) != value:
                found = getattr(config, name)
                raise ColadaError(f"recipe: model.decoder.{name}={found!r}, expected {value!r}")
        return config

    def check_configs(self, vae: TextVAEConfig, dit: DiTConfig, vocab_size: int) -> None:
        """Check that networks, tokenizer and row lengths fit each other.

        Raises:
            ColadaError: naming the key at fault.
        """
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

    def vae_weights(self) -> VAEWeights:
        """Return the weights of the Text VAE's terms."""
        from colada.train.noise import VAEWeights

        s = self.stage1
        return VAEWeights(beta=s.beta, mask=s.mask, mask_ratio=s.mask_ratio, log_snr=s.log_snr)

    def joint_weights(self) -> JointWeights:
        """Return the weights of the joint loss."""
        from colada.train.losses import JointWeights

        s = self.stage2
        return JointWeights(vae=s.lambda_vae, flow=s.lambda_fm, reference=s.lambda_ref)

    def flow_settings(self, latent_dim: int) -> FlowSettings:
        """Return how flow matching draws examples; an unset loc is the paper's for this latent width."""
        from colada.flow import TimestepLaw, calibrated_loc
        from colada.train.noise import FlowSettings

        s = self.stage2
        law = TimestepLaw(calibrated_loc(latent_dim) if s.loc is None else s.loc, s.scale)
        return FlowSettings(law, s.timestep_per == "block", s.copies, s.prefix_share, s.history_dropout)


def vocab_size(recipe: Recipe) -> int:
    """Return how many entries a new model's tokenizer has.

    Raises:
        ColadaError: if it is a file that is no tokenizer.
    """
    if recipe.tokenizer.file is None:
        return recipe.tokenizer.vocab_size
    from colada.text.tokenizer import Tokenizer

    return Tokenizer.from_file(recipe.tokenizer.file).vocab_size


def load_recipe(
    path: Path | None, overrides: Sequence[str] = (), replaced: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe.

    Args:
        path: the file; None for a recipe in which no key is set.
        overrides: ``section.key=value`` each, with values in YAML; ``sources.0.path`` for lists.
        replaced: values by ``section.key``, before the overrides.

    Raises:
        ColadaError: one line naming the file and the key, for anything that is not a recipe.
    """
    values = None if path is None else read_yaml(path)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ColadaError(f"{path} holds a {type(values).__name__}, expected sections such as 'data:'")
    for key, value in (replaced or {}).items():
        _set(values, key, value, key)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ColadaError(f"override {override!r}, expected section.key=value")
        _set(values, key, parse_yaml(text, f"override {override!r}: {text!r}"), override)
    where = f"{path}: " if path is not None else ""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ColadaError(f"{where}{_first_problem(error)}") from None
    except ColadaError as error:
        raise ColadaError(f"{where}{error}") from None


def _check_finite(values: Any, where: str) -> None:
    if isinstance(values, float) and not math.isfinite(values):
        raise ColadaError(f"{where}={values}, expected a finite number")
    inner: Iterable[tuple[Any, Any]] = enumerate(values) if isinstance(values, list) else ()
    if isinstance(values, Mapping):
        inner = values.items()
    for key, value in inner:
        _check_finite(value, f"{where}.{key}" if where else str(key))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe with every key spelled out and explained."""
    write_text(path, commented(recipe))


def commented(recipe: Recipe) -> str:
    """Return a recipe as YAML in which every key has its description as a comment."""
    return "\n".join(_commented(recipe, 0)) + "\n"


def _commented(section: BaseModel, depth: int) -> list[str]:
    indent, lines = "  " * depth, list[str]()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            about = (type(value).__doc__ or "").partition("\n")[0]
            lines += ["", f"{indent}{name}: # {about}", *_commented(value, depth + 1)]
            continue
        lines += textwrap.wrap(
            field.description or "", 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if isinstance(value, tuple) and any(isinstance(part, BaseModel) for part in value):
            lines.append(f"{indent}{name}:")
            for part in value:
                first, *rest = _commented(part, 0)
                lines += [f"{indent}  - {first}", *(f"{indent}    {line}" for line in rest)]
        else:
            lines += _dumped(name, section.model_dump(mode="json", include={name})[name], indent)
    return lines


def _dumped(name: str, value: Any, indent: str) -> list[str]:
    if isinstance(value, dict) and value:
        block = dump_yaml(value)
        return [f"{indent}{name}:", *(f"{indent}  {line}" for line in block.splitlines())]
    # As an item of a list: a value alone would be followed by an end-of-document mark.
    flow = dump_yaml([value], flow=True)
    return [f"{indent}{name}: {flow.strip()[1:-1]}"]


def difference(old: Recipe, new: Recipe) -> str | None:
    """Return the first key that makes ``new`` another run than ``old``, with both values, or None."""
    sections: dict[str, Any] = dict.fromkeys(("seed", "data", "tokenizer"), True)
    if new.model.arch == "cola":
        sections |= {"model": {"arch", "init", "vae", "dit"}, "stage1": True, "stage2": True}
    else:
        own = set(BaselineSection.model_fields) - {"llada_lr", "generation"}  # the one is resolved to lr
        if new.model.arch == "ar":
            own.remove("random_length")
        sections |= {"model": {"arch", "init", "decoder"}, "baseline": own}
    before, after = (recipe.model_dump(mode="json", include=sections) for recipe in (old, new))
    return _difference("", before, after)


def _difference(path: str, before: Any, after: Any) -> str | None:
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        inner: Iterable[Any] = before
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        inner = range(len(before))
    else:
        return None if before == after else f"{path} was {before!r} and is now {after!r}"
    # Where shards lie and who makes them changes nothing; nor does how a batch is cut.
    keys = (key for key in inner if key not in ("cache", "workers", "micro_batch"))
    found = (_difference(f"{path}.{key}".lstrip("."), before[key], after[key]) for key in keys)
    return next((words for words in found if words), None)


def _set(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Set ``section.key`` in a recipe's values."""
    *sections, last = key.split(".")
    where: Any = values
    for section in sections:
        if isinstance(where, list):
            where = _item(where, section, override)
        else:
            if where.get(section) is None:
                where[section] = {}
            where = where[section]
        if not isinstance(where, dict | list):
            raise ColadaError(f"override {override!r}: {section!r} is not a section")
    if isinstance(where, list):
        _item(where, last, override)
        where[int(last)] = value
    else:
        where[last] = value


def _item(items: list[Any], number: str, override: str) -> Any:
    if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(items):
        raise ColadaError(f"override {override!r}: {number!r}, expected a number from 0 to {len(items) - 1}")
    return items[int(number)]


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        reason = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "value_error":
            return f"{where}: {reason}"
        return f"{where}={problem['input']!r}: {reason[0].lower()}{reason[1:]}"
    *section, key = problem["loc"]
    return f"unknown key {where!r}{_elsewhere(str(key)) or nearest(str(key), _keys(section))}"


def _elsewhere(key: str) -> str:
    """Return a hint at the sections that have a key of this name, if there are any."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    having = [name for name, section in sections.items() if key in getattr(section, "model_fields", ())]
    # What the stages have, a baseline has too.
    having = [name for name in having if name != "baseline"] or having
    return f" (did you mean {' or '.join(f'{name}.{key}' for name in having)}?)" if having else ""


def _keys(location: Sequence[str | int]) -> Mapping[str, Any]:
    """Return the fields of the section at a location of a recipe."""
    section: Any = Recipe
    for part in location:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
            # A tuple of sections stands for its item.
            section = next((arg for arg in get_args(section) if isinstance(arg, type)), section)
    fields: Mapping[str, Any] = section.model_fields
    return fields
