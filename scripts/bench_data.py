"""Importing, freezing and counting at size → docs/benchmarks/store-data.md.

    make bench-store            (or: .venv/bin/python scripts/bench_data.py [--scale 0.02] [--out FILE])

Every part runs in a process of its own, so that its memory is its own. `--scale` makes all of it smaller, to try it.
The rows are made up: words in the lengths of UltraFeedback (650, 1,050 and 950 characters on average for prompt,
chosen and rejected).
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import psutil

from feedback_store import rows, snapshots
from feedback_store.importers import read_preferences
from feedback_store.mixing import Mix
from feedback_store.store import FeedbackStore

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "benchmarks" / "store-data.md"
SCALE = float(os.environ.get("BENCH_SCALE", "1"))
IMPORTED = int(61_000 * SCALE)
FROZEN = int(100_000 * SCALE)
EVENTS = int(1_000_000 * SCALE)
ONE_BY_ONE = 1_000
IMPORTS = 3
FREEZES = 5
COUNTS = 21
MIB = 2**20


def write_rows(path: Path, number: int, seed: int) -> None:
    """`number` rows in TRL's layout."""
    dice = random.Random(seed)
    words = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(2, 9))) for _ in range(5000)]
    with path.open("w") as file:
        for _ in range(number):
            row = {
                name: " ".join(dice.choices(words, k=max(3, round(dice.lognormvariate(0, 0.5) * mean))))
                for name, mean in (("prompt", 88), ("chosen", 142), ("rejected", 129))
            }
            file.write(json.dumps(row) + "\n")


@contextmanager
def growth() -> Iterator[list[int]]:
    """The largest growth of this process's resident memory, in bytes, looked at every 10 ms."""
    process, peak, stop = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def look() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def timed(action: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def bench_import(directory: Path) -> dict[str, Any]:
    """The whole import of a file, against `executemany` of rows that are parsed already."""
    source = directory / "rows.jsonl"
    write_rows(source, IMPORTED, seed=1)
    with FeedbackStore.open(directory / "store.duckdb") as store, growth() as peak:
        seconds = timed(lambda: store.record_import(str(source), "trl"))
    return {
        "seconds": seconds,
        "rows_s": IMPORTED / seconds,
        "growth_mib": peak[0] / MIB,
        "megabytes": source.stat().st_size / 1e6,
        "autocommit_rows_s": one_by_one(directory / "one.duckdb", source, transaction=False),
        "transaction_rows_s": one_by_one(directory / "many.duckdb", source, transaction=True),
    }


def one_by_one(path: Path, source: Path, *, transaction: bool) -> float:
    """Rows a second through DuckDB's `executemany` into the same table."""
    FeedbackStore.open(path).close()
    batch = next(read_preferences(str(source), "trl", datetime.now(UTC)).batches(ONE_BY_ONE))
    arriving = rows.preference_table(batch.pairs, "import_1").to_pylist()
    columns = list(arriving[0])
    sql = f"INSERT INTO preferences ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    with duckdb.connect(str(path), config={"threads": "1"}) as connection:
        if transaction:
            connection.begin()

        def insert() -> None:
            connection.executemany(sql, [list(row.values()) for row in arriving])
            if transaction:
                connection.commit()

        return len(arriving) / timed(insert)


def bench_snapshot(directory: Path) -> dict[str, Any]:
    """From the database to a frozen snapshot, redaction and mix included; the store was just opened."""
    source = directory / "rows.jsonl"
    write_rows(source, FROZEN, seed=2)
    with FeedbackStore.open(directory / "store.duckdb") as store:
        store.record_import(str(source), "trl")
    with FeedbackStore.open(directory / "store.duckdb") as store:
        mix = Mix(max_rater_share=0.5, max_per_prompt=8)

        def freeze(folder: str) -> None:
            snapshots.freeze(store.training_rows(), directory / folder, None, mix)

        with growth() as peak:
            freeze("first")
        seconds = [timed(lambda: freeze(f"s{number}")) for number in range(FREEZES)]  # noqa: B023
        frozen = next((directory / "s0").iterdir())
        verify = timed(lambda: snapshots.verify(snapshots.load_snapshot(frozen)))
    return {"seconds": seconds, "growth_mib": peak[0] / MIB, "verify_s": verify}


def bench_statistics(directory: Path) -> dict[str, Any]:
    """Everything the admin page counts, over a million events."""
    quarter = EVENTS // 4
    path = directory / "store.duckdb"
    FeedbackStore.open(path).close()
    with duckdb.connect(str(path)) as connection:
        moment = "TIMESTAMP '2026-01-01' + to_seconds(i * 60)"
        for statement in (
            f"""INSERT INTO turns SELECT 'turn_' || i, 'conv_' || i // 8, i % 8, 'text ' || i, {moment}
                FROM range({quarter}) t(i)""",
            f"""INSERT INTO pairs (pair_id, prompt, split, first_candidate_id, second_candidate_id, rater, created_at)
                SELECT 'pair_' || i, [{{'role': 'user', 'content': 'question ' || i}}],
                CASE WHEN i % 10 = 0 THEN 'held_out' ELSE 'train' END, 'cand_' || 2 * i, 'cand_' || 2 * i + 1,
                'rater ' || i % 20, {moment} FROM range({quarter}) t(i)""",
            f"""INSERT INTO picks (pick_id, pair_id, pick, reasons, rater, preference_id, part, supersedes,
                superseded_pick, superseded_part, created_at)
                SELECT 'pick_' || i, 'pair_' || i, ['first', 'second', 'tie', 'both_bad', 'skip'][1 + i % 5], [],
                'rater ' || i % 20, CASE WHEN i % 5 < 2 THEN 'pref_' || i END, CASE WHEN i % 5 < 2 THEN 'train' END,
                CASE WHEN i % 50 = 49 THEN 'pick_' || i - 9 END, CASE WHEN i % 50 = 49 THEN 'first' END,
                CASE WHEN i % 50 = 49 THEN 'train' END, {moment} FROM range({quarter}) t(i)""",
            f"""INSERT INTO ratings (rating_id, candidate_id, rating, rater, created_at)
                SELECT 'rating_' || i, 'cand_' || i, ['up', 'down'][1 + i % 2], 'rater ' || i % 20, {moment}
                FROM range({quarter}) t(i)""",
        ):  # fmt: skip
            connection.execute(statement)
    with FeedbackStore.open(path) as store:
        first, *others = [1000 * timed(store.statistics) for _ in range(COUNTS)]
        counted = store.statistics().counts
    if counted.turns != quarter or counted.pairs != quarter:
        raise RuntimeError(f"counted {counted}")
    return {"first_ms": first, "median_ms": statistics.median(others), "worst_ms": max(others), "picks": counted.picks}


PARTS = {"import": bench_import, "snapshot": bench_snapshot, "statistics": bench_statistics}


def measured(part: str) -> dict[str, Any]:
    """The results of a part, from a process of its own."""
    found = subprocess.run([sys.executable, __file__, part], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(found.stdout)
    print(part, result, flush=True)
    return result


def main(report: Path) -> None:
    """Measure every part and write the report."""
    imports = [measured("import") for _ in range(IMPORTS)]
    frozen, counted = measured("snapshot"), measured("statistics")
    imported = {name: statistics.median(one[name] for one in imports) for name in imports[0]}
    ratios = sorted(one["rows_s"] / one["autocommit_rows_s"] for one in imports)
    in_one = statistics.median(one["rows_s"] / one["transaction_rows_s"] for one in imports)
    seconds = frozen["seconds"]
    lines = [
        ("what", "n", "measured", "target"),
        ("---", "---", "---", "---"),
        (
            f"import of {IMPORTED:,} pairs ({imported['megabytes']:.0f} MB of JSON lines), file to committed",
            IMPORTS,
            f"median {imported['seconds']:.1f} s, {imported['rows_s']:,.0f} rows/s",
            "",
        ),
        (
            f"`executemany`, a transaction a row ({ONE_BY_ONE:,} parsed rows)",
            IMPORTS,
            f"median {imported['autocommit_rows_s']:,.0f} rows/s",
            "",
        ),
        (
            "**ratio of the two**, measured after each other",
            IMPORTS,
            f"**median {statistics.median(ratios):.0f}×**, {ratios[0]:.0f}× to {ratios[-1]:.0f}×",
            "50×",
        ),
        (
            "`executemany` in one transaction, for comparison",
            IMPORTS,
            f"median {imported['transaction_rows_s']:,.0f} rows/s: ratio {in_one:.0f}×",
            "",
        ),
        (
            "largest growth of resident memory during the import",
            IMPORTS,
            f"{max(one['growth_mib'] for one in imports):.0f} MiB",
            "500 MB",
        ),
        (
            f"snapshot of {FROZEN:,} preferences, mix and redaction included",
            FREEZES,
            f"median {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s",
            "5 s",
        ),
        ("largest growth of resident memory while freezing", 1, f"{frozen['growth_mib']:.0f} MiB", ""),
        ("verifying that snapshot", 1, f"{frozen['verify_s']:.1f} s", ""),
        (
            f"statistics over {EVENTS:,} events",
            COUNTS - 1,
            f"median {counted['median_ms']:.0f} ms, worst {counted['worst_ms']:.0f} ms",
            "100 ms",
        ),
        ("the first of them after opening", 1, f"{counted['first_ms']:.0f} ms", ""),
    ]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    report.write_text(
        f"""# The store at size

`make bench-store`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), Python
{platform.python_version()}. Each part in a process of its own; the rows are made up, in UltraFeedback's lengths.

{table}
"""
    )
    print(report.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="only this one, its numbers as JSON")
    parser.add_argument("--scale", type=float, help="a part of the full size")
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    if arguments.scale:
        os.environ["BENCH_SCALE"] = str(arguments.scale)
        os.execv(sys.executable, [sys.executable, __file__, "--out", str(arguments.out)])
    if arguments.part is None:
        main(arguments.out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(PARTS[arguments.part](Path(folder))))
