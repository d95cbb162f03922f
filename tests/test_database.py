"""One file for many threads: batches, failures that heal, logs that are damaged."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import duckdb
import pytest

from feedback_store.database import Cursor, Database
from feedback_store.errors import Conflict, StoreBusy, StoreDamaged, StoreError
from feedback_store.recovery import LOG_COMMIT

ROOT = Path(__file__).parent.parent
MOMENT = datetime(2026, 11, 22, 12)


class Elapsed:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "store.duckdb"


@pytest.fixture
def elapsed() -> Elapsed:
    return Elapsed()


@pytest.fixture
def database(path: Path, elapsed: Elapsed) -> Iterator[Database]:
    opened = Database.open(path, MOMENT)
    opened._elapsed_s = elapsed
    with opened.write() as cursor:
        cursor.execute("CREATE TABLE notes (note VARCHAR PRIMARY KEY)")
    yield opened
    opened.close()


def keep_notes(cursor: Cursor, notes: Sequence[str]) -> list[str | StoreError]:
    """A handler: one statement for the batch; what begins with ``refuse`` is refused alone."""
    kept = [note for note in notes if not note.startswith("refuse")]
    if kept:
        cursor.execute("INSERT INTO notes SELECT unnest(CAST(? AS VARCHAR[]))", [kept])
    return [note if note in kept else StoreError(f"{note!r} is refused.") for note in notes]


def notes_of(database: Database) -> set[str]:
    with database.read() as cursor:
        return {note for (note,) in cursor.execute("SELECT note FROM notes").fetchall()}


def together(database: Database, calls: Sequence[Callable[[], object]]) -> list[object]:
    """Start the calls while another writer is busy, so that all of them wait; what each returned or raised."""
    outcomes: list[object] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            outcomes[index] = calls[index]()
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    with database.write():
        for number, thread in enumerate(threads, start=1):
            thread.start()
            while len(database._waiting) < number:
                pass
    for thread in threads:
        thread.join()
    return outcomes


# Group commit


def test_requests_that_wait_together_are_one_batch_in_the_order_they_came(database: Database) -> None:
    batches: list[list[str]] = []

    def handler(cursor: Cursor, notes: Sequence[str]) -> list[str | StoreError]:
        batches.append(list(notes))
        return keep_notes(cursor, notes)

    names = [f"note {number}" for number in range(12)]
    assert together(database, [lambda name=name: database.submit(handler, name) for name in names]) == names
    assert batches == [names]
    assert notes_of(database) == set(names)


def test_a_batch_is_bounded_and_nobody_is_forgotten(database: Database) -> None:
    database.batch_limit = 5
    sizes: list[int] = []

    def handler(cursor: Cursor, notes: Sequence[str]) -> list[str | StoreError]:
        sizes.append(len(notes))
        return keep_notes(cursor, notes)

    names = [f"note {number}" for number in range(12)]
    assert together(database, [lambda name=name: database.submit(handler, name) for name in names]) == names
    assert sizes == [5, 5, 2]
    assert not database._led


def test_handlers_do_not_share_a_batch(database: Database) -> None:
    def shout(cursor: Cursor, notes: Sequence[str]) -> list[str | StoreError]:
        return keep_notes(cursor, [note.upper() for note in notes])

    calls = [
        lambda: database.submit(keep_notes, "a"),
        lambda: database.submit(shout, "b"),
        lambda: database.submit(keep_notes, "c"),
    ]
    assert together(database, calls) == ["a", "B", "c"]
    assert notes_of(database) == {"a", "B", "c"}


def test_a_refused_request_is_refused_alone(database: Database) -> None:
    first, refused, last = together(
        database, [lambda note=note: database.submit(keep_notes, note) for note in ("one", "refuse me", "two")]
    )
    assert (first, last) == ("one", "two")
    assert isinstance(refused, StoreError)
    assert "refuse me" in str(refused)
    assert notes_of(database) == {"one", "two"}


def test_a_request_that_breaks_the_transaction_fails_alone(database: Database) -> None:
    database.submit(keep_notes, "taken")
    names = ["a", "b", "taken", "c", "d"]
    outcomes = together(database, [lambda name=name: database.submit(keep_notes, name) for name in names])
    assert [outcome for outcome in outcomes if isinstance(outcome, str)] == ["a", "b", "c", "d"]
    assert isinstance(outcomes[2], Conflict)
    assert notes_of(database) == {"taken", "a", "b", "c", "d"}


def test_a_handler_that_answers_too_little_keeps_nothing(database: Database) -> None:
    def forgetful(cursor: Cursor, notes: Sequence[str]) -> list[str | StoreError]:
        keep_notes(cursor, notes)
        return []

    with pytest.raises(AssertionError, match="0 outcomes for 1 requests"):
        database.submit(forgetful, "lost")
    assert notes_of(database) == set()


def test_an_interrupted_leader_leaves_nobody_waiting(database: Database) -> None:
    def interrupted(cursor: Cursor, notes: Sequence[str]) -> list[str | StoreError]:
        raise KeyboardInterrupt

    calls = [*[lambda: database.submit(interrupted, "x")] * 2, lambda: database.submit(keep_notes, "after")]
    first, second, after = together(database, calls)
    assert isinstance(first, KeyboardInterrupt)
    assert isinstance(second, StoreError)
    assert "not certain" in str(second)
    assert after == "after"
    assert notes_of(database) == {"after"}


def test_a_closed_database_refuses_everybody_who_waits(database: Database) -> None:
    names = [f"note {number}" for number in range(3)]

    def close_first(name: str) -> str:
        database._closed = True
        return database.submit(keep_notes, name)

    outcomes = together(database, [lambda name=name: close_first(name) for name in names])
    database._closed = False
    assert all("is closed" in str(outcome) for outcome in outcomes)
    assert notes_of(database) == set()


SYNCED = """
import os, sys, threading
from datetime import datetime
from pathlib import Path
from feedback_store.database import Database
database = Database.open(Path(sys.argv[1]), datetime(2026, 11, 22))
with database.write() as cursor:
    cursor.execute("CREATE TABLE notes (note VARCHAR)")
def keep(cursor, notes):
    os.write(2, f"batch of {len(notes)}\\n".encode())
    cursor.execute("INSERT INTO notes SELECT unnest(CAST(? AS VARCHAR[]))", [notes])
    return notes
def call(index):
    database.submit(keep, f"note {index}")
    os.write(2, b"acknowledged\\n")
for round in range(3):
    if round == 2:
        with database.read() as cursor:
            cursor.execute("CHECKPOINT")
    threads = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    with database.write():
        for number, thread in enumerate(threads, start=1):
            thread.start()
            while len(database._waiting) < number:
                pass
    for thread in threads:
        thread.join()
os._exit(0)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_batch_is_one_fdatasync_before_the_first_acknowledgement(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    done = subprocess.run(
        ["strace", "-f", "-o", trace, "-e", "trace=write,fdatasync,fsync", sys.executable, "-c", SYNCED, path],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not trace.exists() or "batch of" not in trace.read_text():
        pytest.skip(f"strace may not trace here: {done.stderr[-200:]}")
    calls = [
        name
        for line in trace.read_text().splitlines()
        for name in ("batch of 8", "acknowledged", " fdatasync(", " fsync(")
        if name in line
    ]
    first, second, third = (batch.split() for batch in " ".join(calls).split("batch of 8")[1:])
    told = ["acknowledged"] * 8
    assert first == ["fdatasync(", *told]
    assert second[:9] == ["fdatasync(", *told]  # what follows is the checkpoint
    # The checkpoint removed the log: the next batch is in a new file, whose directory entry is synced too.
    assert third == ["fdatasync(", "fsync(", *told]


# Failures that heal


def break_database(database: Database) -> None:
    """What DuckDB raises after a failed fdatasync; it answers nothing more until the file is opened again."""
    with pytest.raises(StoreDamaged, match=r"not certain.*goes on by itself"), database.write():
        raise duckdb.FatalException("FATAL Error: fsync failed!")


def test_after_a_fatal_error_the_file_is_opened_again(database: Database) -> None:
    database.submit(keep_notes, "before")
    connection = database._connection
    break_database(database)
    assert notes_of(database) == {"before"}
    assert database._connection is not connection
    assert database.submit(keep_notes, "after") == "after"
    with pytest.raises(duckdb.PermissionException), database.read() as cursor:
        cursor.execute(f"SELECT * FROM read_text('{__file__}')")


def test_calls_in_progress_hold_up_the_reopening_and_nobody_hangs(database: Database) -> None:
    with database.read() as cursor:
        cursor.execute("SELECT 1").fetchall()
        break_database(database)
        with pytest.raises(StoreDamaged, match="1 calls in progress"):
            database.submit(keep_notes, "early")
    assert database.submit(keep_notes, "late") == "late"


OWNER = """
import sys
import duckdb
connection = duckdb.connect(sys.argv[1])
print("mine", flush=True)
sys.stdin.read()
"""


def test_a_file_taken_by_another_process_meanwhile_is_said_to_be_busy(
    database: Database, path: Path, elapsed: Elapsed
) -> None:
    database.submit(keep_notes, "before")
    break_database(database)
    aside = path.with_name("aside")
    path.rename(aside)
    path.mkdir()
    with pytest.raises(StoreDamaged, match="cannot be opened"):
        notes_of(database)
    path.rmdir()
    aside.rename(path)
    with pytest.raises(StoreDamaged, match="cannot be opened"):
        notes_of(database)  # asked again within a second: the same answer, and no attempt
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "mine\n"
    elapsed.seconds += 1
    with pytest.raises(StoreBusy, match=f"in use by process {owner.pid}"):
        notes_of(database)
    owner.communicate()
    elapsed.seconds += 1
    assert notes_of(database) == {"before"}


# Health


def test_a_store_that_can_be_written_is_healthy_and_nothing_is_left_behind(database: Database, path: Path) -> None:
    database.check()
    assert {file.name for file in path.parent.iterdir()} <= {"store.duckdb", "store.duckdb.wal"}


def test_a_directory_that_refuses_is_said_and_heals(database: Database, path: Path, elapsed: Elapsed) -> None:
    probe = path.with_name(".store.duckdb.probe")
    database.check()
    probe.mkdir()
    database.check()  # within a second nothing is asked again
    elapsed.seconds += 1
    with pytest.raises(StoreDamaged, match="Nothing can be kept"):
        database.check()
    probe.rmdir()
    with pytest.raises(StoreDamaged, match="Nothing can be kept"):
        database.check()
    elapsed.seconds += 1
    database.check()


def test_after_a_write_that_failed_health_is_a_write_that_succeeds(database: Database) -> None:
    with database.write() as cursor:
        before = cursor.execute("SELECT nextval('events')").fetchall()[0][0]
    break_database(database)
    assert database._write_failed
    database.check()
    assert not database._write_failed
    with database.write() as cursor:
        assert cursor.execute("SELECT nextval('events')").fetchall() == [(before + 2,)]


def test_a_closed_database_is_not_healthy(database: Database) -> None:
    database.close()
    with pytest.raises(StoreDamaged, match="is closed"):
        database.check()


# Logs that are damaged

KILLED = """
import os, signal, sys
from datetime import datetime
from pathlib import Path
from feedback_store.database import Database
database = Database.open(Path(sys.argv[1]), datetime(2026, 11, 22))
with database.write() as cursor:
    cursor.execute("CREATE TABLE notes (note VARCHAR)")
with database.read() as cursor:
    cursor.execute("CHECKPOINT")
for number in range(int(sys.argv[2])):
    with database.write() as cursor:
        cursor.execute("INSERT INTO notes VALUES (?)", [f"note {number} of some length"])
os.kill(os.getpid(), signal.SIGKILL)
"""
COMMITS = 6


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as a kill leaves it: six commits in the log."""
    directory = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, directory / "store.duckdb", str(COMMITS)], cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    return directory


def reopened(killed: Path, path: Path, log: bytes) -> int:
    """How many notes there are after the log was replaced by these bytes."""
    shutil.copytree(killed, path.parent, dirs_exist_ok=True)
    log_file = path.with_name("store.duckdb.wal")
    log_file.write_bytes(log)
    try:
        database = Database.open(path, MOMENT)
    except StoreDamaged:
        assert log_file.read_bytes() == log
        assert path.read_bytes() == (killed / "store.duckdb").read_bytes()
        raise
    try:
        return len(notes_of(database))
    finally:
        database.close()


def log_of(killed: Path) -> bytes:
    return (killed / "store.duckdb.wal").read_bytes()


def ends_of_commits(log: bytes) -> list[int]:
    ends, place = [], log.find(LOG_COMMIT)
    while place >= 0:
        ends.append(place + len(LOG_COMMIT))
        place = log.find(LOG_COMMIT, place + 1)
    return ends


def test_a_log_ends_every_transaction_as_we_think(killed: Path) -> None:
    ends = ends_of_commits(log_of(killed))
    assert len(ends) == COMMITS
    assert ends[-1] == len(log_of(killed))


def test_a_whole_log_is_replayed(killed: Path, path: Path) -> None:
    assert reopened(killed, path, log_of(killed)) == COMMITS


@pytest.mark.parametrize("tail", [b"", b"\0" * 4096, os.urandom(100)], ids=["cut", "zeros", "garbage"])
def test_a_torn_last_transaction_is_left_out_and_the_store_goes_on(killed: Path, path: Path, tail: bytes) -> None:
    log = log_of(killed)
    whole = ends_of_commits(log)[-2]
    torn = log[:whole] + (tail or log[whole : len(log) - 7])
    assert reopened(killed, path, torn) == COMMITS - 1
    database = Database.open(path, MOMENT)
    with database.write() as cursor:
        cursor.execute("INSERT INTO notes VALUES ('after')")
    database.close()
    assert "after" in notes_of(Database.open(path, MOMENT))


def test_no_changed_byte_loses_a_commit_without_a_word(killed: Path, tmp_path: Path) -> None:
    log = log_of(killed)
    header = log.index(b"\xff\xff") + 2
    first, last = ends_of_commits(log)[0], ends_of_commits(log)[-2]
    places = {*range(header), *range(header, first, 3), *range(last, len(log), 2), *range(first, last, 61)}
    silent, refusals = [], []
    for place in sorted(places):
        changed = bytearray(log)
        changed[place] ^= 0x40
        path = tmp_path / str(place) / "store.duckdb"
        try:
            if reopened(killed, path, bytes(changed)) != COMMITS:
                silent.append(place)
        except StoreDamaged as error:
            refusals.append(str(error))
    assert silent == []
    assert len(refusals) > len(places) / 2
    assert all("Nothing was changed" in refusal for refusal in refusals)


def test_a_length_that_was_changed_is_named_with_what_to_do(killed: Path, path: Path) -> None:
    log = log_of(killed)
    place = ends_of_commits(log)[2]
    changed = log[:place] + b"\xff" * 8 + log[place + 8 :]
    with pytest.raises(StoreDamaged, match=rf"damaged at byte {place}: .*Copy .*backups.* remove store\.duckdb\.wal"):
        reopened(killed, path, changed)


def test_a_checksum_that_fails_is_named_with_what_to_do(killed: Path, path: Path) -> None:
    log = log_of(killed)
    place = ends_of_commits(log)[2] + 20
    with pytest.raises(StoreDamaged, match=r"its log store\.duckdb\.wal is damaged.*checksum.*backups"):
        reopened(killed, path, log[:place] + b"\x55" + log[place + 1 :])


def test_a_block_with_a_wrong_checksum_is_refused_where_no_checkpoint_was_under_way(killed: Path, path: Path) -> None:
    shutil.copytree(killed, path.parent)
    damaged = bytearray(path.read_bytes())
    damaged[12288 + 100] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(StoreDamaged, match=r"checksum.*Nothing was changed.*backups"):
        Database.open(path, MOMENT)
    assert path.read_bytes() == damaged


def test_the_log_of_another_file_is_refused(killed: Path, path: Path, tmp_path: Path) -> None:
    Database.open(path, MOMENT).close()
    log = path.with_name("store.duckdb.wal")
    log.write_bytes(log_of(killed))
    with pytest.raises(StoreDamaged, match=r"is not of store\.duckdb"):
        Database.open(path, MOMENT)
    log.unlink()
    Database.open(path, MOMENT).close()


def test_a_file_is_opened_once_and_asking_again_does_not_give_up_the_lock(database: Database, path: Path) -> None:
    database.submit(keep_notes, "in the log")
    with pytest.raises(StoreBusy, match=f"in use by process {os.getpid()}"):
        Database.open(path, MOMENT)
    done = subprocess.run(
        [sys.executable, "-c", f"import duckdb; duckdb.connect({str(path)!r})"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Could not set lock" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only files")
def test_a_read_only_file_is_said(path: Path) -> None:
    Database.open(path, MOMENT).close()
    path.chmod(0o444)
    with pytest.raises(StoreDamaged, match="readable and writable"):
        Database.open(path, MOMENT)
