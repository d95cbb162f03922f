"""The whole harness → docs/benchmarks/faults.md: ``python -m tests.faults [--kills 300] [--short]``."""

import argparse
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import disk, failures, kills, steps  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "faults.md"
SHORT_KILLS = 10
SHORT_STEPS = 4


Section = tuple[str, list[str]]  # the text, and what must not be


def kills_section(number: int) -> Section:
    """The random kills."""
    found = kills.run(number, seed=int(time.time()))
    numbers = (found.kills, found.reopened, found.logs_left, found.acknowledged, found.lost, found.duplicated)
    wrong = [f"{found.lost} lost, {found.duplicated} duplicated, {found.half_states} half states after random kills"]
    text = f"""## kill -9 at random moments, {kills.RATERS} raters at once

Every second life with imports and checkpoints beside the raters. An acknowledgement counts once its line is on the
pipe to the parent. After each kill the store is opened again, every acknowledged pick is looked up, the last pick of
each rater and the one after it are sent again twice with their keys, and the tables are compared with each other.

| kills | reopenings | with a log left | acknowledged | lost | duplicated | kept, not acknowledged | half states |
|---|---|---|---|---|---|---|---|
| {" | ".join(map(str, (*numbers, found.unsaid, found.half_states)))} |
"""
    return text, wrong if found.lost or found.duplicated or found.half_states else []


def steps_section(library: Path | None, at_most: int | None) -> Section:
    """The directed kills."""
    if library is None:
        return "No C compiler here: no kills at chosen steps.\n", []
    outcomes = [steps.run(operation, library, at_most) for operation in steps.OPERATIONS]
    wrong = [f"{found.operation} left {', '.join(found.left_behind)}" for found in outcomes if found.left_behind]
    table = "".join(
        f"| {found.operation} | {found.steps} | {found.kills} | {found.found['before']} | {found.found['after']} "
        f"| {len(found.left_behind)} |\n"
        for found in outcomes
    )
    text = f"""## kill -9 before each step on the disk

A step is a call that changes a file of the data directory: write, sync, truncate, rename, unlink, making a file or a
folder. Killed before each of them, and in the middle of each write. What was left is opened, verified, and the
operation done again; anything but "as before" and "as after" ends the harness with an error.

| operation | steps | kills | found as before | found as after | files not cleared by the next one |
|---|---|---|---|---|---|
{table}"""
    return text, wrong


def failures_section(library: Path | None) -> Section:
    """The disks that fail."""
    found = [failures.run(name, library) for name in failures.INJECTED] if library else []
    small = failures.run_small_disk()
    found += [small] if small else []
    wrong = [f"{one.lost} lost, {one.duplicated} duplicated: {one.disk}" for one in found if one.lost or one.duplicated]
    table = "".join(
        f"| {one.disk} | {one.acknowledged} | {one.refused} | **{one.lost}** | **{one.duplicated}** |\n"
        for one in found
    )
    read_only = failures.run_read_only()
    text = f"""## A disk that fails for a time, {failures.RATERS} raters at once

Each rater sends a refused pick again with its key until it is acknowledged. The harness waits until health is red and
every rater was refused, heals the disk, and waits until health is green and every rater was acknowledged again: in the
same process, without a restart.

| disk | acknowledged | refused meanwhile | lost | duplicated |
|---|---|---|---|---|
{table}
{"" if small else "No small disk could be mounted here: a full disk was injected, not filled."}
{"A store on a read-only disk is refused when it is opened, unchanged." if read_only else ""}
"""
    return text, wrong


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="kills at random moments")
    parser.add_argument("--short", action="store_true", help="a few of each; no report is written")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        library = disk.compiled(Path(directory)) if disk.CAN_COMPILE else None
        number, at_most = (SHORT_KILLS, SHORT_STEPS) if arguments.short else (arguments.kills, None)
        sections = [kills_section(number), steps_section(library, at_most), failures_section(library)]
    title = f"""# Kills and failing disks

`python -m tests.faults`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), Python
{platform.python_version()}, {time.monotonic() - began:.0f} s. Not tested here: power cuts. That each batch of picks is
one fdatasync before its first acknowledgement is a test of its own (`tests/test_database.py`, with strace).
"""
    report = "\n".join([title, *(text for text, _ in sections)])
    print(report)
    if not arguments.short:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(report, encoding="utf-8")
    if wrong := [what for _, whats in sections for what in whats]:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
