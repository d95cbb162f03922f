"""A snapshot: a set of preferences frozen into Parquet, which a training run reads without the database.

    rows → redact → mix → freeze → snapshots/<hash>/{train.parquet, held_out.parquet, manifest.json} → trainer
    labelled answers, where the mix learns from ratings → the same → ratings.parquet, held_out_ratings.parquet

The hash is of the contents: the same rows give the same directory and the same bytes, so freezing again is free. Data
is written first, the manifest last, and the finished directory is moved into place: a directory without its manifest
does not exist. Works on Arrow columns, needs no database. Not here: which rows are taken (``selection.py``).

Check one by hand: ``python -m feedback_store.snapshots data/snapshots/<hash>``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from feedback_store import tables
from feedback_store.bounded import load_json
from feedback_store.durable import sha256_of, sync, write_json
from feedback_store.errors import LeakedPrompt, SnapshotDamaged, StoreDamaged
from feedback_store.mixing import Mix
from feedback_store.preferences import HELD_OUT, TRAIN, key_of_text, split_of_key
from feedback_store.records import Preference, UnpairedPreference
from feedback_store.selection import NOBODY_KNOWN, PARTS, RATED_PARTS, RATED_TRAIN, Standing, select

FORMAT = 2
MANIFEST = "manifest.json"
_MESSAGES = ("prompt", "chosen", "rejected", "completion")
# The columns that a dictionary makes smaller.
_ROLES = [f"{name}.list.element.role" for name in _MESSAGES]
_REPEATED = ["source", "rater", "practice", "versions.list.element", *_ROLES]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen set of preferences in ``directory``.

    ``counts`` is rows by source, ``left_out`` what the mix did not take by reason, ``redacted`` what was hidden by
    kind; ``practice`` is the taste or None. ``rated_rows`` are labelled answers to learn from, None in a snapshot that
    has no such parts.
    """

    hash: str
    directory: Path
    train_rows: int
    held_out_rows: int
    counts: Mapping[str, int]
    left_out: Mapping[str, int]
    redacted: Mapping[str, int]
    practice: str | None
    rated_rows: int | None = None

    @property
    def train_path(self) -> Path:
        """The Parquet file to learn from."""
        return self.directory / f"{TRAIN}.parquet"

    @property
    def held_out_path(self) -> Path:
        """The Parquet file to judge on."""
        return self.directory / f"{HELD_OUT}.parquet"

    @property
    def ratings_path(self) -> Path:
        """The Parquet file of labelled answers to learn from, where the snapshot has them."""
        return self.directory / f"{RATED_TRAIN}.parquet"

    @property
    def files(self) -> frozenset[str]:
        """The names of its files, the manifest among them."""
        parts = PARTS if self.rated_rows is None else (*PARTS, *RATED_PARTS)
        return frozenset((MANIFEST, *(f"{part}.parquet" for part in parts)))


def freeze(
    preferences: pa.Table | Sequence[Preference],
    directory: Path,
    practice: str | None,
    mix: Mix | None = None,
    *,
    evaluation_prompts: Collection[str] = (),
    redact: bool = True,
    ratings: Sequence[UnpairedPreference] = (),
    standing: Standing = NOBODY_KNOWN,
) -> Snapshot:
    """Write the preferences as a snapshot under ``directory`` (the snapshots folder); one that is there is reused.

    ``preferences`` are records or a table of ``tables.ROWS``. Without a ``mix`` every row is taken that is no
    duplicate and leaks nothing. ``evaluation_prompts`` are prompts no run may learn from, as text. ``ratings`` are
    taken where the mix learns from them, and are split and mixed as pairs are; the pairs are then there to judge on.
    ``standing`` says which raters are in quarantine, and what gold pairs say of them where the mix weighs raters.
    Raises ``NotEnoughPreferences`` without a row to learn from (where the mix learns from the store), ``LeakedPrompt``
    where a prompt would be in both parts, ``InvalidRecord`` where practice and real rows mix, ``StoreDamaged`` where
    the disk refuses.
    """
    selection = select(
        preferences, practice, mix or Mix(), evaluation_prompts, ratings, standing=standing, redact=redact
    )
    contents = {part: tables.content_hash(table) for part, table in selection.parts.items()}
    snapshot_hash = _snapshot_hash(practice, contents)
    final = directory / snapshot_hash
    if (final / MANIFEST).is_file():
        snapshot = load_snapshot(final)
        verify(snapshot)
        return snapshot
    unfinished = directory / f".{snapshot_hash}-{uuid.uuid4().hex[:8]}"
    try:
        _remove_abandoned(directory)
        unfinished.mkdir(parents=True)
        described = _write_parts(selection.parts, contents, unfinished)
        manifest = {
            "format": FORMAT,
            "hash": snapshot_hash,
            "practice": practice,
            "mix": None if mix is None else mix.as_dict(),
            "evaluation_prompts": len(set(evaluation_prompts)),
            "counts": _count(selection.parts.values(), "source"),
            "left_out": selection.left_out,
            "raters_left_out": selection.raters_left_out,
            "rater_weights": {rater: found.as_dict() for rater, found in selection.weights.items()},
            "redacted": selection.redacted,
            "parts": described,
        }
        _write_manifest(manifest, unfinished)
        _move(unfinished, final)
    except OSError as error:
        raise StoreDamaged(
            f"The snapshot {final} cannot be written: {error}. Nothing was kept. Check that the disk is not full."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return load_snapshot(final)


def preview(
    preferences: pa.Table | Sequence[Preference],
    practice: str | None,
    mix: Mix | None = None,
    *,
    evaluation_prompts: Collection[str] = (),
    redact: bool = True,
    ratings: Sequence[UnpairedPreference] = (),
    standing: Standing = NOBODY_KNOWN,
) -> Mapping[str, pa.Table]:
    """The rows of the parts that `freeze` would write, with nothing written. Raises what `freeze` raises."""
    return select(
        preferences, practice, mix or Mix(), evaluation_prompts, ratings, standing=standing, redact=redact
    ).parts


def _refuse_leaks(parts: Mapping[str, pa.Table]) -> None:
    """Raise ``LeakedPrompt`` where a held-out prompt, as it was or as it is written, stands in a part to learn from."""
    judged_on: set[str] = set()
    for train, held_out in (PARTS, RATED_PARTS):
        if train in parts:
            judged_on.update(parts[held_out]["prompt_key"].to_pylist())
            judged_on.update(key_of_text(text) for text in tables.first_user_texts(parts[held_out]["prompt"]))
            _refuse_leak(parts[train], judged_on)


def _refuse_leak(train: pa.Table, judged_on: Collection[str]) -> None:
    for identity, key, text in zip(
        train.column(0).to_pylist(),
        train["prompt_key"].to_pylist(),
        tables.first_user_texts(train["prompt"]),
        strict=True,
    ):
        if split_of_key(key) == HELD_OUT or key in judged_on or key_of_text(text) in judged_on:
            raise LeakedPrompt(
                f"The prompt of {identity} is held out for judging and stands in the train part. "
                "No run may learn from it: freeze a new snapshot from the store."
            )


def load_snapshot(directory: Path) -> Snapshot:
    """The snapshot in a directory by its manifest, its rows not read. Raises ``SnapshotDamaged``."""
    try:
        manifest = load_json(directory / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise _damaged(directory, f"its format is {manifest.get('format')!r}, this Zephyr Loop reads {FORMAT}")
        snapshot = Snapshot(
            hash=manifest["hash"],
            directory=directory,
            train_rows=manifest["parts"][TRAIN]["rows"],
            held_out_rows=manifest["parts"][HELD_OUT]["rows"],
            counts=manifest["counts"],
            left_out=manifest["left_out"],
            redacted=manifest["redacted"],
            practice=manifest["practice"],
            rated_rows=manifest["parts"].get(RATED_TRAIN, {}).get("rows"),
        )
    except FileNotFoundError as error:
        raise SnapshotDamaged(
            f"There is no snapshot in {directory}: it has no {MANIFEST}. Freeze a new one."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(directory, f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if snapshot.hash != directory.name:
        raise _damaged(directory, f"its manifest is of {snapshot.hash}")
    return snapshot


def load_preferences(path: Path) -> list[Preference]:
    """The preferences of one part (``snapshot.train_path`` or ``held_out_path``), sorted by id."""
    return [tables.preference_of_row(row) for row in pq.read_table(path, schema=tables.SCHEMA).to_pylist()]


def load_ratings(path: Path) -> list[UnpairedPreference]:
    """The labelled answers to learn from (``snapshot.ratings_path``), sorted by id."""
    return [tables.rating_of_row(row) for row in pq.read_table(path, schema=tables.RATING_SCHEMA).to_pylist()]


def raters_of(directory: Path) -> frozenset[str] | None:
    """Whose preferences stand in the train part of the snapshot in a directory; None where there is none to read."""
    try:
        manifest = load_json(directory / MANIFEST)
        return frozenset(manifest["parts"][TRAIN]["raters"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(directory: Path, names: Collection[str]) -> bool:
    """Take a person, by id or an older name, out of what a manifest says beside its rows; whether they were there."""
    path = directory / MANIFEST
    try:
        manifest = load_json(path)
        mix, weights = manifest["mix"] or {}, manifest.get("rater_weights", {})
        by_reason = manifest.get("raters_left_out", {})
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not any(one in names for said in (mix.get("without", ()), weights, *by_reason.values()) for one in said):
        return False
    if mix:
        mix["without"] = [one for one in mix.get("without", ()) if one not in names]
    for numbers in (weights, *by_reason.values()):
        for name in names:
            numbers.pop(name, None)
    write_json(path, manifest)
    return True


def verify(snapshot: Snapshot) -> None:
    """Derive every hash and count of a snapshot again from its files.

    Raises ``SnapshotDamaged`` where something differs and ``LeakedPrompt`` where the parts share a prompt.
    """
    directory = snapshot.directory
    manifest = load_json(directory / MANIFEST)
    parts: dict[str, pa.Table] = {}
    names = PARTS if snapshot.rated_rows is None else (*PARTS, *RATED_PARTS)
    for part in names:
        path = directory / f"{part}.parquet"
        try:
            found = sha256_of(path)
            if found != manifest["parts"][part]["sha256"]:
                raise _damaged(directory, f"{path.name} has the SHA-256 {found[:12]}…, not that of the manifest")
            parts[part] = pq.read_table(path, schema=tables.SCHEMA if part in PARTS else tables.RATING_SCHEMA)
        # Arrow's errors are ValueErrors too.
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(directory, f"{path.name} cannot be read ({error})") from error
    _refuse_leaks(parts)
    contents = {part: tables.content_hash(parts[part]) for part in names}
    if _snapshot_hash(snapshot.practice, contents) != snapshot.hash:
        raise _damaged(directory, "its rows do not give its hash")
    described = {part: _described(parts[part], contents[part]) for part in names}
    for part in names:
        for what, value in described[part].items():
            if manifest["parts"][part].get(what) != value:
                raise _damaged(directory, f"its manifest has other {what} for {part} than its file holds")
    if _count(parts.values(), "source") != dict(snapshot.counts):
        raise _damaged(directory, "its manifest counts other sources than its files hold")


def _snapshot_hash(practice: str | None, contents: Mapping[str, str]) -> str:
    """The SHA-256 of the format, the taste and the contents of all parts."""
    return hashlib.sha256(json.dumps(["zephyr-loop snapshot", FORMAT, practice, contents]).encode()).hexdigest()


def _described(table: pa.Table, content: str) -> dict[str, Any]:
    """What a manifest says of a part, all of it derived from its rows."""
    return {
        "rows": table.num_rows,
        "content": content,
        "sources": _count([table], "source"),
        "raters": _count([table], "rater"),
        "preference_ids": table.column(0).to_pylist(),
    }


def _write_parts(parts: Mapping[str, pa.Table], contents: Mapping[str, str], directory: Path) -> dict[str, Any]:
    described = {}
    for part, table in parts.items():
        path = directory / f"{part}.parquet"
        repeated = [name for name in _REPEATED if name.partition(".")[0] in table.column_names]
        pq.write_table(table, path, compression="zstd", use_dictionary=repeated)
        sync(path)
        described[part] = {**_described(table, contents[part]), "sha256": sha256_of(path)}
    return described


def _write_manifest(manifest: Mapping[str, Any], directory: Path) -> None:
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(directory / MANIFEST)
    sync(directory)


def _remove_abandoned(directory: Path) -> None:
    """What a process that was killed while it froze left behind. Only one process, the store's owner, freezes."""
    for unfinished in directory.glob(".*-????????"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _move(unfinished: Path, final: Path) -> None:
    if final.is_dir() and not (final / MANIFEST).is_file():
        shutil.rmtree(final)
    try:
        unfinished.replace(final)
    except OSError:
        # Another thread froze the same rows a moment ago; its directory is as good as ours.
        if not (final / MANIFEST).is_file():
            raise
    sync(final.parent)


def _count(tables: Iterable[pa.Table], column: str) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for table in tables:
        counted.update(value for value in table[column].to_pylist() if value is not None)
    return dict(sorted(counted.items()))


def _damaged(directory: Path, reason: str) -> SnapshotDamaged:
    return SnapshotDamaged(
        f"The snapshot {directory} is damaged: {reason}. Remove it and freeze again; "
        "versions trained on it keep working, but cannot be made again from it."
    )


def _main() -> None:
    snapshot = load_snapshot(Path(sys.argv[1]))
    verify(snapshot)
    print(f"{snapshot.hash}: {snapshot.train_rows} train, {snapshot.held_out_rows} held out, all hashes right")


if __name__ == "__main__":
    _main()
