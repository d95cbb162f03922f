"""Proposals and the plot of strengths in a real browser: named, refused, promoted, dismissed; as wide as a phone."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ViewportSize, expect, sync_playwright
from server import serving
from symbol_gguf import build_symbol_gguf
from test_pages import ARGUMENTS, CHROMIUM, PHONE, SOON
from test_proposals import judged, settled

from feedback_store.records import PickChoice
from feedback_store.store import FeedbackStore

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


def test_a_proposal_is_approved_by_another_and_the_next_one_dismissed(browser: Browser, tmp_path: Path) -> None:
    base = build_symbol_gguf(tmp_path / "symbols.gguf")
    for number in (1, 2):
        judged(tmp_path, number)
    given = {"engine": "scripted", "model": base, "policy": "propose", "approval": "other"}
    with serving(tmp_path, **given) as server, browser.new_context(base_url=server.url, viewport=PHONE) as context:  # type: ignore[arg-type]
        settled(server)
        server.post("/v1/trials", {"version": "v1", "share": 1})
        for _ in range(3):
            pair = server.pair("Which one?")
            server.post("/v1/picks", {"pair_id": pair["pair_id"], "pick": PickChoice.FIRST})
        page = context.new_page()
        page.set_default_timeout(SOON)
        page.goto("/admin/")
        expect(page.locator("#proposals")).to_contain_text("30 wins, 0 ties, 2 losses")
        expect(page.locator("#strength svg.zl-narrow")).to_be_visible()
        expect(page.locator("#strength svg.zl-wide")).to_be_hidden()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        proposed = page.locator("#promote-proposed").inner_text().removeprefix("Promote ")
        page.click("#promote-proposed")
        expect(page.locator("#proposal-message")).to_contain_text("say who you are")
        page.locator("#by").get_by_role("textbox").fill("ben")
        page.click("#promote-proposed")
        expect(page.locator("#proposal-message")).to_contain_text(f"{proposed} answers from now on")
        expect(page.locator("#promote-proposed")).to_be_hidden()
        judged(tmp_path, 3, champion=proposed)
    with serving(tmp_path, **given) as server, browser.new_context(base_url=server.url) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.set_default_timeout(SOON)
        page.goto("/admin/")
        page.click("#dismiss-proposed")
        expect(page.locator("#proposal-message")).to_contain_text("v3 is not proposed any more")
        expect(page.locator("#proposals")).to_be_empty()
        expect(page.locator("#strength svg.zl-wide")).to_be_visible()
    with FeedbackStore.open(tmp_path / "store.duckdb") as store:
        labels = store.labels()
        assert [(one.version, labels[one.by]) for one in store.load_promotions()] == [(proposed, "ben")]
        assert {one.version: one.state for one in store.load_proposals()}["v3"] == "dismissed"


@pytest.mark.parametrize("size", [{"width": 1440, "height": 900}, PHONE], ids=["wide", "phone"])
def test_against_its_verdict_a_version_is_promoted_in_a_second_step(
    browser: Browser, tmp_path: Path, size: ViewportSize
) -> None:
    base = build_symbol_gguf(tmp_path / "symbols.gguf")
    judged(tmp_path, 1, wins=3)
    manifest = tmp_path / "versions" / "v1" / "manifest.json"
    counted = {"champion": "v0", "wins": 3, "ties": 0, "losses": 29, "pairs": 32}
    worse = {"evaluation": counted, "verdict": {"decision": "reject", "reasons": ["3 wins, 0 ties, 29 losses."]}}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **worse}))
    with (
        serving(tmp_path, engine="scripted", model=base) as server,
        browser.new_context(base_url=server.url, viewport=size) as context,
    ):
        page = context.new_page()
        page.set_default_timeout(SOON)
        page.goto("/admin/")
        expect(page.locator("#promote-newest")).to_have_text("Promote v1 anyway…")
        page.click("#promote-newest")
        expect(page.locator("#force-said")).to_contain_text("3 wins, 29 losses on 32 held-out pairs")
        expect(page.locator("#force-reason textarea")).to_be_focused()
        expect(page.locator("#force-go")).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        page.click("#force-go")
        expect(page.locator("#force-step")).to_contain_text("Write down why first")
        page.click("#force-leave")
        expect(page.locator("#force-step")).to_be_hidden()
        assert server.get("/v1/versions")["champion"] == "v0"
        page.click("#promote-newest")
        page.fill("#force-reason textarea", "To see what people say")
        page.click("#force-go")
        expect(page.locator("#message-line")).to_contain_text("v1 answers from now on")
        page.click("#history summary")
        expect(page.locator("#history")).to_contain_text("To see what people say")
