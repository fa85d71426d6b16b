"""How well a model does what it is asked, by rules: rewards, wins, and what they may have cost.

A reward says that a rule was met; so beside it stand what a judge holds of the answers, how varied they are,
whether they end, and what has become of the model's flow. Prompts are those that are never trained on, and of
tasks with facts also those that may be. Intervals are Wilson's 95%, with as many trials as there are prompts,
however many seeds each has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from colada.data.instructions import Instruction, instructions, reward_of
from colada.data.rules import rewarded
from colada.errors import ColadaError
from colada.evaluate import variety
from colada.evaluate.generative import Judge, Passage
from colada.evaluate.statistics import wilson
from colada.flow import PREDICTIONS, T, interpolate
from colada.generate.settings import Settings, TextRequest
from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.models.rollouts import roll_out
from colada.text.chat import encode_messages
from colada.text.transcript import Completion
from colada.train.flow_matching import Pinned, place, predict
from colada.train.stages import row_generator

Progress = Callable[[int, int], None]
SPLITS = ("seen", "wording", "fact")
"""What was kept from training of a prompt: nothing, its wording, or the fact it asks for."""
TIME_BINS = 10
BEST_OF = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Asked:
    """Prompts of one task and split."""

    task: str
    split: str
    prompts: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is called in tables; each of a task's splits has its own."""
        return self.task + {"seen": ", seen", "fact": ", unseen fact"}.get(self.split, "")


def held_out_prompts(
    stories: Sequence[str], tasks: Sequence[str], number: int, questions: Path | None = None
) -> list[Asked]:
    """Return different prompts of tasks, so many of each split as far as there are any, in random order.

    Raises:
        ColadaError: if there is none.
    """
    asked = []
    for task in tasks:
        seen = list(instructions(stories, task, number, seed=1, questions=questions))
        kept = list(instructions(stories, task, 20 * number, seed=1, held_out=True, questions=questions))
        for split in SPLITS:
            some: list[Instruction] = (
                seen if split == "seen" else [own for own in kept if own.held_out == split]
            )
            prompts = tuple(dict.fromkeys(own.prompt for own in some))[:number]
            if prompts and (split != "seen" or task in ("questions", "sums")):
                asked.append(Asked(task, split, prompts))
    if not asked:
        raise ColadaError(f"no prompt of {', '.join(tasks)} comes of {len(stories)} stories, expected some")
    return asked


def answers(
    model: LanguageModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    new_tokens: int,
    batch: int,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Return what a model answers to prompts, for each seed; prompt i has the seed ``1000003 seed + i``."""
    requests = [
        TextRequest(
            model.chat_prompt([{"role": "user", "content": prompt}]),
            new_tokens,
            cast(Settings, {"seed": 1000003 * seed + number}),
        )
        for seed in seeds
        for number, prompt in enumerate(prompts)
    ]
    done = model.generate(requests, batch=batch, progress=progress)
    return [done[at : at + len(prompts)] for at in range(0, len(done), len(prompts))]


def best_of(rewards: Sequence[float], k: int) -> float:
    """Return the expected best of k rewards drawn from these without replacement: unbiased in their law."""
    ordered, total = sorted(rewards), math.comb(len(rewards), k)
    return sum(value * math.comb(at, k - 1) for at, value in enumerate(ordered)) / total


def of_prompts(successes: Sequence[float]) -> dict[str, Any]:
    """Return the mean of a share of each prompt, with its interval."""
    mean = sum(successes) / len(successes)
    return {"mean": mean, "interval": list(wilson(sum(successes), len(successes))), "prompts": len(successes)}


def wins(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the share of a model's answers that are better than another's to the same prompt, ties half."""
    shares = [
        sum(0.5 * ((a > b) + (a >= b)) for a in one for b in two) / (len(one) * len(two))
        for one, two in zip(zip(*own, strict=True), zip(*other, strict=True), strict=True)
    ]
    return of_prompts(shares)


def evaluate_rewards(
    model: LanguageModel,
    asked: Sequence[Asked],
    *,
    against: LanguageModel | None = None,
    judge: Judge | None = None,
    seeds: int = 3,
    samples: int = 16,
    sampled: int = 20,
    new_tokens: int = 40,
    batch: int = 64,
    questions: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return rewards of a model's answers with all that stands beside them, for JSON.

    Args:
        against: another model, whose answers have other seeds.
        judge: who reads the answers, without their prompts.
        seeds: answers to each prompt.
        samples, sampled: so many answers to each of so many prompts of a task, for the best of K and for how
            alike they are.
        new_tokens: of an answer at most.
        progress: called with how many answers are written, and of how many, of each part.
    """
    tasks, best = list[dict[str, Any]](), dict[str, Any]()
    conversations: list[dict[str, Any]] = []
    for own in asked:
        rule = reward_of(own.task, questions)
        written = answers(model, own.prompts, range(seeds), new_tokens, batch, progress)
        scores = _scores(rule, own, written)
        point: dict[str, Any] = {"task": own.task, "split": own.split, "name": own.name}
        point |= _described(model, written, scores, judge)
        if against is not None:
            others = answers(against, own.prompts, range(seeds, 2 * seeds), new_tokens, batch, progress)
            other = _scores(rule, own, others)
            point["wins"] = wins(scores, other)
            point["against"] = _described(against, others, other, judge)
        tasks.append(point)
        conversations += [
            {"prompt": prompt, "answer": done.text, "reward": score}
            for prompt, done, score in zip(own.prompts[:3], written[0], scores[0], strict=False)
        ]
        if own.split != "seen" and samples > 1:
            some = Asked(own.task, own.split, own.prompts[:sampled])
            best[own.name] = _sampled(model, rule, some, samples, new_tokens, batch, progress)
            if against is not None:
                theirs = _sampled(against, rule, some, samples, new_tokens, batch, progress)
                best[own.name]["against"] = theirs
    return {"tasks": tasks, "best_of": best, "conversations": conversations}


def _scores(rule: Any, asked: Asked, written: Sequence[Sequence[Completion]]) -> list[list[float]]:
    return [
        [
            rewarded(rule, asked.task, prompt, done.text)
            for prompt, done in zip(asked.prompts, row, strict=True)
        ]
        for row in written
    ]


def _described(
    model: LanguageModel,
    written: Sequence[Sequence[Completion]],
    scores: Sequence[Sequence[float]],
    judge: Judge | None,
) -> dict[str, Any]:
    """Return what answers earn, how they end, how long and how varied they are, and a judge's perplexity."""
    flat = [done for row in written for done in row]
    judged = {} if judge is None else {"judge": _judged(judge, model, written)}
    return {
        "reward": of_prompts([sum(each) / len(each) for each in zip(*scores, strict=True)]),
        "ended": sum(done.finish_reason == "end" for done in flat) / len(flat),
        "tokens": sum(len(done.tokens) for done in flat) / len(flat),
        "distinct_2": variety.distinct([done.tokens for done in flat], 2),
        **judged,
    }


def _judged(judge: Judge, model: LanguageModel, written: Sequence[Sequence[Completion]]) -> float | None:
    """Return the perplexity of answers under a judge, None where nothing was said."""
    assert model.tokenizer is not None
    passages = [
        Passage("", done.text, (), tuple(model.tokenizer.encode(done.text)), "")
        for row in written
        for done in row
        if done.text.strip()
    ]
    if not passages:
        return None
    scores = judge.score(passages)
    return math.exp(-sum(score.log_likelihood for score in scores) / sum(score.tokens for score in scores))


def _sampled(
    model: LanguageModel,
    rule: Any,
    asked: Asked,
    samples: int,
    new_tokens: int,
    batch: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Return the best of K, and how alike the answers to one prompt are."""
    written = answers(model, asked.prompts, range(1000, 1000 + samples), new_tokens, batch, progress)
    scores = _scores(rule, asked, written)
    each = list(zip(*scores, strict=True))
    curve = {k: sum(best_of(one, k) for one in each) / len(each) for k in BEST_OF if k <= samples}
    texts = [[done.tokens for done in one] for one in zip(*written, strict=True)]
    flat = [tokens for one in texts for tokens in one]
    return {
        "curve": {str(k): value for k, value in curve.items()},
        "overlap": variety.overlap(texts),
        "distinct_2": variety.distinct(flat, 2),
        "entropy": variety.entropy([token for tokens in flat for token in tokens]),
    }


@torch.no_grad()
def encoded_again(model: ColaDLM, prompts: Sequence[str], new_tokens: int, batch: int) -> dict[str, float]:
    """Return how far latents that a model has written are from those of the text they spell, encoded again.

    Both as root mean squares: ``distance``, and ``size`` of the encoded ones. Training on answers takes the
    first; preferences between texts take the second.
    """
    asked = [model.chat_prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    ids = [model.prompt_ids(prompt) for prompt in asked]
    requests = [
        TextRequest(own, new_tokens, cast(Settings, {"seed": number})) for number, own in enumerate(ids)
    ]
    distance = size = count = 0.0
    for own, written in zip(ids, roll_out(model, requests, batch), strict=True):
        again = model.encode([*own, *written.ids]).float().cpu()
        first = -(-len(own) // model.vae.config.patch_size)
        committed, encoded = written.latents[first:], again[first : len(written.latents)]
        distance += float((committed - encoded).square().sum())
        size += float(encoded.square().sum())
        count += encoded.numel()
    return {"distance": math.sqrt(distance / count), "size": math.sqrt(size / count)}


# --- what has become of the flow ------------------------------------------------------------------


@torch.no_grad()
def drift(
    model: ColaDLM,
    base: ColaDLM,
    samples: Sequence[tuple[Sequence[int], int]],
    length: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Return how far a model's flow has gone from another's, on the same noisy samples, by time.

    ``drift`` is E||f - f_base||^2 / E||f_base - target||^2 of velocities; ``flow`` and ``base_flow`` are the
    two errors themselves: on plain texts their ratio is what was forgotten.

    Args:
        samples: ids, and how many of them are a prompt, which is clean and does not count.
        length: tokens a row; longer samples are cut.

    Raises:
        ColadaError: if the two have other Text VAEs, or there is no sample.
    """
    config = model.vae.config
    if not model.shares_vae(base):
        raise ColadaError(f"{model.origin} and {base.origin} have other Text VAEs: no drift between them")
    some = [(list(ids[:length]), prompt) for ids, prompt in samples if prompt < min(len(ids), length)]
    if not some:
        raise ColadaError(f"none of {len(samples)} samples has anything after its prompt in {length} tokens")
    patch, width, device = config.patch_size, config.latent_dim, model.device
    sums = torch.zeros(4, TIME_BINS, dtype=torch.float64)
    for number, (ids, prompt) in enumerate(some):
        whole = -(-len(ids) // config.block_tokens) * config.block_tokens
        row = torch.full((1, whole), model.pad_id, device=device)
        row[0, : len(ids)] = torch.tensor(ids)
        layout = model.vae.layout([whole // patch])
        z0 = model.vae.normalise(model.vae.encoder(row.flatten(), layout).mean).view(1, -1, width).float()
        generator = row_generator(seed, 0, number)
        a = (torch.arange(TIME_BINS) + torch.rand(TIME_BINS, generator=generator)) / TIME_BINS
        noise = torch.randn(1, TIME_BINS, z0.shape[1], width, generator=generator).to(device)
        timestep = (T * a)[None, :, None].expand(1, TIME_BINS, z0.shape[1]).to(device)
        given = torch.arange(whole, device=device) < prompt
        where = given.view(1, -1, patch).any(-1)
        prefix = row.masked_fill(~given, model.pad_id)
        clean = model.vae.normalise(model.vae.encoder(prefix.flatten(), layout).mean).view_as(z0).float()
        pinned = Pinned(where, clean)
        z = place(interpolate(z0[:, None], noise, timestep / T), pinned)
        errors = []
        for own in (model, base):
            output = predict(own.dit, z, timestep, z0, pinned)
            error = PREDICTIONS[own.dit.config.prediction].error(output, z0[:, None], noise, timestep / T)
            errors.append(error)
        free = (~where)[:, None].double()
        for at, value in enumerate((errors[0] - errors[1], errors[0], errors[1])):
            sums[at] += (value.double().square().mean(-1) * free).sum((0, 2)).cpu()
        sums[3] += free.sum().cpu()
    moved, flow, base_flow, count = sums
    return {
        "drift": float(moved.sum() / base_flow.sum()),
        "by_time": (moved / base_flow).tolist(),
        "flow": float((flow / count).mean()),
        "base_flow": float((base_flow / count).mean()),
        "samples": len(some),
    }


def answered_samples(
    model: LanguageModel, stories: Sequence[str], tasks: Sequence[str], number: int, questions: Path | None
) -> list[tuple[list[int], int]]:
    """Return held-out prompts with right answers as ids, and how many are the prompt's."""
    assert model.tokenizer is not None
    assert model.chat_template is not None
    samples = []
    for task in tasks:
        for own in instructions(stories, task, number, seed=2, held_out=True, questions=questions):
            turns = [{"role": "user", "content": own.prompt}, {"role": "assistant", "content": own.answer}]
            samples += encode_messages(turns, model.tokenizer, model.chat_template, task)
    return samples


def plain_samples(model: LanguageModel, stories: Sequence[str], number: int) -> list[tuple[list[int], int]]:
    """Return stories as ids, without prompts."""
    assert model.tokenizer is not None
    return [(model.tokenizer.encode(" ".join(story.split())), 0) for story in stories[:number]]
