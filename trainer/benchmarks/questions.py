"""A benchmark by name, a file or a hub id → its questions, in one shape.

    mt-bench     FastChat's question.jsonl (vicuna_bench's too) or the hub's columns: turns, a category, references
    alpaca-eval  `instruction`
    ifeval       `prompt`, `instruction_id_list`, `kwargs`, as google/IFEval has them
    FILE         any of these, or a text file with one prompt a line; rows without `turns` have one turn

A named benchmark is read from `data/benchmarks/`, else from the hub. None of them ships with this product.
Not covered: system prompts, dialogues whose assistant turns are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from feedback_store.errors import BadImport
from feedback_store.importers.sources import open_rows
from trainer.errors import BadRunRequest

MT_BENCH, ALPACA_EVAL, IFEVAL = "mt-bench", "alpaca-eval", "ifeval"
FOLDER = "benchmarks"
_TURNS = ("turns", "prompt", "instruction", "question")
_IDS = ("question_id", "key", "prompt_id")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a named benchmark is looked for: a file in `data/benchmarks/`, then a data set of the hub (or one file)."""

    file: str
    hub_id: str
    hub_file: str | None = None


SOURCES = {
    MT_BENCH: Source("mt_bench.jsonl", "HuggingFaceH4/mt_bench_prompts"),
    ALPACA_EVAL: Source("alpaca_eval.json", "tatsu-lab/alpaca_eval", "alpaca_eval.json"),
    IFEVAL: Source("ifeval.jsonl", "google/IFEval"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question: what the person says turn by turn; `references` are answers known to be right, where there are.

    `instructions` are IFEval's: pairs of an instruction's name and its arguments.
    """

    question_id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()
    instructions: tuple[tuple[str, dict[str, Any]], ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for benchmark.json."""
        return {
            "question_id": self.question_id,
            "category": self.category,
            "turns": list(self.turns),
            "references": list(self.references),
            "instructions": [[name, arguments] for name, arguments in self.instructions],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Question:
        """The inverse of `as_dict`."""
        return cls(
            values["question_id"],
            values["category"],
            tuple(values["turns"]),
            tuple(values["references"]),
            tuple((name, arguments) for name, arguments in values["instructions"]),
        )


def load_questions(
    benchmark: str, data_dir: Path, limit: int | None = None, *, endpoint: str | None = None, cache: Path | None = None
) -> list[Question]:
    """The questions of a named benchmark, a file or a hub id; at most `limit`, taken from all categories in turn.

    `endpoint` and `cache` are the hub's address and the download folder where they are not the usual ones.
    Raises BadRunRequest with what to download and where to put it, or which row is wrong.
    """
    rows = _rows(benchmark, data_dir, endpoint, cache)
    try:
        questions = [_question(benchmark, number, row) for number, row in rows]
    except BadImport as error:
        raise BadRunRequest(str(error)) from error
    if not questions:
        raise BadRunRequest(f"{benchmark} holds no questions. Name a file with one prompt a row.")
    if benchmark == IFEVAL and not any(question.instructions for question in questions):
        raise BadRunRequest("The questions of ifeval hold no instruction_id_list: take google/IFEval's file.")
    repeated = len(questions) - len({question.question_id for question in questions})
    if repeated:
        raise BadRunRequest(f"{benchmark}: {repeated} question ids come more than once. Give each row its own.")
    return spread(questions, limit)


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, from each category in turn, in the file's order."""
    if limit is None or limit >= len(questions):
        return list(questions)
    categories: dict[str, list[Question]] = {}
    for question in questions:
        categories.setdefault(question.category, []).append(question)
    in_turn = [one for row in zip_longest(*categories.values()) for one in row if one is not None][:limit]
    return [question for question in questions if question in in_turn]


def _rows(
    benchmark: str, data_dir: Path, endpoint: str | None, cache: Path | None
) -> Iterable[tuple[int, dict[str, Any]]]:
    source = SOURCES.get(benchmark)
    if source is None:
        return _file_rows(benchmark, endpoint, cache)
    here = data_dir / FOLDER / source.file
    if here.is_file():
        return _file_rows(str(here))
    try:
        if source.hub_file is not None:
            return open_rows(str(_hub_file(source.hub_id, source.hub_file, endpoint, cache)))
        return open_rows(source.hub_id, endpoint=endpoint, cache=cache)
    except BadImport as error:
        wanted = f"https://huggingface.co/datasets/{source.hub_id}"
        raise BadRunRequest(
            f"The questions of {benchmark} are not here and the hub did not give them ({error}) "
            f"Download them from {wanted} and put the file at {here}, or name a file of prompts with --benchmark."
        ) from error


def _file_rows(
    name: str, endpoint: str | None = None, cache: Path | None = None
) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        path = Path(name).expanduser()
        if path.suffix == ".txt" and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            return [(number, {"prompt": line}) for number, line in enumerate(lines, start=1) if line.strip()]
        return open_rows(name, endpoint=endpoint, cache=cache)
    except BadImport as error:
        named = ", ".join(SOURCES)
        raise BadRunRequest(f"There is no benchmark {name!r}: {error} The named ones are {named}.") from error
    except (OSError, RuntimeError, ValueError) as error:  # no home, NUL, no UTF-8
        raise BadRunRequest(f"{name} cannot be read ({error}). Save it as UTF-8 text, one prompt a line.") from error


def _hub_file(hub_id: str, name: str, endpoint: str | None, cache: Path | None) -> Path:
    """One file of a data set that holds more than its questions. Raises BadImport."""
    from httpx2 import HTTPError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = hf_hub_download(hub_id, name, repo_type="dataset", endpoint=endpoint, cache_dir=cache, etag_timeout=10)
        return Path(found)
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise BadImport(hub_id, f"{name} cannot be downloaded ({str(error).strip().partition(chr(10))[0]})") from error


def _question(benchmark: str, number: int, row: dict[str, Any]) -> Question:
    given = next((row[column] for column in _TURNS if row.get(column)), None)
    turns: list[Any] = given if isinstance(given, list) else [given]
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise BadRunRequest(
            f"{benchmark}, row {number}: {str(given)[:80]!r} is no text. A row needs one of {', '.join(_TURNS)}: "
            "a text, or a list of texts for several turns."
        )
    references = row.get("reference") or []
    names, arguments = row.get("instruction_id_list") or [], row.get("kwargs") or []
    if len(names) != len(arguments):
        raise BadRunRequest(
            f"{benchmark}, row {number}: {len(names)} instructions and {len(arguments)} kwargs. Each needs its own."
        )
    known = next((row[column] for column in _IDS if row.get(column) is not None), number)
    return Question(
        question_id=str(known),
        category=str(row.get("category") or (row.get("dataset") if benchmark == ALPACA_EVAL else None) or "all"),
        turns=tuple(turns),
        references=tuple(references) if isinstance(references, list) else (str(references),),
        instructions=tuple((str(name), dict(own or {})) for name, own in zip(names, arguments, strict=True)),
    )
