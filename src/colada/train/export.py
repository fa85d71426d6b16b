"""Networks of a run to a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from colada.files import read_text
from colada.locate import CHAT_TEMPLATE_FILE, TOKENIZER_FILE
from colada.models.base import LanguageModel
from colada.models.cola import load
from colada.networks.checkpoint import check_replaceable
from colada.text.tokenizer import Tokenizer
from colada.train.checkpoints import RECIPE, disk_errors, read_state, read_tensors
from colada.train.cola import ColaSystem
from colada.train.decoder import DecoderSystem
from colada.train.recipe import Recipe, load_recipe
from colada.train.sections import ModelSection
from colada.train.stages import System

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def system_of(
    recipe: Recipe, tokenizer: Tokenizer, start: LanguageModel | None = None, whole: bool = True
) -> System:
    """Return what the recipe's architecture brings to a run.

    Args:
        start: a model to continue from.
        whole: see :class:`System`.
    """
    kind = ColaSystem if recipe.model.arch == "cola" else DecoderSystem
    return kind(recipe, tokenizer, start, whole)


def write_model(model: LanguageModel, recipe: Recipe, directory: Path) -> None:
    """Write a model, which is cast to the type that its recipe says, as a model directory.

    Raises:
        ColadaError: if it cannot be written.
    """
    with disk_errors(directory):
        model.training_length = _row_length(recipe)
        model.to(dtype=DTYPES[recipe.run.save_dtype]).save(directory)


def _row_length(recipe: Recipe) -> int:
    if recipe.model.arch != "cola":
        return recipe.baseline.length
    return (recipe.stage2 if recipe.stage2.steps else recipe.stage1).length


def export(checkpoint: Path, directory: Path) -> str:
    """Write a checkpoint as a model directory: averaged weights where the run has them.

    Returns: what was written, in words.

    Raises:
        ColadaError: if the checkpoint is incomplete or damaged, or the model cannot be written.
    """
    state, recipe = read_state(checkpoint), load_recipe(checkpoint / RECIPE)
    check_replaceable(directory)
    tokenizer = Tokenizer.from_file(checkpoint / TOKENIZER_FILE)
    start = None
    if recipe.model.init is not None:
        if recipe.model.arch == "cola" and state["stage"] == 1:
            start = load(recipe.model.init)  # The DiT as it began is not in the checkpoint.
        else:
            configs = {name: state[name] for name in ("vae", "dit", "decoder") if name in state}
            model = ModelSection(arch=recipe.model.arch, **configs)
            recipe = recipe.model_copy(update={"model": model})
    system = system_of(recipe, tokenizer, start)
    stage = system.stage(state["stage"], nn.ModuleDict)
    tensors: dict[str, Any] = {}
    for name, network in stage.networks.items():
        if stage.section.ema:
            averaged = {f"module.{name}.{key}": value for key, value in network.state_dict().items()}
            tensors["average"] = tensors.get("average", {}) | averaged
        else:
            tensors[name] = network.state_dict()
    for name in stage.resting.keys() & system.networks.keys():
        tensors[name] = stage.resting[name].state_dict()
    read_tensors(checkpoint, tensors)  # In place.
    template = checkpoint / CHAT_TEMPLATE_FILE
    text = read_text(template) if template.is_file() else None
    parts = {"tokenizer": tokenizer, "generation": state["generation"], "chat_template": text}
    write_model(system.model(system.networks, **parts), recipe, directory)
    begun = system.networks.keys() - stage.networks.keys() - stage.resting.keys()
    rest = "".join(f", the {'DiT' if name == 'dit' else name} as it began" for name in sorted(begun))
    return f"stage {state['stage']}, step {state['step']}{rest}"
