"""kill -9 before every step on the disk that an operation takes: what is found is how it was, or how it was to be.

A write is also torn: after half of its bytes, and after its first page.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from faults import disk
from faults.child import ask
from faults.state import MOMENT, complaints, fill
from feedback_store.backup import back_up, list_backups, verify_backup
from feedback_store.migrations import MIGRATIONS, migrate
from feedback_store.records import now
from feedback_store.recovery import open_file
from feedback_store.rows import stored_time
from feedback_store.snapshots import freeze, load_snapshot, verify
from feedback_store.store import FeedbackStore

PAIRS = 10
ROWS = 3000


@dataclass
class Outcome:
    """The kills of one operation: how often it was found as before and as after, what the next one did not clear."""

    operation: str
    steps: int = 0
    kills: int = 0
    found: Counter[str] = field(default_factory=Counter)
    left_behind: list[str] = field(default_factory=list)


def run(operation: str, library: Path, at_most: int | None = None) -> Outcome:
    """Kill at every step, before it and in two places of it; or in the middle of so many, spread over all of them."""
    outcome = Outcome(operation)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        _prepare(operation, folder)
        outcome.steps = _kill(operation, folder, library, 0, torn=0, outcome=outcome)
        places = range(1, outcome.steps + 1)
        if at_most is not None:
            places = places[:: max(1, outcome.steps // at_most)]
        for place in places:
            for torn in range(3) if at_most is None else (2,):
                _kill(operation, folder, library, place, torn=torn, outcome=outcome)
    return outcome


def _kill(operation: str, folder: Path, library: Path, place: int, *, torn: int, outcome: Outcome) -> int:
    """Run the operation on a fresh copy, killed at this step, and look at what it left; its steps where it lived."""
    home = folder / "data"
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(folder / "template", home)
    child = disk.start("step", operation, home, place, torn, library=library, below=home)
    out, errors = child.communicate()
    said = [json.loads(line) for line in out.splitlines()]
    if child.returncode == -signal.SIGKILL:
        outcome.kills += 1
    else:
        assert child.returncode == 0, errors
    found = OPERATIONS[operation](home, any("acknowledged" in line for line in said))
    left = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    hidden = [path for path in left if any(part.startswith(".") for part in path.parts)]
    outcome.left_behind += [f"{path} (step {place})" for path in hidden]
    lived = next((line for line in said if "steps" in line), None)
    assert lived is None or found == "after", f"{operation} ended by itself and is found as {found}"
    outcome.found[found] += 1
    return int(lived["steps"]) if lived else 0


def _prepare(operation: str, folder: Path) -> None:
    template = folder / "template"
    template.mkdir()
    path = template / "store.duckdb"
    if operation == "migration":
        with duckdb.connect(str(path)) as connection:
            migrate(connection, path, template / "backups", stored_time(MOMENT), MIGRATIONS[:1])
            connection.execute(
                "INSERT INTO picks (pick_id, pair_id, pick, reasons, rater, created_at) "
                "SELECT format('pick_{}', n), format('pair_{}', n // 2), 'first', [], 'ana', TIMESTAMP '2026-11-22' "
                "FROM range(20) AS numbers(n)"
            )
        return
    fill(path, PAIRS)
    for number in range(2, 8):
        with FeedbackStore.open(path) as store:  # each time it is closed there is a checkpoint
            ask(store, "before", number, number, PAIRS)
    if operation == "import":
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            for number in range(ROWS):
                row = {"prompt": f"Ask {number}?", "chosen": f"Good {number}.", "rejected": f"Bad {number}."}
                file.write(json.dumps(row) + "\n")


def _after_pick(home: Path, acknowledged: bool) -> str:
    with FeedbackStore.open(home / "store.duckdb") as store:
        with store._database.read() as cursor:
            assert complaints(cursor) == []
            kept = cursor.execute("SELECT pick_id FROM picks WHERE idempotency_key = 'step 1 1'").fetchall()
        assert len(kept) == 1 or (not kept and not acknowledged), f"{kept}, acknowledged: {acknowledged}"
        _, again = ask(store, "step", 1, 1, PAIRS)
        assert not kept or kept == [(again,)]
    return "after" if kept else "before"


def _after_checkpoint(home: Path, _: bool) -> str:
    found = "before" if (home / "store.duckdb.wal").exists() else "after"
    with FeedbackStore.open(home / "store.duckdb") as store, store._database.read() as cursor:
        assert complaints(cursor) == []
        kept = cursor.execute("SELECT count(*) FROM picks WHERE starts_with(idempotency_key, 'step ')").fetchall()
        assert kept == [(PAIRS,)]
    return found


def _after_import(home: Path, _: bool) -> str:
    def counted(store: FeedbackStore) -> tuple[int, int]:
        with store._database.read() as cursor:
            return cursor.execute(
                "SELECT (SELECT count(*) FROM preferences), (SELECT count(*) FROM imports)"
            ).fetchall()[0]

    with FeedbackStore.open(home / "store.duckdb") as store:
        found = counted(store)
        assert found in {(0, 0), (ROWS, 1)}, f"rows and imports: {found}"
        again = store.record_import(str(home.parent / "rows.jsonl"))
        assert (again.imported, again.duplicates) == (ROWS - found[0], found[0])
        assert counted(store) == (ROWS, found[1] + 1)
    return "after" if found[0] else "before"


def _after_snapshot(home: Path, _: bool) -> str:
    folder = home / "snapshots"
    found = [path for path in folder.glob("*") if not path.name.startswith(".")]
    for path in found:
        verify(load_snapshot(path))
    with FeedbackStore.open(home / "store.duckdb") as store:
        verify(freeze(store.preferences(), folder, None))
    return "after" if found else "before"


def _after_backup(home: Path, _: bool) -> str:
    found = list_backups(home / "backups")
    for backup in found:
        verify_backup(backup.path)
    with FeedbackStore.open(home / "store.duckdb") as store:
        back_up(store._database, home / "backups", now())
    for backup in list_backups(home / "backups"):
        verify_backup(backup.path)
    return "after" if found else "before"


def _after_migration(home: Path, _: bool) -> str:
    path, newest = home / "store.duckdb", MIGRATIONS[-1].version
    with open_file(path, {}) as connection:  # as the store does: a torn block is mended
        version = connection.execute("SELECT max(version) FROM schema_migrations").fetchall()[0][0]
        tables = {name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
        assert version in range(1, newest + 1)
        assert ("pick_words" in tables) == (version >= 2), f"version {version} with {sorted(tables)}"
    with FeedbackStore.open(path) as store, store._database.read() as cursor:
        assert complaints(cursor) == []
        assert cursor.execute("SELECT count(*), count(supersedes) FROM picks").fetchall() == [(20, 10)]
    for backup in list_backups(home / "backups"):
        verify_backup(backup.path)
    return "after" if version == newest else "before"


OPERATIONS: dict[str, Callable[[Path, bool], str]] = {
    "pick": _after_pick,
    "checkpoint": _after_checkpoint,
    "import": _after_import,
    "snapshot": _after_snapshot,
    "backup": _after_backup,
    "migration": _after_migration,
}
