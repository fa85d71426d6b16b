"""Rewards of answers: estimates against closed forms, drift against blocks by hand, and the command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import colada
from colada.cli.main import main
from colada.data.instructions import instructions
from colada.errors import ColadaError
from colada.evaluate.rewards import Asked, answers, best_of, drift, evaluate_rewards, held_out_prompts, wins
from colada.flow import T, interpolate
from colada.models.cola import ColaDLM
from colada.networks.layers import History
from colada.text.chat import DEFAULT_TEMPLATE
from colada.text.tokenizer import Tokenizer
from helpers import tiny_model
from runs import STORIES

TEXTS = ["Mia had a red ball. She was happy.", "Tom saw a big dog. He ran home to his mum!"]


def chatting(seed: int = 0) -> ColaDLM:
    model = tiny_model(seed, vae={"vocab_size": 300}, generation={"steps": 2, "guidance": 1.0})
    texts = [text for own in instructions(TEXTS, "questions", 300) for text in (own.prompt, own.answer)]
    tokenizer = Tokenizer.train(texts, 300)
    return ColaDLM(
        model.vae, model.dit, tokenizer, generation=model.generation, chat_template=DEFAULT_TEMPLATE
    )


def test_the_best_of_k_is_the_mean_over_all_choices() -> None:
    rewards = [0.0, 0.5, 0.5, 1.0, 0.2]
    for k in range(1, 6):
        every = [max(some) for some in itertools.combinations(rewards, k)]
        assert best_of(rewards, k) == pytest.approx(sum(every) / len(every))


def test_ties_are_half_a_win() -> None:
    result = wins([[1.0, 0.0, 0.5]], [[0.0, 1.0, 0.5]])
    assert result["mean"] == 0.5
    assert wins([[1.0], [0.0]], [[0.0], [0.0]])["mean"] == 0.75
    low, high = wins([[1.0] * 50], [[0.0] * 50])["interval"]
    assert high == 1
    assert low == pytest.approx(50 / (50 + 1.959964**2), rel=1e-4)


def test_what_is_asked_was_kept_from_training() -> None:
    taught = {own.prompt for task in ("questions", "sums") for own in instructions(TEXTS, task, 5000)}
    asked = held_out_prompts(TEXTS, ["questions", "sums", "greeting"], 30)
    assert [(own.task, own.split) for own in asked] == [
        ("questions", "seen"),
        ("questions", "wording"),
        ("questions", "fact"),
        ("sums", "seen"),
        ("sums", "wording"),
        ("greeting", "wording"),
    ]
    for own in asked:
        assert len(set(own.prompts)) == len(own.prompts) <= 30
        assert all((prompt in taught) == (own.split == "seen") for prompt in own.prompts)
    assert len({own.name for own in asked}) == len(asked)
    with pytest.raises(ColadaError, match="no prompt of name"):
        held_out_prompts([], ["name"], 30)


def test_answers_do_not_depend_on_their_company() -> None:
    model = chatting()
    prompts = ["Hello!", "What is three plus four?", "Who are you?"]
    together = answers(model, prompts, (0, 1), 8, 6)
    alone = answers(model, prompts, (1,), 8, 1)
    assert [done.tokens for done in together[1]] == [done.tokens for done in alone[0]]
    assert together[0] != together[1]


def test_a_model_neither_wins_nor_drifts_against_itself() -> None:
    model = chatting()
    asked = [Asked("sums", "wording", ("If you have two and get one more, how many is that?",))]
    result = evaluate_rewards(model, asked, against=model, seeds=2, samples=3, new_tokens=6)
    (point,) = result["tasks"]
    assert point["wins"]["mean"] == 0.5
    assert 0 < point["tokens"] <= 6
    assert set(result["best_of"]["sums"]["curve"]) == {"1", "2"}
    own = drift(model, model, [(list(range(5, 21)), 6)])
    assert own["drift"] == 0
    assert own["flow"] == own["base_flow"] > 0


def test_drift_is_that_of_blocks_one_after_the_other() -> None:
    """Without a prompt: every block at its ten times, after the clean blocks before it."""
    model, base = chatting(0), chatting(0)
    with torch.no_grad():
        base.dit.txt_out.proj.weight.mul_(1.3)
    ids = list(range(7, 19))
    found = drift(model, base, [(ids, 0)], seed=4)
    from colada.train.stages import row_generator

    g = row_generator(4, 0, 0)
    a = (torch.arange(10) + torch.rand(10, generator=g)) / 10
    noise = torch.randn(1, 10, 12, 8, generator=g)[0]
    z0, sums = model.encode(ids), torch.zeros(2, 10, dtype=torch.float64)
    with torch.no_grad():
        for at in range(10):
            z = interpolate(z0, noise[at], a[at].expand(12))
            for start in range(0, 12, 4):
                part, outputs = slice(start, start + 4), []
                for own in (model, base):
                    past = History()
                    if start:
                        layout = own.dit.layout([start], [past])
                        own.dit(z0[:start], torch.zeros(()), layout, [past], committing=True)
                    outputs.append(own.dit(z[part], T * a[at], own.dit.layout([4], [past]), [past]))
                sums[0, at] += (outputs[0] - outputs[1]).double().square().sum()
                sums[1, at] += (outputs[1] - (noise[at] - z0)[part]).double().square().sum()
    assert found["by_time"] == pytest.approx((sums[0] / sums[1]).tolist(), rel=1e-3)
    assert found["drift"] == pytest.approx(float(sums[0].sum() / sums[1].sum()), rel=1e-3)
    with pytest.raises(ColadaError, match="no drift between them"):
        drift(model, chatting(3), [(ids, 0)])
    with pytest.raises(ColadaError, match="none of 1 samples"):
        drift(model, base, [(ids, 12)])


def test_the_command_writes_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("one", 0), ("other", 0)):
        chatting(seed).save(tmp_path / name)
    common = ["eval", "reward", str(STORIES), "--model", str(tmp_path / "one"), "--quiet"]
    small = [
        "--prompts",
        "3",
        "--seeds",
        "2",
        "--samples",
        "2",
        "--new-tokens",
        "6",
        "--tasks",
        "questions,sums",
    ]
    files = ["--out", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    judged = ["--judge", str(tmp_path / "other"), "--against", str(tmp_path / "other")]
    assert main([*common, *small, *files, *judged]) == 0
    shown = capsys.readouterr().out
    assert "questions, seen" in shown
    result = json.loads((tmp_path / "r.json").read_text())
    assert {point["split"] for point in result["tasks"]} == {"seen", "wording", "fact"}
    assert all(point["judge"] > 1 for point in result["tasks"] if point["judge"] is not None)
    assert set(result["best_of"]) == {"questions", "questions, unseen fact", "sums"}
    assert result["flows"]["answers"]["drift"] == 0
    assert result["latents_encoded_again"]["distance"] > 0
    page = (tmp_path / "r.html").read_text()
    assert "Best of K" in page
    assert "Answers, unselected" in page
    for more, said in (
        (["--tasks", "wrods"], "did you mean 'words'"),
        (["--tasks", "story_questions"], "without questions"),
        (["--prompts", "0"], "prompts=0"),
    ):
        assert main([*common, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["eval", "reward", str(STORIES)]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_the_command_for_chat_says_what_makes_one(capsys: pytest.CaptureFixture[str]) -> None:
    from colada.locate import BUNDLED_CHAT

    if BUNDLED_CHAT.is_dir():
        assert colada.load("bundled-chat").chat_template is not None
        return
    assert main(["chat"]) == 2
    assert "colada train recipes/chat.yaml makes one" in capsys.readouterr().err
