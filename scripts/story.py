"""The README's story in a real browser, on a fresh data directory → docs/images/*.png and docs/benchmarks/story-*.md.

    .venv/bin/python scripts/story.py real PREFERENCES.jsonl
    .venv/bin/python scripts/story.py practice

`real`: chat, compare, pick, import, retrain (4 steps of 8 pairs), read the verdict, promote anyway, chat, roll back.
`practice`: teach it a taste, promote, compare the answers, roll back. Needs Debian's chromium.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from server import Server, serving  # noqa: E402

IMAGES = ROOT / "docs" / "images"
REPORTS = ROOT / "docs" / "benchmarks"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
DESK = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}
QUESTIONS = ("Why is the sky blue?", "How do I keep a plant alive?", "What should I cook tonight?")
MINUTE = 60_000


class Story:
    """One browser page, one server, and the times of what was done."""

    def __init__(self, server: Server, page: Page) -> None:
        self.server = server
        self.page = page
        self.times: dict[str, float] = {}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of a step to the report."""
        began = time.perf_counter()
        yield
        self.times[what] = time.perf_counter() - began
        print(f"{what}: {self.times[what]:.1f} s", flush=True)

    def shot(self, name: str) -> None:
        """A picture at desktop and one at phone width."""
        self.page.wait_for_timeout(600)
        self.page.screenshot(path=IMAGES / f"{name}.png")
        self.page.set_viewport_size(PHONE)  # type: ignore[arg-type]
        self.page.wait_for_timeout(600)
        self.page.screenshot(path=IMAGES / f"{name}-phone.png")
        self.page.set_viewport_size(DESK)  # type: ignore[arg-type]

    def chat(self, text: str, compare: str) -> None:
        """Send a message on the chat page and wait for the end of the answers."""
        self.page.get_by_label(compare, exact=True).check(force=True)
        self.page.fill("#message textarea", text)
        self.page.press("#message textarea", "Enter")
        expect(self.page.locator("#stop")).to_be_enabled()
        expect(self.page.locator("#stop")).to_be_disabled(timeout=2 * MINUTE)

    def open(self, path: str) -> None:
        """Open a page and wait until it is drawn."""
        self.page.goto(self.server.url + path)
        expect(self.page.locator(".zl-badge")).to_contain_text("v", timeout=MINUTE)
        self.page.wait_for_timeout(500)

    def greedy(self) -> dict[str, str]:
        """What the champion answers to fixed questions at temperature 0."""
        asked = {text: self.server.chat(text, temperature=0, max_tokens=200) for text in QUESTIONS}
        return {text: answer["choices"][0]["message"]["content"] for text, answer in asked.items()}

    def newest_run(self) -> dict[str, object]:
        """The newest run as the API shows it."""
        newest: dict[str, object] = self.server.get("/v1/runs")["runs"][0]
        return newest


def main(part: str, source: Path | None) -> None:
    """Play one part of the story."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as directory,
        serving(Path(directory)) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        page = browser.new_page(viewport=DESK)  # type: ignore[arg-type]
        page.set_default_timeout(MINUTE)
        story = Story(server, page)
        told = tell_practice(story) if source is None else tell_real(story, source)
        browser.close()
    (REPORTS / f"story-{part}.md").write_text(told)
    print(told)


def tell_real(story: Story, source: Path) -> str:
    """Chat, pick, import, retrain on real pairs, promote anyway, roll back; returns the report."""
    page = story.page
    story.open("/")
    with story.timed("two answers, picked by key"):
        story.chat("Give me three ideas for a rainy Sunday.", "always")
        expect(page.locator("#pick-first")).to_be_enabled()
        story.shot("compare")
        page.keyboard.press("2")
        expect(page.locator("#note")).to_contain_text("until the next retrain")
    story.shot("chat")

    story.open("/admin/")
    with story.timed("import"):
        page.fill("#import-source input, #import-source textarea", str(source))
        page.click("#import")
        expect(page.locator("#imported")).to_contain_text("Imported")
    imported = page.locator("#imported").inner_text()
    page.get_by_label("Steps").fill("4")
    with story.timed("retrain: 4 steps of 8 pairs, evaluation included"):
        page.click("#start-retrain")
        expect(page.locator("#run")).to_contain_text("step 2 of 4", timeout=15 * MINUTE)
        story.shot("training")
        expect(page.locator(".zl-decision")).to_be_visible(timeout=15 * MINUTE)
    run = story.newest_run()
    page.evaluate("document.getElementById('message-line').scrollIntoView()")
    story.shot("verdict")
    with story.timed("promote: started, checked, swapped"):
        page.click("#promote-newest")
        expect(page.locator("#message-line")).to_contain_text("answers from now on")
    story.open("/")
    story.chat("Who wrote this?", "never")
    expect(page.locator(".zl-badge")).to_contain_text("v1")
    story.open("/admin/")
    with story.timed("roll back"):
        page.click("#rollback")
        expect(page.locator("#message-line")).to_contain_text("answers again")
    return report(story.times, run, [imported])


def tell_practice(story: Story) -> str:
    """Teach it a taste, compare the answers, roll back; returns the report."""
    page = story.page
    before = story.greedy()
    story.open("/admin/")
    with story.timed("practice: shorter, conversion of the base and evaluation included"):
        page.click("#start-practice")
        expect(page.locator("#run")).to_contain_text("practice: shorter", timeout=MINUTE)
        expect(page.locator("#run")).to_contain_text("held-out pairs.", timeout=15 * MINUTE)
    run = story.newest_run()
    page.evaluate("document.getElementById('message-line').scrollIntoView()")
    story.shot("practice")
    with story.timed("promote: started, checked, swapped"):
        page.click("#promote-newest")
        expect(page.locator("#message-line")).to_contain_text("answers from now on")
    after = story.greedy()
    with story.timed("roll back"):
        page.click("#rollback")
        expect(page.locator("#message-line")).to_contain_text("answers again")
    same = "the same as before" if story.greedy() == before else "**not** the same as before"
    table = ["Answers at temperature 0:", "", "| question | v0 | practised |", "|---|---|---|"]
    table += [f"| {text} | {_cell(before[text])} | {_cell(after[text])} |" for text in QUESTIONS]
    return report(story.times, run, [*table, "", f"After the roll back the answers are {same}."])


def report(times: dict[str, float], run: dict[str, object], more: list[str]) -> str:
    """What was done and measured, as Markdown."""
    verdict, evaluation = run["verdict"], run["evaluation"]
    assert isinstance(verdict, dict)
    lines = [
        "# The story, measured",
        "",
        f"`scripts/story.py`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, no GPU, embedded model; n = 1.",
        "",
        "| step | seconds |",
        "|---|---|",
        *(f"| {what} | {seconds:.1f} |" for what, seconds in times.items()),
        "",
        f"**{run['version']}: {verdict['decision']}.** {' '.join(verdict['reasons'])}",
        "",
        f"`{json.dumps(evaluation)}`",
        "",
        *more,
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("\n", "<br>").replace("|", "\\|")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).absolute() if sys.argv[1] == "real" else None)
