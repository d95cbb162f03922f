"""A folder that ``datasets.load_dataset`` opens: Parquet by part, a card, a manifest with the hashes.

    preferences, labelled answers → write_dataset → folder → hub.push

The folder is written beside its place and moved into it when it is whole. (One that replaces another is moved in two
steps; between them there is none for a moment.) A folder is replaced only where it is an earlier export that nobody
changed. The same rows and options give the same bytes, but for hashed raters, whose salt is new each time.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from feedback_store.bounded import load_json
from feedback_store.dataset_card import MANIFEST, PART_FILE, PARTS, PREFERENCE_FOLDER, UNPAIRED_FOLDER, dataset_card
from feedback_store.durable import sha256_of, sync, sync_tree
from feedback_store.errors import Conflict, InvalidRecord, NotEnoughPreferences, StoreDamaged
from feedback_store.exports import (
    PREFERENCE_SCHEMA,
    UNPAIRED_SCHEMA,
    Record,
    Rename,
    preference_row,
    renamed,
    renamer,
    unpaired_row,
    unwritable,
    write_parquet,
)
from feedback_store.preferences import split_of
from feedback_store.records import Preference, UnpairedPreference

CARD = "README.md"
_KIND = "zephyr-loop data set"
_FORMAT = 1
DATASET_FILES = tuple(
    f"{folder}/{PART_FILE.format(part)}" for folder in (PREFERENCE_FOLDER, UNPAIRED_FOLDER) for part in PARTS
)


@dataclass(frozen=True, slots=True)
class DatasetFiles:
    """A data set in ``directory``: ``rows`` by Parquet file, ``hashes`` (SHA-256) by Parquet file and for the card.

    Names are relative, as ``data/train-00000-of-00001.parquet``; a part without rows has no file.
    """

    directory: Path
    rows: Mapping[str, int]
    hashes: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Every file of the data set, the manifest last."""
        return (*self.hashes, MANIFEST)


def write_dataset(
    directory: Path,
    preferences: Sequence[Preference],
    unpaired: Sequence[UnpairedPreference],
    *,
    name: str,
    created_at: datetime,
    raters: str = "hash",
    licence: str | None = None,
) -> DatasetFiles:
    """Write a folder with the rows as Parquet by part, a data set card and a manifest with the hashes.

    ``name`` is the title of the card; ``licence`` is a licence id of the hub, ``unknown`` where nobody gave one.
    Raises ``NotEnoughPreferences`` without a row, ``InvalidRecord`` for an option, ``Conflict`` where the folder is
    there and not an unchanged earlier export, ``StoreDamaged`` where the disk refuses.
    """
    rename = renamer(raters)
    _check_title(name, created_at)
    if not preferences and not unpaired:
        raise NotEnoughPreferences(
            "There are 0 preferences and 0 labelled answers to export; 1 is the least. "
            "Compare and pick, rate an answer, or import a preference file."
        )
    final = directory.resolve()
    unfinished = final.with_name(f".{uuid.uuid4().hex}")
    paired_parts, unpaired_parts = _by_part(preferences), _by_part(unpaired)
    card = dataset_card(paired_parts, unpaired_parts, name=name, created_at=created_at, raters=raters, licence=licence)
    try:
        refuse_to_replace(final)
        unfinished.mkdir(parents=True)
        rows = _write_parts(
            unfinished / PREFERENCE_FOLDER, paired_parts, PREFERENCE_SCHEMA, to_row=preference_row, rename=rename
        )
        rows |= _write_parts(
            unfinished / UNPAIRED_FOLDER, unpaired_parts, UNPAIRED_SCHEMA, to_row=unpaired_row, rename=rename
        )
        (unfinished / CARD).write_bytes(card.encode())
        _write_manifest(unfinished, rows, name, created_at, raters)
        earlier = _move(unfinished, final)
    except OSError as error:
        raise unwritable(final, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _remove(earlier)
    return load_dataset_files(final)


def deliver_dataset(made: Path, directory: Path) -> DatasetFiles:
    """Move a data set of ours to another place, as ``write_dataset`` would have written it there.

    Raises ``Conflict`` and ``StoreDamaged`` as ``write_dataset`` does.
    """
    final = directory.resolve()
    unfinished = final.with_name(f".{uuid.uuid4().hex}")
    try:
        refuse_to_replace(final)
        shutil.copytree(made, unfinished)
        sync_tree(unfinished)
        earlier = _move(unfinished, final)
    except OSError as error:
        raise unwritable(final, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(made, ignore_errors=True)
    _remove(earlier)
    return load_dataset_files(final)


def load_dataset_files(directory: Path) -> DatasetFiles:
    """The data set in a folder, its Parquet files checked; its card may have been completed by hand.

    Raises ``Conflict`` where the folder is no data set of ours, holds other files, or its rows were changed.
    """
    try:
        manifest = load_json(directory / MANIFEST)
        if (manifest["kind"], manifest["format"]) != (_KIND, _FORMAT):
            raise _foreign(directory, f"its {MANIFEST} is of another kind or version")
        described = {CARD: manifest["files"][CARD], **manifest["files"]}
        dataset = DatasetFiles(
            directory,
            {name: file["rows"] for name, file in described.items() if name != CARD},
            {name: file["sha256"] for name, file in described.items()},
        )
        found = {path.relative_to(directory).as_posix() for path in _files(directory)}
        if found != set(dataset.names):
            raise _foreign(directory, "other or missing files: " + ", ".join(sorted(found ^ set(dataset.names))))
        changed = [name for name in dataset.rows if sha256_of(directory / name) != dataset.hashes[name]]
    except FileNotFoundError as error:
        raise _foreign(directory, f"it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(directory, f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if changed:
        raise _foreign(directory, f"changed since: {', '.join(changed)}")
    return dataset


def _by_part(records: Iterable[Record]) -> dict[str, list[Record]]:
    parts: dict[str, list[Record]] = {part: [] for part in PARTS}
    for record in records:
        parts[split_of(record.prompt)].append(record)
    return parts


def _write_parts(
    folder: Path,
    parts: Mapping[str, Sequence[Record]],
    schema: pa.Schema,
    *,
    to_row: Callable[[Record], dict[str, object]],
    rename: Rename,
) -> dict[str, int]:
    """One Parquet file a part that has rows; how many, by name."""
    rows = {}
    for part, records in parts.items():
        if records:
            folder.mkdir(exist_ok=True)
            path = folder / PART_FILE.format(part)
            written = write_parquet(path, schema, (to_row(record) for record in renamed(records, rename)))
            rows[f"{folder.name}/{path.name}"] = written
            sync(path)
            sync(folder)
    return rows


def _write_manifest(directory: Path, rows: Mapping[str, int], name: str, created_at: datetime, raters: str) -> None:
    files: dict[str, dict[str, object]] = {CARD: {"sha256": sha256_of(directory / CARD)}}
    files |= {file: {"sha256": sha256_of(directory / file), "rows": count} for file, count in rows.items()}
    manifest = {
        "kind": _KIND,
        "format": _FORMAT,
        "name": name,
        "created_at": created_at.astimezone(UTC).isoformat(timespec="seconds"),
        "raters": raters,
        "files": files,
    }
    (directory / MANIFEST).write_bytes(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
    sync(directory / CARD)
    sync(directory / MANIFEST)
    sync(directory)


def refuse_to_replace(directory: Path) -> None:
    """Raise Conflict for a folder that is there and not an unchanged earlier export."""
    if not directory.exists():
        return
    try:
        dataset = load_dataset_files(directory)
        if sha256_of(directory / CARD) != dataset.hashes[CARD]:
            raise _foreign(directory, f"its {CARD} was changed by hand")
    except Conflict as conflict:
        raise Conflict(f"{conflict} It was not replaced: name a new folder, or move this one away.") from conflict


def _move(unfinished: Path, final: Path) -> Path | None:
    """Put the finished folder in its place; the one that was there, if any, beside it."""
    earlier = final.with_name(f"{unfinished.name}-earlier") if final.exists() else None
    if earlier is not None:
        final.replace(earlier)
    try:
        unfinished.replace(final)
    except OSError:
        if earlier is not None:
            earlier.replace(final)
        raise
    sync(final.parent)
    return earlier


def _remove(earlier: Path | None) -> None:
    try:
        if earlier is not None:
            shutil.rmtree(earlier)
    except OSError as error:
        raise StoreDamaged(
            f"The new export is in place, but the earlier one cannot be removed: {error}. Remove {earlier} by hand."
        ) from error


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())


def _check_title(name: str, created_at: datetime) -> None:
    if not name.strip() or not name.isprintable():
        raise InvalidRecord("Export", "name", name, "a title of one line that is not empty")
    if created_at.tzinfo is None:
        raise InvalidRecord("Export", "created_at", created_at, "a time with a time zone (UTC)")


def _foreign(directory: Path, reason: str) -> Conflict:
    return Conflict(f"The folder {directory} is not a data set as Zephyr Loop wrote it ({reason}).")
