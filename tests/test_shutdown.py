"""A stop, with a real process: readiness red, what was begun is finished, newcomers come back later, exit code 0."""

import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server import Server, serving

from feedback_store.store import FeedbackStore

QUESTION = {"messages": [{"role": "user", "content": "How do I begin?"}]}


class Reader(threading.Thread):
    """A client that reads one stream to its end."""

    def __init__(self, server: Server, **more: Any) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.events: list[str] = []
        self._url = server.url
        self._body = {**QUESTION, "stream": True, **more}
        self.start()
        assert self.begun.wait(20), "the stream did not begin"

    def run(self) -> None:
        with (
            suppress(httpx.TransportError),  # cut off
            httpx.stream("POST", f"{self._url}/v1/chat/completions", json=self._body, timeout=60) as answer,
        ):
            for line in answer.iter_lines():
                if line:
                    self.events.append(line.removeprefix("data: "))
                    self.begun.set()


def until(what: str, done: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < deadline, f"after {within_s} s still not: {what}"
        time.sleep(0.02)


def status_of(server: Server, path: str) -> httpx.Response | None:
    """The answer of a fresh connection; None where none is accepted."""
    try:
        return httpx.get(f"{server.url}{path}", timeout=10)
    except httpx.TransportError:
        return None


def test_a_stream_is_finished_newcomers_are_refused_and_the_exit_is_clean(tmp_path: Path) -> None:
    with serving(tmp_path, engine="scripted", scripted_delay_s=0.1) as server:
        reader = Reader(server)
        server.process.send_signal(signal.SIGTERM)
        until("readiness is red", lambda: server.http.get("/readyz").status_code == 503)
        red = server.http.get("/readyz")
        assert "stopping" in red.json()["problem"]
        assert red.headers["retry-after"]
        assert server.http.get("/livez").is_success
        newcomer = server.http.post("/v1/chat/completions", json=QUESTION)
        assert newcomer.status_code == 503
        assert int(newcomer.headers["retry-after"]) > 0
        assert newcomer.json()["error"]["type"] == "unavailable"
        assert reader.is_alive(), "the answer was too short to show anything"
        reader.join(30)
        assert reader.events[-1] == "[DONE]"
        assert json.loads(reader.events[-2])["choices"][0]["finish_reason"] == "stop"
        assert server.process.wait(20) == 0
        assert status_of(server, "/readyz") is None


def test_what_is_not_finished_in_time_ends_as_cancelled_and_is_kept(tmp_path: Path) -> None:
    with serving(tmp_path, engine="scripted", scripted_delay_s=0.3, shutdown_s=0.2) as server:
        reader = Reader(server)
        server.process.send_signal(signal.SIGTERM)
        reader.join(20)
        assert "not complete" in json.loads(reader.events[-1])["error"]["message"]
        assert server.process.wait(20) == 0
    with FeedbackStore.open(tmp_path / "store.duckdb") as store:
        kept = store.query("SELECT finish_reason, length(text) > 0 FROM candidates", limit_s=5)
        assert kept.rows == (("cancelled", True),)


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, engine="scripted", scripted_delay_s=0.3) as server:
        reader = Reader(server)
        server.process.send_signal(signal.SIGTERM)
        until("it is stopping", lambda: server.http.get("/readyz").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 1
        reader.join(10)
        assert "[DONE]" not in reader.events
    FeedbackStore.open(tmp_path / "store.duckdb").close()  # nothing is broken


def test_no_native_server_outlives_a_stop(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the embedded engine is not installed")
    with serving(tmp_path) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children
        reader = Reader(server, max_tokens=40)
        server.process.send_signal(signal.SIGTERM)
        reader.join(60)
        assert reader.events[-1] == "[DONE]"
        assert server.process.wait(20) == 0
        assert not [child for child in children if child.is_running()]


def test_a_server_that_can_serve_nothing_ends_and_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but no model")
    pytest.importorskip("xllamacpp", reason="the embedded engine is not installed")
    with (
        pytest.raises(AssertionError, match="The server could not start"),  # what its log says
        serving(tmp_path / "data", model=broken),
    ):
        pass
