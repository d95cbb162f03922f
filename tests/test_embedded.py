"""The embedded model and real preferences, once through: import, one step, verdict, promote, answer, roll back."""

import json
from pathlib import Path

import pytest
from server import serving

SOURCE = Path(__file__).parent.parent.parent / "shared" / "data" / "ultrafeedback" / "trl_train_1000.jsonl"
SHORT_CHARACTERS = 900
ROWS = 60
QUESTION = "Why is the sky blue?"

needs_real_data = pytest.mark.skipif(not SOURCE.exists(), reason=f"the real preferences are not at {SOURCE}")


def short_rows(into: Path) -> Path:
    """Real rows that are short, so that a step takes seconds."""
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    short = [
        line
        for line in lines
        if sum(len(str(json.loads(line)[key])) for key in ("prompt", "chosen", "rejected")) < SHORT_CHARACTERS
    ]
    into.write_text("\n".join(short[:ROWS]) + "\n", encoding="utf-8")
    return into


@pytest.mark.slow
@needs_real_data
def test_the_embedded_model_learns_from_real_preferences(tmp_path: Path) -> None:
    with serving(tmp_path / "data", retrain_every=0) as server:
        before = server.chat(QUESTION, temperature=0)
        assert (before["model"], before["choices"][0]["finish_reason"]) == ("v0", "stop")
        assert "scatter" in before["choices"][0]["message"]["content"]

        imported = server.upload(short_rows(tmp_path / "short.jsonl"))
        assert imported["imported"] + sum(imported["skipped"].values()) + imported["duplicates"] == ROWS
        run = server.run_to_its_end(server.post("/v1/runs", {"max_steps": 1})["run_id"], within_s=900)
        assert run["state"] == "finished", run["error"]
        assert run["metrics"]["loss"] == pytest.approx(0.6931, abs=1e-3)
        judged = run["evaluation"]
        assert (run["verdict"]["decision"] == "keep") == (judged["p_value"] >= 0.05)
        assert judged["pairs"] == imported["imported"] - server.post("/v1/snapshots")["train"]

        assert server.post("/v1/versions/v1/promote") == {"champion": "v1", "previous": "v0"}
        assert server.chat(QUESTION, temperature=0)["model"] == "v1"
        assert server.post("/v1/rollback")["champion"] == "v0"
        assert server.chat(QUESTION, temperature=0) | {"id": 0, "created": 0} == before | {
            "id": 0,
            "created": 0,
        }


@pytest.mark.slow
@needs_real_data
def test_a_thousand_real_rows_are_imported_and_counted(tmp_path: Path) -> None:
    with serving(tmp_path, engine="scripted") as server:
        first = server.upload(SOURCE, format="trl")
        assert (first["imported"], first["duplicates"]) == (884, 0)
        assert sum(first["skipped"].values()) == 116
        assert server.upload(SOURCE)["duplicates"] == 884
