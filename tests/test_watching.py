"""Watching a run and the estimate, by route and by command on one server, and what the admin page makes of a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_run import STEPS, evaluation_of, lines_of, made_run
from server import Server, serving
from typer.testing import CliRunner, Result

from chat_app.cli import app
from chat_app.operations import Status
from chat_app.ui.admin import overview, run_card
from chat_app.ui.curves import PLOTS, POINTS, in_words, points
from feedback_store.durable import write_json
from feedback_store.records import Counts

RUN, FAILED, OLDER = "run_20261122-231500_ab12", "run_20261121-000000_ab12", "run_20261120-000000_ab12"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("watching")
    made_run(data / "runs", RUN)
    made_run(data / "runs", FAILED, created_at="2026-11-21T00:00:00.000+00:00", state="failed")
    with serving(data, engine="scripted") as running:
        yield running


@pytest.fixture
def zloop(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command against that server."""
    monkeypatch.setenv("ZLOOP_DATA_DIR", str(server.log.parent))

    def command(*words: str) -> Result:
        return CliRunner().invoke(app, list(words))

    return command


def test_the_lines_of_a_run_all_or_since_a_step(server: Server) -> None:
    assert server.get(f"/v1/runs/{RUN}/metrics") == {"run_id": RUN, "lines": lines_of()}
    late = server.get(f"/v1/runs/{RUN}/metrics?since={STEPS - 1}")["lines"]
    assert [line["step"] for line in late] == [STEPS, STEPS]
    assert server.http.get(f"/v1/runs/{RUN}/metrics?since=-1").status_code == 422
    assert server.http.get("/v1/runs/run_nope/metrics").status_code == 404


def test_a_run_shows_its_last_step_and_its_last_validation(server: Server) -> None:
    body = server.get(f"/v1/runs/{RUN}")
    assert body["step"] == STEPS
    assert body["metrics"]["loss"] == lines_of()[-2]["loss"]
    assert body["metrics"]["eval/rewards/accuracies"] == pytest.approx(0.6)


def test_the_end_of_its_log(server: Server) -> None:
    assert server.get(f"/v1/runs/{RUN}/log?lines=1")["lines"] == ["Loading"]
    assert server.http.get(f"/v1/runs/{RUN}/log?lines=0").status_code == 422


@pytest.mark.parametrize("run_id", [RUN, FAILED])
def test_the_report_is_a_page_that_may_load_nothing(server: Server, run_id: str) -> None:
    answer = server.http.get(f"/v1/runs/{run_id}/report")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert f"<h1>{run_id}</h1>" in answer.text
    assert (server.log.parent / "runs" / run_id / "report.html").read_text(encoding="utf-8") == answer.text


def test_the_report_of_an_evaluation_is_served_as_runs_reports_are(server: Server) -> None:
    directory = server.log.parent / "evaluations" / "evaluation_0123456789ab"
    directory.mkdir(parents=True)
    write_json(directory / "evaluation.json", {**evaluation_of(64, 12, 44), "judge": None})
    answer = server.http.get(f"/v1/evaluations/{directory.name}/report")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "<h1>v4 against v3</h1>" in answer.text
    assert (directory / "report.html").read_text(encoding="utf-8") == answer.text
    for unknown in ("evaluation_nope", "..", "%2e%2e%2fruns"):
        assert server.http.get(f"/v1/evaluations/{unknown}/report").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"benchmark": "nonsense", "version": "v0"}, 400, "The named ones are mt-bench, alpaca-eval, ifeval"),
        ({"benchmark": "ifeval", "version": "v9"}, 404, "v9"),
        ({"benchmark": "mt-bench", "version": "v0", "against": "v0"}, 400, "itself"),
        ({"benchmark": "alpaca-eval", "version": "v0"}, 400, "itself"),
        ({"benchmark": "mt-bench", "version": "v0", "limit": 0}, 422, "limit"),
        ({"benchmark": "mt-bench", "version": "v0", "judge": "big"}, 422, "judge"),
    ],
)
def test_a_benchmark_that_cannot_be_asked_is_refused(server: Server, body: Any, status: int, said: str) -> None:
    answer = server.http.post("/v1/benchmarks", json=body)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_there_is_no_report_of_a_run_that_goes_on(server: Server) -> None:
    run = made_run(server.log.parent / "runs", OLDER, state="training", created_at="2026-11-20T00:00:00.000+00:00")
    try:
        answer = server.http.get(f"/v1/runs/{OLDER}/report")
        assert answer.status_code == 400
        assert f"zloop runs {OLDER} --follow" in answer.json()["error"]["message"]
    finally:
        write_json(run.directory / "state.json", {"state": "cancelled"})


def test_what_a_retrain_would_gain(server: Server) -> None:
    worth = server.get("/v1/worth")
    assert worth["low"] <= worth["gain"] <= worth["high"]
    assert worth["champion"] == "v0"
    assert worth["judged"] == 0, "the made-up run is on another base"
    assert worth["agreement"] is None
    assert str(round(abs(worth["low"]))) in worth["sentence"]


def test_the_commands(server: Server, zloop: Any, tmp_path: Path) -> None:
    listed = zloop("runs")
    assert listed.exit_code == 0, listed.output
    assert [line.split()[0] for line in listed.output.splitlines()][:2] == [RUN, FAILED]
    followed = zloop("runs", "--follow").output
    assert f"step {STEPS} of {STEPS}: loss " in followed
    assert f"validation after step {STEPS} of {STEPS}: loss 0.59" in followed
    assert "64 wins, 12 ties, 44 losses" in followed
    assert "not enough memory" in zloop("runs", FAILED).output
    assert zloop("runs", RUN, "--log", "1").output == "Loading\n"
    saved = tmp_path / "report.html"
    assert zloop("runs", RUN, "--report", str(saved)).exit_code == 0
    assert saved.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert zloop("worth").output == server.get("/v1/worth")["sentence"] + "\n"


def test_what_the_commands_refuse(zloop: Any, tmp_path: Path) -> None:
    refused = zloop("runs", "run_nope")
    assert refused.exit_code == 1
    assert "There is no run 'run_nope'" in refused.output
    refused = zloop("runs", RUN, "--report", str(tmp_path / "no" / "r.html"))
    assert refused.exit_code == 1
    assert "Name another file with --report" in refused.output


def test_words_come_before_the_curves() -> None:
    said = in_words(lines_of())
    assert "in 70% of the pairs it learns from" in said
    assert "On rows kept aside it was 60% after step 24." in said
    assert "Chosen answers have 200 tokens, rejected ones 190." in said
    assert in_words([]) == in_words(lines_of()[:1]) == ""


def test_the_points_are_the_lines() -> None:
    drawn = points(lines_of(), dict(PLOTS)["loss"])
    assert len(drawn) == STEPS + 3
    assert list(drawn[drawn.series == "validation"].step) == [8, 16, 24]
    many = points([{"step": step, "loss": 1.0} for step in range(1, 10_001)], {"loss": "training"})
    assert len(many) <= POINTS
    assert many.step.iloc[-1] == 10_000


def test_the_admin_page_links_the_report_and_says_whether_it_is_worth_it(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    assert f'href="/v1/runs/{run.run_id}/report"' in run_card(run.as_body())
    assert "/report" not in run_card(made_run(tmp_path, OLDER, state="training").as_body())
    status = Status("v0", "v0", None, 4, 50, Counts(0, 0, 0, 0, {}, {}, 0, 0))
    assert "Worth retraining yet?</b> 4 new &lt;picks&gt;" in overview(status, None, "4 new <picks>")
    assert "Worth" not in overview(status, None)
