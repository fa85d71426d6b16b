"""Preferences that rules make: of a model's own answers to a prompt, the best one and the worst.

Answer i to a prompt has a seed of the prompt's number and i, so the same pairs are made wherever a file of
them is gone on with. An answer that did not end by itself is in no pair: training puts an end after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from colada.data.instructions import instructions, reward_of
from colada.data.jsonl import get, read_lines
from colada.data.rules import Reward, rewarded
from colada.errors import ColadaError
from colada.files import write_text
from colada.generate.settings import Settings, TextRequest
from colada.models.base import LanguageModel
from colada.models.likelihood import nats_per_token
from colada.randomness import seed_of
from colada.text.transcript import Completion, completed, in_order
from colada.train.trajectories import digest

AT_ONCE = 32
"""Prompts that are judged together, once their answers are written, and whose pairs are then in the file."""


def taught_prompts(
    stories: Sequence[str], tasks: Sequence[str], number: int, seed: int = 0, questions: Path | None = None
) -> list[tuple[str, str]]:
    """Return task and prompt of so many different prompts of each task that may be trained on.

    Raises:
        ColadaError: if there is none.
    """
    prompts = [
        (task, prompt)
        for task in tasks
        for prompt in dict.fromkeys(
            instruction.prompt
            for instruction in instructions(stories, task, number, seed, questions=questions)
        )
    ]
    if not prompts:
        raise ColadaError(f"no prompt of {', '.join(tasks)} comes of {len(stories)} stories, expected some")
    return prompts


def best_and_worst(
    answers: Sequence[Completion], rewards: Sequence[float], nats: Sequence[float] | None = None
) -> tuple[int, int] | None:
    """Return which answer is the best and which the worst, None if none is better than another.

    Answers that did not end by themselves, or say nothing, do not count.

    Args:
        nats: -log p a token of each under a judge: of equally good and equally bad answers the two that are
            nearest in it, the better one no less likely; None where there are none. Without: the first ones.
    """
    ended = [n for n, answer in enumerate(answers) if answer.finish_reason == "end" and answer.text.strip()]
    if not ended:
        return None
    high, low = (choose(rewards[n] for n in ended) for choose in (max, min))
    if high == low:
        return None
    both = [
        (best, worst) for best in ended for worst in ended if (rewards[best], rewards[worst]) == (high, low)
    ]
    if nats is None:
        return both[0]
    lead = {pair: nats[pair[1]] - nats[pair[0]] for pair in both}
    return min((pair for pair in both if lead[pair] >= 0), key=lambda pair: lead[pair], default=None)


def spoken(prompt: str) -> list[dict[str, str]]:
    """Return a prompt as a user's message: a text alone would be continued, not answered."""
    return [{"role": "user", "content": prompt}]


def own_pairs(
    model: LanguageModel,
    prompts: Sequence[tuple[str, str]],
    rules: Mapping[str, Reward],
    *,
    samples: int,
    new_tokens: int,
    judge: LanguageModel | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    batch: int = 64,
    start: int = 0,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield how many prompts are done, and the pairs of the last ones of these, as lines of a file.

    Args:
        prompts: task and prompt of each.
        rules: by task.
        samples: answers to a prompt.
        new_tokens: of an answer at most.
        judge: see :func:`best_and_worst`.
        seed: of all answers' seeds.
        settings: of generation, over the model's own.
        start: the first prompt whose answers are written.

    Raises:
        ColadaError: if the model has no chat template, or a rule fails.
    """
    requests = []
    for number in range(start, len(prompts)):
        asked = model.chat_prompt(spoken(prompts[number][1]))
        for sample in range(samples):
            with_seed: Any = {**(settings or {}), "seed": seed_of(seed, number, sample) >> 2}
            requests.append(TextRequest(asked, new_tokens, with_seed))
    every = in_order(model.stream(requests, batch=batch))
    for begin in range(start, len(prompts), AT_ONCE):
        numbers = range(begin, min(begin + AT_ONCE, len(prompts)))
        some = completed(list(islice(every, samples * len(numbers))))
        judged = None if judge is None else nats_per_token(judge, [answer.text for answer in some], batch)
        pairs = []
        for place, number in enumerate(numbers):
            rows, (task, prompt) = slice(place * samples, (place + 1) * samples), prompts[number]
            answers = some[rows]
            rewards = [rewarded(rules[task], task, prompt, answer.text) for answer in answers]
            chosen = best_and_worst(answers, rewards, None if judged is None else judged[rows])
            if chosen is not None:
                texts = dict(zip(("chosen", "rejected"), (answers[n].text for n in chosen), strict=True))
                about = {"task": task, "number": number, "reward": [rewards[n] for n in chosen]}
                pairs.append({"prompt": spoken(prompt), **texts, **about})
        yield numbers.stop, pairs


def _weights(model: LanguageModel) -> dict[str, str]:
    return {name: digest(network) for name, network in model.networks.items()}


def write_pairs(
    path: Path,
    model: LanguageModel,
    prompts: Sequence[tuple[str, str]],
    *,
    questions: Path | None = None,
    reward: str | None = None,
    judge: LanguageModel | None = None,
    progress: Callable[[int, int], None] | None = None,
    batch: int = 64,
    **made: Any,
) -> int:
    """Write the pairs of a model's answers as lines of a file, or go on with one; return how many it has.

    Args:
        path: each line has ``prompt``, ``chosen``, ``rejected``, as ``format: preferences`` reads them;
            task, number and rewards; and in ``of`` a digest of model, prompts and settings.
        reward: a rule in place of the tasks' own, ``package.module:function``.
        progress: called with how many prompts are done, and of how many.
        judge, batch, made: see :func:`own_pairs`.

    Raises:
        ColadaError: as :func:`own_pairs`; if the file holds other pairs, or cannot be written.
    """
    if not path.parent.is_dir():
        raise ColadaError(f"{path}: there is no directory {path.parent}, expected a place for a file")
    rules = {task: reward_of(reward or task, questions) for task in dict(prompts)}
    settings = model.chosen(made.get("settings") or {})
    about = [_weights(model), model.chat_template, settings, prompts, reward, made]
    about += [] if judge is None else [_weights(judge)]
    of = hashlib.sha256(json.dumps(about, sort_keys=True, default=list).encode()).hexdigest()[:16]
    lines = list(read_lines(path)) if path.exists() else []
    for place, line in lines:
        if line.get("of") != of:
            raise ColadaError(
                f"{place} is of another model, other prompts or settings: expected the same, or another --out"
            )
    pairs = [line for _, line in lines]
    start = 1 + get(pairs[-1], "number", "a whole number", lines[-1][0]) if pairs else 0
    for done, new in own_pairs(model, prompts, rules, judge=judge, start=start, batch=batch, **made):
        pairs += [{**pair, "of": of} for pair in new]
        if pairs:
            write_text(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
        if progress is not None:
            progress(done, len(prompts))
    return len(pairs)
