"""What a recipe will compute and need, before anything is trained; counted by :mod:`colada.train.cost`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from colada.device import memory_of
from colada.errors import ColadaError
from colada.locate import DECODER_DIR, IMAGE_DIR, locate
from colada.models.base import ARCHITECTURES
from colada.models.load import KINDS, read_decoder_config
from colada.networks.checkpoint import read_configs
from colada.networks.config import DecoderConfig, DiTConfig, NetworkConfig, TextVAEConfig, matched_config
from colada.pictures.codec import codec_parameters, read_codec_config
from colada.pictures.config import CodecConfig
from colada.train.cost import Phase, Placement, parameter_counts, scaled
from colada.train.environment import ranks_here
from colada.train.kinds import DecoderSection, StageSection
from colada.train.lineage import check_order
from colada.train.parallel import Ranks
from colada.train.recipe import Recipe, vocab_size
from colada.train.stages import stage_class

CARD_BYTES, CARD_FLOPS, CARD_MFU = 80e9, 989e12, 0.4
"""Memory and bfloat16 peak of one H100, and the share of it that is assumed: a guess until it is measured."""

_SHAPE = ("dim", "num_layers", "num_heads", "ffn_dim")
"""Keys of ``model.decoder`` that decide a baseline's parameters."""


@dataclass(frozen=True)
class Cost:
    """What a run costs, everything counted, so that "matched" can be checked.

    Everything: the Text VAE with its embeddings, its stage with the masked stream, both copies of a prior's
    row, the frozen or the reference encoder, heads. Beside it the narrow count, 6 N D. Papers compare by such
    a number; that of Cola DLM does not say which it used.

    Attributes:
        arch: "cola", "ar" or "llada".
        parameters: of each network.
        flops: useful ones of the whole run, by phase and part.
        tokens: of all stages.
        narrow_flops: 6 N D, see :class:`colada.train.cost.Phase`.
    """

    arch: str
    parameters: Mapping[str, int]
    flops: Mapping[str, float]
    tokens: int
    narrow_flops: float

    @property
    def total_parameters(self) -> int:
        """Of all networks."""
        return sum(self.parameters.values())

    @property
    def total_flops(self) -> float:
        """Of all stages."""
        return sum(self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "parameters": _with_total(self.parameters), "flops": _with_total(self.flops)}


@dataclass(frozen=True)
class Plan:
    """What a run will compute and need; nothing is allocated.

    Attributes:
        cost: of all steps.
        phases: in order. Joint and frozen steps that take turns are two; the memory of the joint one counts.
        ranks: that it is on.
    """

    cost: Cost
    phases: tuple[Phase, ...]
    ranks: int = 1

    @classmethod
    def of(cls, arch: str, parameters: Mapping[str, int], phases: Sequence[Phase], ranks: int) -> Plan:
        """Add up phases."""
        flops = {
            f"{phase.name}: {part}": phase.steps * value
            for phase in phases
            for part, value in phase.flops.items()
        }
        tokens = sum(phase.steps * phase.tokens for phase in phases)
        narrow = sum(phase.steps * phase.narrow_flops for phase in phases)
        return cls(Cost(arch, parameters, flops, tokens, narrow), tuple(phases), ranks)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values: counts, FLOPs, and bytes of memory."""
        phases = [
            {
                "name": phase.name,
                "steps": phase.steps,
                "work": dict(phase.work),
                "placement": asdict(phase.placement),
                "tokens_per_step": phase.tokens,
                "flops_per_step": _with_total(phase.flops),
                "memory_per_rank": _with_total(phase.memory),
                "tokens": phase.steps * phase.tokens,
                "flops": phase.steps * sum(phase.flops.values()),
            }
            for phase in self.phases
        ]
        parameters, flops = _with_total(self.cost.parameters), self.cost.total_flops
        return {"parameters": parameters, "phases": phases, "tokens": self.cost.tokens, "flops": flops}

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan as names, indented by level, and readable values."""
        values = self.to_dict()
        lines = _listed("parameters", values["parameters"], "", 0)
        for phase in values["phases"]:
            lines.append((phase["name"], f"{phase['steps']:,} steps"))
            lines.append(("  tokens per step", f"{phase['tokens_per_step']:,}"))
            lines += _listed("FLOPs per step", phase["flops_per_step"], "FLOP", 1)
            lines += _listed("memory per rank", phase["memory_per_rank"], "B", 1)
            lines.append(("  tokens", scaled(phase["tokens"])))
            lines.append(("  FLOPs", scaled(phase["flops"], "FLOP")))
        lines += [("tokens", scaled(values["tokens"])), ("FLOPs", scaled(values["flops"], "FLOP"))]
        return [*lines, self._on_a_card()]

    def _on_a_card(self) -> tuple[str, str]:
        """Return whether a GPU of 80 GB for each rank holds it, and how long it would take there."""
        most = max((sum(phase.memory.values()) for phase in self.phases), default=0.0)
        hours = self.cost.total_flops / (self.ranks * CARD_MFU * CARD_FLOPS) / 3600
        held = "fits" if most < CARD_BYTES else f"{most / CARD_BYTES:.1f} times its memory"
        cards = "one 80 GB H100" if self.ranks == 1 else f"{self.ranks:,} 80 GB H100s"
        return f"{cards} at {CARD_MFU:.0%} MFU", f"{held}, {hours:,.2g} h"


def _with_total(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {**parts, "total": sum(parts.values())}


def _listed(
    name: str, parts: dict[str, Any], unit: Literal["", "FLOP", "B"], level: int
) -> list[tuple[str, str]]:
    """The total, and the parts below it."""
    indent = "  " * level
    below = [(f"{indent}  {part}", scaled(value, unit)) for part, value in parts.items() if part != "total"]
    return [(indent + name, scaled(parts["total"], unit)), *below]


# --- from a recipe -----------------------------------------------------------------------------


def plan_run(recipe: Recipe, ranks: int = 1) -> Plan:
    """Return the plan of a run on so many ranks.

    Raises:
        ColadaError: for settings that do not fit each other, or a model to continue from that is not there.
    """
    recipe = resolve(recipe)
    arch = recipe.model.arch
    KINDS[arch].check(recipe.own_generation, "recipe: generation")
    configs = configs_of(recipe)
    if arch == "cola":
        vae, dit = configs["vae"], configs["dit"]
        assert isinstance(vae, TextVAEConfig)
        assert isinstance(dit, DiTConfig)
        check_order(recipe, dit)
        parameters = parameter_counts(vae, dit)
        image = configs.get("image")
        if isinstance(image, CodecConfig) and image.kind == "conv_vae":
            parameters["picture codec"] = codec_parameters(image)
    else:
        assert isinstance(configs["decoder"], DecoderConfig)
        parameters = {"decoder": configs["decoder"].parameters}
    return Plan.of(arch, parameters, _phases(recipe, recipe.trained, configs, ranks), ranks)


def _phases(
    recipe: Recipe, stages: Mapping[str, StageSection], configs: Mapping[str, NetworkConfig], ranks: int
) -> list[Phase]:
    phases = []
    for name, section in stages.items():
        placement = Placement(
            micro_batch=section.micro_batch or max(1, section.batch // ranks),
            shards=max(1, ranks // recipe.run.replicas) if recipe.run.shard else 1,
            checkpointing=recipe.run.checkpoint_activations,
            bfloat16=recipe.run.precision == "bfloat16",
            muon=section.optimiser == "muon",
            ema=section.ema > 0,
            train=getattr(section, "train", "all"),
            rank=getattr(section, "rank", 0),
        )
        phases += stage_class(section).phases(recipe, name, section, configs, placement)
    return [phase for phase in phases if phase.steps]


def planned(recipe: Recipe, plan: Plan, ranks: Ranks, out: Path) -> list[str]:
    """Return what is going to be trained, on what, and for how long, in lines of a terminal's width."""
    where = str(ranks.device)
    if ranks.device.type == "cuda":
        where = torch.cuda.get_device_name(ranks.device)
    elif ranks.device.type == "cpu":
        threads = torch.get_num_threads()
        where = f"cpu with {threads} thread{'s' if threads > 1 else ''}"
    if ranks.size > 1:
        where += f", {ranks.size} ranks"
    parts = " + ".join(f"{name} {scaled(number)}" for name, number in plan.cost.parameters.items())
    steps = " + ".join(f"{phase.steps:,}" for phase in plan.phases) or "0"
    return [
        f"training {ARCHITECTURES[recipe.model.arch]} in {out}: {parts} parameters",
        f"on {where}, {recipe.run.precision}; {steps} steps, {scaled(plan.cost.tokens)} tokens",
    ]


def check_memory(plan: Plan, device: torch.device) -> None:
    """Raise ColadaError if a rank needs more memory than its device has."""
    memory = memory_of(device)
    ranks = ranks_here() if device.type == "cpu" else 1
    for phase in plan.phases:
        needed = ranks * sum(phase.memory.values())
        if memory is not None and needed > memory:
            raise ColadaError(
                f"{phase.name} would take about {scaled(needed, 'B')} of memory, but {device} has "
                f"{scaled(memory, 'B')}: expected a smaller batch or micro_batch, length, vocabulary or model"
            )


def resolve(recipe: Recipe) -> Recipe:
    """Return a recipe in which a baseline's stage has what follows from Cola DLM's filled in.

    What it leaves out of rows and optimiser is as in the last of Cola DLM's stages; without a stage for it,
    there is one named "decoder". Without a shape in ``model.decoder`` (and without ``model.init``) a baseline
    has as many parameters as Text VAE and DiT together, and first weights of spread dim^-1/2; without steps,
    as many as take the FLOPs of Cola DLM's stages, everything counted.

    Raises:
        ColadaError: for settings that do not fit each other.
    """
    if recipe.model.arch == "cola":
        return recipe
    cola = recipe.stages_of("cola")
    if not recipe.trained:
        recipe = _with_stages(recipe, {"decoder": DecoderSection()})
    if cola:
        *_, last = cola.values()
        common = StageSection.model_fields.keys() - {"kind", "steps"}
        for name, section in recipe.trained.items():
            same = {key: getattr(last, key) for key in common - section.model_fields_set}
            recipe = _with_stages(recipe, {name: section.model_copy(update=same)})
    if recipe.model.init is None and not set(_SHAPE) & recipe.model.decoder.keys():
        total = sum(parameter_counts(*_cola_configs(recipe)).values())
        config = matched_config(total, vocab_size(recipe), objective=recipe.model.arch)
        decoder = {name: getattr(config, name) for name in _SHAPE}
        decoder["init_std"] = round(config.dim**-0.5, 4)  # 0.02 at the width it is usual for
        decoder |= recipe.model.decoder
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"decoder": decoder})})
    for name, section in recipe.trained.items():
        update: dict[str, Any] = {}
        assert isinstance(section, DecoderSection)
        if recipe.model.arch == "llada" and section.llada_lr is not None:
            update = {"lr": section.llada_lr, "llada_lr": None}
        if section.steps == 0:
            update["steps"] = _matched_steps(recipe, name)
        recipe = _with_stages(recipe, {name: section.model_copy(update=update)})
    return recipe


def _with_stages(recipe: Recipe, stages: Mapping[str, StageSection]) -> Recipe:
    return recipe.model_copy(update={"stages": {**recipe.stages, **stages}})


def _matched_steps(recipe: Recipe, name: str) -> int:
    """Return how many steps of a baseline's stage take the FLOPs of Cola DLM's stages."""
    if recipe.model.init is not None:
        raise ColadaError(f"recipe: stages.{name}.steps=0 with model.init, expected a number of steps")
    vae, dit = _cola_configs(recipe)
    cola = _phases(recipe, recipe.stages_of("cola"), {"vae": vae, "dit": dit}, 1)
    cola_flops = sum(phase.steps * sum(phase.flops.values()) for phase in cola)
    if cola_flops == 0:
        raise ColadaError(f"recipe: stages.{name}.steps=0 with no steps of Cola DLM's stages to match")
    one = {name: recipe.stages[name].model_copy(update={"steps": 1})}
    (phase,) = _phases(_with_stages(recipe, one), one, configs_of(recipe), 1)
    return max(1, round(cola_flops / sum(phase.flops.values())))


def configs_of(recipe: Recipe) -> dict[str, NetworkConfig]:
    """Return the configuration of each network of a resolved recipe, without its data.

    Raises:
        ColadaError: for settings that do not fit each other, or a model to continue from that is not there.
    """
    init = recipe.model.init
    if recipe.model.arch == "cola":
        if init is None:
            vae, dit = _cola_configs(recipe)
        else:
            vae, dit = read_configs(locate(init))
            of_model = recipe.tokenizer.file is None
            dit = recipe.check_configs(vae, dit, vae.vocab_size if of_model else vocab_size(recipe))
        image = recipe.image_config(vae)
        if init is not None and (locate(init) / IMAGE_DIR).is_dir():
            image = read_codec_config(locate(init))
        return {"vae": vae, "dit": dit} | ({} if image is None else {"image": image})
    if init is None:
        return {"decoder": recipe.decoder_config(vocab_size(recipe), bos_id=0)}  # Which id changes no size.
    directory = locate(init)
    if not (directory / DECODER_DIR).is_dir():
        raise ColadaError(f"model.init={init} is no baseline, expected one for arch={recipe.model.arch!r}")
    return {"decoder": read_decoder_config(directory)}


def _cola_configs(recipe: Recipe) -> tuple[TextVAEConfig, DiTConfig]:
    size = vocab_size(recipe)
    return recipe.configs(size, pad_id=size - 1)  # Which id it is changes no size.
