"""Rewards of answers: estimates against closed forms, drift against blocks by hand, and the command."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colada.cli.main import main
from colada.data.instructions import instructions
from colada.errors import ColadaError
from colada.evaluate.rewards import (
    Asked,
    answers,
    best_of,
    compare_flows,
    evaluate_rewards,
    held_out_prompts,
    wins,
    with_fields,
)
from colada.flow import T, interpolate
from colada.models.cola import ColaDLM
from colada.networks.layers import KVCache
from colada.report.rewards import flow_table
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


def test_ties_are_half_a_win_and_answers_of_one_seed_are_not_compared() -> None:
    own, other = [[1.0, 0.0, 0.5], [0.0, 0.0, 0.5]], [[1.0, 1.0, 0.5], [0.0, 0.0, 0.5]]
    # Of each prompt: the first seed's over the second's, and the second's over the first's.
    assert wins(own, other)["mean"] == pytest.approx(((1 + 0) / 2 + (0.5 + 0) / 2 + (0.5 + 0.5) / 2) / 3)
    assert wins(own, own)["mean"] == 0.5
    low, high = wins([[1.0] * 50] * 2, [[0.0] * 50] * 2)["interval"]
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
        many = len(set(own.prompts)) >= 20
        assert len(own.prompts) == (len(set(own.prompts)) if many else 30)
        assert own.task != "greeting" or len(set(own.prompts)) == 1
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
    models = {"one": chatting(), "again": chatting(), "other": chatting(3)}
    asked = [Asked("sums", "wording", ("If you have two and get one more, how many is that?",))]
    kept: list[int] = []
    result = evaluate_rewards(
        models,
        asked,
        reference="again",
        seeds=2,
        samples=3,
        new_tokens=6,
        keep=lambda far: kept.append(len(far["tasks"])),
    )
    (point,) = result["tasks"]
    assert kept == [1]
    assert [point["models"][name]["wins"]["mean"] for name in ("one", "again")] == [0.5, 0.5]
    assert point["models"]["one"] == point["models"]["again"]
    assert point["models"]["other"]["distinct_2"] != point["models"]["one"]["distinct_2"]
    assert all(0 < own["tokens"] <= 6 for own in point["models"].values())
    assert set(result["best_of"]["sums"]["one"]["curve"]) == {"1", "2"}
    assert list(with_fields(models)) == ["one", "again"]  # Another Text VAE.
    flows = compare_flows(with_fields(models), [(list(range(5, 21)), 6)])
    assert flows["drift"]["one"]["again"]["drift"] == 0
    assert flows["flow"]["one"] == flows["flow"]["again"] > 0
    few = chatting()
    few.dit.config = replace(few.dit.config, distilled={"guidance": 3.0, "grids": [[1.0, 0.5, 0.0]]})
    assert list(with_fields({"few": few, "one": models["one"]})) == ["one"]


def test_drift_is_that_of_blocks_one_after_the_other() -> None:
    """Without a prompt: every block at its ten times, after the clean blocks before it."""
    model, base = chatting(0), chatting(0)
    with torch.no_grad():
        base.dit.txt_out.proj.weight.mul_(1.3)
    ids, models = list(range(7, 19)), {"model": model, "base": base}
    flows = compare_flows(models, [(ids, 0)], seed=4)
    found = flows["drift"]["model"]["base"]
    from colada.randomness import generator_of

    g = generator_of(4, 0, 0)
    a = (torch.arange(10) + torch.rand(10, generator=g)) / 10
    noise = torch.randn(1, 10, 12, 8, generator=g)[0]
    z0, sums = model.encode(ids), torch.zeros(2, 10, dtype=torch.float64)
    with torch.no_grad():
        for at in range(10):
            z = interpolate(z0, noise[at], a[at].expand(12))
            for start in range(0, 12, 4):
                part, outputs = slice(start, start + 4), []
                for own in (model, base):
                    past = KVCache()
                    if start:
                        layout = own.dit.layout([start], [past])
                        own.dit(z0[:start], torch.zeros(()), layout, [past], appending=True)
                    outputs.append(own.dit(z[part], T * a[at], own.dit.layout([4], [past]), [past]))
                sums[0, at] += (outputs[0] - outputs[1]).double().square().sum()
                sums[1, at] += (outputs[1] - (noise[at] - z0)[part]).double().square().sum()
    assert found["by_time"] == pytest.approx((sums[0] / sums[1]).tolist(), rel=1e-3)
    assert found["drift"] == pytest.approx(float(sums[0].sum() / sums[1].sum()), rel=1e-3)
    assert flows["flow"]["base"] == pytest.approx(float(sums[1].sum() / (10 * 12 * 8)), rel=1e-3)
    with pytest.raises(ColadaError, match="none of 1 samples"):
        compare_flows(models, [(ids, 12)])


def test_the_command_writes_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        chatting().save(tmp_path / name / "model")
    common = ["eval", "reward", str(STORIES), "--model", str(tmp_path / "one" / "model"), "--quiet"]
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
    other = str(tmp_path / "other" / "model")
    judged = ["--judge", other, "--against", other]
    assert main([*common, *small, *files, *judged]) == 0
    shown = capsys.readouterr().out
    assert "questions, seen" in shown
    assert all(word in shown for word in ("distinct-2", "shared tokens, %", "drift, %"))
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["models"]) == ["other", "one"]
    assert result["reference"] == "other"
    assert {point["split"] for point in result["tasks"]} == {"seen", "wording", "fact"}
    described = [own for point in result["tasks"] for own in point["models"].values()]
    assert all(own["judge"] > 1 for own in described if own["judge"] is not None)
    assert all(own["wins"]["mean"] == 0.5 for own in described)
    assert set(result["best_of"]) == {"questions", "questions, unseen fact", "sums"}
    assert result["flows"]["answers"]["drift"]["one"]["other"]["drift"] == 0
    assert result["latents_encoded_again"]["one"]["distance"] > 0
    page = (tmp_path / "r.html").read_text()
    for said in ("Best of K", "Answers, unselected", "Drift from other", "shared tokens", "Wins are against"):
        assert said in page
    for more, said in (
        (["--tasks", "wrods"], "did you mean 'words'"),
        (["--tasks", "story_questions"], "without questions"),
        (["--prompts", "0"], "prompts=0"),
        (["--seeds", "1", "--against", other], "seeds=1 with --against, expected at least 2"),
    ):
        assert main([*common, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["eval", "reward", str(STORIES)]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_model_without_a_template_is_asked_by_that_of_another(tmp_path: Path) -> None:
    for name in ("base", "chat", "best"):
        model = chatting()
        if name == "base":
            model.chat_template = None
        model.save(tmp_path / name)
    models = [part for name in ("base", "chat", "best") for part in ("--model", str(tmp_path / name))]
    small = ["--tasks", "greeting", "--seeds", "2", "--samples", "1", "--new-tokens", "4", "--quiet"]
    out = tmp_path / "r.json"
    against = ["--against", str(tmp_path / "chat"), "--out", str(out)]
    assert main(["eval", "reward", str(STORIES), *models, *small, *against]) == 0
    result = json.loads(out.read_text())
    assert list(result["models"]) == ["base", "chat", "best"]
    assert result["reference"] == "chat"
    assert result["asked_by_the_template_of_another"] == ["base"]
    (point,) = result["tasks"]
    assert point["models"]["base"] == point["models"]["chat"]
    assert set(result["flows"]["plain stories"]["drift"]["best"]) == {"base", "chat"}


def test_flows_are_beside_those_of_the_models_before() -> None:
    flows = {
        "flow": {"base": 2.0, "chat": 2.1, "best": 1.9},
        "drift": {
            "chat": {"base": {"drift": 0.25}},
            "best": {"base": {"drift": 0.5}, "chat": {"drift": 0.125}},
        },
    }
    assert flow_table({"answers": flows}).rows == [
        ("answers", "base", "2.0000", "", "", ""),
        ("", "chat", "2.1000", "base", "+5.00", "25.00"),
        ("", "best", "1.9000", "base", "-5.00", "50.00"),
        ("", "", "", "chat", "-9.52", "12.50"),
    ]


def test_the_command_for_chat_says_what_makes_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("colada.cli.write.BUNDLED_CHAT", tmp_path / "none")
    assert main(["chat"]) == 2
    assert "colada train recipes/chat.yaml makes one" in capsys.readouterr().err
