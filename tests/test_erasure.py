"""A person who asks for it is gone: from the store, its copies and every file; nothing brings them back."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feedback_store import erasure
from feedback_store.backup import list_backups, restore, verify_backup
from feedback_store.durable import sha256_of, write_json
from feedback_store.erased_rows import load_tombstones
from feedback_store.erasure import erase, is_erased, not_learning, set_learning, unfinished_erasures
from feedback_store.errors import InvalidRecord, NotFound, StoreDamaged
from feedback_store.exports import trl_lines
from feedback_store.migrations import MIGRATIONS, migrate
from feedback_store.mixing import Mix
from feedback_store.preferences import preference_id
from feedback_store.records import Candidate, Message, Pair, PickChoice, Preference, new_id
from feedback_store.rows import stored_time
from feedback_store.snapshots import freeze
from feedback_store.store import FeedbackStore
from feedback_store.traces import Traces

ROOT = Path(__file__).parent.parent
MARKER = "my-PIN-zq48xk17"
SECRET = f"I live at the old mill behind the harbour, {MARKER}."
PERSON = "ann.doe"
_SECONDS = count()


def clock() -> datetime:
    return datetime(2026, 11, 22, tzinfo=UTC) + timedelta(seconds=next(_SECONDS))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data_dir: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(data_dir / "store.duckdb", clock) as opened:
        yield opened


def prompt(text: str) -> tuple[Message, ...]:
    return (Message(role="system", content="Be brief and kind to everybody."), Message(role="user", content=text))


def answer(text: str, version: str = "v0") -> Candidate:
    return Candidate(new_id("cand"), version, text, "stop", {}, 1, 5.0, clock())


def chat(store: FeedbackStore, rater: str, words: str) -> dict[str, str]:
    """Everything a person can say, with their words in every place that takes words; the ids."""
    conversation = store.record_conversation(f"Title: {words}", rater=rater)
    store.record_preset(conversation.conversation_id, "Short")
    turn = store.record_turn(conversation.conversation_id, f"Asked: {words}")
    first, second = answer(f"First answer: {words}"), answer(f"Second answer: {words}", "v1")
    pair = Pair(new_id("pair"), prompt(f"Asked: {words}"), first, second, turn.turn_id, rater, clock())
    store.record_pair(pair)
    pick = store.record_pick(
        pair.pair_id, PickChoice.SECOND, comment=f"Why: {words}", reasons=[words], rater=rater,
        idempotency_key=f"pick {words}",
    )  # fmt: skip
    store.record_answer(turn.turn_id, second.candidate_id)
    store.record_rating(first.candidate_id, "down", comment=f"No: {words}", rater=rater, idempotency_key=f"r {words}")
    store.record_edit(first.candidate_id, f"Better: {words}", rater=rater, idempotency_key=f"e {words}")
    retried = store.record_turn(conversation.conversation_id, f"Again: {words}")
    for text in ("One", "Two"):
        candidate = answer(f"{text}: {words}")
        store.record_candidate(candidate, prompt(f"Again: {words}"), turn_id=retried.turn_id, rater=rater)
        store.record_answer(retried.turn_id, candidate.candidate_id)
    store.record_turn(conversation.conversation_id, f"Last: {words}")
    both_bad = Pair(new_id("pair"), prompt(f"Bad: {words}"), answer(f"x {words}"), answer("y"), None, rater, clock())
    store.record_pair(both_bad)
    store.record_pick(both_bad.pair_id, PickChoice.BOTH_BAD, rater=rater)
    store.record_learning("conversation", conversation.conversation_id, True, by=rater)
    store.record_learning("rater", rater, True, by=rater)
    return {"conversation": conversation.conversation_id, "turn": turn.turn_id, "pair": pair.pair_id,
            "first": first.candidate_id, "second": second.candidate_id, "pick": pick.pick_id}  # fmt: skip


def import_rows(store: FeedbackStore, file: Path, rater: str | None, words: str) -> int:
    row = {"prompt": f"Imported: {words}", "chosen": f"yes {words}", "rejected": f"no {words}", "rater": rater}
    file.write_text(json.dumps({"preference_id": "pref_elsewhere", "pick_id": None, "weight": 1.0, **row}) + "\n")
    return store.record_import(str(file), "trl").imported


def dump(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of a database file that nobody has open."""
    with duckdb.connect(str(path), read_only=True) as connection:
        tables = connection.execute("SELECT table_name FROM duckdb_tables() ORDER BY ALL").fetchall()
        return {table: connection.execute(f'FROM "{table}" ORDER BY ALL').fetchall() for (table,) in tables}


def files_with(folder: Path, *needles: str) -> list[str]:
    """The files below a folder whose bytes, or name, hold one of the needles in any case."""
    wanted = [needle.encode().lower() for needle in needles]
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if any(needle in str(path).encode().lower() for needle in wanted)
        or (path.is_file() and any(needle in path.read_bytes().lower() for needle in wanted))
    ]


def plant_version(data_dir: Path, name: str, snapshot: str, words: str) -> Path:
    version = data_dir / "versions" / name
    (version / "adapter").mkdir(parents=True)
    (version / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (version / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (version / "README.md").write_text(f"# {name}\n\nExample: {words}\n\nThe end.\n")
    write_json(version / "evaluation.json", {"wins": 3, "examples": [{"prompt": words, "why": "fine"}]})
    files = {path.relative_to(version).as_posix(): sha256_of(path) for path in version.rglob("*") if path.is_file()}
    write_json(version / "manifest.json", {"version": name, "snapshot": snapshot, "base": "tiny", "files": files})
    return version


def plant_run(data_dir: Path, snapshot: str, words: str) -> Path:
    run = data_dir / "runs" / "run_20261122-120000_ab12"
    run.mkdir(parents=True)
    write_json(run / "config.json", {"snapshot": {"hash": snapshot}, "requested_by": PERSON, "seed": 3})
    write_json(run / "state.json", {"state": "failed", "error": f"Preference.chosen is {words[:30]!r}…"})
    (run / "log.txt").write_text(f"step 1\nrow: {json.dumps(words)}\nstep 2\n")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run / "report.html").write_text(f"<p>{words}</p>")
    return run


# The whole of it


def test_after_an_erasure_no_file_holds_the_person(store: FeedbackStore, data_dir: Path, tmp_path: Path) -> None:
    others = chat(store, "bob", "we went fishing on Tuesday with the red boat")
    ids = chat(store, PERSON, SECRET)
    assert import_rows(store, tmp_path / f"{PERSON}.jsonl", PERSON, SECRET) == 1
    store.record_promotion("v1", kind="promote", reason=f"Because {SECRET}", by=PERSON, evaluation={"note": SECRET})
    store.record_promotion("v2", kind="promote", reason="wins", by="bob", evaluation={"examples": [SECRET], "wins": 3})
    theirs = freeze(store.training_rows(), data_dir / "snapshots", None)
    alien = Preference("pref_alien", prompt("Who?"), "You.", "Me.", "trl", 1.0, "bob", None, (), None, clock())
    harmless = freeze([alien], data_dir / "snapshots", None)
    version = plant_version(data_dir, "v1", theirs.hash, SECRET)
    plant_version(data_dir, "v2", harmless.hash, "Nothing of interest.")
    run = plant_run(data_dir, theirs.hash, SECRET)
    logs = data_dir / "logs"
    logs.mkdir()
    (logs / "llama-v0.log").write_text(f"started\nprompt {MARKER} seen\n{PERSON} came\n{ids['turn']}\nstopped\n")
    exports = data_dir / "exports"
    (exports / "set" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"pick_id": [ids["pick"]], "text": ["x"]}), exports / "set" / "data" / "train.parquet")
    (exports / "set" / "README.md").write_text("A data set.")
    (exports / "all.csv").write_text(f"prompt\n{SECRET}\n")
    (exports / "other.csv").write_text("prompt\nWho?\n")
    with gzip.open(exports / "all.jsonl.gz", "wt") as packed:
        packed.write(json.dumps({"prompt": SECRET}) + "\n")
    (data_dir / "snapshots" / ".unfinished").mkdir()
    (data_dir / "snapshots" / ".unfinished" / "train.parquet").write_bytes(SECRET.encode())
    backup = store.back_up("manual", 30)
    chat(store, PERSON, f"{SECRET} once more")  # in the log of the database
    assert "store.duckdb.wal" in files_with(data_dir, MARKER)

    done = store.erase(PERSON, data_dir)

    assert unfinished_erasures(data_dir) == ()
    left = files_with(data_dir, MARKER, PERSON, "old mill", *ids.values())
    assert left == []
    store.close()
    assert files_with(data_dir, MARKER, PERSON, "old mill", *ids.values()) == []
    for database in (data_dir / "store.duckdb", backup.path):
        said = json.dumps(dump(database), default=str)
        for needle in (MARKER, PERSON, "old mill", *ids.values()):
            assert needle not in said
        assert others["turn"] in said
        assert said.count("fishing") > 10
    assert verify_backup(backup.path).rows["erasures"] == 1

    assert done.counts == {
        "answers": 6, "candidates": 12, "conversations": 2, "edits": 2, "event_keys": 4, "generations": 12,
        "learning_choices": 4, "pairs": 4, "pick_keys": 2, "pick_words": 4, "picks": 4,
        "preferences": 1, "preset_choices": 2, "promotions": 1, "ratings": 2, "titles": 2, "turns": 6,
    }  # fmt: skip
    assert (done.snapshots, done.versions, done.runs) == ((theirs.hash,), ("v1",), (run.name,))
    assert done.backups == (f"backups/{backup.path.name}",)
    assert done.lost_backups == ()
    assert set(done.files) == {
        "exports/all.csv", "exports/all.jsonl.gz", "exports/set/data/train.parquet", "logs/llama-v0.log",
        "runs/run_20261122-120000_ab12/config.json", "runs/run_20261122-120000_ab12/log.txt",
        "runs/run_20261122-120000_ab12/report.html", "runs/run_20261122-120000_ab12/state.json",
        "versions/v1/README.md", "versions/v1/evaluation.json",
    }  # fmt: skip
    assert done.sentence.startswith(f"Erased '{PERSON}': {sum(done.counts.values())} rows (6 answers, ")
    assert "Trained on these words: v1. Train again without them" in done.sentence
    assert f"Nothing outside {data_dir} is known here" in done.sentence

    # What is not theirs is as it was.
    assert (exports / "other.csv").read_text() == "prompt\nWho?\n"
    assert not (exports / "set").exists()
    assert [line.strip() for line in (logs / "llama-v0.log").read_text().splitlines()] == [
        "started",
        "",
        "",
        "",
        "stopped",
    ]
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert json.loads((run / "config.json").read_text())["requested_by"] == "[erased]"
    assert (harmless.directory / "manifest.json").exists()
    assert sorted(path.name for path in (data_dir / "snapshots").iterdir()) == sorted(
        [harmless.hash, f"{theirs.hash}.erased.json"]
    )
    epitaph = json.loads((data_dir / "snapshots" / f"{theirs.hash}.erased.json").read_text())
    assert epitaph["rows"] == {"train": theirs.train_rows, "held_out": theirs.held_out_rows}
    manifest = json.loads((version / "manifest.json").read_text())
    for name, expected in manifest["files"].items():
        assert sha256_of(version / name) == expected
    assert (version / "README.md").read_text().replace(" ", "") == "#v1\n\n\n\nTheend.\n"
    with FeedbackStore.open(data_dir / "store.duckdb", clock) as again:
        assert [(one.by, one.reason) for one in again.load_promotions()] == [("erased", "erased"), ("bob", "wins")]
        assert again.load_promotions()[1].evaluation == {"examples": ["[erased]"], "wins": 3}
        assert {row.rater for row in again.preferences()} == {"bob"}
        assert len(again.preferences()) == 3


def test_what_others_said_about_a_persons_words_goes_and_their_own_words_stay(
    store: FeedbackStore, data_dir: Path
) -> None:
    ann, bob = chat(store, PERSON, "about the lighthouse keeper"), chat(store, "bob", "about the garden fence")
    store.record_pick(ann["pair"], PickChoice.FIRST, rater="bob", comment="bob on ann")
    store.record_rating(ann["first"], "up", rater="bob", comment="bob on ann")
    store.record_edit(ann["second"], "bob's rewrite for ann", rater="bob")
    store.record_pick(bob["pair"], PickChoice.FIRST, rater=PERSON, comment="ann on bob")
    store.record_rating(bob["first"], "up", rater=PERSON)
    store.erase(PERSON, data_dir)
    store.close()
    rows = dump(data_dir / "store.duckdb")
    said = json.dumps(rows, default=str)
    assert "lighthouse" not in said
    assert "bob on ann" not in said
    assert "ann on bob" not in said
    assert len(rows["pairs"]) == len(rows["picks"]) == 2
    assert {len(rows[table]) for table in ("conversations", "ratings", "edits")} == {1}
    with FeedbackStore.open(data_dir / "store.duckdb", clock) as again:
        assert len(again.load_conversation(bob["conversation"])[1]) == 3
        assert {(row.source, row.rater) for row in again.preferences()} == {
            ("pick", "bob"), ("edit", "bob"), ("retry", "bob"),
        }  # fmt: skip
        assert again.counts().picks == 2
        # A word on the same pair again is the first one of its rater.
        assert again.record_pick(bob["pair"], PickChoice.TIE, rater=PERSON).rater == PERSON


def test_an_answer_that_another_conversation_went_on_with_stays(store: FeedbackStore, data_dir: Path) -> None:
    ann, bob = chat(store, PERSON, "about the lighthouse keeper"), chat(store, "bob", "about the garden fence")
    pair = store.load_pair(bob["pair"])
    store.record_pair(Pair(new_id("pair"), pair.prompt, pair.second, answer("Another."), bob["turn"], PERSON, clock()))
    store.erase(PERSON, data_dir)
    with pytest.raises(NotFound):
        store.load_candidate(ann["second"])
    turns = store.load_conversation(bob["conversation"])[1]
    assert turns[0].answer is not None
    assert turns[0].answer.candidate_id == bob["second"]
    assert store.load_pair(bob["pair"]) == pair


def test_somebody_who_was_never_here_is_not_found(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, "bob", "about the garden fence")
    row = Preference("pref_bob", prompt("Who?"), "You.", "Me.", "trl", 1.0, "bob", None, (), None, clock())
    freeze([row], data_dir / "snapshots", None)
    (data_dir / "snapshots" / "torn").mkdir()
    (data_dir / "snapshots" / "torn" / "train.parquet").write_bytes(b"half")
    store.back_up("manual", 30)
    before = sorted(path.name for path in data_dir.rglob("*"))
    with pytest.raises(NotFound, match=r"no rater 'nobody'"):
        store.erase("nobody", data_dir)
    with pytest.raises(InvalidRecord, match="a person's name"):
        store.erase("  ", data_dir)
    assert sorted(path.name for path in data_dir.rglob("*")) == before
    assert store.query("SELECT count(*) FROM erasures", limit_s=10).rows == ((0,),)


def test_erasing_twice_says_when_it_was_done(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, PERSON, SECRET)
    store.erase(PERSON, data_dir)
    (data_dir / "late.log").write_text(f"{PERSON} was here\n")
    inode = (data_dir / "store.duckdb").stat().st_ino
    again = store.erase(PERSON, data_dir)
    assert (again.counts, again.files) == ({}, ("late.log",))
    assert again.sentence.startswith(f"The store holds no rows of '{PERSON}'. They were erased on 2026-11-22.")
    assert (data_dir / "store.duckdb").stat().st_ino == inode
    assert store.query("SELECT count(*) FROM erasures", limit_s=10).rows == ((1,),)


def test_a_person_may_come_back_and_go_again(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, PERSON, SECRET)
    store.erase(PERSON, data_dir)
    chat(store, PERSON, "a new beginning for all of us")
    backup = store.back_up("manual", 30)
    store.close()
    restore(backup.path, data_dir / "store.duckdb", clock())
    with FeedbackStore.open(data_dir / "store.duckdb", clock) as again:
        assert len(again.load_conversations()) == 1
        assert again.erase(PERSON, data_dir).counts["conversations"] == 1
        assert again.query("SELECT count(*) FROM erasures", limit_s=10).rows == ((2,),)


def test_a_person_known_only_from_a_backup_is_erased_there(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, PERSON, SECRET)
    other = data_dir.parent / "other.duckdb"
    shutil.copy(store.back_up("manual", 30).path, other)
    fresh = data_dir.parent / "fresh"
    with FeedbackStore.open(fresh / "store.duckdb", clock) as empty:
        (fresh / "backups").mkdir()
        shutil.copy(other, fresh / "backups" / "20260101-000000-manual.duckdb")
        done = empty.erase(PERSON, fresh)
        assert (done.counts, done.backups) == ({}, ("backups/20260101-000000-manual.duckdb",))
        with empty._database.read() as cursor:
            assert is_erased(cursor)(PERSON, "pref_any")
    assert PERSON not in json.dumps(dump(fresh / "backups" / "20260101-000000-manual.duckdb"), default=str)


# What stays: tombstones


def test_no_import_brings_an_erased_person_back(store: FeedbackStore, data_dir: Path, tmp_path: Path) -> None:
    chat(store, PERSON, SECRET)
    chat(store, "bob", "about the garden fence")
    assert import_rows(store, tmp_path / "rows.jsonl", PERSON, SECRET) == 1
    exported = list(trl_lines(store.preferences()))
    assert len(exported) == 7
    store.erase(PERSON, data_dir)
    for name, hide in (("whole.jsonl", False), ("no-names.jsonl", True)):
        file = tmp_path / name
        rows = [{**row, "rater": None} if hide else row for row in exported]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = store.record_import(str(file), "trl")
        assert result.skipped.get("erased") == 4, name
    assert PERSON not in {row.rater for row in store.preferences()}
    assert MARKER not in json.dumps(list(trl_lines(store.preferences())))
    # Other words under the same name neither.
    assert import_rows(store, tmp_path / "new.jsonl", PERSON, "something new altogether") == 0
    assert import_rows(store, tmp_path / "new.jsonl", "cid", "something new altogether") == 1


def test_a_tombstone_holds_no_name_and_no_word(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, PERSON, SECRET)
    store.erase(PERSON, data_dir)
    with store._database.read() as cursor:
        tombstones = load_tombstones(cursor)
        asks = is_erased(cursor)
    ((name, _moment),) = tombstones.raters
    assert name == hashlib.sha256((tombstones.salts[0] + PERSON).encode()).hexdigest()
    assert asks(PERSON, "pref_x")
    assert not asks("bob", "pref_x")
    assert not asks(None, "pref_x")
    content = preference_id(prompt(f"Asked: {SECRET}"), f"Second answer: {SECRET}", f"First answer: {SECRET}", None)
    assert asks(None, content)
    assert asks("bob", content)


def test_an_erased_person_is_in_no_restored_backup(store: FeedbackStore, data_dir: Path, tmp_path: Path) -> None:
    chat(store, PERSON, SECRET)
    bob = chat(store, "bob", "about the garden fence")
    import_rows(store, tmp_path / "rows.jsonl", PERSON, SECRET)
    kept_elsewhere = tmp_path / "20261122-000000-manual.duckdb"
    shutil.copy(store.back_up("manual", 30).path, kept_elsewhere)
    done = store.erase(PERSON, data_dir)
    store.close()
    restored = restore(kept_elsewhere, data_dir / "store.duckdb", clock())
    assert restored.erased == done.counts
    assert "rows of people who were erased since it was made were taken out again" in restored.sentence
    assert files_with(data_dir, MARKER, PERSON) == []
    assert MARKER not in json.dumps(dump(data_dir / "store.duckdb"), default=str)
    with FeedbackStore.open(data_dir / "store.duckdb", clock) as again:
        assert [one.conversation_id for one in again.load_conversations()] == [bob["conversation"]]
        assert import_rows(again, tmp_path / "rows.jsonl", None, SECRET) == 0
        assert import_rows(again, tmp_path / "rows.jsonl", PERSON, "other words this time") == 0


def test_a_restore_beside_a_damaged_store_asks_the_backups_who_was_erased(
    store: FeedbackStore, data_dir: Path, tmp_path: Path
) -> None:
    chat(store, PERSON, SECRET)
    kept_elsewhere = tmp_path / "20261122-000000-manual.duckdb"
    shutil.copy(store.back_up("manual", 30).path, kept_elsewhere)
    store.erase(PERSON, data_dir)
    store.close()
    (data_dir / "store.duckdb").write_bytes(b"rubbish")
    restored = restore(kept_elsewhere, data_dir / "store.duckdb", clock())
    assert restored.erased["conversations"] == 1
    assert "could not be read" in restored.sentence


def test_a_restore_of_a_store_with_another_salt_knows_who_was_erased(
    store: FeedbackStore, data_dir: Path, tmp_path: Path
) -> None:
    other_dir = tmp_path / "other"
    with FeedbackStore.open(other_dir / "store.duckdb", clock) as other:
        chat(other, PERSON, SECRET)
        chat(other, "bob", "about the garden fence")
        backup = other.back_up("manual", 30)
    chat(store, PERSON, "a few words of mine")
    store.erase(PERSON, data_dir)
    store.close()
    assert restore(backup.path, data_dir / "store.duckdb", clock()).erased["conversations"] == 1
    with FeedbackStore.open(data_dir / "store.duckdb", clock) as again:
        assert import_rows(again, tmp_path / "rows.jsonl", PERSON, "other words this time") == 0


# Copies


def old_backup(path: Path, rater: str) -> None:
    """A backup of the first schema, as a migration leaves it."""
    path.parent.mkdir(exist_ok=True)
    with duckdb.connect(str(path)) as connection:
        migrate(connection, path, path.parent, stored_time(clock()), MIGRATIONS[:1])
        for name in (rater, "bob"):
            connection.execute(
                f"""INSERT INTO conversations VALUES ('conv_{name}', now()::TIMESTAMP);
                INSERT INTO candidates SELECT 'cand_{name}' || range, 'v0', 'words of {name}', 'stop', '{{}}', 1, 1.0,
                    now()::TIMESTAMP FROM range(2);
                INSERT INTO pairs VALUES ('pair_{name}', [{{'role': 'user', 'content': 'asked by {name}'}}], 'train',
                    'cand_{name}0', 'cand_{name}1', NULL, '{name}', nextval('events'), now()::TIMESTAMP);
                INSERT INTO picks VALUES ('pick_{name}', 'pair_{name}', 'first', [], NULL, '{name}', 'key_{name}',
                    'pref_{name}', nextval('events'), now()::TIMESTAMP);
                INSERT INTO pick_keys VALUES ('key_{name}', 'pick_{name}');"""
            )


def test_a_backup_of_the_first_schema_is_cleaned_and_keeps_its_schema(store: FeedbackStore, data_dir: Path) -> None:
    path = data_dir / "backups" / "schema-1-20260101-000000.duckdb"
    old_backup(path, "local")
    chat(store, "local", SECRET)
    assert store.erase("local", data_dir).backups == (f"backups/{path.name}",)
    rows = dump(path)
    assert "erasures" not in rows
    # Conversations had no rater then: all of them were those of `local`.
    assert (len(rows["conversations"]), len(rows["candidates"]), len(rows["pairs"]), len(rows["picks"])) == (0, 2, 1, 1)
    assert "local" not in json.dumps(rows, default=str)
    assert verify_backup(path).schema_version == 1


def test_backups_without_the_person_are_not_touched(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, "bob", "about the garden fence")
    untouched = store.back_up("manual", 30)
    whole = untouched.path.read_bytes()
    chat(store, PERSON, SECRET)
    assert store.erase(PERSON, data_dir).backups == ()
    assert untouched.path.read_bytes() == whole


def test_a_backup_that_cannot_be_read_is_removed_and_named(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, PERSON, SECRET)
    backups = data_dir / "backups"
    broken = store.back_up("manual", 30).path
    broken.write_bytes(b"rubbish")
    done = store.erase(PERSON, data_dir)
    assert done.lost_backups == (f"backups/{broken.name}",)
    assert list(backups.iterdir()) == []
    assert f"Removed, because they could not be read: backups/{broken.name}." in done.sentence


def test_a_copy_of_the_store_that_lies_about_is_cleaned_too(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, PERSON, SECRET)
    stray = data_dir / "old" / "copy.duckdb"
    stray.parent.mkdir()
    shutil.copy(store.back_up("manual", 30).path, stray)
    done = store.erase(PERSON, data_dir)
    assert set(done.backups) == {f"backups/{list_backups(data_dir / 'backups')[0].path.name}", "old/copy.duckdb"}
    assert PERSON not in json.dumps(dump(stray), default=str)


# Interrupted


def test_an_erasure_killed_at_any_step_is_finished_by_the_next(tmp_path: Path) -> None:
    template = tmp_path / "template"
    with FeedbackStore.open(template / "store.duckdb", clock) as store:
        chat(store, PERSON, SECRET)
        chat(store, "bob", "we went fishing on Tuesday with the red boat")
        snapshot = freeze(store.training_rows(), template / "snapshots", None)
        store.back_up("manual", 30)
    plant_run(template, snapshot.hash, SECRET)
    plant_version(template, "v1", snapshot.hash, SECRET)
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from feedback_store import backup, copying, durable, erasure
        from feedback_store.store import FeedbackStore
        data_dir, left = Path(sys.argv[1]), int(sys.argv[2])
        def step(function):
            def counted(*given, **named):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*given, **named)
            return counted
        for place, name in (
            (os, "replace"), (os, "rename"), (os, "unlink"), (os, "fsync"), (Path, "replace"), (Path, "unlink"),
            (erasure, "add_tombstones"), (erasure, "write_json"), (erasure, "blank_lines"), (erasure, "replace_file"),
            (backup, "copy_database"), (copying, "_copy_table"), (backup, "put_in_place"), (backup, "write_json"),
        ):
            setattr(place, name, step(getattr(place, name)))
        with FeedbackStore.open(data_dir / "store.duckdb") as store:
            store.erase(sys.argv[3], data_dir)
    """
    steps = 0
    for last in range(5, 200, 17):
        data_dir = tmp_path / "data"
        shutil.copytree(template, data_dir)
        killed = subprocess.run([sys.executable, "-c", code, str(data_dir), str(last), PERSON], cwd=ROOT, check=False)
        assert killed.returncode in (0, -signal.SIGKILL)
        with FeedbackStore.open(data_dir / "store.duckdb", clock) as store:
            begun = unfinished_erasures(data_dir)
            if killed.returncode:
                done = store.erase(PERSON, data_dir)
                if begun:
                    assert (done.snapshots, done.versions) == ((snapshot.hash,), ("v1",))
            assert unfinished_erasures(data_dir) == ()
            assert len(store.preferences()) == 3
        assert files_with(data_dir, MARKER, PERSON) == [], last
        for database in (data_dir / "store.duckdb", *data_dir.glob("backups/*.duckdb")):
            assert MARKER not in json.dumps(dump(database), default=str), last
            assert len(dump(database)["erasures"]) == 1
        verify_backup(list_backups(data_dir / "backups")[0].path)
        manifest = json.loads((data_dir / "versions" / "v1" / "manifest.json").read_text())
        assert all(sha256_of(data_dir / "versions" / "v1" / name) == one for name, one in manifest["files"].items())
        shutil.rmtree(data_dir)
        steps = last
        if killed.returncode == 0:
            break
    assert steps > 30


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only files")
def test_a_file_that_refuses_is_named(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, PERSON, SECRET)
    log = data_dir / "server.log"
    log.write_text(SECRET)
    log.chmod(0o400)
    with pytest.raises(StoreDamaged, match=r"not finished: .*server\.log: Permission denied"):
        store.erase(PERSON, data_dir)
    assert unfinished_erasures(data_dir) == (PERSON,)
    log.chmod(0o600)
    store.erase(PERSON, data_dir)
    assert unfinished_erasures(data_dir) == ()


def test_a_step_that_the_disk_refuses_is_told_and_done_the_next_time(
    store: FeedbackStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat(store, PERSON, SECRET)
    with monkeypatch.context() as patched:
        patched.setattr(erasure, "replace_file", _refuse)
        with pytest.raises(StoreDamaged, match=r"The erasing of 'ann\.doe' is not finished: .*erase again"):
            store.erase(PERSON, data_dir)
    assert unfinished_erasures(data_dir) == (PERSON,)
    assert store.erase(PERSON, data_dir).counts["conversations"] == 1
    assert files_with(data_dir, MARKER, PERSON) == []


def _refuse(*_given: object) -> None:
    raise OSError(28, "No space left on device")


# What is looked for


@pytest.mark.parametrize(
    "line",
    [
        "2026 INFO ann.doe logged in",
        "user=ANN.DOE",
        '{"rater": "ann.doe"}',
        "prompt: live at the old mill behind the harbour, and",
        "row 'I live at the old mill beh…'",
        '{"text": "i\\u00a0live at\\nthe old mill behind"}',
        "<b>I live at the old&nbsp;mill</b> behind",
        "saw my-PIN-zq48xk17.",
        "turn_0123456789abcdef0123456789abcdef failed",
        "Straße und Öl, bitte sehr",
        "他说：我住在老磨坊",
        "unbelievable!",
    ],
)
def test_a_line_with_a_trace_is_found(line: str) -> None:
    assert traces().in_text(line)


@pytest.mark.parametrize(
    "line",
    [
        "joann.doe2 is somebody else",
        "at the old harbour they live behind a mill",
        "turn_ffffffffffffffffffffffffffffffff failed",
        "step 12 of 40, loss 0.693",
        "Hi",
        "",
    ],
)
def test_a_line_without_a_trace_is_left_alone(line: str) -> None:
    assert not traces().in_text(line)


def test_a_single_word_of_a_record_is_ours_unless_all_of_it_is_theirs() -> None:
    found = Traces("ann", ["turn_1"], ["is it smollm2-135m-instruct that answers me?", "unbelievable!"])
    assert found.in_text("base smollm2-135m-instruct")
    assert not found.in_value("smollm2-135m-instruct")
    assert not found.in_value("/models/smollm2-135m-instruct")
    assert found.in_value("Unbelievable")
    assert found.in_value("turn_1")
    # A name stands where a person stands; in words it is a word like others.
    assert not found.in_value("Ann")
    assert not found.in_value("by ann")
    assert found.is_them("ann", actor=False)
    assert not found.is_them("anna", actor=False)


def test_the_whole_of_an_excerpt_of_seven_words_is_enough() -> None:
    words = [f"w{chr(97 + number)}" for number in range(26)]
    found = Traces("ann", [], [" ".join(words)])
    assert all(found.in_text("… " + " ".join(words[start : start + 7]) + " …") for start in range(20))


def traces() -> Traces:
    texts = [SECRET, "Hi\nunbelievable!\nyes", "Straße und Öl, bitte!", "我住在老磨坊后面"]
    return Traces(PERSON, ["turn_0123456789abcdef0123456789abcdef"], texts)


# The leave to learn


def test_the_latest_word_on_learning_counts(store: FeedbackStore) -> None:
    conversation = store.record_conversation("private", rater="bob").conversation_id

    def say(scope: str, subject: str, learn: bool) -> tuple[frozenset[str], frozenset[str]]:
        with store._database.write() as cursor:
            set_learning(cursor, scope, subject, learn, by="admin", moment=clock())
        with store._database.read() as cursor:
            return not_learning(cursor)

    assert say("rater", "bob", True) == (frozenset(), frozenset())
    assert say("rater", "bob", False) == (frozenset(), {"bob"})
    assert say("conversation", conversation, False) == ({conversation}, {"bob"})
    assert say("rater", "bob", True) == ({conversation}, frozenset())
    assert say("conversation", conversation, True) == (frozenset(), frozenset())


def test_a_word_on_learning_names_somebody(store: FeedbackStore) -> None:
    for scope, subject, error in (
        ("model", "v1", InvalidRecord),
        ("rater", " ", InvalidRecord),
        ("conversation", "conv_nowhere", NotFound),
    ):
        with store._database.write() as cursor, pytest.raises(error):
            set_learning(cursor, scope, subject, False, by="admin", moment=clock())


def test_erasing_takes_a_database_and_not_only_a_store(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, PERSON, SECRET)
    assert erase(store._database, data_dir, PERSON, clock()).counts["turns"] == 3


def test_a_snapshot_of_their_ratings_goes_with_them(store: FeedbackStore, data_dir: Path) -> None:
    chat(store, PERSON, SECRET)
    chat(store, "bob", "Something harmless about boats.")
    rated = store.unpaired()
    assert {one.rater for one in rated} == {PERSON, "bob"}
    mix = Mix(learns_from="ratings")
    theirs = freeze([], data_dir / "snapshots", None, mix, ratings=rated)
    others = freeze([], data_dir / "snapshots", None, mix, ratings=[one for one in rated if one.rater == "bob"])
    done = store.erase(PERSON, data_dir)
    assert done.snapshots == (theirs.hash,)
    assert others.ratings_path.is_file()
    assert not theirs.directory.exists()
