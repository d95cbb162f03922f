"""A database copied whole while others work on it: what backups, restores, erasures and migrations are made of.

Not here: where the copy goes and what it is for (``backup.py``, ``erasure.py``, ``migrations.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import duckdb

from feedback_store.durable import sync

Cursor = duckdb.DuckDBPyConnection

COPYING = ".copying"
"""The folder, beside the store or a backup, for copies that are not finished: whoever opens the store removes it."""

_BATCH_ROWS = 20_000


def copy_database(
    connection: Cursor, target: Path, prepare: Callable[[Cursor], Mapping[str, str]] | None = None
) -> dict[str, int]:
    """Write all that ``connection`` sees at this moment to a new database file; the number of its rows by table.

    ``prepare`` gets the cursor that reads and may give queries for tables that are not copied as they are. Other
    connections go on reading and writing. Rows go over in batches: ``COPY FROM DATABASE`` keeps the keys of a whole
    table in memory and gives up where a store has a million picks.
    """
    target.unlink(missing_ok=True)
    with connection.cursor() as reading, connection.cursor() as writing:
        reading.begin()
        source = reading.execute("SELECT current_database()").fetchall()[0][0]
        # The question to a table begins the transaction's view; numbers drawn before it are below the sequence's.
        reading.execute("SELECT count(*) FROM schema_migrations").fetchall()
        tables = reading.execute(
            "SELECT table_name FROM duckdb_tables() WHERE database_name = current_database() AND NOT temporary "
            "ORDER BY table_name"
        ).fetchall()
        queries = prepare(reading) if prepare else {}
        writing.execute(f"ATTACH {_literal(target)} AS unfinished_copy (READ_WRITE)")
        try:
            writing.execute(f"COPY FROM DATABASE {quoted(source)} TO unfinished_copy (SCHEMA)")
            rows = {
                table: _copy_table(reading, writing, quoted(table), queries.get(table, f"FROM {quoted(table)}"))
                for (table,) in tables
            }
            writing.execute("CHECKPOINT unfinished_copy")
        except BaseException:
            # On a full disk detaching fails as well, after it is done.
            with suppress(duckdb.Error):
                writing.execute("DETACH unfinished_copy")
            raise
        writing.execute("DETACH unfinished_copy")
        reading.rollback()
    sync(target)
    return rows


def _copy_table(reading: Cursor, writing: Cursor, table: str, query: str) -> int:
    rows = 0
    with reading.sql(query).to_arrow_reader(_BATCH_ROWS) as batches:
        for batch in batches:
            writing.register("arriving", batch)
            try:
                writing.execute(f"INSERT INTO unfinished_copy.{table} FROM arriving")
            finally:
                writing.unregister("arriving")
            rows += batch.num_rows
    return rows


def quoted(name: str) -> str:
    """A name as SQL takes it, whatever is in it."""
    return '"{}"'.format(name.replace('"', '""'))


def _literal(path: Path) -> str:
    return "'{}'".format(str(path).replace("'", "''"))
