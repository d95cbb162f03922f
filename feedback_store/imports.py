"""Taking in a file or a hub data set of preferences: all of it, or nothing, in bounded memory.

    importers.read_preferences → batches → Arrow → one transaction → preferences, unpaired_preferences, imports

The table of imports is both the receipt and the history. A row that is there already counts as a duplicate, so the
same file twice changes nothing. Used by ``store.py``. Not here: what a file's columns mean (``importers/``).
"""

# ruff: noqa: S608 - only our own table names are put into SQL
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime

import pyarrow as pa

from feedback_store import rows
from feedback_store.database import Cursor, Database
from feedback_store.erasure import is_erased
from feedback_store.importers import PreferenceSource, read_preferences
from feedback_store.importers.pairs import Choices
from feedback_store.records import ImportResult, Preference, new_id

BATCH_ROWS = 250  # between two batches others get their turn: 2000 made a pick beside wait half as long again
PAIRED = "preferences"
UNPAIRED = "unpaired_preferences"
_IMPORT_COLUMNS = "import_id, source, format, imported, duplicates, skipped, unpaired, why, examples"


def import_preferences(
    database: Database,
    path_or_hub_id: str,
    format_: str,
    *,
    choices: Choices,
    moment: datetime,
    on_progress: Callable[[PreferenceSource], None] | None,
) -> ImportResult:
    """Read the source to its end in one transaction; ``on_progress`` hears of every batch. Raises ``BadImport``."""
    with database.read() as cursor:
        erased = is_erased(cursor)
    source = read_preferences(path_or_hub_id, format_, moment, choices, erased)
    import_id = new_id("import")
    accepted = 0
    # DuckDB lets go of the interpreter while it inserts: the next rows are read meanwhile.
    with database.write(bulk=True) as cursor, ThreadPoolExecutor(1, "import") as inserter:
        inserted: Counter[str] = Counter()
        inserting: Future[Counter[str]] | None = None
        for batch in source.batches(BATCH_ROWS):
            accepted += len(batch.pairs) + len(batch.unpaired)
            tables = {
                PAIRED: rows.preference_table(batch.pairs, import_id),
                UNPAIRED: rows.unpaired_table(batch.unpaired, import_id),
            }
            if inserting is not None:
                inserted += inserting.result()
            inserting = inserter.submit(_insert, cursor, tables)
            if on_progress is not None:
                on_progress(source)
        if inserting is not None:
            inserted += inserting.result()
        imported = inserted.total()
        result = ImportResult(
            import_id=import_id,
            source=path_or_hub_id,
            format=source.format,
            imported=imported,
            duplicates=accepted - imported,
            skipped=dict(source.skipped),
            unpaired=inserted[UNPAIRED],
            why=source.why,
            examples={reason: tuple(numbers) for reason, numbers in source.examples.items()},
        )
        cursor.execute(
            f"INSERT INTO imports ({_IMPORT_COLUMNS}, created_at) VALUES ({', '.join('?' * 10)})",
            [
                import_id,
                str(path_or_hub_id),
                result.format,
                result.imported,
                result.duplicates,
                json.dumps(result.skipped),
                result.unpaired,
                result.why,
                json.dumps(result.examples),
                rows.stored_time(moment),
            ],
        )
    return result


def load_imports(cursor: Cursor, limit: int) -> list[tuple[ImportResult, datetime]]:
    """The imports, newest first, each with its time."""
    found = cursor.execute(
        f"SELECT {_IMPORT_COLUMNS}, created_at FROM imports ORDER BY event DESC LIMIT ?", [limit]
    ).fetchall()
    return [(_loaded(row[:-1]), rows.loaded_time(row[-1])) for row in found]


def add_preferences(cursor: Cursor, preferences: Sequence[Preference]) -> int:
    """Insert what is not there yet, of no import; how many were new."""
    return _insert(cursor, {PAIRED: rows.preference_table(preferences, None)}).total()


def _insert(cursor: Cursor, tables: Mapping[str, pa.Table]) -> Counter[str]:
    """Insert what is not there yet; how many were new, by table."""
    new: Counter[str] = Counter()
    for name, arriving in tables.items():
        if arriving.num_rows:
            # DuckDB keeps what is registered until the transaction ends; a reader at its end holds nothing.
            reader = pa.RecordBatchReader.from_batches(arriving.schema, iter(arriving.to_batches()))
            cursor.register("arriving", reader)
            try:
                counted = cursor.execute(f"INSERT INTO {name} BY NAME FROM arriving ON CONFLICT DO NOTHING").fetchall()
            finally:
                cursor.unregister("arriving")
            new[name] += int(counted[0][0])
    return new


def _loaded(row: rows.Row) -> ImportResult:
    import_id, source, format_, imported, duplicates, skipped, unpaired, why, examples = row
    numbers = {reason: tuple(numbers) for reason, numbers in json.loads(examples).items()}
    return ImportResult(import_id, source, format_, imported, duplicates, json.loads(skipped), unpaired, why, numbers)
