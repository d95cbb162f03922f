"""What a person may take back: their words, everywhere below the data directory, and the leave to learn from them.

    erase → tombstone → the store's file written anew without the rows → backups → snapshots → every other file
    is_erased → imports                                            set_learning, not_learning → what is trained on

Rows are the matter of ``erased_rows.py``, files that of ``traces.py``, which say what goes and what is looked for.
Versions that were trained on a person's words are named, not removed: training again without them makes new ones.

A person is named by their id or label (``people.py``), and is looked for by the id; in files and copies from before
there were ids by the name, where a person stands and nowhere else.

An erasure that was interrupted goes on where it stopped when it is asked for again. Until it is done, a file
``.erasing-…`` in the data directory holds what to look for, the person's words included (``unfinished_erasures``).

Not covered: copies outside the data directory, blocks that the disk has freed and not yet used again, what other
people wrote about the person. A snapshot being frozen, or a run on a snapshot that goes, is the caller's to stop.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from feedback_store.backup import discard_unfinished, opened, remove_backup, replace_file, rewrite_backup
from feedback_store.bounded import load_json
from feedback_store.copying import COPYING, copy_database
from feedback_store.database import Cursor, Database
from feedback_store.durable import read_json, sha256_of, sync, write_json
from feedback_store.erased_rows import (
    Tombstones,
    add_tombstones,
    collect,
    count,
    holds,
    is_marked,
    load_tombstones,
    mark,
    mark_texts,
    names_in_tombstones,
    nobodys,
    rater_hash,
    without,
)
from feedback_store.errors import InvalidRecord, NotFound, StoreDamaged
from feedback_store.people import OWN, Person, ensure_people, find_person, is_actor, is_person_id, label_of
from feedback_store.records import LEARNING_SCOPES
from feedback_store.rows import stored_time
from feedback_store.snapshots import forget
from feedback_store.traces import Traces, betrays, blank_lines, mend_json, mended_text, parquet_holds

_LINES = (".log", ".txt", ".jsonl", ".md")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz", ".onnx")
_OF_WEIGHTS = {"adapter", "model"}
# What the house runs by: recipes, presets, scripts of a scheduler.
_OF_THE_HOUSE = (".yaml", ".yml", ".toml", ".sh")
# No words of people, or another stage's: downloads, databases, what was learned.
_UNSEARCHED = {"models", "backups", COPYING, *_OF_WEIGHTS, "checkpoints"}
_MOST_JOB_BYTES = 2**31
_one_erasure = threading.Lock()


@dataclass(frozen=True, slots=True)
class Erasure:
    """What an erasure did.

    ``counts`` is rows of the store by table. ``versions`` were trained on the ``snapshots`` that are gone; ``runs``
    were too, or are at it. ``backups`` were rewritten; ``lost_backups`` could not be read and are gone. ``files`` are
    the other files that were mended or removed. Paths are below the data directory.
    """

    counts: Mapping[str, int]
    snapshots: tuple[str, ...]
    versions: tuple[str, ...]
    runs: tuple[str, ...]
    backups: tuple[str, ...]
    lost_backups: tuple[str, ...]
    files: tuple[str, ...]
    sentence: str


@dataclass(slots=True)
class _Job:
    """An erasure under way, as its file holds it: what to look for, and what was done so far.

    ``rater`` is the id; ``names``, the label first, are looked for in what is older than ids.
    """

    rater: str
    erased_at: str
    names: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)
    backups: list[str] = field(default_factory=list)
    lost_backups: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Erasing:
    """How a database is copied without the person."""

    person: Person
    tombstones: Tombstones
    traces: Traces

    def prepare(self, reading: Cursor) -> dict[str, str]:
        return without(reading, [self.person], self.tombstones.contents, lambda text: mended_text(text, self.traces))

    def add(self, cursor: Cursor) -> None:
        add_tombstones(cursor, self.tombstones)


def erase(database: Database, data_dir: Path, rater: str, now: datetime) -> Erasure:
    """Remove every row of a person, by id or label, and all that was made of their words, below the data directory.

    Writers wait while the file is written anew, a minute or two for a million picks; each backup takes as long again.
    Raises ``NotFound`` for somebody who was never here and ``StoreDamaged`` where a file refuses; asked again, it
    finishes.
    """
    if not rater.strip():
        raise InvalidRecord("Erasure", "rater", rater, "a person's name")
    data_dir = data_dir.absolute()
    with _one_erasure:
        return _erase(database, data_dir, rater, now)


def _erase(database: Database, data_dir: Path, rater: str, now: datetime) -> Erasure:
    person, path = _whom(database, data_dir, rater.strip())
    with database.read() as cursor:
        before = load_tombstones(cursor).times_of(*names_in_tombstones(person))
    is_resumed = path.exists()
    if not before and not is_resumed and not _is_known(database, data_dir, person):
        raise NotFound("rater", rater)
    try:
        job, traces, tombstones, is_in_store = _bury(database, person, stored_time(now), path)
        erasing = _Erasing(person, tombstones, traces)
        if is_in_store or is_resumed:
            replace_file(database, lambda cursor, target: copy_database(cursor, target, erasing.prepare))
        # Listed after a backup that was being made has come to its end.
        _erase_in_databases(_other_databases(data_dir, database.path), job, erasing, data_dir)
        _erase_snapshots(data_dir / "snapshots", job, traces, path, now)
        _erase_uploads(data_dir / "uploads", job)
        _erase_in_files(data_dir, database.path, job, traces)
        versions, runs = _learned_from(data_dir, job.snapshots)
        _finish(path)
    except OSError as error:
        raise StoreDamaged(
            f"The erasing of {person.label!r} is not finished: {error.filename or data_dir}: "
            f"{error.strerror or error}. "
            "Make sure that the files are writable and the disk is not full, and erase again."
        ) from error
    return Erasure(
        counts=job.counts,
        snapshots=tuple(job.snapshots),
        versions=versions,
        runs=runs,
        backups=tuple(job.backups),
        lost_backups=tuple(job.lost_backups),
        files=tuple(job.files),
        sentence=_sentence(job, person, versions, before, data_dir),
    )


def unfinished_erasures(data_dir: Path) -> tuple[str, ...]:
    """Whose erasure was begun and not finished, by id; erase them again."""
    return tuple(job["rater"] for job in _jobs(data_dir).values())


def _read_job(path: Path) -> dict[str, Any] | None:
    """The file of an unfinished erasure, which may hold very many words; None where there is none."""
    try:
        job: dict[str, Any] = load_json(path, _MOST_JOB_BYTES, 8 * _MOST_JOB_BYTES)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreDamaged(
            f"What is still to erase cannot be read ({error}). Remove {path} and erase again."
        ) from error
    return job


def is_erased(cursor: Cursor) -> Callable[[str | None, str], bool]:
    """A question for imports: whether a row of the rater it names (None: nobody), with these contents, was erased."""
    tombstones = load_tombstones(cursor)
    is_known = cache(lambda name: bool(tombstones.times_of(name, label_of(name))))

    def erased(rater: str | None, content_id: str) -> bool:
        if content_id in tombstones.contents:
            return True
        # An id, in a copy of a snapshot, says no more than no name.
        if (rater is None or is_person_id(rater)) and nobodys(content_id) in tombstones.contents:
            return True
        return rater is not None and bool(tombstones.raters) and is_known(rater)

    return erased


def set_learning(cursor: Cursor, scope: str, subject: str, learn: bool, *, by: str, moment: datetime) -> None:
    """Say whether a ``conversation`` (by its id) or a ``rater`` may teach; the latest word counts.

    A rater is named by id or label. What was learned stays in the versions that learned it. Raises ``InvalidRecord``
    and ``NotFound``.
    """
    if scope not in LEARNING_SCOPES:
        raise InvalidRecord("LearningChoice", "scope", scope, "one of " + ", ".join(LEARNING_SCOPES))
    if not subject.strip():
        raise InvalidRecord("LearningChoice", "subject", subject, "the id of a conversation or the name of a rater")
    if scope == "conversation":
        found = cursor.execute("SELECT 1 FROM conversations WHERE conversation_id = ?", [subject]).fetchall()
        if not found:
            raise NotFound("conversation", subject)
    else:
        # Who has said nothing yet may ask for it too.
        person = find_person(cursor, subject.strip())
        label = label_of(subject.strip())
        subject = person.person_id if person is not None else ensure_people(cursor, [label])[label]
    cursor.execute(
        'INSERT INTO learning_choices (scope, subject, learn, "by", created_at) VALUES (?, ?, ?, ?, ?)',
        [scope, subject, learn, by, stored_time(moment)],
    )


def not_learning(cursor: Cursor) -> tuple[frozenset[str], frozenset[str]]:
    """The conversations and the raters whose words may not teach. In SQL the view ``refusals`` says the same."""
    found = cursor.execute("SELECT scope, subject FROM refusals").fetchall()
    conversations = frozenset(subject for scope, subject in found if scope == "conversation")
    return conversations, frozenset(subject for scope, subject in found if scope == "rater")


# The steps of an erasure


def _whom(database: Database, data_dir: Path, name: str) -> tuple[Person, Path]:
    """The person whom an id or a label means, and the file of their erasure.

    The label of somebody whose erasure was begun may be gone already; one who is in no table is known by the name.
    """
    with database.read() as cursor:
        person = find_person(cursor, name)
        is_nobody = (
            name == OWN and not holds(cursor, [Person(name, name)]) and not load_tombstones(cursor).times_of(name)
        )
        if is_nobody:
            # Our own user never said a word: an import's `local` is meant, where there is one.
            person = find_person(cursor, label_of(name)) or person
    meant = {name} if person is None else {person.person_id, person.label}
    for path, job in _jobs(data_dir).items():
        names = job.get("names") or [job["rater"]]
        if meant & {job["rater"], *names[:1]}:
            return person or Person(job["rater"], names[0]), path
    if person is None:
        person = Person(name, label_of(name) if is_actor(name) else name)
    return person, data_dir / f".erasing-{hashlib.sha256(person.person_id.encode()).hexdigest()[:16]}.json"


def _jobs(data_dir: Path) -> dict[Path, dict[str, Any]]:
    """The erasures that were begun and not finished, as their files hold them."""
    found = {path: _read_job(path) for path in sorted(data_dir.glob(".erasing-*.json"))}
    return {path: job for path, job in found.items() if job}


def _is_known(database: Database, data_dir: Path, person: Person) -> bool:
    """Whether a person is in the store, in another database or in a snapshot."""
    with database.read() as cursor:
        if holds(cursor, [person]):
            return True
    traces = Traces(person.person_id, (), (), names=(person.label, person.name))
    return any(
        _database_holds(path, person, Tombstones()) for path in _other_databases(data_dir, database.path)
    ) or any(parquet_holds(part, traces, unreadable=False) for part in (data_dir / "snapshots").glob("*/*.parquet"))


def _bury(database: Database, person: Person, moment: datetime, path: Path) -> tuple[_Job, Traces, Tombstones, bool]:
    """The tombstone in one transaction; before it ends, what to look for in files is on disk.

    The last of the answer is whether the person is in the store.
    """
    with database.write(bulk=True), database.write() as cursor:
        job = _Job(**(_read_job(path) or {"rater": person.person_id, "erased_at": moment.isoformat()}))
        job.names = list(dict.fromkeys((person.label, person.name)))
        mark(cursor, [person])
        collected = collect(cursor)
        counts = count(cursor)
        job.ids, job.texts = sorted({*job.ids, *collected.ids}), sorted({*job.texts, *collected.texts})
        job.counts = dict(counts) or job.counts
        traces = Traces(person.person_id, job.ids, job.texts, names=job.names)
        own = load_tombstones(cursor)
        if counts or not own.times_of(*names_in_tombstones(person)):
            name = (rater_hash(own.salts[0], person.label), datetime.fromisoformat(job.erased_at))
            add_tombstones(cursor, Tombstones(own.salts, {name: json.dumps(job.counts)}, collected.contents))
        write_json(path, _as_json(job))
        is_in_store = is_marked(cursor) or mark_texts(cursor, lambda text: mended_text(text, traces)) > 0
        return job, traces, load_tombstones(cursor), is_in_store


def _erase_in_databases(paths: Iterable[Path], job: _Job, erasing: _Erasing, data_dir: Path) -> None:
    """Backups and other databases: rewritten where the person is in them, removed where they cannot be read."""
    for path in paths:
        name = path.relative_to(data_dir).as_posix()
        found = _database_holds(path, erasing.person, erasing.tombstones)
        if found is None:
            remove_backup(path)
            _note(job.lost_backups, name)
        elif found:
            rewrite_backup(path, erasing.prepare, erasing.add)
            _note(job.backups, name)
    discard_unfinished(data_dir)


def _database_holds(path: Path, person: Person, tombstones: Tombstones) -> bool | None:
    """Whether a person, or a training row that was erased with them, is in a database; None: it cannot be read."""
    try:
        with opened(path) as cursor:
            return holds(cursor, [person], tombstones.contents)
    except StoreDamaged:
        return None


def _erase_snapshots(directory: Path, job: _Job, traces: Traces, path: Path, now: datetime) -> None:
    """Remove the snapshots with a row of the person; a file beside says what was there and why it is gone."""
    # What is unfinished may be of rows that were read before they were erased.
    for unfinished in directory.glob(".*/"):
        shutil.rmtree(unfinished)
    for snapshot in sorted(directory.glob("*/")):
        if any(parquet_holds(part, traces, unreadable=True) for part in snapshot.glob("*.parquet")):
            _note(job.snapshots, snapshot.name)
        elif forget(snapshot, traces.names):
            _note(job.files, f"{directory.name}/{snapshot.name}/manifest.json")
    write_json(path, _as_json(job))
    for snapshot in (directory / name for name in job.snapshots):
        if snapshot.exists():
            write_json(directory / f"{snapshot.name}.erased.json", _epitaph(snapshot, now))
            removed = directory / f".erased-{snapshot.name}"
            snapshot.replace(removed)
            sync(directory)
            shutil.rmtree(removed)


def _epitaph(snapshot: Path, now: datetime) -> dict[str, Any]:
    parts = _read(snapshot / "manifest.json").get("parts", {})
    return {
        "snapshot": snapshot.name,
        "erased_at": now.isoformat(timespec="seconds"),
        "why": "It held rows of a person whose words were erased.",
        "rows": {part: described.get("rows") for part, described in parts.items()},
    }


def _erase_uploads(directory: Path, job: _Job) -> None:
    """Everything that was uploaded goes, looked at or not: it is there for a moment only, and may be anything."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        _note(job.files, f"{directory.name}/{path.name}")
        with suppress(FileNotFoundError):  # its import has just ended
            _remove(path)


def _erase_in_files(data_dir: Path, store_path: Path, job: _Job, traces: Traces) -> None:
    exports = data_dir / "exports"
    for path in _searched(data_dir, store_path):
        # A folder of exports may have gone with another file of it.
        if not path.exists() or not betrays(path, traces):
            continue
        if exports in path.parents:
            touched = _remove(exports / path.relative_to(exports).parts[0])
        elif path.suffix in _LINES:
            touched = blank_lines(path, traces)
        elif path.suffix == ".json":
            touched = mend_json(path, traces)
        else:
            touched = _remove(path)
        if touched:
            _note(job.files, path.relative_to(data_dir).as_posix())
    for manifest in sorted((data_dir / "versions").glob("*/manifest.json")):
        _restate(manifest)


def _searched(data_dir: Path, store_path: Path) -> Iterator[Path]:
    """The files that may hold a person's words as text. Links are not followed, pipes not read."""
    manifests = {data_dir / "versions", data_dir / "snapshots"}
    for folder, names, files in os.walk(data_dir):
        names[:] = sorted(set(names) - _UNSEARCHED)
        for path in (Path(folder, name) for name in sorted(files)):
            is_database = path.suffix == ".duckdb" or path.name.startswith(store_path.name)
            is_manifest = path.name == "manifest.json" and path.parent.parent in manifests
            is_job = path.name.startswith(".erasing-") or path.name.endswith(".erased.json")
            is_other = path.suffix in (*_WEIGHTS, *_OF_THE_HOUSE) or not _is_regular(path)
            if not (is_database or is_manifest or is_job or is_other):
                yield path


def _is_regular(path: Path) -> bool:
    """No link, and no pipe or device, which would be read for ever."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:  # it went with another file of an export
        return False


def _restate(manifest: Path) -> None:
    """Give a version's manifest the hashes of its texts as they are now: some of them may have been mended."""
    described = _read(manifest)
    files = described.get("files", {})
    texts = [
        name for name in files if Path(name).suffix in (*_LINES, ".json") and Path(name).parts[0] not in _OF_WEIGHTS
    ]
    now = {name: sha256_of(manifest.parent / name) for name in texts if (manifest.parent / name).is_file()}
    if any(files[name] != found for name, found in now.items()):
        write_json(manifest, described | {"files": files | now})


def _learned_from(data_dir: Path, snapshots: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The versions and the runs that were trained on these snapshots."""
    versions = sorted((data_dir / "versions").glob("*/manifest.json"), key=lambda path: _natural(path.parent.name))
    runs = sorted((data_dir / "runs").glob("*/config.json"))
    return (
        tuple(path.parent.name for path in versions if _read(path).get("snapshot") in snapshots),
        tuple(path.parent.name for path in runs if (_read(path).get("snapshot") or {}).get("hash") in snapshots),
    )


def _finish(path: Path) -> None:
    for left in (path, *path.parent.glob(f".{path.name}.*")):
        left.unlink(missing_ok=True)
    sync(path.parent)


def _sentence(job: _Job, person: Person, versions: tuple[str, ...], before: list[datetime], data_dir: Path) -> str:
    if job.counts:
        rows = ", ".join(f"{number} {table}" for table, number in sorted(job.counts.items()))
        said = [f"Erased {person.label!r}: {sum(job.counts.values())} rows ({rows})."]
    else:
        said = [f"The store holds no rows of {person.label!r}."]
        if before:
            said.append(f"They were erased on {before[-1]:%Y-%m-%d}.")
    for what, names in (
        ("Removed the snapshots", job.snapshots),
        ("Rewrote", job.backups),
        ("Removed, because they could not be read:", job.lost_backups),
        ("Mended or removed", job.files),
    ):
        if names:
            said.append(f"{what} {', '.join(names)}.")
    if versions:
        said.append(f"Trained on these words: {', '.join(versions)}. Train again without them and promote the result.")
    said.append(f"Nothing outside {data_dir} is known here: remove exports, pushed data sets and copies elsewhere.")
    return " ".join(said)


def _other_databases(data_dir: Path, store_path: Path) -> list[Path]:
    return [
        path
        for path in sorted(data_dir.rglob("*.duckdb"))
        if COPYING not in path.relative_to(data_dir).parts and _is_regular(path) and not path.samefile(store_path)
    ]


def _as_json(job: _Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__slots__}


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where it cannot be read."""
    try:
        return read_json(path) or {}
    except (OSError, ValueError):
        return {}


def _remove(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    return True


def _note(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts v2 before v10."""
    return [(int(number or 0), text) for number, text in re.findall(r"(\d*)(\D*)", name)]
