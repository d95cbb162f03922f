"""h2oGPT's reviews.csv, as its program writes it: no header, stars with chats, thumbs without questions."""

from __future__ import annotations

import csv
import datetime
import gzip
from pathlib import Path

import pytest
from test_importers_layouts import take

from feedback_store.errors import BadImport
from feedback_store.records import UnpairedPreference

MOMENT = datetime.datetime(2024, 10, 1, 12, 34, 56, 789012)  # as h2oGPT writes it, without a zone
CHAT = ["Why?", "Because \"it\" is\nso, 'truly'."]


def write_reviews(path: Path, *rows: list[object]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*row, MOMENT] for row in rows)
    return str(path)


def test_stars_make_every_answer_a_good_or_a_bad_one(tmp_path: Path) -> None:
    source = write_reviews(
        tmp_path / "reviews.csv",
        ["Great, both!", "5", CHAT, ["Why?", "So it is."]],
        ["", "1", ["Why?", "No."]],
        ["Meh", "3", CHAT],
        ["nobody pressed a star", CHAT],
        ["True,h2oGPT [Model: m]", "Because."],
        ["Broken", "4", "['Why?', "],
        ["No answer yet", "4", ["Why?", None]],
        ["No chat", "4"],
        ["A file", "4", [("a.png",), "I see."]],
    )
    rows, opened = take(source)
    assert all(isinstance(row, UnpairedPreference) for row in rows)
    found = [(row.prompt[0]["content"], row.completion, row.label) for row in rows]  # type: ignore[union-attr]
    assert found == [("Why?", CHAT[1], True), ("Why?", "So it is.", True), ("Why?", "No.", False)]
    assert (opened.format, opened.rows_read) == ("h2ogpt", 9)
    assert opened.examples == {"unlabelled": [3, 4], "empty": [5, 7], "malformed": [6, 8, 9]}


def test_a_file_of_thumbs_only_is_known_and_says_that_the_questions_are_missing(tmp_path: Path) -> None:
    source = write_reviews(tmp_path / "reviews.csv", ["True, [Model: m]", "Because."], ["False, [Model: m]", "No."])
    packed = tmp_path / "reviews.csv.gz"
    packed.write_bytes(gzip.compress(Path(source).read_bytes()))
    for path in (source, str(packed)):
        rows, opened = take(path)
        assert (rows, opened.format, dict(opened.skipped)) == ([], "h2ogpt", {"empty": 2})


def test_another_table_without_a_header_is_not_taken_for_reviews(tmp_path: Path) -> None:
    source = write_reviews(tmp_path / "visits.csv", ["page", "home"], ["page", "about"])
    with pytest.raises(BadImport, match="no known format has the columns cells"):
        take(source)


def test_a_chat_that_is_too_long_is_not_even_taken_apart(tmp_path: Path) -> None:
    source = write_reviews(
        tmp_path / "reviews.csv", ["Long", "5", ["Why?", "x" * 500_000]], ["Long", "5", ["a", "x" * 25_000]]
    )
    assert dict(take(source)[1].skipped) == {"over_long": 2}
