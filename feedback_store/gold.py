"""Gold pairs: a few pairs whose better answer is known, shown among others to see on whom one can rely.

    data/gold_pairs.jsonl --load_gold--> GoldPair --as_pair--> a pair like any other, blind → picks → gold_answers

The file has a pair a line: prompt, chosen and rejected in TRL's layouts, and perhaps a `note` on why. Its words are the
house's: a gold pair is asked by nobody (its rater is ``GOLD``), and is erased with nobody. Which answer is right is
kept with the answer when it is shown, so that a later edit of the file changes no result. A pick on it teaches nothing
(``preferences.py``); each rater sees it once. Used by ``store.py`` and by whoever shows pairs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from feedback_store.bounded import read_text
from feedback_store.database import Cursor
from feedback_store.errors import BadGoldPairs
from feedback_store.importers.pairs import Skip, read_pair
from feedback_store.preferences import preference_id
from feedback_store.records import GOLD, Candidate, Message, Pair, new_id
from feedback_store.reliability import GoldAnswers

FILE = "gold_pairs.jsonl"
LARGEST_BYTES = 16 * 2**20
_ANSWERED = """
    SELECT picks.rater, candidates.sampling ->> '$.gold' AS gold_id,
        candidates.sampling ->> '$.right' = 'true' AS is_right
    FROM standing_picks AS picks JOIN pairs USING (pair_id) JOIN candidates ON candidates.candidate_id =
        CASE picks.pick WHEN 'first' THEN first_candidate_id ELSE second_candidate_id END
    WHERE candidates.version = 'gold' AND picks.pick IN ('first', 'second')"""


@dataclass(frozen=True, slots=True)
class GoldPair:
    """A prompt, the answer that is known to be better, the worse one, and why."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    note: str

    @property
    def gold_id(self) -> str:
        """The same words have the same id."""
        return "gold_" + preference_id(self.prompt, self.chosen, self.rejected, GOLD).removeprefix("pref_")

    def as_pair(self, moment: datetime, *, right_first: bool) -> Pair:
        """A pair to show now, the right answer first or second."""
        right, wrong = (
            Candidate(new_id("cand"), GOLD, text, "stop", {"gold": self.gold_id, "right": is_right}, None, 0.0, moment)
            for text, is_right in ((self.chosen, True), (self.rejected, False))
        )
        shown = (right, wrong) if right_first else (wrong, right)
        return Pair(new_id("pair"), self.prompt, *shown, turn_id=None, rater=GOLD, created_at=moment)


def load_gold(path: Path) -> tuple[GoldPair, ...]:
    """The gold pairs of a file, none where there is no file. ``BadGoldPairs`` names the line that is none."""
    try:
        lines = read_text(path, LARGEST_BYTES).splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise BadGoldPairs(path, f"{error}.") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():  # an erasure leaves blank lines
            pair = _gold_pair(path, number, line)
            found[pair.gold_id] = pair
    return tuple(found.values())


def _gold_pair(path: Path, number: int, line: str) -> GoldPair:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadGoldPairs(path, f"line {number} is not JSON ({error}). Write one JSON object a line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("note", ""), str):
        raise BadGoldPairs(path, f"line {number} is no gold pair: that is an object, whose `note`, if any, is text.")
    pair = read_pair(row.get("prompt"), row.get("chosen"), row.get("rejected"))
    if isinstance(pair, Skip):
        raise BadGoldPairs(
            path,
            f"line {number} is no gold pair ({pair.reason}). It needs `prompt`, `chosen` and `rejected`, two different "
            "answers, as text or as messages.",
        )
    return GoldPair(pair.prompt, pair.chosen, pair.rejected, row.get("note", ""))


def gold_answers(cursor: Cursor) -> dict[str, GoldAnswers]:
    """How each rater did on the gold pairs they decided."""
    sql = f"SELECT rater, count(*) FILTER (is_right), count(*) FROM ({_ANSWERED}) GROUP BY rater ORDER BY rater"  # noqa: S608
    return {rater: GoldAnswers(right, answered) for rater, right, answered in cursor.execute(sql).fetchall()}


def gold_results(cursor: Cursor) -> dict[str, GoldAnswers]:
    """How raters did on each gold pair, by its id: one that most get wrong may itself be wrong."""
    sql = f"SELECT gold_id, count(*) FILTER (is_right), count(*) FROM ({_ANSWERED}) GROUP BY gold_id ORDER BY gold_id"  # noqa: S608
    return {gold_id: GoldAnswers(right, answered) for gold_id, right, answered in cursor.execute(sql).fetchall()}


def seen_by(cursor: Cursor, rater: str) -> set[str]:
    """The ids of the gold pairs a rater has said a word on, a skip too."""
    found = cursor.execute(
        """SELECT DISTINCT candidates.sampling ->> '$.gold' FROM picks JOIN pairs USING (pair_id)
        JOIN candidates ON candidate_id = first_candidate_id WHERE candidates.version = 'gold' AND picks.rater = ?""",
        [rater],
    )
    return {gold_id for (gold_id,) in found.fetchall()}
