"""The recipe: one typed YAML file that says all a training run depends on.

Every key has a default and a description here, from which ``recipes/reference.yaml`` and the recipe saved
with a run are written. A key that does not exist is refused with the nearest name that does.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from colada.baselines.config import DecoderConfig
from colada.checkpoint import check_pair
from colada.config import DiTConfig, TextVAEConfig
from colada.data.sources import Section, Source
from colada.errors import ColadaError, nearest
from colada.files import dump_yaml, parse_yaml, read_yaml, write_text
from colada.flow import TimestepLaw, calibrated_loc
from colada.objectives import FlowSettings, JointWeights, VAEWeights


class DataSection(Section):
    """Where the text is and how it becomes rows."""

    sources: tuple[Source, ...] = Field(
        (Source(path="data"),),
        min_length=1,
        description="Where the text is; several are mixed by weight.",
    )
    validation_share: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="Share of samples never trained on, where a source has no split.",
    )
    packing: Literal["stream", "samples"] = Field(
        "stream",
        description="stream: rows are cut from all text end to end and see across end-of-text tokens;"
        " samples: whole documents or conversations, padded to whole blocks, which never see each other.",
    )
    align: float = Field(
        0.5, ge=0, le=1, description="Share of stream rows moved to begin with a document's first token."
    )
    chat_template: str | None = Field(
        None, description="Jinja file for conversations; unset: ChatML, or that of model.init."
    )
    cache: str | None = Field(
        None,
        description="Directory of token shards, reusable by other runs; unset: shards/ of the run.",
    )
    workers: int | None = Field(None, ge=1, description="Processes that tokenise; unset: one a CPU core.")

    @model_validator(mode="after")
    def _whole_samples(self) -> DataSection:
        for source in self.sources:
            if source.format != "text" and self.packing != "samples":
                what = f"format={source.format!r} of {source.name}"
                raise ValueError(f"packing={self.packing!r} with {what}, expected 'samples'")
        return self

    @property
    def chats(self) -> bool:
        """Whether there are conversations."""
        return any(source.format == "messages" for source in self.sources)


class TokenizerSection(Section):
    """A byte-level BPE trained on the run's own text, or the ``file`` of another."""

    vocab_size: int = Field(
        8192,
        ge=260,
        description="Entries: 256 bytes, 4 special tokens, merges; not looked at with file or model.init.",
    )
    file: str | None = Field(
        None, description="A tokenizer.json to use; unset: train one, or that of model.init."
    )


class ModelSection(Section):
    """What is trained: a model to continue from, or the configurations of a new one."""

    arch: Literal["cola", "ar", "llada"] = Field(
        "cola", description="Cola DLM, or a baseline: an autoregressive decoder, or LLaDA."
    )
    init: str | None = Field(
        None, description="Directory or hub id of a model to continue from, in the released format."
    )
    vae: dict[str, Any] = Field({}, description="Keys of cola_vae/config.json; the vocabulary is filled in.")
    dit: dict[str, Any] = Field({}, description="Keys of cola_dit/config.json; the channels are filled in.")
    decoder: dict[str, Any] = Field(
        {},
        description="Baselines: keys of decoder/config.json; without dim, num_layers, num_heads and ffn_dim,"
        " as many parameters as vae and dit together.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if self.init is not None and (self.vae or self.dit or self.decoder):
            raise ValueError("init gives the configurations: expected no vae, dit and decoder keys beside it")
        return self


class OptimiserSection(Section):
    """Length of a stage, its rows, and its optimiser."""

    steps: int = Field(1000, ge=0, description="Optimiser steps; 0 leaves the stage out.")
    batch: int = Field(32, ge=1, description="Rows per step, over all ranks.")
    micro_batch: int | None = Field(
        None, ge=1, description="Rows per pass on each rank; gradients are accumulated. Unset: all at once."
    )
    length: int = Field(
        128, ge=1, description="Tokens per row; for Cola DLM a multiple of patch_size * block_size."
    )
    optimiser: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon orthogonalises the updates of the blocks' matrices (AdamW for the rest),"
        " scaled to AdamW's size, so that both share one learning rate.",
    )
    lr: float = Field(1e-3, gt=0, description="Highest learning rate, after the warm-up.")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="After the warm-up: half a cosine down; wsd: constant, then linear down."
    )
    final_lr: float = Field(0.05, ge=0, le=1, description="Share of lr that is left at the last step.")
    warmup: int = Field(100, ge=0, description="Steps over which the learning rate rises.")
    decay: float = Field(0.2, gt=0, le=1, description="Share of the steps in which wsd goes down.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates.")
    weight_decay: float = Field(0.01, ge=0, description="On matrices only.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of the averaged weights, which are the ones saved; 0: none."
    )


class Stage1Section(OptimiserSection):
    """The Text VAE alone: -log p(x|z0) + beta KL + lambda_mask L_mask."""

    beta: float = Field(1e-3, ge=0, description="Weight of KL(q || N(0, I)); in joint training, of E log q.")
    mask: float = Field(0.5, ge=0, description="lambda_mask, in joint training too.")
    mask_ratio: float = Field(
        0.15, ge=0, lt=1, description="Share of the encoder's input tokens masked there."
    )
    log_snr: float | None = Field(None, description="Fix log(E mu^2 / E sigma^2); unset: learnt.")


class Stage2Section(OptimiserSection):
    """The DiT, with the Text VAE frozen or trained along."""

    vae: Literal["frozen", "joint", "interval"] = Field(
        "frozen", description="Whether the Text VAE learns too: never, always, or in intervals."
    )
    interval: tuple[int, int] = Field(
        (100, 900), description="vae: interval: so many steps joint, so many frozen, and again."
    )
    vae_lr: float = Field(1.0, ge=0, description="The Text VAE's learning rate, as a factor on lr.")
    copies: int = Field(1, ge=1, description="Noisy copies of each row, which share one clean copy.")
    loc: float | None = Field(
        None,
        description="Centre of the timestep law t = T sigmoid(n), n ~ N(loc, scale^2); unset: by width.",
    )
    scale: float = Field(1.0, gt=0, description="Spread of the timestep law.")
    timestep_per: Literal["block", "row"] = Field("block", description="What draws a timestep of its own.")
    prefix_share: float = Field(
        0.05, ge=0, le=1, description="Share of blocks with a clean prefix inside, as at the end of a prompt."
    )
    lambda_vae: float = Field(1.0, ge=0, description="Joint: weight of the Text VAE's terms.")
    lambda_fm: float = Field(1.0, ge=0, description="Joint: weight of the flow.")
    lambda_ref: float = Field(0.1, ge=0, description="Joint: weight of KL(q || q of stage 1).")

    @model_validator(mode="after")
    def _interval(self) -> Stage2Section:
        if min(self.interval) < 1:
            raise ValueError(f"interval={list(self.interval)}, expected two numbers of steps of at least 1")
        return self

    def joint_at(self, step: int) -> bool:
        """Return whether the Text VAE learns in a step."""
        return self.vae == "joint" or (
            self.vae == "interval" and step % sum(self.interval) < self.interval[0]
        )


class BaselineSection(OptimiserSection):
    """A baseline's only stage: model.arch ar or llada, on the same data. Keys left out are as in stage2."""

    steps: int = Field(
        0, ge=0, description="Optimiser steps; 0: as many as take the FLOPs of stage1 and stage2."
    )
    llada_lr: float | None = Field(
        None, gt=0, description="llada: highest learning rate, if it wants another than lr."
    )
    generation: dict[str, Any] = Field(
        {}, description="Settings stored with the baseline, in place of those under generation."
    )
    random_length: float = Field(0.01, ge=0, le=1, description="llada: share of rows cut to a random length.")


class RunSection(Section):
    """How often things happen, in steps (0: never), and on what and how the run computes."""

    log_every: int = Field(20, ge=1, description="Steps between lines of metrics.jsonl.")
    validate_every: int = Field(500, ge=0, description="Steps between validations.")
    validation_rows: int = Field(64, ge=1, description="Rows of a validation, the same every time.")
    save_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep_last: int = Field(2, ge=1, description="Checkpoints kept.")
    keep_every: int = Field(0, ge=0, description="Checkpoints at multiples of so many steps are kept too.")
    sample_every: int = Field(1000, ge=0, description="Steps between samples, in the last stage.")
    sample_prompts: tuple[str, ...] = Field(
        ("Once upon a time",), description="What samples continue, or answer where there are conversations."
    )
    sample_tokens: int = Field(48, ge=1, description="New tokens of a sample.")
    max_skipped: int = Field(
        10,
        ge=0,
        description="Steps with a non-finite loss or gradient are skipped; more of them end the run.",
    )
    monitors: tuple[str, ...] = Field(
        (), description="Besides metrics.jsonl: tensorboard, or package.module:Class of your own."
    )
    report: bool = Field(True, description="Write report/report.html with plots at the end.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of matrix products; weights, optimiser and latents stay float32."
    )
    save_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the saved model.")
    compile: bool = Field(False, description="torch.compile each transformer block of the DiT or decoder.")
    checkpoint_activations: bool = Field(
        False,
        description="Compute blocks of the DiT or decoder again in the backward pass.",
    )
    device: str = Field("auto", description="cpu, cuda, or auto: cuda where there is one.")
    shard: bool = Field(
        True, description="Several ranks: shard weights, gradients and optimiser over them (FSDP2)."
    )
    replicas: int = Field(
        1, ge=1, description="Hybrid sharding: so many groups of ranks, each holding the model once."
    )


class Recipe(Section):
    """A whole training run."""

    seed: int = Field(0, ge=0, description="Decides weights, rows, noise and timesteps.")
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
        vae_keys = {"vocab_size": vocab_size, "pad_token_id": pad_id, **self.model.vae}
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
        return FlowSettings(law, s.timestep_per == "block", s.copies, s.prefix_share)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with ``section.key=value`` overrides (values in YAML; ``sources.0.path`` for lists).

    Raises:
        ColadaError: one line naming the file and the key, for anything that is not a recipe.
    """
    values = read_yaml(path)
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
        return [f"{indent}{name}:", *(f"{indent}  {line}" for line in dump_yaml(value).splitlines())]
    # As an item of a list: a value alone would be followed by an end-of-document mark.
    return [f"{indent}{name}: {dump_yaml([value], flow=True).strip()[1:-1]}"]


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


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ColadaError(f"override {override!r}, expected section.key=value")
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
    value = parse_yaml(text, f"override {override!r}")
    if isinstance(where, list):
        _item(where, last, override)
        where[int(last)] = value
    else:
        where[last] = value


def _item(items: list[Any], number: str, override: str) -> Any:
    if not number.isdecimal() or int(number) >= len(items):
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
    return f"unknown key {where!r}{nearest(str(problem['loc'][-1]), _keys(problem['loc'][:-1]))}"


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
