"""The schema of the database as an ordered list of steps, and the runner that applies what is missing.

Each step is one transaction, recorded in ``schema_migrations`` with a checksum of its SQL. A released step is never
edited: a change is a new step at the end. Before a step touches a store that holds something, the whole database is
copied to ``backups/``. Times are UTC without a zone: DuckDB needs an extra package to hand out zoned ones.
"""

# ruff: noqa: S608 - only our own table and column names are put into SQL
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb

from feedback_store.copying import COPYING, copy_database
from feedback_store.durable import sync
from feedback_store.errors import StoreDamaged, StoreTooNew

PROMPT_TYPE = "STRUCT(role VARCHAR, content VARCHAR)[]"


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema; ``statements`` run in order in one transaction."""

    version: int
    name: str
    statements: tuple[str, ...]

    @property
    def checksum(self) -> str:
        return hashlib.sha256("\0".join(self.statements).encode()).hexdigest()


# Parts of step 9; like every step, never edited once released.
_CAUSED = ("promotions", "learning_choices", "trials", "trial_ends", "dismissals", "quarantines")
_ACTORS = "'local', 'gold', 'schedule', 'policy', 'baking', 'auto', 'erased', '[erased]'"
_NAMED = " UNION ".join(
    (
        "SELECT 'local' AS name, false AS imported",
        *(
            f"SELECT rater, {imported} FROM {table}"
            for imported, tables in (
                ("false", ("conversations", "pairs", "generations", "picks", "ratings", "edits")),
                ("true", ("preferences", "unpaired_preferences")),
            )
            for table in tables
        ),
        "SELECT subject, false FROM learning_choices WHERE scope = 'rater'",
        "SELECT rater, false FROM quarantines",
        *(f'SELECT "by", false FROM {table}' for table in _CAUSED),
    )
)


def _renamed(table: str, column: str) -> str:
    return (
        f'UPDATE {table} SET "{column}" = names.person_id FROM names '
        f'WHERE names.name = {table}."{column}" AND NOT names.imported'
    )


def _judged(table: str, key: str, prefix: str) -> str:
    """Imported rows with a rater get an id of the row and the rater; ``preferences.judgement_id`` says the same."""
    return f"""INSERT INTO {table} BY NAME SELECT earlier.* REPLACE (
            CASE WHEN names.person_id IS NULL THEN {key} ELSE concat('{prefix}', left(sha256(concat(
                {key}, ' ', names.person_id)), 32)) END AS {key},
            coalesce(names.person_id, rater) AS rater), {key} AS content
        FROM earlier_{table} AS earlier LEFT JOIN names ON names.name = earlier.rater AND names.imported"""


# Append-only tables: no foreign keys and no indexes but the primary keys. `event` numbers rows in the order they came.
MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        1,
        "the whole loop",
        (
            "CREATE SEQUENCE events",
            "CREATE TABLE conversations (conversation_id VARCHAR PRIMARY KEY, created_at TIMESTAMP NOT NULL)",
            """CREATE TABLE titles (
                conversation_id VARCHAR NOT NULL, title VARCHAR NOT NULL,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            """CREATE TABLE turns (
                turn_id VARCHAR PRIMARY KEY, conversation_id VARCHAR NOT NULL, position INTEGER NOT NULL,
                text VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL)""",
            """CREATE TABLE answers (
                turn_id VARCHAR NOT NULL, candidate_id VARCHAR NOT NULL,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            """CREATE TABLE candidates (
                candidate_id VARCHAR PRIMARY KEY, version VARCHAR NOT NULL, text VARCHAR NOT NULL,
                finish_reason VARCHAR NOT NULL, sampling JSON NOT NULL, seed BIGINT, latency_ms DOUBLE NOT NULL,
                created_at TIMESTAMP NOT NULL)""",
            f"""CREATE TABLE pairs (
                pair_id VARCHAR PRIMARY KEY, prompt {PROMPT_TYPE} NOT NULL, split VARCHAR NOT NULL,
                first_candidate_id VARCHAR NOT NULL, second_candidate_id VARCHAR NOT NULL, turn_id VARCHAR,
                rater VARCHAR NOT NULL, event BIGINT NOT NULL DEFAULT nextval('events'),
                created_at TIMESTAMP NOT NULL)""",
            """CREATE TABLE picks (
                pick_id VARCHAR PRIMARY KEY, pair_id VARCHAR NOT NULL,
                pick VARCHAR NOT NULL CHECK (pick IN ('first', 'second', 'tie', 'both_bad', 'skip')),
                reasons VARCHAR[] NOT NULL, comment VARCHAR, rater VARCHAR NOT NULL, idempotency_key VARCHAR,
                preference_id VARCHAR, event BIGINT NOT NULL DEFAULT nextval('events'),
                created_at TIMESTAMP NOT NULL)""",
            "CREATE TABLE pick_keys (idempotency_key VARCHAR PRIMARY KEY, pick_id VARCHAR NOT NULL)",
            """CREATE VIEW standing_picks AS SELECT * FROM picks
                QUALIFY row_number() OVER (PARTITION BY pair_id, rater ORDER BY event DESC) = 1""",
            """CREATE TABLE ratings (
                rating_id VARCHAR PRIMARY KEY, candidate_id VARCHAR NOT NULL,
                rating VARCHAR NOT NULL CHECK (rating IN ('up', 'down')), comment VARCHAR, rater VARCHAR NOT NULL,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            """CREATE TABLE edits (
                edit_id VARCHAR PRIMARY KEY, candidate_id VARCHAR NOT NULL, text VARCHAR NOT NULL,
                rater VARCHAR NOT NULL, event BIGINT NOT NULL DEFAULT nextval('events'),
                created_at TIMESTAMP NOT NULL)""",
            """CREATE TABLE imports (
                import_id VARCHAR PRIMARY KEY, source VARCHAR NOT NULL, format VARCHAR NOT NULL,
                imported BIGINT NOT NULL, duplicates BIGINT NOT NULL, skipped JSON NOT NULL,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            f"""CREATE TABLE preferences (
                preference_id VARCHAR PRIMARY KEY, prompt {PROMPT_TYPE} NOT NULL, split VARCHAR NOT NULL,
                chosen VARCHAR NOT NULL, rejected VARCHAR NOT NULL, source VARCHAR NOT NULL, weight DOUBLE NOT NULL,
                rater VARCHAR, versions VARCHAR[] NOT NULL, practice VARCHAR, import_id VARCHAR,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            """CREATE TABLE promotions (
                version VARCHAR NOT NULL, previous VARCHAR NOT NULL,
                kind VARCHAR NOT NULL CHECK (kind IN ('promote', 'rollback')), reason VARCHAR NOT NULL,
                "by" VARCHAR NOT NULL, evaluation JSON, event BIGINT NOT NULL DEFAULT nextval('events'),
                created_at TIMESTAMP NOT NULL)""",
        ),
    ),
    Migration(
        2,
        "every kind of feedback, privacy, group commit",
        (
            "ALTER TABLE conversations ADD COLUMN rater VARCHAR DEFAULT 'local'",
            # What an answer answered: an edit or a rating of it is a training row.
            f"""CREATE TABLE generations (
                candidate_id VARCHAR PRIMARY KEY, prompt {PROMPT_TYPE} NOT NULL, split VARCHAR NOT NULL,
                turn_id VARCHAR, rater VARCHAR NOT NULL, event BIGINT NOT NULL DEFAULT nextval('events'),
                created_at TIMESTAMP NOT NULL)""",
            """INSERT INTO generations (candidate_id, prompt, split, turn_id, rater, created_at)
                SELECT candidate_id, prompt, split, turn_id, rater, created_at FROM (
                    SELECT first_candidate_id AS candidate_id, * FROM pairs
                    UNION ALL BY NAME SELECT second_candidate_id AS candidate_id, * FROM pairs
                ) QUALIFY row_number() OVER (PARTITION BY candidate_id ORDER BY event) = 1""",
            # A pick says which part its preference is in (NULL: it teaches nothing), and what it supersedes: so the
            # picks that stand are counted without joining a million rows.
            "ALTER TABLE picks ADD COLUMN part VARCHAR",
            "ALTER TABLE picks ADD COLUMN supersedes VARCHAR",
            "ALTER TABLE picks ADD COLUMN superseded_pick VARCHAR",
            "ALTER TABLE picks ADD COLUMN superseded_part VARCHAR",
            """CREATE TABLE pick_words (
                pair_id VARCHAR NOT NULL, rater VARCHAR NOT NULL, number INTEGER NOT NULL, pick_id VARCHAR NOT NULL,
                PRIMARY KEY (pair_id, rater, number))""",
            """INSERT INTO pick_words SELECT pair_id, rater,
                row_number() OVER (PARTITION BY pair_id, rater ORDER BY event) - 1, pick_id FROM picks""",
            """UPDATE picks SET part = pairs.split FROM pairs
                WHERE pairs.pair_id = picks.pair_id AND picks.preference_id IS NOT NULL""",
            """UPDATE picks SET
                supersedes = before.pick_id, superseded_pick = before.pick, superseded_part = before.part
                FROM pick_words AS own, pick_words AS earlier, picks AS before
                WHERE own.pick_id = picks.pick_id AND earlier.pair_id = own.pair_id AND earlier.rater = own.rater
                AND earlier.number = own.number - 1 AND before.pick_id = earlier.pick_id""",
            """CREATE OR REPLACE VIEW standing_picks AS SELECT * FROM picks
                WHERE pick_id NOT IN (SELECT supersedes FROM picks WHERE supersedes IS NOT NULL)""",
            "ALTER TABLE edits ADD COLUMN part VARCHAR DEFAULT ''",  # '': it teaches nothing
            "CREATE TABLE event_keys (idempotency_key VARCHAR PRIMARY KEY, record_id VARCHAR NOT NULL)",
            "ALTER TABLE imports ADD COLUMN why VARCHAR DEFAULT ''",
            "ALTER TABLE imports ADD COLUMN unpaired BIGINT DEFAULT 0",
            "ALTER TABLE imports ADD COLUMN examples JSON DEFAULT '{}'",
            f"""CREATE TABLE unpaired_preferences (
                unpaired_id VARCHAR PRIMARY KEY, prompt {PROMPT_TYPE} NOT NULL, split VARCHAR NOT NULL,
                completion VARCHAR NOT NULL, label BOOLEAN NOT NULL, source VARCHAR NOT NULL, weight DOUBLE NOT NULL,
                rater VARCHAR, versions VARCHAR[] NOT NULL, import_id VARCHAR,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            """CREATE TABLE learning_choices (
                scope VARCHAR NOT NULL CHECK (scope IN ('conversation', 'rater')), subject VARCHAR NOT NULL,
                learn BOOLEAN NOT NULL, "by" VARCHAR NOT NULL, event BIGINT NOT NULL DEFAULT nextval('events'),
                created_at TIMESTAMP NOT NULL)""",
            """CREATE VIEW refusals AS SELECT scope, subject FROM learning_choices
                GROUP BY scope, subject HAVING NOT arg_max(learn, event)""",
            # Tombstones hold no name and no text: a salted hash of the rater, and hashes of what was erased.
            "CREATE TABLE store_facts (name VARCHAR PRIMARY KEY, value VARCHAR NOT NULL)",
            "INSERT INTO store_facts VALUES ('salt', CAST(uuid() AS VARCHAR))",
            """CREATE TABLE erasures (
                rater_hash VARCHAR NOT NULL, counts JSON NOT NULL, event BIGINT NOT NULL DEFAULT nextval('events'),
                created_at TIMESTAMP NOT NULL)""",
            "CREATE TABLE erased_contents (content_hash VARCHAR PRIMARY KEY)",
        ),
    ),
    Migration(
        3,
        "words found by one key",
        (
            # `word` is number, pair and rater in one column: DuckDB finds rows by a key of one column only.
            "ALTER TABLE pick_words RENAME TO earlier_words",
            """CREATE TABLE pick_words (
                word VARCHAR PRIMARY KEY, pair_id VARCHAR NOT NULL, rater VARCHAR NOT NULL, number INTEGER NOT NULL,
                pick_id VARCHAR NOT NULL)""",
            """INSERT INTO pick_words SELECT concat_ws(' ', number, length(pair_id), pair_id, rater),
                pair_id, rater, number, pick_id FROM earlier_words""",
            "DROP TABLE earlier_words",
        ),
    ),
    Migration(
        4,
        "what the model read",
        (
            # How many of the oldest messages an answer was written without, because they no longer fitted.
            "ALTER TABLE generations ADD COLUMN left_out INTEGER DEFAULT 0",
            # NULL: none. The latest choice of a conversation counts.
            """CREATE TABLE preset_choices (
                conversation_id VARCHAR NOT NULL, preset VARCHAR,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
        ),
    ),
    Migration(
        5,
        "live trials",
        (
            # Their votes are the words on pairs of the two versions between the two events: derived, not kept twice.
            """CREATE TABLE trials (
                trial_id VARCHAR PRIMARY KEY, challenger VARCHAR NOT NULL, champion VARCHAR NOT NULL,
                share DOUBLE NOT NULL, rules JSON NOT NULL, "by" VARCHAR NOT NULL, reason VARCHAR NOT NULL,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            """CREATE TABLE trial_ends (
                trial_id VARCHAR PRIMARY KEY, state VARCHAR NOT NULL, reason VARCHAR NOT NULL,
                evidence JSON NOT NULL, "by" VARCHAR NOT NULL,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
        ),
    ),
    Migration(
        6,
        "going back by itself",
        (
            "ALTER TABLE promotions RENAME TO earlier_promotions",
            """CREATE TABLE promotions (
                version VARCHAR NOT NULL, previous VARCHAR NOT NULL,
                kind VARCHAR NOT NULL CHECK (kind IN ('promote', 'rollback', 'auto-rollback')),
                reason VARCHAR NOT NULL, "by" VARCHAR NOT NULL, evaluation JSON,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            "INSERT INTO promotions BY NAME SELECT * FROM earlier_promotions",
            "DROP TABLE earlier_promotions",
        ),
    ),
    Migration(
        7,
        "promotions by themselves, and proposals",
        (
            "ALTER TABLE promotions RENAME TO earlier_promotions",
            """CREATE TABLE promotions (
                version VARCHAR NOT NULL, previous VARCHAR NOT NULL,
                kind VARCHAR NOT NULL CHECK (kind IN ('promote', 'auto', 'rollback', 'auto-rollback')),
                reason VARCHAR NOT NULL, "by" VARCHAR NOT NULL, evaluation JSON,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            "INSERT INTO promotions BY NAME SELECT * FROM earlier_promotions",
            "DROP TABLE earlier_promotions",
            # One row for each run or trial whose evidence was considered: what followed from it, once and for ever.
            """CREATE TABLE proposals (
                source_id VARCHAR PRIMARY KEY, source VARCHAR NOT NULL CHECK (source IN ('verdict', 'trial')),
                version VARCHAR NOT NULL, champion VARCHAR NOT NULL,
                outcome VARCHAR NOT NULL CHECK (outcome IN ('proposed', 'promoted', 'left')),
                sentence VARCHAR NOT NULL, reason VARCHAR NOT NULL,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            """CREATE TABLE dismissals (
                source_id VARCHAR PRIMARY KEY, reason VARCHAR NOT NULL, "by" VARCHAR NOT NULL,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
        ),
    ),
    Migration(
        8,
        "raters in quarantine",
        (
            # The latest word on a rater counts.
            """CREATE TABLE quarantines (
                rater VARCHAR NOT NULL, quarantined BOOLEAN NOT NULL, reason VARCHAR NOT NULL, "by" VARCHAR NOT NULL,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            """CREATE VIEW quarantined_raters AS SELECT rater FROM quarantines
                GROUP BY rater HAVING arg_max(quarantined, event)""",
        ),
    ),
    Migration(
        9,
        "people have ids",
        (
            # Names are here and nowhere else (``people.py``). `imported`: the name stood in an import, where the
            # words of the program, such as `local`, meant somebody else than the program's own user.
            "CREATE TABLE people (person_id VARCHAR PRIMARY KEY, label VARCHAR NOT NULL)",
            f"""CREATE TABLE names AS SELECT name, imported, label, concat('person_', left(sha256(concat(
                    (SELECT value FROM store_facts WHERE name = 'salt'), ' person ', label)), 32)) AS person_id
                FROM (SELECT DISTINCT name, imported, CASE WHEN imported AND (
                        lower(trim(name)) IN ({_ACTORS}) OR starts_with(name, 'imported:')
                        OR regexp_full_match(name, 'person_[0-9a-f]{{32}}')) THEN 'imported:' || name
                        ELSE name END AS label
                    FROM ({_NAMED}) WHERE name IS NOT NULL
                    AND (imported OR name NOT IN ('gold', 'schedule', 'policy', 'baking', 'erased')))""",
            "INSERT INTO people SELECT DISTINCT person_id, label FROM names",
            *(_renamed(table, "rater") for table in ("conversations", "pairs", "generations", "picks")),
            *(_renamed(table, "rater") for table in ("ratings", "edits")),
            # Who was in quarantine, or asked not to be learned from, under a name that was two people's, is so twice.
            """INSERT INTO quarantines (rater, quarantined, reason, "by", created_at)
                SELECT names.person_id, quarantined, reason, "by", created_at FROM quarantines
                JOIN names ON name = rater AND imported AND name <> label ORDER BY event""",
            """INSERT INTO learning_choices (scope, subject, learn, "by", created_at)
                SELECT scope, names.person_id, learn, "by", created_at FROM learning_choices
                JOIN names ON name = subject AND imported AND name <> label WHERE scope = 'rater' ORDER BY event""",
            _renamed("quarantines", "rater"),
            _renamed("learning_choices", "subject") + " AND scope = 'rater'",
            *(_renamed(table, "by") + " AND names.name <> 'local'" for table in _CAUSED),
            "ALTER TABLE pick_words RENAME TO earlier_words",
            """CREATE TABLE pick_words (
                word VARCHAR PRIMARY KEY, pair_id VARCHAR NOT NULL, rater VARCHAR NOT NULL, number INTEGER NOT NULL,
                pick_id VARCHAR NOT NULL)""",
            """INSERT INTO pick_words SELECT concat_ws(' ', number, length(pair_id), pair_id, person_id), pair_id,
                person_id, number, pick_id FROM earlier_words JOIN names ON name = rater AND NOT imported""",
            "DROP TABLE earlier_words",
            # A judgement is of one rater on one row: `content` says which row, the id whose word on it.
            "ALTER TABLE preferences RENAME TO earlier_preferences",
            f"""CREATE TABLE preferences (
                preference_id VARCHAR PRIMARY KEY, content VARCHAR NOT NULL, prompt {PROMPT_TYPE} NOT NULL,
                split VARCHAR NOT NULL, chosen VARCHAR NOT NULL, rejected VARCHAR NOT NULL, source VARCHAR NOT NULL,
                weight DOUBLE NOT NULL, rater VARCHAR, versions VARCHAR[] NOT NULL, practice VARCHAR,
                import_id VARCHAR, event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            _judged("preferences", "preference_id", "pref_"),
            "DROP TABLE earlier_preferences",
            "ALTER TABLE unpaired_preferences RENAME TO earlier_unpaired_preferences",
            f"""CREATE TABLE unpaired_preferences (
                unpaired_id VARCHAR PRIMARY KEY, content VARCHAR NOT NULL, prompt {PROMPT_TYPE} NOT NULL,
                split VARCHAR NOT NULL, completion VARCHAR NOT NULL, label BOOLEAN NOT NULL, source VARCHAR NOT NULL,
                weight DOUBLE NOT NULL, rater VARCHAR, versions VARCHAR[] NOT NULL, import_id VARCHAR,
                event BIGINT NOT NULL DEFAULT nextval('events'), created_at TIMESTAMP NOT NULL)""",
            _judged("unpaired_preferences", "unpaired_id", "label_"),
            "DROP TABLE earlier_unpaired_preferences",
            "DROP TABLE names",
        ),
    ),
)


def migrate(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    backups: Path,
    applied_at: datetime,
    migrations: Sequence[Migration] = MIGRATIONS,
) -> list[int]:
    """Bring the open database at ``path`` to the newest schema; the versions applied now, usually none.

    Raises ``StoreTooNew`` for a file of a newer program and ``StoreDamaged`` where an applied step is not ours.
    """
    connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations ("
        "version INTEGER PRIMARY KEY, name VARCHAR NOT NULL, checksum VARCHAR NOT NULL, applied_at TIMESTAMP NOT NULL)"
    )
    rows = connection.execute("SELECT version, checksum FROM schema_migrations ORDER BY version").fetchall()
    applied: dict[int, str] = dict(rows)
    _refuse_strangers(path, applied, migrations)
    missing = [migration for migration in migrations if migration.version not in applied]
    if applied and missing:
        _back_up(connection, backups, f"schema-{max(applied)}-{applied_at:%Y%m%d-%H%M%S}.duckdb")
    for migration in missing:
        _apply(connection, migration, applied_at)
    return [migration.version for migration in missing]


def _refuse_strangers(path: Path, applied: dict[int, str], migrations: Sequence[Migration]) -> None:
    known = {migration.version: migration for migration in migrations}
    if applied and max(applied) > max(known):
        raise StoreTooNew(path, max(applied), max(known))
    for version, checksum in applied.items():
        if version not in known or known[version].checksum != checksum:
            raise StoreDamaged(
                f"The database {path} has a schema version {version} that is not of this Zephyr Loop "
                f"(checksum {checksum[:12]}). Open it with the program that made it."
            )


def _apply(connection: duckdb.DuckDBPyConnection, migration: Migration, applied_at: datetime) -> None:
    connection.begin()
    try:
        for statement in migration.statements:
            connection.execute(statement)
        connection.execute(
            "INSERT INTO schema_migrations VALUES (?, ?, ?, ?)",
            [migration.version, migration.name, migration.checksum, applied_at],
        )
        connection.commit()
    except duckdb.Error:
        connection.rollback()
        raise


def _back_up(connection: duckdb.DuckDBPyConnection, backups: Path, name: str) -> None:
    unfinished = backups.parent / COPYING / name
    for folder in (backups, unfinished.parent):
        folder.mkdir(parents=True, exist_ok=True)
    copy_database(connection, unfinished)
    unfinished.replace(backups / name)
    unfinished.parent.rmdir()
    sync(backups)
