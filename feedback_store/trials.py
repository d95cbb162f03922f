"""Live trials as events, and the blind words that decide them.

    record_trial → pairs of the two versions, words on them → votes → record_end          comparisons → strength

A trial is the event of its start and, once it is over, that of its end. Its votes are not kept twice: they are the
blind words on pairs of its two versions between the two events. Blind is the first word on a pair: a rater's later
words come after the versions were revealed, and a second rater of the same pair judges what was judged already. So one
pair is one vote. Skips are none; ties and "both bad" are ties. Votes that a rater cast in quarantine stand apart; those
cast before stay, since a test holds no longer once votes are taken out after they were seen. Strengths are no test:
they leave out whoever is in quarantine now, and gold pairs. Used by ``store.py``; the test is the trainer's.
"""

# ruff: noqa: S608 - only our own column and table names are put into SQL; values are always parameters
from __future__ import annotations

import json
from collections.abc import Mapping

from feedback_store import rows
from feedback_store.database import Cursor
from feedback_store.errors import Conflict, NotFound
from feedback_store.records import GOLD, Comparisons, Trial, TrialVote

_TRIALS = """
    SELECT trial_id, challenger, champion, share, rules, trials."by", trials.reason, trials.created_at,
        ends.state, ends.reason, ends.evidence, ends."by", ends.created_at
    FROM trials LEFT JOIN trial_ends AS ends USING (trial_id)"""
_BLIND_WORDS = """
    SELECT pairs.pair_id, one.version AS first_version, two.version AS second_version, picks.pick, picks.rater,
        picks.event, pairs.event AS shown
    FROM picks JOIN pairs USING (pair_id)
    JOIN candidates AS one ON one.candidate_id = pairs.first_candidate_id
    JOIN candidates AS two ON two.candidate_id = pairs.second_candidate_id
    WHERE picks.supersedes IS NULL AND picks.pick <> 'skip' {which}
    QUALIFY row_number() OVER (PARTITION BY pairs.pair_id ORDER BY picks.event) = 1"""


def record_trial(cursor: Cursor, trial: Trial) -> None:
    """Begin a trial. ``Conflict`` while another one runs."""
    running = load_trials(cursor, running=True)
    if running:
        raise Conflict(
            f"{running[0].challenger} is on live trial against {running[0].champion} ({running[0].trial_id}): "
            "one at a time. Stop it, or wait for its end."
        )
    cursor.execute(
        'INSERT INTO trials (trial_id, challenger, champion, share, rules, "by", reason, created_at) '
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            trial.trial_id, trial.challenger, trial.champion, trial.share, json.dumps(dict(trial.rules)), trial.by,
            trial.reason, rows.stored_time(trial.created_at),
        ],
    )  # fmt: skip


def record_end(cursor: Cursor, ended: Trial) -> None:
    """End a trial. ``NotFound``; ``Conflict`` where it has ended already."""
    found = load_trial(cursor, ended.trial_id)
    if not found.is_running:
        raise Conflict(f"The trial {ended.trial_id} has ended already: {found.state}. There is nothing to do.")
    assert ended.ended_at is not None
    cursor.execute(
        'INSERT INTO trial_ends (trial_id, state, reason, evidence, "by", created_at) VALUES (?, ?, ?, ?, ?, ?)',
        [
            ended.trial_id, ended.state, ended.ended_reason, json.dumps(dict(ended.evidence or {})), ended.ended_by,
            rows.stored_time(ended.ended_at),
        ],
    )  # fmt: skip


def load_trials(cursor: Cursor, *, running: bool = False) -> list[Trial]:
    """The trials, newest first; with ``running`` only one that has not ended."""
    which = "WHERE ends.state IS NULL" if running else ""
    return [_trial(row) for row in cursor.execute(f"{_TRIALS} {which} ORDER BY trials.event DESC").fetchall()]


def load_trial(cursor: Cursor, trial_id: str) -> Trial:
    """One trial. ``NotFound``."""
    found = cursor.execute(f"{_TRIALS} WHERE trial_id = ?", [trial_id]).fetchall()
    if not found:
        raise NotFound("trial", trial_id)
    return _trial(found[0])


def load_votes(cursor: Cursor, trial_id: str) -> list[TrialVote]:
    """The votes of a trial in the order they came; after its end, those that came before it."""
    which = """AND pairs.event > $began AND picks.event < $ended
        AND ((one.version = $challenger AND two.version = $champion)
            OR (one.version = $champion AND two.version = $challenger))"""
    span = cursor.execute(
        """SELECT trials.event, coalesce(ends.event, 9223372036854775807), challenger, champion
        FROM trials LEFT JOIN trial_ends AS ends USING (trial_id) WHERE trial_id = ?""",
        [trial_id],
    ).fetchall()
    if not span:
        raise NotFound("trial", trial_id)
    parameters = dict(zip(("began", "ended", "challenger", "champion"), span[0], strict=True))
    found = cursor.execute(
        f"""SELECT pick, first_version, rater, coalesce((
            SELECT arg_max(quarantined, event) FROM quarantines
            WHERE quarantines.rater = blind.rater AND quarantines.event < blind.event), false)
        FROM ({_BLIND_WORDS.format(which=which)}) AS blind ORDER BY event""",
        parameters,
    ).fetchall()
    return [
        _vote(pick, rater, challenger_first=first == span[0][2], apart=apart) for pick, first, rater, apart in found
    ]


def comparisons(cursor: Cursor) -> list[Comparisons]:
    """Every blind word on a pair, counted by the two versions in shown order; pairs of one version too.

    Without gold pairs, and without the words of raters who are in quarantine now.
    """
    found = cursor.execute(
        f"""SELECT first_version, second_version, count(*) FILTER (pick = 'first'),
            count(*) FILTER (pick IN ('tie', 'both_bad')), count(*) FILTER (pick = 'second')
        FROM ({_BLIND_WORDS.format(which=f"AND one.version <> '{GOLD}'")})
        WHERE rater NOT IN (FROM quarantined_raters) GROUP BY ALL ORDER BY ALL"""
    ).fetchall()
    return [Comparisons(*row) for row in found]


def _vote(pick: str, rater: str, *, challenger_first: bool, apart: bool) -> TrialVote:
    if pick not in ("first", "second"):
        return TrialVote("tie", challenger_first, rater, apart)
    return TrialVote("win" if (pick == "first") == challenger_first else "loss", challenger_first, rater, apart)


def _trial(row: rows.Row) -> Trial:
    trial_id, challenger, champion, share, rules, by, reason, created_at = row[:8]
    state, ended_reason, evidence, ended_by, ended_at = row[8:]
    known: Mapping[str, object] = json.loads(rules)
    begun = Trial(trial_id, challenger, champion, share, known, by, reason, rows.loaded_time(created_at))
    if state is None:
        return begun
    return Trial(
        trial_id, challenger, champion, share, known, by, reason, rows.loaded_time(created_at),
        state, ended_reason, json.loads(evidence), ended_by, rows.loaded_time(ended_at),
    )  # fmt: skip
