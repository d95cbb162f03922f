"""Copies of the store: made while it works, checked, kept for a while, and put back in its place.

    store.duckdb --back_up--> backups/<UTC time>-<reason>.duckdb + .json --restore--> store.duckdb
                                               └──verify_backup, list_backups, prune

A backup is the store at one moment, written by DuckDB itself: whoever reads the live file in the process that owns it
drops DuckDB's lock on it. The copy is finished under ``.copying``, then moved into place, its manifest last. Backups
of migrations have no manifest and are listed, verified, pruned and restored all the same.

Not here: a copy on another machine (``backups/`` can be a mount), models, versions and snapshots, which are plain
files; what a person's erasure does to backups (``erasure.py``).
"""

# ruff: noqa: S608 - only names that the database's own catalogue lists are put into SQL
from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BufferedRandom
from pathlib import Path

import duckdb

from feedback_store.copying import COPYING, copy_database, quoted
from feedback_store.database import Cursor, Database
from feedback_store.durable import read_json, sha256_of, sync, write_json
from feedback_store.erased_rows import (
    Tombstones,
    add_tombstones,
    count,
    is_marked,
    load_tombstones,
    mark,
    still_there,
    without,
)
from feedback_store.errors import InvalidRecord, NotFound, StoreBusy, StoreDamaged, StoreError, StoreTooNew
from feedback_store.migrations import MIGRATIONS, migrate
from feedback_store.recovery import LOG_SUFFIXES, Config
from feedback_store.rows import stored_time

KEEP_DAYS = 30
KEEP_LAST = 3
FORMAT = 1
_NAME = re.compile(r"(?:(?P<before>schema-\d+)-)?(?P<at>\d{8}-\d{6})(?:-(?P<reason>[a-z0-9-]+))?\.duckdb")
_REASON = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_CONFIG: Config = {
    "threads": "1",
    "memory_limit": "512MB",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
}
_one_copy = threading.Lock()


@dataclass(frozen=True, slots=True)
class Backup:
    """A copy of the store. What stands in the manifest is None, or empty, where there is none."""

    path: Path
    created_at: datetime
    reason: str
    bytes: int
    sha256: str | None
    schema_version: int | None
    rows: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did; ``kept`` is the store from before, ``erased`` counts rows that had to go again by table."""

    backup: Path
    kept: Path | None
    schema_version: int
    erased: Mapping[str, int]
    sentence: str


# Making


def back_up(database: Database, directory: Path, now: datetime, reason: str = "manual") -> Backup:
    """Copy the store as it is at this moment; it goes on working. Raises ``StoreDamaged``, nothing kept then."""
    if not _REASON.fullmatch(reason):
        raise InvalidRecord("Backup", "reason", reason, "small letters, digits and single dashes")
    with _disk_refuses(f"The backup cannot be written to {directory}", "Nothing was kept of it."):
        directory.mkdir(parents=True, exist_ok=True)
        for manifest in directory.glob(".*.json.????????"):
            manifest.unlink(missing_ok=True)  # of a process that was killed while it wrote one
        with copying(database.path.parent) as folder:
            fresh = folder / "backup.duckdb"
            with database.read() as cursor:
                version = _schema_version(cursor)
                rows = copy_database(cursor, fresh)
            path = _free_name(directory, now, reason)
            described = {
                "format": FORMAT,
                "reason": reason,
                "created_at": now.astimezone(UTC).isoformat(timespec="seconds"),
                "schema_version": version,
                "rows": rows,
                "bytes": fresh.stat().st_size,
                "sha256": sha256_of(fresh),
            }
            _move(fresh, path)
            write_json(_manifest_of(path), described)
    return describe(path)


def replace_file(database: Database, make: Callable[[Cursor, Path], object]) -> None:
    """Put the file that ``make`` writes in the place of the open database's, whose file and log are gone then."""
    with copying(database.path.parent) as folder:
        fresh = folder / "replacement.duckdb"

        def put() -> None:
            with locked(database.path):
                put_in_place(fresh, database.path)

        database.replace(lambda cursor: make(cursor, fresh), put)


@contextmanager
def copying(directory: Path) -> Iterator[Path]:
    """An empty folder for a database that is not finished, below a data or backup directory; one at a time."""
    folder = directory / COPYING
    with _one_copy:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def discard_unfinished(directory: Path) -> None:
    """Remove what a process that was killed left unfinished, anywhere below a directory."""
    for folder in sorted(directory.rglob(COPYING)):
        with copying(folder.parent):
            pass


@contextmanager
def locked(path: Path) -> Iterator[BufferedRandom | None]:
    """Hold the lock that DuckDB takes on a file, so that nobody opens it while it is replaced; None without a file.

    The process must not have the file open in DuckDB: the lock belongs to the process. Raises ``StoreBusy``.
    """
    if not path.exists():
        yield None
        return
    with path.open("rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreBusy(path, None) from error
        yield file


def put_in_place(fresh: Path, path: Path) -> None:
    """Make ``fresh`` the database file at ``path``; the log and the temporary files of the one before go.

    The file first: DuckDB refuses a log of another file, so that a crash between the two is found.
    """
    fresh.replace(path)
    sync(path.parent)
    for log in _logs_of(path):
        log.unlink(missing_ok=True)
    shutil.rmtree(f"{path}.tmp", ignore_errors=True)


# Looking


def list_backups(directory: Path) -> list[Backup]:
    """The backups of a directory, newest first, as their manifests and names describe them."""
    found = (path for path in directory.glob("*.duckdb") if not path.name.startswith("."))
    return sorted(map(describe, found), key=lambda backup: (backup.created_at, backup.path.name), reverse=True)


def files_of(backup: Backup) -> set[str]:
    """The names of a backup's files; of none where neither a manifest nor its name says that it is one of ours."""
    path, manifest = backup.path, _manifest_of(backup.path)
    parts = []
    if manifest.is_file():
        parts = [path, manifest]
    elif _NAME.fullmatch(path.name):  # of a migration, or a store that was kept aside with its logs
        parts = [path, *_logs_of(path)]
    return {part.name for part in parts if not part.is_symlink()}


def describe(path: Path) -> Backup:
    """A backup by its manifest; without one by its name, or as old as its file. Nothing in it is read."""
    name = _NAME.fullmatch(path.name)
    try:
        manifest = read_json(_manifest_of(path)) or {}
    except (OSError, ValueError):
        manifest = {}
    if "created_at" in manifest:
        created_at = datetime.fromisoformat(manifest["created_at"])
    elif name:
        created_at = datetime.strptime(name["at"], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
    else:
        created_at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    named = (name["before"] or name["reason"]) if name else None
    return Backup(
        path=path,
        created_at=created_at,
        reason=manifest.get("reason") or named or "unknown",
        bytes=path.stat().st_size,
        sha256=manifest.get("sha256"),
        schema_version=manifest.get("schema_version"),
        rows=manifest.get("rows", {}),
    )


def verify_backup(path: Path) -> Backup:
    """Check that a backup is whole: its hash, that it opens, that its schema is known, the rows of each table.

    Raises ``NotFound``, ``StoreDamaged``, ``StoreTooNew``, and ``StoreBusy`` where somebody has it open.
    """
    if not path.is_file():
        raise NotFound("backup", str(path))
    with _disk_refuses(f"The backup {path} cannot be read", "Use another one."):
        backup = describe(path)
        if backup.sha256 is None and _manifest_of(path).exists():
            raise StoreDamaged(f"The backup {path} has a manifest that cannot be read. Use another one.")
        with opened(path) as cursor:
            steps = dict(cursor.execute("SELECT version, checksum FROM schema_migrations").fetchall())
            rows = _count_rows(cursor)
            if path.stat().st_size < _expected_bytes(cursor):
                raise StoreDamaged(f"The backup {path} is cut short. Use another one.")
        # Only after DuckDB has refused a file that another process writes to.
        if backup.sha256 is not None and sha256_of(path) != backup.sha256:
            raise StoreDamaged(f"The backup {path} is not the file that was written: its hash differs. Use another.")
    known = {migration.version: migration.checksum for migration in MIGRATIONS}
    version = max(steps, default=0)
    if version > max(known):
        raise StoreTooNew(path, version, max(known))
    if not steps or not steps.items() <= known.items():
        raise StoreDamaged(f"The backup {path} has a schema that is not of this Zephyr Loop. Use another one.")
    if backup.sha256 is not None and dict(backup.rows) != rows:
        raise StoreDamaged(f"The backup {path} holds other rows than its manifest counts. Use another one.")
    return Backup(path, backup.created_at, backup.reason, backup.bytes, backup.sha256, version, rows)


@contextmanager
def opened(path: Path, *, read_only: bool = True) -> Iterator[Cursor]:
    """A database file that no server owns. Raises ``StoreBusy`` and ``StoreDamaged``."""
    try:
        connection = duckdb.connect(str(path), read_only=read_only, config=_CONFIG)
        try:
            yield connection
        finally:
            connection.close()
    except duckdb.Error as error:
        message = str(error).partition("\n")[0]
        if "Could not set lock" in message or isinstance(error, duckdb.ConnectionException):
            owner = re.search(r"\(PID (\d+)\)", str(error))
            raise StoreBusy(path, int(owner[1]) if owner else None) from error
        if isinstance(error, duckdb.OutOfMemoryException) or "No space left" in message:
            raise StoreError(f"The file {path} was not gone through: {message}. Make room and try again.") from error
        raise StoreDamaged(f"The file {path} cannot be read: {message}. Use another backup.") from error


def prune(directory: Path, keep_days: int, keep_last: int, now: datetime) -> tuple[str, ...]:
    """Remove backups older than ``keep_days``, but never the newest ``keep_last``; the names of those removed.

    Only files with a name that is given here or by a migration are removed.
    """
    if keep_days < 1 or keep_last < 1:
        raise InvalidRecord("Retention", "keep_days", (keep_days, keep_last), "at least 1 day, and at least 1 backup")
    oldest = now - timedelta(days=keep_days)
    backups = [backup for backup in list_backups(directory) if _NAME.fullmatch(backup.path.name)]
    gone = [backup.path for backup in backups[keep_last:] if backup.created_at < oldest]
    with _disk_refuses(f"A backup in {directory} cannot be removed", "Remove it yourself."):
        for path in gone:
            remove_backup(path)
    return tuple(path.name for path in gone)


def remove_backup(path: Path) -> None:
    """Remove a backup with its log and its manifest."""
    for part in (path, *_logs_of(path), _manifest_of(path)):
        part.unlink(missing_ok=True)
    sync(path.parent)


def rewrite_backup(path: Path, prepare: Callable[[Cursor], Mapping[str, str]], add: Callable[[Cursor], None]) -> None:
    """Put a copy in the place of a backup, made as ``prepare`` says (see ``copy_database``), with what ``add`` adds.

    The manifest first: after a crash between the two the old file does not fit it, and is rewritten the next time.
    """
    with copying(path.parent) as folder:
        fresh = folder / path.name
        with opened(path) as cursor:
            copy_database(cursor, fresh, prepare)
        rows = _added(fresh, add)
        manifest = read_json(_manifest_of(path))
        if manifest is not None:
            described = {"rows": rows, "bytes": fresh.stat().st_size, "sha256": sha256_of(fresh)}
            write_json(_manifest_of(path), manifest | described)
        put_in_place(fresh, path)


def _added(path: Path, add: Callable[[Cursor], None]) -> dict[str, int]:
    """Add to a finished file; its rows by table afterwards."""
    with opened(path, read_only=False) as cursor:
        cursor.begin()
        add(cursor)
        cursor.commit()
        rows = _count_rows(cursor)
    sync(path)
    return rows


# Putting back


def restore(path: Path, store_path: Path, now: datetime) -> Restored:
    """Put a backup in the place of the store, which no server may have open; the store from before is kept.

    The backup is verified and brought to the newest schema first, and who was erased since it was made is erased
    from it. Raises as ``verify_backup`` does; the store is as it was then.
    """
    path, store_path = path.absolute(), store_path.absolute()
    if store_path.exists() and path.exists() and path.samefile(store_path):
        raise StoreError(f"{path} is the store itself. Name a backup.")
    verify_backup(path)
    tombstones, unread = _tombstones_before(store_path)
    with (
        _disk_refuses(f"The backup {path} cannot be restored", f"{store_path} is as it was."),
        copying(store_path.parent) as folder,
    ):
        fresh, erased = _prepared(path, folder, now, tombstones)
        with locked(store_path) as store:
            kept = None if store is None else _keep_aside(store, store_path, now)
            put_in_place(fresh, store_path)
    Database.open(store_path, stored_time(now)).close()
    version = MIGRATIONS[-1].version
    return Restored(path, kept, version, erased, _restored_sentence(path, kept, erased, unread=unread))


def _tombstones_before(store_path: Path) -> tuple[Tombstones, bool]:
    """Who was erased, as the present store says; where it cannot be read (True then) as the backups beside it say."""
    if not store_path.exists():
        return Tombstones(), False
    try:
        with opened(store_path) as cursor:
            return load_tombstones(cursor), False
    except StoreDamaged:
        found = Tombstones()
        for backup in list_backups(store_path.parent / "backups"):
            with suppress(StoreError), opened(backup.path) as cursor:
                found |= load_tombstones(cursor)
        return found, True


def _prepared(path: Path, folder: Path, now: datetime, tombstones: Tombstones) -> tuple[Path, Mapping[str, int]]:
    """A file made of the backup: newest schema, the erased left out again; and the rows that went for that."""
    fresh, clean = folder / "restored.duckdb", folder / "clean.duckdb"
    _copy_logs(path, fresh)
    shutil.copyfile(path, fresh)
    with opened(fresh, read_only=False) as cursor:
        migrate(cursor, fresh, folder / "backups", stored_time(now))
        people, contents = still_there(cursor, tombstones)
        mark(cursor, people, contents)
        erased = count(cursor)
        if is_marked(cursor):
            copy_database(cursor, clean, lambda reading: without(reading, people, contents))
            fresh = clean
    _added(fresh, lambda cursor: add_tombstones(cursor, tombstones))
    return fresh, erased


def _keep_aside(store: BufferedRandom, store_path: Path, now: datetime) -> Path:
    """Copy the store and its logs to a backup; the logs first, the file last."""
    directory = store_path.parent / "backups"
    directory.mkdir(exist_ok=True)
    kept = _free_name(directory, now, "replaced")
    _copy_logs(store_path, kept)
    unfinished = kept.with_name(f".{kept.name}")
    try:
        with unfinished.open("wb") as copy:
            # Through the open handle: closing another one would let go of the lock.
            shutil.copyfileobj(store, copy)
            copy.flush()
            os.fsync(copy.fileno())
        unfinished.replace(kept)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(directory)
    return kept


def _restored_sentence(path: Path, kept: Path | None, erased: Mapping[str, int], *, unread: bool) -> str:
    said = [f"Restored {path.name}."]
    said.append(f"The store from before is kept as {kept}." if kept else "There was no store before.")
    if erased:
        said.append(f"{sum(erased.values())} rows of people who were erased since it was made were taken out again.")
    if unread:
        said.append(
            "The store from before could not be read: who was erased is known from the backups only. If somebody was "
            "erased after the newest backup, run `zloop erase` for them again."
        )
    return " ".join(said)


# Names and files


def _free_name(directory: Path, now: datetime, reason: str) -> Path:
    stem = f"{now.astimezone(UTC):%Y%m%d-%H%M%S}-{reason}"
    path, number = directory / f"{stem}.duckdb", 1
    while path.exists():
        number += 1
        path = directory / f"{stem}-{number}.duckdb"
    return path


def _manifest_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _logs_of(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in LOG_SUFFIXES]


def _copy_logs(source: Path, target: Path) -> None:
    for log, copy in zip(_logs_of(source), _logs_of(target), strict=True):
        if log.exists():
            shutil.copyfile(log, copy)
            sync(copy)


def _move(fresh: Path, path: Path) -> None:
    """Rename; where the target is on another disk, copy beside it first."""
    try:
        fresh.replace(path)
    except OSError:
        unfinished = path.with_name(f".{path.name}")
        try:
            shutil.copyfile(fresh, unfinished)
            sync(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    sync(path.parent)


def _schema_version(cursor: Cursor) -> int:
    return int(cursor.execute("SELECT max(version) FROM schema_migrations").fetchall()[0][0])


def _count_rows(cursor: Cursor) -> dict[str, int]:
    tables = cursor.execute("SELECT table_name FROM duckdb_tables() WHERE NOT temporary ORDER BY table_name").fetchall()
    return {table: cursor.execute(f"SELECT count(*) FROM {quoted(table)}").fetchall()[0][0] for (table,) in tables}


def _expected_bytes(cursor: Cursor) -> int:
    """How large the file of a database is at least: three headers and its blocks."""
    size, blocks = cursor.execute("SELECT block_size, total_blocks FROM pragma_database_size()").fetchall()[0]
    return int(3 * 4096 + size * blocks)


@contextmanager
def _disk_refuses(what: str, and_so: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreDamaged(f"{what}: {error.strerror or error}. {and_so} Check that the disk is not full.") from error
