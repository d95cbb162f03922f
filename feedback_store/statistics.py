"""What the admin page counts: one scan of plain columns for each number, fast also over a million events.

    picks, preferences, ratings … --statistics(cursor)--> Statistics --as_dict--> GET /v1/statistics

What is said to train on, or to be held out to judge by, is what may teach (``teaching.py``); picks of any kind are all
that stand. A pick that was superseded does not count. A superseding pick carries what it superseded, so "the picks that
stand" is all of them minus those: no join, no window. Agreement between raters is another question (``agreement.py``).
"""

# ruff: noqa: S608 - only our own column and table names are put into SQL; values are always parameters
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from feedback_store.database import Cursor
from feedback_store.preferences import HELD_OUT, TRAIN
from feedback_store.records import IMPORT_SOURCES, Counts, PickChoice
from feedback_store.teaching import edit_teaches, import_teaches, of_pair_and_rater_who_may_teach, said_by_the_trusted

DAYS = 30
RATERS = 20
_TEACHES = f"{of_pair_and_rater_who_may_teach('picks')} AND {said_by_the_trusted('picks')}"
_STANDING = f"""
    SELECT pick, CASE WHEN {_TEACHES} THEN part END AS part, count(*) FROM picks GROUP BY ALL UNION ALL
    SELECT superseded_pick, CASE WHEN {_TEACHES} THEN superseded_part END AS part, -count(*) FROM picks
    WHERE supersedes IS NOT NULL GROUP BY ALL"""


@dataclass(frozen=True, slots=True)
class Statistics:
    """How people judge.

    ``picks`` are those that stand, by choice; ``ratings`` thumbs by direction. ``days`` has the picks made on each of
    the last 30 days with any, superseded ones included, ``raters`` the 20 people with the most of them.
    ``first_share`` is the part of decided picks that went to the answer shown first: far from 0.5 means that people
    pick by position. None before the first decided pick.
    """

    counts: Counts
    picks: Mapping[str, int]
    ratings: Mapping[str, int]
    edits: int
    days: Mapping[date, int]
    raters: Mapping[str, int]
    first_share: float | None

    def as_dict(self) -> dict[str, Any]:
        """The statistics as JSON can carry them."""
        return {**asdict(self), "days": {day.isoformat(): number for day, number in self.days.items()}}


def statistics(cursor: Cursor) -> Statistics:
    """Everything the admin page counts."""
    picks, parts = _standing(cursor)
    decided = picks[PickChoice.FIRST] + picks[PickChoice.SECOND]
    return Statistics(
        counts=_counts(cursor, picks.total(), parts),
        picks={choice.value: picks[choice] for choice in PickChoice},
        ratings=_counted(cursor, "SELECT rating, count(*) FROM ratings GROUP BY ALL ORDER BY ALL"),
        edits=cursor.execute("SELECT count(*) FROM edits").fetchall()[0][0],
        days=_counted(
            cursor, "SELECT CAST(created_at AS DATE), count(*) FROM picks GROUP BY ALL ORDER BY 1 DESC LIMIT ?", DAYS
        ),
        raters=_counted(cursor, "SELECT rater, count(*) FROM picks GROUP BY ALL ORDER BY 2 DESC, 1 LIMIT ?", RATERS),
        first_share=picks[PickChoice.FIRST] / decided if decided else None,
    )


def counts(cursor: Cursor) -> Counts:
    """How much the store holds, practice apart from the rest."""
    picks, parts = _standing(cursor)
    return _counts(cursor, picks.total(), parts)


def _standing(cursor: Cursor) -> tuple[Counter[str], Counter[str]]:
    """The picks that stand by choice, and the preferences they make by part, of those that teach."""
    picks: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for pick, part, number in cursor.execute(_STANDING).fetchall():
        picks[pick] += number
        if part is not None:
            parts[part] += number
    return picks, parts


def _counts(cursor: Cursor, picks: int, picked: Counter[str]) -> Counts:
    conversations, turns, pairs = cursor.execute(
        "SELECT (SELECT count(*) FROM conversations), (SELECT count(*) FROM turns), (SELECT count(*) FROM pairs)"
    ).fetchall()[0]
    edited = _counted(
        cursor,
        "SELECT part, count(*) FROM (SELECT candidate_id, rater, arg_max(part, event) AS part FROM edits GROUP BY ALL) "
        f"AS edits WHERE {edit_teaches('edits')} GROUP BY ALL",
    )
    real: Counter[str] = Counter(dict.fromkeys(("pick", "edit", *IMPORT_SOURCES), 0))
    real["pick"], real["edit"] = picked.total(), sum(edited.values())
    parts = picked + Counter(edited)
    by_taste: Counter[str] = Counter()
    for source, practice, split, number in cursor.execute(
        f"SELECT source, practice, split, count(*) FROM preferences WHERE {import_teaches('preferences')} "
        "GROUP BY ALL ORDER BY source, practice"
    ).fetchall():
        if practice is None:
            real[source] += number
            parts[split] += number
        else:
            by_taste[practice] += number
    return Counts(conversations, turns, pairs, picks, dict(real), dict(by_taste), parts[TRAIN], parts[HELD_OUT])


def _counted(cursor: Cursor, sql: str, *parameters: object) -> dict[Any, int]:
    return dict(cursor.execute(sql, list(parameters)).fetchall())
