"""The playground where things go wrong, for everybody who may use it, and with the server itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

import colada
from playground import START, begin, expect, finish, seen, select, told, write
from playground_double import STATIC, Double, story

pytest_plugins = ["playground"]  # Its fixtures: a browser, a server, a page.

# --- when it does not go well -------------------------------------------------------------------------


def test_a_full_queue_is_said_and_asked_again_when_it_may_be(page: Any, double: Double) -> None:
    double.refusal = (429, "queue_full", "The queue is full.", 2)
    begin(page)
    expect(page.locator("[role=alert]")).to_contain_text("The queue is full.")
    again = page.locator("#alert button")
    expect(again).to_be_disabled()
    expect(again).to_have_text("Again now")
    assert page.input_value("#text") == START
    again.click()
    page.wait_for_selector("#stop:visible, #again:visible")
    finish(page)
    assert page.input_value("#text") == told(double)


def test_too_many_watchers_may_write_without_watching(page: Any, double: Double) -> None:
    double.refusal = (429, "too_many_watchers", "Eight watch already.", 5)
    begin(page)
    page.click("text=Write without watching")
    page.wait_for_selector("#again:visible")
    assert page.input_value("#text") == told(double)
    assert "colada" not in double.asked[-1]


def test_a_wrong_value_is_said_in_the_servers_words(page: Any, double: Double) -> None:
    text = write(page)
    double.refusal = (400, "context_length_exceeded", "a prompt of 9000 tokens, expected at most 8192", None)
    page.click("#write")
    expect(page.locator("#alert")).to_have_text("a prompt of 9000 tokens, expected at most 8192")
    assert page.input_value("#text") == text
    expect(page.locator("#undo")).to_be_visible()


def test_a_key_is_asked_for_and_kept_nowhere(visit: Callable[..., Any], double: Double) -> None:
    double.key = "secret"
    page = visit()
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_have_value("")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#set-steps")
    assert write(page) == told(double)
    assert "secret" not in page.url
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_a_lost_connection_keeps_what_was_written(page: Any, double: Double) -> None:
    double.breaks_after = 3
    text = write(page)
    assert text == START + "".join(story({"model": "cola", "prompt": START, "max_tokens": 12}))
    expect(page.locator("#alert")).to_contain_text("before the answer ended")
    double.breaks_after = None
    page.click("#undo")
    assert write(page) == told(double)
    expect(page.locator("#alert")).to_be_empty()


def test_a_server_that_is_away_is_said_and_found_again(visit: Callable[..., Any], double: Double) -> None:
    page = visit()
    page.route("**/*", lambda route: route.abort())
    begin(page)
    expect(page.locator("#alert")).to_contain_text("The server does not answer.")
    expect(page.locator("#health-text")).to_have_text("no answer")
    page.unroute("**/*")
    page.click("#alert button")
    page.wait_for_selector("#again:visible")
    assert page.input_value("#text") == told(double)
    expect(page.locator("#health-text")).to_have_text("ready")


# --- settings -----------------------------------------------------------------------------------------


def test_settings_are_in_the_address_and_texts_are_not(visit: Callable[..., Any], double: Double) -> None:
    page = visit()
    page.fill("#set-steps", "5")
    page.fill("#set-guidance", "2.5")
    page.click("#die")
    write(page, "a private text")
    seed = page.input_value("#set-seed")
    assert page.url == f"{double.url}#steps=5&guidance=2.5&seed={seed}"
    again = visit(page.url.removeprefix(double.url))
    assert [again.input_value(f"#set-{name}") for name in ("steps", "guidance", "seed")] == ["5", "2.5", seed]
    again.click("#reset")
    assert again.url == double.url
    assert again.input_value("#set-steps") == "16"


def test_settings_out_of_their_bounds_are_not_taken(visit: Callable[..., Any], double: Double) -> None:
    page = visit(
        "#steps=0&guidance=x&seed=-1&temperature=1e999&top_p=&guidance_interval=1,0&nothing=1&model=none"
    )
    write(page)
    assert double.asked[0]["colada"] == {"guesses": True, "latents": "pca"}
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


def test_all_of_it_works_with_the_keyboard_alone(page: Any, double: Double) -> None:
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "text":
            break
    page.keyboard.type(START)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#again:visible")
    text = page.input_value("#text")
    assert text == told(double)
    page.keyboard.press("Control+Home")
    for _ in range(5):
        page.keyboard.press("Control+ArrowRight")
    page.keyboard.press("Shift+Control+ArrowRight")
    page.wait_for_selector("#hole:visible")
    page.keyboard.press("Alt+r")
    page.wait_for_selector("#keep:visible")
    assert double.asked[-1]["prompt"] + double.asked[-1]["suffix"] != text
    assert page.input_value("#text").endswith(double.asked[-1]["suffix"])
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") in ("write", "rewrite")
    page.keyboard.press("?")
    expect(page.locator("#help-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help-dialog")).to_be_hidden()


def test_nothing_is_blurred_for_who_wants_no_motion(visit: Callable[..., Any], double: Double) -> None:
    page = visit(reduced_motion="reduce")
    double.step_seconds = 0.05
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


def test_without_javascript_it_says_what_to_do(browser: Any, double: Double) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(double.url)
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
