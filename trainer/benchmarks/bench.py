"""A benchmark from end to end: questions → answers (a child) → judgements (here) → numbers → evaluation.json, report.

    data/evaluations/benchmark_<id>/{benchmark.json, answers.json, evaluation.json, report.html, log.txt}
    data/evaluations/kept/                answers and judgements by their content, for the next time

`zloop evaluate VERSION --benchmark mt-bench`. The judge is asked from this process, because a child reads its directory
and the token is to be in no file. IFEval needs no judge; without one the other benchmarks show the answers alone.
What is measured here promotes nothing: the verdict rests on the team's own held-out picks.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from feedback_store.durable import new_directory, write_json
from feedback_store.records import BASE_VERSION
from trainer.base_model import BaseModel
from trainer.benchmarks.ifeval import check_ifeval_available
from trainer.benchmarks.judge import Judge
from trainer.benchmarks.judge_prompts import comparing, grading, read_choice, read_score
from trainer.benchmarks.kept import Kept, key_of
from trainer.benchmarks.questions import ALPACA_EVAL, IFEVAL, Question, load_questions
from trainer.benchmarks.scores import comparisons, judge_bias, marks, marks_apart
from trainer.benchmarks.words import sentences
from trainer.cycle import side_of, weights_of
from trainer.errors import BadRunRequest
from trainer.recipe import DEFAULT, load_recipe
from trainer.restarts import fingerprint
from trainer.scorer import CANDIDATE, CHAMPION
from trainer.tuning import uses_bf16
from trainer.versions import Versions

MAX_TOKENS = 512
KEPT = "kept"


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody wants to know. `benchmark`: a name, a file or a hub id; `limit`: questions at most."""

    benchmark: str
    version: str
    against: str | None = None
    limit: int | None = None
    max_tokens: int = MAX_TOKENS

    @property
    def is_graded(self) -> bool:
        """Whether single answers get marks; other benchmarks only compare, and IFEval is checked by a program."""
        return self.benchmark not in (ALPACA_EVAL, IFEVAL)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a benchmark runs; `ask_child(directory)` starts the child and returns what answers.json holds."""

    data_dir: Path
    base: BaseModel
    versions: Versions
    device: str
    judge: Judge | None
    ask_child: Callable[[Path], dict[str, Any]]


def run_benchmark(asked: Asked, place: Place) -> dict[str, Any]:
    """What evaluation.json holds afterwards; its directory is `evaluations/<evaluation_id>`.

    Takes minutes. Raises BadRunRequest, VersionNotFound, TrainingUnavailable, ChildFailed, JudgeFailed.
    """
    if asked.version == asked.against:
        raise BadRunRequest(f"{asked.version} cannot be compared with itself. Name another version with --against.")
    if asked.benchmark == ALPACA_EVAL and asked.against is None:
        raise BadRunRequest("alpaca-eval compares two versions. Name the other one with --against.")
    if asked.benchmark == IFEVAL:
        check_ifeval_available()
    request = _request(asked, place)  # refuses versions that are not there, before anything is made
    questions = load_questions(asked.benchmark, place.data_dir, asked.limit)
    directory = place.data_dir / "evaluations" / f"benchmark_{uuid.uuid4().hex[:12]}"
    with new_directory(directory) as unfinished:
        write_json(unfinished / "benchmark.json", {**request, "questions": [one.as_dict() for one in questions]})
    answered = place.ask_child(directory)
    judge = None if asked.benchmark == IFEVAL else place.judge
    said = _judged(asked, judge, place.data_dir, questions, answered["answers"])
    result = {
        "evaluation_id": directory.name,
        "benchmark": asked.benchmark,
        "version": asked.version,
        "against": asked.against,
        "questions": len(questions),
        "max_tokens": asked.max_tokens,
        "unanswered": _unanswered(answered["answers"]),
        "judge": None if judge is None else {"model": judge.model, "url": judge.url},
        "ifeval": answered["ifeval"],
        **said,
    }
    result["sentences"] = sentences(result)
    write_json(directory / "evaluation.json", {**result, "answers": _side_by_side(questions, answered["answers"])})
    return result


def _request(asked: Asked, place: Place) -> dict[str, Any]:
    """benchmark.json without its questions: what the child is to load and to write."""
    recipe, models = load_recipe(DEFAULT), place.data_dir / "models"
    precision = "bf16" if uses_bf16(recipe, place.device) else "fp32"
    sides: dict[str, Any] = {}
    for name, version in ((CANDIDATE, asked.version), (CHAMPION, asked.against)):
        if version is not None:
            weights = weights_of(version, place.base.name, place.versions)
            manifest = None if version == BASE_VERSION else asdict(place.versions.load(version))
            key = key_of(place.base.name, fingerprint(place.base, models), manifest and str(manifest), precision)
            kept = place.data_dir / "evaluations" / KEPT / f"answers_{key[:16]}.jsonl"
            sides[name] = {**side_of(version, weights), "kept": str(kept)}
    return {
        **sides,
        "benchmark": asked.benchmark,
        "max_tokens": asked.max_tokens,
        "max_length": recipe.max_length,
        "precision": precision,
        "base": place.base.as_dict(),
        "models_dir": str(models),
        "device": place.device,
    }


Answers = Mapping[str, Sequence[Mapping[str, Any]]]


def _judged(
    asked: Asked, judge: Judge | None, data_dir: Path, questions: Sequence[Question], answers: Answers
) -> dict[str, Any]:
    """{"marks", "marks_apart", "comparison", "judge_bias", "graded", "compared"}; None and empty without a judge."""
    graded: dict[str, list[dict[str, Any]]] = {}
    compared: list[dict[str, Any]] = []
    if judge is not None:
        kept = Kept(data_dir / "evaluations" / KEPT / "judgements.jsonl")
        grades = list(_to_grade(questions, answers)) if asked.is_graded else []
        pairs = list(_to_compare(questions, answers)) if asked.against is not None else []
        wanted = [one["messages"] for one in grades]
        wanted += [messages for one in pairs for messages in one["messages"]]
        texts = iter(judge.judge_all(wanted, kept))
        for one in grades:
            said = next(texts)
            row = {key: one[key] for key in ("question_id", "category", "turn")}
            graded.setdefault(one["side"], []).append({**row, "score": read_score(said), "judgement": said})
        for one in pairs:
            in_order, swapped = next(texts), next(texts)
            row = {key: one[key] for key in ("question_id", "category", "turn", "longer")}
            choices = {"candidate_first": read_choice(in_order), "champion_first": read_choice(swapped)}
            compared.append({**row, **choices, "judgements": [in_order, swapped]})
    return {
        "marks": {side: marks(rows) for side, rows in graded.items()} or None,
        "marks_apart": marks_apart(graded[CANDIDATE], graded[CHAMPION])
        if len(graded) == len((CANDIDATE, CHAMPION))
        else None,
        "comparison": comparisons(compared) if compared else None,
        "judge_bias": judge_bias(compared) if compared else None,
        "graded": graded,
        "compared": compared,
    }


def _to_grade(questions: Sequence[Question], answers: Answers) -> Any:
    for side, rows in answers.items():
        for question, row in zip(questions, rows, strict=True):
            for turn in _turns(row):
                yield {
                    "side": side,
                    "question_id": question.question_id,
                    "category": question.category,
                    "turn": turn,
                    "messages": grading(question.turns[:turn], row["turns"][:turn], question.references),
                }


def _to_compare(questions: Sequence[Question], answers: Answers) -> Any:
    for question, one, other in zip(questions, answers[CANDIDATE], answers[CHAMPION], strict=True):
        for turn in sorted(set(_turns(one)) & set(_turns(other))):
            mine, theirs, turns = one["turns"][:turn], other["turns"][:turn], question.turns[:turn]
            yield {
                "question_id": question.question_id,
                "category": question.category,
                "turn": turn,
                "longer": len(mine[-1]) - len(theirs[-1]),
                "messages": [
                    comparing(turns, mine, theirs, question.references),
                    comparing(turns, theirs, mine, question.references),
                ],
            }


def _turns(row: Mapping[str, Any]) -> list[int]:
    """The turns, counted from 1, that were answered."""
    return [number for number, answer in enumerate(row["turns"], start=1) if answer is not None]


def _unanswered(answers: Answers) -> dict[str, int]:
    return {side: sum(answer is None for row in rows for answer in row["turns"]) for side, rows in answers.items()}


def _side_by_side(questions: Sequence[Question], answers: Answers) -> list[dict[str, Any]]:
    return [
        {"question_id": question.question_id, "category": question.category, "turns": list(question.turns)}
        | {side: rows[place]["turns"] for side, rows in answers.items()}
        for place, question in enumerate(questions)
    ]
