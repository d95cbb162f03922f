"""sbatch, squeue, scancel and sinfo for one machine: they run batch scripts for real, in the background.

`install(bin_dir, state_dir)` puts the four commands into a directory for PATH. A job is its processes: those that have
its SLURM_JOB_ID in their environment, whatever sessions they opened, as with Slurm's own tracking. Like Slurm, scancel
sends SIGTERM and leaves SIGKILL to whoever asks for it (Slurm's own comes 30 s later).
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scancel", "sinfo")


def install(bin_dir: Path, state_dir: Path) -> None:
    """Make the commands in `bin_dir`; they keep their jobs in `state_dir`."""
    bin_dir.mkdir(parents=True)
    state_dir.mkdir(parents=True)
    for name in COMMANDS:
        command = bin_dir / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {state_dir} {name} "$@"\n')
        command.chmod(command.stat().st_mode | stat.S_IXUSR)


def processes_of(job_id: str) -> list[int]:
    """Living processes of a job."""
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [pid for pid in pids if _belongs(pid, job_id)]


def _belongs(pid: int, job_id: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        zombie = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
    return f"SLURM_JOB_ID={job_id}".encode() in environment and not zombie


def sbatch(state: Path, arguments: list[str]) -> None:
    if (state / "refuse").exists():
        sys.exit("sbatch: error: invalid partition specified: gpu")
    script = Path(arguments[-1])
    (state / "options").write_text(" ".join(arguments[:-1]))
    directives = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.read_text().splitlines()
        if line.startswith("#SBATCH --")
    )
    job_id = str(1000 + len(list(state.glob("*.name"))))
    (state / f"{job_id}.name").write_text(directives["job-name"])
    environment = {**os.environ, "SLURM_JOB_ID": job_id, "SLURM_CPUS_PER_TASK": directives["cpus-per-task"]}
    with Path(directives["output"]).open("ab") as log:
        subprocess.Popen(
            ["/bin/bash", str(script)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=directives["chdir"],
            start_new_session=True,
        )
    print(job_id)


def squeue(state: Path, arguments: list[str]) -> None:
    if (state / "away").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    for job_id in _chosen(state, arguments):
        ended = state / f"{job_id}.ended"
        if ended.exists() and "all" in arguments:
            print(ended.read_text())
        elif processes_of(job_id):
            print("RUNNING")


def scancel(state: Path, arguments: list[str]) -> None:
    number = signal.SIGKILL if "--signal=KILL" in arguments else signal.SIGTERM
    for job_id in _chosen(state, arguments):
        for pid in processes_of(job_id):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def sinfo(_state: Path, _arguments: list[str]) -> None:
    print("here|(null)")


def _chosen(state: Path, arguments: list[str]) -> list[str]:
    names = {path.stem: path.read_text() for path in state.glob("*.name")}
    asked = {argument.removeprefix("--name=") for argument in arguments if argument.startswith("--name=")}
    return [job_id for job_id, name in names.items() if name in asked or job_id in arguments]


if __name__ == "__main__":
    {"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "sinfo": sinfo}[sys.argv[2]](
        Path(sys.argv[1]), sys.argv[3:]
    )
