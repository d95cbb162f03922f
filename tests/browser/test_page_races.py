"""Quick presses, typing while a pair waits, several tabs, and texts that are too long: in a real browser."""

import os
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from server import Server, serving
from tiny_model import build_tiny_gguf

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SOON = 30_000
BOX = "#message textarea"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tiny = build_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    data_dir = tmp_path_factory.mktemp("data")
    with serving(data_dir, engine="scripted", model=tiny, scripted_delay_s=0.05, compare_share=0) as running:
        yield running


@pytest.fixture
def tabs(browser: Browser, server: Server) -> Iterator[BrowserContext]:
    """The tabs of one person."""
    context = browser.new_context(base_url=server.url)
    context.set_default_timeout(SOON)
    yield context
    context.close()


def chat(tabs: BrowserContext, how: str = "always") -> Page:
    page = tabs.new_page()
    page.goto("/")
    expect(page.locator(".zl-badge")).to_contain_text("v0", timeout=SOON)
    page.get_by_label(how, exact=True).check(force=True)
    return page


def say(page: Page, text: str) -> None:
    page.fill(BOX, text)
    page.press(BOX, "Enter")
    expect(page.locator("#conversation")).to_contain_text(text, timeout=SOON)


def pair_of(page: Page) -> str:
    """The pair that waits on a page; its buttons are ready."""
    expect(page.locator("#pick-first")).to_be_enabled(timeout=SOON)
    return page.locator("#pair-id textarea, #pair-id input").input_value()


def picks(server: Server, pair_id: str) -> list[str]:
    asked = f"SELECT pick FROM picks WHERE pair_id = '{pair_id}' ORDER BY event"
    return [row[0] for row in server.post("/v1/query", {"sql": asked})["rows"]]


@pytest.mark.parametrize("keys", ["121", "2s0", "x11"])
def test_the_first_of_several_quick_keys_stands(tabs: BrowserContext, server: Server, keys: str) -> None:
    page = chat(tabs)
    say(page, f"Which of the two, {keys}?")
    pair_id = pair_of(page)
    page.locator("#answer-1").click()
    for key in keys:
        page.keyboard.press(key)
    expect(page.locator("#note")).to_contain_text("Both answers came from v0")
    page.wait_for_timeout(700)
    first = {"1": "first", "2": "second", "x": "both_bad"}[keys[0]]
    assert picks(server, pair_id) == [first]
    page.close()


def test_two_buttons_pressed_at_once_are_one_pick(tabs: BrowserContext, server: Server) -> None:
    page = chat(tabs)
    say(page, "Two buttons?")
    pair_id = pair_of(page)
    page.evaluate("for (const id of ['second', 'first', 'tie']) document.getElementById(`pick-${id}`).click()")
    expect(page.locator("#note")).to_contain_text("Both answers came from v0")
    assert picks(server, pair_id) == ["second"]


def test_two_tabs_with_one_pair_are_one_pick(tabs: BrowserContext, server: Server) -> None:
    page = chat(tabs)
    say(page, "In two tabs?")
    pair_id = pair_of(page)
    other = tabs.new_page()
    other.goto(page.url)
    assert pair_of(other) == pair_id
    for tab, key in ((page, "2"), (other, "1")):
        tab.locator("#answer-1").click()
        tab.keyboard.press(key)
    expect(other.locator("#note")).to_contain_text("Your first word on this pair stands: second")
    assert picks(server, pair_id) == ["second"]


def test_quick_keys_on_the_rate_page_judge_one_pair(tabs: BrowserContext, server: Server) -> None:
    for number in range(4):
        server.pair(f"To rate, {number}?", seed=number)
    before = server.get("/v1/statistics")["counts"]["picks"]
    page = tabs.new_page()
    page.goto("/rate/")
    first = pair_of(page)
    expect(page.locator("#pair")).to_be_focused(timeout=SOON)
    for key in "212":
        page.keyboard.press(key)
    expect(page.locator("#note")).to_contain_text("Saved, thank you")
    page.wait_for_timeout(700)
    assert server.get("/v1/statistics")["counts"]["picks"] == before + 1
    assert picks(server, first) == ["second"]
    expect(page.locator("#pair")).to_be_focused(timeout=SOON)  # after a pick the next pair has it
    second = pair_of(page)
    assert second != first
    page.keyboard.press("0")
    expect(page.locator("#pair-id textarea, #pair-id input")).not_to_have_value(second)
    assert picks(server, second) == ["tie"]


def test_what_is_typed_while_a_pair_waits_picks_nothing_and_stays(tabs: BrowserContext, server: Server) -> None:
    page = chat(tabs)
    say(page, "A long question?")
    page.keyboard.type("so while ", delay=30)  # the answers are being written
    pair_id = pair_of(page)
    page.keyboard.type("s x 1 2 0", delay=30)
    expect(page.locator(BOX)).to_have_value("so while s x 1 2 0")
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Which answer is better?")
    expect(page.locator(BOX)).to_have_value("so while s x 1 2 0")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.type("s120x")
    page.wait_for_timeout(300)
    assert picks(server, pair_id) == []
    page.locator("#answer-2").click()
    page.keyboard.press("1")
    expect(page.locator("#note")).to_contain_text("Both answers came from v0")
    assert picks(server, pair_id) == ["first"]
    expect(page.locator(BOX)).to_have_value("so while s x 1 2 0")


def test_each_tab_keeps_its_conversation(tabs: BrowserContext, server: Server) -> None:
    one, other = chat(tabs, "never"), chat(tabs, "never")
    say(one, "In the first tab")
    say(other, "In the other tab")
    for tab in (one, other):
        expect(tab.locator("#stop")).to_be_disabled(timeout=SOON)
        tab.wait_for_url(re.compile(r"\?c=conv_"))
    one.reload()
    expect(one.locator("#conversation")).to_contain_text("In the first tab")
    expect(one.locator("#conversation")).not_to_contain_text("In the other tab")
    one.get_by_label("never", exact=True).check(force=True)
    say(one, "Once more in the first")
    expect(one.locator("#stop")).to_be_disabled(timeout=SOON)
    new = chat(tabs, "never")
    expect(new.locator("#conversation")).not_to_contain_text("tab")
    say(new, "In a new tab")
    expect(new.locator("#stop")).to_be_disabled(timeout=SOON)
    asked = "SELECT conversation_id, text FROM turns WHERE text LIKE 'In % tab' OR text = 'Once more in the first'"
    rows = server.post("/v1/query", {"sql": asked})["rows"]
    where = {text: conversation for conversation, text in rows}
    assert where["In the first tab"] == where["Once more in the first"]
    assert len(set(where.values())) == 3
    one.goto("/rate/")
    expect(one.locator(".zl-badge")).to_be_visible()
    one.wait_for_timeout(300)
    one.get_by_role("link", name="Chat").click()
    expect(one.locator("#conversation")).to_contain_text("Once more in the first")


def test_what_is_sent_goes_to_the_conversation_that_is_shown(tabs: BrowserContext, server: Server) -> None:
    page = chat(tabs, "never")
    say(page, "Alpha begins")
    expect(page.locator("#stop")).to_be_disabled(timeout=SOON)
    page.get_by_role("button", name="+ New").click()
    expect(page.locator("#conversation")).not_to_contain_text("Alpha begins")
    for text, leave in (("Beta begins", "+ New"), ("Gamma begins", "Alpha begins")):
        say(page, text)
        expect(page.locator("#conversation")).to_contain_text("This is v0")
        if leave == "+ New":
            page.get_by_role("button", name="+ New").click()
        else:
            page.locator("#side label", has_text=leave).click()
        page.wait_for_timeout(2000)  # what is late has come
        shown = page.locator("#conversation").inner_text()
        page.fill(BOX, f"After {text}")
        page.press(BOX, "Enter")
        expect(page.locator("#conversation")).to_contain_text(f"After {text}", timeout=SOON)
        expect(page.locator("#stop")).to_be_disabled(timeout=SOON)
        asked = f"""SELECT text FROM turns WHERE conversation_id IN
            (SELECT conversation_id FROM turns WHERE text = 'After {text}') ORDER BY created_at"""
        texts = [row[0] for row in server.post("/v1/query", {"sql": asked})["rows"]]
        for other in ("Alpha begins", "Beta begins", "Gamma begins"):
            assert (other in shown) == (other in texts), (text, shown, texts)


def test_a_text_too_long_is_refused_and_stays_in_its_box(tabs: BrowserContext, server: Server) -> None:
    page = chat(tabs, "never")
    page.fill(BOX, "x" * 204_800)
    page.press(BOX, "Enter")
    expect(page.locator("#note")).to_contain_text("204,800 characters; the limit is 100,000")
    assert len(page.locator(BOX).input_value()) == 204_800
    asked = "SELECT count(*) FROM turns WHERE text LIKE 'xxxx%'"
    assert server.post("/v1/query", {"sql": asked})["rows"] == [[0]]
