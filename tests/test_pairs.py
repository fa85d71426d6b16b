"""Preferences that rules make of a model's own answers: which, the same ones again, and learnt from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import colada
import rules
from answers import made
from colada.cli.main import main
from colada.errors import ColadaError
from colada.evaluate import preferences
from colada.evaluate.preferences import best_and_worst, own_pairs, taught_prompts
from colada.models.base import LanguageModel
from colada.models.likelihood import measure, nats_per_token
from colada.text.chat import encode_preference
from colada.text.transcript import Chunk, Completion
from colada.train.trainer import Trainer
from colada.train.watch import samples
from runs import STORIES, metrics
from test_rewards import TEXTS, chatting


def answer(text: str, seed: int = 0, reason: str = "end") -> Completion:
    return Completion(text, tuple(text.encode()), reason, seed)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, Completion]]:
    """Lets answers of a model that has learnt nothing end by themselves, but for every fifth; keeps them."""
    stream, came = LanguageModel.stream, list[dict[int, Completion]]()

    def ended(self: LanguageModel, *args: Any, **options: Any) -> Iterator[Chunk]:
        came.append({})
        for chunk in stream(self, *args, **options):
            done = chunk.completion
            if done is not None:
                done = dataclasses.replace(done, finish_reason="end" if done.seed % 5 else "length")
                came[-1][chunk.index] = done
            yield dataclasses.replace(chunk, completion=done)

    monkeypatch.setattr(LanguageModel, "stream", ended)
    return came


def test_the_best_and_the_worst_of_those_that_ended() -> None:
    some = [answer("a"), answer("b", 1, "length"), answer("c", 2), answer(" ", 3), answer("d", 4)]
    assert best_and_worst(some, [0.5, 1.0, 0.2, 0.0, 0.9]) == (4, 2)
    assert best_and_worst(some, [0.9, 0.0, 0.9, 0.0, 0.2]) == (0, 4)
    assert best_and_worst(some, [0.5, 1.0, 0.5, 0.0, 0.5]) is None
    assert best_and_worst(some[1:2], [1.0]) is None
    # With a judge, by its nats a token: the nearest two, the better one no less likely.
    assert best_and_worst(some, [0.9, 0.0, 0.9, 0.0, 0.2], [2.4, 1.0, 2.0, 1.0, 2.5]) == (0, 4)
    assert best_and_worst(some, [0.9, 0.0, 0.9, 0.0, 0.2], [2.6, 1.0, 2.0, 1.0, 2.5]) == (2, 4)
    assert best_and_worst(some, [0.2, 0.0, 0.9, 0.0, 0.2], [3.0, 1.0, 2.0, 1.0, 2.5]) == (2, 4)
    assert best_and_worst(some, [0.2, 0.0, 0.9, 0.0, 0.2], [3.0, 1.0, 3.1, 1.0, 2.5]) is None


def test_prompts_are_different_and_may_be_trained_on() -> None:
    prompts = taught_prompts(TEXTS, ["sums", "greeting"], 60)
    assert len(set(prompts)) == len(prompts) > 60
    assert {task for task, _ in prompts} == {"sums", "greeting"}
    assert ("greeting", "Hi, how are you?") not in prompts
    assert not any(prompt.startswith("If you have") for _, prompt in prompts)
    with pytest.raises(ColadaError, match="no prompt of name comes of 0 stories"):
        taught_prompts([], ["name"], 60)


def test_pairs_are_of_the_answers_to_their_prompt(ends: list[dict[int, Completion]]) -> None:
    model, prompts = chatting(), taught_prompts(TEXTS, ["greeting"], 60)
    told: dict[str, Any] = {"rules": {"greeting": rules.letters}, "samples": 5, "new_tokens": 6}
    made_of = [pair for _, pairs in own_pairs(model, prompts, **told) for pair in pairs]
    assert 0 < len(made_of) <= len(prompts)
    (every,) = ends
    for pair in made_of:
        answers = [every[5 * pair["number"] + sample] for sample in range(5)]
        worth = {done.text: rules.letters("", done.text) for done in answers if done.finish_reason == "end"}
        values = {text: value for text, value in worth.items() if text.strip()}
        assert pair["prompt"] == [{"role": "user", "content": prompts[pair["number"]][1]}]
        ((ids, count),) = encode_preference(
            pair["prompt"], [pair["chosen"]], model.tokenizer, model.chat_template, "a pair"
        )
        assert ids[:count] == model.prompt_ids(model.chat_prompt(pair["prompt"]))  # As when it was written.
        assert pair["reward"] == [max(values.values()), min(values.values())]
        assert [values[pair[name]] for name in ("chosen", "rejected")] == pair["reward"]
    later = [pair for _, pairs in own_pairs(model, prompts, **told, start=2) for pair in pairs]
    assert later == [pair for pair in made_of if pair["number"] >= 2]


def test_a_judge_leaves_pairs_whose_best_answer_is_no_less_likely(ends: list[dict[int, Completion]]) -> None:
    model, judge = chatting(), chatting(1)
    prompts = taught_prompts(TEXTS, ["greeting", "sums"], 30)
    told: dict[str, Any] = {"rules": dict.fromkeys(("greeting", "sums"), rules.coarse), "samples": 6}
    every = [pair for _, pairs in own_pairs(model, prompts, **told, new_tokens=6) for pair in pairs]
    judged = [
        pair for _, some in own_pairs(model, prompts, **told, new_tokens=6, judge=judge) for pair in some
    ]
    assert 0 < len(judged) < len(every)
    # Each text by itself, in place of all that are written together.
    for pair in judged:
        chosen, rejected = (measure(judge, [pair[name]], seed=[0])[0] for name in ("chosen", "rejected"))
        assert chosen.log_likelihood / chosen.tokens >= rejected.log_likelihood / rejected.tokens - 1e-5
    assert judge.tokenizer is not None
    assert nats_per_token(judge, ["", "Hello!"])[0] == math.log(judge.tokenizer.vocab_size)
    with torch.no_grad():
        next(judge.dit.parameters()).fill_(math.nan)
    with pytest.raises(ColadaError, match="not finite"):
        nats_per_token(judge, ["Hello!"])


def test_a_file_of_pairs_is_gone_on_with_and_learnt_from(
    ends: list[dict[int, Completion]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chatting().save(tmp_path / "model")
    monkeypatch.setattr(preferences, "AT_ONCE", 3)
    common = [
        "pairs",
        str(STORIES),
        "--model",
        str(tmp_path / "model"),
        "--quiet",
        "--reward",
        "rules:letters",
    ]
    common += ["--tasks", "greeting,sums", "--prompts", "6", "--samples", "4", "--new-tokens", "6"]
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert main([*common, "--out", str(whole)]) == 0
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert len(lines) > 3
    assert f"wrote {whole}: {len(lines)} pairs of 11 prompts; " in capsys.readouterr().out
    asked = list[str]()

    def at_the_third(prompt: str, text: str) -> float:
        if len(asked) == 2 * 3 * 4:  # Parts, prompts, samples.
            raise KeyboardInterrupt
        asked.append(prompt)
        return rules_letters(prompt, text)

    rules_letters = rules.letters
    with monkeypatch.context() as patched:
        patched.setattr(rules, "letters", at_the_third)
        assert main([*common, "--out", str(stopped)]) == 130
    assert 0 < len(stopped.read_text().splitlines()) < len(lines)
    assert main([*common, "--out", str(stopped)]) == 0
    assert stopped.read_bytes() == whole.read_bytes()
    capsys.readouterr()
    for more in (
        ["--seed", "1"],
        ["--guidance", "2"],
        ["--prompts", "5"],
        ["--judge", str(tmp_path / "model")],
    ):
        assert main([*common, "--out", str(whole), *more]) == 2
        assert "whole.jsonl:1 is of another model, other prompts or settings" in capsys.readouterr().err
    assert main([*common, "--out", str(tmp_path / "none.jsonl"), "--reward", "rules:equal"]) == 2
    assert (
        "to none of 11 prompts two answers end by themselves and differ in reward" in capsys.readouterr().err
    )
    assert not (tmp_path / "none.jsonl").exists()
    assert main([*common, "--out", str(tmp_path / "no" / "x.jsonl")]) == 2
    assert f"there is no directory {tmp_path / 'no'}" in capsys.readouterr().err
    assert main([*common, "--out", str(tmp_path / "none.jsonl"), "--judge", "bundled-few"]) == 2
    assert "judge bundled-few is distilled, expected a model that has a likelihood" in capsys.readouterr().err
    own = ["--judge", str(tmp_path / "model"), "--out", str(tmp_path / "judged.jsonl")]
    assert main([*common, *own, "--reward", "rules:coarse"]) == 0
    assert "differ in reward, the best no less likely than the worst" in capsys.readouterr().out
    assert main([*common, "--out", str(whole), "--reward", "rules:lettres"]) == 2
    assert "has no function 'lettres'" in capsys.readouterr().err

    source = f"{{path: {whole}, format: preferences}}"
    recipe = made(
        *(tmp_path / "model", tmp_path, "preferences", source),
        *("stages.preferences.batch=2", "stages.preferences.steps=2", "stages.preferences.beta=1"),
        *("run.sample_prompts=[Hello!]", "run.sample_tokens=6"),
    )
    Trainer(recipe, tmp_path / "run").run()
    model = colada.load(tmp_path / "run" / "model")
    asked = model.chat_prompt([{"role": "user", "content": "Hello!"}])
    assert samples(recipe, model) == {"Hello!": model.generate(asked, 6, seed=recipe.seed)[0].text}
    records = [record for record in metrics(tmp_path / "run") if record["split"] == "train"]
    assert [record["margin"] == 0 for record in records] == [True, False]
