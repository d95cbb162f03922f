"""Is a cycle due? Pure: a schedule and the situation in, a decision with its sentence out. No clock, no disk.

    decision = is_due(Schedule(cron="0 2 * * *", at_least=20, quiet="08:00-18:00"), Situation(now, …))

A cycle is due at the times of a cron expression where `at_least` new preferences have come in, and as soon as `every`
new ones have. A due start is skipped, with the reason, while a run is active and within quiet hours. Times that passed
while no server ran are caught up once, however many they were. Cron expressions and daylight saving are croniter's: a
time that a clock skips comes at the end of the gap, one that it shows twice comes twice.

Who keeps what was decided: `schedule_book.py`. Who asks, and starts the run: `chat_app/scheduling.py`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from datetime import datetime, time, timedelta
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from croniter import CroniterError, croniter

from trainer.errors import BadSchedule

LATE = timedelta(minutes=2)  # a time that is older than this when somebody looks was missed: no server ran
MOST_COUNTED = 1000
MOST_PREFERENCES = 10**9
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


class Trigger(StrEnum):
    CRON = "cron"
    COUNT = "count"


class Reason(StrEnum):
    """Why a decision is what it is. All but the first three start nothing."""

    ON_TIME = "on_time"
    CATCH_UP = "catch_up"
    ENOUGH_NEW = "enough_new"
    NOT_DUE = "not_due"
    OVERLAP = "overlap"
    QUIET_HOURS = "quiet_hours"
    TOO_FEW_NEW = "too_few_new"
    REFUSED = "refused"  # it was to start, and the trainer refused


STARTS = frozenset({Reason.ON_TIME, Reason.CATCH_UP, Reason.ENOUGH_NEW})


@dataclass(frozen=True, slots=True)
class Schedule:
    """When runs start by themselves. Raises BadSchedule with the value and what is allowed.

    cron: five fields (minute hour day month weekday, 0 is Sunday) or @daily and the like; None: at no time of its own.
    every: start once this many new preferences have come in; 0: never for their number.
    at_least: new preferences a time of the cron expression needs. quiet: hours without a start, such as 22:00-06:00.
    time_zone: IANA name, of cron and quiet hours.
    """

    cron: str | None = None
    every: int = 0
    at_least: int = 1
    quiet: str | None = None
    time_zone: str = "UTC"

    def __post_init__(self) -> None:
        for name, low in (("every", 0), ("at_least", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MOST_PREFERENCES:
                raise BadSchedule(f"{name} is {value!r}, it must be a whole number from {low} to {MOST_PREFERENCES}.")
        try:
            zone = ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise BadSchedule(
                f"time_zone is {self.time_zone!r}, it must be a name such as UTC or Europe/Berlin."
            ) from error
        if self.quiet is not None:
            match = _HOURS.fullmatch(self.quiet)
            if match is None or match.group(1, 2) == match.group(3, 4):
                raise BadSchedule(f"quiet is {self.quiet!r}, it must be two different times, such as 08:00-18:00.")
        if self.cron is not None:
            _check_cron(self.cron, zone)

    @property
    def is_on(self) -> bool:
        """Whether anything ever starts by itself."""
        return self.cron is not None or self.every > 0

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.time_zone)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def quiet_until(self, moment: datetime) -> datetime | None:
        """The end of the quiet hours that `moment` lies in; None outside of them."""
        if self.quiet is None:
            return None
        begin, end = (time.fromisoformat(part) for part in self.quiet.split("-"))
        local = moment.astimezone(self.zone)
        clock = local.time().replace(tzinfo=None)
        within = begin <= clock < end if begin < end else clock >= begin or clock < end
        if not within:
            return None
        day = local.date() if clock < end else local.date() + timedelta(days=1)
        return datetime.combine(day, end, self.zone)


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided at `at`, and why, in a sentence. `missed`: times that passed unseen, the one caught up included.

    `about`: the run or the hours that stood in the way. `run_id`: the run that was started, once it was.
    """

    at: datetime
    reason: Reason
    sentence: str
    trigger: Trigger | None = None
    due_at: datetime | None = None
    missed: int = 0
    new_preferences: int = 0
    about: str = ""
    run_id: str | None = None

    @property
    def starts(self) -> bool:
        return self.reason in STARTS

    @property
    def is_worth_keeping(self) -> bool:
        return self.reason is not Reason.NOT_DUE

    def as_started(self, run_id: str) -> Decision:
        """The same, with the run it led to."""
        return replace(self, run_id=run_id)

    def as_refused(self, why: str) -> Decision:
        """A start that the trainer refused."""
        return replace(self, reason=Reason.REFUSED, sentence=f"{self.sentence} It could not start: {why}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        times = {"at": self.at.isoformat(), "due_at": self.due_at.isoformat() if self.due_at else None}
        return {**asdict(self), **times, "started": self.run_id is not None}


@dataclass(frozen=True, slots=True)
class Situation:
    """What `is_due` looks at. Times are aware.

    handled_until: times of the cron expression up to this one were decided on. active: the run that goes on.
    said: the newest decision kept about the number of new preferences, so that it is not said every second.
    """

    now: datetime
    handled_until: datetime
    new_preferences: int
    active: str | None = None
    said: Decision | None = None


def is_due(schedule: Schedule, situation: Situation) -> Decision:
    """Whether to start a run now: one start at most for a time of the cron expression, one for all that was missed."""
    due_at, times = _due_time(schedule, situation)
    if due_at is not None:
        return _by_time(schedule, situation, due_at, times)
    if 0 < schedule.every <= situation.new_preferences:
        return _by_number(schedule, situation)
    return Decision(situation.now, Reason.NOT_DUE, "Nothing is due.", new_preferences=situation.new_preferences)


def next_start(schedule: Schedule, now: datetime) -> datetime | None:
    """The next time of the cron expression outside of the quiet hours; None where there is none to be found."""
    if schedule.cron is None:
        return None
    times = croniter(schedule.cron, now.astimezone(schedule.zone))
    for _ in range(MOST_COUNTED):
        found: datetime = times.get_next(datetime)
        if schedule.quiet_until(found) is None:
            return found
    return None


def outlook(schedule: Schedule, now: datetime, new_preferences: int) -> str:
    """One sentence on when the next run starts by itself."""
    ways = []
    following = next_start(schedule, now)
    if following is not None:
        needed = "something new has" if schedule.at_least == 1 else f"at least {schedule.at_least} new preferences have"
        ways.append(f"at {_said(following)}{f' if {needed} come in' if schedule.at_least else ''}")
    elif schedule.cron is not None:
        ways.append("never by the clock: every time of the cron expression lies in the quiet hours")
    if schedule.every:
        left = max(0, schedule.every - new_preferences)
        ways.append(f"after {left} more new preferences" if left else f"now: {new_preferences} new preferences wait")
    if not ways:
        return "Runs start only when somebody asks."
    quiet = f" Not between {schedule.quiet.replace('-', ' and ')} ({schedule.time_zone})." if schedule.quiet else ""
    return f"The next run starts {', or '.join(ways)}.{quiet}"


def _check_cron(cron: str, zone: ZoneInfo) -> None:
    try:
        if not cron.startswith("@") and len(cron.split()) != 5:
            raise BadSchedule(
                f"cron is {cron!r}, it must have five fields: minute hour day month weekday, such as 0 2 * * *."
            )
        croniter(cron, datetime(2024, 1, 1, tzinfo=zone)).get_next(datetime)
    except (CroniterError, ValueError) as error:
        raise BadSchedule(
            f"cron is {cron!r}, which names no time ({error}). Every night at two is: 0 2 * * *"
        ) from error


def _due_time(schedule: Schedule, situation: Situation) -> tuple[datetime | None, int]:
    """The latest time of the cron expression not decided on yet, and how many there are."""
    if schedule.cron is None:
        return None, 0
    times = croniter(schedule.cron, situation.handled_until.astimezone(schedule.zone))
    latest, count = None, 0
    while count < MOST_COUNTED and (found := times.get_next(datetime)) <= situation.now:
        latest, count = found, count + 1
    if count == MOST_COUNTED:  # a year of every minute need not be counted
        just_after = (situation.now + timedelta(microseconds=1)).astimezone(schedule.zone)
        latest = croniter(schedule.cron, just_after).get_prev(datetime)
    return latest, count


def _by_time(schedule: Schedule, situation: Situation, due_at: datetime, times: int) -> Decision:
    late = situation.now - due_at > LATE
    missed = times if late else times - 1
    what = f"the start at {_said(due_at)}"
    if late:
        number = f"{missed} starts" if missed > 1 else "one start"
        what = f"{number} missed while no server ran, the last at {_said(due_at)}"

    def decided(reason: Reason, sentence: str, about: str = "") -> Decision:
        return Decision(
            situation.now, reason, sentence, Trigger.CRON, due_at, missed, situation.new_preferences, about
        )  # fmt: skip

    obstacle = _obstacle(schedule, situation)
    if obstacle is not None:
        reason, why, about = obstacle
        return decided(reason, f"Skipped {what}: {why}.", about)
    if situation.new_preferences < schedule.at_least:
        why = f"{situation.new_preferences} new preferences since the last run, {schedule.at_least} are needed"
        return decided(Reason.TOO_FEW_NEW, f"Skipped {what}: {why}.")
    new = f"{situation.new_preferences} new preferences"
    if late:
        return decided(Reason.CATCH_UP, f"Caught up once for {what}, with {new}.")
    return decided(Reason.ON_TIME, f"Due at {_said(due_at)}, with {new}.")


def _by_number(schedule: Schedule, situation: Situation) -> Decision:
    new, said = situation.new_preferences, situation.said
    reached = f"{new} new preferences have come in, {schedule.every} make a run due"

    def decided(reason: Reason, sentence: str, about: str = "") -> Decision:
        return Decision(situation.now, reason, sentence, Trigger.COUNT, None, 0, new, about)

    obstacle = _obstacle(schedule, situation)
    if obstacle is not None:
        reason, why, about = obstacle
        if said is not None and (said.reason, said.about) == (reason, about):
            return decided(Reason.NOT_DUE, "That was said already.")
        return decided(reason, f"Skipped for now: {reached}, but {why}.", about)
    if said is not None and said.reason is Reason.REFUSED and new <= said.new_preferences:
        return decided(Reason.NOT_DUE, "The trainer refused with as many; it is asked again when more have come in.")
    return decided(Reason.ENOUGH_NEW, f"{reached}.")


def _obstacle(schedule: Schedule, situation: Situation) -> tuple[Reason, str, str] | None:
    """What stands in the way of any start: the reason, in words, and what exactly."""
    if situation.active is not None:
        return Reason.OVERLAP, f"{situation.active} is still going on", situation.active
    until = schedule.quiet_until(situation.now)
    if until is not None:
        return Reason.QUIET_HOURS, f"quiet hours are {schedule.quiet} ({schedule.time_zone})", until.isoformat()
    return None


def _said(moment: datetime) -> str:
    return f"{moment:%a %d %b %H:%M} ({moment.tzinfo})"
