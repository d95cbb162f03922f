"""TRL's preference layouts: explicit prompt, implicit prompt, and plain strings.

* explicit: ``prompt`` is a list of messages (or text), ``chosen`` and ``rejected`` one assistant message each;
* implicit: no ``prompt``, both sides are whole dialogues that differ in their last message;
* plain strings: ``prompt``, ``chosen`` and ``rejected`` are text.

Scores, where there are any, stand beside (``score_chosen``) or in ``metadata``. Not read: plain strings without a
prompt, where nothing says which part the user wrote.
"""

from __future__ import annotations

from feedback_store.importers.pairs import ImportedPair, Skip, is_dialogue, read_pair
from feedback_store.importers.sources import Row

NAME = "trl"
WHY = "it has the columns chosen and rejected, with a prompt or as whole dialogues"


def matches(row: Row) -> bool:
    """Whether a row has two answers and a prompt beside them or in them."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is None:
        return is_dialogue(chosen) and is_dialogue(rejected)
    return all(isinstance(side, str) or is_dialogue(side) for side in (chosen, rejected))


def read(row: Row) -> ImportedPair | Skip:
    """The pair of a row; equal scores, where it has them, are a tie."""
    return read_pair(row.get("prompt"), row.get("chosen"), row.get("rejected"), _scores(row))


def _scores(row: Row) -> tuple[object, object]:
    metadata = row.get("metadata")
    for place in (row, metadata if isinstance(metadata, dict) else {}):
        if "score_chosen" in place and "score_rejected" in place:
            return place["score_chosen"], place["score_rejected"]
    return row.get("chosen-rating"), row.get("rejected-rating")
