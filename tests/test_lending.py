"""The served model's memory lent to a run (ZLOOP_DEVICE_POLICY=pause), through the real server and trainer."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from server import Server, serving
from tiny_model import WORDS, lend_models, shared_tiny

from trainer.runs import Run


def wait_until(what: str, done: Callable[[], object], within_s: float = 90) -> None:
    deadline = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < deadline, f"after {within_s:g} s still not: {what}"
        time.sleep(0.2)


def model_servers(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if any("llama_process" in word for word in child.cmdline())]


def chat(server: Server) -> tuple[int, str]:
    answer = server.http.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    )
    return answer.status_code, answer.headers.get("Retry-After", "")


def is_paused(server: Server) -> bool:
    return chat(server)[0] == 503 and not model_servers(server)


def answers(server: Server) -> bool:
    return chat(server)[0] == 200


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with preferences to import beside it."""
    lend_models(tmp_path / "data")
    rows = [
        {"prompt": f"Question {number}", "chosen": " ".join(WORDS[:3]), "rejected": " ".join(WORDS * 2)}
        for number in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


@contextmanager
def lending(data: Path, **more: Any) -> Iterator[Server]:
    with serving(data, model=shared_tiny().gguf, device_policy="pause", **more) as server:
        server.upload(data.parent / "pairs.jsonl", format="trl")
        yield server


def start_and_pause(server: Server) -> str:
    assert answers(server)
    run_id: str = server.post("/v1/runs", {"max_steps": 2})["run_id"]
    wait_until("the chat is paused", lambda: is_paused(server))
    return run_id


def test_who_asks_in_a_pause_is_told_and_a_cancel_ends_it(data: Path) -> None:
    with lending(data) as server:
        expected = server.post("/v1/preflight", {"max_steps": 2})
        assert (expected["policy"], expected["refusal"]) == ("pause", None)
        assert "The chat is paused meanwhile." in expected["sentence"]
        assert not (data / "snapshots").exists(), "a dry run writes nothing"
        run_id = start_and_pause(server)
        status, retry_after = chat(server)
        assert status == 503
        assert 10 <= int(retry_after) <= 600
        not_ready = server.http.get("/readyz")
        assert not_ready.status_code == 503
        assert run_id in not_ready.json()["problem"]
        assert server.refused("/v1/versions/v0/serve")[0] == 503
        server.post(f"/v1/runs/{run_id}/cancel")
        wait_until("the chat is back", lambda: answers(server))
        assert server.run_to_its_end(run_id)["state"] == "cancelled"
        assert len(model_servers(server)) == 1


def test_a_server_that_was_killed_starts_paused_and_a_failed_run_ends_it(data: Path) -> None:
    with lending(data) as server:
        run_id = start_and_pause(server)
        run = Run.open(data / "runs", run_id)
        wait_until("a training child runs", lambda: run.record.get("pid"))
        server.kill()
    assert run.is_active
    with lending(data, wait_for="/livez") as server:
        assert is_paused(server), "the model came back beside a run that has its memory"
        shutil.rmtree(
            run.config.snapshot["directory"]
        )  # the child that follows the killed one has nothing to learn from
        os.kill(run.record["pid"], signal.SIGKILL)
        wait_until("the chat is back", lambda: answers(server))
        assert server.run_to_its_end(run_id)["state"] == "failed"
        assert len(model_servers(server)) == 1


def test_a_run_that_ends_well_brings_the_chat_back_and_teaches_the_next_estimate(data: Path) -> None:
    with lending(data) as server:
        run_id = start_and_pause(server)
        run = server.run_to_its_end(run_id)
        assert run["state"] == "finished", run["error"]
        wait_until("the chat is back", lambda: answers(server))
        said = run["preflight"]
        assert said["policy"] == "pause"
        assert said["actual"]["memory_bytes"] > 200e6
        assert said["actual"]["total_s"] > said["actual"]["training_s"] > 0
        assert said["ratio"]["memory_bytes"] == round(said["actual"]["memory_bytes"] / said["memory_bytes"], 2)
        learned = server.post("/v1/preflight", {"max_steps": 2})["estimate"]
        assert learned["learned_from"] == [run_id]
        assert learned["training_s"] == pytest.approx(said["actual"]["training_s"], rel=0.05)
