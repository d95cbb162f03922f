"""What the schedule is and what it decided: DATA_DIR/schedule.json, replaced whole, the newest decision last.

A file and not a table: it is about this machine and not about what people said, so a backup of the store that is put
back must not bring back old times; and it is written only when something was decided. The process that owns the store
is its one writer. What the environment says holds until somebody changes the schedule at run time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from feedback_store.durable import read_json, write_json
from trainer.errors import BadSchedule
from trainer.schedule import Decision, Reason, Schedule, Situation, Trigger, next_start, outlook

FILE = "schedule.json"
KEPT = 200


class ScheduleBook:
    """`standard`: the schedule of the environment. Thread-safe. Raises BadSchedule where the file is no schedule."""

    def __init__(self, data_dir: Path, standard: Schedule) -> None:
        self._path = data_dir / FILE
        self._standard = standard
        self._lock = threading.Lock()
        try:
            self._kept = read_json(self._path) or {}
            changed = self._kept.get("schedule")
            self.schedule = Schedule(**changed) if changed is not None else standard
            self._decisions = [_decision(one) for one in self._kept.get("decisions", [])]
        except (ValueError, TypeError, KeyError, BadSchedule) as error:
            raise BadSchedule(
                f"{self._path} cannot be read ({error}). Mend it, or remove it: then the settings say when runs start."
            ) from error

    @property
    def is_changed(self) -> bool:
        """Whether somebody changed it at run time."""
        return self._kept.get("schedule") is not None

    def change(self, changes: Mapping[str, Any], *, now: datetime, by: str) -> Schedule:
        """Set some keys of the schedule and keep the others. Raises BadSchedule: then nothing has changed."""
        with self._lock:
            try:
                schedule = replace(self.schedule, **changes)
            except TypeError as error:
                raise BadSchedule(f"A schedule has cron, every, at_least, quiet, time_zone ({error}).") from error
            self._write(schedule=schedule.as_dict(), changed_at=now.isoformat(), changed_by=by, **_from(schedule, now))
            self.schedule = schedule
            return schedule

    def reset(self, *, now: datetime) -> Schedule:
        """Back to what the environment says."""
        with self._lock:
            self._write(schedule=None, changed_at=None, changed_by=None, **_from(self._standard, now))
            self.schedule = self._standard
            return self._standard

    def situation(self, now: datetime, new_preferences: int, active: str | None) -> Situation:
        """What `is_due` looks at. Times before a cron expression was first seen do not count as missed."""
        with self._lock:
            if self.schedule.cron is not None and self._kept.get("handled_cron") != self._times(self.schedule):
                self._write(**_from(self.schedule, now))
            until = datetime.fromisoformat(self._kept["handled_until"]) if self.schedule.cron is not None else now
            said = next((one for one in reversed(self._decisions) if one.trigger is Trigger.COUNT), None)
            return Situation(now, until, new_preferences, active, said)

    def record(self, decision: Decision) -> None:
        """Keep a decision; a time of the cron expression it is about is done with."""
        with self._lock:
            handled = {"handled_until": decision.due_at.isoformat()} if decision.due_at is not None else {}
            decisions = [*self._decisions, decision][-KEPT:]
            self._write(decisions=[one.as_dict() for one in decisions], **handled)
            self._decisions = decisions

    def as_body(self, now: datetime, new_preferences: int, shown: int) -> dict[str, Any]:
        """The body of GET /v1/schedule; the newest `shown` decisions, newest first."""
        with self._lock:
            following = next_start(self.schedule, now)
            return {
                **self.schedule.as_dict(),
                "on": self.schedule.is_on,
                "from": "changed here" if self.is_changed else "settings",
                "changed_at": self._kept.get("changed_at"),
                "changed_by": self._kept.get("changed_by"),
                "next_start": following.isoformat() if following else None,
                "new_preferences": new_preferences,
                "outlook": outlook(self.schedule, now, new_preferences),
                "decisions": [one.as_dict() for one in reversed(self._decisions[-shown:])],
            }

    def _write(self, **changes: Any) -> None:
        kept = {**self._kept, **changes}
        write_json(self._path, kept)
        self._kept = kept

    @staticmethod
    def _times(schedule: Schedule) -> str:
        return f"{schedule.cron} {schedule.time_zone}"


def _from(schedule: Schedule, now: datetime) -> dict[str, Any]:
    """From when on the times of this schedule count."""
    return {"handled_until": now.isoformat(), "handled_cron": ScheduleBook._times(schedule)}


def _decision(kept: Mapping[str, Any]) -> Decision:
    trigger, due_at = kept["trigger"], kept["due_at"]
    return Decision(
        at=datetime.fromisoformat(kept["at"]),
        reason=Reason(kept["reason"]),
        sentence=kept["sentence"],
        trigger=Trigger(trigger) if trigger else None,
        due_at=datetime.fromisoformat(due_at) if due_at else None,
        missed=kept["missed"],
        new_preferences=kept["new_preferences"],
        about=kept["about"],
        run_id=kept["run_id"],
    )
