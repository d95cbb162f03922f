"""One question to the store in SQL, for whoever runs the house: read-only, with limits on time and size.

    zloop sql, POST /v1/query → run_query → one SELECT in a read-only transaction → rows that JSON can carry

Read-only in three ways: DuckDB's own parser must call the text exactly one SELECT, every table function in it must be
one of ``TABLE_FUNCTIONS`` (none of them reads a file or runs SQL from a text), and it runs in a transaction in which
DuckDB refuses to write. The store's connection opens no files and has its settings locked.

Not covered: memory beyond that of the whole store. Sorts, joins and lists stay within it and fail alone, but DuckDB
builds a single text of any size (``repeat('x', 3000000000)``) outside of it, and stops between two steps only.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import duckdb

from feedback_store.database import Cursor, Database
from feedback_store.errors import QueryRefused

LIMIT_S = 10.0
MAX_ROWS = 1000
MAX_CHARACTERS = 4_000_000
TABLE_FUNCTIONS = frozenset(
    {
        "duckdb_columns", "duckdb_constraints", "duckdb_functions", "duckdb_indexes", "duckdb_schemas",
        "duckdb_sequences", "duckdb_tables", "duckdb_types", "duckdb_views", "generate_series", "histogram",
        "json_each", "json_tree", "pragma_database_size", "pragma_storage_info", "pragma_table_info", "range", "unnest",
    }
)  # fmt: skip
_FETCHED_ROWS = 50
# These say something about the file or the disk, not about the question.
_FILE_ERRORS = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The answer to a question; ``truncated`` where there are more rows than these.

    Values are what JSON has: times as ISO 8601 (UTC), intervals in seconds, bytes in hexadecimal, structs as objects.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    truncated: bool


def run_query(database: Database, sql: str, *, limit_s: float = LIMIT_S, max_rows: int = MAX_ROWS) -> QueryResult:
    """The first ``max_rows`` rows of one SELECT, at most ``MAX_CHARACTERS`` as JSON. Raises ``QueryRefused``."""
    if not 0 < limit_s < threading.TIMEOUT_MAX or max_rows < 1:
        raise QueryRefused(f"The limits are {limit_s} s and {max_rows} rows; both must be above 0.")
    with database.read() as cursor:
        try:
            _refuse_all_but_select(cursor, sql)
            alarm = threading.Timer(limit_s, cursor.interrupt)
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            alarm.start()
            try:
                return _answer(cursor.execute(sql), max_rows)
            finally:
                # Joined, so that the interruption cannot reach a cursor that is closed or has gone on.
                alarm.cancel()
                alarm.join()
                cursor.rollback()
        except duckdb.InterruptException as error:
            raise QueryRefused(
                f"The query was stopped after {limit_s:g} s. Ask for less: fewer columns, a WHERE, a LIMIT."
            ) from error
        except duckdb.OutOfMemoryException as error:
            raise QueryRefused(
                "The query needs more memory than the store has. Ask for less: fewer columns, a WHERE, a LIMIT."
            ) from error
        except _FILE_ERRORS:
            raise
        except duckdb.Error as error:
            if type(error) is duckdb.Error:  # a block with a wrong checksum
                raise
            raise QueryRefused(f"The query failed: {_sentence(error)} Nothing was changed.") from error


def _refuse_all_but_select(cursor: Cursor, sql: str) -> None:
    statements = cursor.extract_statements(sql)
    if len(statements) != 1:
        raise QueryRefused(f"The query holds {len(statements)} statements; ask one SELECT at a time.")
    if statements[0].type is not duckdb.StatementType.SELECT:
        raise QueryRefused(
            f"The query is {statements[0].type.name}, and only SELECT is run here: nothing of the store can be changed "
            "or set in SQL."
        )
    if statements[0].named_parameters:
        names = ", ".join(sorted(statements[0].named_parameters))
        raise QueryRefused(f"The query has the parameters {names}; write the values into it.")
    parsed = json.loads(cursor.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()[0][0])
    if parsed["error"]:
        raise QueryRefused(f"The query cannot be looked through: {parsed['error_message']}. Write it as one SELECT.")
    strangers = sorted(set(_table_functions(parsed["statements"])) - TABLE_FUNCTIONS)
    if strangers:
        raise QueryRefused(
            f"The query takes rows from {', '.join(strangers)}, which is not allowed here: a query reads the store's "
            f"own tables and {', '.join(sorted(TABLE_FUNCTIONS))}."
        )


def _table_functions(node: Any) -> Iterator[str]:
    """The names of the functions that stand where a table can stand, anywhere in a parsed statement."""
    if isinstance(node, list):
        for one in node:
            yield from _table_functions(one)
    elif isinstance(node, dict):
        if node.get("type") == "TABLE_FUNCTION":
            yield node["function"]["function_name"].lower()
        for one in node.values():
            yield from _table_functions(one)


def _answer(cursor: Cursor, max_rows: int) -> QueryResult:
    columns = tuple(str(column[0]) for column in cursor.description or ())
    rows: list[tuple[Any, ...]] = []
    characters = 0
    while fetched := cursor.fetchmany(_FETCHED_ROWS):
        for row in fetched:
            plain = tuple(map(_plain, row))
            characters += len(json.dumps(plain))
            if len(rows) == max_rows or (rows and characters > MAX_CHARACTERS):
                return QueryResult(columns, tuple(rows), truncated=True)
            rows.append(plain)
    return QueryResult(columns, tuple(rows), truncated=False)


def _plain(value: Any) -> Any:
    """A value of DuckDB as JSON has it."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return _plain_scalar(value)


def _plain_scalar(value: Any) -> Any:
    if isinstance(value, Decimal):
        # A fraction as a number where that is exact to every digit, else as text.
        return float(value) if Decimal(repr(float(value))) == value else str(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value)


def _sentence(error: duckdb.Error) -> str:
    """DuckDB's message without the excerpt of the query below it."""
    return " ".join(str(error).partition("\n\n")[0].split()).rstrip(".!") + "."
