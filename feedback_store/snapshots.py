"""A snapshot: a set of preferences frozen into Parquet, which a training run reads without the database.

    store.preferences() → freeze → snapshots/<hash>/{train.parquet, held_out.parquet, manifest.json} → trainer

The hash is of the contents: the same preferences give the same directory and the same bytes, so freezing again is
free. Data is written first, the manifest last, and the finished directory is moved into place: a directory without
its manifest does not exist. Needs pyarrow only. Not here: mixing by recipe, sampling, redaction.

Check one by hand: ``python -m feedback_store.snapshots data/snapshots/<hash>``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from feedback_store.errors import InvalidRecord, LeakedPrompt, NotEnoughPreferences, SnapshotDamaged, StoreDamaged
from feedback_store.preferences import HELD_OUT, TRAIN, prompt_key, split_of
from feedback_store.records import Message, Preference, now

FORMAT = 1
MANIFEST = "manifest.json"
PARTS = (TRAIN, HELD_OUT)

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("preference_id", pa.string()),
        ("prompt", _MESSAGES),
        ("chosen", _MESSAGES),
        ("rejected", _MESSAGES),
        ("source", pa.string()),
        ("rater", pa.string()),
        ("weight", pa.float64()),
        ("pick_id", pa.string()),
        ("versions", pa.list_(pa.string())),
        ("practice", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ]
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen set of preferences in ``directory``; ``counts`` is rows by source, ``practice`` the taste or None."""

    hash: str
    directory: Path
    train_rows: int
    held_out_rows: int
    counts: Mapping[str, int]
    practice: str | None

    @property
    def train_path(self) -> Path:
        """The Parquet file to learn from."""
        return self.directory / f"{TRAIN}.parquet"

    @property
    def held_out_path(self) -> Path:
        """The Parquet file to judge on."""
        return self.directory / f"{HELD_OUT}.parquet"


def freeze(preferences: Sequence[Preference], directory: Path, practice: str | None) -> Snapshot:
    """Write the preferences as a snapshot under ``directory`` (the snapshots folder); one that is there is reused.

    Raises ``NotEnoughPreferences`` without a train row, ``LeakedPrompt`` where a prompt would be in both parts,
    ``InvalidRecord`` where practice and real rows mix, ``StoreDamaged`` where the disk refuses.
    """
    parts = split(preferences, practice)
    content_hash = _content_hash(parts, practice)
    final = directory / content_hash
    if (final / MANIFEST).is_file():
        snapshot = load_snapshot(final)
        verify(snapshot)
        return snapshot
    unfinished = directory / f".{content_hash}-{uuid.uuid4().hex[:8]}"
    try:
        unfinished.mkdir(parents=True)
        _write(parts, unfinished, content_hash, practice)
        _move(unfinished, final)
    except OSError as error:
        raise StoreDamaged(
            f"The snapshot {final} cannot be written: {error}. Nothing was kept. Check that the disk is not full."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return load_snapshot(final)


def split(preferences: Iterable[Preference], practice: str | None) -> dict[str, list[Preference]]:
    """The two parts, each sorted by id and without doubles. Raises as ``freeze`` does."""
    parts: dict[str, list[Preference]] = {part: [] for part in PARTS}
    for preference in sorted({p.preference_id: p for p in preferences}.values(), key=lambda p: p.preference_id):
        if preference.practice != practice:
            raise InvalidRecord("Snapshot", "practice", preference.practice, f"{practice!r} in every row")
        parts[split_of(preference.prompt)].append(preference)
    if not parts[TRAIN]:
        raise NotEnoughPreferences(
            f"There are {len(parts[TRAIN])} preferences to train on ({len(parts[HELD_OUT])} held out); 1 is the least. "
            "Compare and pick, import a preference file, or practise a taste."
        )
    refuse_leaks(parts[TRAIN], parts[HELD_OUT])
    return parts


def refuse_leaks(train: Iterable[Preference], held_out: Iterable[Preference]) -> None:
    """Raise ``LeakedPrompt`` where a held-out prompt stands in the train part."""
    judged_on = {prompt_key(preference.prompt) for preference in held_out}
    for preference in train:
        if split_of(preference.prompt) == HELD_OUT or prompt_key(preference.prompt) in judged_on:
            raise LeakedPrompt(
                f"The prompt of {preference.preference_id} is held out for judging and stands in the train part. "
                "No run may learn from it: freeze a new snapshot from the store."
            )


def load_snapshot(directory: Path) -> Snapshot:
    """The snapshot in a directory by its manifest, its rows not read. Raises ``SnapshotDamaged``."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        snapshot = Snapshot(
            hash=manifest["hash"],
            directory=directory,
            train_rows=manifest["parts"][TRAIN]["rows"],
            held_out_rows=manifest["parts"][HELD_OUT]["rows"],
            counts=manifest["counts"],
            practice=manifest["practice"],
        )
    except FileNotFoundError as error:
        raise SnapshotDamaged(
            f"There is no snapshot in {directory}: it has no {MANIFEST}. Freeze a new one."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(directory, f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if manifest.get("format") != FORMAT:
        raise _damaged(directory, f"its format is {manifest.get('format')!r}, this Zephyr Loop reads {FORMAT}")
    if snapshot.hash != directory.name:
        raise _damaged(directory, f"its manifest is of {snapshot.hash}")
    return snapshot


def load_preferences(path: Path) -> list[Preference]:
    """The preferences of one part (``snapshot.train_path`` or ``held_out_path``), sorted by id."""
    return [_preference(row) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]


def verify(snapshot: Snapshot) -> None:
    """Derive every hash and count of a snapshot again from its files.

    Raises ``SnapshotDamaged`` where something differs and ``LeakedPrompt`` where the parts share a prompt.
    """
    manifest = json.loads((snapshot.directory / MANIFEST).read_text(encoding="utf-8"))
    parts: dict[str, list[Preference]] = {}
    for part in PARTS:
        path = snapshot.directory / f"{part}.parquet"
        try:
            found = _file_hash(path)
            if found != manifest["parts"][part]["sha256"]:
                raise _damaged(
                    snapshot.directory, f"{path.name} has the SHA-256 {found[:12]}…, not that of the manifest"
                )
            parts[part] = load_preferences(path)
        # Arrow's errors are ValueErrors; a row that is no record is an InvalidRecord, one too.
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(snapshot.directory, f"{path.name} cannot be read ({error})") from error
    refuse_leaks(parts[TRAIN], parts[HELD_OUT])
    if _content_hash(parts, snapshot.practice) != snapshot.hash:
        raise _damaged(snapshot.directory, "its rows do not give its hash")
    if (len(parts[TRAIN]), len(parts[HELD_OUT])) != (snapshot.train_rows, snapshot.held_out_rows):
        raise _damaged(snapshot.directory, "its manifest counts other rows than its files hold")
    if _count(parts) != dict(snapshot.counts):
        raise _damaged(snapshot.directory, "its manifest counts other sources than its files hold")


def _content_hash(parts: Mapping[str, Sequence[Preference]], practice: str | None) -> str:
    """The SHA-256 of every row in order, the part it is in and the taste; when a row was made does not count."""
    digest = hashlib.sha256(json.dumps(["zephyr-loop snapshot", FORMAT, practice]).encode())
    for part in PARTS:
        for preference in parts[part]:
            row = {name: value for name, value in _row(preference).items() if name != "created_at"}
            line = json.dumps([part, row], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
            digest.update(b"\n" + line.encode())
    return digest.hexdigest()


def _row(preference: Preference) -> dict[str, Any]:
    return {
        "preference_id": preference.preference_id,
        "prompt": [{"role": m["role"], "content": m["content"]} for m in preference.prompt],
        "chosen": [{"role": "assistant", "content": preference.chosen}],
        "rejected": [{"role": "assistant", "content": preference.rejected}],
        "source": preference.source,
        "rater": preference.rater,
        "weight": float(preference.weight),
        "pick_id": preference.pick_id,
        "versions": list(preference.versions),
        "practice": preference.practice,
        "created_at": preference.created_at,
    }


def _preference(row: Mapping[str, Any]) -> Preference:
    return Preference(
        preference_id=row["preference_id"],
        prompt=tuple(Message(role=m["role"], content=m["content"]) for m in row["prompt"]),
        chosen=row["chosen"][0]["content"],
        rejected=row["rejected"][0]["content"],
        source=row["source"],
        weight=row["weight"],
        rater=row["rater"],
        pick_id=row["pick_id"],
        versions=tuple(row["versions"]),
        practice=row["practice"],
        created_at=row["created_at"].astimezone(UTC),
    )


def _write(parts: Mapping[str, Sequence[Preference]], directory: Path, content_hash: str, practice: str | None) -> None:
    described = {}
    for part in PARTS:
        path = directory / f"{part}.parquet"
        table = pa.Table.from_pylist([_row(preference) for preference in parts[part]], schema=SCHEMA)
        pq.write_table(table, path, compression="zstd")
        _sync(path)
        described[part] = {"rows": len(parts[part]), "sha256": _file_hash(path)}
    manifest = {
        "format": FORMAT,
        "hash": content_hash,
        "practice": practice,
        "created_at": now().isoformat(timespec="seconds"),
        "parts": described,
        "counts": _count(parts),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _sync(directory / MANIFEST)
    _sync(directory)


def _move(unfinished: Path, final: Path) -> None:
    if final.is_dir() and not (final / MANIFEST).is_file():
        shutil.rmtree(final)
    try:
        unfinished.replace(final)
    except OSError:
        # Another process froze the same rows a moment ago; its directory is as good as ours.
        if not (final / MANIFEST).is_file():
            raise
    _sync(final.parent)


def _count(parts: Mapping[str, Sequence[Preference]]) -> dict[str, int]:
    counted = Counter(preference.source for part in PARTS for preference in parts[part])
    return dict(sorted(counted.items()))


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
