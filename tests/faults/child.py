"""What the children of the harness do: ``python -m faults.child raters|step|failing …``. They die, or print JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from faults.disk import steering
from feedback_store.backup import back_up
from feedback_store.errors import StoreDamaged
from feedback_store.preferences import preference_id
from feedback_store.records import Message, PickChoice, Preference, now
from feedback_store.snapshots import freeze
from feedback_store.store import FeedbackStore

CHOICES = tuple(PickChoice)
MOMENT = datetime(2026, 11, 22, 12, tzinfo=UTC)
PATIENCE_S = 60.0


def ask(store: FeedbackStore, name: str, rater: int, number: int, pairs: int) -> tuple[str, str]:
    """The ``number``-th pick of a rater in the round ``name``: its idempotency key, and the id it is kept under."""
    key = f"{name} {rater} {number}"
    pair = f"pair_{(7 * rater + number) % pairs}"
    pick = store.record_pick(pair, CHOICES[number % 5], rater=f"rater {rater}", idempotency_key=key)
    return key, pick.pick_id


def raters(path: str, name: str, number: str, pairs: str, disturbed: str) -> None:
    """So many raters who pick until the process is killed; each acknowledgement is a line on the pipe.

    ``disturbed``: beside them rows are imported and checkpoints are made.
    """
    store = FeedbackStore.open(Path(path))

    def rate(rater: int) -> None:
        for count in range(10**9):
            key, pick_id = ask(store, name, rater, count, int(pairs))
            os.write(1, f"{key}\t{pick_id}\n".encode())

    def practise() -> None:
        prompt = (Message(role="user", content="Practice"),)
        for count in range(10**9):
            texts = [f"{name} {count} {row}" for row in range(200)]
            ids = [preference_id(prompt, text, "Longer.", "shorter") for text in texts]
            store.record_practice(
                [
                    Preference(identity, prompt, text, "Longer.", "practice", 1.0, None, None, (), "shorter", MOMENT)
                    for identity, text in zip(ids, texts, strict=True)
                ]
            )

    def checkpoint() -> None:
        while True:
            with store._database.read() as cursor, contextlib.suppress(duckdb.TransactionException):
                cursor.execute("CHECKPOINT")
            time.sleep(0.02)

    work: list[Callable[[], None]] = [lambda rater=rater: rate(rater) for rater in range(int(number))]  # type: ignore[misc]
    work += [practise, checkpoint] if disturbed == "disturbed" else []
    for one in work:
        threading.Thread(target=one).start()


def step(operation: str, directory: str, kill_at: str, torn: str) -> None:
    """One operation, killed before its ``kill_at``-th step on the disk; how many steps it had where it lived."""
    home, disk, done = Path(directory), steering(), ""
    path = home / "store.duckdb"
    arm = lambda: disk.faults_kill_at(int(kill_at), int(torn))  # noqa: E731 - one word for one thing
    if operation == "migration":
        arm()
        FeedbackStore.open(path).close()
    else:
        with FeedbackStore.open(path) as store:
            preferences = store.preferences() if operation == "snapshot" else []
            for rater in range(10 if operation == "checkpoint" else 0):
                ask(store, "step", rater, 1, 10)
            arm()
            if operation == "pick":
                done = ask(store, "step", 1, 1, 10)[1]
                print(json.dumps({"acknowledged": done}), flush=True)
            elif operation == "checkpoint":
                with store._database.read() as cursor:
                    cursor.execute("CHECKPOINT")
            elif operation == "import":
                done = str(store.record_import(str(home.parent / "rows.jsonl")).imported)
            elif operation == "snapshot":
                done = freeze(preferences, home / "snapshots", None).hash
            elif operation == "backup":
                done = back_up(store._database, home / "backups", now()).path.name
    print(json.dumps({"steps": disk.faults_steps(), "done": done}), flush=True)


def failing(path: str, error: str, what: str, number: str, pairs: str) -> None:
    """Raters who send a pick again until it is acknowledged, while the disk fails for a time.

    ``what`` is 1 for failing writes, 2 for failing syncs, 3 for both, and 0 for a small disk that is filled up.
    """
    store = FeedbackStore.open(Path(path))
    acknowledged: dict[str, str] = {}
    refusals: list[str] = []
    refused, stop = [0] * int(number), threading.Event()
    counts = [0] * int(number)

    def rate(rater: int) -> None:
        while not stop.is_set():
            try:
                key, pick_id = ask(store, "failing", rater, counts[rater], int(pairs))
            except StoreDamaged as refusal:
                refused[rater] += 1
                refusals.append(str(refusal))
                time.sleep(0.05)
            else:
                acknowledged[key] = pick_id
                counts[rater] += 1

    threads = [threading.Thread(target=rate, args=(rater,)) for rater in range(int(number))]
    for thread in threads:
        thread.start()
    try:
        _wait(lambda: min(counts) >= 3)
        assert _health(store) is None
        _break(Path(path).parent, int(error), int(what))
        _wait(lambda: min(refused) >= 1)
        _wait(lambda: _health(store) is not None)
        red = _health(store)
        before = list(counts)
        _heal(Path(path).parent, int(what))
        _wait(lambda: _health(store) is None)
        _wait(lambda: all(count >= past + 3 for count, past in zip(counts, before, strict=True)))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    store.close()
    report = {"acknowledged": acknowledged, "refused": sum(refused), "red": red, "refusal": refusals[0]}
    print(json.dumps(report), flush=True)


def _break(directory: Path, error: int, what: int) -> None:
    if what:
        steering().faults_fail(error, what)
        return
    ballast = (directory / "ballast").open("wb", buffering=0)
    with contextlib.suppress(OSError), ballast:
        while True:
            ballast.write(bytes(4096))


def _heal(directory: Path, what: int) -> None:
    if what:
        steering().faults_fail(0, 0)
    else:
        (directory / "ballast").unlink()


def _health(store: FeedbackStore) -> str | None:
    try:
        store._database.check()
    except StoreDamaged as complaint:
        return str(complaint)
    return None


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no end of waiting after {PATIENCE_S:g} s")
        time.sleep(0.01)


if __name__ == "__main__":
    {"raters": raters, "step": step, "failing": failing}[sys.argv[1]](*sys.argv[2:])
