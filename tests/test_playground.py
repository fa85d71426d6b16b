"""The playground in a browser: writing, holes, replay and comparisons, against a stand-in for the server."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from playground import START, begin, expect, finish, seen, select, told, until, write
from playground_double import Double, story

pytest_plugins = ["playground"]  # Its fixtures: a browser, a server, a page.

# --- writing ------------------------------------------------------------------------------------------


def test_it_writes_on_where_the_text_ends_and_shows_what_the_field_holds(page: Any, double: Double) -> None:
    text = write(page)
    assert text == seen(page) == told(double)
    assert double.asked[0] == {
        "model": "cola", "prompt": START, "max_tokens": 48, "seed": 0, "stream": True,
        "stream_options": {"include_usage": True}, "colada": {"guesses": True, "latents": "pca"},
    }  # fmt: skip
    expect(page.locator("#status")).to_contain_text("48 tokens · 192 solver steps")
    assert write(page, text).startswith(text)


def test_a_block_comes_into_focus_before_it_is_written(page: Any, double: Double) -> None:
    double.step_seconds = 2  # The first step is still shown when it is looked at, however busy the machine.
    begin(page)
    page.wait_for_selector("#ink .token")
    first = page.evaluate(
        "[...document.querySelectorAll('#ink .token')]"
        ".map(one => [one.dataset.level, one.style.getPropertyValue('--blur')])"
    )
    double.step_seconds = 0.02
    assert page.input_value("#text") == START
    assert len(first) == 4
    assert all(level == "1" and float(blur.removesuffix("px")) > 1.5 for level, blur in first)
    until(page, "document.querySelector('#text').value.length > 20")
    page.keyboard.press("Escape")
    finish(page)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Home")
    for _ in range(15):
        page.keyboard.press("]")
    blurs = page.evaluate(
        "[...document.querySelectorAll('#ink .token')].map(one => one.style.getPropertyValue('--blur'))"
    )
    assert max(float(blur.removesuffix("px")) for blur in blurs) < 0.8
    assert seen(page) == START + "".join(
        story({"model": "cola", "prompt": START, "max_tokens": 4, "seed": 0})
    )


def test_escape_stops_and_what_is_written_stays(page: Any, double: Double) -> None:
    double.step_seconds = 0.02
    begin(page)
    until(page, "document.querySelector('#text').value.length > 30")
    double.step_seconds = 0.3  # So that it is far from its end, however late the key comes.
    page.keyboard.press("Escape")
    finish(page)
    text = page.input_value("#text")
    assert told(double).startswith(text)
    assert 20 < len(text) < len(told(double))
    for _ in range(500):
        if not double.left:  # It hears of it when it writes again.
            page.wait_for_timeout(20)
    assert double.left == 1
    assert page.input_value("#text") == text
    expect(page.locator("#alert")).to_be_empty()


def test_the_same_seed_writes_the_same_again_the_next_and_undo_goes_back(page: Any, double: Double) -> None:
    text = write(page)
    page.click("#again")
    finish(page)
    assert page.input_value("#text") == told(double, seed=1) != text
    assert page.input_value("#set-seed") == "1"
    page.click("#undo")
    assert page.input_value("#text") == START
    page.fill("#set-seed", "0")
    page.click("#write")
    finish(page)
    assert page.input_value("#text") == text


def test_what_is_selected_stays_selected_while_more_is_written(page: Any, double: Double) -> None:
    double.step_seconds = 0.01
    begin(page)
    page.focus("#text")
    page.evaluate("document.querySelector('#text').setSelectionRange(5, 9)")
    finish(page)
    assert page.evaluate("[getSelection().toString(), document.querySelector('#text').selectionEnd]") == [
        "upon",
        9,
    ]


def test_in_a_comparison_too(visit: Callable[..., Any], double: Double) -> None:
    page = visit("#compare=1&b.steps=4")
    double.step_seconds = 0.01
    begin(page)
    until(page, "document.querySelector('[data-side=a] .ink').textContent.length > 60")
    page.evaluate(
        "(() => { const text = document.querySelector('[data-side=a] .ink span + span').firstChild;"
        " getSelection().setBaseAndExtent(text, 0, text, 7) })()"
    )
    until(page, "document.querySelector('[data-side=a] .ink').textContent.length > 120")
    assert page.evaluate("getSelection().toString()") == ", there"


def test_a_first_block_that_takes_long_is_waited_for(page: Any, double: Double) -> None:
    double.first_seconds = 1.5
    begin(page)
    expect(page.locator("#status")).to_have_text("waiting for a place…")
    finish(page)
    assert page.input_value("#text") == told(double)


def test_whole_sentences_are_said_and_guesses_are_not(page: Any, double: Double) -> None:
    write(page)
    spoken = page.evaluate(
        "[...document.querySelectorAll('#spoken span')].map(one => one.textContent.trim())"
    )
    assert page.get_attribute("#spoken", "aria-live") == "polite"
    assert page.get_attribute("#ink", "aria-hidden") == "true"
    assert len(spoken) > 2
    assert " ".join(spoken) == told(double).removeprefix(START).strip()
    assert all(sentence.endswith((".", "!")) for sentence in spoken[:-1])


@pytest.mark.parametrize(
    "words",
    [
        ["<script>window.broken = 1</script>", "<img src=x onerror=alert(1)>", " &amp;", "</span>"],
        [" שלום", " עולם", ".", " \u202eabc"],
        ["👩", "\u200d", "🚀", " e\u0301"],
        ["\n\n", "  a\tb", "\n", " ' \" \\ $HOME `x`"],
    ],
)
def test_text_is_text_whatever_it_holds(page: Any, double: Double, words: list[str]) -> None:
    double.words = words
    text = write(page, "A '\"$`\\ \n b")
    assert text == "A '\"$`\\ \n b" + "".join(words) == seen(page)
    assert page.evaluate("window.broken") is None
    page.click("#code")
    command = page.inner_text("#code-text")
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=20)
    assert "choices" in answer.stdout
    assert double.asked[-1]["prompt"] == "A '\"$`\\ \n b"


def test_the_text_that_is_seen_lies_under_the_text_that_is_edited(visit: Callable[..., Any]) -> None:
    for width in (320, 1280):
        page = visit(width=width)
        page.fill(
            "#text",
            f"{START} there\n\nwas a {'very ' * 60}long supercalifragilisticexpialidociously {'x' * 90}\n",
        )
        field, mirror = page.evaluate(
            "[document.querySelector('#text').scrollHeight, document.querySelector('#ink').offsetHeight]"
        )
        assert field == mirror > 200


# --- holes --------------------------------------------------------------------------------------------


def test_selected_words_are_rewritten_and_both_sides_stay(page: Any, double: Double) -> None:
    text = write(page)
    select(page, "mall red bo")  # Parts of words.
    expect(page.locator("#selected")).to_have_text("small red boat")
    expect(page.locator("#hole-size")).to_have_value("3")
    double.step_seconds = 0.02
    page.click("#rewrite")
    page.wait_for_selector("#ink .token")
    assert page.input_value("#text") == text
    finish(page)
    before, after = text.split(" small red boat")
    asked = double.asked[-1]
    assert (asked["prompt"], asked["suffix"], asked["max_tokens"]) == (before, after, 3)
    assert page.input_value("#text") == before + "".join(story(asked)) + after == seen(page)
    expect(page.locator("#selected")).not_to_have_text("small red boat")
    page.wait_for_timeout(300)  # It is counted.
    page.fill("#hole-size", "2")
    page.click("#again")
    finish(page)
    assert (double.asked[-1]["seed"], double.asked[-1]["max_tokens"]) == (1, 2)
    assert double.asked[-1]["suffix"] == after
    page.click("#undo")
    assert page.input_value("#text") == text
    select(page, "One day")
    page.click("#rewrite")
    finish(page)
    changed = page.input_value("#text")
    page.click("#keep")
    assert page.input_value("#text") == changed
    expect(page.locator("#after-run")).to_be_hidden()


def test_a_hole_that_is_not_filled_leaves_the_text_as_it_was(page: Any, double: Double) -> None:
    text = write(page)
    select(page, "small")
    double.breaks_after = 0
    page.click("#rewrite")
    finish(page)
    assert page.input_value("#text") == text == seen(page)
    expect(page.locator("#alert")).to_contain_text("before the answer ended")


def test_a_model_that_fills_no_holes_is_not_asked_to(visit: Callable[..., Any], double: Double) -> None:
    page = visit("#model=ar")
    write(page)
    assert "colada" not in double.asked[0]
    page.focus("#text")
    page.keyboard.press("Control+a")
    page.wait_for_timeout(250)
    expect(page.locator("#hole")).to_be_hidden()
    expect(page.locator("#set-steps")).to_have_count(0)


# --- replay -------------------------------------------------------------------------------------------


def test_every_step_is_there_to_go_back_to(page: Any, double: Double) -> None:
    text = write(page)
    page.focus("#scrubber")
    page.keyboard.press("Home")
    expect(page.locator("#moment")).to_have_text("block 1 · step 1 of 16")
    assert seen(page).startswith(START)
    assert page.locator("#ink .token").count() == 4
    for _ in range(16):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#moment")).to_have_text("block 1 · finished")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#moment")).to_have_text("block 2 · step 1 of 16")
    assert seen(page).startswith(text[: len(START) + 12])
    page.focus("#play")
    page.keyboard.press("[")
    expect(page.locator("#moment")).to_have_text("block 1 · finished")
    page.keyboard.press("End")
    expect(page.locator("#moment")).to_have_text("the end")
    assert seen(page) == text
    assert page.input_value("#text") == text


def test_playing_goes_from_the_first_step_to_the_end_and_pauses(visit: Callable[..., Any]) -> None:
    page = visit("#max_tokens=4")
    text = write(page)
    page.click("#play")
    expect(page.locator("#play")).to_have_attribute("aria-label", "Pause")
    until(page, "document.querySelector('#moment').textContent.includes('step 3')")
    expect(page.locator("#moment")).to_have_text("the end")
    expect(page.locator("#play")).to_have_attribute("aria-label", "Play")
    assert seen(page) == text


def test_latents_are_a_picture_that_answers_to_pointer_and_keys(page: Any) -> None:
    write(page)
    weave = page.locator("#weave")
    box = weave.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 5.5 / 48, box["y"] + box["height"] * 8.5 / 17)
    expect(page.locator("#caption")).to_contain_text(
        re.compile(r"latent 6 · “.+”, \d+% sure · block 2 · step 8 of 16")
    )
    page.mouse.down()
    expect(page.locator("#moment")).to_have_text("block 2 · step 8 of 16")
    page.mouse.up()
    weave.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#moment")).to_have_text("block 2 · step 9 of 16")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "latent 9" in page.get_attribute("#weave", "aria-valuetext")
    page.click("#table-box summary")
    rows = page.locator("#table tbody tr")
    expect(rows).to_have_count(4)
    assert [float(part) for part in rows.first.locator("td").all_inner_texts()[-3:]]
    colours = page.evaluate(
        "(() => { const canvas = document.querySelector('#weave canvas');"
        " const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        " return new Set(new Uint32Array(data.buffer)).size })()"
    )
    assert colours > 300


# --- two side by side ---------------------------------------------------------------------------------


def test_two_settings_are_compared_one_after_the_other(visit: Callable[..., Any], double: Double) -> None:
    page = visit()
    page.click("#mode-two")
    page.click("#sides [data-side=b]")
    page.fill("#set-steps", "4")
    write(page)
    first, second = double.asked
    assert "steps" not in first["colada"]
    assert second["colada"]["steps"] == 4
    assert first["seed"] == second["seed"]
    texts = [page.inner_text(f"[data-side={side}] .ink") for side in "ab"]
    words = [story(first), story(second)]
    assert texts == [START + "".join(one) for one in words]
    marked = [page.locator(f"[data-side={side}] mark").all_inner_texts() for side in "ab"]
    changed = [left.strip() for left, right in zip(*words, strict=True) if left != right]
    assert marked[0]
    assert " ".join(changed) == " ".join(marked[0])
    assert "solver steps" in page.inner_text("[data-side=b] .figures")
    assert page.inner_text("[data-side=b] .summary") == "cola · steps 4"
    page.focus("#scrubber")
    page.keyboard.press("Home")
    assert len(page.inner_text("[data-side=a] .ink")) < 60
    page.keyboard.press("End")
    assert page.inner_text("[data-side=a] .ink") == texts[0]


def test_cola_is_compared_with_an_autoregressive_model(visit: Callable[..., Any], double: Double) -> None:
    page = visit("#compare=1&b.model=ar")
    write(page)
    assert [asked["model"] for asked in double.asked] == ["cola", "ar"]
    assert "colada" not in double.asked[1]
    figures = page.inner_text("[data-side=b] .figures")
    assert "tokens/s" in figures
    assert "solver" not in figures
    expect(page.locator("[data-side=b] .weave")).to_be_hidden()


# --- the same from elsewhere --------------------------------------------------------------------------


def test_copied_code_is_the_request_of_the_text_that_is_shown(
    visit: Callable[..., Any], double: Double
) -> None:
    double.key = "secret"
    page = visit("#steps=8&temperature=0.5&guidance_interval=0,0.5&stop=Mia")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#set-steps")
    text = write(page)
    page.click("#code")
    command = page.inner_text("#code-text")
    assert "secret" not in command
    answer = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
        env={"COLADA_API_KEY": "secret", "PATH": "/usr/bin:/bin"},
    )
    assert START + ast.literal_eval(answer.stdout.replace("null", "None"))["choices"][0]["text"] == text
    asked, again = double.asked
    assert again.pop("colada") == {"steps": 8, "guidance_interval": [0, 0.5]}
    assert {**asked, "colada": None} == {
        **again,
        "stream": True,
        "stream_options": {"include_usage": True},
        "colada": None,
    }
    page.click("[data-language=python]")
    tree = ast.parse(page.inner_text("#code-text"))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("create")
    ]
    fields = {argument.arg: ast.literal_eval(argument.value) for argument in call.keywords}
    assert fields.pop("extra_body") == {"colada": {"steps": 8, "guidance_interval": [0, 0.5]}}
    assert fields == again
    page.click("[data-language=json]")
    assert '"finish": "length"' in page.inner_text("#code-text")
