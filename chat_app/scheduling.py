"""When runs start by themselves: what the buttons, commands and routes of the schedule share, and the watch over it.

Where it sits: beside `operations.py`, which has one as `operations.scheduling`. The decision is the trainer's
(`trainer/schedule.py`, pure), what was decided is kept by its book; here the clock is read and the run is started.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

log = logging.getLogger(__name__)

LOOK_EVERY_S = 15.0
SHOWN = 50


class Schedule(Protocol):
    """What this side knows of a schedule."""

    @property
    def every(self) -> int: ...
    @property
    def is_on(self) -> bool: ...


class Book(Protocol):
    """The port to what is kept; `trainer.schedule_book.ScheduleBook` fits it."""

    @property
    def schedule(self) -> Schedule: ...
    def change(self, changes: Mapping[str, Any], *, now: datetime, by: str) -> Schedule: ...
    def reset(self, *, now: datetime) -> Schedule: ...
    def situation(self, now: datetime, new_preferences: int, active: str | None) -> Any: ...
    def record(self, decision: Any) -> None: ...
    def as_body(self, now: datetime, new_preferences: int, shown: int) -> dict[str, Any]: ...


def _now() -> datetime:
    return datetime.now(UTC)


class Scheduling:
    """`new_preferences` counts those since the last run, `active_run` names the one that goes on, `start` starts one.

    `is_due` decides from the schedule and the situation; see `trainer.schedule`.
    """

    def __init__(
        self,
        book: Book,
        is_due: Callable[[Any, Any], Any],
        *,
        new_preferences: Callable[[], int],
        active_run: Callable[[], str | None],
        start: Callable[[], str],
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._book = book
        self._is_due = is_due
        self._new_preferences = new_preferences
        self._active_run = active_run
        self._start = start
        self._clock = clock
        self._looking = threading.Lock()
        self._stopping = asyncio.Event()

    @property
    def every(self) -> int:
        """A run starts after this many new preferences; 0: not for their number."""
        return self._book.schedule.every

    def state(self) -> dict[str, Any]:
        """The schedule, the next start, and the newest decisions, newest first."""
        return {**self._book.as_body(self._clock(), self._new_preferences(), SHOWN), "active_run": self._active_run()}

    def change(self, changes: Mapping[str, Any], by: str) -> dict[str, Any]:
        """Set some keys of the schedule, for good. Raises BadSchedule: then nothing has changed."""
        self._book.change(changes, now=self._clock(), by=by)
        return self.state()

    def reset(self) -> dict[str, Any]:
        """Back to what the settings say."""
        self._book.reset(now=self._clock())
        return self.state()

    def look(self, new_preferences: int | None = None) -> str | None:
        """Start a run where one is due, and keep what was decided; the run that was started.

        `new_preferences` where the caller has counted them. Where another thread looks just now this one does not.
        Raises nothing but what the store and the disk raise.
        """
        if not self._book.schedule.is_on or not self._looking.acquire(blocking=False):
            return None
        try:
            now = self._clock()
            new = self._new_preferences() if new_preferences is None else new_preferences
            if not self._decided(now, new, None).is_worth_keeping:  # every pick comes here: run directories can wait
                return None
            decision = self._decided(now, new, self._active_run())
            if not decision.is_worth_keeping:
                return None
            if decision.starts:
                decision = self._started(decision)
            log.info("Schedule: %s", decision.sentence)
            self._book.record(decision)
            run_id: str | None = decision.run_id
            return run_id
        finally:
            self._looking.release()

    def _decided(self, now: datetime, new_preferences: int, active: str | None) -> Any:
        return self._is_due(self._book.schedule, self._book.situation(now, new_preferences, active))

    def _started(self, decision: Any) -> Any:
        try:
            return decision.as_started(self._start())
        except Exception as error:  # noqa: BLE001 - whatever the trainer says, it is kept and nothing else breaks
            return decision.as_refused(str(error))

    # --- the watch -------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look again and again, until `stop`."""
        while not self._stopping.is_set():
            try:
                await asyncio.to_thread(self.look)
            except Exception:
                log.exception("The schedule could not be looked at; it is tried again.")
            try:
                await asyncio.wait_for(self._stopping.wait(), LOOK_EVERY_S)
            except TimeoutError:
                continue

    def stop(self) -> None:
        """End the watch once it has decided what it is deciding."""
        self._stopping.set()
