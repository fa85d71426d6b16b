"""How well a model does what it is asked, by rules: rewards, wins, and what they may have cost.

A reward says that a rule was met; so beside it stand what a judge holds of the answers, how varied they are,
whether they end, and what has become of the model's flow. Prompts are those that are never trained on, and of
tasks with facts also those that may be. Intervals are Wilson's 95%, with as many trials as there are prompts,
however many seeds each has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

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
from colada.randomness import generator_of
from colada.text.chat import encode_messages
from colada.text.transcript import Completion
from colada.train.flow_matching import Pinned, place, predict

Progress = Callable[[int, int], None]
SPLITS = ("seen", "wording", "fact")
"""What was kept from training of a prompt: nothing, its wording, or the fact it asks for."""
FEW = 20
"""Different prompts of a task, below which their number says nothing of how sure a reward is."""
SEEN = ("questions", "sums")
"""Tasks of facts, of which prompts that may be trained on are asked too."""
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

    Fewer than :data:`FEW`, such as those for so many sentences, are asked again and again, with other seeds.

    Raises:
        ColadaError: if there is none.
    """
    asked = []
    for task in tasks:
        seen = list(instructions(stories, task, number, seed=1, questions=questions))
        held_out_ones = list(
            instructions(stories, task, 20 * number, seed=1, held_out=True, questions=questions)
        )
        for split in SPLITS:
            some: list[Instruction] = (
                seen
                if split == "seen"
                else [instruction for instruction in held_out_ones if instruction.held_out == split]
            )
            prompts = tuple(dict.fromkeys(instruction.prompt for instruction in some))[:number]
            if prompts and len(prompts) < FEW:
                prompts = tuple(islice(cycle(prompts), number))
            if prompts and (split != "seen" or task in SEEN):
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
    done = model.generate(requests, batch=batch)
    return [done[at : at + len(prompts)] for at in range(0, len(done), len(prompts))]


def best_of(rewards: Sequence[float], k: int) -> float:
    """Return the expected best of k rewards drawn from these without replacement: unbiased in their law."""
    ordered, total = sorted(rewards), math.comb(len(rewards), k)
    return sum(value * math.comb(at, k - 1) for at, value in enumerate(ordered)) / total


def of_prompts(successes: Sequence[float]) -> dict[str, Any]:
    """Return the mean of a share of each prompt, with its interval."""
    mean = sum(successes) / len(successes)
    return {"mean": mean, "interval": list(wilson(sum(successes), len(successes))), "prompts": len(successes)}


def wins(rewards: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the share of a model's answers that are better than another's to the same prompt, ties half.

    Args:
        rewards, others: by seed, of each prompt. Answers of one seed, whose noise is the same, are not
            compared; so there are two at least.
    """
    shares = []
    for one, two in zip(zip(*rewards, strict=True), zip(*others, strict=True), strict=True):
        pairs = [(a, b) for i, a in enumerate(one) for j, b in enumerate(two) if i != j]
        shares.append(sum(0.5 * ((a > b) + (a >= b)) for a, b in pairs) / len(pairs))
    return of_prompts(shares)


def evaluate_rewards(
    models: Mapping[str, LanguageModel],
    asked: Sequence[Asked],
    *,
    reference: str | None = None,
    judge: Judge | None = None,
    seeds: int = 3,
    samples: int = 16,
    sampled: int = 20,
    new_tokens: int = 40,
    batch: int = 64,
    questions: Path | None = None,
    progress: Progress | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Return rewards of models' answers with all that stands beside them, for JSON.

    Args:
        models: by the names that they have in what is returned.
        reference: which of them the others are to win against.
        judge: who reads the answers, without their prompts.
        seeds: answers to each prompt.
        samples, sampled: so many answers to each of so many prompts of a task, for the best of K and for how
            alike they are.
        new_tokens: of an answer at most.
        progress: called with how many prompts a model has answered, and of how many there are.
        keep: takes what there is so far after each task.
    """
    tasks, best, conversations = list[dict[str, Any]](), dict[str, Any](), list[dict[str, Any]]()
    result = {"tasks": tasks, "best_of": best, "conversations": conversations}
    total, done = len(models) * sum(len(prompt_set.prompts) for prompt_set in asked), 0
    for prompt_set in asked:
        rule = reward_of(prompt_set.task, questions)
        written, scores = dict[str, list[list[Completion]]](), dict[str, list[list[float]]]()
        for name, model in models.items():
            written[name] = answers(model, prompt_set.prompts, range(seeds), new_tokens, batch)
            scores[name] = _scores(rule, prompt_set, written[name])
            done += len(prompt_set.prompts)
            if progress is not None:
                progress(done, total)
        point: dict[str, Any] = {"task": prompt_set.task, "split": prompt_set.split, "name": prompt_set.name}
        point["models"] = {
            name: _described(model, written[name], scores[name], judge) for name, model in models.items()
        }
        if reference is not None:
            for name in models:
                point["models"][name]["wins"] = wins(scores[name], scores[reference])
        tasks.append(point)
        for at, prompt in enumerate(prompt_set.prompts[:3]):
            by_model = {
                name: {"answer": written[name][0][at].text, "reward": scores[name][0][at]} for name in models
            }
            conversations.append({"prompt": prompt, "answers": by_model})
        if prompt_set.split != "seen" and samples > 1:
            some = Asked(prompt_set.task, prompt_set.split, prompt_set.prompts[:sampled])
            best[prompt_set.name] = {
                name: _sampled(model, rule, some, samples, new_tokens, batch)
                for name, model in models.items()
            }
        if keep is not None:
            keep(result)
    return result


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
) -> dict[str, Any]:
    """Return the best of K, and how varied the answers to one prompt are.

    ``overlap`` is of the sets of tokens of two answers, the mean over all pairs.
    """
    written = answers(model, asked.prompts, range(1000, 1000 + samples), new_tokens, batch)
    scores = _scores(rule, asked, written)
    each = list(zip(*scores, strict=True))
    curve = {k: sum(best_of(one, k) for one in each) / len(each) for k in BEST_OF if k <= samples}
    texts = [[done.tokens for done in one] for one in zip(*written, strict=True)]
    flat = [tokens for one in texts for tokens in one]
    return {
        "curve": {str(k): value for k, value in curve.items()},
        "overlap": variety.overlap(texts, 1),
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
        TextRequest(token_ids, new_tokens, cast(Settings, {"seed": number}))
        for number, token_ids in enumerate(ids)
    ]
    distance = size = count = 0.0
    for token_ids, written in zip(ids, roll_out(model, requests, batch), strict=True):
        assert written.latents is not None
        again = model.encode([*token_ids, *written.ids]).float().cpu()
        first = -(-len(token_ids) // model.vae.config.patch_size)
        drawn, encoded = written.latents[first:], again[first : len(written.latents)]
        distance += float((drawn - encoded).square().sum())
        size += float(encoded.square().sum())
        count += encoded.numel()
    return {"distance": math.sqrt(distance / count), "size": math.sqrt(size / count)}


# --- what has become of the flow ------------------------------------------------------------------


def with_fields(models: Mapping[str, LanguageModel]) -> dict[str, ColaDLM]:
    """Return those of models whose flows can be told apart at any time.

    That is those with the Text VAE of the first, without grids of a few steps built in: such a network knows
    no other times.
    """
    fields = {
        name: model
        for name, model in models.items()
        if isinstance(model, ColaDLM) and not (model.dit.config.distilled or {}).get("grids")
    }
    first = next(iter(fields.values()), None)
    return {name: model for name, model in fields.items() if first is not None and model.shares_vae(first)}


@torch.no_grad()
def compare_flows(
    models: Mapping[str, ColaDLM],
    samples: Sequence[tuple[Sequence[int], int]],
    length: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the flows of models and how far each has gone from each other, on the same noisy samples.

    ``flow`` has each model's error, which of plain texts tells what was forgotten. ``drift`` has, by model
    and by the other that it is compared with, E||f - f_other||^2 / E||f_other - target||^2 of velocities, and
    the same by equal bins of time, ``by_time``.

    Args:
        models: of one Text VAE, see :func:`with_fields`.
        samples: ids, and how many of them are a prompt, which is clean and does not count.
        length: tokens a row; longer samples are cut.

    Raises:
        ColadaError: if there is no sample.
    """
    some = [(list(ids[:length]), prompt) for ids, prompt in samples if prompt < min(len(ids), length)]
    if not some:
        raise ColadaError(f"none of {len(samples)} samples has anything after its prompt in {length} tokens")
    count = len(models)
    moved = torch.zeros(count, count, TIME_BINS, dtype=torch.float64)
    errors_of = torch.zeros(count, TIME_BINS, dtype=torch.float64)
    numbers = torch.zeros(TIME_BINS, dtype=torch.float64)
    for number, (ids, prompt) in enumerate(some):
        errors, free = _errors(list(models.values()), ids, prompt, generator_of(seed, 0, number))
        errors_of += (errors.square().mean(-1) * free).sum(-1)
        moved += ((errors[:, None] - errors).square().mean(-1) * free).sum(-1)
        numbers += free.sum()
    drift = {
        name: {
            other: {
                "drift": float(moved[i, j].sum() / errors_of[j].sum()),
                "by_time": (moved[i, j] / errors_of[j]).tolist(),
            }
            for j, other in enumerate(models)
            if i != j
        }
        for i, name in enumerate(models)
    }
    flow = {name: float((errors_of[i] / numbers).mean()) for i, name in enumerate(models)}
    return {"flow": flow, "drift": drift, "samples": len(some)}


def _errors(
    models: Sequence[ColaDLM], ids: Sequence[int], prompt: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return errors of models' velocities at a time in each bin, and the latents that count.

    Both float64: (models, bins, M, C), and (M,), 0 or 1.
    """
    vae, device = models[0].vae, models[0].device
    patch, width = vae.config.patch_size, vae.config.latent_dim
    whole = -(-len(ids) // vae.config.block_tokens) * vae.config.block_tokens
    row = torch.full((1, whole), models[0].pad_id, device=device)
    row[0, : len(ids)] = torch.tensor(ids)
    layout = vae.layout([whole // patch])
    z0 = vae.normalise(vae.encoder(row.flatten(), layout).mean).view(1, -1, width).float()
    a = (torch.arange(TIME_BINS) + torch.rand(TIME_BINS, generator=generator)) / TIME_BINS
    noise = torch.randn(1, TIME_BINS, z0.shape[1], width, generator=generator).to(device)
    timestep = (T * a)[None, :, None].expand(1, TIME_BINS, z0.shape[1]).to(device)
    given_mask = torch.arange(whole, device=device) < prompt
    where = given_mask.view(1, -1, patch).any(-1)
    prefix = row.masked_fill(~given_mask, models[0].pad_id)
    clean = vae.normalise(vae.encoder(prefix.flatten(), layout).mean).view_as(z0).float()
    pinned = Pinned(where, clean)
    z = place(interpolate(z0[:, None], noise, timestep / T), pinned)
    errors = []
    for model in models:
        output = predict(model.dit, z, timestep, z0, pinned)
        error = PREDICTIONS[model.dit.config.prediction].error(output, z0[:, None], noise, timestep / T)
        errors.append(error[0].double().cpu())
    return torch.stack(errors), (~where)[0].double().cpu()


def answered_samples(
    model: LanguageModel, stories: Sequence[str], tasks: Sequence[str], number: int, questions: Path | None
) -> list[tuple[list[int], int]]:
    """Return held-out prompts with right answers as ids, and how many are the prompt's."""
    assert model.tokenizer is not None
    assert model.chat_template is not None
    samples = []
    for task in tasks:
        for instruction in instructions(stories, task, number, seed=2, held_out=True, questions=questions):
            turns = [
                {"role": "user", "content": instruction.prompt},
                {"role": "assistant", "content": instruction.answer},
            ]
            samples += encode_messages(turns, model.tokenizer, model.chat_template, task)
    return samples


def plain_samples(model: LanguageModel, stories: Sequence[str], number: int) -> list[tuple[list[int], int]]:
    """Return stories as ids, without prompts."""
    assert model.tokenizer is not None
    return [(model.tokenizer.encode(" ".join(story.split())), 0) for story in stories[:number]]
