"""A disk that fails for a time: nothing is acknowledged that is not kept, health says so, and all goes on by itself."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from faults import disk
from faults.state import complaints, fill
from feedback_store.errors import StoreDamaged
from feedback_store.store import FeedbackStore

RATERS = 8
PAIRS = 50
DISK_MIB = 24
# The error, where it comes, and the beginning of the names in the data directory that it comes on.
INJECTED = {
    "EIO on writes": (errno.EIO, disk.WRITES, ""),
    "EIO on syncs": (errno.EIO, disk.SYNCS, ""),
    "EIO on both, the database's files alone": (errno.EIO, disk.WRITES | disk.SYNCS, "/store.duckdb"),
    "ENOSPC on writes": (errno.ENOSPC, disk.WRITES, ""),
}


@dataclass
class Outcome:
    """What a failing disk did; ``red`` is what health said."""

    disk: str
    acknowledged: int
    refused: int
    lost: int
    duplicated: int
    red: str


def run(name: str, library: Path) -> Outcome:
    """One of ``INJECTED``."""
    error, what, files = INJECTED[name]
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory).resolve()
        child = partial(disk.start, library=library, below=Path(f"{home}{files}"))
        return _survive(name, home, error, what, child)


def run_small_disk() -> Outcome | None:
    """A file system of 24 MiB filled up to the last byte; None where none can be mounted."""
    with tempfile.TemporaryDirectory() as directory, mounted(Path(directory)) as small:
        return _survive(f"a disk of {DISK_MIB} MiB, full", small, 0, 0, disk.start) if small else None


def run_read_only() -> str | None:
    """What a read-only disk is said to be when the store is opened; None where none can be mounted."""
    with tempfile.TemporaryDirectory() as directory, mounted(Path(directory)) as small:
        if small is None:
            return None
        fill(small / "store.duckdb", 1)
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        before = (small / "store.duckdb").read_bytes()
        try:
            FeedbackStore.open(small / "store.duckdb").close()
        except StoreDamaged as refusal:
            assert (small / "store.duckdb").read_bytes() == before
            return str(refusal)
        raise AssertionError("a store on a read-only disk was opened")


@contextlib.contextmanager
def mounted(directory: Path) -> Iterator[Path | None]:
    """A small file system of its own, for a process that may mount."""
    small = directory.resolve() / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(small)]
    may = os.geteuid() == 0 and shutil.which("mount") is not None
    if not may or subprocess.run(command, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield small
    finally:
        subprocess.run(["umount", small], check=True)


def _survive(name: str, directory: Path, error: int, what: int, start: Callable[..., subprocess.Popen[str]]) -> Outcome:
    path = directory / "store.duckdb"
    fill(path, PAIRS)
    child = start("failing", path, error, what, RATERS, PAIRS)
    out, errors = child.communicate()
    assert child.returncode == 0, errors
    report = json.loads(out)
    with FeedbackStore.open(path) as store, store._database.read() as cursor:
        assert complaints(cursor) == []
        kept = cursor.execute("SELECT idempotency_key, pick_id FROM picks").fetchall()
    stored = dict(kept)
    lost = sum(stored.get(key) != pick_id for key, pick_id in report["acknowledged"].items())
    return Outcome(name, len(report["acknowledged"]), report["refused"], lost, len(kept) - len(stored), report["red"])
