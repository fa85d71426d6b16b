"""The recipe: one typed YAML file that says all a training run depends on.

Every key has a default and a description in its section, from which ``colada recipe`` and the recipe saved
with a run are written. A key that does not exist is refused with the nearest name that does.
"""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from colada.data.sources import Section, Source
from colada.errors import ColadaError, nearest, one_of
from colada.files import write_text
from colada.generate.settings import check_settings
from colada.networks.config import DecoderConfig, DiTConfig, TextVAEConfig, check_pair
from colada.pictures.config import CodecConfig
from colada.strict_yaml import dump_yaml, parse_yaml, read_yaml
from colada.train.kinds import (
    KINDS,
    AnyStage,
    DecoderSection,
    InstructSection,
    PicturesSection,
    PictureVAESection,
    PriorSection,
    StageSection,
    TextVAESection,
)
from colada.train.sections import DataSection, ModelSection, RunSection, TokenizerSection

_STAGES: dict[str, AnyStage] = {"vae": TextVAESection(), "prior": PriorSection()}


class Recipe(Section):
    """A whole training run."""

    seed: int = Field(0, ge=0, le=2**62, description="Decides weights, rows, noise and timesteps.")
    data: DataSection = DataSection()
    tokenizer: TokenizerSection = TokenizerSection()
    model: ModelSection = ModelSection()
    stages: dict[str, AnyStage] = Field(
        _STAGES, description="What is trained, in order: a name of your own, and the settings of each."
    )
    run: RunSection = RunSection()
    generation: dict[str, Any] = Field(
        {}, description="Settings stored with the model and used for samples: steps, guidance, solver, ..."
    )

    @model_validator(mode="before")
    @classmethod
    def _finite(cls, values: Any) -> Any:
        # Sections check their own numbers; those of configurations and settings have no type.
        _check_finite(values, "")
        return values

    @field_validator("stages", mode="before")
    @classmethod
    def _kinds(cls, stages: Any) -> Any:
        """Check names and kinds; a stage without a kind is of the one that it is named after."""
        if not isinstance(stages, dict):
            return stages
        named = {}
        for name, values in stages.items():
            if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]{0,30}", name):
                raise ValueError(f"{name!r}, expected a name of small letters, digits and underscores")
            values = {} if values is None else values
            if isinstance(values, dict):
                kind = values.get("kind", name)
                if kind not in KINDS:
                    known = one_of(KINDS, kind)
                    raise ValueError(
                        f"{name}.kind={kind!r}, {known}"
                        if "kind" in values
                        else f"{name} has no kind, {known}"
                    )
                values = {"kind": kind, **values}
            named[name] = values
        return named

    @model_validator(mode="after")
    def _settings(self) -> Recipe:
        check_settings(self.generation, "generation")
        if self.model.arch == "cola" and not self.trained:
            kinds = [kind for kind, section in KINDS.items() if "cola" in section.archs]
            raise ColadaError(
                f"stages: {', '.join(self.stages) or 'none'}, expected one of kind {', '.join(kinds)}"
            )
        for name, section in self.stages.items():
            if isinstance(section, DecoderSection):
                check_settings(section.generation, f"stages.{name}.generation")
            if isinstance(section, PicturesSection | PictureVAESection):
                if not self.data.pictures:
                    raise ColadaError(f"stages.{name} learns pictures, expected some in data.pictures")
                if isinstance(section, PictureVAESection) and self.model.image.get("kind") != "conv_vae":
                    kind = self.model.image.get("kind", CodecConfig.kind)
                    raise ColadaError(f"stages.{name} with model.image.kind={kind!r}, expected 'conv_vae'")
                if isinstance(section, PictureVAESection) and section.steps and not self._reads_codec(name):
                    raise ColadaError(
                        f"stages.{name} is the last of pictures, expected one of kind 'pictures' after it:"
                        " a model of text has no place for a codec"
                    )
            if not any(source_weights(section, self.data.sources, f"stages.{name}.weights")):
                if section.weights is not None:
                    raise ColadaError(f"stages.{name}.weights={section.weights}, expected one above 0")
                names = ", ".join(dict.fromkeys(source.format for source in self.data.sources))
                raise ColadaError(
                    f"stages.{name}: sources of format {names}, expected some of {', '.join(section.formats)}"
                )
        return self

    def _reads_codec(self, name: str) -> bool:
        """Return whether a stage after this one learns from the codec's latents."""
        after = list(self.stages.values())[list(self.stages).index(name) + 1 :]
        return any(isinstance(section, PicturesSection) and section.steps for section in after)

    def stages_of(self, arch: str) -> dict[str, StageSection]:
        """Return the stages that train an architecture, in order."""
        return {name: section for name, section in self.stages.items() if arch in section.archs}

    @property
    def trained(self) -> dict[str, StageSection]:
        """The stages that train what the recipe trains, in order."""
        return self.stages_of(self.model.arch)

    def number(self, stage: str) -> int:
        """Return a stage's number in the seeds of its rows and noise.

        It is its place in the order, but a prior's at least 2: to leave out the Text VAE changes no row.
        """
        number = 0
        for name, section in self.trained.items():
            number = max(number + 1, section.first)
            if name == stage:
                break
        return number

    @property
    def own_generation(self) -> dict[str, Any]:
        """The settings stored with what is trained."""
        if self.model.arch == "cola":
            return self.generation
        sections = [section for section in self.trained.values() if isinstance(section, DecoderSection)]
        return sections[-1].generation if sections else {}

    def configs(self, vocab_size: int, pad_id: int) -> tuple[TextVAEConfig, DiTConfig]:
        """Return both configurations, completed with what the tokenizer decides and checked together.

        Raises:
            ColadaError: naming the key at fault.
        """
        filled = {"vocab_size": vocab_size, "pad_token_id": pad_id}
        vae = TextVAEConfig.from_dict({**filled, **self.model.vae}, "recipe: model.vae")
        channels = {"txt_in_channels": vae.latent_dim, "txt_out_channels": vae.latent_dim}
        dit = DiTConfig.from_dict(
            {**channels, "block_size": vae.block_size, **self.model.dit}, "recipe: model.dit"
        )
        return vae, self.check_configs(vae, dit, vocab_size)

    def decoder_config(self, vocab_size: int, bos_id: int) -> DecoderConfig:
        """Return the configuration of a baseline, completed with what the tokenizer decides.

        Raises:
            ColadaError: naming the key at fault.
        """
        filled = {"vocab_size": vocab_size, "bos_token_id": bos_id, "objective": self.model.arch}
        config = DecoderConfig.from_dict({**filled, **self.model.decoder}, "recipe: model.decoder")
        for name, value in (("vocab_size", vocab_size), ("objective", self.model.arch)):
            if getattr(config, name) != value:
                value_there = getattr(config, name)
                raise ColadaError(f"recipe: model.decoder.{name}={value_there!r}, expected {value!r}")
        return config

    def check_configs(self, vae: TextVAEConfig, dit: DiTConfig, vocab_size: int) -> DiTConfig:
        """Check that networks, tokenizer and row lengths fit each other.

        Returns: the DiT's configuration, with the second inputs that self-conditioning and landing times
            need; a model to continue from may be without them.

        Raises:
            ColadaError: naming the key at fault.
        """
        check_pair(vae, dit, "recipe: model")
        if vae.vocab_size != vocab_size:
            raise ColadaError(
                f"recipe: model.vae.vocab_size={vae.vocab_size}, the tokenizer has {vocab_size}"
            )
        for name, section in self.stages_of("cola").items():
            if section.length % vae.block_tokens:
                raise ColadaError(
                    f"recipe: stages.{name}.length={section.length}, expected a multiple of "
                    f"patch_size * block_size = {vae.block_tokens}"
                )
            if getattr(section, "self_conditioning", 0):
                dit = dataclasses.replace(dit, self_conditioning=True)
            if getattr(section, "landing_time", False) and section.steps:
                dit = dataclasses.replace(dit, landing_time=True)
            if isinstance(section, PicturesSection) and not dit.img_channels:
                image = self.image_config(vae)
                assert image is not None
                dit = dataclasses.replace(
                    dit,
                    img_channels=image.channels,
                    img_grid=list(image.grid),
                    img_axial=section.axial,
                    dual_layers=section.dual_layers,
                )
        return dit

    def image_config(self, vae: TextVAEConfig) -> CodecConfig | None:
        """Return the configuration of a new model's picture codec; None where no stage learns pictures.

        Raises:
            ColadaError: naming the key at fault.
        """
        kinds = (PicturesSection, PictureVAESection)
        if not any(isinstance(section, kinds) for section in self.trained.values()):
            return None
        filled: dict[str, Any] = {"width": 32 if self.model.image.get("kind") == "conv_vae" else 0}
        patch = self.model.image.get("patch", CodecConfig.patch)
        numbers = patch * patch * 3 if isinstance(patch, int) else vae.latent_dim
        filled["channels"] = vae.latent_dim if filled["width"] else min(vae.latent_dim, numbers)
        image = CodecConfig.from_dict({**filled, **self.model.image}, "recipe: model.image")
        if image.channels > vae.latent_dim:
            raise ColadaError(
                f"recipe: model.image.channels={image.channels}, expected at most {vae.latent_dim}, the width"
                " of the text's latents"
            )
        return image

    def check_networks(self) -> None:
        """Check the keys of the networks' configurations, of an architecture that is not trained too.

        Raises:
            ColadaError: naming the key at fault.
        """
        if self.model.init is not None:
            return
        size = vocab_size(self)
        if self.model.arch == "cola" or self.model.vae or self.model.dit:
            self.configs(size, pad_id=size - 1)  # Which id it is changes nothing here.
        if self.model.decoder:
            arch = self.model.decoder.get("objective", "ar") if self.model.arch == "cola" else self.model.arch
            model = self.model.model_copy(update={"arch": arch})
            self.model_copy(update={"model": model}).decoder_config(size, bos_id=0)


def source_weights(section: StageSection, sources: Sequence[Source], where: str = "weights") -> list[float]:
    """Return the weight of each source in a stage; 0 for one that it does not read.

    Raises:
        ColadaError: naming ``where``, for a weight of no source, or of several.
    """
    weights = [source.weight for source in sources]
    if section.weights is not None:
        weights = _named_weights(section.weights, sources, where)
    reads = [source.format in section.formats for source in sources]
    weights = [weight if read else 0.0 for weight, read in zip(weights, reads, strict=True)]
    plain = [source.format == "text" for source in sources]
    texts = sum(weight for weight, is_text in zip(weights, plain, strict=True) if is_text)
    others = sum(weights) - texts
    if isinstance(section, InstructSection) and texts and others:
        shares = [section.replay / texts if is_text else (1 - section.replay) / others for is_text in plain]
        weights = [weight * share for weight, share in zip(weights, shares, strict=True)]
    return weights


def _named_weights(named: Mapping[str, float], sources: Sequence[Source], where: str) -> list[float]:
    """Return the weights of sources of which some are named; 0 for the others."""
    paths = [PurePath(source.name) for source in sources]
    weights = [0.0] * len(sources)
    for key, weight in named.items():
        meant = [n for n, path in enumerate(paths) if key in (sources[n].name, path.name, path.stem)]
        if len(meant) != 1:
            known = ", ".join(path.stem for path in paths)
            raise ColadaError(f"{where}: {key!r} names {len(meant) or 'none'} of the sources: {known}")
        weights[meant[0]] = weight
    return weights


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
        replaced: values by ``section.key``, before the overrides. Other sources than the recipe's take the
            stages' weights of these away.

    Raises:
        ColadaError: one line naming the file and the key, for anything that is not a recipe.
    """
    values = None if path is None else read_yaml(path)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ColadaError(f"{path} holds a {type(values).__name__}, expected sections such as 'data:'")
    if values.get("stages") is None:  # Overrides are of the stages that there are without a word.
        values["stages"] = {name: {} for name in _STAGES}
    for key, value in (replaced or {}).items():
        _set(values, key, value, key)
    if "data.sources" in (replaced or {}) and isinstance(values["stages"], dict):
        for section in values["stages"].values():
            if isinstance(section, dict):
                section.pop("weights", None)
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
    inner: Iterable[tuple[Any, Any]] = enumerate(values) if isinstance(values, list | tuple) else ()
    if isinstance(values, Mapping):
        inner = values.items()
    for key, value in inner:
        _check_finite(value, f"{where}.{key}" if where else str(key))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe with every key spelled out and explained."""
    write_text(path, commented(recipe))


def commented(recipe: Recipe) -> str:
    """Return a recipe as YAML in which every key has its description as a comment."""
    return "\n".join(_commented(recipe, 0, set())) + "\n"


def _commented(section: BaseModel, depth: int, said: set[str]) -> list[str]:
    """Return the lines of a section; what is ``said`` of one stage is not said of the next."""
    indent, lines = "  " * depth, list[str]()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            about = (type(value).__doc__ or "").partition("\n")[0]
            lines += ["", f"{indent}{name}: # {about}", *_commented(value, depth + 1, said)]
            continue
        about = field.description or ""
        if about not in said:
            lines += textwrap.wrap(about, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        said.add(about)
        if isinstance(value, dict) and any(isinstance(part, BaseModel) for part in value.values()):
            lines.append(f"{indent}{name}:")
            for key, part in value.items():
                about = (type(part).__doc__ or "").partition("\n")[0]
                lines += [f"{indent}  {key}: # {about}", *_commented(part, depth + 2, said)]
        elif isinstance(value, tuple) and any(isinstance(part, BaseModel) for part in value):
            lines.append(f"{indent}{name}:")
            for part in value:
                first, *rest = _commented(part, 0, said)
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
    network = {"vae", "dit", "image"} if new.model.arch == "cola" else {"decoder"}
    compared: Any = {"seed": True, "data": True, "tokenizer": True, "model": {"arch", "init"} | network}
    before, after = (recipe.model_dump(mode="json", include=compared) for recipe in (old, new))
    for values, recipe in ((before, old), (after, new)):
        # Its rate is resolved to lr, and its settings are of the model; only LLaDA cuts rows.
        unused = {"llada_lr", "generation"} | ({"random_length"} if new.model.arch == "ar" else set())
        stages = recipe.stages_of(new.model.arch)
        values["stages"] = {
            name: part.model_dump(mode="json", exclude=unused) for name, part in stages.items()
        }
    return _difference("", before, after)


def _difference(path: str, before: Any, after: Any) -> str | None:
    order = path == "stages" and list(before) != list(after)
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys() and not order:
        inner: Iterable[Any] = before
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        inner = range(len(before))
    else:
        if path == "stages":
            before, after = ", ".join(before), ", ".join(after)
        return None if before == after else f"{path} was {before!r} and is now {after!r}"
    # Where shards lie and who makes them changes nothing; nor does how a batch is cut.
    keys = (key for key in inner if key not in ("cache", "workers", "micro_batch"))
    differences = (_difference(f"{path}.{key}".lstrip("."), before[key], after[key]) for key in keys)
    return next((words for words in differences if words), None)


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
    location = list(problem["loc"])
    kind = str(location.pop(2)) if location[0] == "stages" and len(location) > 2 else None
    where = ".".join(str(part) for part in location)
    if problem["type"] != "extra_forbidden":
        reason = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "value_error":
            return f"{where}: {reason}"
        return f"{where}={problem['input']!r}: {reason[0].lower()}{reason[1:]}"
    *section, key = location
    known = KINDS[kind].model_fields if kind is not None else _keys(section)
    return f"unknown key {where!r}{_elsewhere(str(key)) or nearest(str(key), known)}"


def _elsewhere(key: str) -> str:
    """Return a hint at the sections that have a key of this name, if there are any."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    having = [name for name, section in sections.items() if key in getattr(section, "model_fields", ())]
    kinds = [f"stages.<{kind}>" for kind, section in KINDS.items() if key in section.model_fields]
    having += ["stages.<name>"] if len(kinds) == len(KINDS) else kinds
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
