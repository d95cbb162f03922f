"""The data a team owns: in, out, counted, kept, forgotten. What the buttons, commands and routes of it share.

Where it sits: beside `operations.py`, which has one as `operations.data`; behind it the store. No Gradio, no HTTP.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from itertools import chain
from typing import IO, Any

from chat_app.gates import Gates
from chat_app.named_folders import (
    UPLOADS,
    NamedFolders,
    folder_name,
    remove_expired,
    remove_upload,
    upload_folder,
    upload_name,
)
from chat_app.refused import Refused
from chat_app.settings import Settings
from feedback_store import exports, hub, redaction
from feedback_store.agreement import Contradiction, agreement, contradictions
from feedback_store.dataset_export import DatasetFiles, write_dataset
from feedback_store.erasure import unfinished_erasures
from feedback_store.errors import BadImport
from feedback_store.importers import PreferenceSource
from feedback_store.importers.pairs import Choices
from feedback_store.importers.sources import HubId, is_hub_id
from feedback_store.people import named
from feedback_store.records import IMPORT_SOURCES, ImportResult, Preference, UnpairedPreference, now
from feedback_store.statistics import Statistics
from feedback_store.store import FeedbackStore

EXPORTS = "exports"
DATASET_FOLDER = "dataset"
MAX_SHOWN = 200
PREVIEWED = 50
CONTRADICTIONS = 50
DATASET_NAME = "Zephyr Loop preferences"


class DataOperations:
    """Imports, exports, statistics, privacy and backups of one data directory.

    ``cancel_runs`` ends those of the named runs that are active.
    """

    def __init__(
        self,
        settings: Settings,
        store: FeedbackStore,
        rater: str,
        cancel_runs: Callable[[Collection[str]], None],
        gates: Gates,
    ) -> None:
        self.gates = gates
        self._readable = NamedFolders([*settings.import_folders, settings.data_dir / UPLOADS])
        self._cancel_runs = cancel_runs
        self._settings = settings
        self._store = store
        self._rater = rater
        self._active_import: dict[str, Any] | None = None

    # --- in --------------------------------------------------------------------------------------------------------

    def import_formats(self) -> list[str]:
        """`auto`, then every format an import understands."""
        return ["auto", *IMPORT_SOURCES]

    def import_preferences(self, source: str, format_: str, choices: Choices | None = None) -> ImportResult:
        """Import a file or hub id, all or nothing. An uploaded file is removed afterwards, whatever came of it.

        A file must be in a folder that is named for it (ZLOOP_IMPORT_DIRS), or uploaded. Raises BadImport, and Refused
        while another import goes on.
        """
        found = self._readable.file(source)
        if found is None and not is_hub_id(source):
            raise BadImport(source[:MAX_SHOWN], f"there is no such file that may be read. {self._readable.sentence}")
        try:
            with self.gates.importing:
                self._active_import = {"source": source, "rows": 0, "bytes": 0, "bytes_total": None}
                try:
                    named = HubId(source) if found is None else str(found)
                    return self._store.record_import(named, format_, self._progressed, choices)
                finally:
                    self._active_import = None
        finally:
            if found is not None:
                remove_upload(self._settings.data_dir, found)

    def import_upload(
        self, content: IO[bytes], name: str | None, format_: str, choices: Choices | None = None
    ) -> ImportResult:
        """Import what somebody sends; `name` says by its ending what it is. Raises BadImport and Refused."""
        self.gates.importing.check()  # before anything is written
        folder = upload_folder(self._settings.data_dir)
        try:
            path = folder / upload_name(name)
            try:
                with path.open("xb") as file:
                    shutil.copyfileobj(content, file)
            except OSError as error:
                said = f"it could not be kept here: {error.strerror}. Make room on the disk, then send it again."
                raise BadImport(path.name, said) from error
            return self.import_preferences(str(path), format_, choices)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def remove_expired_uploads(self) -> None:
        """Remove uploads that nobody imported."""
        remove_expired(self._settings.data_dir)

    def imports(self) -> dict[str, Any]:
        """The import in progress, if there is one, and the earlier ones, newest first."""
        earlier = [
            {**asdict(result), "created_at": moment.isoformat()} for result, moment in self._store.load_imports()
        ]
        return {"active": self._active_import, "imports": earlier}

    def _progressed(self, source: PreferenceSource) -> None:
        self._active_import = {
            **(self._active_import or {}),
            "rows": source.rows_read,
            "bytes": source.bytes_read,
            "bytes_total": source.bytes_total,
        }

    # --- out -------------------------------------------------------------------------------------------------------

    def export_lines(self, format_: str) -> Iterator[str]:
        """Every real preference, line by line: TRL or KTO JSON lines, or CSV."""
        return self.gates.exporting.around(self._lines(format_))

    def _lines(self, format_: str) -> Iterator[str]:
        if format_ == "csv":
            yield from exports.csv_lines(self._preferences())
            return
        rows = exports.kto_lines(self._unpaired()) if format_ == "kto" else exports.trl_lines(self._preferences())
        yield from (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def export_dataset(
        self, name: str | None, *, raters: str, push: str | None, private: bool
    ) -> tuple[DatasetFiles, str | None]:
        """Write a folder that `datasets` opens, with its card; `push` names a hub data set it goes to (its URL).

        It is the folder called `name` in `exports` of the data directory, and no other. Raises Refused, Conflict for a
        folder that is not ours, PushRefused, NotEnoughPreferences.
        """
        home = self._settings.data_dir / EXPORTS
        folder = folder_name(name or DATASET_FOLDER)
        if folder is None or (home / folder).is_symlink():
            raise Refused(
                400,
                f"out is {str(name)[:MAX_SHOWN]!r}: it must be the name of a folder, of letters, digits, dots and "
                f"dashes, which is made in {home}. `zloop export --format dataset --out FOLDER` puts it elsewhere.",
            )
        with self.gates.exporting:
            written = write_dataset(
                home / folder,
                list(self._preferences()),
                list(self._unpaired()),
                name=DATASET_NAME,
                created_at=now(),
                raters=raters,
            )
            return written, None if push is None else hub.push(home / folder, push, private=private)

    def _preferences(self) -> Iterator[Preference]:
        """With their raters' labels: who reads an export knows no ids."""
        return exports.renamed(self._store.preferences(), self._label)

    def _unpaired(self) -> Iterator[UnpairedPreference]:
        return exports.renamed(self._store.unpaired(), self._label)

    @property
    def _label(self) -> exports.Rename:
        labels = self._store.labels()
        return lambda rater: None if rater is None else labels.get(rater, rater)

    # --- counted ---------------------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """How people judge."""
        with self.gates.counting:
            found = self._store.statistics()
            return replace(found, raters=named(found.raters, self._store.labels()))

    def agreement(self) -> dict[str, Any]:
        """How far the raters agree, and where they contradict each other, with the words they judged."""
        with self.gates.counting:
            votes = self._store.votes()
            found = contradictions(votes)
            return {
                **asdict(agreement(votes)),
                "contradictions": len(found),
                "contradicted": [self._contradicted(one) for one in found[:CONTRADICTIONS]],
            }

    def _contradicted(self, found: Contradiction) -> dict[str, Any]:
        prompt, answers = self._store.judged(found.item)
        return {
            "pair_id": found.item,
            "prompt": prompt,
            "answers": dict(zip("ab", answers, strict=True)),
            "raters": named(found.by_choice, self._store.labels()),
        }

    def query(self, sql: str, limit_s: float) -> dict[str, Any]:
        """One SELECT on the store, read-only. Raises QueryRefused."""
        with self.gates.asking:
            return asdict(self._store.query(sql, limit_s=limit_s))

    # --- private ---------------------------------------------------------------------------------------------------

    def redaction_preview(self) -> dict[str, Any]:
        """What a snapshot would hide, with every value masked."""
        with self.gates.counting:
            texts = chain.from_iterable(map(_texts, self._store.preferences()))
            return {
                "redact": self._settings.redact,
                "found": [asdict(one) for one in redaction.preview(texts, PREVIEWED)],
            }

    def record_learning(self, scope: str, subject: str, learn: bool) -> None:
        """Whether a conversation's or a person's words may teach. Raises InvalidRecord, NotFound."""
        self._store.record_learning(scope, subject, learn, by=self._rater)

    def learns_from(self, conversation_id: str) -> bool:
        """Whether a conversation's words may teach."""
        return self._store.learns_from("conversation", conversation_id)

    def erase(self, rater: str) -> dict[str, Any]:
        """Remove a person's words everywhere below the data directory; a run on them is cancelled.

        Raises NotFound where there are none.
        """
        with self.gates.erasing:
            erased = self._store.erase(rater, self._settings.data_dir)
            self._cancel_runs(erased.runs)
            return asdict(erased)

    def finish_erasures(self) -> None:
        """Finish what an earlier server began to erase."""
        for rater in unfinished_erasures(self._settings.data_dir):
            self.erase(rater)

    # --- kept ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise StoreDamaged where the store cannot keep what people say just now."""
        self._store.check()

    def back_up(self) -> dict[str, Any]:
        """Copy the store while it works, and remove backups that are past their time."""
        with self.gates.backing_up:
            return _plain(self._store.back_up("manual", self._settings.keep_backups_days))

    def backups(self) -> list[dict[str, Any]]:
        """The backups there are, newest first."""
        return [_plain(one) for one in self._store.backups()]


def _texts(preference: Preference) -> Iterator[tuple[str, str]]:
    for message in preference.prompt:
        yield preference.preference_id, message["content"]
    yield preference.preference_id, preference.chosen
    yield preference.preference_id, preference.rejected


def _plain(record: Any) -> dict[str, Any]:
    """A record as JSON can carry it: paths and times as text."""
    body: dict[str, Any] = json.loads(json.dumps(asdict(record), default=str))
    return body
