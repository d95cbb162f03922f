"""What the store holds as training rows: one question to the database for each kind of evidence.

    standing picks, imports → SQL → tables.ROWS ┐
    edits, retries → records → tables.ROWS ─────┴→ training_rows        ratings, both bad, imports → unpaired_rows

What a person or a conversation asked not to learn from is left out here, by the definition of ``teaching.py``, so that
nobody else has to remember it.
Used by ``store.py``. Not here: which of the rows a snapshot takes (``mixing.py``).
"""

# ruff: noqa: S608 - only our own column and table names are put into SQL; values are always parameters
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from feedback_store import rows, tables
from feedback_store.agreement import Vote
from feedback_store.database import Cursor
from feedback_store.preferences import labelled, preference_of_edit, preference_of_retry
from feedback_store.records import Preference, UnpairedPreference
from feedback_store.teaching import REFUSED_RATERS, learning, pick_may_teach

_BATCH_ROWS = 10_000
_PICKED = f"""
    SELECT picks.preference_id, pairs.prompt, chosen.text AS chosen, rejected.text AS rejected, 'pick' AS source,
        picks.rater, 1.0::DOUBLE AS weight, picks.pick_id, [chosen.version, rejected.version] AS versions,
        NULL::VARCHAR AS practice, picks.created_at
    FROM standing_picks AS picks JOIN pairs USING (pair_id)
    JOIN candidates AS chosen ON chosen.candidate_id =
        CASE picks.pick WHEN 'first' THEN first_candidate_id ELSE second_candidate_id END
    JOIN candidates AS rejected ON rejected.candidate_id =
        CASE picks.pick WHEN 'first' THEN second_candidate_id ELSE first_candidate_id END
    WHERE {pick_may_teach("picks")}
    ORDER BY picks.event"""
# A scan gives rows as they were inserted; sorting them would hold them all in memory twice.
_IMPORTED = f"""
    SELECT preference_id, prompt, chosen, rejected, source, rater, weight, NULL::VARCHAR AS pick_id, versions, practice,
        created_at
    FROM preferences WHERE practice IS NOT DISTINCT FROM $practice
    AND (rater IS NULL OR rater NOT IN ({REFUSED_RATERS}))"""
_CANDIDATE = rows.columns(rows.CANDIDATE_COLUMNS, "candidates")


def training_rows(cursor: Cursor, practice: str | None) -> pa.Table:
    """Every preference as ``tables.ROWS``: of picks, edits and retries, then the imported ones, each as they came.

    With a taste, the practice rows of that taste and nothing else; without, never a practice row.
    """
    imported = _table(cursor, _IMPORTED, {"practice": practice})
    if practice is not None:
        return imported
    said = [*_edited(cursor), *_retried(cursor)]
    return pa.concat_tables([_table(cursor, _PICKED), tables.rows_of(said), imported])


def unpaired_rows(cursor: Cursor) -> list[UnpairedPreference]:
    """Every labelled answer: the latest thumb of each rater on each answer, pairs called both bad, imports."""
    imported = cursor.execute(
        f"SELECT {rows.columns(rows.UNPAIRED_COLUMNS, 'unpaired_preferences')} FROM unpaired_preferences "
        f"WHERE rater IS NULL OR rater NOT IN ({REFUSED_RATERS}) ORDER BY event"
    ).fetchall()
    return [*_rated(cursor), *_both_bad(cursor), *map(rows.loaded_unpaired, imported)]


def derived_ids(cursor: Cursor) -> set[str]:
    """The ids of the training rows that are made anew each time: of edits, retries, thumbs and both bad."""
    said = {one.preference_id for one in (*_edited(cursor), *_retried(cursor))}
    return said | {one.unpaired_id for one in (*_rated(cursor), *_both_bad(cursor))}


def votes(cursor: Cursor) -> list[Vote]:
    """Every standing word that compares two answers, but gold ones, and every imported one with a rater.

    The item is the first pair, or imported row, that showed these two. Answers are compared without their order and
    the white space around them.
    """
    found = cursor.execute(
        """WITH said AS (
            SELECT picks.pair_id AS item, pairs.prompt, trim(one.text) AS one, trim(two.text) AS two, picks.rater,
                picks.pick, picks.event
            FROM standing_picks AS picks JOIN pairs USING (pair_id)
            JOIN candidates AS one ON one.candidate_id = pairs.first_candidate_id
            JOIN candidates AS two ON two.candidate_id = pairs.second_candidate_id
            WHERE picks.pick <> 'skip' AND one.version <> 'gold'
            UNION ALL SELECT preference_id, prompt, trim(chosen), trim(rejected), rater, 'first', event
            FROM preferences WHERE rater IS NOT NULL AND practice IS NULL)
        SELECT first_value(item) OVER (PARTITION BY prompt, least(one, two), greatest(one, two) ORDER BY event),
            rater, CASE WHEN pick IN ('tie', 'both_bad') THEN pick
                WHEN (pick = 'first') = (one < two) THEN 'a' ELSE 'b' END, event
        FROM said WHERE one <> two ORDER BY event"""
    ).fetchall()
    return [Vote(*row) for row in found]


def judged(cursor: Cursor, item: str) -> tuple[str, tuple[str, str]]:
    """What was asked, and the two answers in the order of ``a`` and ``b``, of an item of ``votes``."""
    ((prompt, one, two),) = cursor.execute(
        """SELECT prompt[-1].content, one.text, two.text FROM pairs
            JOIN candidates AS one ON one.candidate_id = first_candidate_id
            JOIN candidates AS two ON two.candidate_id = second_candidate_id WHERE pair_id = $1
        UNION ALL SELECT prompt[-1].content, chosen, rejected FROM preferences WHERE preference_id = $1""",
        [item],
    ).fetchall()
    return prompt, (one, two) if one.strip() < two.strip() else (two, one)


def _table(cursor: Cursor, sql: str, parameters: dict[str, Any] | None = None) -> pa.Table:
    """A result of the columns of ``ROWS``, fetched as it comes; times come without a zone and are UTC."""
    found = cursor.sql(sql, params=parameters).to_arrow_reader(_BATCH_ROWS).read_all()
    return pa.table([found[name].cast(tables.ROWS.field(name).type) for name in tables.ROWS.names], schema=tables.ROWS)


def _edited(cursor: Cursor) -> Iterator[Preference]:
    """The latest rewrite of each rater of each answer."""
    found = cursor.execute(
        f"""SELECT edits.edit_id, edits.candidate_id, edits.text, edits.rater, edits.created_at, generations.prompt,
            {_CANDIDATE}
        FROM edits JOIN generations USING (candidate_id) JOIN candidates USING (candidate_id)
        WHERE {learning("edits", "generations")}
        QUALIFY row_number() OVER (PARTITION BY edits.candidate_id, edits.rater ORDER BY edits.event DESC) = 1
        ORDER BY edits.event"""
    ).fetchall()
    for row in found:
        edit, prompt = rows.loaded_edit(row[:5]), rows.loaded_prompt(row[5])
        preference = preference_of_edit(edit, rows.loaded_candidate(row[6:]), prompt)
        if preference is not None:
            yield preference


def _retried(cursor: Cursor) -> Iterator[Preference]:
    """Where a person asked again and the conversation went on with the later answer: that one and the one before.

    Answers that a pick settled are no retries, nor is one to another prompt (another preset, fewer turns).
    """
    kept, given_up = (rows.columns(rows.CANDIDATE_COLUMNS, name) for name in ("kept", "given_up"))
    found = cursor.execute(
        f"""WITH ordered AS (
            SELECT turn_id, candidate_id, event,
                lag(candidate_id) OVER (PARTITION BY turn_id ORDER BY event) AS before,
                lead(candidate_id) OVER (PARTITION BY turn_id ORDER BY event) AS after
            FROM answers)
        SELECT ordered.turn_id, generations.prompt, generations.rater, {kept}, {given_up}
        FROM ordered JOIN turns USING (turn_id)
        JOIN turns AS next ON next.conversation_id = turns.conversation_id AND next.position = turns.position + 1
        JOIN generations USING (candidate_id)
        JOIN candidates AS kept USING (candidate_id)
        JOIN candidates AS given_up ON given_up.candidate_id = ordered.before
        JOIN generations AS earlier ON earlier.candidate_id = ordered.before AND earlier.prompt = generations.prompt
        WHERE ordered.after IS NULL AND ordered.before IS NOT NULL
        AND ordered.turn_id NOT IN (SELECT turn_id FROM pairs WHERE turn_id IS NOT NULL)
        AND {learning("generations", "generations")}
        ORDER BY ordered.event"""
    ).fetchall()
    width = len(rows.CANDIDATE_COLUMNS)
    for turn_id, prompt, rater, *candidates in found:
        later, earlier = rows.loaded_candidate(candidates[:width]), rows.loaded_candidate(candidates[width:])
        preference = preference_of_retry(turn_id, later, earlier, rows.loaded_prompt(prompt), rater)
        if preference is not None:
            yield preference


def _rated(cursor: Cursor) -> Iterator[UnpairedPreference]:
    found = cursor.execute(
        f"""SELECT ratings.rating_id, ratings.rating, ratings.rater, ratings.created_at, generations.prompt,
            {_CANDIDATE}
        FROM ratings JOIN generations USING (candidate_id) JOIN candidates USING (candidate_id)
        WHERE {learning("ratings", "generations")}
        QUALIFY row_number() OVER (PARTITION BY ratings.candidate_id, ratings.rater ORDER BY ratings.event DESC) = 1
        ORDER BY ratings.event"""
    ).fetchall()
    for rating_id, rating, rater, created_at, prompt, *candidate in found:
        label = labelled(
            rows.loaded_candidate(candidate), rows.loaded_prompt(prompt), rating == "up",
            source="rating", rater=rater, origin=rating_id, created_at=rows.loaded_time(created_at),
        )  # fmt: skip
        if label is not None:
            yield label


def _both_bad(cursor: Cursor) -> Iterator[UnpairedPreference]:
    found = cursor.execute(
        f"""SELECT picks.pick_id, picks.rater, picks.created_at, pairs.prompt, {_CANDIDATE}
        FROM standing_picks AS picks JOIN pairs USING (pair_id)
        JOIN candidates ON candidate_id IN (first_candidate_id, second_candidate_id)
        WHERE picks.pick = 'both_bad' AND {learning("picks", "pairs")} ORDER BY picks.event, candidate_id"""
    ).fetchall()
    for pick_id, rater, created_at, prompt, *candidate in found:
        label = labelled(
            rows.loaded_candidate(candidate), rows.loaded_prompt(prompt), False,
            source="pick", rater=rater, origin=pick_id, created_at=rows.loaded_time(created_at),
        )  # fmt: skip
        if label is not None:
            yield label
