"""The playground in a browser: a page of a stand-in for the server, and what a person does on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from playground_double import Double, story

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
def double() -> Iterator[Double]:
    double = Double()
    yield double
    double.shutdown()
    double.server_close()


@pytest.fixture
def visit(browser: Any, double: Double) -> Iterator[Callable[..., Any]]:
    """Opens the page; whatever it asks for is its own server's, and nothing in it fails."""
    contexts, faults = [], []

    def open_page(
        hash: str = "", width: int = 1280, height: int = 900, address: str = double.url, **options: Any
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


def told(double: Double, **changes: Any) -> str:
    body = {"model": "cola", "prompt": START, "max_tokens": 48, "seed": 0}
    return START + "".join(story({**body, **changes}))
