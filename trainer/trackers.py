"""Where else the lines of metrics.jsonl go: TensorBoard event files, a trackio database. Both below the run directory.

`progress.py` hands every line on; what is opened is rebuilt from metrics.jsonl first, so that a resumed run has each
step once. Nothing leaves the machine: trackio is told neither a Space nor a server nor a webhook, whatever the
environment says. To look:

    tensorboard --logdir DATA_DIR/runs
    TRACKIO_DIR=DATA_DIR/runs/RUN_ID/trackio trackio show --project zephyr-loop

A tracker that fails is dropped with a line in the log: a run is hours, a tracker a convenience.
Not covered: other trackers, and one trackio database for all runs.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import TrainingUnavailable

PROJECT = "zephyr-loop"
PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio"}
NOT_VALUES = ("step", "time")
# What would make trackio send metrics elsewhere; see `trackio.init`.
_TRACKIO_ELSEWHERE = ("SPACE_ID", "SERVER_URL", "WRITE_TOKEN", "BUCKET_ID", "DATASET_ID", "WEBHOOK_URL")


class Tracker(Protocol):
    """Takes the values of one step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def check_trackers(names: Iterable[str]) -> None:
    """Raises TrainingUnavailable naming the extra of a tracker whose package is not installed. Imports none."""
    missing = [name for name in names if util.find_spec(PACKAGES[name]) is None]
    if missing:
        raise TrainingUnavailable(
            f"ZLOOP_TRACKERS names {missing[0]}, which is not installed. Install it with "
            f"`pip install 'zephyr-loop[{missing[0]}]'`, or take it out of ZLOOP_TRACKERS; nothing was started."
        )


class Trackers:
    """The trackers of one run, opened at the first line."""

    def __init__(self, names: Sequence[str], run_dir: Path, earlier: Callable[[], list[dict[str, Any]]]) -> None:
        self._names = tuple(names)
        self._run_dir = run_dir
        self._earlier = earlier  # the lines of metrics.jsonl so far
        self._open: dict[str, Tracker] | None = None

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand on one line that is in metrics.jsonl already."""
        if self._open is None:
            self._open = {}
            lines = self._earlier()
            for name in self._names:
                self._guarded(name, partial(self._start, name, lines))
            return
        for name, tracker in list(self._open.items()):
            self._guarded(name, partial(_log, tracker, line))

    def close(self) -> None:
        """Flush and close them all."""
        for name, tracker in list((self._open or {}).items()):
            self._guarded(name, tracker.close)

    def _start(self, name: str, lines: list[dict[str, Any]]) -> None:
        assert self._open is not None
        folder = self._run_dir / name
        shutil.rmtree(folder, ignore_errors=True)
        tracker = _OPENERS[name](folder, self._run_dir.name)
        for line in lines:
            _log(tracker, line)
        self._open[name] = tracker

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - somebody else's package must not end a run
            print(f"The tracker {name} failed and is left out from here on: {type(error).__name__}: {error}")
            (self._open or {}).pop(name, None)


def _log(tracker: Tracker, line: Mapping[str, Any]) -> None:
    values = {key: value for key, value in line.items() if key not in NOT_VALUES and isinstance(value, int | float)}
    tracker.log(int(line["step"]), values)


class _TensorBoard:
    """Event files by torch's SummaryWriter."""

    def __init__(self, folder: Path, _run_id: str) -> None:
        self._writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter(log_dir=str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """A database of its own in the run directory; no dashboard is started, no hardware is watched."""

    def __init__(self, folder: Path, run_id: str) -> None:
        for name in _TRACKIO_ELSEWHERE:
            os.environ.pop(f"TRACKIO_{name}", None)
        os.environ["TRACKIO_DIR"] = str(folder)  # read when the package is imported
        trackio = importlib.import_module("trackio")
        self._run: Any = trackio.init(
            project=PROJECT, name=run_id, embed=False, resume="never", auto_log_gpu=False, auto_log_cpu=False
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_OPENERS: dict[str, Callable[[Path, str], Tracker]] = {"tensorboard": _TensorBoard, "trackio": _Trackio}
