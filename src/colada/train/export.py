"""Networks of a run to a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from colada.errors import ColadaError
from colada.files import read_text
from colada.locate import CHAT_TEMPLATE_FILE, TOKENIZER_FILE
from colada.models.base import LanguageModel
from colada.models.load import load
from colada.networks.checkpoint import check_replaceable
from colada.pictures.config import CodecConfig
from colada.text.tokenizer import Tokenizer
from colada.train.checkpoints import RECIPE, disk_errors, read_state, read_tensors
from colada.train.cola import ColaSystem, codec_of
from colada.train.decoder import DecoderSystem
from colada.train.recipe import Recipe, load_recipe
from colada.train.sections import ModelSection
from colada.train.stages import System, frozen_in, stage_class

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
        int8 = recipe.run.save_dtype == "int8"
        (model if int8 else model.to(dtype=DTYPES[recipe.run.save_dtype])).save(directory, int8)


def _row_length(recipe: Recipe) -> int:
    sections = list(recipe.trained.values())
    return ([section for section in sections if section.steps] or sections)[-1].length


def export(checkpoint: Path, directory: Path) -> str:
    """Write a checkpoint as a model directory: averaged weights where the run has them.

    Returns: what was written, in words.

    Raises:
        ColadaError: if the checkpoint is incomplete or damaged, or the model cannot be written.
    """
    state, recipe = read_state(checkpoint), load_recipe(checkpoint / RECIPE)
    check_replaceable(directory)
    if state["stage"] not in recipe.trained:
        raise ColadaError(f"{checkpoint} is damaged: its recipe has no stage {state['stage']!r}")
    tokenizer = Tokenizer.from_file(checkpoint / TOKENIZER_FILE)
    start, section = None, recipe.trained[state["stage"]]
    learnt, frozen = stage_class(section).learns, frozen_in(recipe, state["stage"])
    names = ("vae", "dit", "image", "decoder")
    configs = {name: state[name] for name in names if isinstance(state.get(name), dict)}
    begun = sorted(configs.keys() - {*learnt, *frozen})  # They are not in the checkpoint.
    if recipe.model.init is not None and begun:
        start = load(recipe.model.init)
    else:  # What was trained, whatever the recipe says now.
        model = ModelSection(arch=recipe.model.arch, **configs)
        recipe = recipe.model_copy(update={"model": model})
    system = system_of(recipe, tokenizer, start)
    if "image" in configs:  # With the words that it has learnt.
        codec_of(system).config = CodecConfig.from_dict(configs["image"])
    for name in begun:
        system.ready(name, nn.ModuleDict)
    states = {name: network.state_dict() for name, network in system.networks.items()}
    tensors: dict[str, Any] = {name: states[name] for name in frozen}
    if section.ema:
        tensors["average"] = {
            f"module.{name}.{key}": value for name in learnt for key, value in states[name].items()
        }
    else:
        tensors |= {name: states[name] for name in learnt}
    read_tensors(checkpoint, tensors)  # In place.
    template = checkpoint / CHAT_TEMPLATE_FILE
    text = read_text(template) if template.is_file() else None
    parts = {"tokenizer": tokenizer, "generation": state["generation"], "chat_template": text}
    write_model(system.model(system.networks, **parts), recipe, directory)
    rest = "".join(f", the {'DiT' if name == 'dit' else name} as it began" for name in begun)
    return f"stage {state['stage']}, step {state['step']}{rest}"
