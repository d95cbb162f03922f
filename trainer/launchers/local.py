"""Children on this machine: processes of their own session, found again by process id and start time (`launch.py`)."""

from __future__ import annotations

from pathlib import Path

from trainer.launch import gpu_count, is_alive, kill_tree, start_evaluation, start_training
from trainer.launchers import TRAINING, Job, Work


class LocalLauncher:
    """The default: nothing but this machine."""

    settle_s = 0.0

    def gpus(self) -> int:
        return gpu_count()

    def start(self, work: Work) -> Job:
        launch = work.launch
        assert launch.machines == 1, "the supervisor refuses more"
        if work.stage == TRAINING:
            child = start_training(
                work.run_dir,
                num_processes=launch.num_processes,
                device=launch.device,
                cores=work.cores,
                strategy=launch.strategy,
                bf16=launch.bf16,
            )
        else:
            child = start_evaluation(work.run_dir, cores=work.cores)
        return Job("local", str(child.pid), child.start_time)

    def is_alive(self, job: Job, run_dir: Path) -> bool:  # noqa: ARG002 - the port's
        return is_alive(int(job.id), job.start_time or 0.0)

    def end(self, job: Job | None, run_dir: Path) -> str | None:
        left = kill_tree(None if job is None else int(job.id), None if job is None else job.start_time, run_dir)
        if not left:
            return None
        return f"Its processes {', '.join(map(str, left))} could not be killed; they may hang on a disk or a GPU."

    def submission(self, work: Work) -> None:  # noqa: ARG002 - the port's
        return None
