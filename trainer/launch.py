"""Start, watch and end the children: `accelerate launch -m trainer.job RUN_DIR`, `python -m trainer.evaluate RUN_DIR`.

A child runs in its own session and prints to RUN_DIR/log.txt. It knows nothing of its parent and goes on when the
parent dies; a later parent finds it by process id and start time. It uses every core at a low priority: of two cores,
one left to the chat cost the training a quarter of its speed and made first tokens and pairs no faster, a lone answer
a fifth faster.

What accelerate is told is in `command.py`; this is the launcher `local` of `launchers/`. torch's elastic workers open
sessions of their own, so a tree is ended by its parent links and by RUN_DIR in the command lines. Linux and macOS;
scheduling hints only where the system has them. Not covered: several machines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import psutil

from feedback_store.clean_environment import clean_environment
from trainer.command import Launch, child_environment, training_arguments, write_accelerate_config
from trainer.errors import TrainingUnavailable

NICENESS = 10
START_TIME_TOLERANCE_S = 2.0
_NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "gguf", "scipy")
_CHILD_MODULES = ("trainer.job", "trainer.evaluate")


@dataclass(frozen=True, slots=True)
class Child:
    """A started process: its id and, because ids are used again, when it started (unix seconds)."""

    pid: int
    start_time: float


def check_training_available() -> None:
    """Raises TrainingUnavailable naming the packages that are missing. Imports none of them."""
    missing = [name for name in _NEEDED if util.find_spec(name) is None]
    if missing:
        raise TrainingUnavailable(
            f"Training needs packages that are not installed: {', '.join(missing)}. "
            "Install them with `pip install 'zephyr-loop[train]'` (or `make setup`), then start the run again."
        )


def gpu_count() -> int:
    """GPUs that torch can use here, found without importing torch: 0 for a CPU build of torch."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        if "+cpu" in metadata.version("torch"):
            return 0
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_training(
    run_dir: Path,
    *,
    num_processes: int,
    device: str = "cpu",
    cores: int | None = None,
    strategy: str | None = None,
    bf16: bool = False,
) -> Child:
    """Launch `trainer.job` on `run_dir` with accelerate. `strategy` None: what suits the number of processes."""
    strategy = strategy or ("single" if num_processes == 1 else "ddp")
    threads = threads_per_process(cores or available_cores(), num_processes)
    launch = Launch(strategy=strategy, num_processes=num_processes, device=device, bf16=bf16)
    write_accelerate_config(run_dir, launch)
    command = ["-m", "accelerate.commands.launch", *training_arguments(run_dir, threads)]
    return _start(command, run_dir, threads)


def start_evaluation(run_dir: Path, *, cores: int | None = None) -> Child:
    """Start `trainer.evaluate` on `run_dir`: one process."""
    threads = threads_per_process(cores or available_cores(), 1)
    return _start(["-m", "trainer.evaluate", str(run_dir.absolute())], run_dir, threads)


def threads_per_process(cores: int, num_processes: int) -> int:
    """Threads for each process where they share all cores; at least 1."""
    return max(1, cores // num_processes)


def is_alive(pid: int, start_time: float) -> bool:
    """True while that very process runs. A dead child of ours is reaped on the way."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - start_time) > START_TIME_TOLERANCE_S:
            return False
        if process.status() != psutil.STATUS_ZOMBIE:
            return True
    except psutil.NoSuchProcess:
        return False
    _reap(pid)
    return False


def kill_tree(pid: int | None, start_time: float | None, run_dir: Path, *, grace_s: float = 5.0) -> list[int]:
    """End every process of a run: SIGTERM, after `grace_s` SIGKILL. Returns the ids of those left after 10 s more.

    Finds them below `pid` and by `run_dir` in their command line, so workers whose launcher is gone are found too.
    """
    doomed = _family(pid, start_time, run_dir)
    if not doomed:
        return []
    _signal(doomed, signal.SIGTERM)
    psutil.wait_procs(doomed, timeout=grace_s)
    deadline = time.monotonic() + 10
    while (left := _family(pid, start_time, run_dir, doomed)) and time.monotonic() < deadline:
        _signal(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)
    return [process.pid for process in left]


def _start(command: list[str], run_dir: Path, threads: int) -> Child:
    arguments = [sys.executable, *command]
    with (run_dir / "log.txt").open("ab") as log, Path(os.devnull).open("rb") as nothing:
        log.write(f"\n$ python {' '.join(command)}\n".encode())
        log.flush()
        # Not subprocess.Popen: its object complains when a child outlives it, and ours is meant to.
        pid = os.posix_spawn(
            sys.executable,
            arguments,
            {**clean_environment(), **child_environment(threads)},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, nothing.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
            ],
            setsid=True,
            setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE],
            setsigmask=[],
        )
    with contextlib.suppress(psutil.NoSuchProcess):
        _lower_priority(pid)
    return Child(pid, _start_time(pid))


def _lower_priority(pid: int) -> None:
    """Nice the child and its scheduling group. Its children inherit it."""
    with contextlib.suppress(psutil.AccessDenied):
        psutil.Process(pid).nice(NICENESS)
    # With autogrouping a nice value counts only within a session; the session's own weight is here.
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(NICENESS), encoding="ascii")


def _start_time(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return time.time()


def _family(
    pid: int | None, start_time: float | None, run_dir: Path, known: Iterable[psutil.Process] = ()
) -> list[psutil.Process]:
    """Living processes of a run: the launcher, those that name the run directory, those known, and all below them."""
    roots = [process for process in psutil.process_iter() if _belongs(process, str(run_dir.absolute()))]
    if pid is not None and start_time is not None and is_alive(pid, start_time):
        roots.append(psutil.Process(pid))
    family = {process.pid: process for process in [*roots, *known]}
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= {process.pid: process for process in root.children(recursive=True)}
    return [process for process in family.values() if process.pid != os.getpid() and _runs(process)]


def _belongs(process: psutil.Process, run_dir: str) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return run_dir in words and any(module in words for module in _CHILD_MODULES)


def _runs(process: psutil.Process) -> bool:
    """False for a process that is gone or a zombie; ours are reaped, the others have a parent that will."""
    try:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return True
    except psutil.NoSuchProcess:
        return False
    _reap(process.pid)
    return False


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
