"""The run directory: the contract between the parent (`cycle.py`) and its children (`job.py`, `evaluate.py`).

    runs/<run_id>/
      config.json       what was asked for, resolved; written once                            parent
      state.json        queued → preparing → training → evaluating → finished|failed|cancelled parent
      comparison.json   what `evaluate.py` compares with what; written before it starts       parent
      progress.json     stage, step, pairs evaluated so far, and the child's heartbeat        child
      metrics.jsonl     one line a step                                                       child
      accelerate.yaml   the accelerate configuration, written before the start                launcher
      log.txt           what the children print                                               child
      adapter/          the adapter, PEFT form; adapter.gguf beside it, GGUF form             child
      model/            or the whole model, where every weight moved; model.gguf beside it    child
      checkpoints/      where a killed training goes on from (`checkpoints.py`)               child
      training.json     the result of training, written last                                  child
      validation.json   how the reference scores the rows kept aside; best/ the best weights   child
      tensorboard/, trackio/   the same lines as metrics.jsonl, where asked for                child
      evaluation.json   the result of the evaluation, written last                            child
      report.html       all of it for people, written after the end (`report.py`)              parent
      failure.json      a child's own sentence about why it stopped                           child

Each file has one writer, so nothing is locked across processes, and a server that was killed finds all of it again.
A directory without config.json does not exist.

Not covered: starting and stopping processes (`launch.py`), when a child is started again (`restarts.py`).
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from feedback_store.durable import is_plain_name, new_directory, read_json, sync, write_json
from trainer.errors import RunNotFound

log = logging.getLogger(__name__)

BEST = "best"


class RunState(StrEnum):
    QUEUED = "queued"
    PREPARING = "preparing"
    TRAINING = "training"
    EVALUATING = "evaluating"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({RunState.FINISHED, RunState.FAILED, RunState.CANCELLED})
_ALLOWED = {
    RunState.QUEUED: {RunState.PREPARING, RunState.FAILED, RunState.CANCELLED},
    RunState.PREPARING: {RunState.TRAINING, RunState.EVALUATING, RunState.FAILED, RunState.CANCELLED},
    RunState.TRAINING: {RunState.EVALUATING, RunState.FAILED, RunState.CANCELLED},
    RunState.EVALUATING: {RunState.FINISHED, RunState.FAILED, RunState.CANCELLED},
}


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What a run was asked to do, with every default filled in. Paths are absolute."""

    run_id: str
    created_at: str
    recipe: dict[str, Any]
    recipe_name: str
    seed: int
    num_processes: int
    max_steps: int | None
    practice: str | None
    base: dict[str, str | None]
    models_dir: str
    snapshot: dict[str, Any]
    device: str
    requested_by: str
    trackers: list[str] = field(default_factory=list)
    launch: dict[str, Any] = field(default_factory=dict)  # see command.Launch
    preflight: dict[str, Any] | None = None
    without: list[str] = field(default_factory=list)  # raters whose rows were left out on request


class Run:
    """A handle on one run directory. Properties read the files, so every handle sees the present state."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.run_id = directory.name
        self._writing = threading.RLock()

    @classmethod
    def create(cls, runs_dir: Path, config: RunConfig) -> Run:
        """Make the directory of a new run, state `queued`, in one rename."""
        with new_directory(runs_dir / config.run_id) as directory:
            write_json(directory / "config.json", asdict(config))
            write_json(directory / "state.json", {"state": RunState.QUEUED.value, "updated_at": time.time()})
        return cls(runs_dir / config.run_id)

    @classmethod
    def open(cls, runs_dir: Path, run_id: str) -> Run:
        """The run called `run_id`. Raises RunNotFound."""
        if not is_plain_name(run_id) or not (runs_dir / run_id / "config.json").is_file():
            raise RunNotFound(run_id)
        return cls(runs_dir / run_id)

    # What was asked, where it stands

    @property
    def config(self) -> RunConfig:
        return RunConfig(**(read_json(self.directory / "config.json") or {}))

    @property
    def record(self) -> dict[str, Any]:
        """All of state.json."""
        return read_json(self.directory / "state.json") or {"state": RunState.QUEUED.value}

    @property
    def state(self) -> RunState:
        return RunState(self.record["state"])

    @property
    def is_active(self) -> bool:
        return self.state not in ENDED

    @property
    def is_finished(self) -> bool:
        return self.state is RunState.FINISHED

    @property
    def error(self) -> str | None:
        return self.record.get("error")

    @property
    def version(self) -> str | None:
        """The version this run published, if it did."""
        return self.record.get("version")

    @property
    def verdict(self) -> dict[str, Any] | None:
        """{"decision", "reasons"} once judged."""
        return self.record.get("verdict")

    @property
    def training(self) -> dict[str, Any] | None:
        return read_json(self.directory / "training.json")

    @property
    def evaluation(self) -> dict[str, Any] | None:
        return read_json(self.directory / "evaluation.json")

    @property
    def failure(self) -> str | None:
        """The sentence a child left behind when it stopped by itself."""
        return (read_json(self.directory / "failure.json") or {}).get("reason")

    @property
    def failure_kind(self) -> str | None:
        """The name of the error behind `failure`."""
        return (read_json(self.directory / "failure.json") or {}).get("kind")

    @property
    def halvings(self) -> int:
        """How often the micro batch was halved for lack of memory."""
        return int(self.record.get("halvings", 0))

    @property
    def deadline(self) -> float | None:
        """Unix seconds at which the run is to be stopped, None: never. Counted from its start or its last resume."""
        minutes, since = self.config.recipe.get("deadline_minutes"), self.record.get("started_at")
        return since + 60 * minutes if minutes and since else None

    @property
    def progress(self) -> dict[str, Any]:
        return read_json(self.directory / "progress.json") or {}

    @property
    def weights(self) -> Path:
        """What the run trained: its whole model, else its adapter, there or still to come."""
        model = self.directory / "model"
        return model if model.is_dir() else self.directory / "adapter"

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl written so far; a last line still being written is left out."""
        return [json.loads(line) for line in self._lines("metrics.jsonl") if line.endswith("}")]

    def log_tail(self, n: int) -> list[str]:
        """The last `n` lines of the children's log that are not blank."""
        return [line.rstrip() for line in self._lines("log.txt") if line.strip()][-n:]

    def _lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []

    # Transitions: the parent's alone

    def move(self, state: RunState, **details: Any) -> None:
        """Write a new state with `details`. A run that has ended stays as it is, unless it is reopened."""
        with self._writing:
            record = self.record
            before = RunState(record["state"])
            if state is not before:
                assert state in _ALLOWED.get(before, set()), f"run {self.run_id}: {before} → {state}"
            write_json(
                self.directory / "state.json", {**record, "state": state.value, **details, "updated_at": time.time()}
            )

    def note(self, **details: Any) -> None:
        """Add `details` to state.json, the state unchanged."""
        with self._writing:
            self.move(self.state, **details)

    def restart(self, **details: Any) -> None:
        """The child is gone and another one is to follow; what the gone one said about its end is forgotten."""
        (self.directory / "failure.json").unlink(missing_ok=True)
        resumed = self.record.get("resumed", 0) + 1
        self.note(child=None, pid=None, process_start_time=None, job_id=None, resumed=resumed, **details)

    def reopen(self) -> None:
        """Back to `queued` after a failure or a cancelling: it goes on from its last checkpoint, and is judged anew."""
        assert not self.is_active, f"run {self.run_id} is {self.state} and was resumed"
        kept = {key: value for key, value in self.record.items() if key in ("cores", "halvings")}
        resumed = self.record.get("resumed", 0) + 1
        with self._writing:
            # What needs room comes first: on a full disk the run stays as it was.
            reopened = self.directory / ".reopened.json"
            write_json(
                reopened, {**kept, "state": RunState.QUEUED.value, "resumed": resumed, "updated_at": time.time()}
            )
            for name in ("failure.json", "evaluation.json"):
                (self.directory / name).unlink(missing_ok=True)
            reopened.replace(self.directory / "state.json")
            sync(self.directory)

    def end(self, state: RunState, **details: Any) -> None:
        """The last transition: finished, failed or cancelled."""
        self.move(state, **details, pid=None, process_start_time=None, finished_at=_now())

    # What the world sees

    def as_body(self) -> dict[str, Any]:
        """The body of GET /v1/runs/{id}."""
        config, record, lines, progress = self.config, self.record, self.metrics(), self.progress
        metrics = [line for line in lines if "loss" in line]
        validations = [line for line in lines if "loss" not in line][-1:]
        step = int(metrics[-1]["step"]) if metrics else 0
        total_steps = int(progress.get("total_steps") or config.snapshot["planned_steps"])
        evaluation = self.evaluation
        return {
            "run_id": self.run_id,
            "state": record["state"],
            "step": step,
            "total_steps": total_steps,
            "eta_s": self._eta_s(RunState(record["state"]), metrics, total_steps, progress),
            "metrics": {key: value for line in [*validations, *metrics[-1:]] for key, value in _numbers(line).items()},
            "version": record.get("version"),
            "verdict": record.get("verdict"),
            "error": record.get("error"),
            "recipe": config.recipe_name,
            "method": config.recipe.get("method", "dpo"),
            "tuning": config.recipe.get("tuning", "lora"),
            "practice": config.practice,
            "snapshot": config.snapshot["hash"],
            "without": config.without,
            "num_processes": config.num_processes,
            "created_at": config.created_at,
            "finished_at": record.get("finished_at"),
            "champion": record.get("champion"),
            "evaluation": summary(evaluation) if evaluation else None,
            "evaluation_progress": progress.get("evaluation"),
            "resumed": record.get("resumed", 0),
            "preflight": compared(config.preflight, self.training, self._total_s(record)),
        }

    def _total_s(self, record: dict[str, Any]) -> float | None:
        """Seconds from the start to the end, None before."""
        if not record.get("finished_at"):
            return None
        began, ended = (datetime.fromisoformat(when) for when in (self.config.created_at, record["finished_at"]))
        return max(0.0, (ended - began).total_seconds())

    @staticmethod
    def _eta_s(
        state: RunState, metrics: list[dict[str, Any]], total_steps: int, progress: dict[str, Any]
    ) -> float | None:
        """Seconds to the end of the stage that is going on, from the pace so far; None while there is none."""
        if state is RunState.EVALUATING and progress.get("evaluation"):
            done, total = progress["evaluation"]["done"], progress["evaluation"]["total"]
            return round((total - done) * (progress["time"] - progress["since"]) / done, 1) if done else None
        if state is RunState.TRAINING and metrics and progress.get("since"):
            steps = metrics[-1]["step"] - progress.get("from_step", 0)
            pace_s = (metrics[-1]["time"] - progress["since"]) / steps if steps > 0 else None
            return pace_s and float(round(max(0.0, (total_steps - metrics[-1]["step"]) * pace_s), 1))
        return None


def new_run_id(now: datetime) -> str:
    """An id that sorts by time, such as run_20261122-231500_ab12."""
    return f"run_{now:%Y%m%d-%H%M%S}_{secrets.token_hex(2)}"


def list_runs(runs_dir: Path) -> list[Run]:
    """All runs, newest first; one whose files cannot be read is left out, and said to be in the log."""
    found: list[tuple[str, str, Run]] = []
    for path in runs_dir.glob("run_*/config.json"):
        run = Run(path.parent)
        try:
            created_at, _ = run.config.created_at, run.state
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s is left out: %s", run.directory, error)
        else:
            found.append((created_at, run.run_id, run))
    return [run for *_, run in sorted(found, key=lambda one: one[:2], reverse=True)]


def summary(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation without its list of pairs."""
    keys = ("wins", "ties", "losses", "p_value", "interval", "win_rate", "mean_margin", "pairs")
    return {key: evaluation[key] for key in keys}


def compared(
    said: dict[str, Any] | None, training: dict[str, Any] | None, total_s: float | None
) -> dict[str, Any] | None:
    """The preflight's estimate beside what happened; `ratio` is actual / estimated, None while it is not known."""
    if not said or not said["estimate"]:
        return None
    estimate, measured = said["estimate"], (training or {}).get("measured")
    actual: dict[str, float | None] = {"memory_bytes": None, "training_s": None, "total_s": total_s}
    if measured:
        actual["memory_bytes"] = measured["peak_device_memory_bytes"] or measured["peak_memory_bytes"]
        actual["training_s"] = measured["training_s"]
    return {
        **{key: said[key] for key in ("sentence", "policy", "warning")},
        **{key: estimate[key] for key in (*actual, "basis")},
        "actual": actual,
        "ratio": {
            key: round(value / estimate[key], 2) if value is not None and estimate[key] else None
            for key, value in actual.items()
        },
    }


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("step", "time")}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
