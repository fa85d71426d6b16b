"""The model that comes with the package: it is there, small, works offline, and keeps its promises."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import colada
from colada.cli.main import main
from colada.cli.parity import relative_error
from colada.data.instructions import instructions, reward_of
from colada.generate.reference import TransportStep
from colada.locate import BUNDLED
from colada.models.base import LanguageModel

PROMPTS = ["Once upon a time", "The little dog", "", "One day, Lily and her mother went to the park to"]


@pytest.fixture(scope="module")
def model() -> colada.ColaDLM:
    return colada.load()


def test_it_is_at_most_24_megabytes() -> None:
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) <= 24e6


def test_it_carries_a_card_and_the_credits_its_data_ask_for() -> None:
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    for corpus in ("TinyStories", "FairytaleQA", "African Storybook", "Pratham Books"):
        assert corpus in card
    assert (BUNDLED / "picture_books_attribution.tsv").is_file()


def test_it_spells_back_a_plain_story(model: colada.ColaDLM) -> None:
    text = (
        "Once upon a time there was a girl who lived in a big house. She had a dog, and they liked to play."
    )
    assert model.reconstruct(text).text == text


def share_of_known_words(model: LanguageModel) -> float:
    """Of four continuations; known are words frequent enough to be one entry of the tokenizer."""
    entries = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    known = {entry.removeprefix("\u0120").lower() for entry in entries}
    texts = [done.text for done in model.generate(["Once upon a time"] * 4, 48, seed=0)]
    words = [word.lower() for text in texts for word in re.findall(r"[A-Za-z]+", text)]
    assert len(words) > 100
    return sum(word in known for word in words) / len(words)


def test_it_writes_words_of_its_training_text(model: colada.ColaDLM) -> None:
    assert share_of_known_words(model) > 0.85


def test_its_student_writes_them_too_in_four_evaluations_without_guidance() -> None:
    student = colada.load("bundled-few")
    assert share_of_known_words(student) > 0.85
    chosen = student.chosen({})
    assert (chosen["steps"], chosen["guidance"]) == (4, 1.0)
    with pytest.raises(colada.ColadaError, match=r"guidance=3.*built in"):
        student.generate("Once upon a time", 4, guidance=3.0)


def test_its_chat_model_answers_what_it_was_taught_and_ends_by_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat = colada.load("bundled-chat")
    for task in ("questions", "sums", "greeting", "identity"):
        asked, rule = list(instructions([], task, 32, seed=7)), reward_of(task)
        prompts = [chat.chat_prompt([{"role": "user", "content": one.prompt}]) for one in asked]
        done = chat.generate(prompts, 32, seed=0)
        right = sum(rule(one.prompt, answer.text) for one, answer in zip(asked, done, strict=True))
        assert right >= 28, task  # Of a share of .99; by chance, none.
        assert sum(answer.finish_reason == "end" for answer in done) >= 31, task
    assert main(["generate", "--chat", "What does a cow say?"]) == 0
    assert capsys.readouterr().out == "It says moo.\n"


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_batched_equals_one_by_one(model: colada.ColaDLM, guidance: float) -> None:
    def run(prompts: list[str], seeds: list[int]) -> tuple[list[tuple[int, ...]], list[torch.Tensor]]:
        first: list[torch.Tensor] = []

        def watch(step: TransportStep) -> None:
            if step.step == step.steps:
                first.append(step.latents)

        done = model.generate(prompts, 8, guidance=guidance, seed=seeds, end_ids=(), callback=watch)
        return [one.tokens for one in done], list(first[0])

    order = [2, 0, 3, 1]
    together, latents = run([PROMPTS[i] for i in order], order)
    for place, i in enumerate(order):
        alone, own = run([PROMPTS[i]], [i])
        assert alone[0] == together[place]
        assert relative_error([own[0]], [latents[place]]) < 1e-5
        if guidance == 1:  # v = 7c - 6u multiplies rounding by up to 13: 1.5e-5 absolutely.
            torch.testing.assert_close(own[0], latents[place], rtol=0, atol=1e-5)


def test_it_saves_and_loads_in_the_released_format(model: colada.ColaDLM, tmp_path: Path) -> None:
    model.save(tmp_path / "copy")
    again = colada.load(tmp_path / "copy")
    assert again.generate("The sun", 8, seed=3) == model.generate("The sun", 8, seed=3)
