"""The prompts no run may learn from: benchmarks a team judges its models by.

    data/evaluation_prompts/*.{txt,jsonl,json,parquet,csv}[.gz] → texts → snapshots.freeze(evaluation_prompts=…)

Put MT-Bench's question.jsonl there, or a text file with one prompt a line. A train row whose prompt is nearly one of
them is left out of every snapshot. Rows are read by the column ``prompt``, ``instruction``, ``question`` or ``turns``
(then the first turn). Not here: judging by them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feedback_store.errors import BadImport, InvalidRecord
from feedback_store.importers.pairs import read_messages
from feedback_store.importers.sources import open_rows

FOLDER = "evaluation_prompts"
_COLUMNS = ("prompt", "instruction", "question", "turns")


def load_evaluation_prompts(directory: Path) -> list[str]:
    """Every prompt of every file in the folder, sorted; none where there is no folder.

    Raises ``BadImport`` for a file that cannot be read, ``InvalidRecord`` for a row without a prompt: a snapshot that
    forgot them would learn what it is judged by.
    """
    prompts: set[str] = set()
    for path in sorted(directory.glob("[!.]*")) if directory.is_dir() else ():
        prompts.update(_prompts(path))
    return sorted(prompts)


def _prompts(path: Path) -> list[str]:
    if path.suffix == ".txt":
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise BadImport(str(path), f"it cannot be read ({error}). Save it as UTF-8 text.") from error
    return [_prompt(path, number, row) for number, row in open_rows(str(path))]


def _prompt(path: Path, number: int, row: dict[str, Any]) -> str:
    given = next((row[column] for column in _COLUMNS if row.get(column)), None)
    if isinstance(given, list) and given:
        messages = read_messages(given)
        given = given[0] if messages is None else next((m["content"] for m in messages if m["role"] == "user"), None)
    if not isinstance(given, str) or not given.strip():
        raise InvalidRecord(
            "Evaluation prompt", f"{path.name}, row {number}", given, "a text in one of " + ", ".join(_COLUMNS)
        )
    return given
