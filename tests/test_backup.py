"""Copies of the store: whole, checked, kept for a while, and put back without losing what was there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import duckdb
import pytest

from feedback_store.backup import (
    KEEP_LAST,
    back_up,
    describe,
    list_backups,
    locked,
    prune,
    replace_file,
    restore,
    verify_backup,
)
from feedback_store.copying import COPYING, copy_database
from feedback_store.database import Database
from feedback_store.errors import (
    InvalidRecord,
    NotFound,
    QueryRefused,
    StoreBusy,
    StoreDamaged,
    StoreError,
    StoreTooNew,
)
from feedback_store.migrations import MIGRATIONS, migrate
from feedback_store.query import run_query
from feedback_store.records import Candidate, Message, Pair, PickChoice, new_id
from feedback_store.rows import stored_time
from feedback_store.store import FeedbackStore

ROOT = Path(__file__).parent.parent
NOW = datetime(2026, 11, 23, 4, 5, 6, tzinfo=UTC)
NEWEST = MIGRATIONS[-1].version


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "store.duckdb"


@pytest.fixture
def backups(path: Path) -> Path:
    return path.parent / "backups"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    opened = Database.open(path, stored_time(NOW))
    yield opened
    opened.close()


def add_conversation(database: Database, name: str, rater: str = "ana") -> None:
    with database.write() as cursor:
        cursor.execute("INSERT INTO conversations VALUES (?, ?, ?)", [name, stored_time(NOW), rater])
        cursor.execute(
            "INSERT INTO titles (conversation_id, title, created_at) VALUES (?, ?, ?)", [name, name, stored_time(NOW)]
        )


def conversations(path: Path) -> list[str]:
    with duckdb.connect(str(path)) as connection:
        found = connection.execute("SELECT conversation_id FROM conversations ORDER BY ALL").fetchall()
    return [name for (name,) in found]


def pair(number: int = 0) -> Pair:
    first, second = (
        Candidate(new_id("cand"), "v0", text, "stop", {"temperature": 0.5}, 7, 1.5, NOW) for text in ("Yes.", "No.")
    )
    return Pair(new_id("pair"), (Message(role="user", content=f"Is {number} odd?"),), first, second, None, "ana", NOW)


def start_server(path: Path) -> subprocess.Popen[str]:
    """Another process that has the store open."""
    code = "import sys; from feedback_store.store import FeedbackStore; from pathlib import Path\n"
    code += "store = FeedbackStore.open(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "open\n"
    return server


def stop(server: subprocess.Popen[str]) -> None:
    server.communicate()
    assert server.returncode == 0


# Making


def test_a_backup_is_the_store_at_that_moment_and_works_on(database: Database, backups: Path) -> None:
    add_conversation(database, "before")
    backup = back_up(database, backups, NOW)
    add_conversation(database, "after")
    assert backup.path == backups / "20261123-040506-manual.duckdb"
    assert (backup.created_at, backup.reason, backup.schema_version) == (NOW, "manual", NEWEST)
    assert (backup.rows["conversations"], backup.rows["turns"]) == (1, 0)
    assert sorted(path.name for path in backups.iterdir()) == [backup.path.name, f"{backup.path.stem}.json"]
    assert not (backups.parent / COPYING).exists()
    assert conversations(backup.path) == ["before"]
    with FeedbackStore.open(backup.path) as store:
        store.record_pair(pair())
        assert [one.title for one in store.load_conversations()] == ["before"]


def test_a_backup_has_every_kind_of_row_bit_by_bit(path: Path, backups: Path) -> None:
    with FeedbackStore.open(path, lambda: NOW) as store:
        conversation = store.record_conversation("Naïve 😀 \x00 title", rater="bo")
        turn = store.record_turn(conversation.conversation_id, "Why?\n'\"")
        made = pair()
        store.record_pair(made)
        store.record_answer(turn.turn_id, made.first.candidate_id)
        store.record_pick(made.pair_id, PickChoice.TIE, reasons=["a", "b"], comment="c", idempotency_key="k")
        store.record_pick(made.pair_id, PickChoice.FIRST)
        store.record_rating(made.first.candidate_id, "up", idempotency_key="r")
        store.record_edit(made.second.candidate_id, "Better.")
        store.record_promotion("v1", kind="promote", reason="wins", by="bo", evaluation={"wins": 3})
        store.record_learning("rater", "bo", False, by="bo")
        backup = store.back_up("manual", 30)
    dumps = []
    for file in (path, backup.path):
        with duckdb.connect(str(file)) as connection:
            tables = connection.execute("SELECT table_name FROM duckdb_tables() ORDER BY ALL").fetchall()
            dumps.append([connection.execute(f'FROM "{table}"').fetchall() for (table,) in tables])
            dumps[-1].append(connection.execute("SELECT sql FROM duckdb_views() WHERE NOT internal").fetchall())
            dumps[-1].append(
                connection.execute("SELECT table_name, constraint_text FROM duckdb_constraints()").fetchall()
            )
            dumps[-1].append(connection.execute("SELECT nextval('events')").fetchall())
    assert dumps[0] == dumps[1]


def test_backups_of_one_second_have_names_of_their_own(database: Database, backups: Path) -> None:
    names = [back_up(database, backups, NOW, "before-upgrade").path.name for _ in range(3)]
    assert names == [f"20261123-040506-before-upgrade{end}.duckdb" for end in ("", "-2", "-3")]


def test_a_backup_made_while_people_write_is_consistent(path: Path, backups: Path) -> None:
    with FeedbackStore.open(path) as store:
        done = threading.Event()
        numbers = count()

        def rate_one() -> None:
            made = pair(next(numbers))
            store.record_pair(made)
            store.record_pick(made.pair_id, PickChoice.FIRST, idempotency_key=made.pair_id)

        def rate() -> None:
            while not done.is_set():
                rate_one()

        rate_one()
        raters = [threading.Thread(target=rate) for _ in range(4)]
        for rater in raters:
            rater.start()
        try:
            made = [store.back_up("manual", 30).path for _ in range(3)]
        finally:
            done.set()
            for rater in raters:
                rater.join()
    for backup in made:
        verify_backup(backup)
        with duckdb.connect(str(backup)) as connection:
            (numbers_of,) = connection.execute(
                """SELECT (SELECT count(*) FROM candidates) - 2 * (SELECT count(*) FROM pairs),
                (SELECT count(*) FROM picks) - (SELECT count(*) FROM pick_keys),
                (SELECT count(*) FROM picks WHERE pair_id NOT IN (SELECT pair_id FROM pairs)),
                (SELECT max(event) FROM picks) < nextval('events')
                """
            ).fetchall()
        assert numbers_of == (0, 0, 0, True)


def test_a_copy_goes_over_in_batches(tmp_path: Path) -> None:
    source, target = tmp_path / "source.duckdb", tmp_path / "it's a copy.duckdb"
    with duckdb.connect(str(source)) as connection:
        migrate(connection, source, tmp_path, stored_time(NOW))
        connection.execute("INSERT INTO event_keys SELECT 'key ' || range, 'record' FROM range(45000)")
        rows = copy_database(connection, target)
        assert (rows["event_keys"], rows["picks"]) == (45000, 0)
        connection.execute("INSERT INTO event_keys VALUES ('still', 'works')")
    with duckdb.connect(str(target)) as connection:
        assert connection.execute("SELECT count(DISTINCT idempotency_key) FROM event_keys").fetchall() == [(45000,)]
        with pytest.raises(duckdb.ConstraintException):
            connection.execute("INSERT INTO event_keys VALUES ('key 1', 'again')")


def test_a_backup_goes_to_another_disk(database: Database, path: Path) -> None:
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == path.parent.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory) as elsewhere:
        backup = back_up(database, Path(elsewhere), NOW)
        assert verify_backup(backup.path) == backup
        assert len(list(Path(elsewhere).iterdir())) == 2


def test_a_reason_is_a_plain_word(database: Database, backups: Path) -> None:
    for reason in ("", "Two words", "../up", "a--b", "-a"):
        with pytest.raises(InvalidRecord, match="small letters"):
            back_up(database, backups, NOW, reason)
    assert not backups.exists()


def test_a_backup_that_cannot_be_written_leaves_nothing(database: Database, backups: Path) -> None:
    backups.parent.mkdir(exist_ok=True)
    backups.write_text("a file where the folder should be")
    with pytest.raises(StoreDamaged, match=r"cannot be written to .*backups.*Nothing was kept.*disk is not full"):
        back_up(database, backups, NOW)
    assert not (backups.parent / COPYING).exists()
    add_conversation(database, "goes on")


def test_a_disk_that_is_full_during_a_copy_harms_nothing(path: Path) -> None:
    code = """if True:
        import resource, signal, sys
        from datetime import UTC, datetime
        from pathlib import Path
        from feedback_store.backup import back_up
        from feedback_store.database import Database
        from feedback_store.errors import StoreDamaged
        path, now = Path(sys.argv[1]), datetime.now(UTC)
        database = Database.open(path, now.replace(tzinfo=None))
        keys = "INSERT INTO event_keys SELECT md5(range::VARCHAR) || md5((range + 1)::VARCHAR), '' FROM range(60000)"
        with database.write() as cursor:
            cursor.execute(keys)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, unlimited))
        try:
            back_up(database, path.parent / "backups", now)
        except StoreDamaged as error:
            print("refused:", error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        with database.write() as cursor:
            cursor.execute("INSERT INTO event_keys VALUES ('after', '')")
        print("files:", sorted(one.name for one in (path.parent / "backups").iterdir()))
        print("made:", back_up(database, path.parent / "backups", now).rows["event_keys"])
        database.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    refused, files, made = done.stdout.splitlines()
    assert refused.startswith("refused: The database")
    assert (files, made) == ("files: []", "made: 60001"), done.stderr


def test_sql_reaches_no_file_but_unfinished_copies(database: Database, backups: Path, tmp_path: Path) -> None:
    backup = back_up(database, backups, NOW)
    for target in (backup.path, tmp_path / "new.duckdb", tmp_path / "data" / "new.duckdb"):
        with database.read() as cursor, pytest.raises(duckdb.PermissionException):
            cursor.execute(f"ATTACH '{target}' AS other")
    with pytest.raises(QueryRefused):
        run_query(database, f"SELECT * FROM '{backup.path.with_suffix('.json')}'")


# Looking


def test_backups_are_listed_newest_first_with_those_of_migrations(database: Database, backups: Path) -> None:
    back_up(database, backups, NOW)
    back_up(database, backups, NOW + timedelta(days=1), "weekly")
    duckdb.connect(str(backups / "schema-1-20261123-120000.duckdb")).close()
    os.utime(backups / "schema-1-20261123-120000.duckdb", (0, 0))
    (backups / ".unfinished.duckdb").write_bytes(b"")
    (backups / "notes.txt").write_text("mine")
    found = list_backups(backups)
    assert [(backup.reason, backup.created_at.day, backup.schema_version) for backup in found] == [
        ("weekly", 24, NEWEST), ("schema-1", 23, None), ("manual", 23, NEWEST),
    ]  # fmt: skip
    assert list_backups(backups / "nowhere") == []


def test_a_whole_backup_is_verified(database: Database, backups: Path) -> None:
    add_conversation(database, "one")
    made = back_up(database, backups, NOW)
    assert verify_backup(made.path) == made
    made.path.with_suffix(".json").unlink()
    without = verify_backup(made.path)
    assert (without.sha256, without.schema_version, without.rows["conversations"]) == (None, NEWEST, 1)


def test_a_backup_that_is_not_whole_is_refused(database: Database, backups: Path, tmp_path: Path) -> None:
    path = back_up(database, backups, NOW).path
    manifest = path.with_suffix(".json")
    whole, described = path.read_bytes(), manifest.read_text()

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreDamaged, match=r"cannot be read|is cut short"):
        verify_backup(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(StoreDamaged, match="its hash differs"):
        verify_backup(path)
    path.write_bytes(whole)
    manifest.write_text(described.replace('"turns": 0', '"turns": 7'))
    with pytest.raises(StoreDamaged, match="other rows than its manifest"):
        verify_backup(path)
    manifest.write_text("{")
    with pytest.raises(StoreDamaged, match="manifest that cannot be read"):
        verify_backup(path)
    with pytest.raises(NotFound, match="no backup"):
        verify_backup(backups / "nothing.duckdb")

    stranger = tmp_path / "other.duckdb"
    with duckdb.connect(str(stranger)) as connection:
        connection.execute("CREATE TABLE schema_migrations (version INTEGER, checksum VARCHAR)")
        connection.execute("INSERT INTO schema_migrations VALUES (1, 'somebody else')")
    with pytest.raises(StoreDamaged, match="not of this Zephyr Loop"):
        verify_backup(stranger)
    with duckdb.connect(str(stranger)) as connection:
        connection.execute("INSERT INTO schema_migrations VALUES (1000, 'later')")
    with pytest.raises(StoreTooNew, match="schema version 1000"):
        verify_backup(stranger)


def test_a_file_that_somebody_has_open_is_busy(database: Database, path: Path, backups: Path) -> None:
    with pytest.raises(StoreBusy):
        verify_backup(path)
    made = back_up(database, backups, NOW).path
    with start_server(made) as server:
        with pytest.raises(StoreBusy, match=f"process {server.pid}"):
            verify_backup(made)
        stop(server)
    add_conversation(database, "goes on")


# Keeping


def test_old_backups_go_but_the_newest_stay(database: Database, backups: Path) -> None:
    for days in (0, 10, 40, 50, 60):
        back_up(database, backups, NOW - timedelta(days=days), f"day-{days}")
    old = backups / "schema-1-20260101-000000.duckdb"
    old.write_bytes(b"")
    (backups / "schema-1-20260101-000000.duckdb.wal").write_bytes(b"")
    mine = backups / "mine.duckdb"
    mine.write_bytes(b"")
    os.utime(mine, (0, 0))
    gone = prune(backups, 30, KEEP_LAST, NOW)
    assert [name.rpartition("-")[2] for name in gone] == ["50.duckdb", "60.duckdb", "000000.duckdb"]
    assert [one.reason for one in list_backups(backups)] == ["day-0", "day-10", "day-40", "unknown"]
    assert len(list(backups.iterdir())) == 7
    assert prune(backups, 1, 1, NOW) == ("20261113-040506-day-10.duckdb", "20261014-040506-day-40.duckdb")
    assert prune(backups, 1, 1, NOW + timedelta(days=9999)) == ()


@pytest.mark.parametrize(("keep_days", "keep_last"), [(0, 3), (30, 0)])
def test_a_retention_that_keeps_nothing_is_refused(backups: Path, keep_days: int, keep_last: int) -> None:
    with pytest.raises(InvalidRecord, match="at least 1 day"):
        prune(backups, keep_days, keep_last, NOW)


# Putting back


def test_a_restore_puts_the_backup_in_place_and_keeps_what_was_there(path: Path, backups: Path) -> None:
    database = Database.open(path, stored_time(NOW))
    add_conversation(database, "before")
    made = back_up(database, backups, NOW)
    add_conversation(database, "after")
    database.close()
    restored = restore(made.path, path, NOW + timedelta(hours=1))
    assert restored.kept == backups / "20261123-050506-replaced.duckdb"
    assert (restored.backup, restored.schema_version, restored.erased) == (made.path, NEWEST, {})
    assert restored.sentence == (
        f"Restored 20261123-040506-manual.duckdb. The store from before is kept as {restored.kept}."
    )
    assert conversations(path) == ["before"]
    assert conversations(restored.kept) == ["after", "before"]
    assert sorted(one.name for one in path.parent.iterdir()) == ["backups", "store.duckdb"]
    back = restore(restored.kept, path, NOW + timedelta(hours=2))
    assert conversations(path) == ["after", "before"]
    assert [one.reason for one in list_backups(backups)] == ["replaced", "replaced", "manual"]
    assert back.kept is not None


def test_a_store_that_was_killed_is_kept_with_its_log(path: Path, backups: Path) -> None:
    with FeedbackStore.open(path) as store:
        made = store.back_up("manual", 30)
    code = "import sys, os; from feedback_store.store import FeedbackStore; from pathlib import Path\n"
    code += "store = FeedbackStore.open(Path(sys.argv[1])); store.record_conversation('late')\n"
    code += "os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.with_name("store.duckdb.wal").exists()
    restored = restore(made.path, path, NOW)
    assert restored.kept is not None
    assert not path.with_name("store.duckdb.wal").exists()
    assert verify_backup(restored.kept).rows["titles"] == 1
    restore(restored.kept, path, NOW)
    with FeedbackStore.open(path) as store:
        assert [one.title for one in store.load_conversations()] == ["late"]


def test_a_store_is_restored_where_there_was_none(database: Database, backups: Path, tmp_path: Path) -> None:
    add_conversation(database, "one")
    made = back_up(database, backups, NOW)
    fresh = tmp_path / "elsewhere" / "store.duckdb"
    fresh.parent.mkdir()
    restored = restore(made.path, fresh, NOW)
    assert restored.kept is None
    assert "There was no store before." in restored.sentence
    assert conversations(fresh) == ["one"]


def test_an_old_backup_is_brought_to_the_newest_schema(path: Path, tmp_path: Path) -> None:
    old = tmp_path / "schema-1-20260101-000000.duckdb"
    with duckdb.connect(str(old)) as connection:
        migrate(connection, old, tmp_path, stored_time(NOW), MIGRATIONS[:1])
        connection.execute("INSERT INTO conversations VALUES ('old', now()::TIMESTAMP)")
    before = old.read_bytes()
    path.parent.mkdir()
    restored = restore(old, path, NOW)
    assert restored.schema_version == NEWEST
    assert conversations(path) == ["old"]
    assert old.read_bytes() == before
    assert not (path.parent / "backups").exists()


def test_a_damaged_store_is_replaced_and_kept(path: Path, backups: Path) -> None:
    database = Database.open(path, stored_time(NOW))
    add_conversation(database, "good")
    made = back_up(database, backups, NOW)
    database.close()
    path.write_bytes(b"rubbish" * 1000)
    restored = restore(made.path, path, NOW)
    assert restored.kept is not None
    assert restored.kept.read_bytes() == b"rubbish" * 1000
    assert "could not be read: who was erased is known from the backups only" in restored.sentence
    assert conversations(path) == ["good"]


def test_a_restore_is_refused_while_a_server_has_the_store(path: Path, backups: Path) -> None:
    with FeedbackStore.open(path) as store:
        made = store.back_up("manual", 30)
    with start_server(path) as server:
        with pytest.raises(StoreBusy, match=rf"in use by process {server.pid}"):
            restore(made.path, path, NOW)
        stop(server)
    assert [one.reason for one in list_backups(backups)] == ["manual"]


def test_what_cannot_be_restored_leaves_the_store_as_it_was(path: Path, backups: Path) -> None:
    database = Database.open(path, stored_time(NOW))
    add_conversation(database, "kept")
    made = back_up(database, backups, NOW).path
    database.close()
    with pytest.raises(StoreError, match="is the store itself"):
        restore(path, path, NOW)
    made.write_bytes(made.read_bytes()[:-4096])
    with pytest.raises(StoreDamaged):
        restore(made, path, NOW)
    with pytest.raises(NotFound):
        restore(backups / "nothing.duckdb", path, NOW)
    assert conversations(path) == ["kept"]
    assert [one.reason for one in list_backups(backups)] == ["manual"]


# Replacing the open file


def test_the_open_file_is_replaced_while_people_read_and_write(path: Path) -> None:
    with FeedbackStore.open(path) as store:
        database = store._database
        done = threading.Event()
        failures: list[BaseException] = []

        def rate() -> None:
            try:
                while not done.is_set():
                    store.record_conversation("written")
                    store.counts()
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        people = [threading.Thread(target=rate) for _ in range(3)]
        for one in people:
            one.start()
        inodes = {path.stat().st_ino}
        for _ in range(3):
            replace_file(database, copy_database)
            inodes.add(path.stat().st_ino)
        done.set()
        for one in people:
            one.join()
        assert failures == []
        written = store.counts().conversations
        with pytest.raises(StoreBusy):
            verify_backup(path)
    assert len(inodes) > 1
    assert len(conversations(path)) == written > 0


def test_a_replacement_that_fails_leaves_the_file_as_it_was(database: Database, path: Path) -> None:
    add_conversation(database, "kept")

    def fail(_cursor: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        replace_file(database, fail)
    add_conversation(database, "more")
    database.close()
    assert conversations(path) == ["kept", "more"]


def test_the_lock_between_close_and_replace_is_duckdbs_own(path: Path) -> None:
    Database.open(path, stored_time(NOW)).close()
    code = "import sys; from feedback_store.store import FeedbackStore; from pathlib import Path\n"
    code += "FeedbackStore.open(Path(sys.argv[1]))"
    with locked(path) as file:
        assert file is not None
        other = subprocess.run(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert "StoreBusy" in other.stderr
    with start_server(path) as server:
        with pytest.raises(StoreBusy), locked(path):
            pass
        stop(server)
    with locked(path.with_name("nothing.duckdb")) as file:
        assert file is None


def test_the_manifest_is_what_the_backup_says(database: Database, backups: Path) -> None:
    made = back_up(database, backups, NOW)
    manifest = json.loads(made.path.with_suffix(".json").read_text())
    assert manifest["created_at"] == "2026-11-23T04:05:06+00:00"
    assert manifest["bytes"] == made.path.stat().st_size == made.bytes
    assert describe(made.path) == made
