"""Children: started apart, watched by id and start time, ended without a rest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainer import launch
from trainer.errors import TrainingUnavailable
from trainer.launch import Child, is_alive, kill_tree, start_evaluation, threads_per_process

SLEEP = "import time; time.sleep(300)"
# A launcher with one worker in its own session, which ignores SIGTERM, as stubborn as a worker can be.
LAUNCHER = """
import signal, subprocess, sys, time
worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
subprocess.Popen([sys.executable, "-c", worker, "trainer.job", sys.argv[2]], start_new_session=True)
time.sleep(300)
"""


def processes_of(run_dir: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if launch._belongs(process, str(run_dir))]


def wait_until(what: str, done: object, timeout_s: float = 20) -> None:
    assert callable(done)
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"after {timeout_s} s still not: {what}"
        time.sleep(0.05)


def start(run_dir: Path, code: str) -> Child:
    """A stand-in for a training child: our own starter, another program."""
    return launch._start(["-c", code, "trainer.job", str(run_dir)], run_dir, threads=1)


@pytest.mark.parametrize(("cores", "processes", "threads"), [(2, 1, 2), (2, 2, 1), (1, 2, 1), (16, 1, 16), (16, 3, 5)])
def test_processes_share_all_cores(cores: int, processes: int, threads: int) -> None:
    assert threads_per_process(cores, processes) == threads


def test_a_child_runs_apart_with_low_priority_and_a_log(tmp_path: Path) -> None:
    child = start(tmp_path, "import os; print('hello', os.environ['OMP_NUM_THREADS'], flush=True); " + SLEEP)
    try:
        process = psutil.Process(child.pid)
        assert is_alive(child.pid, child.start_time)
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
        assert process.nice() == launch.NICENESS
        assert process.cpu_affinity() == sorted(os.sched_getaffinity(0))
        wait_until("its words are in the log", lambda: "hello 1" in (tmp_path / "log.txt").read_text())
    finally:
        kill_tree(child.pid, child.start_time, tmp_path)
    assert not is_alive(child.pid, child.start_time)
    assert not psutil.pid_exists(child.pid), "a zombie is left"


def test_a_process_id_used_again_is_another_process() -> None:
    me = psutil.Process()
    assert is_alive(me.pid, me.create_time())
    assert not is_alive(me.pid, me.create_time() - 60)


def test_a_dead_child_is_dead_and_reaped(tmp_path: Path) -> None:
    child = start(tmp_path, "raise SystemExit(3)")
    wait_until("it is dead", lambda: not is_alive(child.pid, child.start_time))
    assert not psutil.pid_exists(child.pid)


def test_the_whole_tree_ends_even_a_worker_that_ignores_sigterm(tmp_path: Path) -> None:
    child = start(tmp_path, LAUNCHER)
    wait_until("the worker is up", lambda: "\nup\n" in (tmp_path / "log.txt").read_text())
    assert len(processes_of(tmp_path)) == 2
    kill_tree(child.pid, child.start_time, tmp_path, grace_s=0.5)
    assert processes_of(tmp_path) == []


def test_a_worker_whose_launcher_was_killed_is_found(tmp_path: Path) -> None:
    child = start(tmp_path, LAUNCHER)
    wait_until("the worker is up", lambda: "\nup\n" in (tmp_path / "log.txt").read_text())
    os.kill(child.pid, signal.SIGKILL)
    wait_until("the launcher is dead", lambda: not is_alive(child.pid, child.start_time))
    assert len(processes_of(tmp_path)) == 1
    kill_tree(child.pid, child.start_time, tmp_path, grace_s=0.5)
    assert processes_of(tmp_path) == []


def test_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine2").mkdir()
    bystanders = [
        subprocess.Popen([sys.executable, "-c", SLEEP, "trainer.job", str(tmp_path / "mine2")]),
        subprocess.Popen([sys.executable, "-c", SLEEP, str(tmp_path / "mine")]),
    ]
    child = start(tmp_path / "mine", SLEEP)
    kill_tree(child.pid, child.start_time, tmp_path / "mine")
    try:
        assert [process.poll() for process in bystanders] == [None, None]
    finally:
        for process in bystanders:
            process.kill()
            process.wait()


def test_killing_nothing_is_nothing(tmp_path: Path) -> None:
    kill_tree(None, None, tmp_path)
    own = psutil.Process()
    kill_tree(own.pid, own.create_time() - 100, tmp_path)  # this process id, but of another process long ago
    assert own.is_running()


def test_missing_packages_are_named_with_the_way_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.check_training_available()
    monkeypatch.setattr(launch, "_NEEDED", ("json", "no_such_trl"))
    with pytest.raises(TrainingUnavailable, match=r"no_such_trl.*zephyr-loop\[train\]"):
        launch.check_training_available()


def test_an_evaluation_without_its_input_says_so(tmp_path: Path) -> None:
    child = start_evaluation(tmp_path)
    wait_until("it is dead", lambda: not is_alive(child.pid, child.start_time), timeout_s=60)
    assert "no comparison.json" in (tmp_path / "failure.json").read_text()
    assert "Stopped: " in (tmp_path / "log.txt").read_text()
