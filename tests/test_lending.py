"""The served model's memory lent to a run (ZLOOP_DEVICE_POLICY=pause), through the real server and trainer."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from server import Server, serving
from tiny_model import WORDS, lend_models, shared_tiny


def wait_until(what: str, done: Callable[[], object], within_s: float = 90) -> None:
    deadline = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < deadline, f"after {within_s:g} s still not: {what}"
        time.sleep(0.05)


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


def test_chat_pauses_while_a_run_goes_on_and_comes_back_however_it_ends(tmp_path: Path) -> None:
    data = tmp_path / "data"
    tiny = shared_tiny().gguf
    lend_models(data)
    rows = [
        {"prompt": f"Question {number}", "chosen": " ".join(WORDS[:3]), "rejected": " ".join(WORDS * 2)}
        for number in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with serving(data, model=tiny, device_policy="pause") as server:
        server.post("/v1/imports", {"source": str(tmp_path / "pairs.jsonl"), "format": "trl"})
        expected = server.post("/v1/preflight", {"max_steps": 2})
        assert (expected["policy"], expected["refusal"]) == ("pause", None)
        assert "The chat is paused meanwhile." in expected["sentence"]
        assert (data / "snapshots").exists() is False, "a dry run leaves nothing behind"
        assert answers(server)

        run_id = server.post("/v1/runs", {"max_steps": 2})["run_id"]
        wait_until("the chat is paused", lambda: is_paused(server))
        status, retry_after = chat(server)
        assert status == 503
        assert 10 <= int(retry_after) <= 600
        not_ready = server.http.get("/readyz")
        assert not_ready.status_code == 503
        assert run_id in not_ready.json()["problem"]
        assert server.refused("/v1/versions/v0/serve")[0] == 503
        wait_until("a training child runs", lambda: server.get(f"/v1/runs/{run_id}")["state"] != "queued")
        server.kill()

    with serving(data, model=tiny, device_policy="pause", wait_for="/livez") as server:
        wait_until("the run is adopted", lambda: server.get(f"/v1/runs/{run_id}")["state"] in ("preparing", "training"))
        assert is_paused(server), "the model came back beside a run that has its memory"
        run = server.run_to_its_end(run_id)
        assert run["state"] == "finished", run["error"]
        wait_until("the chat is back", lambda: answers(server))
        assert len(model_servers(server)) == 1
        said = run["preflight"]
        assert said["policy"] == "pause"
        assert said["actual"]["memory_bytes"] > 200e6
        assert said["actual"]["total_s"] > said["actual"]["training_s"] > 0
        assert said["ratio"]["memory_bytes"] == round(said["actual"]["memory_bytes"] / said["memory_bytes"], 2)

        learned = server.post("/v1/preflight", {"max_steps": 2})["estimate"]
        assert learned["learned_from"] == [run_id]
        assert abs(learned["training_s"] / said["actual"]["training_s"] - 1) < 0.05

        cancelled = server.post("/v1/runs", {"max_steps": 2})["run_id"]
        wait_until("the chat is paused", lambda: is_paused(server))
        server.post(f"/v1/runs/{cancelled}/cancel")
        wait_until("the chat is back", lambda: answers(server))
        assert server.run_to_its_end(cancelled)["state"] == "cancelled"
