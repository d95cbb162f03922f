"""The layout KTO learns from: a prompt, one completion and whether it is good.

Columns ``prompt``, ``completion`` (both text, or lists of messages) and ``label``: TRL's "unpaired preference" type
(huggingface.co/docs/trl/dataset_formats). The label may be true or false, 1 or 0 (also -1), or these words as text,
as CSV has them. A row of our own export (``exports.kto_lines``) keeps its rater, weight and versions.
"""

from __future__ import annotations

from feedback_store.importers.pairs import Choices, ImportedLabel, Skip, read_label, read_provenance
from feedback_store.importers.sources import Row

NAME = "kto"
WHY = "it has the columns prompt, completion and label"

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "-1": False, "-1.0": False}


def matches(row: Row) -> bool:
    """Whether a row has the three columns."""
    return {"prompt", "completion", "label"} <= row.keys() and not isinstance(row["label"], list | dict)


def read(row: Row, _choices: Choices) -> ImportedLabel | Skip:
    """The labelled answer of a row; one without a label is unlabelled."""
    written = "" if row.get("label") is None else str(row["label"]).strip().lower()
    if written and written not in _LABELS:
        return Skip("malformed")
    rater, versions, weight = read_provenance(row) if "unpaired_id" in row else (None, (), 1.0)
    return read_label(
        row.get("prompt"),
        row.get("completion"),
        _LABELS.get(written),
        rater=rater,
        versions=versions,
        weight=weight,
        own_id=row.get("unpaired_id"),
    )
