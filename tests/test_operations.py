"""The operations behind buttons, commands and routes, on the real store, slot and trainer with the scripted engine."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chat_app.__main__ import open_store
from chat_app.answers import Comparison
from chat_app.operations import Operations, Refused
from chat_app.serving.engine import EngineBroken, EngineError, ServedVersion
from chat_app.serving.scripted_engine import ScriptedEngine, build_scripted_engine
from chat_app.serving.slot import ModelSlot
from chat_app.settings import Settings, load_settings
from chat_app.trainer_room import TrainerRoom
from feedback_store.errors import NotFound
from feedback_store.records import PickChoice
from feedback_store.store import FeedbackStore
from trainer import schedule
from trainer.errors import VersionNotFound


@contextmanager
def house(tmp_path: Path, delay_s: float = 0.0, **settings: object) -> Iterator[tuple[Operations, FeedbackStore]]:
    """The operations on a fresh data directory; the trainer's thread is not started, so a run stays queued."""
    values = {f"ZLOOP_{name.upper()}": str(value) for name, value in settings.items()}
    chosen: Settings = load_settings({"ZLOOP_DATA_DIR": str(tmp_path), "ZLOOP_ENGINE": "scripted", **values})
    with open_store(chosen) as store:
        slot = ModelSlot(partial(build_scripted_engine, delay_s=delay_s))
        yield Operations(chosen, store, TrainerRoom(chosen, store), slot, schedule.is_due), store


def served(operations: Operations, work: Callable[[], Awaitable[Any]]) -> Any:
    """Run `work` while the champion is being served."""

    async def all_of_it() -> Any:
        await operations.start_serving()
        try:
            return await work()
        finally:
            await operations.close()

    return asyncio.run(all_of_it())


async def last(comparisons: Any) -> Comparison:
    newest = None
    async with aclosing(comparisons) as growing:
        async for comparison in growing:
            newest = comparison
    assert newest is not None
    return newest


def test_a_turn_is_stored_with_its_answer_and_the_next_one_sees_it(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):

        async def talk() -> str:
            first = operations.begin_turn(None, "Hello there")
            async with aclosing(operations.reply(first)) as growing:
                async for _ in growing:
                    pass
            second = operations.begin_turn(first.conversation_id, "And then?")
            async with aclosing(operations.reply(second)) as growing:
                async for _ in growing:
                    pass
            return first.conversation_id

        conversation_id = served(operations, talk)
        conversation, turns = store.load_conversation(conversation_id)
        assert conversation.title == "Hello there"
        assert [turn.text for turn in turns] == ["Hello there", "And then?"]
        assert all(turn.answer is not None and turn.answer.finish_reason == "stop" for turn in turns)


def test_conversations_survive_a_restart(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, _):

        async def talk() -> Any:
            turn = operations.begin_turn(None, "Remember me")
            pair = (await last(operations.compare(turn))).pair
            return turn, pair

        turn, pair = served(operations, talk)
    with house(tmp_path) as (operations, _):
        assert [one.title for one in operations.conversations()] == ["Remember me"]
        assert operations.waiting_pair(turn) == pair
        operations.record_pick(pair.pair_id, PickChoice.FIRST)
    with house(tmp_path) as (operations, _):
        (remembered,) = operations.turns(turn.conversation_id)
        assert remembered.answer == pair.first


def test_leaving_early_keeps_what_was_written_as_cancelled(tmp_path: Path) -> None:
    with house(tmp_path, delay_s=0.01) as (operations, store):

        async def leave() -> str:
            turn = operations.begin_turn(None, "A long story")
            async with aclosing(operations.reply(turn)) as growing:
                async for answer in growing:
                    if len(answer.text) > 20:
                        break
            await operations.answers.settled()
            return turn.conversation_id

        answer = store.load_conversation(served(operations, leave))[1][0].answer
        assert answer is not None
        assert answer.finish_reason == "cancelled"
        assert len(answer.text) > 20


def test_stop_ends_one_answer_and_keeps_what_was_written(tmp_path: Path) -> None:
    with house(tmp_path, delay_s=0.02) as (operations, store):

        async def stop() -> str:
            turn = operations.begin_turn(None, "A long story")
            operations.answers.stop(turn.turn_id)  # nothing grows yet: this does nothing
            async with aclosing(operations.reply(turn)) as growing:
                async for answer in growing:
                    if answer.text:
                        operations.answers.stop(turn.turn_id)
            return turn.conversation_id

        answer = store.load_conversation(served(operations, stop))[1][0].answer
        assert answer is not None
        assert answer.finish_reason == "cancelled"


def test_stop_ends_both_answers_of_a_comparison(tmp_path: Path) -> None:
    with house(tmp_path, delay_s=0.02) as (operations, store):

        async def stop() -> Comparison:
            turn = operations.begin_turn(None, "Which one?")
            newest = None
            async with aclosing(operations.compare(turn)) as growing:
                async for comparison in growing:
                    newest = comparison
                    operations.answers.stop(turn.turn_id)
            assert newest is not None
            return newest

        assert served(operations, stop).pair is None
        assert store.counts().pairs == 0


def test_a_picked_answer_goes_on_and_teaches(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):

        async def compare() -> Any:
            turn = operations.begin_turn(None, "Which one?")
            comparison = await last(operations.compare(turn))
            assert operations.waiting_pair(turn) == comparison.pair
            return turn, comparison.pair

        turn, pair = served(operations, compare)
        outcome = operations.record_pick(pair.pair_id, PickChoice.SECOND)
        assert outcome.versions == ("v0", "v0")
        assert "1 of 50 until the next retrain" in outcome.sentence
        assert operations.waiting_pair(turn) is None
        answer = store.load_conversation(turn.conversation_id)[1][0].answer
        assert answer is not None
        assert answer.candidate_id == pair.second.candidate_id
        assert [one.preference_id for one in store.preferences()] == [outcome.preference_id]


def test_a_pair_left_early_is_no_pair(tmp_path: Path) -> None:
    with house(tmp_path, delay_s=0.01) as (operations, store):

        async def leave() -> None:
            turn = operations.begin_turn(None, "Which one?")
            async with aclosing(operations.compare(turn)) as growing:
                async for comparison in growing:
                    if comparison.first.text and comparison.second.text:
                        break
            await operations.answers.settled()
            assert operations.waiting_pair(turn) is None

        served(operations, leave)
        assert store.counts().pairs == 0


def test_the_picks_that_make_a_retrain_due_start_one_and_only_one(tmp_path: Path) -> None:
    with house(tmp_path, retrain_every=3) as (operations, _):

        async def five() -> list[Any]:
            pairs = []
            for number in range(5):
                turn = operations.begin_turn(None, f"Question {number}")  # none of these prompts is held out
                pairs.append((await last(operations.compare(turn))).pair)
            return pairs

        outcomes = [operations.record_pick(pair.pair_id, PickChoice.FIRST) for pair in served(operations, five)]
        assert [outcome.run_started is not None for outcome in outcomes] == [False, False, True, False, False]
        assert "It has started" in outcomes[2].sentence
        assert [outcome.new_preferences for outcome in outcomes] == [1, 2, 3, 1, 2]
        assert len(operations.runs()) == 1


def test_a_pick_of_no_pair_is_refused(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, _), pytest.raises(NotFound):
        operations.record_pick("pair_none", PickChoice.FIRST)


def test_practice_stays_apart_from_real_preferences(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):
        body = operations.start_run(practice_taste="shorter").as_body()
        assert (body["practice"], body["recipe"]) == ("shorter", "practice")
        assert store.preferences() == []
        assert store.counts().practice["shorter"] > 80
        assert list(operations.data.export_lines("trl")) == []
        assert operations.status().new_preferences == 0


def test_a_run_says_how_it_is_started(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, _):
        run = operations.start_run(practice_taste="shorter", num_processes=2)
        command = operations.command(run.run_id)
        assert command["directory"] == str(tmp_path / "runs" / run.run_id)
        assert command["lines"][0].endswith(f"-m trainer.job {command['directory']}")
        assert "distributed_type: MULTI_GPU\n" in command["accelerate"]
        assert "use_cpu: true\n" in command["accelerate"]


def test_promoting_what_is_not_there_changes_nothing(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):

        async def promote() -> None:
            with pytest.raises(VersionNotFound):
                await operations.promote("v7")
            with pytest.raises(Refused, match="champion already"):
                await operations.promote("v0")
            with pytest.raises(Refused, match="nothing to roll back"):
                await operations.rollback()

        served(operations, promote)
        assert store.load_promotions() == []


def test_a_champion_that_cannot_be_loaded_is_said_and_the_base_answers(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):
        store.record_promotion("v3", kind="promote", reason="", by="local")

        async def look() -> Any:
            return operations.status()

        status = served(operations, look)
        assert (status.champion, status.serving) == ("v3", "v0")
        assert status.problem is not None
        assert "v3" in status.problem


def test_a_base_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    async def build(_: ServedVersion) -> ScriptedEngine:
        raise EngineError("no model today")

    settings = load_settings({"ZLOOP_DATA_DIR": str(tmp_path)})
    with open_store(settings) as store:
        operations = Operations(settings, store, TrainerRoom(settings, store), ModelSlot(build), schedule.is_due)
        with pytest.raises(EngineError, match="no model today"):
            served(operations, operations.answers.settled)


def test_without_a_server_nothing_answers(tmp_path: Path) -> None:
    settings = load_settings({"ZLOOP_DATA_DIR": str(tmp_path)})
    with open_store(settings) as store:
        operations = Operations(settings, store, TrainerRoom(settings, store), None, schedule.is_due)
        with pytest.raises(EngineBroken, match="make run"):
            operations.require_served("champion")
