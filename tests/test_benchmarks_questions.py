"""The questions of a benchmark: the layouts they come in, what is refused with which sentence, and where they are."""

import http.server
import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest

from trainer.benchmarks.questions import Question, load_questions, spread
from trainer.errors import BadRunRequest

# Layouts: FastChat's question.jsonl, HuggingFaceH4/mt_bench_prompts, tatsu-lab/alpaca_eval, google/IFEval. The texts
# are ours.
FASTCHAT = [
    {"question_id": 81, "category": "writing", "turns": ["Write a note.", "Now shorter."]},
    {"question_id": 111, "category": "math", "turns": ["Two and two?", "And one?"], "reference": ["Four.", "Five."]},
]
H4 = [{"prompt_id": 7, "category": "math", "prompt": ["Two and two?", "And one?"], "reference": ["Four.", "Five."]}]
ALPACA = [{"dataset": "helpful_base", "instruction": "Name a tree.", "output": "Oak", "generator": "someone"}]
VERIFIABLE = [
    {
        "key": 1000,
        "prompt": "Write without commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_words": None}],
    }
]


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_mt_bench_is_read_from_the_data_directory(tmp_path: Path) -> None:
    put(tmp_path / "benchmarks" / "mt_bench.jsonl", FASTCHAT)
    one, other = load_questions("mt-bench", tmp_path)
    assert (one.question_id, one.category, one.turns) == ("81", "writing", ("Write a note.", "Now shorter."))
    assert other.references == ("Four.", "Five.")
    assert Question.from_dict(json.loads(json.dumps(other.as_dict()))) == other


def test_the_other_layouts(tmp_path: Path) -> None:
    (h4,) = load_questions(str(put(tmp_path / "h4.jsonl", H4)), tmp_path)
    assert (h4.question_id, h4.turns, h4.references) == ("7", ("Two and two?", "And one?"), ("Four.", "Five."))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "alpaca_eval.json").write_text(json.dumps(ALPACA))
    (alpaca,) = load_questions("alpaca-eval", tmp_path)
    assert (alpaca.question_id, alpaca.category, alpaca.turns) == ("1", "helpful_base", ("Name a tree.",))
    put(tmp_path / "benchmarks" / "ifeval.jsonl", VERIFIABLE)
    (verifiable,) = load_questions("ifeval", tmp_path)
    assert verifiable.instructions == (("punctuation:no_comma", {"num_words": None}),)
    lines = tmp_path / "own.txt"
    lines.write_text("What is rain?\n\nWhat is snow?\n")
    assert [one.turns for one in load_questions(str(lines), tmp_path)] == [("What is rain?",), ("What is snow?",)]


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes of a hub that a download uses: MT-Bench as one file, AlpacaEval's among others."""

    files: ClassVar = {
        "HuggingFaceH4/mt_bench_prompts": {"raw/question.jsonl": json.dumps(H4[0]) + "\n"},
        "tatsu-lab/alpaca_eval": {"alpaca_eval.json": json.dumps(ALPACA), "other_annotations.json": "[]"},
    }

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        bodies = {}
        for hub_id, files in self.files.items():
            siblings = [{"rfilename": name} for name in files]
            described = {"id": hub_id, "sha": "a" * 40, "siblings": siblings, "tags": []}
            bodies[f"/api/datasets/{hub_id}"] = json.dumps(described)
            bodies |= {f"/datasets/{hub_id}/resolve/main/{name}": text for name, text in files.items()}
        body = bodies.get(self.path.partition("?")[0], "").encode()
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"one"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_named_benchmark_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            hub = {"endpoint": f"http://127.0.0.1:{server.server_address[1]}", "cache": tmp_path / "cache"}
            (mt,) = load_questions("mt-bench", tmp_path, **hub)  # type: ignore[arg-type]
            (named,) = load_questions("HuggingFaceH4/mt_bench_prompts", tmp_path, **hub)  # type: ignore[arg-type]
            (alpaca,) = load_questions("alpaca-eval", tmp_path, **hub)  # type: ignore[arg-type]
            with pytest.raises(BadRunRequest, match="google/IFEval"):
                load_questions("ifeval", tmp_path, **hub)  # type: ignore[arg-type]
        finally:
            server.shutdown()
            thread.join()
    assert mt == named
    assert (mt.turns, alpaca.turns) == (("Two and two?", "And one?"), ("Name a tree.",))


def test_a_limit_takes_from_every_category() -> None:
    every = [Question(str(n), "abcd"[n // 5], ("?",)) for n in range(20)]
    assert [one.question_id for one in spread(every, 6)] == ["0", "1", "5", "6", "10", "15"]
    assert spread(every, 100) == spread(every, None) == every


def test_a_benchmark_that_is_not_here_says_what_to_download_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, hub_id, file in (
        ("mt-bench", "HuggingFaceH4/mt_bench_prompts", "mt_bench.jsonl"),
        ("alpaca-eval", "tatsu-lab/alpaca_eval", "alpaca_eval.json"),
        ("ifeval", "google/IFEval", "ifeval.jsonl"),
    ):
        with pytest.raises(BadRunRequest) as caught:
            load_questions(name, tmp_path)
        assert f"https://huggingface.co/datasets/{hub_id}" in str(caught.value)
        assert str(tmp_path / "benchmarks" / file) in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "no column"}], "row 1: 'None' is no text"),
        ([{"prompt": "one"}, {"prompt": ["two", 3]}], "row 2"),
        ([{"prompt": "x", "instruction_id_list": ["a:b"], "kwargs": []}], "1 instructions and 0 kwargs"),
        ([{"prompt": "x", "key": 1}, {"prompt": "y", "key": 1}], "more than once"),
        ([], "no questions"),
    ],
)
def test_a_wrong_file_is_refused_with_its_row(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(BadRunRequest, match=said):
        load_questions(str(put(tmp_path / "file.jsonl", rows)), tmp_path)


def test_a_name_nobody_knows_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(BadRunRequest, match=r"no benchmark 'mtbench'.*mt-bench, alpaca-eval, ifeval"):
        load_questions("mtbench", tmp_path)
    put(tmp_path / "benchmarks" / "ifeval.jsonl", FASTCHAT)
    with pytest.raises(BadRunRequest, match="no instruction_id_list"):
        load_questions("ifeval", tmp_path)
