"""Taking in a file or a hub data set of preferences: all of it, or nothing, in bounded memory.

    importers.read_preferences → batches → Arrow → one transaction → preferences, unpaired_preferences, imports

The table of imports is both the receipt and the history. A judgement, which is one rater's word on one row, that is
there already counts as a duplicate, so the same file twice changes nothing; so does a row of our own export that this
store still has, whoever the export says that it is of. Used by ``store.py``. Not here: what a file's columns mean
(``importers/``).
"""

# ruff: noqa: S608 - only our own table names are put into SQL
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime

import pyarrow as pa

from feedback_store import evidence, rows
from feedback_store.database import Cursor, Database
from feedback_store.erasure import is_erased
from feedback_store.importers import Batch, PreferenceSource, read_preferences
from feedback_store.importers.pairs import Choices
from feedback_store.people import ensure_people, label_of, load_salt, person_id_of
from feedback_store.records import ImportResult, Preference, UnpairedPreference, new_id

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
        erased, salt = is_erased(cursor), load_salt(cursor)
    source = read_preferences(path_or_hub_id, format_, moment, choices, erased)
    import_id = new_id("import")
    accepted = 0
    own = _OwnRows(database)
    people: dict[str, str] = {}
    # DuckDB lets go of the interpreter while it inserts: the next rows are read meanwhile.
    with database.write(bulk=True) as cursor, ThreadPoolExecutor(1, "import") as inserter:
        inserted: Counter[str] = Counter()
        inserting: Future[Counter[str]] | None = None
        for batch in source.batches(BATCH_ROWS):
            accepted += len(batch.pairs) + len(batch.unpaired)
            pairs, unpaired = own.without(batch)
            raters = {one.rater for one in pairs} | {one.rater for one in unpaired}
            people |= {name: person_id_of(salt, label_of(name)) for name in raters - people.keys() if name is not None}
            tables = {
                PAIRED: rows.preference_table(pairs, import_id, people),
                UNPAIRED: rows.unpaired_table(unpaired, import_id, people),
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
        # Now that nothing can fail any more but the disk; who asks about a person meanwhile waits for nobody's import.
        with database.write() as events:
            ensure_people(events, map(label_of, people))
    return result


class _OwnRows:
    """Which rows of our own export this store still has: they are no news."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._derived: set[str] | None = None

    def without(self, batch: Batch) -> tuple[list[Preference], list[UnpairedPreference]]:
        """The records of a batch that are not here."""
        here = self._here({one for ids in batch.own_ids for one in ids if one is not None})
        paired, unpaired = batch.own_ids
        return (
            [one for one, own_id in zip(batch.pairs, paired, strict=True) if own_id not in here],
            [one for one, own_id in zip(batch.unpaired, unpaired, strict=True) if own_id not in here],
        )

    def _here(self, own_ids: set[str]) -> set[str]:
        if not own_ids:
            return set()
        with self._database.read() as cursor:
            if self._derived is None:
                self._derived = evidence.derived_ids(cursor)
            cursor.register("asked", pa.table({"id": pa.array(sorted(own_ids), pa.string())}))
            try:
                kept = cursor.execute(
                    "SELECT preference_id FROM preferences SEMI JOIN asked ON id = preference_id "
                    "UNION ALL SELECT unpaired_id FROM unpaired_preferences SEMI JOIN asked ON id = unpaired_id "
                    "UNION ALL SELECT preference_id FROM picks SEMI JOIN asked ON id = preference_id"
                ).fetchall()
            finally:
                cursor.unregister("asked")
        return {one for (one,) in kept} | (own_ids & self._derived)


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
