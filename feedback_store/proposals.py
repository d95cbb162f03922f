"""Which verdicts and won trials were considered, what followed, and which proposals still wait for a person.

    record_proposal (once for each run or trial) → load_proposals: open, dismissed, promoted, overtaken

What was considered is never considered again, whatever the policy becomes. How a proposal ended is not kept twice: a
dismissal is an event of its own, a later promotion is in ``promotions``. Used by ``store.py``; the rules are not here.
"""

# ruff: noqa: S608 - only our own column names are put into SQL; values are always parameters
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime

from feedback_store import rows
from feedback_store.database import Cursor
from feedback_store.errors import Conflict
from feedback_store.records import Proposal

_COLUMNS = "source_id, source, version, champion, outcome, sentence, reason, created_at"
_PROPOSALS = f"""
    SELECT {", ".join(f"one.{column}" for column in _COLUMNS.split(", "))}, dismissals."by", dismissals.reason,
        dismissals.created_at, one.event
    FROM proposals AS one LEFT JOIN dismissals USING (source_id) ORDER BY one.event DESC"""


def record_proposal(cursor: Cursor, proposal: Proposal) -> None:
    """Keep what followed from a run's verdict or a trial. ``Conflict`` where that was considered before."""
    if cursor.execute("SELECT 1 FROM proposals WHERE source_id = ?", [proposal.source_id]).fetchall():
        raise Conflict(f"{proposal.source_id} was considered before. There is nothing to do.")
    cursor.execute(
        f"INSERT INTO proposals ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            proposal.source_id, proposal.source, proposal.version, proposal.champion, proposal.outcome,
            proposal.sentence, proposal.reason, rows.stored_time(proposal.created_at),
        ],
    )  # fmt: skip


def load_proposals(cursor: Cursor, champion: str) -> list[Proposal]:
    """Everything that was considered, newest first, as it stands with this champion."""
    found = cursor.execute(_PROPOSALS).fetchall()
    promoted = cursor.execute("SELECT event, version FROM promotions WHERE kind IN ('promote', 'auto')").fetchall()
    return [_proposal(row[:-1], champion, {version for event, version in promoted if event > row[-1]}) for row in found]


def record_dismissal(cursor: Cursor, dismissed: Sequence[Proposal], reason: str, by: str, at: datetime) -> None:
    """Dismiss these proposals, which are open."""
    for one in dismissed:
        cursor.execute(
            'INSERT INTO dismissals (source_id, reason, "by", created_at) VALUES (?, ?, ?, ?)',
            [one.source_id, reason, by, rows.stored_time(at)],
        )


def _proposal(row: rows.Row, champion: str, promoted_later: Collection[str]) -> Proposal:
    source_id, source, version, compared_with, outcome, sentence, reason, created_at = row[:8]
    dismissed_by, dismissed_reason, dismissed_at = row[8:]
    considered = Proposal(
        source_id, source, version, compared_with, outcome, sentence, reason, rows.loaded_time(created_at)
    )
    if considered.outcome != "proposed":
        return replace(considered, state=considered.outcome)
    if dismissed_at is not None:
        ended_at = rows.loaded_time(dismissed_at)
        return replace(
            considered, state="dismissed", ended_by=dismissed_by, ended_reason=dismissed_reason, ended_at=ended_at
        )
    if version == champion or version in promoted_later:
        return replace(considered, state="promoted")
    is_overtaken = bool(promoted_later) and champion != compared_with  # one that was gone back from overtakes nothing
    return replace(considered, state="overtaken") if is_overtaken else considered
