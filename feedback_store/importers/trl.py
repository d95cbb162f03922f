"""TRL's preference layouts: explicit prompt, implicit prompt, and plain strings.

* explicit: ``prompt`` is a list of messages (or text), ``chosen`` and ``rejected`` one assistant message each;
* implicit: no ``prompt``, both sides are whole dialogues that differ in their last message;
* plain strings: ``prompt``, ``chosen`` and ``rejected`` are text.

The layouts are those of TRL's page "Dataset formats and types" (huggingface.co/docs/trl/dataset_formats). Scores,
where there are any, stand beside (``score_chosen``) or in ``metadata``. A row of our own export (``exports.trl_lines``)
keeps its rater, weight and versions; a practice row of it is skipped. Not read: plain strings without a prompt, where
nothing says which part the user wrote.
"""

from __future__ import annotations

from feedback_store.exports import unguarded
from feedback_store.importers import argilla, hh_rlhf, ultrafeedback_binarized
from feedback_store.importers.pairs import Choices, ImportedPair, Skip, is_dialogue, read_pair, read_provenance
from feedback_store.importers.sources import Row

NAME = "trl"
WHY = "it has the columns chosen and rejected, with a prompt or as whole dialogues"


def matches(row: Row) -> bool:
    """Whether a row has two answers and a prompt beside them or in them, and no more particular layout."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is None:
        fits = is_dialogue(chosen) and is_dialogue(rejected)
    else:
        fits = all(isinstance(side, str) or is_dialogue(side) for side in (chosen, rejected))
    return fits and not any(layout.matches(row) for layout in (argilla, hh_rlhf, ultrafeedback_binarized))


def read(row: Row, _choices: Choices) -> ImportedPair | Skip:
    """The pair of a row; equal scores, where it has them, are a tie."""
    if "preference_id" not in row or "pick_id" not in row:
        return read_pair(row.get("prompt"), row.get("chosen"), row.get("rejected"), _scores(row))
    if row.get("practice"):
        return Skip("practice")
    rater, versions, weight = read_provenance(row)
    chosen, rejected = (unguarded(side) if isinstance(side, str) else side for side in (row["chosen"], row["rejected"]))
    if rater is not None and isinstance(row["chosen"], str):  # of a CSV, where names are guarded too
        rater = unguarded(rater)
    return read_pair(
        row.get("prompt"), chosen, rejected,
        rater=rater, versions=versions, weight=weight, own_id=row["preference_id"],
    )  # fmt: skip


def _scores(row: Row) -> tuple[object, object]:
    metadata = row.get("metadata")
    for place in (row, metadata if isinstance(metadata, dict) else {}):
        if "score_chosen" in place and "score_rejected" in place:
            return place["score_chosen"], place["score_rejected"]
    return row.get("chosen-rating"), row.get("rejected-rating")
