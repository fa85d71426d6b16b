"""What is seen of a run while it trains: its speed, what its networks write, and a wish that it stops."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from colada.errors import ColadaError
from colada.models.base import LanguageModel
from colada.models.cola_pictures import PictureModel
from colada.pictures.reader import judge
from colada.pictures.shapes import Picture, parse
from colada.pictures.show import png, sheet
from colada.text.transcript import GenerationError
from colada.train.pairs import open_pairs
from colada.train.parallel import Ranks
from colada.train.peak import mfu, peak_flops
from colada.train.recipe import Recipe

DRAWN, DRAWN_IN_A_ROW = 16, 8
"""Drawings of a sheet through training."""


class Meter:
    """Tokens per second, MFU and memory since the last reading.

    Args:
        precision: of the matrix products.
    """

    def __init__(self, ranks: Ranks, precision: torch.dtype) -> None:
        self._ranks = ranks
        self._peak, _ = peak_flops(ranks.device, precision)
        self.restart()

    def restart(self) -> None:
        """Begin to measure anew."""
        self._begin, self._tokens, self._flops = time.perf_counter(), 0, 0.0

    def count(self, tokens: int, flops: float) -> None:
        """Add a step: its tokens and useful FLOPs, over all ranks."""
        self._tokens += tokens
        self._flops += flops

    def read(self) -> dict[str, float]:
        """Return tokens/s over all ranks, MFU, and this rank's largest memory in GB; measure anew."""
        seconds = max(1e-9, time.perf_counter() - self._begin)
        device = self._ranks.device
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory *= 1 if sys.platform == "darwin" else 1024
        values = {
            "tokens_per_s": self._tokens / seconds,
            "mfu": mfu(self._flops, seconds, self._peak, self._ranks.size),
            "memory_gb": memory / 1e9,
        }
        self.restart()
        return values


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
    answers = any(source.format == "preferences" for source in recipe.data.sources)
    if recipe.data.chats or (answers and model.chat_template is not None):
        asked = [model.chat_prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    with torch.compiler.set_stance("force_eager"):  # shapes keep changing
        try:
            done = model.generate(asked, run.sample_tokens, seed=recipe.seed)
        except GenerationError as error:
            return {
                prompt: completion.text if completion is not None else f" [no sample: {error.errors[number]}]"
                for number, (prompt, completion) in enumerate(zip(prompts, error.completions, strict=True))
            }
    return {prompt: completion.text for prompt, completion in zip(prompts, done, strict=True)}


def drawings(recipe: Recipe, model: LanguageModel) -> tuple[bytes, dict[str, str]] | None:
    """Return a PNG of what a model draws of the first validation captions, and what is said of each drawing.

    That is what :mod:`colada.pictures.reader` reads, of captions that it knows. None for a model, or data,
    without pictures.
    """
    splits = open_pairs(recipe)
    if splits is None or not isinstance(model, PictureModel) or model.image is None:
        return None
    captions = [pair.caption for pair in (splits.validation or splits.training).pairs(DRAWN)]
    try:
        with torch.compiler.set_stance("force_eager"):
            pictures = model.draw(captions, seed=recipe.seed)
    except Exception as error:  # As with texts.
        reason = " ".join(str(error).split()) or type(error).__name__
        return None if not captions else (b"", dict.fromkeys(captions, f"no drawing: {reason}"))
    verdicts = {
        f"{number}: {caption}": verdict(picture, caption)
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True), start=1)
    }
    return png(sheet(pictures, DRAWN_IN_A_ROW), 3), verdicts


def verdict(picture: Picture, caption: str) -> str:
    """Return what is wrong with a picture, in words, or that it is right; nothing if no scene is meant."""
    try:
        wrong = judge(picture, parse(caption)).reasons
    except ColadaError:
        return ""
    return ", ".join(wrong) or "right"


@contextmanager
def graceful_stop(ask: Callable[[], None]) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a call."""
    old = {which: signal.signal(which, lambda *_: ask()) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for which, handler in old.items():
            signal.signal(which, handler)
