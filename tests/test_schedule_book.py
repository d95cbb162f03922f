"""What is kept of the schedule: changes, decisions, what was handled; after a restart too."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from trainer.errors import BadSchedule
from trainer.schedule import Reason, Schedule, is_due
from trainer.schedule_book import FILE, KEPT, ScheduleBook

NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
NIGHTLY = Schedule(cron="0 2 * * *")


def test_what_the_settings_say_holds_until_somebody_changes_it_and_after_a_reset(tmp_path: Path) -> None:
    book = ScheduleBook(tmp_path, Schedule(every=50))
    assert not (tmp_path / FILE).exists(), "nothing was said yet"
    book.change({"cron": "0 3 * * *", "quiet": "08:00-18:00"}, now=NOON, by="ann")
    again = ScheduleBook(tmp_path, Schedule(every=70))
    assert again.schedule == Schedule(cron="0 3 * * *", every=50, quiet="08:00-18:00")
    body = again.as_body(NOON, 3, 10)
    assert (body["from"], body["changed_by"]) == ("changed here", "ann")
    assert body["next_start"] == "2026-11-24T03:00:00+00:00"
    assert again.reset(now=NOON) == Schedule(every=70)
    assert ScheduleBook(tmp_path, Schedule(every=80)).schedule.every == 80


def test_a_change_that_is_no_schedule_changes_nothing(tmp_path: Path) -> None:
    book = ScheduleBook(tmp_path, NIGHTLY)
    book.change({"every": 5}, now=NOON, by="ann")
    before = (tmp_path / FILE).read_bytes()
    for changes in ({"cron": "often"}, {"weekly": True}):
        with pytest.raises(BadSchedule):
            book.change(changes, now=NOON, by="ann")
    assert book.schedule.every == 5
    assert (tmp_path / FILE).read_bytes() == before


def test_times_missed_between_two_servers_are_one_catch_up(tmp_path: Path) -> None:
    first = ScheduleBook(tmp_path, NIGHTLY)
    assert is_due(NIGHTLY, first.situation(NOON, 9, None)).reason is Reason.NOT_DUE, "older times were never promised"
    later = NOON + timedelta(days=3)
    second = ScheduleBook(tmp_path, NIGHTLY)
    decision = is_due(NIGHTLY, second.situation(later, 9, None))
    assert (decision.reason, decision.missed) == (Reason.CATCH_UP, 3)
    second.record(decision.as_started("run_1"))
    third = ScheduleBook(tmp_path, NIGHTLY)
    assert is_due(NIGHTLY, third.situation(later, 9, None)).reason is Reason.NOT_DUE
    (kept,) = third.as_body(later, 0, 10)["decisions"]
    assert (kept["run_id"], kept["started"], kept["missed"]) == ("run_1", True, 3)


def test_a_new_cron_expression_has_missed_nothing(tmp_path: Path) -> None:
    ScheduleBook(tmp_path, NIGHTLY).situation(NOON, 0, None)
    hourly = Schedule(cron="0 * * * *")
    later = NOON + timedelta(days=2, minutes=30)
    assert is_due(hourly, ScheduleBook(tmp_path, hourly).situation(later, 9, None)).reason is Reason.NOT_DUE


def test_the_newest_decisions_are_kept(tmp_path: Path) -> None:
    book = ScheduleBook(tmp_path, Schedule(every=1))
    decision = is_due(book.schedule, book.situation(NOON, 1, None))
    for number in range(KEPT + 5):
        book.record(decision.as_started(f"run_{number}"))
    shown = ScheduleBook(tmp_path, Schedule()).as_body(NOON, 0, 1000)["decisions"]
    assert len(shown) == KEPT
    assert shown[0]["run_id"] == f"run_{KEPT + 4}"


@pytest.mark.parametrize("text", ["{", "[]", '{"schedule": {"cron": "often"}}', '{"decisions": [{"at": 1}]}'])
def test_a_file_that_is_no_schedule_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(BadSchedule, match=r"schedule\.json cannot be read"):
        ScheduleBook(tmp_path, Schedule())
