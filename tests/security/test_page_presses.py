"""What the pages' handlers keep of quick presses, and what they refuse: a browser's event may carry anything.

The handlers are the real ones, on a real store; the browser side is in tests/browser/test_page_races.py.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import pytest
from pages import answer, built, operations_in, record_pair
from server import Server, serving
from tiny_model import build_tiny_gguf

from chat_app.operations import Operations
from chat_app.ui.chat import REASONS, ChatPage
from chat_app.ui.rate import RatePage
from feedback_store.records import Pair, PickChoice
from feedback_store.store import FeedbackStore

MANY = 40


@pytest.fixture
def operations(tmp_path: Path) -> Iterator[Operations]:
    (tmp_path / "presets.yaml").write_text("Kind words:\n  system_prompt: Be kind.\n")
    with operations_in(tmp_path) as found:
        yield found


@pytest.fixture
def chat(operations: Operations) -> ChatPage:
    return built(ChatPage, operations)


@pytest.fixture
def rate(operations: Operations) -> RatePage:
    return built(RatePage, operations)


def stored_picks(operations: Operations, pair: Pair) -> list[str]:
    found = operations.data.query(f"SELECT pick FROM picks WHERE pair_id = '{pair.pair_id}'", 10)
    return [row[0] for row in found["rows"]]


def store_of(operations: Operations) -> FeedbackStore:
    return operations._store


# --- the first word stands ------------------------------------------------------------------------------------------


def test_of_presses_at_once_one_is_kept_and_all_hear_of_it(operations: Operations, chat: ChatPage) -> None:
    turn = operations.begin_turn(None, "Which?")
    pair = record_pair(store_of(operations), turn_id=turn.turn_id)
    presses = list(islice(cycle((PickChoice.FIRST, PickChoice.SECOND, PickChoice.SKIP)), MANY))
    with ThreadPoolExecutor(MANY) as pool:
        said = [
            pool.submit(chat.settle, pick, pair.pair_id, [], turn.conversation_id).result
            for pick in presses
        ]  # fmt: skip
        notes = [str(one()[chat.note]) for one in said]
    (kept,) = stored_picks(operations, pair)
    for pick, note in zip(presses, notes, strict=True):
        assert ("Your first word on this pair stands" in note) == (pick.value != kept)
    answered = operations.turns(turn.conversation_id)[0].answer
    assert answered is not None
    assert answered.text == ("b" if kept == "second" else "a")


def test_a_second_press_on_the_rate_page_judges_no_other_pair(operations: Operations, rate: RatePage) -> None:
    pairs = {pair.pair_id: pair for pair in (record_pair(store_of(operations), f"Q{n}") for n in range(3))}
    shown = rate.next_pair()[rate.pair]
    after = rate.settle(PickChoice.FIRST, shown, shown)
    assert after[rate.pair] not in ("", shown)
    again = rate.settle(PickChoice.SECOND, shown, after[rate.pair])
    assert rate.pair not in again
    assert stored_picks(operations, pairs[shown]) == ["first"]
    assert stored_picks(operations, pairs[after[rate.pair]]) == []


def test_a_pair_that_was_judged_in_another_tab_makes_way(operations: Operations, rate: RatePage) -> None:
    pair, other = record_pair(store_of(operations), "Q1"), record_pair(store_of(operations), "Q2")
    operations.settle_pair(pair.pair_id, PickChoice.TIE)
    after = rate.settle(PickChoice.FIRST, pair.pair_id, pair.pair_id)
    assert after[rate.pair] == other.pair_id
    assert "your first word stands" in after[rate.note]
    assert stored_picks(operations, pair) == ["tie"]


def test_over_http_a_changed_mind_still_supersedes(operations: Operations) -> None:
    pair = record_pair(store_of(operations))
    operations.record_pick(pair.pair_id, PickChoice.FIRST)
    operations.record_pick(pair.pair_id, PickChoice.SECOND)
    outcome = operations.settle_pair(pair.pair_id, PickChoice.TIE)
    assert stored_picks(operations, pair) == ["first", "second"]
    assert (outcome.pick.pick, outcome.is_new) == (PickChoice.SECOND, False)


def test_each_rater_has_a_first_word(operations: Operations) -> None:
    pair, store = record_pair(store_of(operations)), store_of(operations)
    for rater, pick in (("ada", PickChoice.FIRST), ("bob", PickChoice.SECOND)):
        kept, is_new = store.record_first_pick(pair.pair_id, pick, rater=rater)
        assert (kept.pick, is_new) == (pick, True)
        kept, is_new = store.record_first_pick(pair.pair_id, PickChoice.SKIP, rater=rater)
        assert (kept.pick, is_new) == (pick, False)


# --- what a browser's event may carry ---------------------------------------------------------------------------------


def said(chat: ChatPage, text: Any, conversation_id: Any = "", preset: str = "", pair_id: str = "") -> dict[Any, Any]:
    """What the page answers to a message that is refused: the first update, and no other."""

    async def first() -> list[dict[Any, Any]]:
        return [update async for update in chat.say(text, conversation_id, "never", pair_id, True, preset)]

    (update,) = asyncio.run(first())
    return update


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x" * 204_800, "has 204,800 characters; the limit is 100,000"),
        ("x" * 3_000_000, "3,000,000"),
        ("x" * 100_001, "100,001"),
        ("half \ud83d", "U+D83D"),
        ("  \n", "Write a message first"),
        (None, "Write a message first"),
        (["a"], "Write a message first"),
    ],
)
def test_a_text_that_cannot_be_kept_is_refused_and_stays(
    operations: Operations, chat: ChatPage, text: Any, words: str
) -> None:
    update = said(chat, text)
    assert list(update) == [chat.note]  # the box is not touched
    assert words in update[chat.note]
    assert operations.conversations() == []


def test_a_message_for_a_conversation_that_is_gone_is_kept_in_the_box(operations: Operations, chat: ChatPage) -> None:
    for conversation_id in ("conv_gone", "{'path': '/etc/passwd'}", "a' OR '1"):
        update = said(chat, "Hello", conversation_id)
        assert list(update) == [chat.note]
        assert "not there any more" in update[chat.note]
    assert operations.conversations() == []


def test_typed_words_wait_for_the_pick(chat: ChatPage) -> None:
    assert list(said(chat, "so what", pair_id="pair_1")) == [chat.note]


def test_an_unknown_preset_is_refused_in_a_sentence(operations: Operations, chat: ChatPage) -> None:
    with pytest.raises(gr.Error, match="There is no preset"):
        said(chat, "Hello", preset="<b>none</b>")
    told = chat.choose_preset("", "<b>none</b>" * 1000)
    assert "There is no preset" in told
    assert "<b>" not in told
    assert len(told) < 2000
    with pytest.raises(gr.Error, match="no conversation"):
        chat.choose_preset("conv_gone", "Kind words")
    assert operations.conversations() == []


@pytest.mark.parametrize("reasons", [["x" * 5_000_000] * 20, ["clearer"] * 21, ["<b>"], [*REASONS, "other"]])
def test_reasons_are_of_those_offered(operations: Operations, chat: ChatPage, reasons: list[str]) -> None:
    pair = record_pair(store_of(operations))
    update = chat.settle(PickChoice.FIRST, pair.pair_id, reasons, "")
    assert "Nothing was saved" in update[chat.note]
    assert len(update[chat.note]) < 300
    assert stored_picks(operations, pair) == []


def test_a_pick_on_a_pair_that_is_not_there_is_refused(chat: ChatPage, rate: RatePage) -> None:
    with pytest.raises(gr.Error, match="no pair"):
        chat.settle(PickChoice.FIRST, "<b>pair</b>", [], "")
    with pytest.raises(gr.Error, match="no pair"):
        rate.settle(PickChoice.FIRST, "{'path': 1}", "")


def test_a_rewrite_and_a_thumb_may_carry_anything(operations: Operations, chat: ChatPage) -> None:
    turn = operations.begin_turn(None, "Which?")
    written = answer("as it was")
    store_of(operations).record_candidate(written, [{"role": "user", "content": "Which?"}], turn_id=turn.turn_id)
    store_of(operations).record_answer(turn.turn_id, written.candidate_id)
    here = turn.conversation_id

    def event(**values: Any) -> Any:
        return SimpleNamespace(**values)

    for index in (None, [], "1", {}, [[1]], -1, 99, 1.5):
        assert "not stored yet" in chat.rate(here, event(index=index, liked=True))
        assert "Only an answer" in chat.rewrite(here, event(index=index, value="better"))[chat.note]
    for value, words in (("x" * 3_000_000, "3,000,000 characters"), ("\ud800", "U+D800"), (7, "not to nothing")):
        assert words in chat.rewrite(here, event(index=1, value=value))[chat.note]
    assert "not there any more" in chat.rewrite("conv_gone", event(index=1, value="better"))[chat.note]
    assert "not stored yet" in chat.rate("conv_gone", event(index=1, liked=True))
    assert "your version teaches" in chat.rewrite(here, event(index=1, value="better"))[chat.note]


def test_a_conversation_that_is_gone_opens_a_new_one(chat: ChatPage) -> None:
    update = chat.open_thread("conv_gone")
    assert update[chat.conversation] == ""
    assert "not there any more" in update[chat.note]


# --- over a socket --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tiny = build_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    data_dir = tmp_path_factory.mktemp("data")
    with serving(data_dir, engine="scripted", model=tiny, compare_share=0) as running:
        yield running


def test_each_page_says_that_forms_and_frames_lead_nowhere(server: Server) -> None:
    for path in ("/", "/rate/", "/admin/", "/v1/models"):
        policy = server.http.get(path).headers["content-security-policy"]
        for part in ("form-action 'none'", "frame-src 'none'", "object-src 'none'", "worker-src 'none'"):
            assert part in policy, path


def test_no_field_of_the_chat_cuts_what_is_pasted(server: Server) -> None:
    config = server.get("/config")
    cut = [one["props"]["elem_id"] for one in config["components"] if one["props"].get("max_length") is not None]
    assert cut == []


def test_three_megabytes_through_the_page_are_refused(server: Server) -> None:
    config = server.get("/config")
    box = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "message")
    saying = next(one for one in config["dependencies"] if any(target == [box, "submit"] for target in one["targets"]))
    values: list[Any] = ["x" * 3_000_000 if one == box else "" for one in saying["inputs"]]
    values[2], values[4] = "never", True
    event = {"data": values, "fn_index": saying["id"], "session_hash": "three-megabytes"}
    refused = server.http.post("/gradio_api/queue/join", json=event)
    if refused.is_success:  # else what stands before the pages refused it already
        said = _events(server.http, "three-megabytes")
        assert "3,000,000 characters; the limit is 100,000" in said
    assert server.get("/v1/statistics")["counts"]["conversations"] == 0


def _events(http: httpx.Client, session: str) -> str:
    """What the page is told until its event is complete."""
    told = ""
    with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            told += line
            if "process_completed" in line:
                return told
    return told
