"""Raters in quarantine: their words are kept and teach nothing from now on. Events, of which the latest counts.

    record_quarantine → quarantines → load_quarantines → what a snapshot, a trial and the strengths leave out

It differs from *do not learn* (``erasure.set_learning``), which is a person's own wish: this is somebody else's
suspicion, with a reason, and counted where rows stay out for it. What was learned before stays in the versions that
learned it. Used by ``store.py``; an erasure removes the rows about a person (``erased_rows.py``), so somebody who comes
back after it is not in quarantine.
"""

from __future__ import annotations

from feedback_store import rows
from feedback_store.database import Cursor
from feedback_store.errors import Conflict, NotFound
from feedback_store.people import load_raters
from feedback_store.records import Quarantine


def record_quarantine(cursor: Cursor, word: Quarantine, label: str, *, quarantined: bool) -> None:
    """Put a rater into quarantine, or lift it; ``label`` is what people call them.

    ``NotFound`` for somebody without a word, ``Conflict`` where it is so already.
    """
    rater = word.rater
    if rater not in load_raters(cursor):
        raise NotFound("rater", label)
    if (rater in {one.rater for one in load_quarantines(cursor)}) == quarantined:
        raise Conflict(
            f"{label} is in quarantine already. There is nothing to do."
            if quarantined
            else f"{label} is not in quarantine. There is nothing to lift."
        )
    cursor.execute(
        'INSERT INTO quarantines (rater, quarantined, reason, "by", created_at) VALUES (?, ?, ?, ?, ?)',
        [rater, quarantined, word.reason, word.by, rows.stored_time(word.since)],
    )


def load_quarantines(cursor: Cursor) -> list[Quarantine]:
    """Who is in quarantine now, by id."""
    found = cursor.execute(
        """SELECT rater, arg_max(reason, event), arg_max("by", event), arg_max(created_at, event) FROM quarantines
        WHERE rater IN (FROM quarantined_raters) GROUP BY rater ORDER BY rater"""
    ).fetchall()
    return [Quarantine(rater, reason, by, rows.loaded_time(since)) for rater, reason, by, since in found]
