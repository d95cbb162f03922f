"""Preferences from elsewhere: which format a source has, and its rows as preferences, one batch at a time.

    path or hub id --sources--> rows --detect--> importer --read--> ImportedPair or Skip --> Preference

One file a format; each has ``NAME``, ``WHY`` (the sign it is known by), ``matches(row)`` and ``read(row)``.
``FeedbackStore.record_import`` puts the batches into the store. Not here: raw UltraFeedback, hh-rlhf dialogues and
the exports of other chat programs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain, islice
from typing import Protocol

from feedback_store.errors import BadImport, InvalidRecord
from feedback_store.importers import argilla, trl, ultrafeedback_binarized
from feedback_store.importers.pairs import ImportedPair, Skip
from feedback_store.importers.sources import NumberedRow, Row, open_rows
from feedback_store.preferences import preference_id
from feedback_store.records import Preference

_ROWS_TO_DETECT = 20


class Importer(Protocol):
    """What a format's module offers."""

    NAME: str
    WHY: str

    def matches(self, row: Row) -> bool: ...

    def read(self, row: Row) -> ImportedPair | Skip: ...


# The most particular format first: TRL's columns are part of the others.
FORMATS: Mapping[str, Importer] = {module.NAME: module for module in (argilla, ultrafeedback_binarized, trl)}


def detect(rows: Sequence[Row]) -> tuple[str, str] | None:
    """The format that most of these rows have and the sign it is known by; None where no format fits."""
    for name, importer in FORMATS.items():
        if 2 * sum(importer.matches(row) for row in rows) > len(rows):
            return name, importer.WHY
    return None


class PreferenceSource:
    """The preferences of one file or data set, read as they are asked for; counts what it skips."""

    def __init__(self, rows: Iterator[NumberedRow], name: str, why: str, created_at: datetime) -> None:
        self.format = name
        self.why = why
        self.rows_read = 0
        self.skipped: Counter[str] = Counter()
        self._rows = rows
        self._importer = FORMATS[name]
        self._created_at = created_at

    def batches(self, size: int) -> Iterator[list[Preference]]:
        """The preferences in lists made from ``size`` rows each (shorter where rows were skipped).

        Raises ``BadImport`` at a row that cannot be read.
        """
        while batch := list(islice(self._rows, size)):
            self.rows_read += len(batch)
            read = [self._preference(row) for _, row in batch]
            yield [preference for preference in read if preference is not None]

    def _preference(self, row: Row) -> Preference | None:
        pair = self._importer.read(row)
        if isinstance(pair, ImportedPair):
            try:
                return self._record(pair)
            except InvalidRecord:
                pair = Skip("malformed")
        self.skipped[pair.reason] += 1
        return None

    def _record(self, pair: ImportedPair) -> Preference:
        return Preference(
            preference_id=_identity(pair),
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            source=self.format,
            weight=1.0,
            rater=None,
            pick_id=None,
            versions=(),
            practice=None,
            created_at=self._created_at,
        )


def read_preferences(path_or_hub_id: str, name: str, created_at: datetime) -> PreferenceSource:
    """Open a source in the named format, or find its format out for ``auto``. Raises ``BadImport``."""
    if name != "auto" and name not in FORMATS:
        raise BadImport(path_or_hub_id, f"the format {name!r} is not known. Known formats: auto, {', '.join(FORMATS)}.")
    rows = open_rows(path_or_hub_id)
    first = list(islice(rows, _ROWS_TO_DETECT))
    if not first:
        raise BadImport(path_or_hub_id, "it holds no rows.")
    found, why = _choose([row for _, row in first], path_or_hub_id, name)
    return PreferenceSource(chain(first, rows), found, why, created_at)


def _choose(first: Sequence[Row], source: str, name: str) -> tuple[str, str]:
    columns = ", ".join(sorted(map(str, first[0])))
    if name == "auto":
        detected = detect(first)
        if detected is None:
            raise BadImport(source, f"no known format has the columns {columns}. Known formats: {', '.join(FORMATS)}.")
        return detected
    if not any(FORMATS[name].matches(row) for row in first):
        raise BadImport(
            source, f"it is not {name} ({FORMATS[name].WHY}); its columns are {columns}. Try the format auto."
        )
    return name, "named by the caller"


def _identity(pair: ImportedPair) -> str:
    try:
        return preference_id(pair.prompt, pair.chosen, pair.rejected, None)
    except UnicodeEncodeError as error:
        raise InvalidRecord("Preference", "prompt", pair.prompt, "valid Unicode") from error
