"""Raw UltraFeedback: which of the four answers make the pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_importers_layouts import RAW, completion, take, write_lines

from feedback_store.errors import InvalidRecord
from feedback_store.importers.pairs import Choices, ImportedPair, Skip
from feedback_store.importers.ultrafeedback_raw import read

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "ultrafeedback" / "raw_openbmb_partial_2.jsonl"


def pair(row: dict[str, Any], **choices: Any) -> ImportedPair:
    read_row = read(row, Choices(**choices))
    assert isinstance(read_row, ImportedPair)
    return read_row


def row_of(*completions: dict[str, Any], instruction: str = "Why?") -> dict[str, Any]:
    return {"instruction": instruction, "completions": list(completions)}


def test_the_best_mean_rating_is_chosen_against_the_worst_one() -> None:
    best = pair(RAW, rejected="worst")
    assert (best.chosen, best.rejected, best.versions) == ("Because.", "Go away.", ("b", "d"))
    assert best.prompt == ({"role": "user", "content": "Why?"},)


def test_the_overall_score_is_used_by_choice_with_its_known_wrong_values() -> None:
    by_score = pair(RAW, rejected="worst", score="overall_score")
    assert (by_score.chosen, by_score.versions) == ("No.", ("a", "d"))


def test_an_aspect_without_a_rating_does_not_count() -> None:
    row = row_of(completion("a", "Half.", "--4-", 1), completion("b", "Three.", "3333", 1))
    assert pair(row).chosen == "Half."


def test_the_random_answer_depends_on_the_instruction_and_the_seed_only(tmp_path: Path) -> None:
    rows = [RAW | {"instruction": f"Question {number}"} for number in range(200)]
    found, _ = take(write_lines(tmp_path / "rows.jsonl", *rows))
    turned, _ = take(write_lines(tmp_path / "turned.jsonl", *rows[::-1]))
    assert {row.preference_id for row in found} == {row.preference_id for row in turned}  # type: ignore[union-attr]
    drawn = [pair(row).rejected for row in rows]
    assert all(drawn.count(answer) > 40 for answer in ("No.", "Perhaps.", "Go away."))
    assert "Because." not in drawn
    assert [pair(row, seed=1).rejected for row in rows] != drawn


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (row_of(completion("a", "A.", "3333", 1), completion("b", "B.", "3333", 9)), "tie"),
        (row_of(completion("a", "A.", "----", 1), completion("b", "B.", "3333", 9)), "unlabelled"),
        (row_of({"model": "a", "response": "A."}, {"model": "b", "response": "B."}), "unlabelled"),
        (row_of(completion("a", "A.", "5555", 1)), "unlabelled"),
        (row_of(completion("a", "N/A", "5555", 1), completion("b", "B.", "3333", 9)), "empty"),
        (row_of(completion("a", "A.", "5555", 1), completion("b", " A.", "3333", 9)), "identical"),
        (row_of(completion("a", "A.", "5555", 1), completion("b", "B.", "3333", 9), instruction=" "), "empty"),
        ({"instruction": "Why?", "completions": ["A.", "B."]}, "malformed"),
    ],
)
def test_a_row_that_cannot_teach_is_skipped_with_its_reason(row: dict[str, Any], reason: str) -> None:
    assert read(row, Choices()) == Skip(reason)


def test_an_unknown_choice_is_refused_with_its_value() -> None:
    with pytest.raises(InvalidRecord, match=r"Choices\.rejected is 'best'; it must be random or worst"):
        Choices(rejected="best")  # type: ignore[arg-type]
    with pytest.raises(InvalidRecord, match=r"Choices\.score is 'mean'; it must be ratings or overall_score"):
        Choices(score="mean")  # type: ignore[arg-type]


@pytest.mark.skipif(not REAL.is_file(), reason="needs the folder ../shared/data with real preferences")
def test_real_rows_are_read() -> None:
    (row,), opened = take(str(REAL), choices=Choices(rejected="worst"))
    assert (opened.format, opened.examples) == ("ultrafeedback_raw", {"unlabelled": [1]})
    assert row.versions == ("starchat", "pythia-12b") or row.versions == ("starchat", "alpaca-7b")
    assert row.prompt[0]["content"].startswith("Can you write a C++ program")
