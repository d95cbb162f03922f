"""A question in SQL is answered, and nothing else: no change, no file, no endless wait."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from feedback_store.database import Database
from feedback_store.errors import QueryRefused, StoreError
from feedback_store.query import MAX_CHARACTERS, run_query

MOMENT = datetime(2026, 11, 22, 12)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database.open(tmp_path / "store.duckdb", MOMENT)
    with opened.write() as cursor:
        cursor.executemany(
            "INSERT INTO conversations (conversation_id, created_at) VALUES (?, ?)",
            [[f"conv_{number}", MOMENT] for number in range(30)],
        )
    yield opened
    opened.close()


def conversations(database: Database) -> int:
    return int(run_query(database, "SELECT count(*) FROM conversations").rows[0][0])


def test_a_select_is_answered_with_its_columns_and_rows(database: Database) -> None:
    result = run_query(database, "SELECT conversation_id AS id, created_at FROM conversations ORDER BY id LIMIT 2")
    assert result.columns == ("id", "created_at")
    assert result.rows == (("conv_0", "2026-11-22T12:00:00"), ("conv_1", "2026-11-22T12:00:00"))
    assert not result.truncated


@pytest.mark.parametrize(
    "sql",
    [
        "FROM conversations LIMIT 1",
        "VALUES (1)",
        "WITH one AS (SELECT 1 AS a) SELECT a FROM one",
        "DESCRIBE conversations",
        "SHOW TABLES",
        "SUMMARIZE conversations",
        "SELECT * FROM range(3)",
        "SELECT * FROM unnest([1, 2])",
        "SELECT list_transform([1], lambda x: x + 1)",
        "SELECT 1;",
        "-- how many\nSELECT count(*) FROM standing_picks",
    ],
)
def test_every_way_to_write_a_question_works(database: Database, sql: str) -> None:
    assert run_query(database, sql).columns


def test_values_are_what_json_has(database: Database) -> None:
    result = run_query(
        database,
        """SELECT 1.50::DECIMAL(5, 2) AS short, 0.1234567890123456789::DECIMAL(30, 19) AS exact,
        '\\xC3\\xA9'::BLOB AS bytes, INTERVAL 90 SECOND AS span,
        {'a': 1, 'at': DATE '2026-01-02'} AS struct, MAP {DATE '2026-01-02': 2} AS map,
        TIMESTAMP '2026-01-02 03:04:05.6' AS at, TIME '03:04' AS clock, [1, NULL] AS list, [1, 2]::INT[2] AS pair,
        'nan'::DOUBLE AS nan, 2::HUGEINT ** 3 AS power, 170141183460469231731687303715884105727::HUGEINT AS huge,
        '00000000-0000-0000-0000-000000000001'::UUID AS id, NULL AS nothing, true AS yes, '{"k": 1}'::JSON AS json""",
    )
    row = dict(zip(result.columns, result.rows[0], strict=True))
    assert row == {
        "short": 1.5, "exact": "0.1234567890123456789", "bytes": "c3a9", "span": 90.0,
        "struct": {"a": 1, "at": "2026-01-02"}, "map": {"2026-01-02": 2}, "at": "2026-01-02T03:04:05.600000",
        "clock": "03:04:00", "list": [1, None], "pair": [1, 2], "nan": "nan", "power": 8.0,
        "huge": 170141183460469231731687303715884105727, "id": "00000000-0000-0000-0000-000000000001",
        "nothing": None, "yes": True, "json": '{"k": 1}',
    }  # fmt: skip
    assert json.loads(json.dumps(row, allow_nan=False)) == row


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("INSERT INTO conversations VALUES ('x', now(), 'x')", "is INSERT, and only SELECT"),
        ("UPDATE conversations SET rater = 'x'", "is UPDATE"),
        ("DELETE FROM conversations", "is DELETE"),
        ("DROP TABLE conversations", "is DROP"),
        ("CREATE TEMP TABLE mine AS SELECT 1", "is CREATE"),
        ("COPY conversations TO '/tmp/x.csv'", "is COPY"),
        ("ATTACH '/tmp/x.duckdb' AS x", "is ATTACH"),
        ("SET threads = 2", "is SET"),
        ("PRAGMA database_list", "is PRAGMA"),
        ("CALL pragma_version()", "is CALL"),
        ("BEGIN", "is TRANSACTION"),
        ("CHECKPOINT", "is CALL"),
        ("EXPORT DATABASE '/tmp/x'", "is EXPORT"),
        ("LOAD json", "is LOAD"),
        ("EXPLAIN SELECT 1", "is EXPLAIN"),
        ("SELECT 1; SELECT 2", "holds 2 statements"),
        ("SELECT 1; DROP TABLE conversations", "holds 2 statements"),
        ("", "holds 0 statements"),
        ("  -- nothing", "holds 0 statements"),
        ("SELECT $name", "has the parameters name"),
        ("SELECT ?", "has the parameters 1"),
        ("SELEC 1", "failed: Parser Error: syntax error"),
        ("SELECT * FROM nowhere", "failed: Catalog Error: Table with name nowhere"),
        ("SELECT 'x'::INTEGER", "failed: Conversion Error"),
        ("WITH made AS (INSERT INTO conversations VALUES ('x', now(), 'x') RETURNING *) FROM made", "failed: "),
        ("SELECT nextval('events')", "failed: .*read-only"),
        ("SELECT setval('events', 1)", "failed: .*read-only"),
    ],
)
def test_what_is_no_question_is_refused_and_changes_nothing(database: Database, sql: str, reason: str) -> None:
    with pytest.raises(QueryRefused, match=reason) as refused:
        run_query(database, sql)
    assert "\n" not in str(refused.value)
    assert conversations(database) == 30


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('{file}')",
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM read_blob('{file}')",
        "SELECT * FROM '{file}'",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM query('SELECT content FROM read_text(''{file}'')')",
        "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
        "SELECT (SELECT count(*) FROM read_text('{file}'))",
        "SELECT 1 WHERE EXISTS (FROM READ_TEXT('{file}'))",
        "WITH inner AS (SELECT 1 UNION ALL SELECT 2 FROM glob('{file}')) FROM inner",
        "SELECT * FROM conversations, checkpoint()",
        "SELECT * FROM enable_profiling(save_location = '{file}')",
        "SELECT * FROM duckdb_secrets()",
    ],
)
def test_no_file_is_read_and_no_hidden_statement_runs(database: Database, tmp_path: Path, sql: str) -> None:
    file = tmp_path / "secret.csv"
    file.write_text("secret\n")
    with pytest.raises(QueryRefused):
        run_query(database, sql.format(file=file, folder=tmp_path))
    assert file.read_text() == "secret\n"


def test_more_rows_than_the_limit_are_cut_off_and_said_so(database: Database) -> None:
    assert len(run_query(database, "FROM conversations", max_rows=30).rows) == 30
    assert not run_query(database, "FROM conversations", max_rows=30).truncated
    cut = run_query(database, "FROM conversations", max_rows=29)
    assert (len(cut.rows), cut.truncated) == (29, True)
    endless = run_query(database, "SELECT range AS number FROM range(1000000000000)")
    assert (len(endless.rows), endless.truncated) == (1000, True)


def test_rows_too_large_for_an_answer_are_cut_off(database: Database) -> None:
    result = run_query(database, "SELECT repeat('x', 1000000) FROM range(100)")
    assert result.truncated
    assert 1 < len(result.rows) <= MAX_CHARACTERS / 1_000_000


def test_a_query_that_takes_too_long_is_stopped_and_the_store_goes_on(database: Database) -> None:
    endless = "SELECT count(*) FROM range(1000000) AS a, range(1000000) AS b WHERE hash(a.range, b.range) = 0"
    before = threading.active_count()
    with pytest.raises(QueryRefused, match=r"stopped after 0\.05 s"):
        run_query(database, endless, limit_s=0.05)
    assert conversations(database) == 30
    assert threading.active_count() == before


def test_a_query_that_wants_too_much_memory_fails_alone(database: Database) -> None:
    with pytest.raises(QueryRefused, match="more memory than the store has"):
        run_query(database, "SELECT len(list(repeat('x', 1000000))) FROM range(2000)")
    with database.write() as cursor:
        cursor.execute("INSERT INTO conversations (conversation_id, created_at) VALUES ('after', ?)", [MOMENT])
    assert conversations(database) == 31


@pytest.mark.parametrize(("limit_s", "max_rows"), [(0.0, 10), (-1.0, 10), (float("nan"), 10), (1.0, 0)])
def test_limits_must_be_above_zero(database: Database, limit_s: float, max_rows: int) -> None:
    with pytest.raises(QueryRefused, match="both must be above 0"):
        run_query(database, "SELECT 1", limit_s=limit_s, max_rows=max_rows)


def test_a_closed_store_says_so(database: Database) -> None:
    database.close()
    with pytest.raises(StoreError, match="is closed"):
        run_query(database, "SELECT 1")
