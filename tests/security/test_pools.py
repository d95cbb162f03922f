"""Long operations are few at a time; the others are told so at once, and picks go on beside them."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server import Server, serving

from chat_app.operations import Refused

IMPORTS, PICKS = 45, 60
ROWS = 30_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("pools") / "data", engine="scripted", retrain_every=0) as running:
        yield running


def large(path: Path, word: str) -> Path:
    """A file that takes a while."""
    text = "words " * 100
    with path.open("w") as file:
        for number in range(ROWS):
            file.write(json.dumps({"prompt": f"{word} {number} {text}", "chosen": text, "rejected": "no"}) + "\n")
    return path


def test_picks_are_kept_while_45_imports_are_asked_for(server: Server, tmp_path: Path) -> None:
    name = server.lend(large(tmp_path / "large.jsonl", "one"))
    pairs = [server.pair(f"Question {number}?")["pair_id"] for number in range(PICKS)]
    answers: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=300) as http:
            answers.append(http.post("/v1/imports", json={"source": name}))

    asking = [threading.Thread(target=ask) for _ in range(IMPORTS)]
    for thread in asking:
        thread.start()
    deadline = time.monotonic() + 60
    while len(answers) < IMPORTS - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    # All but the one that goes on have their answer, and it goes on still.
    assert [answer.status_code for answer in answers] == [429] * (IMPORTS - 1)
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in answers)
    assert "goes on already" in answers[0].json()["error"]["message"]
    active = server.get("/v1/imports")["active"]
    for pair_id in pairs:
        assert server.post("/v1/picks", {"pair_id": pair_id, "pick": "first"})["pick_id"]
    assert active is not None
    for thread in asking:
        thread.join(300)
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    assert server.post("/v1/imports", {"source": name})["duplicates"] == ROWS  # and then the next one may


def test_long_questions_leave_room_for_others(server: Server) -> None:
    endless = {"sql": "SELECT count(*) FROM range(1000000) a, range(1000000) b", "limit_s": 5}
    answers: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=300) as http:
            answers.append(http.post("/v1/query", json=endless))

    asking = [threading.Thread(target=ask) for _ in range(IMPORTS)]
    for thread in asking:
        thread.start()
    deadline = time.monotonic() + 60
    while len(answers) < IMPORTS - 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {answer.status_code for answer in answers} == {429}
    assert server.get("/v1/models")["data"]
    for thread in asking:
        thread.join(300)


def test_all_gates_together_leave_most_threads_free() -> None:
    from chat_app.gates import Gate, Gates

    gates = [gate for gate in vars(Gates()).values() if isinstance(gate, Gate)]
    assert sum(gate.at_once for gate in gates) <= 20


def test_who_reads_an_export_is_inside_until_it_ends() -> None:
    from chat_app.gates import Gate

    gate = Gate("An export", 2, 5)
    first, second = gate.around(iter("ab")), gate.around(iter("cd"))
    with pytest.raises(Refused) as refused:
        gate.around(iter("ef"))
    assert (refused.value.status, refused.value.retry_after_s) == (429, 5)
    assert "2 of 2" in str(refused.value)
    assert list(first) == ["a", "b"]
    with gate, pytest.raises(Refused):
        gate.check()
    del second  # a client that left
    with gate, gate:
        pass


def test_a_gate_opens_again_after_an_error() -> None:
    from chat_app.gates import Gate

    gate = Gate("An import", 1, 5)
    for _ in range(3):
        with pytest.raises(KeyError), gate:
            raise KeyError
    gate.check()
