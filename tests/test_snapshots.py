"""A snapshot is the same for the same preferences, whole or not there, and never leaks a held-out prompt."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feedback_store import snapshots
from feedback_store.errors import InvalidRecord, LeakedPrompt, NotEnoughPreferences, SnapshotDamaged, StoreDamaged
from feedback_store.preferences import preference_id, split_of
from feedback_store.records import Message, Preference
from feedback_store.snapshots import Snapshot, freeze, load_preferences, load_snapshot, verify

ROOT = Path(__file__).parent.parent
NOW = datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=UTC)


def preference(number: int, practice: str | None = None, created_at: datetime = NOW) -> Preference:
    prompt = (
        Message(role="system", content="Be brief."),
        Message(role="user", content=f"Question {number} – ünïcode?"),
    )
    chosen, rejected = f"Good answer {number} 😀", f"Bad answer {number}"
    return Preference(
        preference_id=preference_id(prompt, chosen, rejected, practice),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        source="practice" if practice else "trl",
        weight=0.5,
        rater=None,
        pick_id=None,
        versions=("v0", "v1"),
        practice=practice,
        created_at=created_at,
    )


def many(count: int = 60, **changes: str) -> list[Preference]:
    return [preference(number, **changes) for number in range(count)]


def files(snapshot: Snapshot) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in snapshot.directory.iterdir()}


def rewrite(snapshot: Snapshot, part: str, rows: Iterable[Preference]) -> None:
    """Change a part and its manifest, as somebody would who knows how."""
    path = snapshot.directory / f"{part}.parquet"
    pq.write_table(pa.Table.from_pylist([snapshots._row(row) for row in rows], schema=snapshots.SCHEMA), path)
    manifest = json.loads((snapshot.directory / "manifest.json").read_text())
    manifest["parts"][part]["sha256"] = snapshots._file_hash(path)
    (snapshot.directory / "manifest.json").write_text(json.dumps(manifest))


def test_what_goes_in_comes_out_in_two_parts(tmp_path: Path) -> None:
    given = many()
    snapshot = freeze(given, tmp_path, None)
    train, held_out = load_preferences(snapshot.train_path), load_preferences(snapshot.held_out_path)
    assert (len(train), len(held_out)) == (snapshot.train_rows, snapshot.held_out_rows)
    assert sorted(train + held_out, key=lambda row: row.preference_id) == sorted(given, key=lambda r: r.preference_id)
    assert held_out
    assert {split_of(row.prompt) for row in train} == {"train"}
    assert {split_of(row.prompt) for row in held_out} == {"held_out"}
    assert [row.preference_id for row in train] == sorted(row.preference_id for row in train)
    assert snapshot.counts == {"trl": 60}
    assert snapshot.directory == tmp_path / snapshot.hash
    assert load_snapshot(snapshot.directory) == snapshot
    verify(snapshot)


def test_the_parquet_has_the_columns_trl_reads(tmp_path: Path) -> None:
    table = pq.read_table(freeze(many(3), tmp_path, None).train_path)
    assert table.column_names == [
        "preference_id", "prompt", "chosen", "rejected", "source", "rater", "weight", "pick_id", "versions", "practice",
        "created_at",
    ]  # fmt: skip
    row = table.to_pylist()[0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"


def test_the_same_preferences_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = freeze(many(), tmp_path / "one", None), freeze(many()[::-1] + many()[:5], tmp_path / "two", None)
    assert one.hash == two.hash
    first, second = files(one), files(two)
    assert set(first) == {"train.parquet", "held_out.parquet", "manifest.json"}
    del first["manifest.json"], second["manifest.json"]  # it says when it was made
    assert first == second


def test_freezing_again_changes_nothing(tmp_path: Path) -> None:
    snapshot = freeze(many(), tmp_path, None)
    before = files(snapshot)
    later = [replace(row, created_at=NOW + timedelta(days=1)) for row in many()]
    assert freeze(later, tmp_path, None) == snapshot
    assert files(snapshot) == before
    assert [path.name for path in tmp_path.iterdir()] == [snapshot.hash]


def test_other_rows_or_another_taste_are_another_snapshot(tmp_path: Path) -> None:
    rows = many()
    hashes = {
        freeze(rows, tmp_path, None).hash,
        freeze(rows[1:], tmp_path, None).hash,
        freeze([replace(rows[0], weight=0.25), *rows[1:]], tmp_path, None).hash,
        freeze(many(practice="shorter"), tmp_path, "shorter").hash,
        freeze(many(practice="bullets"), tmp_path, "bullets").hash,
    }
    assert len(hashes) == 5
    assert all(len(content_hash) == 64 for content_hash in hashes)


def test_practice_and_real_rows_do_not_mix(tmp_path: Path) -> None:
    snapshot = freeze(many(practice="shorter"), tmp_path, "shorter")
    assert (snapshot.practice, snapshot.counts) == ("shorter", {"practice": 60})
    for rows, practice in ((many(practice="shorter"), None), (many(), "shorter"), (many(practice="a"), "b")):
        with pytest.raises(InvalidRecord, match="practice"):
            freeze(rows, tmp_path, practice)


def test_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    held_out = [row for row in many(200) if split_of(row.prompt) == "held_out"]
    for rows in ([], held_out):
        with pytest.raises(NotEnoughPreferences, match=f"{len(rows)} held out.*Compare and pick"):
            freeze(rows, tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_a_held_out_prompt_in_train_is_refused(tmp_path: Path) -> None:
    snapshot = freeze(many(), tmp_path, None)
    train, held_out = load_preferences(snapshot.train_path), load_preferences(snapshot.held_out_path)
    rewrite(snapshot, "train", [*train[1:], held_out[0]])
    with pytest.raises(LeakedPrompt, match=held_out[0].preference_id):
        verify(snapshot)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    snapshot = freeze(many(), tmp_path, None)
    whole = snapshot.train_path.read_bytes()
    for damaged in (whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], whole[:50], b""):
        snapshot.train_path.write_bytes(damaged)
        with pytest.raises(SnapshotDamaged, match=r"train\.parquet"):
            verify(snapshot)
        with pytest.raises(SnapshotDamaged):
            freeze(many(), tmp_path, None)
    snapshot.train_path.unlink()
    with pytest.raises(SnapshotDamaged, match=r"train\.parquet"):
        verify(snapshot)


def test_a_changed_row_is_found_even_with_its_file_hash_made_good(tmp_path: Path) -> None:
    snapshot = freeze(many(), tmp_path, None)
    train = load_preferences(snapshot.train_path)
    rewrite(snapshot, "train", [replace(train[0], chosen="Buy now!"), *train[1:]])
    with pytest.raises(SnapshotDamaged, match="its rows do not give its hash"):
        verify(snapshot)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hash": "0" * 64}, "its manifest is of 0000"),
        ({"format": 99}, "its format is 99"),
        ({"counts": {"trl": 1}}, "counts other sources"),
        ({"parts": {}}, "KeyError"),
    ],
)
def test_a_wrong_manifest_is_found(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    snapshot = freeze(many(), tmp_path, None)
    manifest = json.loads((snapshot.directory / "manifest.json").read_text())
    (snapshot.directory / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(SnapshotDamaged, match=reason):
        verify(load_snapshot(snapshot.directory))


def test_a_directory_without_its_manifest_does_not_exist(tmp_path: Path) -> None:
    snapshot = freeze(many(), tmp_path, None)
    (snapshot.directory / "manifest.json").unlink()
    with pytest.raises(SnapshotDamaged, match="no manifest"):
        load_snapshot(snapshot.directory)
    assert freeze(many(), tmp_path, None) == snapshot
    verify(snapshot)
    shutil.rmtree(snapshot.directory)
    with pytest.raises(SnapshotDamaged, match="There is no snapshot"):
        load_snapshot(snapshot.directory)


def test_a_disk_that_refuses_leaves_nothing_half(tmp_path: Path) -> None:
    blocked = tmp_path / "snapshots"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(StoreDamaged, match="cannot be written"):
        freeze(many(), blocked, None)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshots"]


def test_reading_a_snapshot_needs_no_database() -> None:
    program = "import sys, feedback_store.snapshots; print(sorted({'duckdb', '_duckdb', 'torch'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_snapshot_is_checked_by_hand(tmp_path: Path) -> None:
    snapshot = freeze(many(), tmp_path, None)
    command = [sys.executable, "-m", "feedback_store.snapshots", str(snapshot.directory)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"{snapshot.hash}: {snapshot.train_rows} train")
