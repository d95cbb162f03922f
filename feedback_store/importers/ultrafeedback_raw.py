"""The layout of openbmb/UltraFeedback: an instruction and up to four answers, each rated by GPT-4; made into a pair.

Columns ``instruction`` and ``completions``: a list with ``model``, ``response``, ``overall_score`` and
``annotations`` of four aspects (``instruction_following``, ``honesty``, ``truthfulness``, ``helpfulness``), each with
a ``Rating`` from 1 to 5 written as text, or ``N/A`` (repository OpenBMB/UltraFeedback, README.md).

The best answer is chosen. Rejected is another one at random, as for Zephyr (Tunstall et al., 2023, arXiv:2310.16944,
section 3), or the worst. The score is the mean of the aspects' ratings, or ``overall_score`` by choice. Prefer the
ratings: ``overall_score`` has known wrong values, a critique that gave 1 stands as 10 in about 2,000 answers
(github.com/OpenBMB/UltraFeedback issue 8, November 2023; README of the data set
argilla/ultrafeedback-binarized-preferences). The system prompt each answer was written under (``custom_system_prompt``)
differs from answer to answer and is not kept. The data holds prompts of TruthfulQA (``source`` is ``truthful_qa``).
"""

from __future__ import annotations

import hashlib
from typing import Any

from feedback_store.importers.pairs import Choices, ImportedPair, Skip, as_number, read_pair, read_versions
from feedback_store.importers.sources import Row

NAME = "ultrafeedback_raw"
WHY = "it has the column instruction and a list of completions with a response each"

_Scored = tuple[float, dict[str, Any]]


def matches(row: Row) -> bool:
    """Whether a row has an instruction and completions."""
    completions = row.get("completions")
    return (
        isinstance(row.get("instruction"), str)
        and isinstance(completions, list)
        and bool(completions)
        and all(isinstance(completion, dict) and "response" in completion for completion in completions)
    )


def read(row: Row, choices: Choices) -> ImportedPair | Skip:
    """The best answer of a row against another one; equal scores are a tie.

    Which one is random depends on the instruction and the seed, not on where the row stands.
    """
    if not matches(row):
        return Skip("malformed")
    instruction = row["instruction"]
    scored = [(score, one) for one in row["completions"] if (score := _score(one, choices.score)) is not None]
    if len(scored) < 2:
        return Skip("unlabelled")
    best = max(scored, key=lambda one: one[0])
    others = [one for one in scored if one is not best]
    rejected = _drawn(others, instruction, choices.seed) if choices.rejected == "random" else min(others, key=_worth)
    return read_pair(
        instruction,
        best[1]["response"],
        rejected[1]["response"],
        (best[0], rejected[0]),
        versions=read_versions(best[1].get("model"), rejected[1].get("model")),
    )


def _worth(scored: _Scored) -> float:
    return scored[0]


def _drawn(others: list[_Scored], instruction: str, seed: int) -> _Scored:
    digest = hashlib.sha256(f"{seed}\n{instruction}".encode(errors="surrogatepass")).digest()
    return others[int.from_bytes(digest[:8], "big") % len(others)]


def _score(completion: dict[str, Any], kind: str) -> float | None:
    if kind == "overall_score":
        return as_number(completion.get("overall_score"))
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, dict) else ()
    ratings = [as_number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None
