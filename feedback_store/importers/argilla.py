"""The layout of argilla/ultrafeedback-binarized-preferences-cleaned: two dialogues and their ratings.

Columns ``prompt``, ``chosen``, ``rejected``, ``chosen-rating``, ``rejected-rating`` (with hyphens), and models and
source, which are not kept.
"""

from __future__ import annotations

from feedback_store.importers.pairs import ImportedPair, Skip, is_dialogue, read_pair
from feedback_store.importers.sources import Row

NAME = "argilla"
WHY = "it has the columns chosen-rating and rejected-rating"


def matches(row: Row) -> bool:
    """Whether a row has the ratings and two dialogues."""
    return "chosen-rating" in row and "rejected-rating" in row and is_dialogue(row.get("chosen"))


def read(row: Row) -> ImportedPair | Skip:
    """The pair of a row; equal ratings are a tie."""
    scores = row.get("chosen-rating"), row.get("rejected-rating")
    return read_pair(row.get("prompt"), row.get("chosen"), row.get("rejected"), scores)
