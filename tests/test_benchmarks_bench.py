"""A benchmark from end to end: a tiny model answers, a scripted judge over HTTP judges, the numbers are by hand."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from judge_server import JudgeServer, Messages, always_first, answers_in, judging, prefers_longer
from symbol_gguf import publish_symbol_version

from feedback_store.durable import read_json
from trainer.benchmarks.answering import answer_benchmark
from trainer.benchmarks.bench import Asked, Place, run_benchmark
from trainer.benchmarks.judge import Judge
from trainer.benchmarks.words import NO_JUDGE, tables
from trainer.errors import BadRunRequest, JudgeFailed, VersionNotFound
from trainer.report import render, write_report
from trainer.runs import Run
from trainer.versions import Versions

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name: https://github.com/huggingface/peft
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

MT_BENCH = [
    {"question_id": n, "category": category, "turns": [f"Tell me about number {n}.", "Now <b>shorter</b>."]}
    for n, category in enumerate(("writing", "writing", "math", "coding"), start=81)
]
TURNS = 8
TOKENS = 12


class Children:
    """Answers in this process, as the child does, and counts how often it was started."""

    def __init__(self) -> None:
        self.started = 0

    def __call__(self, directory: Path) -> dict[str, Any]:
        self.started += 1
        asked = read_json(directory / "benchmark.json")
        assert asked is not None
        return answer_benchmark(directory, asked)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with v1, MT-Bench's layout, and the answers of both versions, which are kept."""
    directory = tmp_path_factory.mktemp("data")
    tiny_model.lend_models(directory)
    publish_symbol_version(directory / "versions", 1, "tiny")
    shutil.rmtree(directory / "versions" / "v1" / "adapter")
    tiny_model.random_adapter(tiny_model.shared_directory(), directory / "versions" / "v1" / "adapter", 1)
    (directory / "benchmarks").mkdir()
    (directory / "benchmarks" / "mt_bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MT_BENCH))
    return directory


def place(data_dir: Path, judge: JudgeServer | None, **more: Any) -> Place:
    asked = None if judge is None else Judge(judge.url, "scripted", "sk-secret-4711", pause_s=0.01, timeout_s=10)
    versions = Versions(data_dir / "versions")
    return replace(Place(data_dir, tiny_model.shared_tiny(), versions, "cpu", asked, Children()), **more)


MT = Asked("mt-bench", "v1", "v0", max_tokens=TOKENS)


def forget_judgements(data_dir: Path) -> None:
    (data_dir / "evaluations" / "kept" / "judgements.jsonl").unlink(missing_ok=True)


def written(data_dir: Path, result: dict[str, Any]) -> dict[str, Any]:
    found = read_json(data_dir / "evaluations" / result["evaluation_id"] / "evaluation.json")
    assert found is not None
    return found


def test_both_turns_are_answered_the_second_goes_on_from_the_first(data_dir: Path) -> None:
    result = run_benchmark(MT, place(data_dir, None))
    answers = written(data_dir, result)["answers"]
    assert [one["question_id"] for one in answers] == ["81", "82", "83", "84"]
    assert all(len(one[side]) == 2 and None not in one[side] for one in answers for side in ("candidate", "champion"))
    assert any(one["candidate"] != one["champion"] for one in answers)
    by_hand = plain_greedy(
        [
            {"role": "user", "content": MT_BENCH[2]["turns"][0]},
            {"role": "assistant", "content": answers[2]["champion"][0]},
            {"role": "user", "content": MT_BENCH[2]["turns"][1]},
        ]
    )
    assert answers[2]["champion"][1] == by_hand


def plain_greedy(messages: list[dict[str, Any]]) -> str:
    """The base's greedy answer, alone in its batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model.shared_directory())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.shared_directory())
    read = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**read, do_sample=False, max_new_tokens=TOKENS, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(ids[0, read["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def test_without_a_judge_it_says_so_and_shows_the_answers(data_dir: Path) -> None:
    result = run_benchmark(MT, place(data_dir, None))
    assert result["sentences"] == [NO_JUDGE]
    assert (result["marks"], result["comparison"], result["judge"]) == (None, None, None)
    page = render(Run(data_dir / "evaluations" / result["evaluation_id"]))
    assert page.count("No judge is configured") == 1
    assert "&lt;b&gt;shorter&lt;/b&gt;" in page


def test_a_judge_that_counts_characters(data_dir: Path) -> None:
    forget_judgements(data_dir)
    with judging(prefers_longer) as server:
        result = run_benchmark(MT, place(data_dir, server))
        assert len(server.bodies) == len({json.dumps(body["messages"]) for body in server.bodies}) <= 4 * TURNS
    answers = written(data_dir, result)["answers"]
    lengths = [(len(mine), len(theirs)) for one in answers for mine, theirs in zip(*sides_of(one), strict=True)]
    counted = result["comparison"]
    assert counted["wins"] == sum(mine > theirs for mine, theirs in lengths)
    assert counted["losses"] == sum(mine < theirs for mine, theirs in lengths)
    assert counted["pairs"] == TURNS
    scores = [min(10, max(1, mine // 10)) for mine, _ in lengths]
    assert result["marks"]["candidate"]["mean"] == pytest.approx(sum(scores) / TURNS)
    assert result["marks"]["candidate"]["turns"]["2"] == pytest.approx(sum(scores[1::2]) / 4)
    assert result["marks"]["candidate"]["categories"]["math"] == pytest.approx(sum(scores[4:6]) / 2)
    bias = result["judge_bias"]
    assert (bias["inconsistent"], bias["unreadable"]) == (0, 0)
    assert bias["first"] == bias["second"]


def sides_of(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    return row["candidate"], row["champion"]


def test_a_judge_that_always_takes_the_first(data_dir: Path) -> None:
    forget_judgements(data_dir)
    with judging(always_first) as server:
        result = run_benchmark(MT, place(data_dir, server))
    counted, bias = result["comparison"], result["judge_bias"]
    assert (counted["wins"], counted["ties"], counted["losses"]) == (0, TURNS, 0)
    assert (bias["first_share"], bias["inconsistent_share"]) == (1.0, 1.0)
    assert result["marks"]["candidate"]["mean"] == result["marks"]["champion"]["mean"] == 5.0
    assert result["marks_apart"] == {"mean": 0.0, "interval": None, "questions": 4}
    said = " ".join(result["sentences"])
    assert "chose the first place in 100% of the 16 judgements" in said
    assert "take a stronger one" in said
    assert "marked +0.00 against v0 on 4 questions, each by the same" in said


def test_a_judge_that_talks_garbage(data_dir: Path) -> None:
    forget_judgements(data_dir)
    with judging(lambda _: "As an examiner I find both delightful. 1 or 2?") as server:
        result = run_benchmark(MT, place(data_dir, server))
    assert result["marks"]["candidate"]["mean"] is None
    assert (result["comparison"]["pairs"], result["comparison"]["unreadable"]) == (0, TURNS)
    assert f"{4 * TURNS} of {4 * TURNS} judgements could not be read" in " ".join(result["sentences"])
    shown = written(data_dir, result)["compared"][0]["judgements"]
    assert shown == ["As an examiner I find both delightful. 1 or 2?"] * 2
    assert "–" in render(Run(data_dir / "evaluations" / result["evaluation_id"]))


def test_a_judge_that_is_down_half_way_and_then_back(data_dir: Path) -> None:
    forget_judgements(data_dir)
    allowed = threading.Semaphore(9)

    def word(messages: Messages) -> str | int:
        return prefers_longer(messages) if allowed.acquire(blocking=False) else 502

    with judging(word) as server:
        broken = place(data_dir, server)
        with pytest.raises(JudgeFailed, match="goes on there"):
            run_benchmark(MT, broken)
        server.word = prefers_longer
        server.bodies.clear()
        after = run_benchmark(MT, broken)
        went_on = len(server.bodies)
        forget_judgements(data_dir)
        server.bodies.clear()
        anew = run_benchmark(MT, broken)
        assert went_on == len(server.bodies) - 9
    for key in ("marks", "comparison", "judge_bias"):
        assert after[key] == anew[key]
    for path in (data_dir / "evaluations").rglob("*.*"):
        assert "sk-secret-4711" not in path.read_text(encoding="utf-8"), path


def test_answers_are_kept_and_not_written_twice(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_benchmark(MT, place(data_dir, None))
    monkeypatch.setattr("trainer.benchmarks.answering.Scorer", None)  # a model that is loaded would fail now
    again = run_benchmark(MT, place(data_dir, None))
    assert written(data_dir, again)["answers"] == written(data_dir, first)["answers"]
    fewer = run_benchmark(replace(MT, limit=3), place(data_dir, None))
    assert [one["question_id"] for one in written(data_dir, fewer)["answers"]] == ["81", "83", "84"]


def test_alpaca_eval_compares_only_and_one_version_alone_is_marked(data_dir: Path) -> None:
    forget_judgements(data_dir)
    rows = [{"instruction": f"Say {n}.", "dataset": "d"} for n in range(6)]
    (data_dir / "benchmarks" / "alpaca_eval.json").write_text(json.dumps(rows))
    with judging(prefers_longer) as server:
        compared = run_benchmark(replace(MT, benchmark="alpaca-eval"), place(data_dir, server))
        assert all(len(answers_in(body["messages"])) == 2 for body in server.bodies)
        alone = run_benchmark(replace(MT, against=None), place(data_dir, server))
    assert compared["marks"] is None
    assert compared["comparison"]["comparisons"] == 6
    assert (list(alone["marks"]), alone["comparison"]) == (["candidate"], None)
    assert "None" not in " ".join(alone["sentences"])


def test_ifeval_needs_no_judge(data_dir: Path) -> None:
    pytest.importorskip("if_verifiable", reason="the extra `ifeval` is not installed")
    row = {"instruction_id_list": ["length_constraints:number_words"]}
    rows = [
        {**row, "key": n, "prompt": f"Say {n}.", "kwargs": [{"relation": "at least", "num_words": n * 1000 + 1}]}
        for n in range(4)
    ]
    (data_dir / "benchmarks" / "ifeval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    result = run_benchmark(replace(MT, benchmark="ifeval"), place(data_dir, None))
    assert result["ifeval"]["candidate"]["prompt_strict"] == 1 / 4  # one word is there, a thousand are not
    assert result["sentences"][0].startswith("v1 follows all instructions of 25.0% of 4 prompts")
    assert "No judge" not in " ".join(result["sentences"])
    assert "Instructions followed" in render(Run(data_dir / "evaluations" / result["evaluation_id"]))


def test_a_dialogue_that_is_too_long_is_left_out_and_counted(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    long = "word " * (tiny_model.CONTEXT + 10)
    path.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in (["Hi.", long], ["Hi."])))
    with judging(always_first) as server:
        result = run_benchmark(replace(MT, benchmark=str(path)), place(data_dir, server))
    assert result["unanswered"] == {"candidate": 1, "champion": 1}
    assert result["comparison"]["comparisons"] == 2
    assert "v1 had no room for 1 turn" in " ".join(result["sentences"])


def test_the_page_shows_the_tables_and_pictures_and_stands_alone(data_dir: Path) -> None:
    forget_judgements(data_dir)
    with judging(prefers_longer) as server:
        result = run_benchmark(MT, place(data_dir, server))
    run = Run(data_dir / "evaluations" / result["evaluation_id"])
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    for sentence in result["sentences"]:
        assert sentence.replace("'", "&#39;") in page
    for table in tables(result):
        for row in table["rows"]:
            assert f"<th>{row[0]}</th>" in page
    assert "<script" not in page
    assert "http://www.w3.org" in page  # the name of SVG; nothing is fetched
    assert not [one for one in ("@import", "<link", "<img", "url(http") if one in page]


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (replace(MT, against="v1"), BadRunRequest, "itself"),
        (replace(MT, version="v9"), VersionNotFound, "v9"),
        (Asked("alpaca-eval", "v1"), BadRunRequest, "--against"),
        (Asked("nonsense", "v1"), BadRunRequest, "There is no benchmark 'nonsense'"),
    ],
)
def test_what_cannot_be_asked_leaves_nothing(data_dir: Path, asked: Asked, error: type[Exception], said: str) -> None:
    before = sorted((data_dir / "evaluations").glob("*"))
    with pytest.raises(error, match=said):
        run_benchmark(asked, place(data_dir, None))
    assert sorted((data_dir / "evaluations").glob("*")) == before
