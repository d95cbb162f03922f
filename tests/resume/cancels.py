"""How long a cancelled run takes to leave no process, cancelled in each of its stages."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from test_supervisor import Place, processes_of

from trainer.base_model import BaseModel
from trainer.checkpoints import FOLDER, MANIFEST
from trainer.runs import Run, RunState
from trainer.supervisor import Supervisor

PATIENCE_S = 240
STAGES: dict[str, Callable[[Run], bool]] = {
    "loading the model": lambda run: run.progress.get("stage") == "loading",
    "training": lambda run: bool(run.metrics()),
    "saving a checkpoint": lambda run: bool(_unfinished(run)),
    "evaluating": lambda run: bool(run.progress.get("evaluation")),
}


def run(directory: Path, base: BaseModel, times: int) -> dict[str, list[float]]:
    """Seconds from the call to the state `cancelled` with no process left, so often for each stage."""
    place = Place(directory)
    supervisor = Supervisor(directory, base, place.freeze, lambda: "v0")
    supervisor.start()
    taken: dict[str, list[float]] = {stage: [] for stage in STAGES}
    try:
        for stage, is_there in STAGES.items():
            for _ in range(times):
                taken[stage].append(_cancel(supervisor, is_there, max_steps=1 if stage == "evaluating" else 20))
    finally:
        supervisor.stop()
    return taken


def _cancel(supervisor: Supervisor, is_there: Callable[[Run], bool], max_steps: int) -> float:
    run, deadline = supervisor.start_run(max_steps=max_steps), time.monotonic() + PATIENCE_S
    while not is_there(run):
        assert run.is_active, run.error
        assert time.monotonic() < deadline
        time.sleep(0.002)
    began = time.monotonic()
    supervisor.cancel(run.run_id)
    assert supervisor.wait(run.run_id, PATIENCE_S).state is RunState.CANCELLED
    taken = time.monotonic() - began
    assert processes_of(run) == []
    return taken


def _unfinished(run: Run) -> list[Path]:
    return [path for path in (run.directory / FOLDER).glob("checkpoint-*") if not (path / MANIFEST).exists()]
