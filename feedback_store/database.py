"""The DuckDB file: opened once, one short transaction a write, its errors in our words.

    record_pick → submit ─┐
    record_pick → submit ─┼→ one transaction for all who wait → one fdatasync → each caller has its own answer
    record_pick → submit ─┘
    other records → write → a transaction each                    /readyz → check → can an event be kept now?

``FeedbackStore`` sits on this and says what is written. A DuckDB connection cannot be shared between threads, so each
call has its own cursor and reads its result to the end. A commit is one fdatasync of the write-ahead log (WAL): when a
write returns, it is kept. DuckDB does not sync the directory, so this does whenever the log is a new file.

A write that fails is never acknowledged. Where the disk refused the log, the next write goes through as soon as there
is room; after a failed fdatasync or checkpoint DuckDB gives the database up, and the next call opens the file again.

Not here: a file that a crash left (``recovery.py``), tables (``migrations.py``), questions asked of them
(``store.py``), picks in batches (``picks.py``).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import duckdb

from feedback_store.copying import COPYING
from feedback_store.durable import sync
from feedback_store.errors import Conflict, StoreBusy, StoreDamaged, StoreError, StoreTooNew
from feedback_store.migrations import migrate
from feedback_store.recovery import Config, open_file, refuse_silent_loss

Cursor = duckdb.DuckDBPyConnection
Request = TypeVar("Request")
Result = TypeVar("Result")

CLOSE_TIMEOUT_S = 30.0
BATCH_LIMIT = 256
HEALTH_AGE_S = 1.0
_GATHER_S = 0.004
_PROBE_BYTES = 64 * 1024
_MEMORY = "384MB"
_CONFIG: Config = {
    "threads": "1",
    "memory_limit": "1GB",  # for migrations, which fill tables with keys; then _MEMORY
    "fsync_mode": "STANDARD",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
}
# A call fails with one of these when the disk or the file does, not when our SQL is wrong. A commit that could not
# write is a TransactionException ("Failed to commit: Could not write file"); our writers never conflict otherwise.
_FILE_ERRORS = (
    duckdb.IOException,
    duckdb.TransactionException,
    duckdb.FatalException,
    duckdb.InternalException,
    duckdb.SerializationException,
    duckdb.OutOfMemoryException,
)
# After one of these DuckDB answers every call with "database has been invalidated" until the file is opened again.
_FATAL_ERRORS = (duckdb.FatalException, duckdb.InternalException)
_PENDING = object()


class _Ticket:
    """A caller of ``submit`` who waits: to be told the outcome, or to lead the next batch."""

    __slots__ = ("handler", "leads", "outcome", "request", "woken")

    def __init__(self, handler: Callable[[Cursor, Sequence[Any]], Sequence[Any]], request: object) -> None:
        self.handler = handler
        self.request = request
        self.leads = False
        self.outcome: object = _PENDING
        self.woken = threading.Event()


class Database:
    """One open DuckDB file; safe to use from any thread. ``elapsed_s`` is a clock that only goes forward."""

    def __init__(
        self, path: Path, connection: Cursor, opened_at: datetime, elapsed_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = path
        self.batch_limit = BATCH_LIMIT
        self._opened_at = opened_at
        self._elapsed_s = elapsed_s
        self._connection = connection
        self._events = threading.Lock()
        self._bulk = threading.Lock()
        # Calls in progress, and what becomes of the connection: guarded by the condition.
        self._idle = threading.Condition()
        self._active = 0
        self._closed = False
        self._lost = False
        self._refused: StoreError | None = None
        self._refused_at = 0.0
        # Callers of `submit`: guarded by the lock.
        self._queue = threading.Lock()
        self._waiting: deque[_Ticket] = deque()
        self._led = False
        self._crowd = 1
        self._log = (0, 0)
        self._write_failed = False
        self._checking = threading.Lock()
        self._complaint: str | None = None
        self._checked_at: float | None = None

    @classmethod
    def open(cls, path: Path, opened_at: datetime) -> Database:
        """Open or create the file, lock it and bring its schema up to date.

        Raises ``StoreBusy``, ``StoreDamaged`` or ``StoreTooNew``.
        """
        path = path.absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreDamaged(f"The data directory {path.parent} cannot be made: {error.strerror}.") from error
        return cls(path, _connect(path, opened_at), opened_at)

    @contextlib.contextmanager
    def read(self) -> Iterator[Cursor]:
        """A cursor for questions; fetch every result to the end."""
        with self._translated("read"), self._cursor() as cursor:
            yield cursor

    @contextlib.contextmanager
    def write(self, *, bulk: bool = False) -> Iterator[Cursor]:
        """A cursor inside one transaction: all of it is kept, or nothing.

        Writers of events take turns. ``bulk`` is for the preferences table, whose writers take turns among
        themselves, so that a pick does not wait for the reading of a large import.
        """
        with self._bulk if bulk else self._events, self._transaction() as cursor:
            yield cursor

    def submit(
        self, handler: Callable[[Cursor, Sequence[Request]], Sequence[Result | StoreError]], request: Request
    ) -> Result:
        """What ``handler`` makes of the request, kept on disk: one transaction for all who ask at the same time.

        Whoever gets the writers' lock hands the requests that wait to their handler (at most ``batch_limit``, in the
        order they came) and commits; the others sleep until then. After a batch of several as many are waited for, 4 ms
        at most; who asks alone waits for nobody. The handler has the transaction to itself and gives
        an outcome for each request; an outcome that is a ``StoreError`` is raised to its caller alone. Where a batch
        fails as a whole its halves are tried alone, down to the request that cannot be kept; when the disk fails,
        everybody hears of it.
        """
        ticket = _Ticket(handler, request)
        with self._queue:
            self._waiting.append(ticket)
            if not self._led:
                self._led = ticket.leads = True
        if not ticket.leads:
            try:
                ticket.woken.wait()
            except BaseException:
                self._leave(ticket)
                raise
        if ticket.leads:
            self._lead(ticket)
        if ticket.outcome is _PENDING:
            raise StoreError(
                f"The server is stopping: whether this reached the database {self.path} is not certain. "
                "Send it again with the same idempotency key."
            )
        if isinstance(ticket.outcome, Exception):
            raise ticket.outcome
        return cast(Result, ticket.outcome)

    def check(self) -> None:
        """Raise ``StoreDamaged`` where an event could not be kept now; within a second the answer is the same.

        64 KiB are written and synced beside the database and removed. After a write that failed an event number is
        drawn as well: a record in the log and an fdatasync of its own, and no row.
        """
        with self._checking:
            if self._checked_at is None or self._elapsed_s() >= self._checked_at + HEALTH_AGE_S:
                self._complaint = self._diagnose()
                self._checked_at = self._elapsed_s()
            if self._complaint is not None:
                raise StoreDamaged(self._complaint)

    def replace(self, make: Callable[[Cursor], object], put: Callable[[], object]) -> None:
        """Let another file take the place of this one: ``make`` it beside from a cursor, ``put`` it in its place.

        Writers wait from the beginning, readers only while the files change places: the file is closed while ``put``
        works, and whatever happens there, the next call opens the file that is in the place then.
        """
        with self._bulk, self._events:
            with self.read() as cursor:
                make(cursor)
            with self._idle:
                self._idle.wait_for(lambda: self._active == 0)
                self._connection.close()
                self._lost, self._log = True, (0, 0)
                put()
                self._reopen()

    def close(self) -> None:
        """Wait for calls in progress (30 s at most), then let go of the file. Closing twice is fine."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._active == 0, timeout=CLOSE_TIMEOUT_S)
        with self._translated("written"):
            self._connection.close()

    # Group commit

    def _lead(self, leader: _Ticket) -> None:
        batch: list[_Ticket] = []
        try:
            self._gather()
            with self._events:
                batch = self._next_batch()
                self._settle(batch)
            with self._queue:
                self._crowd = len(batch) + len(self._waiting)
        finally:
            # The next leader first: it works while the others wake.
            self._leave(leader)
            for ticket in batch:
                ticket.woken.set()

    def _gather(self) -> None:
        """Wait, 4 ms at most, for as many as the last batch held and met: those it woke come back together."""
        deadline = time.monotonic() + _GATHER_S
        while 1 < self._crowd > len(self._waiting) and time.monotonic() < deadline:
            time.sleep(_GATHER_S / 8)

    def _next_batch(self) -> list[_Ticket]:
        batch: list[_Ticket] = []
        with self._queue:
            handler = self._waiting[0].handler
            while self._waiting and self._waiting[0].handler == handler and len(batch) < self.batch_limit:
                batch.append(self._waiting.popleft())
        return batch

    def _settle(self, batch: Sequence[_Ticket]) -> None:
        try:
            with self._transaction() as cursor:
                outcomes = batch[0].handler(cursor, [ticket.request for ticket in batch])
                assert len(outcomes) == len(batch), f"{len(outcomes)} outcomes for {len(batch)} requests"
        except (StoreBusy, StoreDamaged, StoreTooNew) as error:
            outcomes = [error] * len(batch)
        except Exception as error:  # noqa: BLE001 - raised by the caller whose request it was
            if len(batch) > 1:
                middle = len(batch) // 2
                self._settle(batch[:middle])
                self._settle(batch[middle:])
                return
            outcomes = [error]
        for ticket, outcome in zip(batch, outcomes, strict=True):
            ticket.outcome = outcome

    def _leave(self, ticket: _Ticket) -> None:
        """Take a caller out of the queue; where it led, the first who waits leads now."""
        with self._queue:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            if ticket.leads:
                self._led = bool(self._waiting)
                if self._led:
                    self._waiting[0].leads = True
                    self._waiting[0].woken.set()

    # One transaction

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Cursor]:
        try:
            with self._translated("written"), self._cursor() as cursor:
                cursor.begin()
                try:
                    yield cursor
                    cursor.commit()
                except BaseException:
                    # A commit that failed has ended the transaction by itself.
                    with contextlib.suppress(duckdb.Error):
                        cursor.rollback()
                    raise
            self._keep_new_log()
        except StoreDamaged:
            self._write_failed = True
            raise
        self._write_failed = False

    def _keep_new_log(self) -> None:
        """Sync the directory where the last commit went to a log that was not there before."""
        try:
            log = self.path.with_name(f"{self.path.name}.wal").stat()
            if log.st_ino != self._log[0] or log.st_size < self._log[1]:
                sync(self.path.parent)
            self._log = (log.st_ino, log.st_size)
        except FileNotFoundError:
            self._log = (0, 0)  # the commit went into the database file itself
        except OSError as error:
            raise StoreDamaged(
                f"The directory {self.path.parent} cannot be synced: {error.strerror}. Whether this call was kept is "
                "not certain. Look after the disk and send it again with the same idempotency key."
            ) from error

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        with self._idle:
            if self._closed:
                raise StoreError(f"The store {self.path} is closed: the server is stopping. Try again when it is back.")
            if self._lost:
                self._reopen()
            self._active += 1
            connection = self._connection
        try:
            with connection.cursor() as cursor:
                yield cursor
        except _FATAL_ERRORS:
            with self._idle:
                self._lost = self._lost or connection is self._connection
            raise
        finally:
            with self._idle:
                self._active -= 1
                self._idle.notify_all()

    def _reopen(self) -> None:
        """Open the file again after DuckDB gave it up; the caller holds the condition.

        DuckDB's lock on the file is let go of and taken again: ``StoreBusy`` where another process was quicker.
        """
        if self._active:
            raise StoreDamaged(
                f"The database {self.path} failed and is opened again when the {self._active} calls in progress have "
                "ended. Try again in a moment."
            )
        if self._refused is not None and self._elapsed_s() < self._refused_at + HEALTH_AGE_S:
            raise self._refused
        with contextlib.suppress(duckdb.Error):
            self._connection.close()
        try:
            self._connection = _connect(self.path, self._opened_at)
        except StoreError as error:
            self._refused, self._refused_at = error, self._elapsed_s()
            raise
        self._lost, self._refused = False, None

    def _diagnose(self) -> str | None:
        try:
            _prove_room(self.path.with_name(f".{self.path.name}.probe"))
            with self.read() as cursor:
                cursor.execute("SELECT 1").fetchall()
            if self._write_failed:
                with self.write() as cursor:
                    cursor.execute("SELECT nextval('events')").fetchall()
        except StoreError as error:
            return str(error)
        except OSError as error:
            return (
                f"Nothing can be kept in {self.path.parent}: {error.strerror}. "
                "Make sure that the disk is writable and not full; the store goes on by itself then."
            )
        return None

    @contextlib.contextmanager
    def _translated(self, done: str) -> Iterator[None]:
        try:
            yield
        except duckdb.ConstraintException as error:
            raise Conflict(f"A record with this id exists already ({_first_line(error)}).") from error
        except duckdb.Error as error:
            # A wrong checksum comes as the bare base class.
            if isinstance(error, _FILE_ERRORS) or type(error) is duckdb.Error:
                kept = "Nothing of this call was kept."
                if isinstance(error, _FATAL_ERRORS):
                    kept = (
                        "Whether this call was kept is not certain; the same idempotency key makes it safe to repeat."
                    )
                raise StoreDamaged(
                    f"The database {self.path} cannot be {done}: {_first_line(error)}. {kept} Make sure that the disk "
                    "is writable and not full and try again: the store goes on by itself then."
                ) from error
            raise


def _connect(path: Path, opened_at: datetime) -> Cursor:
    """Open the file with our settings and the newest schema."""
    backups = path.parent / "backups"
    if _is_open_here(path):
        raise StoreBusy(path, os.getpid())
    refuse_silent_loss(path, backups)
    try:
        connection = open_file(path, {**_CONFIG, "temp_directory": f"{path}.tmp"})
    except duckdb.Error as error:
        raise _cannot_open(path, backups, error) from error
    try:
        shutil.rmtree(path.parent / COPYING, ignore_errors=True)  # what a process that was killed left there
        migrate(connection, path, backups, opened_at)
        connection.execute(f"SET memory_limit = '{_MEMORY}'")
        # Copies of the store are made in this folder (``backup.py``): the only place SQL may read or write.
        copying = str(path.parent / COPYING).replace("'", "''")
        connection.execute(f"SET allowed_directories = ['{copying}/']")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        sync(path.parent)
    except duckdb.Error as error:
        connection.close()
        raise _cannot_open(path, backups, error) from error
    except OSError as error:
        connection.close()
        raise StoreDamaged(f"The data directory {path.parent} cannot be synced: {error.strerror}.") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _is_open_here(path: Path) -> bool:
    """Whether this process has the file open already: closing another handle on it would drop DuckDB's lock."""
    with contextlib.suppress(OSError):
        wanted = path.stat()
        for handle in Path("/dev/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(int(handle.name)), wanted):
                    return True
    return False


def _prove_room(probe: Path) -> None:
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _cannot_open(path: Path, backups: Path, error: duckdb.Error) -> StoreError:
    message = str(error)
    if "Could not set lock" in message:
        owner = re.search(r"\(PID (\d+)\)", message)
        return StoreBusy(path, int(owner[1]) if owner else None)
    if "WAL" in message:
        return StoreDamaged(
            f"The database {path} cannot be opened, its log {path.name}.wal is damaged: {_first_line(error)}. "
            f"Nothing was changed. Copy both files to a safe place; then put a copy from {backups} in the place of "
            f"{path.name}, or go on without what the log holds, and remove {path.name}.wal."
        )
    return StoreDamaged(
        f"The database {path} cannot be opened: {_first_line(error)}. Nothing was changed. Check that it is a readable "
        f"and writable file; if it is damaged, put a copy from {backups} in its place, or move it away to start empty."
    )


def _first_line(error: duckdb.Error) -> str:
    return str(error).splitlines()[0].rstrip(" .!") if str(error) else type(error).__name__
