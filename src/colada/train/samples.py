"""Samples of a run: what its networks write at the moment."""

from __future__ import annotations

import torch

from colada.models.base import LanguageModel
from colada.text.transcript import GenerationError
from colada.train.recipe import Recipe


def samples(recipe: Recipe, model: LanguageModel) -> dict[str, str]:
    """Return what a model makes of each of the run's prompts, or why it makes nothing of it."""
    try:
        return _continued(recipe, model)
    # Whatever a sample cannot do (memory, weights that do not write yet), training can go on.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return dict.fromkeys(recipe.run.sample_prompts, f" [no sample: {reason}]")


def _continued(recipe: Recipe, model: LanguageModel) -> dict[str, str]:
    run = recipe.run
    asked = prompts = list(run.sample_prompts)
    if recipe.data.chats:
        asked = [model.chat_prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    with torch.compiler.set_stance("force_eager"):  # shapes keep changing
        try:
            done = model.generate(asked, run.sample_tokens, seed=recipe.seed)
        except GenerationError as error:
            return {
                prompt: own.text if own is not None else f" [no sample: {error.errors[number]}]"
                for number, (prompt, own) in enumerate(zip(prompts, error.completions, strict=True))
            }
    return {prompt: own.text for prompt, own in zip(prompts, done, strict=True)}
