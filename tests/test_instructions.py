"""Instructions with checkable answers: what is asked, what is right, and what is kept for tests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from colada.data.facts import CATEGORIES
from colada.data.instructions import (
    TASKS,
    WORDINGS,
    ask,
    distinct_pairs,
    facts_by_question,
    instructions,
    is_held_out,
    names_of,
    reward,
    reward_of,
    sentences_of,
)
from colada.errors import ColadaError

STORIES = (Path(__file__).parent / "data" / "stories.txt").read_text().split("\n\n")
STORIES += [
    "Once there was a girl named Mia. Mia had a red ball. She was happy. The end.",
    "Tom was a little boy. Tom saw a big dog. He ran home to his mum!",
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("held_out", [False, True])
def test_the_answers_that_are_taught_are_right_by_the_rule_that_judges(task: str, held_out: bool) -> None:
    samples = list(instructions(STORIES, task, 60, held_out=held_out))
    assert samples
    for sample in samples:
        assert reward(sample.prompt, sample.answer) == reward_of(task)(sample.prompt, sample.answer) == 1
        assert bool(sample.held_out) == held_out
    assert samples == list(instructions(STORIES, task, 60, held_out=held_out))
    other = list(instructions(STORIES, task, 60, seed=1, held_out=held_out))
    assert other != samples or len({sample.prompt for sample in samples}) == 1


def test_what_is_kept_for_tests_is_never_asked_in_training() -> None:
    for task in TASKS:
        taught = {sample.prompt for sample in instructions(STORIES, task, 3000)}
        kept = {sample.prompt for sample in instructions(STORIES, task, 3000, held_out=True)}
        assert not taught & kept
        if task in WORDINGS:
            last = WORDINGS[task][-1].split("{}")[0]
            assert all(prompt.startswith(last) for prompt in kept) or not last
    facts = {thing for category in CATEGORIES.values() for thing in category.pairs}
    unseen = {thing for thing in facts if is_held_out(thing)}
    assert 0.04 < len(unseen) / len(facts) < 0.2
    taught = {sample.prompt for sample in instructions(STORIES, "questions", 5000)}
    for category in CATEGORIES.values():
        for thing in category.pairs:
            asked = {ask(wording, thing) for wording in category.wordings[:-1]}
            assert asked.isdisjoint(taught) if is_held_out(thing) else asked <= taught


def test_every_closed_question_is_of_one_fact() -> None:
    count = Counter(
        (wording.format(thing)[0].upper() + wording.format(thing)[1:])
        for category in CATEGORIES.values()
        for thing in category.pairs
        for wording in category.wordings
    )
    assert max(count.values()) == 1
    assert len(facts_by_question()) == len(count) > 1300
    assert all(len(category.wordings) == 5 for category in CATEGORIES.values())


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("Write a story with the words: dog, red, jump.", "The dog was red. It can jump.", 1),
        ("Write a story with the words: dog, red, jump.", "The dogs were red.", 1 / 3),
        ("Write a story with the words: dog.", "dog dog dog dog dog dog", 0.7),
        ("Make up a story with cat and hat.", "A cat in a HAT!", 1),
        ("Write a story about a girl named Mia.", "One day Mia ran. Then Mia fell.", 1),
        ("Write a story about a girl named Mia.", "One day Mia ran.", 0.5),
        ("Write a story about a girl named Mia.", "One day Tom and Tom saw Mia and Tom with Mia.", 0),
        ("Write a story about a girl named Mia.", "A girl ran.", 0),
        ("Tell me a story in three sentences.", "He ran. She sat! Who \u201cwon?\u201d", 1),
        ("Tell me a story in three sentences.", "He ran. She sat!", 0.5),
        ("Tell me a story in three sentences.", "He ran.", 0),
        ("Tell me a story in one sentence.", "He ran and", 0.5),
        ("What is three plus four?", "It is seven.", 1),
        ("What is three plus four?", "7", 1),
        ("What is three plus four?", "Three plus four is eight.", 0),
        ("What is three plus four?", "I like it.", 0),
        ("What colour is grass?", "Grass is green!", 1),
        ("What colour is grass?", "It is greenish.", 0),
        ("How many legs has a dog?", "4", 1),
        ("Who are you?", "I am a small model that tells stories.", 1),
        ("Who are you?", "I am the king.", 0),
    ],
)
def test_rewards_by_hand(prompt: str, answer: str, expected: float) -> None:
    assert reward(prompt, answer) == pytest.approx(expected)


def test_parts_of_the_rules_by_hand() -> None:
    assert sentences_of('He said, "Go!" Then he went. And') == ['He said, "Go!"', "Then he went."]
    assert distinct_pairs("a b a b a b") == pytest.approx(2 / 5)
    assert distinct_pairs("one") == distinct_pairs("") == 1
    assert names_of("One day Mia saw Tom. Mia ran. She sat.") == {"Mia": 2, "Tom": 1}


def test_what_cannot_be_asked_is_named() -> None:
    with pytest.raises(ColadaError, match=r"task='word', expected one of words.*did you mean 'words'"):
        reward_of("word")
    with pytest.raises(ColadaError, match="task='poem'"):
        list(instructions(STORIES, "poem", 1))
    with pytest.raises(ColadaError, match="prompt 'Sing!', expected one of the tasks"):
        reward("Sing!", "la")
    with pytest.raises(ColadaError, match="prompt 'Hello!', expected one of the task 'sums'"):
        reward_of("sums")("Hello!", "1")
    with pytest.raises(ColadaError, match="a number to twenty"):
        reward("Tell me a story in many sentences.", "He ran.")
