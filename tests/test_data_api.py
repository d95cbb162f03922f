"""The routes of the data over a real socket: in, out, counted, private, kept – and what is refused loses nothing."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Server, serving

MARK = "zanzibar-heliotrope-4711"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("data_api"), engine="scripted", retrain_every=0) as running:
        yield running


def written(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def picked(server: Server, text: str, pick: str = "first", **more: Any) -> Any:
    return server.post("/v1/picks", {"pair_id": server.pair(text)["pair_id"], "pick": pick, **more})


def exported(server: Server, format_: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.http.get(f"/v1/export?format={format_}").text.splitlines()]


def test_an_import_says_what_it_skipped_and_why_it_knew_the_format(server: Server, tmp_path: Path) -> None:
    lines = [{"prompt": f"Name {n} things", "chosen": "good", "rejected": "bad"} for n in range(4)]
    source = written(tmp_path / "rows.jsonl", *lines, lines[0] | {"chosen": ""}, lines[0] | {"rejected": "good"})
    said = server.upload(source, format="auto")
    assert (said["imported"], said["duplicates"], said["format"]) == (4, 0, "trl")
    assert said["skipped"] == {"empty": 1, "identical": 1}
    assert said["examples"] == {"empty": [5], "identical": [6]}
    assert "chosen and rejected" in said["why"]
    assert server.upload(source)["duplicates"] == 4
    history = server.get("/v1/imports")
    assert history["active"] is None
    assert [one["imported"] for one in history["imports"][:2]] == [0, 4]


def test_labelled_answers_come_in_and_go_out_in_ktos_layout(server: Server, tmp_path: Path) -> None:
    source = written(
        tmp_path / "kto.jsonl",
        {"prompt": "Why rain?", "completion": "Clouds.", "label": True},
        {"prompt": "Why rain?", "completion": "No idea.", "label": False},
    )
    said = server.upload(source)
    assert (said["format"], said["imported"], said["unpaired"]) == ("kto", 2, 2)
    kept = server.chat("Tell me something.")
    server.post("/v1/ratings", {"candidate_id": kept["id"], "rating": "down"})
    rows = exported(server, "kto")
    assert [row["label"] for row in rows if row["source"] == "kto"] == [True, False]
    assert [row["completion"][0]["content"] for row in rows if row["source"] == "rating"] == [
        kept["choices"][0]["message"]["content"]
    ]


def test_an_edit_becomes_a_preference(server: Server) -> None:
    kept = server.chat("How do I knit?")
    server.post("/v1/edits", {"candidate_id": kept["id"], "text": "Cast on first.", "idempotency_key": "edit-1"})
    server.post("/v1/edits", {"candidate_id": kept["id"], "text": "Cast on first.", "idempotency_key": "edit-1"})
    status, refused = server.refused(
        "/v1/edits", {"candidate_id": kept["id"], "text": "Another.", "idempotency_key": "edit-1"}
    )
    assert (status, refused["error"]["type"]) == (409, "conflict")
    (row,) = [row for row in exported(server, "trl") if row["source"] == "edit"]
    assert row["prompt"] == [{"role": "user", "content": "How do I knit?"}]
    assert row["chosen"][0]["content"] == "Cast on first."
    assert server.get("/v1/statistics")["edits"] == 1


def test_the_statistics_count_what_stands(server: Server) -> None:
    before = server.get("/v1/statistics")
    pair_id = server.pair("Which is better?")["pair_id"]
    for pick in ("tie", "first", "second"):
        server.post("/v1/picks", {"pair_id": pair_id, "pick": pick})
    picked(server, "And of these?", "both_bad")
    after = server.get("/v1/statistics")
    assert after["counts"]["picks"] == before["counts"]["picks"] + 2
    assert after["picks"]["second"] == before["picks"]["second"] + 1
    assert after["picks"]["tie"] == before["picks"]["tie"]
    assert sum(after["days"].values()) == sum(before["days"].values()) + 4
    assert 0 <= after["first_share"] <= 1
    assert "told" in server.get("/v1/agreement")["sentence"]


def test_a_snapshot_says_what_it_hid_and_left_out(server: Server) -> None:
    picked(server, f"Write to {MARK}@example.org please.")
    found = server.get("/v1/redactions")
    assert found["redact"] is True
    assert {one["kind"] for one in found["found"]} == {"email"}
    assert MARK not in json.dumps(found)
    frozen = server.post("/v1/snapshots", {"recipe": "dpo-lora"})
    assert frozen["redacted"]["email"] >= 1
    assert server.refused("/v1/snapshots", {"recipe": "nonsense"})[0] == 404


def test_a_conversation_or_a_person_can_ask_not_to_be_learned_from(server: Server) -> None:
    picked(server, "Only between us?")
    rows = len(exported(server, "trl"))
    server.post("/v1/learning", {"scope": "rater", "subject": "local", "learn": False})
    left = exported(server, "trl")
    assert {row["source"] for row in left} == {"trl"}
    server.post("/v1/learning", {"scope": "rater", "subject": "local", "learn": True})
    assert len(exported(server, "trl")) == rows
    assert server.refused("/v1/learning", {"scope": "conversation", "subject": "conv_no", "learn": False})[0] == 404
    assert server.refused("/v1/learning", {"scope": "planet", "subject": "x", "learn": False})[0] == 422


@pytest.mark.parametrize(
    "sql",
    ["DELETE FROM picks", "SELECT 1; SELECT 2", "COPY picks TO 'x'", "FROM read_text('/etc/passwd')", "nonsense"],
)
def test_only_a_select_is_answered(server: Server, sql: str) -> None:
    status, refused = server.refused("/v1/query", {"sql": sql})
    assert (status, refused["error"]["type"]) == (400, "bad_request")


def test_a_question_is_answered_and_a_long_one_is_stopped(server: Server) -> None:
    said = server.post("/v1/query", {"sql": "SELECT count(*) AS picks, max(created_at) AS latest FROM picks"})
    assert said["columns"] == ["picks", "latest"]
    assert said["rows"][0][0] > 0
    endless = "SELECT count(*) FROM range(1000000) a, range(1000000) b"
    status, refused = server.refused("/v1/query", {"sql": endless, "limit_s": 0.2})
    assert status == 400
    assert "0.2" in refused["error"]["message"]


def test_a_dataset_is_written_where_it_is_asked_for(server: Server) -> None:
    picked(server, "What would you export?")
    exports = server.log.parent / "exports"
    out = exports / "set"
    said = server.post("/v1/datasets", {"out": "set", "raters": "drop"})
    assert said["directory"] == str(out)
    assert said["url"] is None
    assert sum(said["rows"].values()) == len(exported(server, "trl")) + len(exported(server, "kto"))
    assert (out / "README.md").read_text().startswith("---\n")
    (exports / "mine").mkdir()
    (exports / "mine" / "letter.txt").write_text("do not touch")
    assert server.refused("/v1/datasets", {"out": "mine"})[0] == 409
    assert (exports / "mine" / "letter.txt").read_text() == "do not touch"


def test_a_backup_is_made_while_people_pick(server: Server) -> None:
    stop = threading.Event()
    kept: list[str] = []

    def pick_on() -> None:
        while not stop.is_set():
            kept.append(picked(server, "Still there?")["pick_id"])

    picking = threading.Thread(target=pick_on)
    picking.start()
    made = server.post("/v1/backups")
    stop.set()
    picking.join()
    assert Path(made["path"]).is_file()
    assert made["path"] in [one["path"] for one in server.get("/v1/backups")["backups"]]
    found = server.post("/v1/query", {"sql": "SELECT count(*) FROM picks"})["rows"][0][0]
    assert found >= len(kept) > 0


def test_readiness_says_that_the_store_can_keep_things(server: Server) -> None:
    assert server.get("/readyz")["status"] == "ok"


def test_an_erased_person_is_gone_and_stays_gone(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{MARK} number {n}"}],
            "chosen": "yes",
            "rejected": "no",
            "rater": "eve",
            "preference_id": f"p{n}",
            "pick_id": None,
        }
        for n in range(20)
    ]
    source = written(tmp_path / "team.jsonl", *rows)
    with serving(tmp_path / "data", engine="scripted") as server:
        assert server.upload(source)["imported"] == 20
        picked(server, "Something of my own?")
        frozen = server.post("/v1/snapshots")["snapshot"]
        server.post("/v1/backups")
        status, _ = server.refused("/v1/erasures", {"rater": "nobody"})
        assert status == 404
        said = server.post("/v1/erasures", {"rater": "eve"})
        assert said["counts"]["preferences"] == 20
        assert said["snapshots"] == [frozen]
        assert [row["source"] for row in exported(server, "trl")] == ["pick"]
        again = server.upload(source)
        assert (again["imported"], again["skipped"]) == (0, {"erased": 20})
        assert server.get("/readyz")["status"] == "ok"
    for path in (path for path in (tmp_path / "data").rglob("*") if path.is_file()):
        assert MARK.encode() not in path.read_bytes(), path
