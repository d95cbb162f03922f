"""The pages in a real browser: chat, compare, pick by key, stop, retry; train, promote and roll back as an admin.

The `scripted` engine answers (so that what is read can be checked) and the trainer trains the tiny model for real.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from server import Server, serving
from tiny_model import build_tiny_gguf

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PHONE = {"width": 390, "height": 844}
SOON = 20_000
RUN = 300_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    with serving(
        tmp_path_factory.mktemp("data"), engine="scripted", model=tiny, scripted_delay_s=0.05, compare_share=0
    ) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The chat page; the test fails when the browser reports an error or asks another host for anything."""
    troubles: list[str] = []
    context = browser.new_context(base_url=server.url)
    opened = context.new_page()
    opened.set_default_timeout(SOON)
    opened.on("pageerror", lambda error: _note_error(str(error), troubles))
    opened.on("console", lambda message: message.type == "error" and _note_error(message.text, troubles))
    opened.on("requestfinished", lambda request: _note_stranger(request.url, server.url, troubles))
    open_chat(opened)
    yield opened
    context.close()
    assert not troubles


def _note_error(text: str, troubles: list[str]) -> None:
    blocked_image = "img-src" in text  # as it should be
    left_the_page = text.startswith("AbortError") or "Connection errored out" in text  # Gradio, in mid-event
    if not blocked_image and not left_the_page:
        troubles.append(text)


def _note_stranger(url: str, ours: str, troubles: list[str]) -> None:
    if not url.startswith((ours, "data:", "blob:")):
        troubles.append(f"the page asked for {url}")


def open_chat(page: Page) -> None:
    page.goto("/")
    expect(page.locator("#message textarea")).to_be_enabled(timeout=SOON)
    expect(page.locator(".zl-badge")).to_contain_text("v", timeout=SOON)


def compare(page: Page, how: str) -> None:
    choice = page.get_by_label(how, exact=True)
    deadline = time.monotonic() + SOON / 1000
    while not choice.is_checked():  # a page that is still being drawn can take a click back
        assert time.monotonic() < deadline
        choice.click(force=True)
        page.wait_for_timeout(100)


def say(page: Page, text: str) -> None:
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")
    expect(page.locator("#stop")).to_be_enabled()


def wait_for_the_answer(page: Page) -> None:
    expect(page.locator("#stop")).to_be_disabled(timeout=SOON)
    expect(page.locator("#send")).to_be_enabled()


def answers(page: Page) -> "list[str]":
    return page.locator("#conversation .bot.message").all_inner_texts()


def test_a_conversation_streams_goes_on_and_survives_a_reload(page: Page) -> None:
    compare(page, "never")
    say(page, "How do I learn to swim?")
    expect(page.locator("#conversation")).to_contain_text("You asked: How do I learn to swim?")
    wait_for_the_answer(page)
    say(page, "And to dive?")
    expect(page.locator("#conversation")).to_contain_text("You asked: And to dive?")
    wait_for_the_answer(page)
    assert len(answers(page)) == 2
    page.reload()
    expect(page.locator("#conversation")).to_contain_text("You asked: And to dive?")
    expect(page.locator("#side")).to_contain_text("How do I learn to swim?")


def test_stop_keeps_what_was_written_and_retry_answers_again(page: Page) -> None:
    compare(page, "never")
    say(page, "Tell me a long story")
    expect(page.locator("#conversation")).to_contain_text("This is v0")
    page.click("#stop")
    expect(page.locator("#note")).to_contain_text("Stopped")
    stopped = answers(page)[-1]
    page.click("#retry")
    wait_for_the_answer(page)
    expect(page.locator("#conversation .bot.message").last).not_to_have_text(stopped)
    assert len(answers(page)) == 1


def test_new_starts_another_conversation_and_the_list_brings_the_first_back(page: Page) -> None:
    compare(page, "never")
    say(page, "The first one")
    wait_for_the_answer(page)
    expect(page.locator("#conversation")).to_contain_text("You asked: The first one")
    page.get_by_role("button", name="+ New").click()
    expect(page.locator("#conversation")).not_to_contain_text("The first one")
    say(page, "The second one")
    expect(page.locator("#conversation")).to_contain_text("You asked: The second one")
    wait_for_the_answer(page)
    page.locator("#side label", has_text="The first one").click()
    expect(page.locator("#conversation")).to_contain_text("You asked: The first one")


@pytest.mark.parametrize(
    ("key", "said"), [("2", "Saved, thank you"), ("0", "tie"), ("x", "both bad"), ("s", "Skipped")]
)
def test_two_answers_are_blind_until_a_key_picks(page: Page, server: Server, key: str, said: str) -> None:
    before = len(server.http.get("/v1/export").text.splitlines())
    compare(page, "always")
    say(page, "Which is better?")
    expect(page.locator("#pick-first")).to_be_enabled()
    second = page.locator("#answer-2 .prose p").last.inner_text()
    assert second != page.locator("#answer-1 .prose p").last.inner_text()
    expect(page.locator("#note")).not_to_contain_text("v0")
    page.locator("#answer-1").click()  # keys are for a pair that has the focus
    page.keyboard.press(key)
    expect(page.locator("#note")).to_contain_text("Both answers came from v0")
    expect(page.locator("#note")).to_contain_text(said)
    kept = len(server.http.get("/v1/export").text.splitlines())
    expect(page.locator("#note")).to_contain_text(f"{kept} of 50 until the next retrain")
    assert kept - before == (1 if key == "2" else 0)
    if key == "2":
        assert answers(page)[-1].startswith(second)


def test_a_pair_that_waits_is_there_again_after_a_reload(page: Page) -> None:
    compare(page, "always")
    say(page, "Which is better?")
    expect(page.locator("#pick-first")).to_be_enabled()
    page.reload()
    expect(page.locator("#pick-second")).to_be_enabled()
    page.click("#pick-first")
    expect(page.locator("#note")).to_contain_text("Saved, thank you")


def test_keys_do_nothing_while_one_types(page: Page) -> None:
    compare(page, "never")
    page.click("#message textarea")
    page.keyboard.type("1 2 0 x s")
    expect(page.locator("#message textarea")).to_have_value("1 2 0 x s")


def test_a_thumb_is_kept(page: Page) -> None:
    compare(page, "never")
    say(page, "Rate this")
    wait_for_the_answer(page)
    page.get_by_label("Like", exact=True).last.click()
    expect(page.locator("#note")).to_contain_text("your rating is saved")


def test_what_a_model_writes_cannot_leave_its_box(page: Page) -> None:
    compare(page, "never")
    say(
        page,
        '<img src="http://example.com/x.png"><b style="position:fixed;inset:0">hi</b><script>window.ran=1</script>',
    )
    expect(page.locator("#conversation")).to_contain_text("This is v0")
    wait_for_the_answer(page)
    assert page.evaluate("window.ran") is None
    page.get_by_role("button", name="+ New").click()  # nothing lies over the page
    expect(page.locator("#conversation")).not_to_contain_text("This is v0")


def test_the_pair_and_its_buttons_are_in_reach_on_a_phone(page: Page) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    compare(page, "always")
    say(page, "Which is better?")
    expect(page.locator("#pick-first")).to_be_enabled()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.click("#pick-second")
    expect(page.locator("#note")).to_contain_text("Saved, thank you")


def test_a_run_is_started_watched_promoted_and_rolled_back_on_the_admin_page(
    page: Page, server: Server, tmp_path: Path
) -> None:
    source = tmp_path / "some.jsonl"
    source.write_text(
        "".join(f'{{"prompt": "Question {n}", "chosen": "good {n}", "rejected": "bad {n}"}}\n' for n in range(40))
    )
    page.goto("/admin/")
    page.fill("#import-source input, #import-source textarea", server.lend(source))
    page.click("#import")
    expect(page.locator("#imported")).to_contain_text("Imported 40")
    page.get_by_label("Steps").fill("2")
    page.click("#start-retrain")
    expect(page.locator("#message-line")).to_contain_text("Started run_")
    expect(page.locator("#cancel-run")).to_be_enabled()
    page.reload()  # the run does not live in the page
    expect(page.locator("#run")).to_contain_text(re.compile("wins?,.* held-out"), timeout=RUN)
    page.click("#promote-newest")
    expect(page.locator("#message-line")).to_contain_text("v1 answers from now on")
    expect(page.locator(".zl-badge")).to_contain_text("v1")
    open_chat(page)
    compare(page, "never")
    say(page, "Who is this?")
    expect(page.locator("#conversation")).to_contain_text("This is v1")
    page.goto("/admin/")
    page.click("#rollback")
    expect(page.locator("#message-line")).to_contain_text("v0 answers again")


def test_the_bar_of_an_open_chat_follows_what_others_do(page: Page, server: Server) -> None:
    before = page.locator(".zl-badge").inner_text()
    page.locator("#message textarea").fill("half a")
    pair = server.pair("A question of somebody else", seed=7)
    server.post("/v1/picks", {"pair_id": pair["pair_id"], "pick": "first"})
    expect(page.locator(".zl-badge")).not_to_have_text(before, timeout=SOON)
    expect(page.locator("#message textarea")).to_have_value("half a")


def test_a_conversation_can_ask_not_to_be_learned_from(page: Page, server: Server) -> None:
    compare(page, "never")
    page.locator("#teach input").uncheck()
    expect(page.locator("#note")).to_contain_text("Nothing of this conversation will teach")
    say(page, "Only between the two of us?")
    wait_for_the_answer(page)
    expect(page.locator("#teach input")).not_to_be_checked()
    refusals = {"sql": "SELECT count(*) FROM refusals"}
    assert server.post("/v1/query", refusals)["rows"] == [[1]]
    page.reload()
    expect(page.locator("#conversation")).to_contain_text("Only between the two of us?")
    expect(page.locator("#teach input")).not_to_be_checked()
    page.locator("#teach input").check()
    expect(page.locator("#note")).to_contain_text("may teach")
    assert server.post("/v1/query", refusals)["rows"] == [[0]]
    page.click("text=+ New")
    expect(page.locator("#teach input")).to_be_checked()


def test_a_rewritten_answer_teaches_and_the_conversation_keeps_what_was_written(page: Page, server: Server) -> None:
    compare(page, "never")
    say(page, "How do I fold a swan?")
    wait_for_the_answer(page)
    written = answers(page)[-1]
    page.locator("#conversation .message-buttons-left").get_by_label("Edit").last.click()
    page.locator("#conversation textarea").last.fill("Begin with a square.")
    page.locator("#conversation").get_by_label("Submit").last.click()
    expect(page.locator("#note")).to_contain_text("your version teaches")
    assert answers(page)[-1] == written
    rows = server.http.get("/v1/export").text
    assert '"content": "Begin with a square."' in rows
    assert "How do I fold a swan?" in rows


def test_a_preset_is_chosen_and_the_page_says_what_no_longer_fitted(
    browser: Browser, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "presets.yaml").write_text("Kind words:\n  system_prompt: Be kind.\n  max_tokens: 16\n")
    long = "red green blue one two three " * 150  # the tiny model reads 2048 tokens, two of these are more
    with serving(tmp_path, model=tiny, compare_share=0) as running:
        context = browser.new_context(base_url=running.url, viewport=PHONE)
        page = context.new_page()
        page.set_default_timeout(SOON)
        open_chat(page)
        compare(page, "never")
        page.locator("#preset input").click()
        page.get_by_role("option", name="Kind words").click()
        expect(page.locator("#note")).to_contain_text("follow “Kind words”")
        for number in ("First", "Second"):
            say(page, f"{number}: {long}")
            wait_for_the_answer(page)
        line = "The first 2 messages no longer fit and were left out of this answer."
        expect(page.locator("#conversation")).to_contain_text(line)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        page.reload()
        expect(page.locator("#conversation")).to_contain_text(line)
        expect(page.locator("#preset input")).to_have_value("Kind words")
        page.locator("#conversation").get_by_label("Like", exact=True).last.click()
        expect(page.locator("#note")).to_contain_text("your rating is saved")
        prompts = "SELECT prompt[1].content, len(prompt), left_out FROM generations ORDER BY event"
        assert running.post("/v1/query", {"sql": prompts})["rows"] == [["Be kind.", 2, 0], ["Be kind.", 2, 2]]
        page.get_by_role("button", name="+ New").click()
        expect(page.locator("#preset input")).to_have_value("No preset")
        context.close()


def test_the_data_section_counts_previews_backs_up_and_asks_twice_before_it_erases(page: Page) -> None:
    page.goto("/admin/")
    page.get_by_text("Data: how people judge").click()
    shown = page.locator("#data-shown")
    page.click("#count")
    expect(shown).to_contain_text("picks that stand")
    page.click("#agree")
    expect(shown).to_contain_text("judged in opposite ways")
    page.click("#preview")
    expect(shown).to_contain_text("hidden in every snapshot")
    page.click("#back-up")
    expect(shown).to_contain_text("Backed up to")
    page.fill("#erase-name input, #erase-name textarea", "ada")
    page.click("#erase")
    expect(shown).to_contain_text("the same name in both fields")
    page.fill("#erase-again input, #erase-again textarea", "ada")
    page.click("#erase")
    expect(shown).to_contain_text("ada")
    expect(page.locator("#versions")).to_contain_text("v0")


@pytest.fixture
def slow(tmp_path: Path, tiny: Path) -> Iterator[Server]:
    """A server with two seats and an engine that takes its time."""
    with serving(tmp_path, engine="scripted", model=tiny, scripted_delay_s=0.35, max_answers=2) as running:
        yield running


def test_the_schedule_is_shown_refused_changed_and_reset(page: Page, server: Server) -> None:
    page.goto("/admin/")
    page.get_by_text("Schedule: when retrains start by themselves").click()
    shown, cron = page.locator("#schedule-shown"), page.locator("#schedule-cron").get_by_role("textbox")
    expect(shown).to_contain_text("new preferences")
    cron.fill("often")
    page.click("#schedule-save")
    expect(shown).to_contain_text("it must have five fields")
    expect(cron).to_have_value("often")
    cron.fill("0 2 * * *")
    page.locator("#schedule-quiet").get_by_role("textbox").fill("08:00-18:00")
    page.click("#schedule-save")
    expect(shown).to_contain_text("02:00")
    assert server.get("/v1/schedule")["quiet"] == "08:00-18:00"
    page.click("#schedule-off")
    expect(shown).to_contain_text("Runs start only when somebody asks.")
    expect(cron).to_have_value("")
    page.click("#schedule-reset")
    expect(shown).to_contain_text("As the settings say.")
    assert server.get("/v1/schedule")["every"] == 50


def gauge(server: Server, name: str) -> float:
    return next(
        float(line.split()[-1]) for line in server.http.get("/metrics").text.splitlines() if line.startswith(name + " ")
    )


def until(what: str, done: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < deadline, f"after {within_s} s still not: {what}"
        time.sleep(0.05)


def test_who_waits_sees_it_may_stop_and_a_closed_tab_frees_its_seats(browser: Browser, slow: Server) -> None:
    with browser.new_context(base_url=slow.url) as context:
        busy, waiting = context.new_page(), context.new_page()
        for page in (busy, waiting):
            open_chat(page)
        compare(busy, "always")
        say(busy, "Which is better?")
        expect(busy.locator("#answer-1")).to_contain_text("This is v0")
        compare(waiting, "never")
        say(waiting, "May I?")
        expect(waiting.locator("#conversation")).to_contain_text("2 answers are being written; yours begins in about")
        waiting.click("#stop")
        expect(waiting.locator("#note")).to_contain_text("Stopped")
        assert (gauge(slow, "zloop_answers_decoding"), gauge(slow, "zloop_answers_waiting")) == (2, 0)
        waiting.click("#retry")
        expect(waiting.locator("#conversation")).to_contain_text("yours begins in about")
        busy.close()
        until("the seats are free", lambda: gauge(slow, "zloop_answers_waiting") == 0, within_s=2)
        expect(waiting.locator("#conversation")).to_contain_text("This is v0")
        waiting.close()
        until("the last seat is free", lambda: gauge(slow, "zloop_answers_decoding") == 0, within_s=2)
    rows = slow.post("/v1/query", {"sql": "SELECT finish_reason FROM candidates"})["rows"]
    assert rows == [["cancelled"]] * 3


def test_a_stopping_server_finishes_the_answer_on_the_page(browser: Browser, slow: Server) -> None:
    with browser.new_context(base_url=slow.url) as context:
        page = context.new_page()
        open_chat(page)
        compare(page, "never")
        say(page, "Before you go?")
        expect(page.locator("#conversation")).to_contain_text("This is v0")
        slow.process.send_signal(signal.SIGTERM)
        wait_for_the_answer(page)
        assert answers(page)[-1].rstrip().endswith((".", "Copy"))
        assert slow.process.wait(30) == 0
        assert "Traceback" not in slow.log.read_text()


def test_a_pair_is_rated_blind_and_a_rater_goes_into_quarantine_and_back(page: Page, server: Server) -> None:
    server.pair("Which of these two?")
    before = server.get("/v1/statistics")["counts"]["picks"]
    page.goto("/rate/")
    expect(page.locator("#answer-2 h4")).to_be_visible()
    page.keyboard.press("1")
    expect(page.locator("#note")).to_contain_text("Saved, thank you.")
    assert server.get("/v1/statistics")["counts"]["picks"] == before + 1
    page.goto("/admin/")
    page.get_by_role("button", name="Raters: on whom can one rely?").click()
    page.locator("#list-raters").click()
    shown = page.locator("#raters-shown")
    expect(shown).to_contain_text("in quarantine: nobody.")  # who is suspicious hangs on how fast this test clicks
    page.locator("#quarantine-reason").get_by_role("textbox").fill("only trying")
    page.locator("#quarantine").click()
    expect(shown).to_contain_text("in quarantine: only trying")
    page.locator("#lift").click()
    expect(shown).to_contain_text("local may teach again.")
