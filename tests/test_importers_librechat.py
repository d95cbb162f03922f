"""LibreChat's conversations: thumbs as labels, opposite thumbs on one question as pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_importers_layouts import (
    LIBRE_ANSWERED,
    LIBRE_ASKED,
    LIBRECHAT,
    libre_conversation,
    libre_message,
    take,
    write_lines,
)

from feedback_store.importers.librechat import matches, read
from feedback_store.importers.pairs import Choices, ImportedLabel, ImportedPair, Skip

WHY = ({"role": "user", "content": "Why?"},)
DOWN = libre_message("b", "q", False, "No.", feedback={"rating": "thumbsDown", "tag": {"key": "inaccurate"}})


def test_a_thumb_is_a_label_and_a_message_without_one_says_nothing() -> None:
    other = libre_message("b", "q", False, "No.", model="n")
    assert read(LIBRECHAT, Choices()) == [ImportedLabel(WHY, "Because.", True, None, ("m",))]
    assert read(libre_conversation(LIBRE_ASKED, LIBRE_ANSWERED, other), Choices()) == read(LIBRECHAT, Choices())
    assert read(libre_conversation(LIBRE_ASKED, DOWN), Choices()) == [ImportedLabel(WHY, "No.", False, None, ("m",))]
    assert read(libre_conversation(LIBRE_ASKED, other), Choices()) == [Skip("unlabelled")]


def test_opposite_thumbs_on_one_question_are_one_pair() -> None:
    row = libre_conversation(LIBRE_ASKED, LIBRE_ANSWERED | {"user": "u7"}, DOWN)
    assert read(row, Choices()) == [ImportedPair(WHY, "Because.", "No.", "u7", ("m", "m"))]


def test_a_tree_is_the_same_as_a_list() -> None:
    later = libre_message("q2", "a", True, "And?")
    last = libre_message("a2", "q2", False, "So.", feedback={"rating": "thumbsDown"})
    listed = libre_conversation(LIBRE_ASKED, LIBRE_ANSWERED, DOWN, later, last)
    nested = LIBRE_ASKED | {"children": [LIBRE_ANSWERED | {"children": [later | {"children": [last]}]}, DOWN]}
    tree = {name: value for name, value in listed.items() if name != "messages"} | {"messagesTree": [nested]}
    assert matches(tree)
    found = read(tree, Choices())
    assert found == read(listed, Choices())
    assert isinstance(found, list)
    assert isinstance(found[-1], ImportedLabel)
    assert [message["content"] for message in found[-1].prompt] == ["Why?", "Because.", "And?"]


def test_a_long_tree_is_read() -> None:
    message = libre_message("m3000", "m2999", False, "End.", feedback={"rating": "thumbsUp"})
    for number in range(2999, -1, -1):
        message = libre_message(f"m{number}", f"m{number - 1}", number % 2 == 1, "x") | {"children": [message]}
    (found,) = read({"conversationId": "c", "messagesTree": [message]}, Choices())  # type: ignore[misc]
    assert isinstance(found, ImportedLabel)
    assert len(found.prompt) == 3000


def test_text_parts_are_the_answer_and_the_instruction_goes_first() -> None:
    parts = [
        {"type": "think", "think": "hm"},
        {"type": "text", "text": "Because."},
        {"type": "tool_call", "tool_call": {}},
        {"type": "text", "text": {"value": "Truly."}},
        None,
    ]
    answer = LIBRE_ANSWERED | {"text": "", "content": parts}
    row = libre_conversation(LIBRE_ASKED, answer, options={"promptPrefix": "Be brief."}, user="u8")
    system = {"role": "system", "content": "Be brief."}
    assert read(row, Choices()) == [ImportedLabel((system, *WHY), "Because.\n\nTruly.", True, "u8", ("m",))]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"error": True}, "malformed"),
        ({"unfinished": True}, "malformed"),
        ({"finish_reason": "length"}, "malformed"),
        ({"parentMessageId": "gone"}, "malformed"),
        ({"text": " "}, "empty"),
        ({"text": "x" * 24_001}, "over_long"),
        ({"isCreatedByUser": True}, "malformed"),
        ({"feedback": {"rating": "sideways"}}, "unlabelled"),
        ({"feedback": None}, "unlabelled"),
    ],
)
def test_an_answer_that_cannot_teach_is_skipped_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    assert read(libre_conversation(LIBRE_ASKED, LIBRE_ANSWERED | changes), Choices()) == [Skip(reason)]


def test_one_conversation_in_a_file_or_many_are_rows(tmp_path: Path) -> None:
    silent = libre_conversation(LIBRE_ASKED)
    for indent in (None, 2):
        (tmp_path / "one.json").write_text(json.dumps(LIBRECHAT, indent=indent))
        rows, opened = take(str(tmp_path / "one.json"))
        assert (opened.format, len(rows), opened.rows_read) == ("librechat", 1, 1)
        (tmp_path / "many.json").write_text(json.dumps({"conversations": [silent, LIBRECHAT]}, indent=indent))
        assert take(str(tmp_path / "many.json"))[1].examples == {"unlabelled": [1]}
    assert take(write_lines(tmp_path / "lines.jsonl", LIBRECHAT, silent))[1].examples == {"unlabelled": [2]}
