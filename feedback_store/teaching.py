"""Which of people's words teach: one definition, for the snapshot, the counts, the trigger and what is said to people.

    refusals, quarantines, the pair → pick_may_teach, may_be_learned (SQL) → evidence.py: rows of a snapshot
                                    → pick_teaches, edit_teaches (SQL)     → statistics.py, store.picks_since: numbers
                                    → why_pick_teaches_nothing …           → store.py → the sentence after a pick

A snapshot counts those in quarantine among what it left out (``selection.py``), so ``pick_may_teach`` still has them;
everybody else asks ``pick_teaches``, which has not. Refusals and quarantines are looked up each time: a word said later
lowers the numbers of before, and taking it back raises them again.

Not here: what a recipe's mix leaves out (``mixing.py``); which part a prompt belongs to. A pick on a held-out prompt is
counted: it judges what the others teach.
"""

# ruff: noqa: S608 - only our own column and table names are put into SQL; values are always parameters
from __future__ import annotations

from enum import StrEnum

from feedback_store.database import Cursor
from feedback_store.records import Edit, Pick, Rating

REFUSED_RATERS = "SELECT subject FROM refusals WHERE scope = 'rater'"
_REFUSED_TURNS = "SELECT turn_id FROM turns JOIN refusals ON subject = conversation_id WHERE scope = 'conversation'"
_QUARANTINED = "SELECT rater FROM quarantined_raters"


class Untaught(StrEnum):
    """Why something that a person said teaches nothing. ``asker``: whoever asked for the answers refuses."""

    NOTHING_SAID = "nothing to learn"
    RATER = "rater"
    CONVERSATION = "conversation"
    ASKER = "asker"
    QUARANTINE = "quarantine"
    SUPERSEDED = "superseded"


def may_be_learned(asked: str) -> str:
    """In SQL: neither who asked refuses, nor their conversation; ``asked`` is a table with the rater and the turn."""
    return f"{asked}.rater NOT IN ({REFUSED_RATERS}) AND coalesce({asked}.turn_id, '') NOT IN ({_REFUSED_TURNS})"


def learning(event: str, asked: str) -> str:
    """In SQL: neither who said it, nor who asked, nor their conversation refuses."""
    return f"{event}.rater NOT IN ({REFUSED_RATERS}) AND {may_be_learned(asked)}"


def _unlearned(asked: str, identity: str) -> str:
    """In SQL: the ids of the rows that ``may_be_learned`` does not find, by two small joins: of a million rows, too."""
    return (
        f"SELECT {identity} FROM {asked} WHERE rater IN ({REFUSED_RATERS}) UNION ALL "
        f"SELECT {identity} FROM {asked} WHERE turn_id IN ({_REFUSED_TURNS})"
    )


def of_pair_and_rater_who_may_teach(picks: str) -> str:
    """In SQL: ``learning`` of a table of picks, without joining all pairs; alike for all words of a rater on a pair."""
    return f"{picks}.rater NOT IN ({REFUSED_RATERS}) AND {picks}.pair_id NOT IN ({_unlearned('pairs', 'pair_id')})"


def pick_may_teach(picks: str) -> str:
    """In SQL: a pick that stands makes a training row, quarantine left aside."""
    return f"{picks}.preference_id IS NOT NULL AND {of_pair_and_rater_who_may_teach(picks)}"


def said_by_the_trusted(said: str) -> str:
    """In SQL: nobody in quarantine said it."""
    return f"{said}.rater NOT IN ({_QUARANTINED})"


def pick_teaches(picks: str) -> str:
    """In SQL: a pick that stands teaches."""
    return f"{pick_may_teach(picks)} AND {said_by_the_trusted(picks)}"


def edit_teaches(edits: str) -> str:
    """In SQL: of the latest edit of each rater of each answer, whether it teaches."""
    unlearned = _unlearned("generations", "candidate_id")
    return (
        f"{edits}.part <> '' AND {edits}.rater NOT IN ({REFUSED_RATERS}) "
        f"AND {edits}.candidate_id NOT IN ({unlearned}) AND {said_by_the_trusted(edits)}"
    )


def import_teaches(imported: str) -> str:
    """In SQL: whoever is named as the rater of an imported row neither refuses nor is in quarantine."""
    return (
        f"({imported}.rater IS NULL OR "
        f"({imported}.rater NOT IN ({REFUSED_RATERS}) AND {said_by_the_trusted(imported)}))"
    )


def why_pick_teaches_nothing(cursor: Cursor, pick: Pick) -> Untaught | None:
    """None where it teaches, by ``pick_teaches``."""
    teaches = f"SELECT 1 FROM standing_picks AS picks WHERE pick_id = ? AND {pick_teaches('picks')}"
    if cursor.execute(teaches, [pick.pick_id]).fetchall():
        return None
    if cursor.execute("SELECT 1 FROM picks WHERE supersedes = ?", [pick.pick_id]).fetchall():
        return Untaught.SUPERSEDED
    return _refused(cursor, pick.rater, "SELECT rater, turn_id FROM pairs WHERE pair_id = ?", pick.pair_id)


def why_edit_teaches_nothing(cursor: Cursor, edit: Edit) -> Untaught | None:
    """None where it teaches, by ``edit_teaches``."""
    later = f"SELECT 1 FROM edits WHERE candidate_id = ? AND rater = ? AND event > ({_EVENT_OF_EDIT})"
    if cursor.execute(later, [edit.candidate_id, edit.rater, edit.edit_id]).fetchall():
        return Untaught.SUPERSEDED
    if cursor.execute(f"SELECT 1 FROM edits WHERE edit_id = ? AND {edit_teaches('edits')}", [edit.edit_id]).fetchall():
        return None
    return _refused(cursor, edit.rater, _ASKED, edit.candidate_id)


def why_rating_teaches_nothing(cursor: Cursor, rating: Rating) -> Untaught | None:
    """Why no recipe may learn from a thumb; None where one that learns from ratings may."""
    found = _refused(cursor, rating.rater, _ASKED, rating.candidate_id)
    return None if found is Untaught.NOTHING_SAID else found


_ASKED = "SELECT rater, turn_id FROM generations WHERE candidate_id = ?"
_EVENT_OF_EDIT = "SELECT event FROM edits WHERE edit_id = ?"


def _refused(cursor: Cursor, rater: str, asked: str, identity: str) -> Untaught:
    """Which refusal it is; ``asked`` finds who asked, and in which turn."""
    if _is_among(cursor, rater, REFUSED_RATERS):
        return Untaught.RATER
    for asker, turn_id in cursor.execute(asked, [identity]).fetchall():
        if turn_id is not None and _is_among(cursor, turn_id, _REFUSED_TURNS):
            return Untaught.CONVERSATION
        if _is_among(cursor, asker, REFUSED_RATERS):
            return Untaught.ASKER
    return Untaught.QUARANTINE if _is_among(cursor, rater, _QUARANTINED) else Untaught.NOTHING_SAID


def _is_among(cursor: Cursor, value: str, subjects: str) -> bool:
    return bool(cursor.execute(f"SELECT 1 WHERE ? IN ({subjects})", [value]).fetchall())
