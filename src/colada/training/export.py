"""Networks of a run to a model in the released format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from colada.checkpoint import CHAT_TEMPLATE_FILE, TOKENIZER_FILE
from colada.config import DiTConfig, TextVAEConfig
from colada.dit import DiT
from colada.model import ColaDLM, load
from colada.tokenizer import Tokenizer
from colada.training.checkpoints import RECIPE, disk_errors, read_state, read_tensors
from colada.training.recipe import load_recipe
from colada.training.stages import initialise
from colada.vae import TextVAE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_model(
    vae: TextVAE,
    dit: DiT,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    generation: dict[str, Any],
    template: str | None,
    directory: Path,
) -> None:
    """Write networks, which are cast to ``dtype``, as a model directory.

    Raises:
        ColadaError: if it cannot be written.
    """
    model = ColaDLM(vae.to(dtype), dit.to(dtype), tokenizer, generation=generation, chat_template=template)
    with disk_errors(directory):
        model.save(directory)


def export(checkpoint: Path, directory: Path) -> str:
    """Write a checkpoint as a model directory: averaged weights where the run has them.

    Returns: what was written, in words.

    Raises:
        ColadaError: if the checkpoint is incomplete or damaged, or the model cannot be written.
    """
    state, recipe = read_state(checkpoint), load_recipe(checkpoint / RECIPE)
    tokenizer = Tokenizer.from_file(checkpoint / TOKENIZER_FILE)
    vae = TextVAE(TextVAEConfig.from_dict(state["vae"], f"{checkpoint}: vae"))
    dit = DiT(DiTConfig.from_dict(state["dit"], f"{checkpoint}: dit"))
    networks: dict[str, nn.Module] = {"vae": vae, "dit": dit}
    stage, learning = state["stage"], ["vae"]
    words = f"stage {stage}, step {state['step']}"
    if stage == 1:
        del networks["dit"]
        words += ", the DiT as it began"
        if recipe.model.init is None:
            initialise(recipe.seed, vae, dit)
        else:
            dit = load(recipe.model.init).dit
    else:
        learning = ["dit"] if recipe.stage2.vae == "frozen" else ["dit", "vae"]
    tensors: dict[str, Any] = {}
    for name, network in networks.items():
        if recipe.stage(stage).ema and name in learning:
            averaged = {f"module.{name}.{key}": value for key, value in network.state_dict().items()}
            tensors["average"] = tensors.get("average", {}) | averaged
        else:
            tensors[name] = network.state_dict()
    read_tensors(checkpoint, tensors)  # In place.
    template = checkpoint / CHAT_TEMPLATE_FILE
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    dtype = DTYPES[recipe.run.save_dtype]
    write_model(vae, dit, dtype, tokenizer, state["generation"], text, directory)
    return words
