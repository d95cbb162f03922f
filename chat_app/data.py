"""The data a team owns: in, out, counted, kept, forgotten. What the buttons, commands and routes of it share.

Where it sits: beside `operations.py`, which has one as `operations.data`; behind it the store. No Gradio, no HTTP.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from chat_app.settings import Settings
from feedback_store import exports, hub, redaction
from feedback_store.agreement import Contradiction, agreement, contradictions
from feedback_store.dataset_export import DatasetFiles, write_dataset
from feedback_store.erasure import unfinished_erasures
from feedback_store.importers import PreferenceSource
from feedback_store.importers.pairs import Choices
from feedback_store.people import named
from feedback_store.records import IMPORT_SOURCES, ImportResult, Preference, UnpairedPreference, now
from feedback_store.statistics import Statistics
from feedback_store.store import FeedbackStore

EXPORTS = "exports"
PREVIEWED = 50
CONTRADICTIONS = 50
DATASET_NAME = "Zephyr Loop preferences"


class DataOperations:
    """Imports, exports, statistics, privacy and backups of one data directory.

    ``cancel_runs`` ends those of the named runs that are active.
    """

    def __init__(
        self, settings: Settings, store: FeedbackStore, rater: str, cancel_runs: Callable[[Collection[str]], None]
    ) -> None:
        self._cancel_runs = cancel_runs
        self._settings = settings
        self._store = store
        self._rater = rater
        self._active_import: dict[str, Any] | None = None
        self._importing = threading.Lock()

    # --- in --------------------------------------------------------------------------------------------------------

    def import_formats(self) -> list[str]:
        """`auto`, then every format an import understands."""
        return ["auto", *IMPORT_SOURCES]

    def import_preferences(self, source: str, format_: str, choices: Choices | None = None) -> ImportResult:
        """Import a file or hub id, all or nothing; one at a time. Raises BadImport."""
        with self._importing:
            self._active_import = {"source": source, "rows": 0, "bytes": 0, "bytes_total": None}
            try:
                return self._store.record_import(source, format_, self._progressed, choices)
            finally:
                self._active_import = None

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
        if format_ == "csv":
            return exports.csv_lines(self._preferences())
        rows = exports.kto_lines(self._unpaired()) if format_ == "kto" else exports.trl_lines(self._preferences())
        return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def export_dataset(
        self, directory: str | None, *, raters: str, push: str | None, private: bool
    ) -> tuple[DatasetFiles, str | None]:
        """Write a folder that `datasets` opens, with its card; `push` names a hub data set it goes to (its URL).

        Raises Conflict for a folder that is not ours, PushRefused, NotEnoughPreferences.
        """
        target = Path(directory) if directory else self._settings.data_dir / EXPORTS / "dataset"
        written = write_dataset(
            target,
            list(self._preferences()),
            list(self._unpaired()),
            name=DATASET_NAME,
            created_at=now(),
            raters=raters,
        )
        return written, None if push is None else hub.push(target, push, private=private)

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
        found = self._store.statistics()
        return replace(found, raters=named(found.raters, self._store.labels()))

    def agreement(self) -> dict[str, Any]:
        """How far the raters agree, and where they contradict each other, with the words they judged."""
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
        return asdict(self._store.query(sql, limit_s=limit_s))

    # --- private ---------------------------------------------------------------------------------------------------

    def redaction_preview(self) -> dict[str, Any]:
        """What a snapshot would hide, with every value masked."""
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
