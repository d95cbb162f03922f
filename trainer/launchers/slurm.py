"""Children as Slurm jobs: a batch script in the run directory, `sbatch`, `squeue`, `scancel`.

    runs/<run_id>/training.sbatch, evaluation.sbatch      what was submitted; `sbatch training.sbatch` does it again

One task per machine, in which accelerate starts that machine's processes. The run directory, the Python environment
and the base model are read at the same path on every machine. Options of a site (partition, account, time, CPUs) come
from ZLOOP_SLURM_OPTIONS and go to `sbatch` itself, so they win over what the script says.

While Slurm does not answer, a job counts as alive. `sacct` is asked only about jobs that `squeue` has forgotten.
Not covered: requeueing by Slurm (the script forbids it), containers.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from feedback_store.clean_environment import clean_environment
from feedback_store.durable import write_json
from trainer.command import accelerate_launch, child_environment, training_arguments, write_accelerate_config
from trainer.errors import LaunchFailed, TrainingUnavailable
from trainer.launchers import TRAINING, Job, Work

ASK_EVERY_S = 3.0
ANSWER_WITHIN_S = 20.0
LOGIN = ("SLURM_JWT",)
"""What Slurm's commands need to log in where its own keys do not; the job itself is not given it."""
TERM_S, GONE_S = 5.0, 12.0
CPUS_PER_PROCESS = {"cpu": 1, "gpu": 4}
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
LOST = ("BOOT_FAIL", "NODE_FAIL", "PREEMPTED")  # not the run's fault: the log says it
WHY = {
    "CANCELLED": "somebody cancelled it with scancel",
    "DEADLINE": "it could not end before its deadline",
    "OUT_OF_MEMORY": "it used more memory than it had asked for; raise --mem in ZLOOP_SLURM_OPTIONS",
    "TIMEOUT": "it ran longer than its time limit; raise --time in ZLOOP_SLURM_OPTIONS",
}


class SlurmLauncher:
    """Runs on the cluster that `sbatch` on this machine submits to. `options`: more options for it, as in a shell."""

    settle_s = 40.0

    def __init__(self, options: str = "") -> None:
        self._options = shlex.split(options)
        self._asked_at = float("-inf")
        self._alive = True

    def gpus(self) -> int:
        if shutil.which("sbatch") is None:
            raise TrainingUnavailable(
                "The launcher is slurm, but there is no `sbatch` here. Start Zephyr Loop where jobs are submitted, "
                "or use ZLOOP_LAUNCHER=local."
            )
        listed = _ask("sinfo", "-h", "-N", "-o", "%N|%G")
        if listed.returncode != 0:
            raise TrainingUnavailable(f"Slurm does not answer: {listed.stderr.strip()}")
        nodes = dict(line.split("|", 1) for line in listed.stdout.splitlines() if "|" in line)  # one in each partition
        return sum(gpus_of(resources) for resources in nodes.values())

    def start(self, work: Work) -> Job:
        path = work.run_dir.absolute() / f"{work.stage}.sbatch"
        if work.stage == TRAINING:
            write_accelerate_config(work.run_dir, work.launch)
        path.write_text(batch_script(work), encoding="utf-8")
        self._asked_at, self._alive = float("-inf"), True
        answer = _ask("sbatch", "--parsable", *self._options, str(path))
        if answer.returncode != 0:
            raise LaunchFailed(f"sbatch refused {path}: {answer.stderr.strip() or answer.stdout.strip()}")
        return Job("slurm", answer.stdout.strip().splitlines()[-1].partition(";")[0])

    def is_alive(self, job: Job, run_dir: Path) -> bool:
        if time.monotonic() - self._asked_at >= ASK_EVERY_S:
            self._asked_at = time.monotonic()
            state = state_of(job.id)
            self._alive = state is None or state not in ENDED
            if not self._alive and state is not None:
                _explain(job, state, run_dir)
        return self._alive

    def end(self, job: Job | None, run_dir: Path) -> str | None:
        jobs = [f"--name={run_dir.name}-{stage}" for stage in ("training", "evaluation")] if job is None else [job.id]
        if job is None and not _queued(jobs):
            return None
        began = time.monotonic()
        for which in jobs:
            _ask("scancel", which)  # one that waits is gone at once; one that runs gets SIGTERM
        while _queued(jobs) and time.monotonic() - began < GONE_S:
            if time.monotonic() - began > TERM_S:
                for which in jobs:
                    _ask("scancel", "--signal=KILL", "--full", which)  # Slurm itself would wait for KillWait, 30 s
            time.sleep(0.5)
        if not _queued(jobs):
            return None
        named = f"its jobs named {run_dir.name}-…" if job is None else f"its job {job.id}"
        return f"Slurm did not say within {GONE_S:.0f} s that {named} ended: look with squeue, end it with scancel."

    def submission(self, work: Work) -> str:
        submit = shlex.join(["sbatch", *self._options, str(work.run_dir.absolute() / f"{work.stage}.sbatch")])
        return f"# {submit}\n{batch_script(work)}"


def batch_script(work: Work) -> str:
    """The script of one child: resources, environment, and the line."""
    launch, run_dir = work.launch, work.run_dir.absolute()
    machines = launch.machines if work.stage == TRAINING else 1
    processes = work.processes // machines
    directives = [
        f"--job-name={work.name}",
        f"--output={run_dir / 'log.txt'}",
        "--open-mode=append",
        f"--chdir={run_dir}",
        f"--nodes={machines}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={processes * CPUS_PER_PROCESS[launch.device]}",
        "--no-requeue",
    ]
    if launch.device == "gpu":
        directives.append(f"--gpus-per-node={processes}")
    if work.stage == TRAINING:
        several = ("--machine_rank", "@RANK", "--main_process_ip", "@HEAD") if machines > 1 else ()
        words = [*accelerate_launch(), *training_arguments(run_dir, "@THREADS", *several)]
    else:
        words = [sys.executable, "-m", "trainer.evaluate", str(run_dir)]
    line = shlex.join(words).replace("@THREADS", '"$threads"')
    if machines > 1:  # each task of srun reads its own rank
        inner = line.replace("@RANK", '"$SLURM_NODEID"').replace("@HEAD", '"$head"')
        # Since Slurm 22.05 a step has one CPU unless it says otherwise, whatever the job has.
        cpus = f'--cpus-per-task="${{SLURM_CPUS_PER_TASK:-{processes}}}"'
        line = f"srun --kill-on-bad-exit=1 {cpus} bash -c {shlex.quote('exec ' + inner)}"
    exports = {**child_environment("@THREADS")}
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {directive}" for directive in directives),
            "set -eu",
            f"unset {' '.join(LOGIN)}",
            "umask 077",
            f"threads=$(( ${{SLURM_CPUS_PER_TASK:-{processes}}} / {processes} ))",
            "[ $threads -gt 0 ] || threads=1",
            "export threads",
            *(f"export {name}={shlex.quote(value).replace('@THREADS', '$threads')}" for name, value in exports.items()),
            *(['export head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'] if machines > 1 else []),
            line if machines > 1 else f"exec {line}",
            "",
        ]
    )


def state_of(job_id: str) -> str | None:
    """The job's state in Slurm's word; COMPLETED when nobody knows it any more, None when Slurm does not answer."""
    listed = _ask("squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T")
    if listed.returncode != 0 and "Invalid job id" not in listed.stderr:
        return None
    states = listed.stdout.split()
    if not states and shutil.which("sacct") is not None:
        known = _ask("sacct", "-n", "-X", "-P", "-j", job_id, "-o", "State").stdout
        states = known.split()[:1]  # such as `CANCELLED by 0`
    return states[0] if states else "COMPLETED"


def gpus_of(resources: str) -> int:
    """GPUs in a node's generic resources, such as `gpu:a100:4(S:0-1),shard:8`."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", resources))


def _explain(job: Job, state: str, run_dir: Path) -> None:
    """Leave behind why Slurm ended a job, where the child had no time to say anything."""
    if state in LOST:
        with (run_dir / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"Slurm ended job {job.id}: {state}\n")
    elif state in WHY and not (run_dir / "failure.json").exists():
        kind = {"kind": "OutOfMemory"} if state == "OUT_OF_MEMORY" else {}
        reason = f"Slurm ended job {job.id} ({state}): {WHY[state]}."
        write_json(run_dir / "failure.json", {"stage": "launch", "reason": reason, **kind})


def _queued(jobs: list[str]) -> bool:
    """Is one of these (ids, or --name=…) waiting or running?"""
    for which in jobs:
        option = [which] if which.startswith("--name=") else ["-j", which]
        listed = _ask("squeue", "-h", "-o", "%T", *option)
        if listed.returncode != 0 and "Invalid job id" not in listed.stderr:
            return True  # not known: ask again
        if any(state not in ENDED for state in listed.stdout.split()):
            return True
    return False


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; one that hangs or is missing counts as failed."""
    try:
        return subprocess.run(
            command,
            env=clean_environment(keep=LOGIN),
            capture_output=True,
            text=True,
            timeout=ANSWER_WITHIN_S,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
