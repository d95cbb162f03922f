"""Rows with one completion and a label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_importers_layouts import KTO, take, write_lines

from feedback_store.exports import kto_lines
from feedback_store.importers.kto import matches, read
from feedback_store.importers.pairs import Choices, ImportedLabel, Skip
from feedback_store.records import UnpairedPreference


@pytest.mark.parametrize("prompt", ["Why?", KTO["prompt"]])
@pytest.mark.parametrize("completion", ["Because.", KTO["completion"]])
@pytest.mark.parametrize(
    ("written", "label"),
    [(True, True), (1, True), (1.0, True), ("True", True), (False, False), (0, False), (-1, False), (" false ", False)],
)
def test_text_and_messages_and_every_way_to_write_the_label(
    prompt: object, completion: object, written: object, label: bool
) -> None:
    found = read({"prompt": prompt, "completion": completion, "label": written}, Choices())
    assert found == ImportedLabel(({"role": "user", "content": "Why?"},), "Because.", label)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": None}, "unlabelled"),
        ({"label": ""}, "unlabelled"),
        ({"label": "perhaps"}, "malformed"),
        ({"label": 5}, "malformed"),
        ({"completion": None}, "empty"),
        ({"completion": " "}, "empty"),
        ({"prompt": " "}, "empty"),
        ({"prompt": None, "completion": "Because."}, "malformed"),
        ({"prompt": [{"role": "assistant", "content": "Hello."}]}, "malformed"),
        ({"completion": "x" * 24_001}, "over_long"),
        ({"prompt": "x" * 24_001}, "over_long"),
    ],
)
def test_a_row_that_cannot_teach_is_skipped_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    assert read(KTO | changes, Choices()) == Skip(reason)


def test_columns_that_only_look_alike_are_left_to_others() -> None:
    assert not matches({"prompt": "Why?", "completion": "Because."})
    assert not matches(KTO | {"label": [{"value": "good", "user_id": "u", "status": "submitted"}]})


def labels(source: str) -> list[UnpairedPreference]:
    rows, opened = take(source)
    assert opened.format == "kto"
    return [row for row in rows if isinstance(row, UnpairedPreference)]


def test_a_table_keeps_both_labels_of_one_answer(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion,label,rater\nWhy?,Because.,True,ann\nWhy?,Because.,False,\n")
    good, bad = labels(str(tmp_path / "rows.csv"))
    assert [(row.label, row.rater, row.versions, row.weight) for row in (good, bad)] == [
        (True, None, (), 1.0),
        (False, None, (), 1.0),
    ]
    assert good.unpaired_id != bad.unpaired_id
    (again,) = labels(write_lines(tmp_path / "rows.jsonl", KTO))
    assert again == good


def test_our_own_export_keeps_rater_weight_and_versions(tmp_path: Path) -> None:
    (plain,) = labels(write_lines(tmp_path / "rows.jsonl", KTO))
    rated = replace(plain, source="rating", rater="ann", weight=0.5, versions=("v2",))
    (row,) = labels(write_lines(tmp_path / "export.jsonl", *kto_lines([rated])))
    assert row == replace(rated, source="kto")
