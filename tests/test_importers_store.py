"""Imports into the store: all or nothing, twice is once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from test_importers_layouts import ARGILLA, H4, PLAIN, write_lines

from feedback_store.errors import BadImport
from feedback_store.importers import FORMATS, PreferenceSource
from feedback_store.imports import BATCH_ROWS
from feedback_store.records import ImportResult, PickChoice
from feedback_store.store import FeedbackStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(tmp_path / "store.duckdb") as opened:
        yield opened


def test_the_same_file_twice_changes_nothing(store: FeedbackStore, tmp_path: Path) -> None:
    rows = [PLAIN | {"prompt": f"Question {number}"} for number in range(30)]
    source = write_lines(tmp_path / "rows.jsonl", *rows, rows[0], PLAIN | {"chosen": "N/A"})
    first = store.record_import(source)
    assert first == ImportResult(
        first.import_id, source, "trl", 30, 1, {"empty": 1}, why=FORMATS["trl"].WHY, examples={"empty": (32,)}
    )
    assert [result for result, _ in store.load_imports()] == [first]
    kept, counts = store.preferences(), store.counts()
    again = store.record_import(source, "trl")
    assert (again.imported, again.duplicates, again.skipped) == (0, 31, {"empty": 1})
    assert (store.preferences(), store.counts()) == (kept, counts)
    assert [row.prompt[0]["content"] for row in kept] == [row["prompt"] for row in rows]


def test_a_row_broken_late_imports_nothing(store: FeedbackStore, tmp_path: Path) -> None:
    rows = [PLAIN | {"prompt": f"Question {number}"} for number in range(2500)]
    source = write_lines(tmp_path / "rows.jsonl", *rows)
    Path(source).write_text(Path(source).read_text() + "{broken\n")
    with pytest.raises(BadImport, match="line 2501 is not JSON"):
        store.record_import(source)
    assert store.preferences() == []
    with store._database.read() as cursor:
        assert cursor.execute("SELECT count(*) FROM imports").fetchall() == [(0,)]


def test_times_are_kept_in_utc_whatever_their_zone(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 2, 1, 30, tzinfo=timezone(timedelta(hours=3)))
    with FeedbackStore.open(tmp_path / "store.duckdb", clock=lambda: moment) as store:
        store.record_import(write_lines(tmp_path / "rows.jsonl", PLAIN))
        with store._database.read() as cursor:
            stored = cursor.execute("SELECT created_at FROM preferences").fetchall()
        assert stored == [(datetime(2026, 1, 1, 22, 30),)]
        assert [row.created_at for row in store.preferences()] == [moment]


def test_a_pick_does_not_wait_for_an_import(store: FeedbackStore, tmp_path: Path) -> None:
    rows = [PLAIN | {"prompt": f"Question {number}"} for number in range(2 * BATCH_ROWS + 1)]
    seen: list[tuple[int, int, int]] = []

    def on_progress(source: PreferenceSource) -> None:
        store.record_conversation(f"at {source.rows_read}")
        seen.append((source.rows_read, store.counts().conversations, store.counts().train))
        assert source.bytes_read is not None
        assert source.bytes_total is not None
        assert 0 < source.bytes_read <= source.bytes_total

    result = store.record_import(write_lines(tmp_path / "rows.jsonl", *rows), on_progress=on_progress)
    assert result.imported == len(rows)
    assert seen == [(BATCH_ROWS, 1, 0), (2 * BATCH_ROWS, 2, 0), (len(rows), 3, 0)]
    assert store.counts().train + store.counts().held_out == len(rows)


def test_imports_and_picks_stand_side_by_side(store: FeedbackStore, tmp_path: Path) -> None:
    store.record_import(write_lines(tmp_path / "a.jsonl", ARGILLA))
    assert store.record_import(write_lines(tmp_path / "b.jsonl", H4)).duplicates == 1
    assert store.counts().preferences["argilla"] == 1
    assert PickChoice.FIRST not in store.counts().practice
