"""Test support: a real server in its own process, on loopback, in a temporary data directory."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copy
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent
START_S = 60.0
RUN_S = 300.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(data_dir: Path, **settings: object) -> dict[str, str]:
    """This process's environment with exactly the given settings of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ZLOOP_")}
    given = {f"ZLOOP_{name.upper()}": str(value) for name, value in settings.items()}
    return {**kept, "ZLOOP_DATA_DIR": str(data_dir), **given}


@dataclass
class Server:
    """A running server; `http` speaks to it."""

    process: subprocess.Popen[bytes]
    url: str
    http: httpx.Client
    log: Path

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.is_success, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        answer = self.http.post(path, json=body or {})
        assert answer.is_success, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def refused(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        answer = self.http.post(path, json=body or {})
        assert answer.is_error, f"{path} was not refused: {answer.text}"
        return answer.status_code, answer.json()

    def lend(self, path: Path | str) -> str:
        """Copy a file where a request may name it; its name there."""
        folder = self.log.parent / "imports"
        folder.mkdir(exist_ok=True)
        return Path(copy(path, folder)).name

    def upload(self, path: Path | str, **options: Any) -> Any:
        """Import a file by sending it."""
        with Path(path).open("rb") as file:
            answer = self.http.post("/v1/imports", files={"file": (Path(path).name, file)}, data=options)
        assert answer.is_success, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def chat(self, text: str, **more: Any) -> Any:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more})

    def pair(self, text: str, **more: Any) -> Any:
        return self.post("/v1/pairs", {"messages": [{"role": "user", "content": text}], **more})

    def run_to_its_end(self, run_id: str, within_s: float = RUN_S) -> Any:
        """Poll the run until it has ended."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            run = self.get(f"/v1/runs/{run_id}")
            if run["state"] in ("finished", "failed", "cancelled"):
                return run
            time.sleep(0.2)
        raise AssertionError(f"{run_id} did not end within {within_s} s: {run}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(data_dir: Path, *, wait_for: str = "/readyz", **settings: object) -> Iterator[Server]:
    """`zloop serve` on a free port until the block ends; stopped with SIGINT, as a person would.

    `wait_for`: the route that answers first; `/livez` where the model is not to be waited for.
    """
    port = free_port()
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "server-under-test.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "chat_app"],
            env=environment(data_dir, port=port, **settings),
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
        )
    host = str(settings.get("host", "127.0.0.1"))
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    with httpx.Client(base_url=url, timeout=120) as http:
        try:
            _wait_until_ready(http, process, log, wait_for)
            yield Server(process, url, http, log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _wait_until_ready(http: httpx.Client, process: subprocess.Popen[bytes], log: Path, route: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if http.get(route).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not ready within {START_S} s: {log.read_text()}")
