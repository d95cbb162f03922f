"""The whole loop, twice, through the real server: chat → pair → pick → snapshot → train → evaluate → promote → swap.

The model is tiny and built on the spot, but every part is the real one: llama-server answers, DuckDB keeps, TRL trains
in a child, the adapter is served as GGUF.
"""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import Server, serving
from tiny_model import build_tiny_gguf

from feedback_store.preferences import split_of
from feedback_store.records import Message

PICKS = 30
HELD_OUT_AT_LEAST = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def prompts(cycle: int) -> Iterator[str]:
    """Prompts of which some are held out: without these there is nothing to judge by."""
    held_out = 0
    number = 0
    while held_out < HELD_OUT_AT_LEAST or number < PICKS:
        text = f"Cycle {cycle}, question {number}"
        number += 1
        is_held_out = split_of([Message(role="user", content=text)]) == "held_out"
        if number <= PICKS or is_held_out:
            held_out += is_held_out
            yield text


def pick_the_shorter(server: Server, cycle: int) -> int:
    """Chat, compare, pick: the number of preferences it made."""
    made = 0
    for text in prompts(cycle):
        pair = server.pair(text, max_tokens=512, seed=1000 * cycle + made)
        first, second = (len(one["text"]) for one in pair["candidates"])
        picked = server.post(
            "/v1/picks", {"pair_id": pair["pair_id"], "pick": "first" if first <= second else "second"}
        )
        made += picked["preference_id"] is not None
    return made


def version_state(server: Server, version: str) -> str:
    return next(row["state"] for row in server.get("/v1/versions")["versions"] if row["version"] == version)


def test_two_whole_cycles(tmp_path: Path, tiny: Path) -> None:
    with serving(tmp_path, model=tiny, retrain_every=0) as server:
        for cycle, version in ((1, "v1"), (2, "v2")):
            before = f"v{cycle - 1}"
            assert server.chat("Hello", max_tokens=16)["model"] == before
            assert pick_the_shorter(server, cycle) > PICKS // 2

            started = server.post("/v1/runs", {"max_steps": 2})
            assert started["state"] in ("queued", "preparing")
            status, active = server.refused("/v1/runs", {})
            assert (status, active["run_id"], active["error"]["type"]) == (409, started["run_id"], "conflict")
            run = server.run_to_its_end(started["run_id"])

            assert run["state"] == "finished", run["error"]
            assert (run["step"], run["total_steps"], run["version"]) == (2, 2, version)
            assert run["verdict"]["decision"] in ("promote", "keep", "reject")
            assert run["evaluation"]["pairs"] >= HELD_OUT_AT_LEAST - 1
            assert run["champion"] == before
            written = (tmp_path / "runs" / run["run_id"] / "metrics.jsonl").read_text()
            lines = [json.loads(line) for line in written.splitlines()]
            assert [line["step"] for line in lines] == [1, 2]
            assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
            assert {"time", "pairs", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"} <= set(
                lines[0]
            )
            assert server.get("/v1/versions")["champion"] == before  # nothing is promoted by itself

            assert server.post(f"/v1/versions/{version}/promote") == {"champion": version, "previous": before}
            answer = server.chat("Hello", max_tokens=16)
            assert answer["model"] == version
            assert version_state(server, version) == "champion"
            assert version_state(server, before) == "retired"

        assert server.post("/v1/rollback") == {"champion": "v1", "previous": "v2"}
        assert server.chat("Hello", max_tokens=16)["model"] == "v1"
        assert server.post("/v1/rollback") == {"champion": "v0", "previous": "v1"}
        assert server.refused("/v1/rollback")[0] == 409

        manifest = tmp_path / "versions" / "v1" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 0, "oops"'))
        assert server.refused("/v1/versions/v1/promote")[0] == 409
        adapter = tmp_path / "versions" / "v2" / "adapter.gguf"
        adapter.write_bytes(adapter.read_bytes()[:-8] + b"damaged!")
        status, refusal = server.refused("/v1/versions/v2/promote")
        assert status == 409
        assert "adapter.gguf" in refusal["error"]["message"]
        assert server.chat("Hello", max_tokens=16)["model"] == "v0"


def test_streams_in_flight_finish_on_the_version_they_began_with(tmp_path: Path, tiny: Path) -> None:
    with serving(tmp_path, model=tiny, retrain_every=0, max_answers_per_user=4) as server:
        pick_the_shorter(server, 1)
        run = server.run_to_its_end(server.post("/v1/runs", {"max_steps": 1})["run_id"])
        began = threading.Event()
        seen: list[tuple[set[str], str | None]] = []

        def read_slowly() -> None:
            body = {
                "messages": [{"role": "user", "content": "Tell"}],
                "stream": True,
                "max_tokens": 400,
                "temperature": 1.5,
            }
            with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
                chunks = []
                for line in answer.iter_lines():
                    began.set()
                    if line.startswith("data: {"):
                        chunks.append(json.loads(line.removeprefix("data: ")))
            seen.append(({chunk["model"] for chunk in chunks}, chunks[-1]["choices"][0]["finish_reason"]))

        readers = [threading.Thread(target=read_slowly) for _ in range(4)]
        for reader in readers:
            reader.start()
        began.wait(30)
        server.post(f"/v1/versions/{run['version']}/promote")
        for reader in readers:
            reader.join()
        assert len(seen) == 4
        assert all(models == {"v0"} and end in ("stop", "length") for models, end in seen)
        assert server.chat("Tell", max_tokens=4)["model"] == "v1"


def test_a_server_killed_in_mid_run_is_followed_by_one_that_finishes_the_run(tmp_path: Path, tiny: Path) -> None:
    with serving(tmp_path, model=tiny, retrain_every=0) as server:
        pick_the_shorter(server, 1)
        conversation = server.chat("Hello", max_tokens=16)
        run_id = server.post("/v1/runs", {"max_steps": 2})["run_id"]
        server.kill()
    with serving(tmp_path, model=tiny, retrain_every=0) as server:
        run = server.run_to_its_end(run_id)
        assert run["state"] == "finished", run["error"]
        assert run["version"] == "v1"
        assert server.post("/v1/ratings", {"candidate_id": conversation["id"], "rating": "down"})["rating_id"]


def test_a_killed_child_is_started_again_and_the_run_ends_well(tmp_path: Path, tiny: Path) -> None:
    with serving(tmp_path, model=tiny, retrain_every=0) as server:
        pick_the_shorter(server, 1)
        run_id = server.post("/v1/runs", {"max_steps": 2})["run_id"]
        state = tmp_path / "runs" / run_id / "state.json"
        while not (pid := json.loads(state.read_text()).get("pid")):
            pass
        os.kill(pid, signal.SIGKILL)
        run = server.run_to_its_end(run_id)
        assert run["state"] == "finished", run["error"]
        assert run["resumed"] == 1
