"""The playground in a browser: what a person sees and presses, against a stand-in for the server."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

import colada
from playground_double import STATIC, Double, story

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)

START = "Once upon a time"
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
expect = sync_api.expect
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def server() -> Iterator[Double]:
    double = Double()
    yield double
    double.shutdown()
    double.server_close()


@pytest.fixture
def visit(browser: Any, server: Double) -> Iterator[Callable[..., Any]]:
    """Opens the page; whatever it asks for is its own server's, and nothing in it fails."""
    contexts, faults = [], []

    def open_page(
        hash: str = "", width: int = 1280, height: int = 900, address: str = server.url, **options: Any
    ) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)  # Two cores may be busy with other tests.
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if "Security" in line.text else None)
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((address, "data:")) else faults.append(request.url)
            ),
        )
        page.goto(address + hash)
        page.wait_for_selector("#health[data-state=ready]", timeout=90_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(visit: Callable[..., Any]) -> Any:
    return visit()


def begin(page: Any, text: str = START) -> None:
    page.fill("#text", text)
    page.click("#write")


def finish(page: Any) -> None:
    page.wait_for_selector("#write:visible")


def write(page: Any, text: str = START) -> str:
    begin(page, text)
    finish(page)
    return str(page.input_value("#text"))


def select(page: Any, words: str) -> None:
    start = page.input_value("#text").index(words)
    page.focus("#text")
    page.evaluate(
        "([from, to]) => document.querySelector('#text').setSelectionRange(from, to)",
        [start, start + len(words)],
    )
    page.wait_for_selector("#hole:visible")


def until(page: Any, expression: str) -> None:
    """Wait until an expression holds; the page's own policy forbids what ``wait_for_function`` does."""
    for _ in range(1500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"never: {expression}")


def seen(page: Any) -> str:
    return str(page.evaluate("document.querySelector('#ink').textContent"))


def told(server: Double, **changes: Any) -> str:
    body = {"model": "cola", "prompt": START, "max_tokens": 48, "seed": 0}
    return START + "".join(story({**body, **changes}))


# --- writing ------------------------------------------------------------------------------------------


def test_it_writes_on_where_the_text_ends_and_shows_what_the_field_holds(page: Any, server: Double) -> None:
    text = write(page)
    assert text == seen(page) == told(server)
    assert server.asked[0] == {
        "model": "cola", "prompt": START, "max_tokens": 48, "seed": 0, "stream": True,
        "stream_options": {"include_usage": True}, "colada": {"guesses": True, "latents": "pca"},
    }  # fmt: skip
    expect(page.locator("#status")).to_contain_text("48 tokens · 192 solver steps")
    assert write(page, text).startswith(text)


def test_a_block_comes_into_focus_before_it_is_written(page: Any, server: Double) -> None:
    server.step_seconds = 0.05
    begin(page)
    page.wait_for_selector("#ink .token")
    first = page.evaluate(
        "[...document.querySelectorAll('#ink .token')]"
        ".map(one => [one.dataset.level, one.style.getPropertyValue('--blur')])"
    )
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


def test_escape_stops_and_what_is_written_stays(page: Any, server: Double) -> None:
    server.step_seconds = 0.02
    begin(page)
    until(page, "document.querySelector('#text').value.length > 30")
    page.keyboard.press("Escape")
    finish(page)
    text = page.input_value("#text")
    assert told(server).startswith(text)
    assert 20 < len(text) < len(told(server))
    page.wait_for_timeout(200)
    assert server.left == 1
    assert page.input_value("#text") == text
    expect(page.locator("#alert")).to_be_empty()


def test_the_same_seed_writes_the_same_again_the_next_and_undo_goes_back(page: Any, server: Double) -> None:
    text = write(page)
    page.click("#again")
    finish(page)
    assert page.input_value("#text") == told(server, seed=1) != text
    assert page.input_value("#set-seed") == "1"
    page.click("#undo")
    assert page.input_value("#text") == START
    page.fill("#set-seed", "0")
    page.click("#write")
    finish(page)
    assert page.input_value("#text") == text


def test_what_is_selected_stays_selected_while_more_is_written(page: Any, server: Double) -> None:
    server.step_seconds = 0.01
    begin(page)
    page.focus("#text")
    page.evaluate("document.querySelector('#text').setSelectionRange(5, 9)")
    finish(page)
    assert page.evaluate("[getSelection().toString(), document.querySelector('#text').selectionEnd]") == [
        "upon",
        9,
    ]


def test_in_a_comparison_too(visit: Callable[..., Any], server: Double) -> None:
    page = visit("#compare=1&b.steps=4")
    server.step_seconds = 0.01
    begin(page)
    until(page, "document.querySelector('[data-side=a] .ink').textContent.length > 60")
    page.evaluate(
        "(() => { const text = document.querySelector('[data-side=a] .ink span + span').firstChild;"
        " getSelection().setBaseAndExtent(text, 0, text, 7) })()"
    )
    until(page, "document.querySelector('[data-side=a] .ink').textContent.length > 120")
    assert page.evaluate("getSelection().toString()") == ", there"


def test_a_first_block_that_takes_long_is_waited_for(page: Any, server: Double) -> None:
    server.first_seconds = 1.5
    begin(page)
    expect(page.locator("#status")).to_have_text("waiting for a place…")
    finish(page)
    assert page.input_value("#text") == told(server)


def test_whole_sentences_are_said_and_guesses_are_not(page: Any, server: Double) -> None:
    write(page)
    spoken = page.evaluate(
        "[...document.querySelectorAll('#spoken span')].map(one => one.textContent.trim())"
    )
    assert page.get_attribute("#spoken", "aria-live") == "polite"
    assert page.get_attribute("#ink", "aria-hidden") == "true"
    assert len(spoken) > 2
    assert " ".join(spoken) == told(server).removeprefix(START).strip()
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
def test_text_is_text_whatever_it_holds(page: Any, server: Double, words: list[str]) -> None:
    server.words = words
    text = write(page, "A '\"$`\\ \n b")
    assert text == "A '\"$`\\ \n b" + "".join(words) == seen(page)
    assert page.evaluate("window.broken") is None
    page.click("#code")
    command = page.inner_text("#code-text")
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=20)
    assert "choices" in answer.stdout
    assert server.asked[-1]["prompt"] == "A '\"$`\\ \n b"


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


def test_selected_words_are_rewritten_and_both_sides_stay(page: Any, server: Double) -> None:
    text = write(page)
    select(page, "mall red bo")  # Parts of words.
    expect(page.locator("#selected")).to_have_text("small red boat")
    expect(page.locator("#hole-size")).to_have_value("3")
    server.step_seconds = 0.02
    page.click("#rewrite")
    page.wait_for_selector("#ink .token")
    assert page.input_value("#text") == text
    finish(page)
    before, after = text.split(" small red boat")
    asked = server.asked[-1]
    assert (asked["prompt"], asked["suffix"], asked["max_tokens"]) == (before, after, 3)
    assert page.input_value("#text") == before + "".join(story(asked)) + after == seen(page)
    expect(page.locator("#selected")).not_to_have_text("small red boat")
    page.wait_for_timeout(300)  # It is counted.
    page.fill("#hole-size", "2")
    page.click("#again")
    finish(page)
    assert (server.asked[-1]["seed"], server.asked[-1]["max_tokens"]) == (1, 2)
    assert server.asked[-1]["suffix"] == after
    page.click("#undo")
    assert page.input_value("#text") == text
    select(page, "One day")
    page.click("#rewrite")
    finish(page)
    changed = page.input_value("#text")
    page.click("#keep")
    assert page.input_value("#text") == changed
    expect(page.locator("#after-run")).to_be_hidden()


def test_a_hole_that_is_not_filled_leaves_the_text_as_it_was(page: Any, server: Double) -> None:
    text = write(page)
    select(page, "small")
    server.breaks_after = 0
    page.click("#rewrite")
    finish(page)
    assert page.input_value("#text") == text == seen(page)
    expect(page.locator("#alert")).to_contain_text("before the answer ended")


def test_a_model_that_fills_no_holes_is_not_asked_to(visit: Callable[..., Any], server: Double) -> None:
    page = visit("#model=ar")
    write(page)
    assert "colada" not in server.asked[0]
    page.focus("#text")
    page.keyboard.press("Control+a")
    page.wait_for_timeout(250)
    expect(page.locator("#hole")).to_be_hidden()
    expect(page.locator("#set-steps")).to_have_count(0)


# --- replay -------------------------------------------------------------------------------------------


def test_every_step_is_there_to_go_back_to(page: Any, server: Double) -> None:
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


def test_two_settings_are_compared_one_after_the_other(visit: Callable[..., Any], server: Double) -> None:
    page = visit()
    page.click("#mode-two")
    page.click("#sides [data-side=b]")
    page.fill("#set-steps", "4")
    write(page)
    first, second = server.asked
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


def test_cola_is_compared_with_an_autoregressive_model(visit: Callable[..., Any], server: Double) -> None:
    page = visit("#compare=1&b.model=ar")
    write(page)
    assert [asked["model"] for asked in server.asked] == ["cola", "ar"]
    assert "colada" not in server.asked[1]
    figures = page.inner_text("[data-side=b] .figures")
    assert "tokens/s" in figures
    assert "solver" not in figures
    expect(page.locator("[data-side=b] .weave")).to_be_hidden()


# --- the same from elsewhere --------------------------------------------------------------------------


def test_copied_code_is_the_request_of_the_text_that_is_shown(
    visit: Callable[..., Any], server: Double
) -> None:
    server.key = "secret"
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
    asked, again = server.asked
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


# --- when it does not go well -------------------------------------------------------------------------


def test_a_full_queue_is_said_and_asked_again_when_it_may_be(page: Any, server: Double) -> None:
    server.refusal = (429, "queue_full", "The queue is full.", 2)
    begin(page)
    expect(page.locator("[role=alert]")).to_contain_text("The queue is full.")
    again = page.locator("#alert button")
    expect(again).to_be_disabled()
    expect(again).to_have_text("Again now")
    assert page.input_value("#text") == START
    again.click()
    page.wait_for_selector("#stop:visible, #again:visible")
    finish(page)
    assert page.input_value("#text") == told(server)


def test_too_many_watchers_may_write_without_watching(page: Any, server: Double) -> None:
    server.refusal = (429, "too_many_watchers", "Eight watch already.", 5)
    begin(page)
    page.click("text=Write without watching")
    page.wait_for_selector("#again:visible")
    assert page.input_value("#text") == told(server)
    assert "colada" not in server.asked[-1]


def test_a_wrong_value_is_said_in_the_servers_words(page: Any, server: Double) -> None:
    text = write(page)
    server.refusal = (400, "context_length_exceeded", "a prompt of 9000 tokens, expected at most 8192", None)
    page.click("#write")
    expect(page.locator("#alert")).to_have_text("a prompt of 9000 tokens, expected at most 8192")
    assert page.input_value("#text") == text
    expect(page.locator("#undo")).to_be_visible()


def test_a_key_is_asked_for_and_kept_nowhere(visit: Callable[..., Any], server: Double) -> None:
    server.key = "secret"
    page = visit()
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_have_value("")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#set-steps")
    assert write(page) == told(server)
    assert "secret" not in page.url
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_a_lost_connection_keeps_what_was_written(page: Any, server: Double) -> None:
    server.breaks_after = 3
    text = write(page)
    assert text == START + "".join(story({"model": "cola", "prompt": START, "max_tokens": 12}))
    expect(page.locator("#alert")).to_contain_text("before the answer ended")
    server.breaks_after = None
    page.click("#undo")
    assert write(page) == told(server)
    expect(page.locator("#alert")).to_be_empty()


def test_a_server_that_is_away_is_said_and_found_again(visit: Callable[..., Any], server: Double) -> None:
    page = visit()
    page.route("**/*", lambda route: route.abort())
    begin(page)
    expect(page.locator("#alert")).to_contain_text("The server does not answer.")
    expect(page.locator("#health-text")).to_have_text("no answer")
    page.unroute("**/*")
    page.click("#alert button")
    page.wait_for_selector("#again:visible")
    assert page.input_value("#text") == told(server)
    expect(page.locator("#health-text")).to_have_text("ready")


# --- settings -----------------------------------------------------------------------------------------


def test_settings_are_in_the_address_and_texts_are_not(visit: Callable[..., Any], server: Double) -> None:
    page = visit()
    page.fill("#set-steps", "5")
    page.fill("#set-guidance", "2.5")
    page.click("#die")
    write(page, "a private text")
    seed = page.input_value("#set-seed")
    assert page.url == f"{server.url}#steps=5&guidance=2.5&seed={seed}"
    again = visit(page.url.removeprefix(server.url))
    assert [again.input_value(f"#set-{name}") for name in ("steps", "guidance", "seed")] == ["5", "2.5", seed]
    again.click("#reset")
    assert again.url == server.url
    assert again.input_value("#set-steps") == "16"


def test_settings_out_of_their_bounds_are_not_taken(visit: Callable[..., Any], server: Double) -> None:
    page = visit(
        "#steps=0&guidance=x&seed=-1&temperature=1e999&top_p=&guidance_interval=1,0&nothing=1&model=none"
    )
    write(page)
    assert server.asked[0]["colada"] == {"guesses": True, "latents": "pca"}
    assert "none" not in page.url
    page.fill("#set-steps", "65")
    assert page.evaluate("document.querySelector('#set-steps').validationMessage") == "from 1 to 64"
    page.keyboard.press("Tab")
    assert page.input_value("#set-steps") == "16"
    page.evaluate(
        "(() => { const range = document.querySelector('.field.slider [aria-label=Steps]'); range.value = 9;"
        " range.dispatchEvent(new Event('input', { bubbles: true })) })()"
    )
    assert page.input_value("#set-steps") == "9"


# --- for everybody ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit: Callable[..., Any], scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    ).Axe()

    def check(page: Any, state: str) -> None:
        page.wait_for_timeout(150)
        found = axe.run(page).response["violations"]
        assert not found, (state, [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found])

    page = visit(color_scheme=scheme)
    check(page, "empty")
    write(page)
    page.click("#more summary")
    page.click("#table-box summary")
    check(page, "written")
    page.focus("#scrubber")
    page.keyboard.press("Home")
    check(page, "replay")
    page.keyboard.press("End")
    page.click("#code")
    check(page, "code")
    page.keyboard.press("Escape")
    page.click("#help")
    check(page, "help")
    page.keyboard.press("Escape")
    page.click("#mode-two")
    page.click("#sides [data-side=b]")
    page.fill("#set-steps", "4")
    write(page)
    check(page, "compared")


@pytest.mark.parametrize("width", [320, 390])
def test_a_narrow_screen_shows_all_of_it(visit: Callable[..., Any], width: int) -> None:
    page = visit(width=width, height=640)
    page.click("#settings summary")
    page.click("#more summary")

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        small = page.evaluate(
            "[...document.querySelectorAll('button, input:not([type=checkbox]), select, summary, textarea')]"
            ".filter(one => one.offsetParent).map(one => [one.id, one.getBoundingClientRect()])"
            ".filter(([, box]) => box.height < 24 || box.width < 24)"
            ".map(([id]) => id)"
        )
        assert small == []

    check()
    write(page)
    page.click("#table-box summary")
    select(page, "red boat")
    check()
    page.click("#code")
    check()
    page.keyboard.press("Escape")
    page.click("#mode-two")
    write(page)
    check()


def test_all_of_it_works_with_the_keyboard_alone(page: Any, server: Double) -> None:
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "text":
            break
    page.keyboard.type(START)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#again:visible")
    text = page.input_value("#text")
    assert text == told(server)
    page.keyboard.press("Control+Home")
    for _ in range(5):
        page.keyboard.press("Control+ArrowRight")
    page.keyboard.press("Shift+Control+ArrowRight")
    page.wait_for_selector("#hole:visible")
    page.keyboard.press("Alt+r")
    page.wait_for_selector("#keep:visible")
    assert server.asked[-1]["prompt"] + server.asked[-1]["suffix"] != text
    assert page.input_value("#text").endswith(server.asked[-1]["suffix"])
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") in ("write", "rewrite")
    page.keyboard.press("?")
    expect(page.locator("#help-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help-dialog")).to_be_hidden()


def test_nothing_is_blurred_for_who_wants_no_motion(visit: Callable[..., Any], server: Double) -> None:
    page = visit(reduced_motion="reduce")
    server.step_seconds = 0.05
    begin(page)
    page.wait_for_selector("#ink .token")
    blurs = page.evaluate(
        "[...document.querySelectorAll('#ink .token b > span')].map(one => getComputedStyle(one).filter)"
    )
    assert set(blurs) == {"blur(0px)"}


def test_the_colour_scheme_is_the_systems_until_it_is_switched(visit: Callable[..., Any]) -> None:
    page = visit(color_scheme="dark")
    colour = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) != dark
    page.click("#theme")
    assert page.evaluate(colour) == dark
    assert page.url.endswith("#theme=dark")


def test_without_javascript_it_says_what_to_do(browser: Any, server: Double) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("noscript p")).to_contain_text("curl -s")
    context.close()


def test_the_files_are_small_and_refer_to_nothing_elsewhere() -> None:
    files = list(STATIC.iterdir())
    assert sorted(file.name for file in files) == ["index.html", "playground.css", "playground.js"]
    assert sum(file.stat().st_size for file in files) < 84_000
    for file in files:
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`)]*", file.read_text(encoding="utf-8"))
        assert [address for address in addresses if "www.w3.org" not in address] == []
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert " style=" not in page
    assert not re.search(r" on\w+=|<style|<script(?! type=\"module\" src=)", page)
    assert not re.search(
        r"innerHTML|insertAdjacentHTML|document\.write|eval\(",
        (STATIC / "playground.js").read_text(encoding="utf-8"),
    )


# --- and the server itself ------------------------------------------------------------------------------


@pytest.fixture
def real_address() -> Iterator[str]:
    """Of ``colada serve`` with the bundled model."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    command = [sys.executable, "-m", "colada", "serve", "--port", "0", "--log", "off"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = re.search(r"http://\S+:\d+", process.stderr.readline())
        assert address is not None
        for _ in range(900):
            with suppress(OSError), urllib.request.urlopen(f"{address[0]}/ready", timeout=5):
                break
            time.sleep(0.1)
        yield f"{address[0]}/"
    finally:
        process.kill()
        process.wait()


def test_the_bundled_model_comes_into_focus_and_fills_a_hole(
    visit: Callable[..., Any], real_address: str
) -> None:
    page = visit("#max_tokens=12&seed=3", address=real_address)
    text = write(page)
    answer = colada.load().generate(START, 12, seed=3)[0].text
    assert text == START + answer
    expect(page.locator("#status")).to_contain_text("12 tokens · 48 solver steps")
    page.focus("#scrubber")
    for key in ["Home"] + ["ArrowRight"] * 15:
        page.keyboard.press(key)
    expect(page.locator("#moment")).to_have_text("block 1 · step 16 of 16")
    assert text.startswith(seen(page))
    page.keyboard.press("End")
    page.click("#code")
    command = page.inner_text("#code-text")
    curl = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(curl.stdout)["choices"][0]["text"] == answer
    page.keyboard.press("Escape")
    words = text.split(" ")[5]  # The sixth word.
    select(page, words)
    page.wait_for_timeout(500)
    page.click("#rewrite")
    page.wait_for_selector("#keep:visible")
    before, after = text.split(f" {words}", 1)
    assert page.input_value("#text").startswith(before)
    assert page.input_value("#text").endswith(after)
