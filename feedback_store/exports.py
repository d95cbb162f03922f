"""What people said, on its way out: files for a trainer or a spreadsheet, and a data set with its card.

    preferences ────── trl_lines, csv_lines ──┬─> write_file ────> one file: trl, kto, csv or parquet
    labelled answers ─ kto_lines ─────────────┴─> write_dataset ─> a folder that datasets.load_dataset opens

Files and folders are written beside their place and moved into it when they are whole: who looks sees the earlier
one or the new one. (A folder that replaces another is moved in two steps; between them there is none for a moment.)
A folder is replaced only where it is an earlier export that nobody changed. Rows are streamed; the same rows and
options give the same bytes, but for hashed raters, whose salt is new each time.

CSV follows OWASP's "CSV Injection": every cell is quoted, quotes in it are doubled (RFC 4180), and a cell that a
spreadsheet may take for a formula gets a leading ``'``. Take one ``'`` away from a cell whose apostrophes are followed
by such a start, and the text is what it was. Not here: snapshots to train on (``snapshots.py``), the hub (``hub.py``).
"""

from __future__ import annotations

import csv
import gzip
import hmac
import io
import json
import secrets
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from feedback_store.durable import sync
from feedback_store.errors import Conflict, InvalidRecord, StoreDamaged
from feedback_store.preferences import split_of
from feedback_store.records import Preference, UnpairedPreference
from feedback_store.tables import MESSAGES

FILE_FORMATS = ("trl", "kto", "csv", "parquet")
RATERS = ("keep", "hash", "drop")
CSV_COLUMNS = (
    "preference_id", "prompt", "chosen", "rejected", "split", "source", "rater", "weight", "pick_id", "versions",
    "practice", "created_at",
)  # fmt: skip

PREFERENCE_SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("preference_id", pa.string()),
        ("pick_id", pa.string()),
        ("source", pa.string()),
        ("rater", pa.string()),
        ("weight", pa.float64()),
        ("versions", pa.list_(pa.string())),
        ("practice", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ]
)
UNPAIRED_SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("completion", MESSAGES),
        ("label", pa.bool_()),
        ("unpaired_id", pa.string()),
        ("source", pa.string()),
        ("rater", pa.string()),
        ("weight", pa.float64()),
        ("versions", pa.list_(pa.string())),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ]
)

_BATCH_ROWS = 2000
_RATER_HASH_CHARACTERS = 16
_FORMULA_SIGNS = ("=", "+", "-", "@", "\u2212")  # the last is the minus sign of typesetters
_FORMULA_CONTROLS = ("\t", "\r", "\n", "\0")

Record = TypeVar("Record", Preference, UnpairedPreference)
Rename = Callable[[str | None], str | None]


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


def kto_lines(unpaired: Iterable[UnpairedPreference]) -> Iterator[dict[str, object]]:
    """Each labelled answer as a row in TRL's conversational unpaired form, with where it comes from beside it."""
    for one in unpaired:
        yield {
            "prompt": [dict(message) for message in one.prompt],
            "completion": [{"role": "assistant", "content": one.completion}],
            "label": one.label,
            "unpaired_id": one.unpaired_id,
            "source": one.source,
            "rater": one.rater,
            "weight": one.weight,
            "versions": list(one.versions),
            "created_at": one.created_at.isoformat(),
        }


def csv_text(preferences: Iterable[Preference]) -> str:
    """The preferences as CSV with a header; the prompt is JSON, a cell that looks like a formula gets a ``'``."""
    return "".join(csv_lines(preferences))


def csv_lines(preferences: Iterable[Preference]) -> Iterator[str]:
    """``csv_text`` row by row, the header first; a row ends with CR LF and may hold line breaks."""
    line = csv.writer(_Echo(), quoting=csv.QUOTE_ALL).writerow
    yield line(CSV_COLUMNS)
    for preference in preferences:
        yield line(_safe(cell) for cell in _cells(preference))


def write_file(
    path: Path,
    format_: str,
    preferences: Iterable[Preference],
    unpaired: Iterable[UnpairedPreference],
    *,
    raters: str = "keep",
) -> int:
    """Write the rows of one format to a file, in place of an earlier one; how many rows it has.

    ``kto`` writes ``unpaired``; ``trl`` (JSON lines), ``csv`` and ``parquet`` write ``preferences``; the other
    iterable is not touched. A ``path`` that ends in ``.gz`` is packed, other than for Parquet. ``raters`` is keep,
    hash or drop. Raises ``InvalidRecord`` for an option, ``Conflict`` where the path is no file, ``StoreDamaged``
    where the disk refuses.
    """
    _check_choice("format", format_, FILE_FORMATS)
    rename = renamer(raters)
    is_packed = path.name.lower().endswith(".gz")
    if format_ == "parquet" and is_packed:
        raise InvalidRecord("Export", "path", path.name, "a name without .gz for Parquet, which is packed already")
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    try:
        if path.exists() and not path.is_file():
            raise Conflict(f"{path} exists and is no file. Nothing was written. Name a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if format_ == "parquet":
            rows = (preference_row(one) for one in renamed(preferences, rename))
            written = write_parquet(unfinished, PREFERENCE_SCHEMA, rows)
        else:
            lines = _lines(format_, preferences, unpaired, rename)
            written = _write_text(unfinished, lines, is_packed) - (format_ == "csv")
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return written


# --- rows --------------------------------------------------------------------------------------------------------


def preference_row(preference: Preference) -> dict[str, object]:
    """A preference as a row of ``PREFERENCE_SCHEMA``."""
    (line,) = trl_lines([preference])
    return line | {"created_at": preference.created_at}


def unpaired_row(one: UnpairedPreference) -> dict[str, object]:
    """A labelled answer as a row of ``UNPAIRED_SCHEMA``."""
    (line,) = kto_lines([one])
    return line | {"created_at": one.created_at}


def _lines(
    format_: str, preferences: Iterable[Preference], unpaired: Iterable[UnpairedPreference], rename: Rename
) -> Iterator[str]:
    if format_ == "csv":
        return csv_lines(renamed(preferences, rename))
    rows = kto_lines(renamed(unpaired, rename)) if format_ == "kto" else trl_lines(renamed(preferences, rename))
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def renamed(records: Iterable[Record], rename: Rename) -> Iterator[Record]:
    """The records with their raters' names as the export shows them."""
    for record in records:
        rater = rename(record.rater)
        yield record if rater == record.rater else replace(record, rater=rater)


def renamer(raters: str) -> Rename:
    """What becomes of a rater's name; the salt of the hashes lives as long as this function."""
    _check_choice("raters", raters, RATERS)
    salt = secrets.token_bytes(32)

    def hashed(rater: str | None) -> str | None:
        if rater is None:
            return None
        return "rater_" + hmac.new(salt, rater.encode(), "sha256").hexdigest()[:_RATER_HASH_CHARACTERS]

    return {"keep": lambda rater: rater, "hash": hashed, "drop": lambda _: None}[raters]


# --- CSV ---------------------------------------------------------------------------------------------------------


class _Echo:
    """A file that gives back what is written: ``csv.writer`` then returns its rows."""

    def write(self, text: str) -> str:
        return text


def _cells(preference: Preference) -> tuple[str, ...]:
    return (
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


def _safe(cell: str) -> str:
    return f"'{cell}" if _may_be_formula(cell) else cell


def unguarded(cell: str) -> str:
    """The text of a cell of our own CSV without the apostrophe that keeps spreadsheets from running it."""
    return cell[1:] if cell.startswith("'") and _may_be_formula(cell) else cell


def _may_be_formula(cell: str) -> bool:
    """Whether the first thing to see, behind apostrophes and then what a reader may drop, starts a formula.

    Dropped unseen are spaces, byte order marks, zero-width and control characters, lone accents. Full-width, small
    and raised forms of the signs count as the signs: some spreadsheets fold them.
    """
    for character in cell.lstrip("'"):
        if character in _FORMULA_CONTROLS or unicodedata.normalize("NFKC", character)[0] in _FORMULA_SIGNS:
            return True
        if unicodedata.category(character)[0] not in "ZCM":
            return False
    return False


# --- files -------------------------------------------------------------------------------------------------------


def _write_text(path: Path, lines: Iterable[str], is_packed: bool) -> int:
    written = 0
    with _open_text(path, is_packed) as text:
        for line in lines:
            text.write(line)
            written += 1
    return written


@contextmanager
def _open_text(path: Path, is_packed: bool) -> Iterator[io.TextIOWrapper]:
    with path.open("xb") as file:
        if not is_packed:
            with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
                yield text
        else:
            # Without a name and a time in its header, the same rows give the same bytes.
            with (
                gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
                io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
            ):
                yield text


def write_parquet(path: Path, schema: pa.Schema, rows: Iterator[dict[str, object]]) -> int:
    """Write the rows in batches; how many there were."""
    written = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(rows, _BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            written += len(batch)
    return written


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidRecord("Export", field, value, "one of " + ", ".join(choices))


def unwritable(path: Path, error: OSError) -> StoreDamaged:
    """The error for a disk that refuses."""
    return StoreDamaged(
        f"The export {path} cannot be written: {error}. Nothing was kept. "
        "Check that the folder may be written to and the disk is not full."
    )
