"""Preferences from elsewhere: which format a source has, and its rows as preferences, one batch at a time.

    path or hub id --sources--> rows --detect--> importer --read--> pairs, labels, skips --> Batch

One file a format; each has ``NAME``, ``WHY`` (the sign it is known by), ``matches(row)`` and ``read(row, choices)``,
and says in its docstring where the layout was seen. ``FeedbackStore.record_import`` puts the batches into the store,
all of them or none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from typing import Protocol

from feedback_store.errors import BadImport, InvalidRecord
from feedback_store.importers import (
    argilla,
    argilla_records,
    h2ogpt,
    hh_rlhf,
    kto,
    librechat,
    open_webui,
    trl,
    ultrafeedback_binarized,
    ultrafeedback_raw,
)
from feedback_store.importers.limits import weight
from feedback_store.importers.pairs import Choices, ImportedLabel, ImportedPair, Item, Skip
from feedback_store.importers.sources import NumberedRow, Row, Rows, open_rows
from feedback_store.preferences import preference_id, unpaired_id
from feedback_store.records import Preference, UnpairedPreference

__all__ = ["FORMATS", "Batch", "Choices", "PreferenceSource", "detect", "read_preferences"]

DEFAULT_CHOICES = Choices()
_ROWS_TO_DETECT, _BYTES_TO_DETECT = 20, 16 * 2**20
_BATCH_CHARACTERS = 8_000_000
_SHOWN_COLUMNS = 30
_OVERHEAD = 500  # characters that the other columns of a row are worth
_EXAMPLES = 5

IsErased = Callable[[str | None, str], bool]


class Importer(Protocol):
    """What a format's module offers."""

    NAME: str
    WHY: str

    def matches(self, row: Row) -> bool: ...

    def read(self, row: Row, choices: Choices) -> Item | Sequence[Item]: ...


# The most particular format first: TRL's columns are part of others, which it leaves to them.
FORMATS: Mapping[str, Importer] = {
    module.NAME: module
    for module in (
        open_webui, librechat, h2ogpt, argilla_records, ultrafeedback_raw, argilla, ultrafeedback_binarized, hh_rlhf,
        kto, trl,
    )
}  # fmt: skip


def detect(rows: Sequence[Row]) -> tuple[str, str] | None:
    """The format that most of these rows have and the sign it is known by; None where no format fits."""
    for name, importer in FORMATS.items():
        if 2 * sum(importer.matches(row) for row in rows) > len(rows):
            return name, importer.WHY
    return None


@dataclass(frozen=True, slots=True)
class Batch:
    """What a number of rows gave: pairs, and single answers with a label; raters are named as the file does.

    An id is that of the row's contents: several raters' words on one row have the same. ``own_ids`` has for each record
    of ``pairs``, then of ``unpaired``, what our own export called it, None where it is no row of one.
    """

    pairs: list[Preference]
    unpaired: list[UnpairedPreference]
    own_ids: tuple[list[str | None], list[str | None]] = field(default_factory=lambda: ([], []))


class PreferenceSource:
    """The preferences of one file or data set, read as they are asked for.

    ``format`` and ``why`` say which layout it has and how that is known. ``rows_read`` grows with every batch;
    ``skipped`` counts by reason what was left out, ``examples`` has the numbers of the first rows of each reason. A row
    that holds several judgements counts once for each.
    """

    def __init__(
        self,
        rows: Rows,
        first: Sequence[NumberedRow],
        *,
        found: tuple[str, str],
        created_at: datetime,
        choices: Choices,
        erased: IsErased,
    ) -> None:
        self.format, self.why = found
        self.rows_read = 0
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, list[int]] = {}
        self._source = rows
        self._rows = chain(first, rows)
        self._importer = FORMATS[self.format]
        self._created_at = created_at
        self._choices = choices
        self._erased = erased

    @property
    def bytes_read(self) -> int | None:
        """How far the reading is in the files, for a progress bar; None where that is not known."""
        return self._source.bytes_read

    @property
    def bytes_total(self) -> int | None:
        """The size of the files, all together; None where that is not known."""
        return self._source.bytes_total

    def batches(self, size: int) -> Iterator[Batch]:
        """The preferences in batches made from at most ``size`` rows each, fewer where their texts are long.

        A row with very many judgements stands in several batches. Raises ``BadImport`` at a row that cannot be read.
        """
        batch, rows, characters = Batch([], []), 0, 0
        for number, row in self._rows:
            read = self._importer.read(row, self._choices)
            for item in (read,) if isinstance(read, Item) else read:
                self._add(batch, number, item)
                characters += _length(item)
                if characters >= _BATCH_CHARACTERS:
                    yield batch
                    batch, characters = Batch([], []), 0
            self.rows_read, rows = self.rows_read + 1, rows + 1
            if rows == size:
                yield batch
                batch, rows, characters = Batch([], []), 0, 0
        if rows:
            yield batch

    def _add(self, batch: Batch, number: int, item: Item) -> None:
        try:
            if isinstance(item, ImportedPair):
                batch.pairs.append(self._preference(item))
                batch.own_ids[0].append(item.own_id)
            elif isinstance(item, ImportedLabel):
                batch.unpaired.append(self._unpaired(item))
                batch.own_ids[1].append(item.own_id)
            else:
                self._count(number, item.reason)
        except _Erased:
            self._count(number, "erased")
        # Half a surrogate pair cannot be hashed.
        except (InvalidRecord, UnicodeEncodeError):
            self._count(number, "malformed")

    def _count(self, number: int, reason: str) -> None:
        self.skipped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES and number not in examples:
            examples.append(number)

    def _preference(self, pair: ImportedPair) -> Preference:
        identity = preference_id(pair.prompt, pair.chosen, pair.rejected, None)
        if self._erased(pair.rater, identity):
            raise _Erased
        return Preference(
            preference_id=identity,
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            source=self.format,
            weight=pair.weight,
            rater=pair.rater,
            pick_id=None,
            versions=pair.versions,
            practice=None,
            created_at=self._created_at,
        )

    def _unpaired(self, answer: ImportedLabel) -> UnpairedPreference:
        identity = unpaired_id(answer.prompt, answer.completion, answer.label, None)
        if self._erased(answer.rater, identity):
            raise _Erased
        return UnpairedPreference(
            unpaired_id=identity,
            prompt=answer.prompt,
            completion=answer.completion,
            label=answer.label,
            source=self.format,
            weight=answer.weight,
            rater=answer.rater,
            versions=answer.versions,
            created_at=self._created_at,
        )


def _length(item: Item) -> int:
    """About the characters of an item in a table."""
    if isinstance(item, Skip):
        return 0
    answers = (item.chosen, item.rejected) if isinstance(item, ImportedPair) else (item.completion,)
    texts = (*(one["content"] for one in item.prompt), *answers, item.rater or "", *item.versions)
    return _OVERHEAD + sum(map(len, texts))


class _Erased(Exception):
    """The row belongs to a person who was erased, or was erased itself."""


def read_preferences(
    path_or_hub_id: str,
    name: str,
    created_at: datetime,
    choices: Choices = DEFAULT_CHOICES,
    erased: IsErased = lambda _rater, _content_id: False,
) -> PreferenceSource:
    """Open a source in the named format, or find its format out for ``auto``. Raises ``BadImport``.

    Rows for which ``erased(rater, content_id)`` is true are skipped with that reason.
    """
    if name != "auto" and name not in FORMATS:
        raise BadImport(path_or_hub_id, f"the format {name!r} is not known. Known formats: auto, {', '.join(FORMATS)}.")
    rows = open_rows(path_or_hub_id)
    first = _beginning(rows)
    if not first:
        raise BadImport(path_or_hub_id, "it holds no rows.")
    found = _choose([row for _, row in first], path_or_hub_id, name)
    return PreferenceSource(rows, first, found=found, created_at=created_at, choices=choices, erased=erased)


def _beginning(rows: Rows) -> list[NumberedRow]:
    """The rows that say which format it is: a few, and fewer where they are large."""
    first: list[NumberedRow] = []
    taken = 0
    for number, row in rows:
        first.append((number, row))
        taken += weight(row, _BYTES_TO_DETECT)
        if len(first) == _ROWS_TO_DETECT or taken > _BYTES_TO_DETECT:
            break
    return first


def _choose(first: Sequence[Row], source: str, name: str) -> tuple[str, str]:
    names = sorted(str(name)[:60] for name in first[0])
    more = len(names) - _SHOWN_COLUMNS
    columns = ", ".join(names[:_SHOWN_COLUMNS]) + (f" and {more} more" if more > 0 else "")
    if name == "auto":
        detected = detect(first)
        if detected is None:
            raise BadImport(source, f"no known format has the columns {columns}. Known formats: {', '.join(FORMATS)}.")
        return detected
    if not any(FORMATS[name].matches(row) for row in first):
        raise BadImport(
            source, f"it is not {name} ({FORMATS[name].WHY}); its columns are {columns}. Try the format auto."
        )
    return name, "the format was named by the caller"
