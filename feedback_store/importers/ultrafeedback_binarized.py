"""The layout of HuggingFaceH4/ultrafeedback_binarized: a prompt, two dialogues and their scores.

Columns ``prompt``, ``chosen``, ``rejected``, ``score_chosen``, ``score_rejected``. Its rejected answer is a random
other one, so ties are normal (11% in a sample). ``prompt_id`` and ``messages`` are not kept; it names no models.
"""

from __future__ import annotations

from feedback_store.importers.pairs import Choices, ImportedPair, Skip, is_dialogue, read_pair
from feedback_store.importers.sources import Row

NAME = "ultrafeedback_binarized"
WHY = "it has a text prompt, two dialogues and the columns score_chosen and score_rejected"


def matches(row: Row) -> bool:
    """Whether a row has the scores, a text prompt and two dialogues."""
    scored = "score_chosen" in row and "score_rejected" in row
    return scored and isinstance(row.get("prompt"), str) and is_dialogue(row.get("chosen"))


def read(row: Row, _choices: Choices) -> ImportedPair | Skip:
    """The pair of a row; equal scores are a tie."""
    scores = row.get("score_chosen"), row.get("score_rejected")
    return read_pair(row.get("prompt"), row.get("chosen"), row.get("rejected"), scores)
