"""TensorBoard and trackio for real: what they hold is what metrics.jsonl holds, and nothing leaves the machine."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_model
from made_run import lines_of

from chat_app.settings import SettingsError, load_settings
from feedback_store.snapshots import Snapshot, freeze
from trainer import trackers
from trainer.errors import TrainingUnavailable
from trainer.supervisor import Supervisor
from trainer.trackers import Trackers, check_trackers

ROOT = Path(__file__).parent.parent
CHILD = """
import json, socket, sys
from pathlib import Path

def refuse(*_arguments, **_options):
    raise AssertionError("a tracker wanted to talk to somebody")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from trainer.trackers import Trackers

run_dir, lines = Path(sys.argv[1]), json.loads(sys.argv[2])
written = []
trackers = Trackers(["tensorboard", "trackio"], run_dir, lambda: list(written))
for line in lines:
    written.append(line)
    trackers.log(line)
trackers.close()
"""


def tracked(run_dir: Path, lines: list[dict[str, float]]) -> None:
    """Write `lines` in a process that may not open a connection, though the environment asks trackio to."""
    elsewhere = {"TRACKIO_SPACE_ID": "someone/space", "TRACKIO_WEBHOOK_URL": "http://192.0.2.1/hook"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(run_dir), json.dumps(lines)],
        env={**os.environ, **elsewhere, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "failed and is left out" not in done.stdout


def in_trackio(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    (database,) = (run_dir / "trackio").glob("*.db")
    connection = sqlite3.connect(database)
    rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    connection.close()
    return [(step, json.loads(values)) for step, values in rows]


def in_tensorboard(run_dir: Path, key: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_both_hold_every_line_once_also_after_a_resume(tmp_path: Path) -> None:
    lines = lines_of(8)
    run_dir = tmp_path / "run_1"
    run_dir.mkdir()
    tracked(run_dir, lines[:6])
    tracked(run_dir, lines)  # as a resumed run: its earlier lines, then the rest
    steps = [line for line in lines if "loss" in line]
    assert in_tensorboard(run_dir, "loss") == [(line["step"], pytest.approx(line["loss"])) for line in steps]
    assert in_tensorboard(run_dir, "eval/loss") == [(8, pytest.approx(lines[-1]["eval/loss"]))]
    found = in_trackio(run_dir)
    assert [step for step, _ in found] == [line["step"] for line in lines]
    for (_, values), line in zip(found, lines, strict=True):
        assert values == {key: value for key, value in line.items() if key not in ("step", "time")}


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    class Breaks:
        def __init__(self, _folder: Path, _run_id: str) -> None:
            pass

        def log(self, step: int, _values: object) -> None:
            seen.append(step)
            if step == 2:
                raise OSError("no room")

        def close(self) -> None:
            raise AssertionError("it was dropped")

    monkeypatch.setitem(trackers._OPENERS, "tensorboard", Breaks)
    lines: list[dict[str, float]] = []
    opened = Trackers(["tensorboard"], tmp_path, lambda: lines)
    for step in (1, 2, 3):
        lines.append({"step": step, "time": 0.0, "loss": 1.0})
        opened.log(lines[-1])
    opened.close()
    assert seen == [1, 2]
    assert "The tracker tensorboard failed and is left out from here on: OSError: no room" in capsys.readouterr().out


def test_one_that_is_not_installed_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_trackers(["tensorboard", "trackio"])
    monkeypatch.setitem(trackers.PACKAGES, "trackio", "not_installed_here")

    def frozen(*_: object) -> Snapshot:
        return freeze(tiny_model.made_up_preferences(20), tmp_path / "snapshots", None)

    supervisor = Supervisor(tmp_path, tiny_model.shared_tiny(), frozen, lambda: "v0", trackers=("trackio",))
    with pytest.raises(TrainingUnavailable, match=r"zephyr-loop\[trackio\]"):
        supervisor.start_run()
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "snapshots").exists()


@pytest.mark.parametrize("value", ["wandb", "tensorboard,", "tensorboard trackio"])
def test_a_setting_that_names_no_tracker_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="ZLOOP_TRACKERS"):
        load_settings({"ZLOOP_TRACKERS": value})


@pytest.mark.parametrize("value", ["", "tensorboard", "trackio,tensorboard"])
def test_the_setting_names_trackers(value: str) -> None:
    assert load_settings({"ZLOOP_TRACKERS": value}).trackers == value
