import gzip
import json
import math
import re
from itertools import product
from pathlib import Path

import pytest

from colada.errors import ColadaError
from colada.evaluate.outputs import Output, read_outputs
from colada.evaluate.scoring import (
    answer_option,
    answer_segment,
    cut,
    is_correct,
    named_option,
    normalise,
    option_by_letter,
    option_by_text,
    similarity,
)
from colada.evaluate.statistics import average, score, wilson
from colada.evaluate.tasks import TASKS, THE_EIGHT, find_task

OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "official_outputs"
PUBLISHED = {
    "lambada": "50.80",
    "mmlu": "19.30",
    "obqa": "23.00",
    "hellaswag": "10.70",
    "race": "19.60",
    "siqa": "28.90",
    "squad": "30.90",
    "story_cloze": "30.77",
}
FRUIT = ("a red apple", "two pears", "Plum!", "one fig")


@pytest.fixture
def official() -> Path:
    if not OFFICIAL.is_dir():
        pytest.skip("no published outputs beside the repository (../shared/data/official_outputs)")
    return OFFICIAL


# --- the published outputs ------------------------------------------------------------------------------


def test_the_published_outputs_have_the_published_scores(official: Path) -> None:
    scores = [score(task, read_outputs(official / f"{task.name}.jsonl.gz", task)) for task in eight()]
    assert {own.task.name: f"{100 * own.share:.2f}" for own in scores} == PUBLISHED
    assert f"{100 * average(scores)[0]:.2f}" == "26.75"
    assert {name: f"{TASKS[name].published:.2f}" for name in THE_EIGHT} == PUBLISHED


def test_cutting_the_published_outputs_again_gives_their_two_parts(official: Path) -> None:
    for task in eight():
        with gzip.open(official / f"{task.name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for fields in map(json.loads, file):
                rest = fields.get("others")
                whole = fields["generate"] + ("" if rest is None else f"\n{rest}")
                assert cut(whole) == (fields["generate"], rest)


def test_the_released_model_is_at_chance_where_it_names_an_option(official: Path) -> None:
    for task in eight():
        naming = score(task, read_outputs(official / f"{task.name}.jsonl.gz", task)).naming
        assert (naming is None) == (task.name in ("lambada", "squad"))
        if naming is not None:
            low, high = naming.interval
            assert low < naming.chance < high


def test_published_outputs_are_not_taken_for_another_task(official: Path) -> None:
    for task, other in product(eight(), eight()):
        # mmlu and obqa are alike in all that a record says.
        if task is other or {task.name, other.name} == {"mmlu", "obqa"}:
            continue
        with pytest.raises(ColadaError, match=rf"{task.name}\.jsonl\.gz:1: .*{other.name}"):
            read_outputs(official / f"{task.name}.jsonl.gz", other)


def eight() -> list:
    return [find_task(name) for name in THE_EIGHT]


# --- cutting and normalising ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept", "rest"),
    [
        (" pears\nQuestion: what", " pears", "Question: what"),
        (" pears", " pears", None),
        ("\n \n... \n pears.\n", "\n \n... \n pears.", ""),
        ("\n\n", "\n\n", None),
        ("", "", None),
        ("_\nx", "_", "x"),  # \w
        ("二\nx", "二", "x"),
    ],
)
def test_cut(text: str, kept: str, rest: str | None) -> None:
    assert cut(text) == (kept, rest)


def test_normalise() -> None:
    assert normalise(" The\tRED,  apple!\n(or not) ") == "the red apple or not"
    assert normalise("don't, x_1 — 3.5") == "dont x_1 35"
    assert normalise("?!") == ""


def test_similarity_is_the_ratio_of_matching_characters() -> None:
    assert similarity("", "?!") == 1
    assert similarity("Two pears.", "two  PEARS") == 1
    assert similarity("abcd", "bcde") == 2 * 3 / 8
    assert similarity("abc", "") == 0


# --- letters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["b", " B ", "(B)", "[b]", "B.", "(B).", "[B]."])
def test_a_text_that_is_a_letter(text: str) -> None:
    assert option_by_letter(text, 4) == 1


@pytest.mark.parametrize("text", ["(B", "B]", "(B]", "B)", "B,", "BB", "2", "", "é"])
def test_a_text_that_is_no_letter(text: str) -> None:
    assert option_by_letter(text, 4) is None


@pytest.mark.parametrize(
    "text",
    [
        "The answer is C",
        "final answer: (C).",
        "answer=[c], since",
        "Answer C because of that",
        "the option\n= C",
        "choice\uff1aC!",  # full-width colon
        "ANSWER\uff1d C",
        "I thought of answer A, but choice is C; really",
    ],
)
def test_the_last_named_letter(text: str) -> None:
    assert option_by_letter(text, 4) == 2


@pytest.mark.parametrize(
    "text", ["answer Cat", "answers C", "myanswer C", "answer is: C", "answer C)", "answer"]
)
def test_no_named_letter(text: str) -> None:
    assert option_by_letter(text, 4) is None


def test_a_letter_in_brackets_counts_in_a_short_text_only() -> None:
    short = "not (A), it must be [D] I say"
    assert option_by_letter(short, 4) == 3
    assert option_by_letter(short + "." * (40 - len(short)), 4) == 3
    assert option_by_letter(short + "." * (41 - len(short)), 4) is None
    assert option_by_letter("not (A), it must be D", 4) == 0


def test_a_letter_beyond_the_options_gives_way_to_the_next_rule() -> None:
    assert option_by_letter("D", 3) is None
    assert option_by_letter("(D)", 3) is None
    assert option_by_letter("(A) the answer is D", 3) == 0  # c after b
    assert option_by_letter("(A) the answer is D", 4) == 3
    # The last one counts, not the last one that could.
    assert option_by_letter("answer A, answer D", 3) is None


# --- texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "TWO pears.",
        "answer: two pears",
        "The correct final answer is two pears",
        "the option = two pears",
        "Choice\uff1atwo pears",
        "I like two pears best",  # the only one contained
        "two paears",  # 0.95 alike
    ],
)
def test_the_option_that_a_text_spells(text: str) -> None:
    assert option_by_text(text, FRUIT) == 1


@pytest.mark.parametrize("text", ["two pears or one fig", "three bears", "", "the answer is"])
def test_no_option_that_a_text_spells(text: str) -> None:
    assert option_by_text(text, FRUIT) is None


def test_near_means_nine_tenths() -> None:
    ten = "abcdefghij"
    assert similarity("abcdefghi_", ten) == 0.9
    assert option_by_text("abcdefghi_", (ten, "other")) == 0
    assert option_by_text("abcdefgh__", (ten, "other")) is None
    # Of two that are near, the nearer.
    assert option_by_text("abcdefghik", ("abcdefghil", "abcdefghikl")) == 1


def test_equality_comes_before_containment_and_the_whole_before_the_remainder() -> None:
    assert option_by_text("red plum", ("red", "red plum", "plum")) == 1
    assert option_by_text("the answer is no", ("no", "the answer is no")) == 1
    # The remainder alone is searched: "answer" itself is not found in it.
    assert option_by_text("the answer is no good", ("answer", "no")) == 1
    assert option_by_text("the answer island life", ("island", "land")) is None


# --- reading outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "segment"),
    [
        ("Answer: pears", "pears"),
        ("I think\nfinal ANSWER is pears\nas said", "pears"),
        ("answer one\nanswer two\n\n", "two"),
        ("answer\uff1apears", "pears"),
        ("the answer\n pears", "the answer\n pears"),  # no text in that line
        ("so answered pears", "so answered pears"),
    ],
)
def test_the_answer_segment(output: str, segment: str) -> None:
    assert answer_segment(output) == segment


def test_the_segment_is_tried_before_the_whole_output() -> None:
    assert named_option("(A) is tempting\nanswer: D", FRUIT) == 3
    # The segment's text before the whole output's letter.
    assert named_option("(C)\nanswer: one fig", FRUIT) == 3
    # The segment names none.
    assert named_option("one fig\nanswer: none of them", FRUIT) == 3
    assert named_option("nothing here", FRUIT) is None


def test_an_option_is_right_if_it_is_the_answers_or_the_texts_are_equal() -> None:
    assert is_correct("option", " B", "two pears", FRUIT)
    assert not is_correct("option", " A", "two pears", FRUIT)
    assert not is_correct("option", " nothing of these", "two pears", FRUIT)
    # The answer's letter comes before its text, and equal texts count whatever was read.
    assert answer_option("B", ("B", "A")) == 1
    assert is_correct("option", "?", "!", ("x", "y"))


def test_whole_texts_and_first_words() -> None:
    assert is_correct("text", " Two  pears!", "two pears")
    assert not is_correct("text", " two pears and", "two pears")
    assert not is_correct("text", " B", "two pears", FRUIT)
    assert is_correct("first word", ' "Pears," he said', "pears")
    assert not is_correct("first word", " the pears", "pears")
    assert not is_correct("first word", "", "pears")


def test_record_427s_truth_is_its_first_word() -> None:
    assert is_correct("first word", " of course", "of\nPower")
    assert not is_correct("first word", " Power", "of\nPower")


# --- statistics -----------------------------------------------------------------------------------------


def outputs(generated: list[str], truth: list[int]) -> list[Output]:
    pairs = enumerate(zip(generated, truth, strict=True))
    return [Output(str(n), "?\nAnswer:", text, FRUIT[index], FRUIT) for n, (text, index) in pairs]


def test_a_score_and_what_it_hides() -> None:
    own = score(TASKS["obqa"], outputs(["A", "one fig", "what?", "A", "two pears"], [0, 3, 2, 1, 0]))
    assert (own.items, own.correct, own.share) == (5, 2, 0.4)
    assert own.error == pytest.approx(math.sqrt(0.4 * 0.6 / 5))
    naming = own.naming
    assert naming is not None
    assert (naming.named, naming.right, naming.accuracy, naming.chance) == (4, 2, 0.5, 0.25)
    assert (naming.picked, naming.truth) == ((2, 1, 0, 1), (2, 1, 1, 1))
    assert own.to_dict()["naming"]["share_named"] == 80
    json.dumps(own.to_dict(), allow_nan=False)


def test_no_output_names_an_option() -> None:
    own = score(TASKS["hellaswag"], outputs(["what?", ""], [0, 1]))
    assert own.naming is not None
    assert math.isnan(own.naming.accuracy)
    assert own.naming.interval == (0, 1)
    assert own.to_dict()["naming"]["accuracy"] is None


def test_naming_is_laxer_than_the_score_of_whole_texts() -> None:
    own = score(TASKS["hellaswag"], outputs(["B", "two pears"], [1, 1]))
    assert own.naming is not None
    assert (own.correct, own.naming.right) == (1, 2)


def test_wilson_holds_the_shares_that_do_not_exclude_what_was_seen() -> None:
    for successes, trials in ((0, 7), (3, 10), (50, 100), (7, 7)):
        grid = [n / 100_000 for n in range(100_001)]
        seen = successes / trials
        inside = [p for p in grid if abs(seen - p) <= 1.959964 * math.sqrt(p * (1 - p) / trials) + 1e-12]
        assert wilson(successes, trials) == pytest.approx((min(inside), max(inside)), abs=2e-5)


def test_the_average_counts_every_task_once() -> None:
    scores = [
        score(TASKS["obqa"], outputs(["A"] * 4, [0, 0, 1, 1])),
        score(TASKS["mmlu"], outputs(["A"], [0])),
    ]
    mean, error = average(scores)
    assert mean == 0.75
    assert error == pytest.approx(math.sqrt(0.25 / 4) / 2)


# --- files of outputs -----------------------------------------------------------------------------------

RELEASED = {
    "id": 3,
    "prompt": "Which?\n(A) a red apple\n(B) two pears\n(C) Plum!\n(D) one fig\nAnswer:",
    "generate": " Plum",
    "ground_truth": "Plum!",
    "choices": list(FRUIT),
    "few_shot_prefix": "Question: ",
}


def write(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_an_output_survives_its_file(tmp_path: Path) -> None:
    task = TASKS["mmlu"]
    own = Output("7", "Q?\nAnswer:", " 東京", "one fig", FRUIT, "Question: ", "x\ny", 5, (1, 2), "length")
    plain = Output("8", "Q?\nAnswer:", "", "one fig", FRUIT)
    (tmp_path / "mmlu.jsonl").write_text(own.line(task) + plain.line(task), encoding="utf-8")
    back = read_outputs(tmp_path / "mmlu.jsonl", task)
    assert back == [own, plain]
    with pytest.raises(ColadaError, match=r"mmlu\.jsonl:1: an output of task 'mmlu', expected 'obqa'"):
        read_outputs(tmp_path / "mmlu.jsonl", TASKS["obqa"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"generate": None}, "2: 'generate' is null, expected a string"),
        ({"id": 1.5}, "2: 'id' is 1.5, expected a string or a whole number"),
        ({"id": True}, "2: 'id' is true"),
        ({"choices": ["a", 2]}, "2: 'choices' holds 2, expected strings"),
        ({"choices": list(FRUIT[:3])}, "2: 3 choices, expected 4 choices for mmlu"),
        ({"ground_truth": "kiwi"}, "2: 'ground_truth' 'kiwi' is none of the choices"),
        ({"prompt": "Once\nEnd:"}, "2: 'prompt' ends in cue 'End:', expected 'Answer:'"),
        ({"few_shot_prefix": "Story: "}, "2: 'few_shot_prefix' ends in no 'Question: '"),
        ({"id": "3"}, "2: item '3' is there twice"),
    ],
)
def test_outputs_that_cannot_be_the_tasks(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = write(tmp_path / "mmlu.jsonl", RELEASED, {**RELEASED, "id": 4, **change})
    with pytest.raises(ColadaError, match=re.escape(f"{path}:{said}")):
        read_outputs(path, TASKS["mmlu"])


def test_a_missing_field_is_named_with_the_nearest(tmp_path: Path) -> None:
    record = {name: value for name, value in RELEASED.items() if name != "generate"}
    path = write(tmp_path / "mmlu.jsonl", {**record, "generated": ""})
    with pytest.raises(ColadaError, match=r":1: no field 'generate' \(did you mean 'generated'\?\)"):
        read_outputs(path, TASKS["mmlu"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = json.dumps(RELEASED) + "\n"
    for name, content, said in (
        (
            "half.jsonl",
            (whole + whole[:40]).encode(),
            "2 is not valid JSON.*has no line break: was its writing cut off",
        ),
        ("list.jsonl", b"[1]\n", "1 holds a list, expected a JSON object"),
        ("latin.jsonl", b'{"id": "\xe9"}\n', "1: byte 0xe9 at offset 8"),
        ("empty.jsonl", b"\n", " holds no output"),
        ("broken.jsonl.gz", gzip.compress(whole.encode())[:-9], " cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ColadaError, match=f"{re.escape(str(tmp_path / name))}.*{said}"):
            read_outputs(tmp_path / name, TASKS["mmlu"])
    with pytest.raises(ColadaError, match="no such file"):
        read_outputs(tmp_path / "none.jsonl", TASKS["mmlu"])
