"""A new champion that is clearly worse is taken back: by the whole product, and each way the watch can end."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from baking_cycles import KINDS, QUESTION, cycles
from symbol_gguf import publish_symbol_version
from test_operations import served
from typer.testing import CliRunner

from chat_app.__main__ import open_store
from chat_app.answers import Asker
from chat_app.operations import Operations
from chat_app.serving.engine import EngineBroken, Sampling
from chat_app.serving.scripted_engine import Fault, build_scripted_engine
from chat_app.serving.slot import ModelSlot
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from chat_app.turns import TurnStream
from feedback_store.store import FeedbackStore
from trainer import schedule

ASKED = Sampling(max_tokens=200)


@contextmanager
def house(directory: Path, faults: dict[str, Fault], **given: object) -> Iterator[tuple[Operations, FeedbackStore]]:
    """The operations with two versions beside the base; `faults` says what is wrong with them."""
    for number in (1, 2):
        if not (directory / "versions" / f"v{number}").exists():
            publish_symbol_version(directory / "versions", number, "smollm2-135m-instruct", canaries=False)
    values = {f"ZLOOP_{name.upper()}": str(value) for name, value in given.items()}
    settings = load_settings({"ZLOOP_DATA_DIR": str(directory), "ZLOOP_ENGINE": "scripted", **values})
    with open_store(settings) as store:
        slot = ModelSlot(partial(build_scripted_engine, faults=faults))
        yield Operations(settings, store, TrainerRoom(settings, store), slot, schedule.is_due), store


async def ask(operations: Operations, count: int = 1, askers: int = 1, **more: Any) -> list[TurnStream]:
    """So many answers, one after the other, each for the next of the askers; broken ones are left out."""
    answers = []
    for number in range(count):
        with suppress(EngineBroken):
            asker = Asker("me", origin=f"page:{number % askers}")
            answers.append(await operations.answers.answer(QUESTION, ASKED, asker, **more))
    await operations.answers.settled()
    return answers


async def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def run(
    directory: Path, faults: dict[str, Fault], work: Callable[[Operations], Awaitable[Any]], **given: object
) -> Any:
    with house(directory, faults, **given) as (operations, _):
        return served(operations, lambda: work(operations))


def state_of(operations: Operations) -> str:
    return str(operations.baking.as_body()["state"])


def test_every_kind_of_fault_is_taken_back_and_no_swap_costs_an_answer(tmp_path: Path) -> None:
    done, heard = asyncio.run(cycles(tmp_path, KINDS, streams=8, delay_s=0.001))
    assert heard.wrong == []
    for cycle in done:
        assert cycle.back, cycle
        assert cycle.requests <= 50
        assert cycle.seconds < 60
        assert cycle.reason.startswith(f"{cycle.version} was taken back after ")
    reasons = {cycle.fault: cycle.reason for cycle in done}
    assert "answers failed (v0: 0 of 200)" in reasons[Fault.BREAKS_OFF]
    assert "answers were empty (v0: 0 of 200)" in reasons[Fault.EMPTY]
    assert "answers began late (v0: 0 of " in reasons[Fault.SLOW]
    assert "went round in circles" in reasons[Fault.REPEATS]
    assert "more than twice as long" in reasons[Fault.DOUBLES]
    assert "its engine stopped" in reasons[Fault.DIES]
    assert "answers failed" in reasons[Fault.FAILS_AT_ONCE]
    unharmed = [cycle for cycle in done if cycle.fault not in (Fault.BREAKS_OFF, Fault.DIES)]
    assert [cycle.broken for cycle in unharmed] == [0] * len(unharmed)
    rescued = {cycle.fault: cycle.rescued for cycle in done}
    assert rescued[Fault.EMPTY] >= 3
    assert rescued[Fault.FAILS_AT_ONCE] >= 3


def test_what_breaks_in_our_own_code_is_no_versions_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(operations: Operations) -> str:
        await ask(operations, 30)
        await operations.promote("v1")
        monkeypatch.setattr(TurnStream, "_note_piece", lambda *_: 1 / 0)
        for _ in range(10):
            with suppress(ZeroDivisionError):
                await operations.answers.answer(QUESTION, ASKED, Asker("me"))
        await operations.answers.settled()
        return state_of(operations)

    assert run(tmp_path, {}, work) == "watching"


def test_it_is_written_down_for_good_and_shown_everywhere(tmp_path: Path) -> None:
    async def work(operations: Operations) -> list[TurnStream]:
        await ask(operations, 30)
        await operations.promote("v1")
        answers = await ask(operations, 8)
        await until(lambda: state_of(operations) == "taken back")
        return answers

    faults = {"v1": Fault.EMPTY}
    with house(tmp_path, faults) as (operations, store):
        answers = served(operations, lambda: work(operations))
        assert [answer.version for answer in answers] == ["v0"] * 8  # nobody saw an empty one
        (promotion, back) = store.load_promotions()
        assert (promotion.kind, back.kind, back.version, back.by) == ("promote", "auto-rollback", "v0", "baking")
        assert store.champion() == "v0"
        assert back.reason.startswith("v1 was taken back after ")
        assert "answers were empty (v0: 0 of 30)" in back.reason
        assert operations.status().watch == back.reason
        (row,) = (row for row in operations.version_rows() if row["version"] == "v1")
        assert (row["state"], row["taken_back"]) == ("rejected", back.reason)
        told = operations.render_metrics().decode()
        assert 'zloop_bakings_total{outcome="taken back"} 1.0' in told
        assert 'zloop_swaps_total{kind="auto-rollback",outcome="ok"} 1.0' in told
        assert 'zloop_rescued_answers_total{version="v1"}' in told
    with house(tmp_path, faults) as (operations, _):  # after a restart the store knows
        assert operations.status().watch == back.reason
        assert operations.baking.taken_back() == {"v1": back.reason}


def test_a_good_version_is_kept_once_both_limits_are_over(tmp_path: Path) -> None:
    async def work(operations: Operations) -> None:
        await ask(operations, 12)
        await operations.promote("v1")
        assert operations.status().watch == "v1 is being watched: 0 of 10 requests, no trouble."
        await ask(operations, 6)
        assert operations.status().watch == "v1 is being watched: 6 of 10 requests, no trouble."
        await ask(operations, 4)
        await until(lambda: state_of(operations) == "kept")
        assert operations.status().watch == "v1 was watched over 10 requests and is kept."
        assert operations.champion() == "v1"

    run(tmp_path, {}, work, baking_requests=10, baking_s=0.1)


@pytest.mark.parametrize("how", ["off", "no-bake"])
def test_it_can_be_switched_off(tmp_path: Path, how: str) -> None:
    async def work(operations: Operations) -> None:
        await operations.promote("v1", bake=how != "no-bake")
        assert state_of(operations) == "none"
        await ask(operations, 8)
        assert operations.champion() == "v1"

    run(tmp_path, {"v1": Fault.BREAKS_OFF}, work, baking="off" if how == "off" else "on")


@pytest.mark.parametrize("how", ["rollback", "promote"])
def test_a_person_who_decides_ends_the_watch(tmp_path: Path, how: str) -> None:
    async def work(operations: Operations) -> None:
        await operations.promote("v1")
        await ask(operations, 2)
        if how == "rollback":
            await operations.rollback()
            assert state_of(operations) == "ended"
            assert operations.status().watch == ""
            assert operations.version_rows()[1]["state"] == "retired"
        else:
            await operations.promote("v2")
            assert operations.baking.as_body()["version"] == "v2"
        await ask(operations, 8)
        await asyncio.sleep(0.1)
        kinds = [one.kind for one in operations._store.load_promotions()]
        assert kinds == (["promote", "rollback"] if how == "rollback" else ["promote", "promote"])

    run(tmp_path, {"v1": Fault.BREAKS_OFF}, work)


def test_going_back_comes_too_late_where_somebody_was_faster(tmp_path: Path) -> None:
    async def work(operations: Operations) -> None:
        await operations.promote("v1")
        assert not await operations._take_back("v2", "not served at all")
        assert operations.champion() == "v1"

    run(tmp_path, {}, work)


def test_thumbs_down_count(tmp_path: Path) -> None:
    async def work(operations: Operations) -> None:
        for answer in await ask(operations, 30):
            operations.record_rating(answer.candidate_id, "up")
        await operations.promote("v1")
        for answer in await ask(operations, 5, askers=3):
            operations.record_rating(answer.candidate_id, "down")
        await until(lambda: state_of(operations) == "taken back")
        assert "5 of 5 rated answers were rated down (v0: 0 of 30)" in operations.status().watch

    run(tmp_path, {}, work)


def test_a_practised_taste_may_be_a_longer_one(tmp_path: Path) -> None:
    async def work(operations: Operations) -> None:
        await ask(operations, 30)
        await operations.promote("v1")
        await ask(operations, 8)
        assert operations.status().watch == "v1 is being watched: 8 of 50 requests, no trouble."

    faults = {"v1": Fault.DOUBLES}
    with house(tmp_path, faults):  # publishes v1
        manifest = tmp_path / "versions" / "v1" / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "practice": "question"}))
    run(tmp_path, faults, work)


def test_an_answer_asked_of_the_version_by_its_name_is_not_given_to_another(tmp_path: Path) -> None:
    async def work(operations: Operations) -> None:
        await operations.promote("v1")
        with pytest.raises(EngineBroken):
            await operations.answers.answer(QUESTION, ASKED, version="v1")

    run(tmp_path, {"v1": Fault.FAILS_AT_ONCE}, work)


def test_a_version_that_cannot_be_taken_back_is_said_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chat_app.baking_watch.RETRY_S", 0.05)

    async def work(operations: Operations) -> None:
        await ask(operations, 30)
        await operations.promote("v1")
        real = operations._store.record_promotion
        monkeypatch.setattr(operations._store, "record_promotion", None)  # nothing can be written down
        await ask(operations, 6)
        await until(lambda: "could not be taken back" in operations.status().watch)
        assert operations.answers.slot.version == operations.champion() == "v1"
        monkeypatch.setattr(operations._store, "record_promotion", real)
        await until(lambda: state_of(operations) == "taken back")
        assert operations.answers.slot.version == operations.champion() == "v0"

    run(tmp_path, {"v1": Fault.BREAKS_OFF}, work)


def test_the_command_tells_what_the_route_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chat_app.cli import app

    monkeypatch.setenv("ZLOOP_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ZLOOP_ENGINE", "scripted")
    told = CliRunner().invoke(app, ["baking"])
    assert told.exit_code == 0, told.output
    assert "No new champion is being watched." in told.output
    body = json.loads(CliRunner().invoke(app, ["baking", "--json"]).stdout)
    assert body["state"] == "none"
    assert (body["requests_wanted"], body["seconds_wanted"]) == (50, 60.0)
