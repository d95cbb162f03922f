"""When a cycle is due: by number, by the clock, not in quiet hours, not twice; clocks that change."""

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from trainer.errors import BadSchedule
from trainer.schedule import Decision, Reason, Schedule, Situation, Trigger, is_due, next_start, outlook

BERLIN = ZoneInfo("Europe/Berlin")
MONDAY = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
NIGHTLY = Schedule(cron="0 2 * * *", at_least=20)


def decide(schedule: Schedule, now: datetime, new: int, *, until: datetime | None = None, **more: Any) -> Decision:
    return is_due(schedule, Situation(now, until or now - timedelta(minutes=1), new, **more))


@pytest.mark.parametrize(
    ("new", "every", "reason"),
    [
        (50, 50, Reason.ENOUGH_NEW),
        (51, 50, Reason.ENOUGH_NEW),
        (49, 50, Reason.NOT_DUE),
        (999, 0, Reason.NOT_DUE),
    ],
)
def test_due_after_enough_new_preferences(new: int, every: int, reason: Reason) -> None:
    decision = decide(Schedule(every=every), MONDAY, new)
    assert decision.reason is reason
    assert decision.starts is (reason is Reason.ENOUGH_NEW)


def test_a_time_is_due_once_and_needs_new_preferences() -> None:
    at_two = datetime(2026, 11, 24, 2, 0, tzinfo=UTC)
    before, after = at_two - timedelta(seconds=1), at_two + timedelta(seconds=5)
    assert decide(NIGHTLY, before, 30).reason is Reason.NOT_DUE
    decision = decide(NIGHTLY, after, 30)
    assert (decision.reason, decision.due_at, decision.missed) == (Reason.ON_TIME, at_two, 0)
    assert decision.sentence == "Due at Tue 24 Nov 02:00 (UTC), with 30 new preferences."
    assert decide(NIGHTLY, after, 30, until=decision.due_at).reason is Reason.NOT_DUE
    skipped = decide(NIGHTLY, after, 19)
    assert (skipped.reason, skipped.starts) == (Reason.TOO_FEW_NEW, False)
    assert skipped.sentence == (
        "Skipped the start at Tue 24 Nov 02:00 (UTC): 19 new preferences since the last run, 20 are needed."
    )


def test_beside_a_run_that_goes_on_nothing_starts() -> None:
    at_two = datetime(2026, 11, 24, 2, 0, tzinfo=UTC)
    skipped = decide(NIGHTLY, at_two, 30, active="run_7")
    assert (skipped.reason, skipped.due_at) == (Reason.OVERLAP, at_two)
    assert "run_7 is still going on" in skipped.sentence
    waiting = decide(Schedule(every=10), at_two, 30, active="run_7")
    assert waiting.reason is Reason.OVERLAP
    assert decide(Schedule(every=10), at_two, 31, active="run_7", said=waiting).reason is Reason.NOT_DUE, "said twice"
    assert decide(Schedule(every=10), at_two, 31, active="run_8", said=waiting).reason is Reason.OVERLAP
    assert decide(Schedule(every=10), at_two, 31, said=waiting).reason is Reason.ENOUGH_NEW


@pytest.mark.parametrize(
    ("quiet", "clock", "until"),
    [
        ("08:00-18:00", (7, 59), None),
        ("08:00-18:00", (8, 0), "2026-11-23T18:00:00+01:00"),
        ("08:00-18:00", (17, 59), "2026-11-23T18:00:00+01:00"),
        ("08:00-18:00", (18, 0), None),
        ("22:00-06:00", (23, 0), "2026-11-24T06:00:00+01:00"),
        ("22:00-06:00", (5, 59), "2026-11-23T06:00:00+01:00"),
        ("22:00-06:00", (12, 0), None),
    ],
)
def test_quiet_hours_are_those_of_the_time_zone(quiet: str, clock: tuple[int, int], until: str | None) -> None:
    schedule = Schedule(every=1, quiet=quiet, time_zone="Europe/Berlin")
    now = datetime(2026, 11, 23, *clock, tzinfo=BERLIN).astimezone(UTC)
    ends = schedule.quiet_until(now)
    assert (ends.isoformat() if ends else None) == until
    assert decide(schedule, now, 5).reason is (Reason.QUIET_HOURS if until else Reason.ENOUGH_NEW)


def test_what_waits_for_the_end_of_the_quiet_hours_is_said_once_and_starts_then() -> None:
    schedule = Schedule(every=5, quiet="08:00-18:00")
    waiting = decide(schedule, MONDAY, 5)
    assert "quiet hours are 08:00-18:00 (UTC)" in waiting.sentence
    assert decide(schedule, MONDAY + timedelta(hours=1), 6, said=waiting).reason is Reason.NOT_DUE
    assert decide(schedule, MONDAY + timedelta(hours=6), 6, said=waiting).reason is Reason.ENOUGH_NEW
    assert decide(schedule, MONDAY + timedelta(days=1), 6, said=waiting).reason is Reason.QUIET_HOURS


def test_times_missed_while_no_server_ran_are_caught_up_once() -> None:
    last_handled = datetime(2026, 11, 20, 2, 0, tzinfo=UTC)
    decision = decide(NIGHTLY, MONDAY, 40, until=last_handled)
    assert (decision.reason, decision.missed) == (Reason.CATCH_UP, 3)
    assert decision.due_at == datetime(2026, 11, 23, 2, 0, tzinfo=UTC)
    assert decision.sentence.startswith(
        "Caught up once for 3 starts missed while no server ran, the last at Mon 23 Nov"
    )
    assert decide(NIGHTLY, MONDAY, 40, until=decision.due_at).reason is Reason.NOT_DUE
    for changes, reason in (({"new": 3}, Reason.TOO_FEW_NEW), ({"new": 40, "active": "run_1"}, Reason.OVERLAP)):
        skipped = decide(NIGHTLY, MONDAY, until=last_handled, **changes)  # type: ignore[arg-type]
        assert (skipped.reason, skipped.missed) == (reason, 3)
        assert skipped.sentence.startswith("Skipped 3 starts missed")
    years = decide(Schedule(cron="* * * * *"), MONDAY, 40, until=MONDAY - timedelta(days=900))
    assert (years.reason, years.due_at, years.missed) == (Reason.ON_TIME, MONDAY, 999), "counted no further than that"


def test_a_refusal_is_asked_again_only_with_more_preferences() -> None:
    refused = decide(Schedule(every=5), MONDAY, 5).as_refused("no room")
    assert refused.sentence.endswith("It could not start: no room")
    assert (refused.starts, refused.trigger) == (False, Trigger.COUNT)
    assert decide(Schedule(every=5), MONDAY, 5, said=refused).reason is Reason.NOT_DUE
    assert decide(Schedule(every=5), MONDAY, 6, said=refused).reason is Reason.ENOUGH_NEW


def times(schedule: Schedule, since: datetime, number: int) -> list[str]:
    found = []
    for _ in range(number):
        following = next_start(schedule, since)
        assert following is not None
        found.append(following.isoformat())
        since = following
    return found


def test_a_time_the_clock_skips_comes_at_the_end_of_the_gap() -> None:
    schedule = Schedule(cron="30 2 * * *", time_zone="Europe/Berlin")
    assert times(schedule, datetime(2027, 3, 27, 12, tzinfo=BERLIN), 2) == [
        "2027-03-28T03:00:00+02:00",
        "2027-03-29T02:30:00+02:00",
    ]


def test_a_time_the_clock_shows_twice_comes_twice_and_the_second_has_nothing_new() -> None:
    schedule = Schedule(cron="30 2 * * *", time_zone="Europe/Berlin")
    saturday = datetime(2026, 10, 24, 12, tzinfo=BERLIN)
    assert times(schedule, saturday, 3) == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-25T02:30:00+01:00",
        "2026-10-26T02:30:00+01:00",
    ]
    first = decide(schedule, datetime(2026, 10, 25, 0, 30, 5, tzinfo=UTC), 9, until=saturday)
    assert first.reason is Reason.ON_TIME
    second = decide(schedule, datetime(2026, 10, 25, 1, 30, 5, tzinfo=UTC), 0, until=first.due_at)
    assert (second.reason, second.missed) == (Reason.TOO_FEW_NEW, 0)


def test_weekdays_are_those_of_cron() -> None:
    assert times(Schedule(cron="0 2 * * 0"), MONDAY, 1) == ["2026-11-29T02:00:00+00:00"]  # a Sunday
    assert times(Schedule(cron="@daily"), MONDAY, 1) == ["2026-11-24T00:00:00+00:00"]


def test_the_outlook_says_what_comes() -> None:
    both = Schedule(cron="0 2 * * *", every=50, at_least=20, quiet="08:00-18:00")
    assert outlook(both, MONDAY, 14) == (
        "The next run starts at Tue 24 Nov 02:00 (UTC) if at least 20 new preferences have come in, "
        "or after 36 more new preferences. Not between 08:00 and 18:00 (UTC)."
    )
    assert "02:00 (UTC) if something new has come in." in outlook(Schedule(cron="0 2 * * *"), MONDAY, 0)
    assert outlook(Schedule(cron="0 2 * * *", at_least=0), MONDAY, 0).endswith("02:00 (UTC).")
    assert outlook(Schedule(), MONDAY, 14) == "Runs start only when somebody asks."
    assert "lies in the quiet hours" in outlook(Schedule(cron="0 12 * * *", quiet="08:00-18:00"), MONDAY, 0)
    assert next_start(Schedule(cron="0 12,20 * * *", quiet="08:00-18:00"), MONDAY) == MONDAY + timedelta(hours=8)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cron": "nonsense"}, "five fields"),
        ({"cron": "* * * * * *"}, "five fields"),
        ({"cron": "60 2 * * *"}, "60 2"),
        ({"cron": "0 2 30 2 *"}, "names no time"),
        ({"cron": "@sometimes"}, "@sometimes"),
        ({"cron": ""}, "five fields"),
        ({"quiet": "8-18"}, "08:00-18:00"),
        ({"quiet": "08:00-24:00"}, "08:00-24:00"),
        ({"quiet": "08:00-08:00"}, "two different times"),
        ({"time_zone": "Mars/Olympus"}, "Mars/Olympus"),
        ({"time_zone": "../etc/passwd"}, "Europe/Berlin"),
        ({"every": -1}, "every is -1"),
        ({"every": True}, "every is True"),
        ({"at_least": 10**10}, "at_least is 10000000000"),
    ],
)
def test_what_is_no_schedule_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSchedule, match=said):
        Schedule(**values)
