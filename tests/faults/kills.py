"""kill -9 at random moments while raters pick: nothing that was acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from faults import disk
from faults.child import ask
from faults.state import complaints, fill
from feedback_store.store import FeedbackStore

RATERS = 32
PAIRS = 200
KILLS_A_STORE = 20
LONGEST_LIFE_S = 0.8


@dataclass
class Outcome:
    """What so many kills did."""

    kills: int = 0
    reopened: int = 0
    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    unsaid: int = 0
    half_states: int = 0
    logs_left: int = 0


def run(kills: int, seed: int = 0) -> Outcome:
    """Kill so many times; every second time rows are imported and checkpoints are made beside the raters."""
    chance, outcome = random.Random(seed), Outcome()
    for first in range(0, kills, KILLS_A_STORE):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "store.duckdb"
            fill(path, PAIRS)
            for number in range(first, min(first + KILLS_A_STORE, kills)):
                acknowledged = _killed(
                    path, f"round {number}", chance.uniform(0, LONGEST_LIFE_S), disturbed=number % 2 == 1
                )
                outcome.kills += 1
                outcome.acknowledged += len(acknowledged)
                outcome.logs_left += path.with_name("store.duckdb.wal").exists()
                _compare(path, f"round {number}", acknowledged, outcome)
    return outcome


def _killed(path: Path, name: str, life_s: float, *, disturbed: bool) -> dict[str, str]:
    """Let the raters pick, kill them after so many seconds; what was acknowledged, id by key."""
    child = disk.start("raters", path, name, RATERS, PAIRS, "disturbed" if disturbed else "calm")
    assert child.stdout is not None
    first = child.stdout.readline()
    time.sleep(life_s)
    child.kill()
    rest, errors = child.communicate()
    assert not errors, errors
    lines = [line for line in [first, *rest.splitlines(keepends=True)] if line.endswith("\n")]
    assert lines
    return dict(line.rstrip("\n").split("\t") for line in lines)


def _compare(path: Path, name: str, acknowledged: dict[str, str], outcome: Outcome) -> None:
    with FeedbackStore.open(path) as store:
        outcome.reopened += 1
        with store._database.read() as cursor:
            outcome.half_states += len(complaints(cursor))
            kept = cursor.execute(
                "SELECT idempotency_key, pick_id FROM picks WHERE starts_with(idempotency_key, ?)", [f"{name} "]
            ).fetchall()
        stored = dict(kept)
        outcome.duplicated += len(kept) - len(stored)
        outcome.lost += sum(stored.get(key) != pick_id for key, pick_id in acknowledged.items())
        outcome.unsaid += len(stored.keys() - acknowledged.keys())
        for rater in range(RATERS):
            said = sum(key.startswith(f"{name} {rater} ") for key in acknowledged)
            for number in range(max(said - 1, 0), said + 1):
                key, pick_id = ask(store, name, rater, number, PAIRS)
                again = ask(store, name, rater, number, PAIRS)[1]
                outcome.duplicated += again != pick_id or stored.get(key, pick_id) != pick_id
