"""Children as Ray jobs, submitted over the cluster's HTTP interface: one worker (an actor) for each GPU or process.

The job's entry point is `ray_workers.py`, which runs on the cluster; nothing here imports ray, so the server needs no
more than the cluster's URL (ZLOOP_RAY_ADDRESS, the dashboard's). The run directory and the Python environment are at
the same path on every machine. A job that waits for free GPUs waits in Ray's own queue of placement groups.

While the cluster does not answer, a job counts as alive. Not covered: clusters behind a login.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from trainer.command import child_environment, write_accelerate_config
from trainer.errors import LaunchFailed, TrainingUnavailable
from trainer.launch import available_cores, threads_per_process
from trainer.launchers import EVALUATION, TRAINING, Job, Work

ASK_EVERY_S = 1.0
ANSWER_WITHIN_S = 20.0
GONE_S = 12.0
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


class RayLauncher:
    """Runs on the cluster at `address`, such as http://127.0.0.1:8265."""

    settle_s = 40.0

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        self._asked_at = float("-inf")
        self._alive = True

    def gpus(self) -> int:
        try:
            answer = self._request("GET", "/api/cluster_status").json()
            usage = answer["data"]["clusterStatus"]["loadMetricsReport"]["usage"]
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise TrainingUnavailable(
                f"The launcher is ray, but no cluster answers at {self._address} ({error or type(error).__name__}). "
                "Start one with `ray start --head`, set ZLOOP_RAY_ADDRESS, or use ZLOOP_LAUNCHER=local."
            ) from error
        return int(usage.get("GPU", (0, 0))[1])

    def start(self, work: Work) -> Job:
        if work.stage == TRAINING:
            write_accelerate_config(work.run_dir, work.launch)
        self._asked_at, self._alive = float("-inf"), True
        # A name of its own for each attempt: Ray takes each only once.
        submission_id = f"{work.name}-{time.time_ns() // 1_000_000}"
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint(work),
            "runtime_env": {"env_vars": child_environment(_threads(work))},
        }
        try:
            self._request("POST", "/api/jobs/", body).raise_for_status()
        except httpx.HTTPStatusError as error:
            raise LaunchFailed(f"Ray refused the job: {error.response.text[:500]}") from error
        except httpx.HTTPError as error:
            raise LaunchFailed(
                f"Ray at {self._address} did not take the job: {error or type(error).__name__}"
            ) from error
        return Job("ray", submission_id)

    def is_alive(self, job: Job, run_dir: Path) -> bool:
        if time.monotonic() - self._asked_at >= ASK_EVERY_S:
            self._asked_at = time.monotonic()
            self._alive, said = self._look_at(job.id)
            if said and not self._alive:
                with (run_dir / "log.txt").open("a", encoding="utf-8") as log:
                    log.write(f"Ray ended job {job.id}: {said}\n")
        return self._alive

    def end(self, job: Job | None, run_dir: Path) -> str | None:
        left = []
        for job_id in self._named(run_dir) if job is None else [job.id]:
            began = time.monotonic()
            with contextlib.suppress(httpx.HTTPError):
                self._request("POST", f"/api/jobs/{job_id}/stop")
            while self._look_at(job_id)[0] and time.monotonic() - began < GONE_S:
                time.sleep(0.3)
            if self._look_at(job_id)[0]:
                left.append(job_id)
        if not left:
            return None
        return (
            f"Ray did not say within {GONE_S:.0f} s that its job {', '.join(left)} ended: end it with `ray job stop "
            f"--address {self._address} {left[0]}`."
        )

    def submission(self, work: Work) -> str:
        environment = " ".join(shlex.quote(f"{k}={v}") for k, v in child_environment(_threads(work)).items())
        return f"ray job submit --address {self._address} -- env {environment} {entrypoint(work)}\n"

    def _look_at(self, job_id: str) -> tuple[bool, str]:
        """Is it waiting or running, and what Ray says about one that failed."""
        try:
            answer = self._request("GET", f"/api/jobs/{job_id}")
            if answer.status_code == 404:
                return False, "the cluster does not know it; was it started anew?"
            job = answer.raise_for_status().json()
            said = str(job.get("message") or "").splitlines() if job["status"] == "FAILED" else []
            return job["status"] not in ENDED, said[0] if said else ""
        except (httpx.HTTPError, KeyError, ValueError):
            return True, ""

    def _named(self, run_dir: Path) -> list[str]:
        """The submissions of a run."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            stages = tuple(f"{run_dir.name}-{stage}-" for stage in (TRAINING, EVALUATION))
            jobs: list[dict[str, Any]] = self._request("GET", "/api/jobs/").json()
            return [job["submission_id"] for job in jobs if (job.get("submission_id") or "").startswith(stages)]
        return []

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        return httpx.request(method, self._address + path, json=body, timeout=ANSWER_WITHIN_S)


def entrypoint(work: Work) -> str:
    """What Ray runs, on the cluster."""
    words = [sys.executable, "-m", "trainer.launchers.ray_workers", str(work.run_dir.absolute()), work.stage]
    words += ["--workers", str(work.processes), "--threads", str(_threads(work))]
    return shlex.join([*words, "--gpus"] if work.launch.device == "gpu" else words)


def _threads(work: Work) -> int:
    """On a machine with GPUs a few for each; on CPUs the cluster is taken to be as wide as this machine."""
    return 4 if work.launch.device == "gpu" else threads_per_process(work.cores or available_cores(), work.processes)
