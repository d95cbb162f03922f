"""Argilla's records in its four layouts: rankings, labels, ratings, suggestions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_importers_layouts import ARGILLA_RECORD, dialogue, said, take

from feedback_store.importers.argilla_records import matches, read
from feedback_store.importers.pairs import Choices, ImportedLabel, ImportedPair, Item, Skip

FIELDS = {"prompt": "Why?", "response1": "No.", "response2": "Because."}
WHY = ({"role": "user", "content": "Why?"},)


def record(*responses: tuple[str, Any, str], fields: dict[str, Any] = FIELDS) -> dict[str, Any]:
    """A record of Argilla 2 with responses (question, value, user)."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for question, value, user in responses:
        kept.setdefault(question, []).append({"value": value, "user_id": user})
    return {"id": "r", "fields": fields, "metadata": {}, "suggestions": {}, "responses": kept, "vectors": {}}


def items(row: dict[str, Any]) -> list[Item]:
    assert matches(row)
    found = read(row, Choices())
    return [found] if isinstance(found, ImportedPair | ImportedLabel | Skip) else list(found)


ONE = [ImportedPair(WHY, "Because.", "No.", "u1")]
RANKED_1 = [{"rank": 1, "value": "response2"}, {"rank": 2, "value": "response1"}]


@pytest.mark.parametrize(
    "row",
    [
        ARGILLA_RECORD,
        {**FIELDS, "id": "r", "status": "completed", "_server_id": "s", "topic": "x",
         "preference.responses": [["response2", "response1"]], "preference.responses.users": ["u1"],
         "preference.responses.status": ["submitted"]},
        {"fields": FIELDS, "metadata": {}, "external_id": "r", "suggestions": [],
         "responses": [{"user_id": "u1", "status": "submitted", "values": {"preference": {"value": RANKED_1}}}]},
        {**FIELDS, "preference": [{"user_id": "u1", "value": RANKED_1, "status": "submitted"}],
         "preference-suggestion": None, "preference-suggestion-metadata": {"type": None}, "external_id": "r"},
        {**FIELDS, "preference": {"user_id": ["u1"], "value": [RANKED_1], "status": ["submitted"]},
         "preference-suggestion": None, "external_id": "r"},
    ],
)  # fmt: skip
def test_each_layout_gives_the_same_pair(row: dict[str, Any]) -> None:
    assert items(row) == ONE


@pytest.mark.parametrize(
    "responses",
    [
        [("preference", "response2", "u1")],
        [("preference", "Response-2", "u1")],
        [("better", "2", "u1")],
        [("comment", "a fine question", "u1"), ("preference", "response_2", "u1")],
        [("rating_1", 2, "u1"), ("rating_2", 4, "u1")],
        [("helpful-1", 5, "u1"), ("honest-1", 1, "u1"), ("helpful-2", 4, "u1"), ("honest-2", 4, "u1")],
        [("preference", [{"value": "response2"}, {"value": "response1"}], "u1"), ("rating_1", 5, "u1")],
    ],
)
def test_rankings_labels_and_ratings_say_the_same(responses: list[tuple[str, Any, str]]) -> None:
    assert items(record(*responses)) == ONE


def test_the_best_of_many_stands_against_the_worst() -> None:
    fields = {"instruction": "Why?", "completion-a": "No.", "completion-b": "Because.", "completion-c": "Perhaps."}
    ranked = ["completion-b", "completion-c", "completion-a"]
    assert items(record(("ranking", ranked, "u1"), fields=fields)) == ONE
    ranks = [{"rank": 1, "value": name} for name in ranked]
    assert items(record(("ranking", ranks, "u1"), fields=fields)) == [Skip("tie")]


def test_every_person_gives_a_row_of_their_own() -> None:
    found = items(record(("better", "2", "u1"), ("better", "1", "u2"), ("better", "tie", "u3"), ("note", "hm", "u4")))
    other = ImportedPair(WHY, "No.", "Because.", "u2")
    assert found == [*ONE, other, Skip("tie"), Skip("unlabelled")]


def test_drafts_and_discarded_responses_say_nothing_and_keep_suggestions_out() -> None:
    row = {
        **FIELDS, "better.responses": ["2", "1"], "better.responses.users": ["u1", "u2"],
        "better.responses.status": ["discarded", "draft"], "better.suggestion": "2",
    }  # fmt: skip
    assert items(row) == [Skip("unlabelled")]


@pytest.mark.parametrize(
    "row",
    [
        record() | {"suggestions": {"better": {"value": "2", "score": 0.9, "agent": "judge"}}},
        {"fields": FIELDS, "responses": [], "suggestions": [{"question_name": "better", "value": "2"}]},
        {**FIELDS, "better.suggestion": "2", "better.suggestion.score": 0.9, "better.suggestion.agent": "judge"},
        {**FIELDS, "better": [], "better-suggestion": "2", "better-suggestion-metadata": {"agent": "judge"}},
    ],
)
def test_suggestions_count_where_nobody_responded_and_have_no_rater(row: dict[str, Any]) -> None:
    assert items(row) == [ImportedPair(WHY, "Because.", "No.", None)]


def test_a_single_answer_is_good_or_bad() -> None:
    fields = {"prompt": "Why?", "response": "Because."}
    assert items(record(("label", "Good", "u1"), fields=fields)) == [ImportedLabel(WHY, "Because.", True, "u1")]
    assert items(record(("label", "bad", "u1"), fields=fields)) == [ImportedLabel(WHY, "Because.", False, "u1")]
    assert items(record(("rating", 4, "u1"), fields=fields)) == [Skip("unlabelled")]


def test_chat_fields_and_a_context_belong_to_the_prompt() -> None:
    chat = [said("system", "Be brief."), *dialogue("Hi", "Hello."), said("user", "Why?")]
    (pair,) = items(record(("better", "2", "u1"), fields=FIELDS | {"prompt": chat}))
    assert isinstance(pair, ImportedPair)
    assert pair.prompt == tuple(chat)
    (pair,) = items(record(("better", "2", "u1"), fields=FIELDS | {"context": "It rains."}))
    assert isinstance(pair, ImportedPair)
    assert pair.prompt[0]["content"] == "It rains.\n\nWhy?"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": "Why?", "response1": "No.", "response2": "Because."}, "malformed"),
        ({"prompt": "Why?", "left": "No.", "right": "Because."}, "malformed"),
        ({"prompt": "Why?", "response1": "Because.", "response2": "Because. "}, "identical"),
        ({"prompt": "Why?", "response1": "x" * 24_001, "response2": "Because."}, "over_long"),
        ({"prompt": "Why?", "response2": "Because.", "response3": " "}, "unlabelled"),
    ],
)
def test_a_record_that_cannot_teach_is_skipped_with_its_reason(fields: dict[str, str], reason: str) -> None:
    assert items(record(("better", "2", "u1"), fields=fields)) == [Skip(reason)]


def test_a_data_set_file_of_flattened_records_is_read(tmp_path: Path) -> None:
    rows = [
        {**FIELDS, "id": "r", "rating_1.responses": [2, 3], "rating_1.responses.users": ["u1", "u2"],
         "rating_1.responses.status": ["submitted", "submitted"], "rating_2.responses": [4, 3],
         "rating_2.responses.users": ["u1", "u2"], "rating_2.responses.status": ["submitted", "submitted"]},
        {**FIELDS, "id": "s", "rating_1.responses": None},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (row,), opened = take(str(tmp_path / "rows.parquet"))
    assert (opened.format, row.rater, row.source) == ("argilla_records", "u1", "argilla_records")
    assert opened.examples == {"tie": [1], "unlabelled": [2]}
