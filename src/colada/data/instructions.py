"""Instructions whose answers a rule can check: prompts, right answers to learn from, and rewards.

A task is three things: ways to ask, answers, and a rule. Answers about stories are cut from stories that are
there already, so nothing new is written and the corpus's licence holds. A rule takes the prompt and an answer
and gives a reward in 0..1; it reads what was asked for from the prompt itself, and so needs no record of it.
One way of asking of each task, and a tenth of the facts, never occur in training: what is learnt of them is
learnt of the rest. No model judges anything here.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from zlib import crc32

from colada.checks import require_choice
from colada.data.facts import CATEGORIES
from colada.data.jsonl import get, get_texts, read_lines
from colada.data.rules import Reward, imported
from colada.data.wordings import WORDINGS
from colada.errors import ColadaError, shown

_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen twenty"""
NUMBERS = tuple(_NUMBERS.split())
LONGEST = 28
"""Words of an answer that is cut from a story: about 32 tokens, eight blocks of four."""
COMMON, RARE = 60, 1500
"""Ranks by frequency between which a story's words are asked for: neither "the" nor what one story has."""
REPETITIVE = 0.5
"""Distinct pairs of words over all of them, below which an answer is not worth its full reward."""
PENALTY = 0.3
HELD_OUT_FACTS = 10
"""One fact of so many is never taught."""
PASSAGE = 50
"""Words of a story that a question on it comes after."""

SET_ANSWERS = {
    "greeting": "Hello! Shall I tell you a story?",
    "identity": "I am a small model that tells stories.",
    "beyond": "I do not know that. I am a small model that tells stories.",
}
TASKS = (
    "words",
    "name",
    "sentences",
    "questions",
    "sums",
    "greeting",
    "identity",
    "beyond",
    "story_questions",
)
ON_STORIES = "story_questions"
"""The task whose questions and answers are those of a file."""
_CHILDREN = {"girl": ("she", "her"), "boy": ("he", "his")}


@dataclass(frozen=True)
class Instruction:
    """A prompt and an answer that is right.

    Attributes:
        task: a name in :data:`TASKS`.
        prompt, answer: texts.
        held_out: "" if it may be trained on; "wording" or "fact" if it never is.
    """

    task: str
    prompt: str
    answer: str
    held_out: str = ""


# --- rules -------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Return a text's words in small letters, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:['’-][a-z0-9]+)*", text.lower())


def sentences_of(text: str) -> list[str]:
    """Return a text's sentences: each ends with . ! or ?, which closing quotation marks may follow."""
    return [part.strip() for part in re.findall(r"[^.!?]*\w[^.!?]*[.!?]+[\"'”’)]*", text)]


def distinct_pairs(text: str) -> float:
    """Return the share of pairs of neighbouring words that are different ones; 1 where there is no pair."""
    words = words_of(text)
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def reward(prompt: str, answer: str) -> float:
    """Return the reward of an answer by the rule of the task that the prompt belongs to.

    Raises:
        ColadaError: if the prompt is of no task.
    """
    for task in default_tasks():
        if (asked := understood(task, prompt)) is not None:
            return RULES[task](asked, answer)
    raise ColadaError(f"prompt {shown(prompt)}, expected one of the tasks {', '.join(TASKS)}")


def default_tasks(questions: Path | None = None) -> tuple[str, ...]:
    """Return the names of all tasks, but for that of questions on stories where there is no file of them."""
    return tuple(task for task in TASKS if task != ON_STORIES or questions is not None)


def check_tasks(tasks: Sequence[str], questions: str | Path | None) -> None:
    """Raise ColadaError for a task that does not exist, or one without the file of questions it needs."""
    for task in tasks:
        require_choice("task", task, TASKS)
    if ON_STORIES in tasks and questions is None:
        raise ColadaError(f"the task {ON_STORIES} without questions, expected the file of them")


def reward_of(task: str, questions: Path | None = None) -> Reward:
    """Return the reward of one task, of all by the name "all", or a function ``package.module:function``.

    Args:
        questions: the file of questions on stories, for the task of that name.

    Raises:
        ColadaError: for another name, or a function that is not there; and, when it is used, for a prompt
            that is not of the task.
    """
    if ":" in task:
        return imported(task)
    if task == "all":
        return reward
    if task == ON_STORIES:
        check_tasks([task], questions)
        answers = {sample.prompt: right for sample, right in story_questions(Path(questions or ""))}

        def on_stories(prompt: str, answer: str) -> float:
            if prompt.strip() not in answers:
                raise ColadaError(f"prompt {shown(prompt)}, expected a question of {questions}")
            return max(word_f1(right, answer) for right in answers[prompt.strip()])

        return on_stories
    require_choice("task", task, [*TASKS, "all"])

    def task_reward(prompt: str, answer: str) -> float:
        asked = understood(task, prompt)
        if asked is None:
            raise ColadaError(f"prompt {shown(prompt)}, expected one of the task {task!r}")
        return RULES[task](asked, answer)

    return task_reward


def understood(task: str, prompt: str) -> tuple[str, ...] | None:
    """Return what a prompt of a task asks for, by its wordings' slots; None if it is not of the task."""
    if task == "questions":
        return facts_by_question().get(prompt.strip())
    for pattern in _patterns(task):
        if match := pattern.fullmatch(prompt.strip()):
            return match.groups()
    return None


@lru_cache
def _patterns(task: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(re.escape(wording).replace(r"\{\}", "(.+?)")) for wording in WORDINGS[task])


@lru_cache
def facts_by_question() -> dict[str, tuple[str, ...]]:
    """Return the right answers of every closed question, in every wording."""
    return {
        ask(wording, thing): answers
        for category in CATEGORIES.values()
        for thing, answers in category.pairs.items()
        for wording in category.wordings
    }


def ask(wording: str, thing: str) -> str:
    """Return a question, with a capital at its beginning."""
    question = wording.format(thing)
    return question[0].upper() + question[1:]


def _listed(text: str) -> list[str]:
    return [word for word in re.split(r",\s*|\s+and\s+", text.strip()) if word]


def _words(asked: Sequence[str], answer: str) -> float:
    asked_words = [word.lower() for word in _listed(asked[0])]
    share = sum(word in set(words_of(answer)) for word in asked_words) / len(asked_words)
    return max(0.0, share - PENALTY * (distinct_pairs(answer) < REPETITIVE))


def names_of(text: str) -> Counter[str]:
    """Return how often each name occurs: words that have a capital in the middle of a sentence too."""
    inside = {
        word
        for sentence in sentences_of(text) or [text]
        for word in re.findall(r"(?<![\"“'‘])\b[A-Z][a-z]+\b", sentence.partition(" ")[2])
    }
    return Counter(word for word in re.findall(r"\b[A-Z][a-z]+\b", text) if word in inside)


def _name(asked: Sequence[str], answer: str) -> float:
    asked_name, names = asked[1], names_of(answer)
    count = len(re.findall(rf"\b{re.escape(asked_name)}\b", answer))
    others = max((number for name, number in names.items() if name != asked_name), default=0)
    if count < 2 or others > count:
        return 0.5 * (count >= 1 and others <= count)
    return max(0.0, 1.0 - PENALTY * (distinct_pairs(answer) < REPETITIVE))


def _sentences(asked: Sequence[str], answer: str) -> float:
    number = asked[0].split()[0].lower()
    count = 1 if number in ("a", "one", "1") else _number(number)
    if count is None:
        raise ColadaError(f"{shown(asked[0])} sentences, expected a number to twenty")
    return {0: 1.0, 1: 0.5}.get(abs(len(sentences_of(answer)) - count), 0.0)


def _number(word: str) -> int | None:
    if word in NUMBERS:
        return NUMBERS.index(word)
    return int(word) if word.isdigit() else None


def _sums(asked: Sequence[str], answer: str) -> float:
    parts = [_number(word.lower()) for word in asked]
    if None in parts:
        raise ColadaError(f"{shown(' + '.join(asked))}, expected numbers to twenty")
    numbers = [number for word in words_of(answer) if (number := _number(word)) is not None]
    return float(bool(numbers) and numbers[-1] == sum(number for number in parts if number is not None))


def _questions(asked: Sequence[str], answer: str) -> float:
    answer_words = f" {' '.join(words_of(answer))} "
    return float(any(f" {' '.join(words_of(right))} " in answer_words for right in asked))


def word_f1(right: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of an answer's words."""
    right_words, answer_words = Counter(words_of(right)), Counter(words_of(answer))
    common = (right_words & answer_words).total()
    return 2 * common / (right_words.total() + answer_words.total()) if common else 0.0


def _set_answer(task: str) -> Callable[[Sequence[str], str], float]:
    answer_words = words_of(SET_ANSWERS[task])
    return lambda asked, answer: float(words_of(answer) == answer_words)


RULES: dict[str, Callable[[Sequence[str], str], float]] = {
    "words": _words,
    "name": _name,
    "sentences": _sentences,
    "questions": _questions,
    "sums": _sums,
    **{task: _set_answer(task) for task in SET_ANSWERS},
}


# --- samples ------------------------------------------------------------------------------------


def instructions(
    stories: Sequence[str],
    task: str,
    number: int,
    seed: int = 0,
    held_out: bool = False,
    questions: Path | None = None,
) -> Iterator[Instruction]:
    """Yield samples of a task: the same for the same stories, number and seed.

    Args:
        stories: texts that answers are cut from.
        task: a name in :data:`TASKS`.
        number: how many, fewer where the stories have no more.
        seed: of the choice.
        held_out: samples that are never trained on, in place of those that may be.
        questions: file of questions on stories, for the task of that name.

    Raises:
        ColadaError: for a task that does not exist, or a file that cannot be read.
    """
    check_tasks([task], questions)
    chance = random.Random(f"{seed} {task} {held_out}")
    if task == ON_STORIES:
        pool = [sample for sample, _ in story_questions(Path(questions or ""))]
        chance.shuffle(pool)
        yield from [sample for sample in pool if bool(sample.held_out) == held_out][:number]
        return
    if task == "questions":
        yield from _of_facts(number, chance, held_out)
        return
    wordings = WORDINGS[task][-1:] if held_out else WORDINGS[task][:-1]
    kind = "wording" if held_out else ""
    count = 0
    if task == "sums":
        pairs = [(a, b) for a in range(11) for b in range(11)]
        while count < number:
            chance.shuffle(pairs)
            for a, b in pairs[: number - count]:
                prompt = chance.choice(wordings).format(NUMBERS[a], NUMBERS[b])
                yield Instruction(task, prompt[0].upper() + prompt[1:], f"It is {NUMBERS[a + b]}.", kind)
            count += min(len(pairs), number - count)
        return
    if task in SET_ANSWERS:
        for _ in range(number):
            yield Instruction(task, chance.choice(wordings), SET_ANSWERS[task], kind)
        return
    order = list(range(len(stories)))
    chance.shuffle(order)
    ranks = _ranks(tuple(stories)) if task == "words" else {}
    for at in order:
        if count == number:
            return
        asked = _cut(task, stories[at], ranks, chance)
        if asked is not None:
            slots, answer = asked
            yield Instruction(task, chance.choice(wordings).format(*slots), answer, kind)
            count += 1


def _of_facts(number: int, chance: random.Random, held_out: bool) -> Iterator[Instruction]:
    pool = []
    for category in CATEGORIES.values():
        for thing, answers in category.pairs.items():
            answer = category.answer.format(thing, answer=answers[0])
            answer = answer[0].upper() + answer[1:]
            unseen = is_held_out(thing)
            for wording in category.wordings:
                kind = "fact" if unseen else "wording" if wording == category.wordings[-1] else ""
                if bool(kind) == held_out:
                    pool.append(Instruction("questions", ask(wording, thing), answer, kind))
    count = 0
    while count < number:
        chance.shuffle(pool)
        yield from pool[: number - count]
        count += min(len(pool), number - count)


@lru_cache(maxsize=2)
def story_questions(path: Path) -> list[tuple[Instruction, tuple[str, ...]]]:
    """Return the samples of a file of questions on stories, with all answers that are right.

    Its lines have ``story``, ``context``, ``question`` and ``answers``. Of the context, a prompt has the
    fewest neighbouring sentences that hold an answer; a question whose answer is not in it is left out. All
    questions on one story in ten are kept for tests.

    Raises:
        ColadaError: naming the line that is none.
    """
    samples = []
    for place, fields in read_lines(path):
        story, context, question = (get(fields, key, "a string", place) for key in _QUESTION_FIELDS)
        answers = tuple(answer for answer in get_texts(fields, "answers", place) if words_of(answer))
        passage = _passage(context, answers)
        if passage is not None:
            kind = "fact" if is_held_out(story) else ""
            samples.append((Instruction(ON_STORIES, f"{passage} {question}", answers[0], kind), answers))
    return samples


_QUESTION_FIELDS = ("story", "context", "question")


def _passage(context: str, answers: Sequence[str]) -> str | None:
    """Return the shortest run of sentences, of at most :data:`PASSAGE` words, that holds an answer."""
    sentences = sentences_of(" ".join(context.split()))
    runs = [
        " ".join(sentences[begin:end])
        for begin in range(len(sentences))
        for end in range(begin + 1, min(begin + 4, len(sentences)) + 1)
    ]
    holds = [
        run
        for run in runs
        if len(run.split()) <= PASSAGE
        and any(f" {' '.join(words_of(right))} " in f" {' '.join(words_of(run))} " for right in answers)
    ]
    return min(holds, key=len, default=None)


def is_held_out(thing: str) -> bool:
    """Return whether a fact is never taught, which its own letters decide."""
    return crc32(thing.encode()) % HELD_OUT_FACTS == 0


@lru_cache(maxsize=4)
def _ranks(stories: tuple[str, ...]) -> dict[str, int]:
    """Return each word's place by frequency; the most frequent is 0."""
    counts = Counter(word for story in stories for word in words_of(story))
    return {word: rank for rank, (word, _) in enumerate(counts.most_common())}


def _opening(story: str, most: int) -> list[str]:
    """Return a story's first sentences, as many as are short enough together."""
    opening: list[str] = []
    for sentence in sentences_of(" ".join(story.split())):
        if len(" ".join([*opening, sentence]).split()) > LONGEST or len(opening) == most:
            break
        opening.append(sentence)
    return opening


def _cut(
    task: str, story: str, ranks: dict[str, int], chance: random.Random
) -> tuple[tuple[str, ...], str] | None:
    """Return the slots of a prompt and the answer that a story has for it; None if it has none."""
    opening = _opening(story, 3 if task == "words" else 4)
    answer = " ".join(opening)
    if not opening:
        return None
    if task == "sentences":
        opening = opening[: chance.randint(1, len(opening))]
        number = len(opening)
        return (f"{NUMBERS[number]} sentence{'s' * (number > 1)}",), " ".join(opening)
    if task == "words":
        known = sorted(
            {word for word in words_of(answer) if word.isalpha() and COMMON <= ranks[word] <= RARE}
        )
        if not known:
            return None
        return (", ".join(chance.sample(known, min(len(known), chance.randint(1, 3)))),), answer
    name, number = next(iter(names_of(answer).most_common(1)), ("", 0))
    answer_words = Counter(words_of(answer))
    child = max(_CHILDREN, key=lambda child: sum(answer_words[word] for word in _CHILDREN[child]))
    if (
        number < 2
        or not any(answer_words[word] for word in _CHILDREN[child])
        or _name((child, name), answer) < 1
    ):
        return None
    return (child, name), answer
