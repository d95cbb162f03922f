"""One row a format, as the programs write them, and which format is found for it."""

from __future__ import annotations

import copy
import json
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from feedback_store.importers import FORMATS, Choices, PreferenceSource, detect, read_preferences
from feedback_store.records import IMPORT_SOURCES, Preference, UnpairedPreference

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
PLAIN = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [said("user", question), said("assistant", answer)]


H4 = {
    "prompt": "Why?", "prompt_id": "x", "messages": dialogue("Why?", "Because."),
    "chosen": dialogue("Why?", "Because."), "rejected": dialogue("Why?", "No."),
    "score_chosen": 8.5, "score_rejected": 4.0,
}  # fmt: skip
ARGILLA = {
    "source": "evol_instruct", "prompt": "Why?", "chosen": dialogue("Why?", "Because."), "chosen-rating": 5.0,
    "chosen-model": "m", "rejected": dialogue("Why?", "No."), "rejected-rating": 1.25, "rejected-model": "n",
}  # fmt: skip
EXPLICIT = {
    "prompt": [said("user", "Why?")],
    "chosen": [said("assistant", "Because.")],
    "rejected": [said("assistant", "No.")],
}
IMPLICIT = {"chosen": dialogue("Why?", "Because."), "rejected": dialogue("Why?", "No.")}


def completion(model: str, response: str, ratings: str, overall: float) -> dict[str, Any]:
    """An answer of raw UltraFeedback; ``ratings`` has a sign for each of the four aspects, ``-`` for N/A."""
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    rated = {name: {"Rating": "N/A" if one == "-" else one} for name, one in zip(aspects, ratings, strict=True)}
    return {"model": model, "response": response, "annotations": rated, "overall_score": overall}


RAW = {
    "source": "sharegpt", "instruction": "Why?", "models": ["a", "b", "c", "d"], "correct_answers": ["None"],
    "completions": [
        completion("a", "No.", "2222", 10.0), completion("b", "Because.", "5454", 8.0),
        completion("c", "Perhaps.", "33-3", 6.0), completion("d", "Go away.", "1111", 2.0),
    ],
}  # fmt: skip
HH = {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
KTO = {"prompt": [said("user", "Why?")], "completion": [said("assistant", "Because.")], "label": True}


def webui_message(name: str, parent: str | None, role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "parentId": parent, "childrenIds": [], "role": role, "content": content, "done": True, **more}


def webui_chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    history = {"messages": {one["id"]: one for one in messages}}
    return {
        "id": "c1", "user_id": "u1", "title": "Why", "created_at": 1, "updated_at": 2,
        "chat": {"title": "Why", "models": ["m"], "history": history, **more},
    }  # fmt: skip


def webui_feedback(rating: object, message_id: str, chat: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "id": "f1", "user_id": "u1", "version": 0, "type": "rating",
        "data": {"rating": rating, "model_id": "m", "reason": "accurate_information", "comment": "", "tags": []},
        "meta": {"arena": False, "model_id": "m", "message_id": message_id, "message_index": 2, "chat_id": "c1"},
        "snapshot": None if chat is None else {"chat": chat}, "created_at": 1, "updated_at": 2,
    }  # fmt: skip


WEBUI_ASKED = webui_message("q", None, "user", "Why?")
WEBUI_ANSWERED = webui_message("a", "q", "assistant", "Because.", model="m")
OPEN_WEBUI = webui_feedback(1, "a", webui_chat(WEBUI_ASKED, WEBUI_ANSWERED))


def libre_message(name: str, parent: str, by_user: bool, text: str, **more: Any) -> dict[str, Any]:
    return {
        "messageId": name, "conversationId": "c1", "parentMessageId": parent, "sender": "User" if by_user else "M",
        "text": text, "isCreatedByUser": by_user, "model": None if by_user else "m", "error": False,
        "unfinished": False, **more,
    }  # fmt: skip


def libre_conversation(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "conversationId": "c1", "endpoint": "openAI", "title": "Why", "exportAt": "12:00:00 GMT+0000",
        "branches": True, "recursive": False, "messages": list(messages), **more,
    }  # fmt: skip


LIBRE_ASKED = libre_message("q", "00000000-0000-0000-0000-000000000000", True, "Why?")
LIBRE_ANSWERED = libre_message("a", "q", False, "Because.", feedback={"rating": "thumbsUp", "tag": "accurate_reliable"})
LIBRECHAT = libre_conversation(LIBRE_ASKED, LIBRE_ANSWERED)
ARGILLA_RECORD = {
    "id": "r1", "fields": {"prompt": "Why?", "response1": "No.", "response2": "Because."}, "metadata": {},
    "suggestions": {}, "responses": {"preference": [{"value": ["response2", "response1"], "user_id": "u1"}]},
    "vectors": {}, "_server_id": "s1",
}  # fmt: skip
H2OGPT = {"cells": ["Good!", "5", "['Why?', 'Because.']", "2024-10-01 12:34:56.789012"]}

ROWS: dict[str, dict[str, Any]] = {
    "ultrafeedback_raw": RAW, "ultrafeedback_binarized": H4, "argilla": ARGILLA, "argilla_records": ARGILLA_RECORD,
    "trl": EXPLICIT, "hh_rlhf": HH, "kto": KTO, "open_webui": OPEN_WEBUI, "librechat": LIBRECHAT, "h2ogpt": H2OGPT,
}  # fmt: skip


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def take(
    source: str, name: str = "auto", choices: Choices | None = None
) -> tuple[list[Preference | UnpairedPreference], PreferenceSource]:
    """All that a source gives, pairs before labels of each batch, and the source with its counts."""
    opened = read_preferences(source, name, NOW, choices or Choices())
    return [row for batch in opened.batches(100) for row in (*batch.pairs, *batch.unpaired)], opened


def test_every_import_source_has_its_format_and_its_row() -> None:
    assert set(FORMATS) == set(ROWS) == set(IMPORT_SOURCES)
    assert all(name == importer.NAME and importer.WHY for name, importer in FORMATS.items())


@pytest.mark.parametrize("name", ROWS)
def test_no_two_formats_claim_one_row(name: str) -> None:
    row = ROWS[name]
    assert [one for one, importer in FORMATS.items() if importer.matches(row)] == [name]
    assert detect([row, row, {"broken": True}]) == (name, FORMATS[name].WHY)
    assert detect([row, {"broken": True}, {"broken": True}]) is None


@pytest.mark.parametrize("name", ROWS)
def test_every_format_gives_the_same_evidence_and_can_be_named(tmp_path: Path, name: str) -> None:
    source = write_lines(tmp_path / "rows.jsonl", ROWS[name])
    (row,), opened = take(source, choices=Choices(rejected="worst"))
    assert (opened.format, opened.why, opened.rows_read, dict(opened.skipped)) == (name, FORMATS[name].WHY, 1, {})
    assert (row.source, row.weight, row.created_at) == (name, 1.0, NOW)
    assert row.prompt == ({"role": "user", "content": "Why?"},)
    assert (
        row.chosen == "Because." if isinstance(row, Preference) else (row.completion, row.label) == ("Because.", True)
    )
    named, again = take(source, name, Choices(rejected="worst"))
    assert (named, again.why) == ([row], "the format was named by the caller")


def test_a_row_that_fits_no_format_is_not_guessed() -> None:
    assert detect([{"instruction": "Why?", "completions": []}]) is None
    assert detect([{"chosen": "The sky is blue.", "rejected": "The sky is green."}]) is None
    assert detect([{"id": "1", "conversations": [{"from": "human", "value": "Why?"}]}]) is None


def spoilt(value: Any, chance: random.Random) -> Any:
    """The value with some part of it replaced by something else."""
    if chance.random() < 0.08:
        return chance.choice([None, "", "x", 3, -1.5, True, [], {}, [None], [[]], {"value": None}, "N/A", "\ud83d"])
    if isinstance(value, dict):
        return {name: spoilt(one, chance) for name, one in value.items() if chance.random() > 0.03}
    return [spoilt(one, chance) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ROWS)
def test_spoilt_rows_are_counted_and_never_stop_an_import(tmp_path: Path, name: str) -> None:
    chance = random.Random(name)
    rows = [spoilt(copy.deepcopy(ROWS[name]), chance) for _ in range(400)]
    source = write_lines(tmp_path / "rows.jsonl", *([ROWS[name]] * 20), *(row for row in rows if isinstance(row, dict)))
    found, opened = take(source)
    assert opened.format == name
    assert found
    assert sum(opened.skipped.values()) > 0
    assert set(opened.skipped) <= {"tie", "empty", "identical", "over_long", "malformed", "unlabelled", "practice"}
    assert set(opened.skipped) == set(opened.examples)
