"""The report stands alone, says what evaluation.json says, escapes what it shows, and is there however a run ended."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_run import evaluation_of, lines_of, made_run

from feedback_store.durable import write_json
from trainer import report
from trainer.report import ensure_report, render, warnings_of, write_report
from trainer.runs import Run
from trainer.sensitivity import by_rater


class Cells(HTMLParser):
    """The texts of the verdict's table, row by row, and every attribute that could fetch something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self._in_verdict = self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self._in_verdict |= given.get("id") == "verdict"
        if self._in_verdict and tag == "tr":
            self.rows.append([])
        self._in_cell = self._in_verdict and tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False
        self._in_verdict &= tag != "table"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1].append(data)


def test_it_says_what_the_result_is_without_each_rater(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    assert 'id="without"' not in write_report(run).read_text(encoding="utf-8")  # nobody rated
    pairs = {"ann <b>": [1.0] * 12, "bob": [-1.0, 1.0]}
    results = [{"rater": rater, "difference": one} for rater, differences in pairs.items() for one in differences]
    write_json(run.directory / "evaluation.json", {**(run.evaluation or {}), "raters": by_rater(results, 0.1)})
    page = write_report(run).read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td>(.*?)</td><td class=\"n\">(.*?)</tr>", page.split('id="without"')[1])
    assert [(rater, re.findall(r"[^<>/tdclasn=\" ]+", rest)) for rater, rest in rows] == [
        ("ann &lt;b&gt;", ["12", "1", "1", "50.0%", "1"]),
        ("bob", ["2", "12", "0", "100.0%", "0.0004883"]),  # 2 × 2**-12
    ]


def test_its_numbers_are_those_of_the_evaluation(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    page = write_report(run).read_text(encoding="utf-8")
    evaluation = run.evaluation
    assert evaluation is not None
    low, high = evaluation["interval"]
    assert Cells(page).rows == [
        ["held-out pairs", "120"],
        ["wins", "64"],
        ["ties", "12"],
        ["losses", "44"],
        ["win rate (wins of wins and losses)", f"{100 * 64 / 108:.1f}%"],
        ["its 95% interval (Clopper–Pearson)", f"{100 * low:.1f}% to {100 * high:.1f}%"],
        ["p of the sign test, two-sided", f"{evaluation['p_value']:.4g}"],
        ["mean margin", f"{evaluation['mean_margin']:.4g}"],
    ]
    assert run.verdict is not None
    for reason in run.verdict["reasons"]:
        assert reason in page
    for asked in ("ab" * 6, ">182<", ">113<", "zloop train --recipe dpo-lora --seed 7", "accelerate.commands.launch"):
        assert asked in page


def lone_evaluation(directory: Path, **more: Any) -> Run:
    """The directory of an evaluation that was asked for by itself."""
    directory.mkdir(parents=True)
    write_json(directory / "evaluation.json", {**evaluation_of(64, 12, 44), **more})
    return Run(directory)


def test_a_lone_evaluation_shows_what_a_run_shows_of_its_own(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    lone = lone_evaluation(tmp_path / "evaluation_1")
    page = ensure_report(lone)
    assert page == lone.directory / "report.html"
    text, own = page.read_text(encoding="utf-8"), render(run)
    assert Cells(text).rows == Cells(own).rows
    assert run.verdict is not None
    for shown in (*run.verdict["reasons"], "It is big.", "&lt;script&gt;x&lt;/script&gt;", "v4 against v3"):
        assert shown in text
    assert "zloop evaluate v4 --against v3" in text
    assert not {"script", "img", "link"} & Cells(text).tags


def test_whether_a_judge_is_configured_is_said_once(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    for where in (run, lone_evaluation(tmp_path / "evaluation_1")):
        for judge, said in ((None, "No judge is configured"), ("big-judge", "A judge is configured (big-judge)")):
            write_json(where.directory / "evaluation.json", {**evaluation_of(64, 12, 44), "judge": judge})
            assert render(where).count(said) == 1
            assert render(where).count(" judge is configured") == 1


def test_it_stands_alone(tmp_path: Path) -> None:
    page = render(made_run(tmp_path))
    found = Cells(page)
    assert "script" not in found.tags
    assert all(one.startswith("#") for one in found.fetched), found.fetched
    assert "url(http" not in page
    assert not re.search(r"@import|<link|<iframe|<object", page)
    assert page.count("<svg") == 7


def test_it_draws_what_there_is(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    bare = [{key: line[key] for key in ("step", "time", "pairs", "loss")} for line in lines_of() if "loss" in line]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    assert render(run).count("<svg") == 1


def test_every_text_is_escaped(tmp_path: Path) -> None:
    page = render(made_run(tmp_path, requested_by="<img src=x onerror=alert(1)>", recipe_name='"><script>'))
    assert "<img" not in page
    assert "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_run_that_did_not_finish_has_one_too(tmp_path: Path, state: str) -> None:
    run = made_run(tmp_path, state=state)
    if state == "cancelled":
        (run.directory / "metrics.jsonl").unlink()
        (run.directory / "log.txt").unlink()
    page = render(run)
    assert f'No verdict <span class="decision {state}">{state}' in page
    assert ("not enough memory" in page) == (state == "failed")
    assert ("<svg" in page) == (state == "failed")


def test_the_estimate_stands_beside_what_was_taken(tmp_path: Path) -> None:
    estimate = {"total_s": 1440.0, "training_s": 65.0, "evaluation_s": 30.0, "memory_bytes": 2_400_000_000}
    run = made_run(tmp_path, preflight={"estimate": estimate})
    training = run.training
    assert training is not None
    write_json(
        run.directory / "training.json", {**training, "measured": {"training_s": 71.2, "peak_memory_bytes": 2.1e9}}
    )
    page = re.sub(r"\s+", " ", render(run))
    assert '<tr><th>whole run</th><td class="n">24 min</td><td class="n">25 min</td></tr>' in page
    assert '<tr><th>training</th><td class="n">65 s</td><td class="n">71 s</td></tr>' in page
    assert '<tr><th>peak memory</th><td class="n">2.4 GB</td><td class="n">2.1 GB</td></tr>' in page


def test_it_is_written_by_a_process_of_its_own(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    path = ensure_report(run)
    assert path == run.directory / "report.html"
    assert path.read_text(encoding="utf-8") == render(run)
    assert [one.name for one in run.directory.glob(".report*")] == []


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = made_run(tmp_path)
    (run.directory / "config.json").unlink()
    assert ensure_report(run) is None
    assert "was not written" in caplog.text


def changed(lines: list[dict[str, Any]], **values: float) -> list[dict[str, Any]]:
    return [{**line, **{key: value for key, value in values.items() if key in line}} for line in lines]


def test_nothing_to_warn_of() -> None:
    assert warnings_of(lines_of(), {"dropped_over_long": 0, "validation": None}, evaluation_of(64, 12, 44)) == []
    assert warnings_of([], None, None) == []


def test_what_to_look_at_is_said_with_its_numbers() -> None:
    lines = changed(lines_of(), **{"lengths/chosen": 300.0, "rewards/accuracies": 1.0})
    lines[3]["grad_norm"] = 30.0
    training = {"dropped_over_long": 3, "validation": {"stopped_at": 16, "best_step": 8}}
    evaluation = {**evaluation_of(5, 0, 3), "skipped_over_long": 1}
    longer, by_heart, spike, dropped, stopped, few, skipped = warnings_of(lines, training, evaluation)
    assert "58% longer" in longer
    assert "300 against 190" in longer
    assert "100% in each of the last 10 steps" in by_heart
    assert "1 step, first at step 4" in spike
    assert "3 rows" in dropped
    assert "step 16" in stopped
    assert "weights of step 8" in stopped
    assert "8 held-out pairs" in few
    assert "1 held-out pair." in skipped


def test_the_limit_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LIMIT_S", 0.01)
    assert ensure_report(made_run(tmp_path)) is None
