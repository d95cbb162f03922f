"""The layout of argilla/ultrafeedback-binarized-preferences-cleaned: two dialogues and their ratings.

Columns ``prompt``, ``chosen``, ``rejected``, ``chosen-rating``, ``rejected-rating``, ``chosen-model`` and
``rejected-model`` (with hyphens), and ``source``, which is not kept.
"""

from __future__ import annotations

from feedback_store.importers.pairs import Choices, ImportedPair, Skip, is_dialogue, read_pair, read_versions
from feedback_store.importers.sources import Row

NAME = "argilla"
WHY = "it has the columns chosen-rating and rejected-rating"


def matches(row: Row) -> bool:
    """Whether a row has the ratings and two dialogues."""
    return "chosen-rating" in row and "rejected-rating" in row and is_dialogue(row.get("chosen"))


def read(row: Row, _choices: Choices) -> ImportedPair | Skip:
    """The pair of a row; equal ratings are a tie."""
    return read_pair(
        row.get("prompt"),
        row.get("chosen"),
        row.get("rejected"),
        (row.get("chosen-rating"), row.get("rejected-rating")),
        versions=read_versions(row.get("chosen-model"), row.get("rejected-model")),
    )
