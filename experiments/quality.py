"""How good small story models are, by cheap judges: trigrams, pronouns, guesses at each noise level."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from colada.data.rows import StreamRows, batch
from colada.evaluate.variety import distinct, known, ngrams, repeated
from colada.flow import T, interpolate, rms
from colada.models.cola import ColaDLM
from colada.train.distillation import Guided
from colada.train.flow_matching import guess_of_z0, predict
from colada.train.kinds import FlowTerms
from colada.train.losses import (
    draw,
    encode,
    prior_loss,
    readable,
    reconstruction,
    rows_layout,
)
from colada.train.noise import draw_noise, sample_of_latents

LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Noise levels a = t / T at which guesses are looked at."""

BATCH = 32


def write(
    model: ColaDLM, prompts: Sequence[str], tokens: int, settings: Mapping[str, Any], seed: int = 0
) -> list[str]:
    """Return the continuations of prompts, the i-th with seed ``seed + i``."""
    return [done.text for done in model.generate(prompts, tokens, batch=BATCH, **{**settings, "seed": seed})]


# --- words ---------------------------------------------------------------------------------------


class Trigrams:
    """An interpolated word-trigram model of the training text: a cheap judge of word order."""

    def __init__(self, texts: Iterable[Sequence[str]], strength: float = 3.0) -> None:
        self.strength = strength
        self.counts = [Counter[tuple[Any, ...]]() for _ in range(3)]
        self.contexts = [Counter[tuple[Any, ...]]() for _ in range(3)]
        for text in texts:
            for n in range(3):
                grams = ngrams(text, n + 1)
                self.counts[n].update(grams)
                self.contexts[n].update(gram[:-1] for gram in grams)

    def nats(self, text: Sequence[str]) -> list[float]:
        """Return the negative log-probability of each word."""
        found = []
        for at in range(len(text)):
            p = 1 / len(self.counts[0])
            for n in range(min(at, 2) + 1):
                gram = tuple(text[at - n : at + 1])
                seen = self.contexts[n][gram[:-1]]
                p = (self.counts[n][gram] + self.strength * p) / (seen + self.strength)
            found.append(-math.log(p))
        return found

    def nats_per_word(self, texts: Iterable[Sequence[str]]) -> float:
        """Return the mean negative log-probability of the words."""
        each = [own for text in texts for own in self.nats(text)]
        return sum(each) / max(1, len(each))


def figures(texts: Sequence[Sequence[str]], judge: Trigrams, vocabulary: Collection[str]) -> dict[str, float]:
    """Return what is counted of some texts, as words."""
    return {
        "words": sum(map(len, texts)),
        "known": known(texts, vocabulary),
        "repeated": repeated(texts),
        "distinct2": distinct(texts, 2),
        "trigram": judge.nats_per_word(texts),
    }


PRONOUNS = {
    "girl": frozenset({"she", "her", "hers", "herself"}),
    "boy": frozenset({"he", "him", "his", "himself"}),
}


def named_child(opening: str) -> str | None:
    """Return whether an opening names a girl or a boy; None for neither, or both."""
    children = set(re.findall(r"\b(girl|boy)\b", opening.lower()))
    return children.pop() if len(children) == 1 else None


def pronouns(openings: Sequence[str], texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return how often texts after openings that name a girl or a boy keep her or his pronoun.

    Returns: ``texts`` with a pronoun of either; the share whose ``first`` is the child's; and the share of
    ``all`` pronouns in them that are.
    """
    firsts: list[bool] = []
    every: list[bool] = []
    for opening, text in zip(openings, texts, strict=True):
        child = named_child(opening)
        spoken = [word for word in text if any(word in group for group in PRONOUNS.values())]
        if child is not None and spoken:
            right = [word in PRONOUNS[child] for word in spoken]
            firsts.append(right[0])
            every += right
    shares = {name: sum(flags) / max(1, len(flags)) for name, flags in (("first", firsts), ("all", every))}
    return {"texts": len(firsts), **shares}


# --- latents -------------------------------------------------------------------------------------


@torch.inference_mode()
def validation_losses(model: ColaDLM, rows: StreamRows, batches: int, size: int) -> dict[str, float]:
    """Return reconstruction accuracy (of posterior means, as in generation), flow loss and log-SNR."""
    vae, flow = model.vae, FlowTerms(prefix_share=0.0)
    sums = Counter[str]()
    for number in range(batches):
        numbers = range(number * size, (number + 1) * size)
        some = batch(rows, numbers)
        generators = [torch.Generator().manual_seed(row) for row in numbers]
        noise = draw_noise(generators, vae.config, rows.length, flow=flow)
        layout = rows_layout(vae, some)
        _, right = reconstruction(vae, encode(vae, some.ids, layout).mean, some, layout)
        terms = readable(prior_loss(vae, model.dit, some, noise, model.pad_id).terms)
        sums.update(  # type: ignore[call-overload]  # it counts floats
            reconstruction_accuracy=float(right) / some.ids.numel(),
            flow_loss=terms["flow"],
            log_snr=terms["log_snr"],
        )
    return {name: value / batches for name, value in sums.items()}


@torch.inference_mode()
def guesses_by_noise(
    model: ColaDLM,
    rows: StreamRows,
    count: int,
    settings: Mapping[str, Any],
    levels: Sequence[float] = LEVELS,
) -> list[dict[str, float]]:
    """Return how well tokens are read from noisy latents and from guesses of the clean ones, by noise level.

    Posterior samples of rows are noised to a. The DiT guesses z0 with the clean blocks before each one
    (conditional), without (unconditional), and guided; each is decoded greedily.

    Args:
        rows: the first ``count`` are used.
        settings: of a generation, which say how guesses are guided.

    Returns: for each a: shares of tokens that are right, by name, and ``rms`` of the data and of the guesses.
    """
    vae, dit = model.vae, model.dit
    some = batch(rows, range(count))
    layout = rows_layout(vae, some)
    posterior = encode(vae, some.ids, layout)
    shape = (count, -1, vae.config.latent_dim)
    generator = torch.Generator().manual_seed(0)
    noise, z1 = torch.randn((2, *posterior.mean.view(shape).shape), generator=generator)
    z0 = vae.normalise(draw(posterior, noise)).view(shape)
    sample = sample_of_latents(some, vae.config.patch_size)
    alone = torch.ones(count, 1, z0.shape[1] // dit.config.block_size, dtype=torch.bool)

    def right(latents: Tensor) -> float:
        logits = vae.decoder.logits(vae.decoder(latents.reshape(-1, shape[-1]), layout))
        return (logits.argmax(-1) == some.ids.flatten()).float().mean().item()

    guided = Guided.of(dit, settings)
    table = []
    for a in levels:
        z = interpolate(z0, z1, torch.tensor(a))[:, None]
        timestep = torch.full(z.shape[:-1], T * a)
        conditional, unconditional = (
            guess_of_z0(dit, z, predict(dit, z, timestep, z0, None, sample, hidden), timestep, None)
            for hidden in (None, alone)
        )
        guesses = {
            "conditional": conditional,
            "unconditional": unconditional,
            "guided": guided.guess(z, timestep, z0, None, sample),
        }
        table.append(
            {
                "a": a,
                "noisy": right(z),
                **{name: right(guess) for name, guess in guesses.items()},
                "rms_data": rms(z0.flatten()).item(),
                **{f"rms_{name}": rms(guess.flatten()).item() for name, guess in guesses.items()},
            }
        )
    return table
