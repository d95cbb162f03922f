"""How fast the store is, one section a subcommand → docs/benchmarks/.

    .venv/bin/python scripts/bench_store.py picks [--there 1000000]     → docs/benchmarks/store-picks.md

picks: 64 clients in one process, each waiting for its acknowledgement before its next pick, through
``FeedbackStore.record_pick``; with batches and with one transaction for each pick, in turns. Not measured: HTTP.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from feedback_store.database import BATCH_LIMIT  # noqa: E402
from feedback_store.records import PickChoice  # noqa: E402
from feedback_store.store import FeedbackStore  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "store-picks.md"
CLIENTS = 64
ROUNDS = 5
ROUND_S = 3.0
PAIRS = 10_000
RATERS_THERE = 10
CHOICES = tuple(PickChoice)


@dataclass(frozen=True)
class Round:
    """One round of clients in a closed loop: how long each pick took until it was acknowledged."""

    picks_per_s: float
    p50_ms: float
    p99_ms: float
    worst_ms: float
    picks: int


def fill(store: FeedbackStore, pairs: int, raters: int) -> None:
    """Pairs with answers of about a thousand characters, each picked by so many raters."""
    numbers = f"range({pairs}) AS numbers(number)"
    with store._database.write() as cursor:
        for answer in ("first", "second"):
            cursor.execute(
                "INSERT INTO candidates SELECT format('cand_{}_{}', $1, number), 'v0', $1 || number || repeat("
                "' a word', 140), 'stop', '{}', number, 900.0, TIMESTAMP '2026-11-22' FROM " + numbers,
                [answer],
            )
        cursor.execute(
            "INSERT INTO pairs (pair_id, prompt, split, first_candidate_id, second_candidate_id, rater, created_at) "
            "SELECT format('pair_{}', number), [{'role': 'user', 'content': number || repeat(' why', 150)}], 'train', "
            "format('cand_first_{}', number), format('cand_second_{}', number), 'local', TIMESTAMP '2026-11-22' FROM "
            + numbers
        )
    for rater in range(raters):
        with store._database.write() as cursor:
            cursor.execute(
                "INSERT INTO picks (pick_id, pair_id, pick, reasons, rater, idempotency_key, preference_id, part, "
                "created_at) SELECT format('pick_{}_{}', $1, number), format('pair_{}', number), 'first', [], 'rater '"
                " || $1, format('key {} {}', $1, number), 'pref_' || md5($1 || ' ' || number), 'train', "
                "TIMESTAMP '2026-11-22' FROM " + numbers,
                [str(rater)],
            )
            cursor.execute(
                "INSERT INTO pick_keys SELECT idempotency_key, pick_id FROM picks WHERE rater = 'rater ' || $1",
                [str(rater)],
            )
            cursor.execute(
                "INSERT INTO pick_words SELECT concat_ws(' ', 0, length(pair_id), pair_id, rater), pair_id, rater, 0, "
                "pick_id FROM picks WHERE rater = 'rater ' || $1",
                [str(rater)],
            )


def measure(store: FeedbackStore, clients: int, seconds: float, name: str, pairs: int) -> Round:
    """So many clients, each with a name of its own, picking one pair after the other until the time is over."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    start = threading.Barrier(clients + 1)
    deadline = 0.0

    def client(index: int) -> None:
        start.wait()
        number = index * pairs // clients
        while (began := time.perf_counter()) < deadline:
            pair = f"pair_{number % pairs}"
            choice = CHOICES[number % len(CHOICES)]
            store.record_pick(pair, choice, rater=f"{name} {index}", idempotency_key=f"{name} {index} {number}")
            latencies[index].append(time.perf_counter() - began)
            number += 1

    threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    deadline = time.perf_counter() + seconds
    began = time.perf_counter()
    start.wait()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    waits = sorted(1000 * wait for waits in latencies for wait in waits)
    p99 = waits[int(0.99 * len(waits))]
    return Round(len(waits) / took, statistics.median(waits), p99, waits[-1], len(waits))


def median_of(rounds: Sequence[Round]) -> Round:
    """The median of each number over the rounds; the worst wait and the sum of the picks are of all rounds."""
    return Round(
        statistics.median(one.picks_per_s for one in rounds),
        statistics.median(one.p50_ms for one in rounds),
        statistics.median(one.p99_ms for one in rounds),
        max(one.worst_ms for one in rounds),
        sum(one.picks for one in rounds),
    )


def row(what: str, result: Round) -> str:
    """One line of the table."""
    return (
        f"| {what} | {result.picks} | {result.picks_per_s:,.0f} | {result.p50_ms:.1f} | {result.p99_ms:.1f} "
        f"| {result.worst_ms:.0f} |"
    )


def bench_picks(there: int, rounds: int, seconds: float) -> str:
    """Measure with so many picks there already; a section of the report."""
    pairs = max(PAIRS, there // RATERS_THERE)
    results: dict[str, list[Round]] = {"idle": [], "batches": [], "alone": []}
    with tempfile.TemporaryDirectory() as directory, FeedbackStore.open(Path(directory) / "store.duckdb") as store:
        fill(store, pairs, RATERS_THERE if there else 0)
        measure(store, 8, 0.5, "warm", pairs)
        for number in range(rounds):
            results["idle"].append(measure(store, 1, seconds / 3, f"idle {number}", pairs))
            for name, limit in (("batches", BATCH_LIMIT), ("alone", 1)):
                store._database.batch_limit = limit
                results[name].append(measure(store, CLIENTS, seconds, f"{name} {number}", pairs))
            store._database.batch_limit = BATCH_LIMIT
    idle, batches, alone = (median_of(results[name]) for name in ("idle", "batches", "alone"))
    return f"""## {there:,} picks there before

| | picks | picks/s | p50 ms | p99 ms | worst ms |
|---|---|---|---|---|---|
{row("1 client, idle", idle)}
{row(f"{CLIENTS} clients, one transaction each", alone)}
{row(f"{CLIENTS} clients, batches", batches)}

**{batches.picks_per_s / alone.picks_per_s:.1f} times** the picks of one transaction each (target: at least 5);
**p99 {batches.p99_ms - idle.p50_ms:.1f} ms over the idle p50** (target: at most 20 on a quiet machine).
"""


def picks(arguments: argparse.Namespace) -> None:
    """The report on picks."""
    sections = [bench_picks(there, arguments.rounds, arguments.seconds) for there in arguments.there]
    title = f"""# Picks acknowledged while many people pick at once

`scripts/bench_store.py picks`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), Python
{platform.python_version()}. Each client is a thread that waits for its acknowledgement (on disk) before its next pick,
the five choices in turns; medians of {arguments.rounds} rounds of {arguments.seconds:g} s for each line, the lines in
turns; worst of all rounds.
"""
    arguments.out.write_text("\n".join([title, *sections]), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


def main() -> None:
    """Read the command line and run one section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = parser.add_subparsers(required=True)
    section = sections.add_parser("picks", help="picks acknowledged a second, in batches and one transaction each")
    section.add_argument("--there", type=int, nargs="+", default=[0], help="picks in the store before, e.g. 0 1000000")
    section.add_argument("--rounds", type=int, default=ROUNDS)
    section.add_argument("--seconds", type=float, default=ROUND_S, help="length of a round")
    section.add_argument("--out", type=Path, default=REPORT)
    section.set_defaults(run=picks)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
