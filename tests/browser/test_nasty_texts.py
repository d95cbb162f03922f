"""Texts that hide, style, cover or act, in a real browser: on the chat and on the Rate page.

The texts are in the store before the server starts, as messages and answers of one conversation and as pairs to rate.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from nasty_texts import ALL
from playwright.sync_api import Browser, Page, expect, sync_playwright
from server import Server, serving
from tiny_model import build_tiny_gguf

from chat_app.ui.shown_text import TAGS, visible
from feedback_store.records import Candidate, Pair, new_id, now
from feedback_store.store import FeedbackStore

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SOON = 30_000
OURS = {"button", "svg", "path", "span"}  # of the page's own blocks of code: the colours, the button to copy
ATTRIBUTES = {
    "class", "href", "target", "rel", "value", "align", "title", "xmlns", "viewbox", "color", "aria-hidden",
    "aria-label", "stroke-width", "width", "height", "fill", "d", "stroke",
}  # fmt: skip
COVER = '<a style="position:fixed;inset:0;z-index:99999" href="/v1/export">cover</a>'
POST = (
    '<form action="/v1/backups" method="post" enctype="text/plain" style="position:fixed;inset:0;z-index:99999">'
    '<button style="width:100%;height:100%">First</button></form>'
)
SEEN = """(box) => [...box.querySelectorAll("*")].map((one) => ({
  tag: one.tagName.toLowerCase(),
  attributes: one.getAttributeNames(),
  class: one.getAttribute("class") ?? "",
  style: one.getAttribute("style"),
  fixed: getComputedStyle(one).position === "fixed",
  hidden: one.getClientRects().length === 0 && one.textContent.trim() !== "" && !one.closest("svg, button"),
}))"""
CLASS = re.compile(r"(svelte-|token|language-|code_wrap|copy|check|md-|line).*|")


def answer(text: str) -> Candidate:
    return Candidate(new_id("cand"), "v0", text, "stop", {}, None, 1.0, now())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def conversation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A data directory with every text said by a person and by a model."""
    data_dir = tmp_path_factory.mktemp("data")
    with FeedbackStore.open(data_dir / "store.duckdb") as store:
        told = store.record_conversation("<b style='position:fixed'>a title</b>\u202e").conversation_id
        for text in ALL:
            turn = store.record_turn(told, text)
            written = answer(text)
            store.record_candidate(written, [{"role": "user", "content": text}], turn_id=turn.turn_id)
            store.record_answer(turn.turn_id, written.candidate_id)
        for number, text in enumerate((COVER, POST)):
            prompt = [{"role": "user", "content": f"{text} question {number}"}]
            store.record_pair(Pair(new_id("pair"), prompt, answer(f"{text} one"), answer("two"), None, "ada", now()))
    return data_dir, told


@pytest.fixture(scope="module")
def server(conversation: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tiny = build_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with serving(conversation[0], engine="scripted", model=tiny, compare_share=0, gold_share=0) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """A page; the test fails where it asks another host for anything or sends anything but Gradio's own events."""
    troubles: list[str] = []
    context = browser.new_context(base_url=server.url, viewport={"width": 1440, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(SOON)

    def look(url: str, method: str) -> None:
        ours = url.startswith((server.url, "data:", "blob:"))
        if not ours or (method != "GET" and "/gradio_api/" not in url) or "/v1/" in url:
            troubles.append(f"{method} {url}")

    opened.on("request", lambda request: look(request.url, request.method))
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    yield opened
    context.close()
    assert not troubles


def letters(text: str) -> str:
    return "".join(one for one in text if one.isalnum() or (ord(one) > 127 and not one.isspace()))


def words(text: str) -> str:
    """The letters but the numbers of list items, which are markers in a browser and no text."""
    return letters(re.sub(r"(?m)^([\s>-]*)\d+[.)](?=\s)", r"\1", visible(text)))


def test_every_text_of_a_conversation_is_text_and_all_of_it(page: Page, conversation: tuple[Path, str]) -> None:
    page.goto(f"/?c={conversation[1]}")
    messages = page.locator("#conversation .message .md")
    expect(messages).to_have_count(2 * len(ALL), timeout=SOON)
    page.wait_for_timeout(1500)  # the page colours code after it has shown it
    wrong: list[str] = []
    for index in range(2 * len(ALL)):
        text, message = ALL[index // 2], messages.nth(index)
        for one in message.evaluate(SEEN):
            strange = set(one["attributes"]) - ATTRIBUTES
            if (
                one["tag"] not in TAGS | OURS
                or strange
                or one["style"]
                or one["fixed"]
                or one["hidden"]
                or not CLASS.fullmatch(one["class"])
            ):
                wrong.append(f"{text[:60]!r}: {one}")
        seen = letters(message.inner_text())
        if seen != words(text):
            wrong.append(f"{text[:80]!r} is seen as {seen[:300]!r}, not {words(text)[:300]!r}")
    assert not wrong, "\n".join(wrong)
    assert page.evaluate("window.ran") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440
    page.get_by_role("button", name="+ New").click()  # nothing lies over the page
    expect(messages).to_have_count(0)
    expect(page.locator("#side")).to_contain_text("<b style='position:fixed'>a title</b>⟨U+202E⟩")


def test_a_pair_cannot_cover_the_page_nor_send_anything(page: Page, server: Server) -> None:
    backups = server.get("/v1/backups")
    page.goto("/rate/")
    for _ in range(2):
        expect(page.locator("#answer-2 h4")).to_be_visible()
        shown = page.locator("#answer-1").inner_text() + page.locator("#answer-2").inner_text()
        assert "position:fixed" in shown
        asked = page.locator("#asked").inner_text()
        at = "document.elementFromPoint(innerWidth / 2, 30).closest('form, a[style]')"
        assert page.evaluate(at) is None
        with page.expect_response(re.compile("queue/join")):
            page.click("#pick-first")
        expect(page.locator("#asked")).not_to_have_text(asked)
        page.wait_for_timeout(600)  # a press sooner than that is taken for a second one
    expect(page.locator("#note")).to_contain_text("There is nothing to rate now")
    assert server.get("/v1/backups") == backups
    assert server.get("/v1/statistics")["counts"]["picks"] == 2


def test_a_form_that_got_through_would_send_nothing(page: Page, server: Server) -> None:
    backups = server.get("/v1/backups")
    page.goto("/rate/")
    expect(page.locator(".zl-badge")).to_be_visible()
    refused = page.evaluate(
        """(form) => new Promise((resolve) => {
          document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
          document.body.insertAdjacentHTML("beforeend", form);
          document.querySelector("form button").click();
        })""",
        POST,
    )
    assert refused == "form-action"
    assert server.get("/v1/backups") == backups


def test_copy_and_edit_give_the_text_itself(page: Page, conversation: tuple[Path, str]) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(f"/?c={conversation[1]}")
    expect(page.locator("#conversation .message .md")).to_have_count(2 * len(ALL), timeout=SOON)
    page.locator("#conversation .message-buttons-left").get_by_label("Copy message").last.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.replace("\r\n", "\n") == ALL[-1]
    page.locator("#conversation .message-buttons-left").get_by_label("Edit").last.click()
    expect(page.locator("#conversation textarea").last).to_have_value(ALL[-1])
    page.locator("#conversation").get_by_label("Submit").last.click()
    expect(page.locator("#note")).to_contain_text("your version says the same")  # as it must: nothing was changed
