"""What leaves: TRL rows and a CSV that no spreadsheet runs."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime

import pytest

from feedback_store.exports import CSV_COLUMNS, csv_text, trl_lines
from feedback_store.records import Message, Preference

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def preference(chosen: str = "Because.", rejected: str = "No.", rater: str | None = "ana") -> Preference:
    prompt = (Message(role="system", content="Be brief."), Message(role="user", content="Why?"))
    return Preference("pref_1", prompt, chosen, rejected, "pick", 1.0, rater, "pick_1", ("v1", "v0"), None, NOW)


def test_a_trl_row_has_the_conversation_and_where_it_comes_from() -> None:
    (row,) = trl_lines([preference()])
    assert json.loads(json.dumps(row)) == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": "No."}],
        "preference_id": "pref_1",
        "pick_id": "pick_1",
        "source": "pick",
        "rater": "ana",
        "weight": 1.0,
        "versions": ["v1", "v0"],
        "practice": None,
        "created_at": "2026-11-22T12:00:00+00:00",
    }


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "  =", "＝"])
def test_no_csv_cell_is_a_formula(start: str) -> None:
    danger = start + 'HYPERLINK("https://evil","x")'
    rows = list(csv.reader(io.StringIO(csv_text([preference(chosen=danger, rater=danger)]), newline="")))
    named = dict(zip(CSV_COLUMNS, rows[1], strict=True))
    assert named["chosen"] == "'" + danger
    assert named["rater"] == "'" + danger


def test_csv_keeps_text_as_it_is() -> None:
    text = 'Lines\nand "quotes", commas – and 😀 = fine'
    rows = list(csv.reader(io.StringIO(csv_text([preference(chosen=text, rater=None)]), newline="")))
    assert rows[0] == list(CSV_COLUMNS)
    named = dict(zip(CSV_COLUMNS, rows[1], strict=True))
    assert (named["chosen"], named["rater"], named["versions"], named["weight"]) == (text, "", "v1 v0", "1")
    assert json.loads(named["prompt"])[1] == {"role": "user", "content": "Why?"}
