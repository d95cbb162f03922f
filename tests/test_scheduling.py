"""The schedule as buttons, commands and routes share it, and the watch that starts runs."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tiny_model import shared_tiny
from typer.testing import CliRunner

from chat_app.__main__ import TRAINER_STATUSES, open_store
from chat_app.api import create_api
from chat_app.cli import app
from chat_app.operations import Operations
from chat_app.settings import SettingsError, load_settings
from chat_app.trainer_room import TrainerRoom
from feedback_store.records import Candidate, Message, Pair, PickChoice, new_id, now
from feedback_store.store import FeedbackStore
from trainer import schedule


@contextmanager
def house(tmp_path: Path, **settings: object) -> Iterator[tuple[Operations, FeedbackStore]]:
    values = {f"ZLOOP_{name.upper()}": str(value) for name, value in settings.items()}
    chosen = load_settings({"ZLOOP_DATA_DIR": str(tmp_path), "ZLOOP_ENGINE": "scripted", **values})
    with open_store(chosen) as store:
        yield Operations(chosen, store, TrainerRoom(chosen, store), None, schedule.is_due), store


def pick(store: FeedbackStore, number: int) -> str:
    """A pair that waits for a pick; none of these prompts is held out."""

    def candidate(text: str) -> Candidate:
        return Candidate(new_id("cand"), "v0", text, "stop", {}, 1, 1.0, now())

    prompt = (Message(role="user", content=f"Question {number}"),)
    pair = Pair(new_id("pair"), prompt, candidate("one"), candidate("two"), None, "local", now())
    store.record_pair(pair)
    return pair.pair_id


def wait_for_a_run(operations: Operations) -> None:
    while not operations.runs():
        time.sleep(0.02)


def at(operations: Operations, moment: datetime) -> None:
    operations.scheduling._clock = lambda: moment


def test_a_time_starts_a_run_and_the_next_one_is_skipped_while_it_goes_on(tmp_path: Path) -> None:
    monday = datetime(2026, 11, 23, 12, tzinfo=UTC)
    with house(tmp_path, retrain_every=0, retrain_cron="0 2 * * *", time_zone="UTC") as (operations, store):
        at(operations, monday)
        assert operations.scheduling.look() is None
        operations.record_pick(pick(store, 0), PickChoice.FIRST)
        at(operations, monday + timedelta(hours=14, seconds=3))
        run_id = operations.scheduling.look()
        assert run_id is not None
        assert operations.run(run_id).is_active
        assert operations.scheduling.look() is None
        at(operations, monday + timedelta(hours=38))
        assert operations.scheduling.look() is None
    with house(tmp_path, retrain_every=0, retrain_cron="0 2 * * *", time_zone="UTC") as (operations, _):
        newest, before = operations.scheduling.state()["decisions"]
        assert (before["run_id"], before["reason"]) == (run_id, "on_time")
        assert (newest["run_id"], newest["reason"], newest["started"]) == (None, "overlap", False)
        assert len(operations.runs()) == 1


def test_a_start_that_is_refused_is_kept_and_not_tried_every_second(tmp_path: Path) -> None:
    with house(tmp_path, retrain_every=1) as (operations, store):
        tries = []

        def refuse() -> str:
            tries.append(1)
            raise RuntimeError("the disk is full")

        operations.scheduling._start = refuse
        assert operations.record_pick(pick(store, 0), PickChoice.FIRST).run_started is None
        assert operations.scheduling.look() is None
        assert len(tries) == 1
        (kept,) = operations.scheduling.state()["decisions"]
        assert kept["reason"] == "refused"
        assert "the disk is full" in kept["sentence"]


def test_the_watch_starts_what_is_due_and_ends_at_once(tmp_path: Path) -> None:
    with house(tmp_path, retrain_every=0) as (operations, store):
        operations.record_pick(pick(store, 0), PickChoice.FIRST)
        operations.scheduling.change({"every": 1}, by="local")

        async def watched() -> None:
            watching = asyncio.create_task(operations.scheduling.watch())
            await asyncio.to_thread(wait_for_a_run, operations)
            operations.scheduling.stop()
            await asyncio.wait_for(watching, 5)

        asyncio.run(asyncio.wait_for(watched(), 30))
        assert [run.as_body()["state"] for run in operations.runs()] == ["queued"]


def test_the_watch_outlives_a_store_that_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chat_app.scheduling.LOOK_EVERY_S", 0.01)
    with house(tmp_path, retrain_every=5) as (operations, _):
        looks: list[int] = []

        def count() -> int:
            looks.append(1)
            if len(looks) == 1:
                raise OSError("No space left on device")
            if len(looks) == 3:
                operations.scheduling.stop()
            return 0

        operations.scheduling._new_preferences = count
        asyncio.run(asyncio.wait_for(operations.scheduling.watch(), 30))
        assert len(looks) == 3


def test_the_routes_show_and_change_it(tmp_path: Path) -> None:
    with house(tmp_path, time_zone="Europe/Berlin") as (operations, _):
        client = TestClient(create_api(operations, TRAINER_STATUSES))
        shown = client.get("/v1/schedule").json()
        assert (shown["every"], shown["cron"], shown["time_zone"]) == (50, None, "Europe/Berlin")
        assert shown["outlook"] == "The next run starts after 50 more new preferences."
        changed = client.put("/v1/schedule", json={"cron": "0 2 * * *", "quiet": "08:00-18:00"}).json()
        assert (changed["every"], changed["cron"], changed["changed_by"]) == (50, "0 2 * * *", "local")
        assert changed["next_start"].endswith("T02:00:00+01:00") or changed["next_start"].endswith("T02:00:00+02:00")
        for body, said in (
            ({"cron": "often"}, "five fields"),
            ({"weekly": 1}, "weekly"),
            ({"every": -1}, "every"),
            ({"quiet": "8-18"}, "08:00-18:00"),
        ):
            refused = client.put("/v1/schedule", json=body)
            assert refused.status_code == 422
            assert said in refused.json()["error"]["message"]
        assert client.get("/v1/schedule").json()["cron"] == "0 2 * * *"
        assert operations.status().retrain_every == 50
        client.put("/v1/schedule", json={"every": 7})
        assert operations.status().retrain_every == 7
        assert client.put("/v1/schedule", json={"reset": True}).json()["from"] == "settings"


def test_the_command_shows_and_changes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZLOOP_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ZLOOP_ENGINE", "scripted")

    def zloop(*words: str) -> Any:
        return CliRunner().invoke(app, ["schedule", *words])

    changed = zloop("--cron", "0 2 * * *", "--at-least", "20", "--quiet", "08:00-18:00", "--time-zone", "UTC", "--json")
    assert changed.exit_code == 0, changed.output
    body = json.loads(changed.stdout)
    assert (body["cron"], body["at_least"], body["quiet"], body["every"]) == ("0 2 * * *", 20, "08:00-18:00", 50)
    assert "02:00 (UTC) if at least 20 new preferences have come in" in zloop().stdout
    assert json.loads(zloop("--quiet", "", "--json").stdout)["quiet"] is None
    refused = zloop("--cron", "often")
    assert refused.exit_code == 1
    assert "five fields" in refused.stderr
    assert zloop("--off", "--every", "3").exit_code == 1
    assert "only when somebody asks" in zloop("--off").stdout
    assert json.loads(zloop("--reset", "--json").stdout)["every"] == 50


def test_a_dry_run_says_what_a_run_would_take_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, pairs = tmp_path / "data", tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Question {number}", "chosen": "Yes.", "rejected": "No, or yes."} for number in range(20)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    for name, value in (("DATA_DIR", data), ("ENGINE", "scripted"), ("MODEL", shared_tiny().gguf)):
        monkeypatch.setenv(f"ZLOOP_{name}", str(value))

    def zloop(*words: str) -> Any:
        return CliRunner().invoke(app, [*words])

    nothing = zloop("train", "--dry-run")
    assert nothing.exit_code == 1
    assert "0 preferences to train on" in nothing.stderr
    assert zloop("import", str(pairs)).exit_code == 0
    said = zloop("train", "--dry-run", "--max-steps", "2")
    assert said.exit_code == 0, said.output
    assert "GB of memory" in said.stdout
    assert "16 pairs in 2 steps." in said.stdout
    body = json.loads(zloop("train", "--dry-run", "--num-processes", "2", "--json").stdout)
    assert (body["policy"], body["refusal"]) == ("share", None)
    assert zloop("train", "--dry-run", "--num-processes", "3").exit_code == 1, "8 pairs cannot be split over 3"
    monkeypatch.setattr("chat_app.trainer_room.available_bytes", lambda: 1_000_000)
    refused = zloop("train", "--dry-run", "--json")
    assert refused.exit_code == 1
    assert "This run needs about" in json.loads(refused.stdout)["refusal"]
    assert not (data / "runs").exists()
    assert not (data / "snapshots").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("RETRAIN_CRON", "often"), ("QUIET_HOURS", "8-18"), ("TIME_ZONE", "Mars/Olympus")]
)
def test_settings_that_are_no_schedule_stop_the_start(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=value), house(tmp_path, **{name: value}):
        pass
