"""What each rater did, counted: picks, how often the first answer, how fast. One question to the database.

    standing picks, pairs → load_tallies → RaterTally of everybody → trainer/suspicion.py

Not here: whether that is suspicious, and how far raters agree (``reliability.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from feedback_store.database import Cursor

FAST_S = 2.0


@dataclass(frozen=True, slots=True)
class RaterTally:
    """``picks`` that stand, skips left out; ``first`` and ``second`` of them chose the answer in that place.

    ``timed`` are words on pairs that were made for the rater, so that it is known how long they looked: ``median_s``
    seconds in the median, None for none; ``fast`` of them took less than `FAST_S`.
    """

    rater: str
    picks: int
    first: int
    second: int
    timed: int
    fast: int
    median_s: float | None


def load_tallies(cursor: Cursor) -> dict[str, RaterTally]:
    """Everybody who picked, by name. A word that supersedes another is not timed: its pair was seen before."""
    found = cursor.execute(
        """WITH words AS (
            SELECT picks.rater, picks.pick,
                CASE WHEN picks.supersedes IS NULL AND (pairs.rater = picks.rater OR one.version = 'gold')
                    THEN greatest(0, epoch(picks.created_at - pairs.created_at)) END AS seconds
            FROM standing_picks AS picks JOIN pairs USING (pair_id)
            JOIN candidates AS one ON one.candidate_id = pairs.first_candidate_id
            WHERE picks.pick <> 'skip')
        SELECT rater, count(*), count(*) FILTER (pick = 'first'), count(*) FILTER (pick = 'second'), count(seconds),
            count(*) FILTER (seconds < ?), median(seconds)
        FROM words GROUP BY rater ORDER BY rater""",
        [FAST_S],
    ).fetchall()
    return {row[0]: RaterTally(*row) for row in found}
