"""A store to hurt, and what must be true of every store, whatever happened to it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from feedback_store.database import Cursor
from feedback_store.records import Candidate, Message, Pair
from feedback_store.store import FeedbackStore

MOMENT = datetime(2026, 11, 22, 12, tzinfo=UTC)
# Each question counts what must not be.
NEVER = {
    "a pick under two ids or an id on two picks": "SELECT count(*) - count(DISTINCT pick_id) FROM picks",
    "a key on two picks": "SELECT count(idempotency_key) - count(DISTINCT idempotency_key) FROM picks",
    "a pick without its key": """SELECT count(*) FROM picks FULL JOIN pick_keys USING (idempotency_key, pick_id)
        WHERE coalesce(picks.idempotency_key, pick_keys.idempotency_key) IS NOT NULL
        AND (picks.event IS NULL OR pick_keys.pick_id IS NULL)""",
    "a pick without its word": """SELECT count(*) FROM picks FULL JOIN pick_words USING (pick_id, pair_id, rater)
        WHERE picks.event IS NULL OR number IS NULL""",
    "words that do not count 0, 1, 2": """SELECT count(*) FROM (SELECT max(number) - count(*) + 1 AS gap FROM pick_words
        GROUP BY pair_id, rater) WHERE gap <> 0""",
    "two standing picks of a rater on a pair": """SELECT count(*) - count(DISTINCT (pair_id, rater))
        FROM standing_picks""",
    "a pick that supersedes another's word": """SELECT count(*) FROM picks LEFT JOIN picks AS before
        ON before.pick_id = picks.supersedes AND before.pair_id = picks.pair_id AND before.rater = picks.rater
        AND before.pick = picks.superseded_pick AND before.part IS NOT DISTINCT FROM picks.superseded_part
        WHERE picks.supersedes IS NOT NULL AND before.pick_id IS NULL""",
}


def fill(path: Path, pairs: int) -> None:
    """A new store with pairs ``pair_0``, ``pair_1``…"""
    with FeedbackStore.open(path) as store:
        for number in range(pairs):
            first, second = (
                Candidate(f"cand_{number}_{side}", "v0", f"{side} {number}.", "stop", {}, None, 1.0, MOMENT)
                for side in ("One", "Two")
            )
            prompt = (Message(role="user", content=f"Count from {number}."),)
            store.record_pair(Pair(f"pair_{number}", prompt, first, second, None, "local", MOMENT))


def complaints(cursor: Cursor) -> list[str]:
    """What is true of this store and must not be; indexes and tables are asked for the same."""
    found = [what for what, question in NEVER.items() if cursor.execute(question).fetchall()[0][0]]
    for table, key in (("picks", "pick_id"), ("pick_keys", "idempotency_key")):
        last = cursor.execute(f"SELECT {key} FROM {table} ORDER BY rowid DESC LIMIT 50").fetchall()
        for (value,) in last:
            if len(cursor.execute(f"SELECT 1 FROM {table} WHERE {key} = ?", [value]).fetchall()) != 1:
                found.append(f"the index of {table} does not find {value!r} once")
    return found
