"""Preferences on their way out: TRL rows with provenance, and CSV that is safe to open in a spreadsheet.

    store.preferences() → trl_lines → one JSON line each      store.preferences() → csv_text → a file

Not here: Parquet (``snapshots.py``), data-set cards, pushing to a hub.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator

from feedback_store.preferences import split_of
from feedback_store.records import Preference

CSV_COLUMNS = (
    "preference_id", "prompt", "chosen", "rejected", "split", "source", "rater", "weight", "pick_id", "versions",
    "practice", "created_at",
)  # fmt: skip
# A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV Injection").
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def trl_lines(preferences: Iterable[Preference]) -> Iterator[dict[str, object]]:
    """Each preference as a row in TRL's conversational form, with where it comes from beside it."""
    for preference in preferences:
        yield {
            "prompt": [dict(message) for message in preference.prompt],
            "chosen": [{"role": "assistant", "content": preference.chosen}],
            "rejected": [{"role": "assistant", "content": preference.rejected}],
            "preference_id": preference.preference_id,
            "pick_id": preference.pick_id,
            "source": preference.source,
            "rater": preference.rater,
            "weight": preference.weight,
            "versions": list(preference.versions),
            "practice": preference.practice,
            "created_at": preference.created_at.isoformat(),
        }


def csv_text(preferences: Iterable[Preference]) -> str:
    """The preferences as CSV with a header; the prompt is JSON, a cell that looks like a formula gets a ``'``."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(CSV_COLUMNS)
    for preference in preferences:
        writer.writerow(
            _safe(cell)
            for cell in (
                preference.preference_id,
                json.dumps(preference.prompt, ensure_ascii=False),
                preference.chosen,
                preference.rejected,
                split_of(preference.prompt),
                preference.source,
                preference.rater or "",
                f"{preference.weight:g}",
                preference.pick_id or "",
                " ".join(preference.versions),
                preference.practice or "",
                preference.created_at.isoformat(),
            )
        )
    return out.getvalue()


def _safe(cell: str) -> str:
    return f"'{cell}" if cell.lstrip(" ").startswith(_FORMULA_STARTS) else cell
