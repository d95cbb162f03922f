"""The HTTP API over a real socket, on the scripted engine: bodies, statuses, and that refusals lose nothing."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from server import Server, serving
from symbol_gguf import publish_symbol_version

QUESTION = "How do I begin?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("api"), engine="scripted") as running:
        yield running


def rows(*answers: tuple[str, str], prompt: str = "Say something about {}") -> list[dict[str, Any]]:
    return [
        {"prompt": prompt.format(index), "chosen": chosen, "rejected": rejected, "score_chosen": 2, "score_rejected": 1}
        for index, (chosen, rejected) in enumerate(answers)
    ]


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_completion_carries_its_version(server: Server) -> None:
    answer = server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": QUESTION}]})
    body = answer.json()
    assert body["model"] == answer.headers["x-zloop-version"] == "v0"
    assert "This is v0" in body["choices"][0]["message"]["content"]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] > body["usage"]["completion_tokens"] > 0


def test_a_stream_is_the_same_answer_in_pieces_and_ends_with_done(server: Server) -> None:
    whole = server.chat(QUESTION, seed=7)["choices"][0]["message"]["content"]
    body = {"messages": [{"role": "user", "content": QUESTION}], "seed": 7, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["model"] for chunk in chunks} == {"v0"}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]


def test_a_limit_ends_an_answer_with_length(server: Server) -> None:
    assert server.chat(QUESTION, max_tokens=3)["choices"][0]["finish_reason"] == "length"


def test_models_lists_the_champion_and_the_versions(server: Server) -> None:
    assert [model["id"] for model in server.get("/v1/models")["data"]] == ["champion", "v0"]


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, 422, "user message"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, 422, "user message"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, 422, "role"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"model": "v9"}, 404, "v9"),
    ],
)
def test_a_bad_chat_request_gets_a_sentence(server: Server, change: dict[str, Any], status: int, word: str) -> None:
    got, body = server.refused("/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}], **change})
    assert got == status
    assert word in body["error"]["message"]


def test_a_body_that_is_no_json_is_refused(server: Server) -> None:
    answer = server.http.post("/v1/pairs", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]["type"] == "invalid"


def test_an_unknown_path_gets_the_same_error_shape(server: Server) -> None:
    answer = server.http.get("/v1/nothing")
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"type", "message"}


def test_a_pair_is_blind_and_a_pick_reveals_it(server: Server) -> None:
    pair = server.pair("What is a good name for a boat?")
    assert set(pair) == {"pair_id", "candidates"}
    assert [set(one) for one in pair["candidates"]] == [{"candidate_id", "text", "finish_reason"}] * 2
    assert pair["candidates"][0]["text"] != pair["candidates"][1]["text"]
    picked = server.post("/v1/picks", {"pair_id": pair["pair_id"], "pick": "second", "reasons": ["clearer"]})
    assert picked["versions"] == ["v0", "v0"]
    assert picked["preference_id"].startswith("pref_")
    exported = [json.loads(line) for line in server.http.get("/v1/export").text.splitlines()]
    row = next(one for one in exported if one["preference_id"] == picked["preference_id"])
    assert row["pick_id"] == picked["pick_id"]
    assert row["chosen"] == [{"role": "assistant", "content": pair["candidates"][1]["text"]}]
    assert row["rejected"] == [{"role": "assistant", "content": pair["candidates"][0]["text"]}]
    assert row["prompt"] == [{"role": "user", "content": "What is a good name for a boat?"}]


@pytest.mark.parametrize("pick", ["tie", "both_bad", "skip"])
def test_other_picks_are_kept_and_teach_nothing(server: Server, pick: str) -> None:
    pair = server.pair(f"A question for {pick}")
    assert server.post("/v1/picks", {"pair_id": pair["pair_id"], "pick": pick})["preference_id"] is None


def test_a_cut_answer_never_teaches(server: Server) -> None:
    pair = server.pair("A long one, please", max_tokens=3)
    assert {one["finish_reason"] for one in pair["candidates"]} == {"length"}
    picked = server.post("/v1/picks", {"pair_id": pair["pair_id"], "pick": "first"})
    assert picked["preference_id"] is None
    assert "cut off" in picked["message"]


def test_an_idempotency_key_keeps_a_pick_single(server: Server) -> None:
    pair_id = server.pair("Once only")["pair_id"]
    body = {"pair_id": pair_id, "pick": "first", "idempotency_key": "once-only"}
    assert server.post("/v1/picks", body)["pick_id"] == server.post("/v1/picks", body)["pick_id"]
    assert server.refused("/v1/picks", {**body, "pick": "second"})[0] == 409


def test_bad_picks_are_refused(server: Server) -> None:
    assert server.refused("/v1/picks", {"pair_id": "pair_none", "pick": "first"})[0] == 404
    status, body = server.refused("/v1/picks", {"pair_id": "pair_none", "pick": "third"})
    assert status == 422
    assert body["error"]["param"] == "pick"
    assert server.refused("/v1/picks", {"pair_id": "x", "pick": "first", "colour": "red"})[0] == 422


def test_the_same_seed_gives_the_same_two_answers(server: Server) -> None:
    first, second = (server.pair("Again", seed=5)["candidates"] for _ in range(2))
    assert {one["text"] for one in first} == {one["text"] for one in second}


def test_the_order_of_a_pair_is_random(server: Server) -> None:
    shown_first = {server.pair("Order", seed=5)["candidates"][0]["text"] for _ in range(24)}
    assert len(shown_first) == 2  # one side 24 times in a row: once in 8 million


def test_ratings_and_edits_are_kept(server: Server) -> None:
    answer = server.chat("Rate me")
    assert server.post("/v1/ratings", {"candidate_id": answer["id"], "rating": "up"})["rating_id"]
    assert server.post("/v1/edits", {"candidate_id": answer["id"], "text": "Better."})["edit_id"]
    assert server.refused("/v1/ratings", {"candidate_id": "cand_none", "rating": "up"})[0] == 404


def test_an_import_counts_and_changes_nothing_the_second_time(server: Server, tmp_path: Path) -> None:
    lines = rows(("good", "bad"), ("same", "same"), ("", "bad"), ("fine", "poor"))
    lines.append({**lines[0], "prompt": "A tie", "score_rejected": 2})
    source = {"source": server.lend(written(tmp_path / "some.jsonl", lines)), "format": "auto"}
    first = server.post("/v1/imports", source)
    assert (first["imported"], first["duplicates"]) == (2, 0)
    assert first["skipped"] == {"identical": 1, "empty": 1, "tie": 1}
    second = server.post("/v1/imports", source)
    assert (second["imported"], second["duplicates"]) == (0, 2)


def test_a_bad_import_imports_nothing(server: Server, tmp_path: Path) -> None:
    before = server.http.get("/v1/export").text
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(rows(("a", "b"))[0]) + "\n{not json\n")
    status, body = server.refused("/v1/imports", {"source": server.lend(broken)})
    assert status == 400
    assert "2" in body["error"]["message"]
    assert server.refused("/v1/imports", {"source": "absent.jsonl"})[0] == 400
    assert server.http.get("/v1/export").text == before


def test_the_csv_export_has_a_header(server: Server) -> None:
    answer = server.http.get("/v1/export", params={"format": "csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    assert "preference_id" in answer.text.splitlines()[0]


def test_unknown_runs_and_versions_are_404(server: Server) -> None:
    assert server.http.get("/v1/runs/run_none").status_code == 404
    assert server.refused("/v1/runs/run_none/cancel")[0] == 404
    assert server.refused("/v1/runs/run_none/resume")[0] == 404
    assert server.refused("/v1/versions/v9/promote")[0] == 404


def test_the_first_champion_cannot_be_rolled_back(server: Server) -> None:
    status, body = server.refused("/v1/rollback")
    assert status == 409
    assert "v0" in body["error"]["message"]


def test_a_run_that_cannot_be_started_is_refused_before_it_starts(server: Server) -> None:
    assert server.refused("/v1/runs", {"recipe": "no-such-recipe"})[0] == 404
    assert server.refused("/v1/runs", {"max_steps": 0})[0] == 422
    bare = server.http.post("/v1/snapshots", headers={"Content-Type": "application/json"})
    assert bare.status_code in (200, 409)  # a body is not needed
    assert server.refused("/v1/runs", {"practice": "no-such-taste"})[0] == 422
    assert server.get("/v1/runs")["runs"] == []


def test_a_dry_run_shows_the_command_and_starts_nothing(server: Server) -> None:
    shown = server.post("/v1/runs", {"practice": "shorter", "max_steps": 3, "num_processes": 2, "dry_run": True})
    assert shown["run_id"] is None
    assert shown["command"]["strategy"] == "ddp"
    assert "num_processes: 2" in shown["command"]["accelerate"]
    assert server.get("/v1/runs")["runs"] == []
    assert server.refused("/v1/runs", {"launcher": "kubernetes"})[0] == 422
    assert server.refused("/v1/runs", {"practice": "shorter", "num_processes": 3, "machines": 2})[0] == 400


def test_health(server: Server) -> None:
    assert server.get("/livez") == {"status": "ok"}
    assert server.get("/readyz")["serving"] == "v0"
    assert "/v1/pairs" in server.get("/openapi.json")["paths"]


def test_pages_answer_and_load_nothing_from_elsewhere(server: Server) -> None:
    for path in ("/", "/admin/", "/admin"):
        answer = server.http.get(path, follow_redirects=True)
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_only_loopback_names_are_served(server: Server) -> None:
    assert server.http.get("/livez", headers={"host": "localhost:7860"}).status_code == 200
    assert server.http.get("/livez", headers={"host": "[::1]:7860"}).status_code == 200
    assert server.http.get("/livez", headers={"host": "evil.example"}).status_code == 400


def test_many_at_once_get_an_answer_each(server: Server) -> None:
    said: list[str] = []

    def ask(number: int) -> None:
        said.append(server.chat(f"Question number {number}")["choices"][0]["message"]["content"])

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(set(said)) == 16


def test_of_a_hundred_starts_at_once_one_runs_and_it_is_cancelled_resumed_cancelled(tmp_path: Path) -> None:
    with serving(tmp_path, engine="scripted") as server, httpx.Client(base_url=server.url, timeout=120) as http:
        gate = threading.Barrier(100)

        def start() -> httpx.Response:
            gate.wait()
            return http.post("/v1/runs", json={"practice": "shorter", "max_steps": 1, "deadline_minutes": 30})

        with ThreadPoolExecutor(100) as pool:
            answers = [future.result() for future in [pool.submit(start) for _ in range(100)]]
        (started,) = [answer.json()["run_id"] for answer in answers if answer.is_success]
        refused = [answer.json() for answer in answers if answer.status_code == 409]
        assert len(refused) == 99
        assert all(f"Run {started} is " in body["error"]["message"] for body in refused)
        assert [run["run_id"] for run in server.get("/v1/runs")["runs"]] == [started]
        assert server.refused(f"/v1/runs/{started}/resume")[0] == 409
        server.post(f"/v1/runs/{started}/cancel")
        assert server.run_to_its_end(started, within_s=15)["state"] == "cancelled"
        assert server.post(f"/v1/runs/{started}/resume")["resumed"] == 1
        server.post(f"/v1/runs/{started}/cancel")
        assert server.run_to_its_end(started, within_s=15)["state"] == "cancelled"
        assert server.refused("/v1/runs", {"deadline_minutes": 0})[0] == 422


def test_a_reader_who_leaves_mid_stream_harms_nobody(tmp_path: Path) -> None:
    with serving(tmp_path, engine="scripted", scripted_delay_s=0.05) as slow:
        body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True}
        with (
            httpx.Client(base_url=slow.url) as leaver,
            leaver.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            next(answer.iter_lines())
        assert slow.chat(QUESTION)["choices"][0]["finish_reason"] == "stop"


def test_versions_are_promoted_kept_warm_served_beside_and_named_in_every_answer(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        publish_symbol_version(tmp_path / "versions", number, "smollm2-135m-instruct", canaries=False)

    def asked(server: Server, model: str) -> tuple[str, str]:
        body = {"messages": [{"role": "user", "content": "Hello"}], "model": model}
        answer = server.http.post("/v1/chat/completions", json=body)
        assert answer.is_success, answer.text
        version = answer.headers["X-Zloop-Version"]
        assert f"This is {version}," in answer.json()["choices"][0]["message"]["content"]
        return answer.json()["model"], version

    with serving(tmp_path, engine="scripted", retrain_every=0) as server:
        status, refusal = server.refused(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "model": "v1"}
        )
        assert (status, "v1 is not being served; these are: v0." in refusal["error"]["message"]) == (409, True)
        assert server.post("/v1/versions/v1/promote", {"reason": "better"}) == {"champion": "v1", "previous": "v0"}
        assert server.get("/v1/versions")["served"] == ["v1", "v0"]
        assert server.post("/v1/versions/v3/serve")["served"] == ["v1", "v0", "v3"]
        for model, version in (("champion", "v1"), ("v1", "v1"), ("v0", "v0"), ("v3", "v3")):
            assert asked(server, model) == (version, version)
        assert server.post("/v1/versions/v3/release") == {"served": ["v1", "v0"]}
        assert server.refused("/v1/versions/v3/release")[0] == 409
        assert server.refused("/v1/versions/v9/serve")[0] == 404
        assert server.post("/v1/versions/v2/promote", {"maintenance": True})["champion"] == "v2"
        assert server.post("/v1/rollback", {"maintenance": True}) == {"champion": "v1", "previous": "v2"}
        assert server.get("/v1/versions")["served"] == ["v1", "v2"]
        assert server.refused("/v1/rollback", {"whatever": 1})[0] == 422


def test_recipes_say_what_they_are_and_one_of_the_teams_own_is_among_them(tmp_path: Path) -> None:
    own = tmp_path / "recipes"
    own.mkdir(parents=True)
    (own / "gentle.yaml").write_text("about: Slowly.\nlearning_rate: 1.0e-5\n")
    (own / "wrong.yaml").write_text("learnig_rate: 1\n")
    with serving(tmp_path, engine="scripted") as server:
        listed = {row["name"]: row for row in server.get("/v1/recipes")["recipes"]}
        assert list(listed) == ["dpo-lora", *sorted(set(listed) - {"dpo-lora"})]
        assert "practice" not in listed
        assert listed["gentle"] == {
            "name": "gentle", "method": "dpo", "tuning": "lora", "about": "Slowly.", "error": None
        }  # fmt: skip
        assert "unknown key 'learnig_rate'" in listed["wrong"]["error"]
        assert (listed["kto"]["method"], listed["dpo-full"]["tuning"]) == ("kto", "full")
        status, refusal = server.refused("/v1/runs", {"recipe": "wrong"})
        assert status == 400
        assert "learnig_rate" in refusal["error"]["message"]

        status, refusal = server.refused("/v1/snapshots", {"recipe": "kto"})
        assert "0 rated answers" in refusal["error"]["message"]
        for number in range(12):
            answer = server.chat(f"Question {number}?")
            server.post("/v1/ratings", {"candidate_id": answer["id"], "rating": "up" if number % 2 else "down"})
        frozen = server.post("/v1/snapshots", {"recipe": "kto"})
        assert frozen["counts"] == {"rating": 12}
        assert (frozen["train"], frozen["held_out"]) == (0, 0)
        parts = json.loads((tmp_path / "snapshots" / frozen["snapshot"] / "manifest.json").read_text())["parts"]
        assert parts["ratings"]["rows"] + parts["held_out_ratings"]["rows"] == 12
