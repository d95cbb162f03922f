"""Watching: a run's lines, log and report, and whether it is worth retraining yet. For page, command and route alike.

Where it sits: beside `operations.py`, which has one as `operations.watching`; behind it the trainer's port.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chat_app.gates import Gates
from feedback_store.agreement import agreement
from feedback_store.people import named
from feedback_store.store import FeedbackStore

if TYPE_CHECKING:
    from chat_app.operations import RunHandle, Status

MAX_LOG_LINES = 1_000


class WatchedTrainer(Protocol):
    """What of the trainer is asked here."""

    def run(self, run_id: str) -> RunHandle: ...
    def runs(self) -> Sequence[RunHandle]: ...
    def report(self, run_id: str) -> Path: ...
    def evaluation_report(self, evaluation_id: str) -> Path: ...
    def worth(self, champion: str, train_rows: int, new: int, percent_agreement: float | None) -> dict[str, Any]: ...


class WatchingOperations:
    """What there is to see of runs. `status` is `Operations.status`."""

    def __init__(
        self, store: FeedbackStore, trainer: WatchedTrainer, status: Callable[[], Status], gates: Gates
    ) -> None:
        self._gates = gates
        self._store = store
        self._trainer = trainer
        self._status = status
        self._worth: tuple[object, dict[str, Any]] = (None, {})
        self._counting = threading.Lock()

    def metrics(self, run_id: str, since: int = 0) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl after step `since`: steps, and validations with `eval/…`. Raises RunNotFound."""
        return [line for line in self._trainer.run(run_id).metrics() if line["step"] > since]

    def log(self, run_id: str, lines: int = 100) -> list[str]:
        """The last lines of what the run's processes print. Raises RunNotFound."""
        return self._trainer.run(run_id).log_tail(min(lines, MAX_LOG_LINES))

    def report(self, run_id: str) -> str:
        """The run's report, a page of HTML that stands alone. Raises RunNotFound, and what `Trainer.report` raises."""
        with self._gates.reporting:
            return self._page(self._trainer.report(run_id))

    def evaluation_report(self, evaluation_id: str) -> str:
        """The same of an evaluation or a benchmark. Raises EvaluationNotFound, and what writing it raises."""
        with self._gates.reporting:
            return self._page(self._trainer.evaluation_report(evaluation_id))

    def _page(self, path: Path) -> str:
        """A report as people see it: with labels, of which its file knows none."""
        labels = {person_id: escape(label) for person_id, label in self._store.labels().items()}
        page: str = named(path.read_text(encoding="utf-8"), labels)
        return page

    def worth(self) -> dict[str, Any]:
        """What a retrain now is expected to gain, as `trainer.worth.Worth` says it; kept while nothing changes.

        Raises TrainingUnavailable without the training packages.
        """
        status = self._status()
        last = next((run.run_id for run in self._trainer.runs() if not run.is_active), None)
        key = (status.champion, status.new_preferences, status.counts, last)
        known, found = self._worth
        if known == key:
            return found
        with self._gates.counting, self._counting:
            if self._worth[0] != key:
                percent = agreement(self._store.votes()).percent
                found = self._trainer.worth(status.champion, status.counts.train, status.new_preferences, percent)
                self._worth = (key, {**found, "champion": status.champion, "agreement": percent})
            return self._worth[1]
