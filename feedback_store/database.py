"""The DuckDB file: opened once, one short transaction a write, its errors in our words.

``FeedbackStore`` sits on this and says what is written. A DuckDB connection cannot be shared between threads, so each
call has its own cursor and reads its result to the end. A commit is one fdatasync: when a write returns, it is kept.
Not here: tables (``migrations.py``), questions asked of them (``store.py``).
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import duckdb

from feedback_store.errors import Conflict, StoreBusy, StoreDamaged, StoreError
from feedback_store.migrations import migrate

Cursor = duckdb.DuckDBPyConnection

CLOSE_TIMEOUT_S = 30.0
_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "threads": "1",
    "memory_limit": "512MB",
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


class Database:
    """One open DuckDB file; safe to use from any thread."""

    def __init__(self, path: Path, connection: Cursor) -> None:
        self.path = path
        self._connection = connection
        self._events = threading.Lock()
        self._bulk = threading.Lock()
        self._idle = threading.Condition()
        self._active = 0
        self._closed = False

    @classmethod
    def open(cls, path: Path, opened_at: datetime) -> Database:
        """Open or create the file, lock it and bring its schema up to date.

        Raises ``StoreBusy``, ``StoreDamaged`` or ``StoreTooNew``.
        """
        path = path.absolute()
        backups = path.parent / "backups"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreDamaged(f"The data directory {path.parent} cannot be made: {error.strerror}.") from error
        try:
            connection = duckdb.connect(str(path), config={**_CONFIG, "temp_directory": f"{path}.tmp"})
        except duckdb.Error as error:
            raise _cannot_open(path, backups, error) from error
        try:
            migrate(connection, path, backups, opened_at)
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
        except duckdb.Error as error:
            connection.close()
            raise _cannot_open(path, backups, error) from error
        except BaseException:
            connection.close()
            raise
        return cls(path, connection)

    @contextlib.contextmanager
    def read(self) -> Iterator[Cursor]:
        """A cursor for questions; fetch every result to the end."""
        with self._cursor() as cursor, self._translated("read"):
            yield cursor

    @contextlib.contextmanager
    def write(self, *, bulk: bool = False) -> Iterator[Cursor]:
        """A cursor inside one transaction: all of it is kept, or nothing.

        Writers of events take turns. ``bulk`` is for the preferences table, whose writers take turns among
        themselves, so that a pick does not wait for the reading of a large import.
        """
        with self._bulk if bulk else self._events, self._cursor() as cursor, self._translated("written"):
            cursor.begin()
            try:
                yield cursor
                cursor.commit()
            except BaseException:
                # A commit that failed has ended the transaction by itself.
                with contextlib.suppress(duckdb.Error):
                    cursor.rollback()
                raise

    def close(self) -> None:
        """Wait for calls in progress (30 s at most), then let go of the file. Closing twice is fine."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._active == 0, timeout=CLOSE_TIMEOUT_S)
        with self._translated("written"):
            self._connection.close()

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        with self._idle:
            if self._closed:
                raise StoreError(f"The store {self.path} is closed: the server is stopping. Try again when it is back.")
            self._active += 1
        try:
            with self._connection.cursor() as cursor:
                yield cursor
        finally:
            with self._idle:
                self._active -= 1
                self._idle.notify_all()

    @contextlib.contextmanager
    def _translated(self, done: str) -> Iterator[None]:
        try:
            yield
        except duckdb.ConstraintException as error:
            raise Conflict(f"A record with this id exists already ({_first_line(error)}).") from error
        except duckdb.Error as error:
            # A wrong checksum comes as the bare base class.
            if isinstance(error, _FILE_ERRORS) or type(error) is duckdb.Error:
                raise StoreDamaged(
                    f"The database {self.path} cannot be {done}: {_first_line(error)}. Nothing of this call was kept. "
                    "Make sure that the disk is writable and not full and try again; if that fails, restart the server."
                ) from error
            raise


def _cannot_open(path: Path, backups: Path, error: duckdb.Error) -> StoreError:
    message = str(error)
    if "Could not set lock" in message:
        owner = re.search(r"\(PID (\d+)\)", message)
        return StoreBusy(path, int(owner[1]) if owner else None)
    return StoreDamaged(
        f"The database {path} cannot be opened: {_first_line(error)}. Nothing was changed. Check that it is a readable "
        f"and writable file; if it is damaged, put a copy from {backups} in its place, or move it away to start empty."
    )


def _first_line(error: duckdb.Error) -> str:
    return str(error).splitlines()[0].rstrip(" .!") if str(error) else type(error).__name__
