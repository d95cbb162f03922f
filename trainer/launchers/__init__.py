"""The port to whatever starts a run's children: this machine, Slurm or Ray.

A run is (launcher, run directory): the children read and write the run directory, so state, metrics and results come
back by being files there; Slurm and Ray need it on a file system that all machines share, at the same path, as is the
Python environment. A started child is a `Job`, noted in state.json, by which a later server finds it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.command import Launch

TRAINING, EVALUATION = "training", "evaluation"


@dataclass(frozen=True, slots=True)
class Job:
    """A started child: `id` is a process id, a Slurm job id or a Ray submission id.

    Process ids are used again, so a local one has its start time (unix seconds) beside it.
    """

    launcher: str
    id: str
    start_time: float | None = None

    @property
    def pid(self) -> int | None:
        """The process on this machine, None where it runs elsewhere."""
        return int(self.id) if self.launcher == "local" else None

    def as_record(self) -> dict[str, Any]:
        """What state.json holds."""
        if self.launcher == "local":
            return {"job_id": None, "pid": int(self.id), "process_start_time": self.start_time}
        return {"job_id": self.id, "pid": None, "process_start_time": None}


@dataclass(frozen=True, slots=True)
class Work:
    """One child to be started. `cores`: what this machine may use; None for all."""

    run_dir: Path
    stage: str
    launch: Launch
    cores: int | None = None

    @property
    def name(self) -> str:
        """The name a queue shows; the same child of a run always has the same one."""
        return f"{self.run_dir.name}-{self.stage}"

    @property
    def processes(self) -> int:
        return self.launch.num_processes if self.stage == TRAINING else 1


class Launcher(Protocol):
    """Starts children, sees them live, ends them.

    `settle_s`: how much later than its end a child's files may be seen.
    """

    settle_s: float

    def gpus(self) -> int:
        """GPUs there are, 0 for none. Raises TrainingUnavailable where the launcher cannot be used at all."""

    def start(self, work: Work) -> Job:
        """Start a child, or put it in the queue. Raises LaunchFailed."""

    def is_alive(self, job: Job, run_dir: Path) -> bool:
        """False once the child is gone. True while that cannot be learned: a queue that is away ends no run."""

    def end(self, job: Job | None, run_dir: Path) -> str | None:
        """End every process of a run, also one whose job was never noted.

        Returns None when none is left, and a sentence where that could not be seen in time.
        """

    def submission(self, work: Work) -> str | None:
        """What is handed to a queue, for a person to read; None where there is no queue."""


def job_of(record: dict[str, Any], launcher: str) -> Job | None:
    """The job that state.json names."""
    if launcher == "local":
        pid = record.get("pid")
        return None if pid is None else Job("local", str(pid), record.get("process_start_time"))
    job_id = record.get("job_id")
    return None if job_id is None else Job(launcher, job_id)


def launcher_for(launch: Launch) -> Launcher:
    """The launcher that `launch` names, with its options."""
    from trainer.launchers.local import LocalLauncher
    from trainer.launchers.ray import RayLauncher
    from trainer.launchers.slurm import SlurmLauncher

    if launch.launcher == "slurm":
        return SlurmLauncher(launch.options)
    return RayLauncher(launch.options) if launch.launcher == "ray" else LocalLauncher()
