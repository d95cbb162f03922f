"""Open WebUI's feedback history and chats: thumbs as labels, answers of two models as pairs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from test_importers_layouts import (
    OPEN_WEBUI,
    WEBUI_ANSWERED,
    WEBUI_ASKED,
    take,
    webui_chat,
    webui_feedback,
    webui_message,
)

from feedback_store.importers.open_webui import matches, read
from feedback_store.importers.pairs import Choices, ImportedLabel, ImportedPair, Skip

WHY = ({"role": "user", "content": "Why?"},)
RIVAL = webui_message("b", "q", "assistant", "No.", model="n")


@pytest.mark.parametrize(("rating", "label"), [(1, True), ("1", True), (-1, False), ("-1", False)])
def test_a_thumb_on_a_lone_answer_is_a_label(rating: object, label: bool) -> None:
    found = read(webui_feedback(rating, "a", webui_chat(WEBUI_ASKED, WEBUI_ANSWERED)), Choices())
    assert found == [ImportedLabel(WHY, "Because.", label, "u1", ("m",))]


@pytest.mark.parametrize(
    ("rating", "chosen", "rejected", "versions"),
    [(1, "Because.", "No.", ("m", "n")), (-1, "No.", "Because.", ("n", "m"))],
)
def test_a_thumb_beside_another_models_answer_is_a_pair(
    rating: int, chosen: str, rejected: str, versions: tuple[str, str]
) -> None:
    row = webui_feedback(rating, "a", webui_chat(WEBUI_ASKED, WEBUI_ANSWERED, RIVAL))
    assert read(row, Choices()) == [ImportedPair(WHY, chosen, rejected, "u1", versions)]


def test_an_arena_answer_goes_by_the_model_that_wrote_it() -> None:
    one = webui_message("a", "q", "assistant", "Because.", model="arena-model", selectedModelId="m", arena=True)
    other = webui_message("b", "q", "assistant", "No.", model="arena-model", selectedModelId="n", arena=True)
    (pair,) = read(webui_feedback(1, "a", webui_chat(WEBUI_ASKED, one, other)), Choices())  # type: ignore[misc]
    assert pair == ImportedPair(WHY, "Because.", "No.", "u1", ("m", "n"))


@pytest.mark.parametrize(
    "other",
    [
        RIVAL | {"annotation": {"rating": 1}},
        RIVAL | {"model": "m"},
        RIVAL | {"error": {"content": "no memory"}},
        RIVAL | {"done": False},
        RIVAL | {"parentId": "another question"},
        RIVAL | {"role": "user"},
    ],
)
def test_an_answer_that_was_not_compared_makes_no_pair(other: dict[str, Any]) -> None:
    found = read(webui_feedback(1, "a", webui_chat(WEBUI_ASKED, WEBUI_ANSWERED, other)), Choices())
    assert found == [ImportedLabel(WHY, "Because.", True, "u1", ("m",))]


def test_a_retry_of_one_model_with_the_opposite_thumb_makes_a_pair() -> None:
    other = RIVAL | {"model": "m", "annotation": {"rating": -1}}
    found = read(webui_feedback(1, "a", webui_chat(WEBUI_ASKED, WEBUI_ANSWERED, other)), Choices())
    assert found == [ImportedPair(WHY, "Because.", "No.", "u1", ("m", "m"))]


def test_the_way_to_the_answer_and_the_system_prompt_belong_to_the_prompt() -> None:
    thought = '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> hm\n</details>\n'
    chat = webui_chat(
        webui_message("s", None, "user", "Hi"),
        webui_message("h", "s", "assistant", f"{thought}Hello."),
        webui_message("x", "s", "assistant", "Not on the way."),
        webui_message("q", "h", "user", "Why?"),
        webui_message("a", "q", "assistant", f"{thought}Because.", model="m"),
        params={"system": "Be brief."},
    )
    (found,) = read(webui_feedback(1, "a", chat), Choices())  # type: ignore[misc]
    assert isinstance(found, ImportedLabel)
    assert [message["content"] for message in found.prompt] == ["Be brief.", "Hi", "Hello.", "Why?"]
    assert found.completion == "Because."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (webui_feedback(None, "a", webui_chat(WEBUI_ASKED, WEBUI_ANSWERED)), "unlabelled"),
        (webui_feedback(0, "a", webui_chat(WEBUI_ASKED, WEBUI_ANSWERED)), "unlabelled"),
        (webui_feedback(1, "a", None), "empty"),
        (webui_feedback(1, "gone", webui_chat(WEBUI_ASKED, WEBUI_ANSWERED)), "malformed"),
        (webui_feedback(1, "q", webui_chat(WEBUI_ASKED, WEBUI_ANSWERED)), "malformed"),
        (webui_feedback(1, "a", webui_chat(WEBUI_ASKED, WEBUI_ANSWERED | {"done": False})), "malformed"),
        (webui_feedback(1, "a", webui_chat(WEBUI_ANSWERED)), "malformed"),
        (webui_feedback(1, "a", webui_chat(WEBUI_ASKED | {"parentId": "a"}, WEBUI_ANSWERED)), None),
    ],
)
def test_feedback_that_cannot_teach_is_skipped_with_its_reason(row: dict[str, Any], reason: str | None) -> None:
    found = read(row, Choices())
    items = [found] if isinstance(found, Skip) else list(found)  # type: ignore[arg-type]
    assert [item for item in items if isinstance(item, Skip)] == ([] if reason is None else [Skip(reason)])


def test_a_chat_export_gives_its_thumbs_and_each_pair_once() -> None:
    good, bad = WEBUI_ANSWERED | {"annotation": {"rating": 1}}, RIVAL | {"annotation": {"rating": -1}}
    later = [webui_message("q2", "a", "user", "And?"), webui_message("a2", "q2", "assistant", "So.", model="m")]
    chat = webui_chat(WEBUI_ASKED, good, bad, *later)
    assert matches(chat)
    assert read(chat, Choices()) == [ImportedPair(WHY, "Because.", "No.", "u1", ("m", "n"))]
    assert read(webui_chat(WEBUI_ASKED, WEBUI_ANSWERED), Choices()) == [Skip("unlabelled")]


@pytest.mark.parametrize("name", ["export.json", "export.jsonl", "export.json.gz"])
def test_the_export_is_one_document_and_its_items_are_numbered(tmp_path: Path, name: str) -> None:
    items = [OPEN_WEBUI, webui_feedback(None, "a", None), webui_feedback(1, "a", None)]
    for document in (items, {"items": items, "total": 3}):
        for text in (json.dumps(document), json.dumps(document, indent=2)):
            content = text.encode()
            (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
            rows, opened = take(str(tmp_path / name))
            assert (opened.format, len(rows), opened.rows_read) == ("open_webui", 1, 3)
            assert opened.examples == {"unlabelled": [2], "empty": [3]}
            assert rows[0].rater == "u1"
