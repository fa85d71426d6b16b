"""Instructions with checkable answers: what is asked, what is right, and what is kept for tests."""

from __future__ import annotations

import difflib
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from colada.data.facts import CATEGORIES
from colada.data.instructions import (
    ON_STORIES,
    ask,
    default_tasks,
    distinct_pairs,
    facts_by_question,
    instructions,
    is_held_out,
    names_of,
    reward,
    reward_of,
    sentences_of,
    story_questions,
)
from colada.data.rules import met_in, rewarded
from colada.data.wordings import WORDINGS
from colada.errors import ColadaError

STORIES = (Path(__file__).parent / "data" / "stories.txt").read_text().split("\n\n")
STORIES += [
    "Once there was a girl named Mia. Mia had a red ball. She was happy. The end.",
    "Tom was a little boy. Tom saw a big dog. He ran home to his mum!",
]


@pytest.mark.parametrize("task", default_tasks())
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
    for task in default_tasks():
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
    assert all(len(category.wordings) == 11 for category in CATEGORIES.values())


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
    with pytest.raises(ColadaError, match=r"task='word', expected one of 'words'.*did you mean 'words'"):
        reward_of("word")
    with pytest.raises(ColadaError, match="task='poem'"):
        list(instructions(STORIES, "poem", 1))
    with pytest.raises(ColadaError, match="prompt 'Sing!', expected one of the tasks"):
        reward("Sing!", "la")
    with pytest.raises(ColadaError, match="prompt 'Hello!', expected one of the task 'sums'"):
        reward_of("sums")("Hello!", "1")
    with pytest.raises(ColadaError, match="a number to twenty"):
        reward("Tell me a story in many sentences.", "He ran.")


def test_questions_on_stories_come_after_a_passage_that_answers_them(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    context = "Ann saw a fox. It was red! She ran home. " + "They sat by the fire and told tales. " * 9
    lines = [
        {
            "story": f"story {n}",
            "context": context,
            "question": f"Who ran {n}?",
            "answers": ["the fox", "a fox"],
        }
        for n in range(40)
    ]
    lines.append({"story": "other", "context": context, "question": "Why?", "answers": ["it rained"]})
    file.write_text("\n".join(map(json.dumps, lines)))
    taught, kept = (
        list(instructions([], ON_STORIES, 99, held_out=own, questions=file)) for own in (False, True)
    )
    assert len(taught) + len(kept) == 40
    assert 0 < len(kept) < 10
    assert taught[0].prompt.startswith("Ann saw a fox. Who ")
    judge = reward_of(ON_STORIES, file)
    assert judge(taught[0].prompt, "A fox.") == 1
    assert judge(taught[0].prompt, "It was a red fox") == pytest.approx(2 * 2 / (2 + 5))
    assert judge(taught[0].prompt, "nobody") == 0
    with pytest.raises(ColadaError, match=r"prompt 'Why\?', expected a question of"):
        judge("Why?", "x")
    with pytest.raises(ColadaError, match="without questions, expected the file"):
        reward_of(ON_STORIES)
    file.write_text('{"story": "x", "context": "y"}')
    story_questions.cache_clear()
    with pytest.raises(ColadaError, match=r"questions.jsonl:1: no field 'question'"):
        reward_of(ON_STORIES, file)


def test_a_rule_of_ones_own_is_found_by_name_and_its_faults_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rewarded(lambda prompt, answer: len(answer) / 2, "half", "p", "abc") == 1.5
    for broken, said in (
        (lambda p, a: 1 / 0, "failed: division by zero"),
        (lambda p, a: float("nan"), "nan"),
    ):
        with pytest.raises(ColadaError, match=rf"the reward mine of prompt 'Sing!' .*{said}"):
            rewarded(broken, "mine", "Sing!", "la")
    with pytest.raises(ColadaError, match="of prompt 'Sing!' is 'good', expected a number"):
        rewarded(lambda p, a: "good", "mine", "Sing!", "la")  # type: ignore[arg-type, return-value]
    assert reward_of("difflib:get_close_matches") is difflib.get_close_matches
    with pytest.raises(ColadaError, match=r"has no function 'get_clos_matches'.*did you mean"):
        reward_of("difflib:get_clos_matches")
    with pytest.raises(ColadaError, match="cannot import 'no_such_thing'"):
        reward_of("no_such_thing:f")
    (tmp_path / "broken_rule.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ColadaError, match=r"cannot import 'broken_rule': .*syntax"):
        reward_of("broken_rule:f")


def test_what_met_a_rule_is_the_last_piece_that_changed_the_reward() -> None:
    """Words that are wanted, in pieces of a text that end anywhere: against a search from the beginning."""
    wanted, prompt = {"dog", "red", "jump"}, "Write a story with the words: dog, red, jump."
    chance, rule, found = random.Random(0), reward_of("words"), set[int | None]()
    known = ["a", "dogs", "dog", "redder", "red", "ran", "jump", "jumped", "the", "cat", "sat"]
    for _ in range(300):
        text = " ".join(chance.choice(known) for _ in range(9))
        cuts = [*sorted(chance.sample(range(1, len(text)), 5)), len(text)]
        shares = [len(wanted & set(text[:cut].split(" "))) for cut in cuts]
        expected = next(n for n in range(6) if len(set(shares[n:])) == 1) if shares[-1] else None
        met = met_in(lambda answer: rule(prompt, answer), [text[:cut] for cut in cuts])
        assert met == expected
        found.add(met)
    assert found == {None, *range(6)}
