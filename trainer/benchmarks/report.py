"""evaluation.json of a benchmark → its page. Written by `trainer.report`, in a process of its own."""

from __future__ import annotations

from pathlib import Path

from feedback_store.durable import read_json
from trainer.benchmarks.pictures import pictures
from trainer.benchmarks.words import tables
from trainer.errors import EvaluationNotFound
from trainer.pages import render_page
from trainer.scorer import CANDIDATE, CHAMPION

SHOWN = 40  # questions whose answers stand in the page; evaluation.json has them all


def benchmark_page(directory: Path) -> str:
    """The page. Raises EvaluationNotFound while the benchmark has not ended."""
    result = read_json(directory / "evaluation.json")
    if result is None:
        raise EvaluationNotFound(directory.name)
    sides = [(CANDIDATE, result["version"])] + ([(CHAMPION, result["against"])] if result["against"] else [])
    command = (
        f"zloop evaluate {result['version']} --benchmark {result['benchmark']} --max-tokens {result['max_tokens']}"
    )
    if result["against"]:
        command += f" --against {result['against']}"
    asked = [
        {
            "category": one["category"],
            "turns": [
                {
                    "asked": turn,
                    "answers": [(name, one[side][number] or "(nothing)") for side, name in sides],
                }
                for number, turn in enumerate(one["turns"])
            ],
        }
        for one in result["answers"][:SHOWN]
    ]
    return render_page(
        "benchmarks/report.html",
        {
            "result": result,
            "tables": tables(result),
            "pictures": pictures(result),
            "asked": asked,
            "left_out": len(result["answers"]) - len(asked),
            "command": command,
        },
    )
