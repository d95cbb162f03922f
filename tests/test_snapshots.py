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

import pyarrow.parquet as pq
import pytest

from feedback_store import tables
from feedback_store.durable import sha256_of
from feedback_store.errors import InvalidRecord, LeakedPrompt, NotEnoughPreferences, SnapshotDamaged, StoreDamaged
from feedback_store.mixing import Mix
from feedback_store.preferences import preference_id, prompt_key, split_of, unpaired_id
from feedback_store.records import Message, Preference, UnpairedPreference
from feedback_store.snapshots import (
    Snapshot,
    freeze,
    load_preferences,
    load_ratings,
    load_snapshot,
    preview,
    verify,
)

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
    rows = sorted(rows, key=lambda row: row.preference_id)
    table = tables.rows_of(rows)
    pq.write_table(tables.finished(table, range(len(rows)), [prompt_key(row.prompt) for row in rows]), path)
    manifest = json.loads((snapshot.directory / "manifest.json").read_text())
    manifest["parts"][part]["sha256"] = sha256_of(path)
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


def test_a_preview_has_the_rows_that_would_be_written_and_writes_nothing(tmp_path: Path) -> None:
    shown = preview(many(), None, Mix(replay_ratio=None))
    assert list(tmp_path.iterdir()) == []
    written = freeze(many(), tmp_path, None, Mix(replay_ratio=None))
    assert shown["train"].to_pylist() == pq.read_table(written.train_path).to_pylist()
    assert shown["held_out"].num_rows == written.held_out_rows
    with pytest.raises(NotEnoughPreferences):
        preview([], None)


def test_the_parquet_has_the_columns_trl_reads(tmp_path: Path) -> None:
    table = pq.read_table(freeze(many(3), tmp_path, None).train_path)
    assert table.column_names == [
        "preference_id", "prompt", "chosen", "rejected", "source", "rater", "weight", "pick_id", "versions", "practice",
        "prompt_key", "created_at",
    ]  # fmt: skip
    row = table.to_pylist()[0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"


def test_the_same_preferences_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = freeze(many(), tmp_path / "one", None), freeze(many()[::-1] + many()[:5], tmp_path / "two", None)
    assert one.hash == two.hash
    first, second = files(one), files(two)
    assert set(first) == {"train.parquet", "held_out.parquet", "manifest.json"}
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


def asked(prompt: str, chosen: str = "Yes.", source: str = "trl", rater: str | None = None) -> Preference:
    messages = (Message(role="user", content=prompt),)
    identity = preference_id(messages, chosen, "No.", rater)
    return Preference(identity, messages, chosen, "No.", source, 1.0, rater, None, (), None, NOW)


def part_of(prompt: str) -> str:
    return split_of((Message(role="user", content=prompt),))


def prompts(path: Path) -> list[str]:
    return sorted(row.prompt[-1]["content"] for row in load_preferences(path))


def test_the_manifest_lists_what_is_in_and_counts_what_is_not(tmp_path: Path) -> None:
    rows = [
        *many(),
        asked("Do you like me?", source="pick", rater="ada"),
        asked("Do you like tea?", "Yes!", "edit", "bob"),
    ]
    snapshot = freeze(rows, tmp_path, None, Mix(edits=False, max_per_prompt=8))
    manifest = json.loads((snapshot.directory / "manifest.json").read_text())
    listed = [identity for part in manifest["parts"].values() for identity in part["preference_ids"]]
    assert sorted(listed) == sorted(row.preference_id for row in rows if row.source != "edit")
    assert snapshot.counts == {"pick": 1, "trl": 60}
    assert snapshot.left_out == {"source": 1}
    assert [part["raters"] for part in manifest["parts"].values() if part["raters"]] == [{"ada": 1}]
    assert manifest["mix"] == Mix(edits=False, max_per_prompt=8).as_dict()
    for what, wrong in (("raters", {"eve": 1}), ("preference_ids", []), ("sources", {})):
        spoilt = json.loads(json.dumps(manifest))
        spoilt["parts"]["train"][what] = wrong
        (snapshot.directory / "manifest.json").write_text(json.dumps(spoilt))
        with pytest.raises(SnapshotDamaged, match=what):
            verify(load_snapshot(snapshot.directory))


def test_what_is_private_is_hidden_and_the_split_stays_that_of_the_prompt_as_it_was(tmp_path: Path) -> None:
    private = [
        asked(f"Write to person{number}@example.org about {number}.", f"Call +4930{9018200 + number}.")
        for number in range(40)
    ]
    snapshot = freeze(private, tmp_path, None)
    assert snapshot.redacted["email"] == snapshot.redacted["phone"] == 40
    written = b"".join(files(snapshot).values())
    assert b"@example" not in written
    assert all("[email]" in prompt for prompt in prompts(snapshot.train_path) + prompts(snapshot.held_out_path))
    assert snapshot.held_out_rows == sum(split_of(row.prompt) == "held_out" for row in private)
    verify(snapshot)
    open_hearted = freeze(private, tmp_path, None, redact=False)
    assert open_hearted.redacted == {}
    assert open_hearted.hash != snapshot.hash


def test_prompts_that_become_the_same_when_hidden_do_not_leak(tmp_path: Path) -> None:
    texts = [f"Who is person{number}@example.org?" for number in range(60)]
    assert {part_of(text) for text in texts} == {"train", "held_out"}
    rows = [*map(asked, texts), asked("Something else.")]
    snapshot = freeze(rows, tmp_path, None)
    assert set(prompts(snapshot.held_out_path)) == {"Who is [email]?"}
    assert prompts(snapshot.train_path) == ["Something else."]
    assert snapshot.left_out["near_held_out"] > 40


def test_answers_that_are_equal_once_hidden_teach_nothing(tmp_path: Path) -> None:
    row = asked("Where do I write?", "To a@example.org.")
    twin = Preference(
        row.preference_id, row.prompt, row.chosen, "To b@example.org.", "trl", 1.0, None, None, (), None, NOW
    )
    assert freeze([twin, *many()], tmp_path, None).left_out == {"identical": 1}


def test_an_evaluation_prompt_is_never_in_train(tmp_path: Path) -> None:
    rows = many()
    judged = [row.prompt[1]["content"] for row in rows if split_of(row.prompt) == "train"][:5]
    snapshot = freeze(rows, tmp_path, None, evaluation_prompts=[text.upper() for text in judged])
    assert snapshot.left_out == {"evaluation_prompt": 5}
    assert not set(judged) & {row.prompt[1]["content"] for row in load_preferences(snapshot.train_path)}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_sample(tmp_path: Path) -> None:
    rows = [*many(300), *(asked(f"Our own {number}?", source="pick", rater="ada") for number in range(20))]
    one, two, three = (
        freeze(given, tmp_path / name, None, Mix(replay_ratio=2, seed=seed))
        for name, given, seed in (("one", rows, 1), ("two", rows[::-1], 1), ("three", rows, 2))
    )
    assert files(one) == files(two)
    assert one.hash != three.hash
    own = sum(split_of(row.prompt) == "train" for row in rows[300:])
    assert (one.train_rows, one.left_out["replay"]) == (
        3 * own,
        sum(r.source == "trl" and split_of(r.prompt) == "train" for r in rows) - 2 * own,
    )


def test_what_a_killed_process_left_is_removed_by_the_next_freeze(tmp_path: Path) -> None:
    (tmp_path / f".{'0' * 64}-12345678").mkdir(parents=True)
    snapshot = freeze(many(), tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == [snapshot.hash]


def test_reading_a_snapshot_needs_no_database() -> None:
    program = "import sys, feedback_store.snapshots; print(sorted({'duckdb', '_duckdb', 'torch'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_snapshot_is_checked_by_hand(tmp_path: Path) -> None:
    snapshot = freeze(many(), tmp_path, None)
    command = [sys.executable, "-m", "feedback_store.snapshots", str(snapshot.directory)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"{snapshot.hash}: {snapshot.train_rows} train")


RATINGS = Mix(learns_from="ratings")


def rated(number: int, label: bool = True, rater: str = "ana", prompt: str | None = None) -> UnpairedPreference:
    messages = (Message(role="user", content=prompt or f"Question {number} – ünïcode?"),)
    answer = f"Write to ana{number}@example.org"
    identity = unpaired_id(messages, answer, label, f"rating_{number}_{rater}")
    return UnpairedPreference(identity, messages, answer, label, "rating", 1.0, rater, ("v0",), NOW)


def test_ratings_are_frozen_split_and_verified_as_pairs_are(tmp_path: Path) -> None:
    given = [rated(number, number % 3 == 0) for number in range(60)]
    snapshot = freeze([], tmp_path, None, RATINGS, ratings=given)
    learned, rest = load_ratings(snapshot.ratings_path), load_ratings(snapshot.directory / "held_out_ratings.parquet")
    assert (snapshot.train_rows, snapshot.held_out_rows, snapshot.rated_rows) == (0, 0, len(learned))
    assert {split_of(one.prompt) for one in learned} == {"train"}
    assert {split_of(one.prompt) for one in rest} == {"held_out"}
    labels = {one.unpaired_id: one.label for one in given}
    assert {one.unpaired_id: one.label for one in learned + rest} == labels
    assert (snapshot.counts, snapshot.redacted) == ({"rating": 60}, {"email": 60})
    assert learned[0].completion == "Write to [email]"
    verify(load_snapshot(snapshot.directory))
    assert freeze([], tmp_path, None, RATINGS, ratings=given[::-1]) == snapshot
    other = [replace(given[0], label=not given[0].label), *given[1:]]
    assert freeze([], tmp_path, None, RATINGS, ratings=other).hash != snapshot.hash

    table = pq.read_table(snapshot.ratings_path)
    said = table["label"].to_pylist()
    pq.write_table(table.set_column(3, table.schema.field("label"), [[not said[0], *said[1:]]]), snapshot.ratings_path)
    manifest = json.loads((snapshot.directory / "manifest.json").read_text())
    manifest["parts"]["ratings"]["sha256"] = sha256_of(snapshot.ratings_path)
    (snapshot.directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SnapshotDamaged, match="its rows do not give its hash"):
        verify(load_snapshot(snapshot.directory))


def test_ratings_obey_the_mix_and_never_meet_a_prompt_that_pairs_are_judged_on(tmp_path: Path) -> None:
    pairs = many()
    judged = next(row.prompt[-1]["content"] for row in pairs if split_of(row.prompt) == "held_out")
    near = next(f"{judged}{'!' * n}" for n in range(1, 200) if part_of(f"{judged}{'!' * n}") == "train")
    train = [number for number in range(100, 200) if part_of(f"Question {number} – ünïcode?") == "train"]
    one, two, *others = train
    disputed = [rated(one, True, "ana"), rated(one, False, "bob")]  # two people, one answer, two labels
    twice = [rated(two), replace(rated(two), unpaired_id="label_again")]
    given = [rated(0, prompt=near), *disputed, *twice, *(rated(number, rater="eve") for number in others)]
    snapshot = freeze(pairs, tmp_path, None, replace(RATINGS, max_rater_share=0.5), ratings=given)
    assert {"near_held_out": 1, "contradicted": 2, "duplicate": 1}.items() <= snapshot.left_out.items()
    raters = [one.rater for one in load_ratings(snapshot.ratings_path)]
    assert raters.count("eve") == raters.count("ana") == 1
    assert snapshot.train_rows == freeze(pairs, tmp_path, None).train_rows, "the pairs are there as they were"
    verify(snapshot)


def test_a_run_from_ratings_needs_ratings_and_one_from_text_needs_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughPreferences, match=r"0 rated answers .*\n?.*thumbs"):
        freeze(many(), tmp_path, None, RATINGS)
    nothing = freeze([], tmp_path, None, Mix(learns_from="text"))
    assert (nothing.train_rows, nothing.held_out_rows, nothing.rated_rows) == (0, 0, None)
    assert load_preferences(nothing.held_out_path) == []
    with pytest.raises(InvalidRecord, match="learns_from"):
        Mix(learns_from="thumbs")
