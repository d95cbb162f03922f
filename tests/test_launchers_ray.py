"""Ray: a run on a local cluster with two CPU workers, over the cluster's own HTTP interface."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from socket import socket

import httpx
import psutil
import pytest
from test_supervisor import Place

from trainer.errors import TrainingUnavailable
from trainer.launchers import Job
from trainer.launchers.ray import RayLauncher
from trainer.runs import Run, RunState
from trainer.supervisor import Supervisor

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'zephyr-loop[ray]'")
WORKER_PORTS = 20


def free_ports(count: int) -> list[int]:
    sockets = [socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def end_all(directory: str) -> None:
    """End a cluster. Ray names its directory in most command lines; the others, renamed, are children of those."""
    family: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(directory in word for word in process.cmdline()):
                family |= {process, *process.children(recursive=True)}
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert not psutil.wait_procs(family, timeout=10)[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of this machine alone, with two CPUs; its URL."""
    gcs, dashboard, agent, client, metrics = free_ports(5)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as directory:  # its sockets need a short path
        options = {
            "port": gcs, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client, "metrics-export-port": metrics, "node-ip-address": "127.0.0.1",
            "num-cpus": 2, "object-store-memory": 80_000_000, "temp-dir": directory,
        }  # fmt: skip
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in options.items()]
        command += ["--include-dashboard=true", "--min-worker-port=0", "--max-worker-port=0"]
        started = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert started.returncode == 0, started.stdout + started.stderr
        url = f"http://127.0.0.1:{dashboard}"
        wait_until("the cluster answers", lambda: answers(url))
        yield url
        end_all(directory)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/api/jobs/", timeout=5).is_success
    except httpx.HTTPError:
        return False


def wait_until(what: str, done: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"after {timeout_s} s still not: {what}"
        time.sleep(0.05)


def supervisor_of(place: Place, url: str) -> Supervisor:
    base = place.supervisor().base
    options = {"ray": url}
    return Supervisor(place.directory, base, place.freeze, lambda: "v0", launcher="ray", launcher_options=options)


def workers() -> list[psutil.Process]:
    """Ray renames a worker's process after what it runs."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ray::Worker" in " ".join(process.info["cmdline"] or [])
    ]


def drivers(run: Run) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"trainer.launchers.ray_workers", str(run.directory)} <= set(process.info["cmdline"] or [])
    ]


def test_a_run_on_two_workers_outlives_its_server_and_is_judged_there_too(cluster: str, tmp_path: Path) -> None:
    place = Place(tmp_path / "data")
    first = supervisor_of(place, cluster)
    first.start()
    run = first.start_run(max_steps=2, num_processes=2)
    wait_until("the training is submitted", lambda: run.record.get("job_id"))
    first.stop()
    second = place.supervisor()  # its own runs would be local
    second.start()
    try:
        wait_until("two workers train", lambda: len(workers()) == 2)
        wait_until("a pair is judged, or it failed", lambda: not run.is_active or run.progress.get("evaluation"), 120)
        assert run.error is None
        assert run.state is RunState.EVALUATING
        second.cancel(run.run_id)  # the whole evaluation takes longer, and is not Ray's doing
        assert second.wait(run.run_id, 15).state is RunState.CANCELLED
    finally:
        second.stop()
    assert run.training is not None
    assert [line["step"] for line in run.metrics()] == [1, 2]
    submission = second.command(run.run_id)["submission"]
    assert submission.startswith(f"ray job submit --address {cluster} -- env ")
    assert submission.endswith(f"trainer.launchers.ray_workers {run.directory} training --workers 2 --threads 1\n")
    wait_until("no process is left", lambda: not workers() and not drivers(run), timeout_s=15)


def test_cancelling_leaves_no_process(cluster: str, tmp_path: Path) -> None:
    supervisor = supervisor_of(Place(tmp_path / "data"), cluster)
    supervisor.start()
    try:
        run = supervisor.start_run(num_processes=2)
        wait_until("two workers run", lambda: len(workers()) == 2)
        wait_until("they train", run.metrics)
        began = time.monotonic()
        supervisor.cancel(run.run_id)
        assert supervisor.wait(run.run_id, 15).state is RunState.CANCELLED
        wait_until("no process is left", lambda: not workers() and not drivers(run), timeout_s=15)
        assert time.monotonic() - began < 15
    finally:
        supervisor.stop()


def test_a_killed_worker_takes_the_other_with_it_and_the_run_goes_on(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RayLauncher, "settle_s", 0.5)
    monkeypatch.setattr("trainer.restarts.PAUSES_S", (0.0, 0.0, 0.0))
    supervisor = supervisor_of(Place(tmp_path / "data"), cluster)
    supervisor.start()
    try:
        run = supervisor.start_run(max_steps=2, num_processes=2)
        wait_until("two workers run", lambda: len(workers()) == 2)
        family = workers()
        family[0].kill()
        wait_until("another training is submitted", lambda: run.record.get("resumed") and run.record.get("job_id"))
        assert not any(process.is_running() for process in family)
        assert "ActorDied" in (run.directory / "log.txt").read_text()
        assert supervisor.wait(run.run_id, 120).is_finished, run.error
        assert run.as_body()["resumed"] == 1
        assert [line["step"] for line in run.metrics()] == [1, 2]
        wait_until("no process is left", lambda: not workers() and not drivers(run), timeout_s=15)
    finally:
        supervisor.stop()


def test_without_a_cluster_nothing_is_started(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    supervisor = supervisor_of(Place(tmp_path / "data"), f"http://127.0.0.1:{port}")
    with pytest.raises(TrainingUnavailable, match=rf"no cluster answers at http://127.0.0.1:{port}"):
        supervisor.start_run()
    assert supervisor.runs() == []


def test_a_job_lives_while_the_cluster_is_away_and_is_gone_when_it_is_unknown(cluster: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    assert RayLauncher(f"http://127.0.0.1:{port}").is_alive(Job("ray", "run_x-training-1"), tmp_path)
    assert not (tmp_path / "log.txt").exists()
    assert not RayLauncher(cluster).is_alive(Job("ray", "run_x-training-1"), tmp_path)
    assert "the cluster does not know it" in (tmp_path / "log.txt").read_text()
    assert RayLauncher(cluster).end(None, tmp_path / "run_x") is None  # nothing of that name


def test_what_could_not_be_seen_to_end_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.launchers.ray.GONE_S", 0.2)
    (port,) = free_ports(1)
    said = RayLauncher(f"http://127.0.0.1:{port}").end(Job("ray", "run_x-training-1"), tmp_path)
    assert said is not None
    assert "`ray job stop --address http://127.0.0.1" in said
