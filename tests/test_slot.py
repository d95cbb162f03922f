"""The slot: pins keep their engine, swaps lose nothing, a failed swap changes nothing, a dead engine comes back."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from chat_app.serving.engine import (
    Canary,
    EngineBroken,
    EngineBusy,
    EngineRefused,
    EngineStartFailed,
    NoRoom,
    Sampling,
    ServedVersion,
    VersionNotServed,
)
from chat_app.serving.scripted_engine import Fault, ScriptedEngine
from chat_app.serving.slot import QUEUE_LIMIT, ModelSlot
from feedback_store.records import Message

HELLO: list[Message] = [{"role": "user", "content": "Hello there"}]
V1, V2, V3 = ServedVersion("v1"), ServedVersion("v2"), ServedVersion("v3")


class Builder:
    """Builds scripted engines and keeps them all, so that a test can look at what became of them."""

    def __init__(self, delay_s: float = 0.0, build_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.build_s = build_s
        self.built: list[ScriptedEngine] = []
        self.fail = False

    async def __call__(self, served: ServedVersion) -> ScriptedEngine:
        await asyncio.sleep(self.build_s)
        if self.fail:
            raise EngineStartFailed("no more memory")
        self.built.append(ScriptedEngine(served.version, delay_s=self.delay_s))
        return self.built[-1]

    def alive(self) -> list[str]:
        return [engine.version for engine in self.built if engine.is_alive]


class Clock:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FailsItsCheck(ScriptedEngine):
    async def check(self) -> None:
        raise EngineStartFailed("gibberish")


async def said(slot: ModelSlot, seed: int = 1, version: str | None = None) -> str:
    async with slot.pin(version) as engine:
        return "".join([chunk.text async for chunk in engine.stream(HELLO, Sampling(seed=seed))])


async def settled(slot: ModelSlot) -> None:
    async with asyncio.timeout(5):
        while slot.draining:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_it_serves_what_it_was_started_with() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        assert not slot.is_ready
        with pytest.raises(EngineBroken, match="no model is being served"):
            await said(slot)
        await slot.start(V1)
        assert slot.is_ready
        assert slot.version == "v1"
        assert "v1" in await said(slot)
        with pytest.raises(EngineStartFailed, match="started before"):
            await slot.start(V2)
        await slot.close()
        assert build.alive() == []
        with pytest.raises(EngineBroken, match="no model is being served"):
            await said(slot)

    asyncio.run(run())


def test_streams_in_flight_finish_on_the_version_they_began_with() -> None:
    async def run() -> None:
        build = Builder(delay_s=0.005)
        slot = ModelSlot(build, keep_warm=False)
        await slot.start(V1)
        before = [asyncio.create_task(said(slot, seed)) for seed in range(8)]
        await asyncio.sleep(0.02)
        assert await slot.swap(V2) == "v1"
        assert slot.version == "v2"
        assert not any(task.done() for task in before)
        assert build.alive() == ["v1", "v2"]
        after = [asyncio.create_task(said(slot, seed)) for seed in range(8)]
        old, new = await asyncio.gather(*before), await asyncio.gather(*after)
        assert all("v1" in answer and "v2" not in answer for answer in old)
        assert all("v2" in answer and "v1" not in answer for answer in new)
        await settled(slot)
        assert build.alive() == ["v2"]
        await slot.close()

    asyncio.run(run())


def test_no_answer_is_lost_while_swaps_go_on() -> None:
    async def run() -> None:
        slot = ModelSlot(Builder(delay_s=0.0005, build_s=0.005))
        await slot.start(V1)
        versions: list[set[str]] = []

        async def chat(seed: int) -> None:
            for turn in range(10):
                answer = await said(slot, seed * 100 + turn)
                versions.append({name for name in ("v1", "v2", "v3") if name in answer})

        async def swaps() -> None:
            for served in (V2, V3, V1, V2, V3, V1):
                await slot.swap(served)

        await asyncio.gather(swaps(), *(chat(seed) for seed in range(6)))
        await settled(slot)
        assert len(versions) == 60
        assert all(len(names) == 1 for names in versions)
        assert len(set.union(*versions)) > 1
        await slot.close()

    asyncio.run(run())


def test_an_engine_pinned_twice_is_closed_after_the_second_stream_only() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build, keep_warm=False)
        await slot.start(V1)
        async with slot.pin() as first:
            async with slot.pin() as second:
                assert first is second
                await slot.swap(V2)
            await asyncio.sleep(0.01)
            assert first.is_alive
        await settled(slot)
        assert not first.is_alive
        await slot.close()

    asyncio.run(run())


def test_the_commit_runs_after_the_check_and_before_the_flip() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.start(V1)
        seen: list[tuple[str, list[str]]] = []

        async def commit() -> None:
            seen.append((slot.version, build.alive()))

        await slot.swap(V2, commit)
        assert seen == [("v1", ["v1", "v2"])]
        assert slot.version == "v2"
        await slot.close()

    asyncio.run(run())


@pytest.mark.parametrize("stage", ["build", "check", "commit"])
def test_whatever_fails_before_the_flip_leaves_the_old_engine_serving(stage: str) -> None:
    async def run() -> None:
        build = Builder()

        async def builder(served: ServedVersion) -> ScriptedEngine:
            if served == V2 and stage == "check":
                build.built.append(FailsItsCheck("v2"))
                return build.built[-1]
            return await build(served)

        async def commit() -> None:
            if stage == "commit":
                raise EngineStartFailed("the store is full")

        slot = ModelSlot(builder)
        await slot.start(V1)
        build.fail = stage == "build"
        async with slot.pin() as engine:
            with pytest.raises(EngineStartFailed):
                await slot.swap(V2, commit)
            assert slot.version == "v1"
            assert build.alive() == ["v1"]
            assert engine.is_alive
        assert "v1" in await said(slot)
        build.fail = False
        await slot.swap(V3)
        assert slot.version == "v3"
        await slot.close()

    asyncio.run(run())


def test_concurrent_swaps_run_one_after_the_other() -> None:
    async def run() -> None:
        build = Builder(build_s=0.01)
        slot = ModelSlot(build, keep_warm=False)
        await slot.start(V1)
        before = await asyncio.gather(slot.swap(V2), slot.swap(V3), slot.swap(V1))
        assert before == ["v1", "v2", "v3"]
        assert slot.version == "v1"
        await settled(slot)
        assert build.alive() == ["v1"]
        await slot.close()

    asyncio.run(run())


def test_a_swap_to_the_version_already_served_does_nothing() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.start(V1)

        async def commit() -> None:
            raise AssertionError("nothing to commit")

        assert await slot.swap(V1, commit) == "v1"
        assert len(build.built) == 1
        await build.built[0].close()
        assert await slot.swap(V1) == "v1"
        assert len(build.built) == 2
        assert slot.is_ready
        await slot.close()

    asyncio.run(run())


def test_a_cancelled_caller_does_not_tear_a_swap() -> None:
    async def run() -> None:
        slot = ModelSlot(Builder(build_s=0.02))
        await slot.start(V1)
        committed: list[str] = []

        async def commit() -> None:
            await asyncio.sleep(0.01)
            committed.append("v2")

        caller = asyncio.create_task(slot.swap(V2, commit))
        await asyncio.sleep(0.005)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        assert slot.version == "v1"
        await asyncio.sleep(0.1)
        assert committed == ["v2"]
        assert slot.version == "v2"
        await slot.close()

    asyncio.run(run())


def test_a_dead_engine_is_built_again_once_for_all_who_wait(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        build = Builder(build_s=0.02)
        slot = ModelSlot(build)
        await slot.start(V1)
        await build.built[0].close()
        assert not slot.is_ready
        answers = await asyncio.gather(*(said(slot, seed) for seed in range(5)))
        assert all("v1" in answer for answer in answers)
        assert len(build.built) == 2
        await slot.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == ["The engine of v1 died; starting it again."]


def test_a_rebuild_that_fails_is_told_to_all_who_wait_and_tried_again_later() -> None:
    async def run() -> None:
        build = Builder(build_s=0.02)
        clock = Clock()
        slot = ModelSlot(build, clock=clock)
        await slot.start(V1)
        await build.built[0].close()
        build.fail = True
        results = await asyncio.gather(*(said(slot) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, EngineStartFailed) for result in results)
        build.fail = False
        clock.now += 1
        assert "v1" in await said(slot)
        await slot.close()

    asyncio.run(run())


def test_a_dead_engine_does_not_stand_in_the_way_of_a_swap() -> None:
    async def run() -> None:
        build = Builder(build_s=0.01)
        slot = ModelSlot(build)
        await slot.start(V1)
        await build.built[0].close()
        _, answer = await asyncio.gather(slot.swap(V2), said(slot))
        assert "v2" in answer
        assert [engine.version for engine in build.built] == ["v1", "v2"]
        await slot.close()

    asyncio.run(run())


def test_an_old_engine_is_closed_when_its_streams_take_too_long(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        slot = ModelSlot(Builder(delay_s=0.05), drain_s=0.1, keep_warm=False)
        await slot.start(V1)
        slow = asyncio.create_task(said(slot))
        await asyncio.sleep(0.02)
        await slot.swap(V2)
        with pytest.raises(EngineBroken, match="closed"):
            await slow
        assert "v2" in await said(slot)
        await slot.close()

    asyncio.run(run())
    assert "the limit of 0.1 s is over" in caplog.text


def test_closing_right_after_a_swap_closes_both_engines() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.start(V1)

        async def commit() -> None:
            closing.append(asyncio.create_task(slot.close()))

        closing: list[asyncio.Task[None]] = []
        await slot.swap(V2, commit)
        await asyncio.gather(*closing)
        assert build.alive() == []
        with pytest.raises(EngineStartFailed):
            await slot.start(V3)

    asyncio.run(run())


def test_closing_does_not_wait_for_streams() -> None:
    async def run() -> None:
        build = Builder(delay_s=0.2)
        slot = ModelSlot(build)
        await slot.start(V1)
        streams = [asyncio.create_task(said(slot))]
        await asyncio.sleep(0.01)
        await slot.swap(V2)
        streams.append(asyncio.create_task(said(slot)))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(2):  # an answer takes longer
            await slot.close()
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(result, EngineBroken) for result in results)
        assert build.alive() == []

    asyncio.run(run())


# --- the version before, and versions beside -------------------------------------------------------------------------


def test_going_back_is_a_flip_to_the_engine_that_stayed_warm() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.start(V1)
        await slot.swap(V2)
        assert slot.versions == ("v2", "v1")
        assert build.alive() == ["v1", "v2"]
        await slot.swap(V1)
        assert slot.versions == ("v1", "v2")
        assert len(build.built) == 2
        assert "v1" in await said(slot)
        await slot.close()
        assert build.alive() == []

    asyncio.run(run())


def test_only_one_stays_warm_and_the_older_one_goes_after_its_streams() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.start(V1)
        async with slot.pin() as first:
            await slot.swap(V2)
            await slot.swap(V3)
            assert slot.versions == ("v3", "v2")
            assert slot.draining == 1
            assert first.is_alive
        await settled(slot)
        assert build.alive() == ["v2", "v3"]
        await slot.close()

    asyncio.run(run())


@pytest.mark.parametrize("what", ["dead", "silent", "other files"])
def test_a_warm_engine_that_cannot_answer_as_that_version_is_not_flipped_to(what: str) -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.start(V1)
        await slot.swap(V2)
        if what == "dead":
            await build.built[0].close()
            assert slot.versions == ("v2",)
        elif what == "silent":
            build.built[0]._fault = Fault.FAILS_ITS_CHECK
        await slot.swap(V1 if what != "other files" else replace(V1, canaries=(Canary(tuple(HELLO), "This is v1"),)))
        assert [engine.version for engine in build.built] == ["v1", "v2", "v1"]
        await settled(slot)
        assert sorted(build.alive()) == ["v1", "v2"]
        assert build.built[2].is_alive
        await slot.close()

    asyncio.run(run())


def test_versions_are_served_beside_each_other_and_released() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.start(V1)
        with pytest.raises(VersionNotServed, match="v2 is not being served; these are: v1"):
            await said(slot, version="v2")
        await slot.serve_beside(V2)
        await slot.serve_beside(V2)
        await slot.serve_beside(V1)
        assert slot.versions == ("v1", "v2")
        first, second, third = await asyncio.gather(said(slot), said(slot, version="v2"), said(slot, version="v1"))
        assert "v1" in first
        assert "v2" in second
        assert third == first
        with pytest.raises(EngineRefused, match="champion"):
            await slot.release("v1")
        await slot.release("v2")
        with pytest.raises(VersionNotServed):
            await slot.release("v2")
        await settled(slot)
        assert build.alive() == ["v1"]
        await slot.close()

    asyncio.run(run())


def test_a_challenger_becomes_the_champion_without_a_new_engine_and_others_stay_beside() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.start(V1)
        await slot.serve_beside(V2)
        await slot.serve_beside(V3)
        assert await slot.swap(V2) == "v1"
        assert slot.versions == ("v2", "v3", "v1")
        await slot.swap(V3)
        assert slot.versions == ("v3", "v2")
        assert len(build.built) == 3
        await slot.serve_beside(V2)  # no longer only warm: it stays beside the next swap too
        await slot.swap(V1)
        assert set(slot.versions) == {"v1", "v2", "v3"}
        await slot.close()

    asyncio.run(run())


def test_a_dead_challenger_is_started_again_when_it_is_asked_for() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.start(V1)
        await slot.serve_beside(V2)
        await build.built[1].close()
        assert "v2" in await said(slot, version="v2")
        assert [engine.version for engine in build.built] == ["v1", "v2", "v2"]
        await slot.close()

    asyncio.run(run())


# --- no room for two -------------------------------------------------------------------------------------------------


class SmallHouse(Builder):
    """Room for `rooms` engines that live at once."""

    def __init__(self, rooms: int, delay_s: float = 0.0) -> None:
        super().__init__(delay_s=delay_s)
        self.rooms = rooms
        self.broken: set[str] = set()

    async def __call__(self, served: ServedVersion) -> ScriptedEngine:
        if len(self.alive()) >= self.rooms:
            raise NoRoom(f"{served.version} needs 4 GiB, 1 GiB is free")
        if served.version in self.broken:
            raise EngineStartFailed("broken")
        return await super().__call__(served)


def test_without_room_a_swap_is_refused_and_the_old_engine_serves_on() -> None:
    async def run() -> None:
        build = SmallHouse(rooms=1)
        slot = ModelSlot(build)
        await slot.start(V1)
        with pytest.raises(NoRoom, match="needs 4 GiB"):
            await slot.swap(V2)
        assert "v1" in await said(slot)
        await slot.close()

    asyncio.run(run())


def test_a_warm_engine_makes_room_before_anybody_is_asked_to_wait() -> None:
    async def run() -> None:
        build = SmallHouse(rooms=2)
        slot = ModelSlot(build)
        await slot.start(V1)
        await slot.swap(V2)
        await slot.swap(V3)
        assert build.alive() == ["v2", "v3"]
        await slot.close()

    asyncio.run(run())


def test_in_a_maintenance_swap_answers_wait_and_none_is_lost() -> None:
    async def run() -> None:
        build = SmallHouse(rooms=1, delay_s=0.002)
        slot = ModelSlot(build)
        await slot.start(V1)
        running = asyncio.create_task(said(slot))
        await asyncio.sleep(0.01)
        swap = asyncio.create_task(slot.swap(V2, maintenance=True))
        while slot.problem is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert slot.problem == "Switching to v2: new answers wait until it is ready."
        waiting = [asyncio.create_task(said(slot)) for _ in range(QUEUE_LIMIT)]
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match=f"{QUEUE_LIMIT} answers wait already") as caught:
            await said(slot)
        assert caught.value.retry_after_s > 0
        waiting.pop().cancel()
        assert await swap == "v1"
        assert "v1" in await running
        assert all("v2" in answer for answer in await asyncio.gather(*waiting))
        assert (slot.problem, slot.versions, build.alive()) == (None, ("v2",), ["v2"])
        await slot.close()

    asyncio.run(run())


@pytest.mark.parametrize("stage", ["start", "commit"])
def test_a_maintenance_swap_that_fails_brings_the_old_version_back(stage: str) -> None:
    async def run() -> None:
        build = SmallHouse(rooms=1, delay_s=0.001)
        slot = ModelSlot(build)
        await slot.start(V1)
        build.broken = {"v2"} if stage == "start" else set()
        running = asyncio.create_task(said(slot))
        await asyncio.sleep(0.005)

        async def commit() -> None:
            raise EngineStartFailed("the store is full")

        swap = asyncio.create_task(slot.swap(V2, commit, maintenance=True))
        while slot.problem is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        waiting = [asyncio.create_task(said(slot)) for _ in range(5)]
        with pytest.raises(EngineStartFailed, match="broken" if stage == "start" else "the store is full"):
            await swap
        assert all("v1" in answer for answer in [await running, *await asyncio.gather(*waiting)])
        assert build.alive() == ["v1"]
        await slot.close()

    asyncio.run(run())


def test_a_maintenance_swap_that_leaves_nothing_is_mended_by_the_next_answer() -> None:
    async def run() -> None:
        build = SmallHouse(rooms=1)
        clock = Clock()
        slot = ModelSlot(build, clock=clock)
        await slot.start(V1)
        build.broken = {"v1", "v2"}
        with pytest.raises(EngineStartFailed, match="broken"):
            await slot.swap(V2, maintenance=True)
        with pytest.raises(EngineBusy, match="broken"):
            await said(slot)
        build.broken = set()
        clock.now += 1
        assert "v1" in await said(slot)
        await slot.close()

    asyncio.run(run())


def test_closing_in_the_middle_of_a_maintenance_swap_does_not_wait() -> None:
    async def run() -> None:
        build = SmallHouse(rooms=1, delay_s=0.05)
        slot = ModelSlot(build)
        await slot.start(V1)
        running = asyncio.create_task(said(slot))
        await asyncio.sleep(0.01)
        swap = asyncio.create_task(slot.swap(V2, maintenance=True))
        while slot.problem is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        waiting = asyncio.create_task(said(slot))
        await asyncio.sleep(0)
        async with asyncio.timeout(3):
            await slot.close()
        results = await asyncio.gather(running, swap, waiting, return_exceptions=True)
        assert all(isinstance(result, (EngineBroken, EngineStartFailed)) for result in results)
        assert build.alive() == []

    asyncio.run(run())


# --- engines that keep dying -----------------------------------------------------------------------------------------


def test_an_engine_that_keeps_dying_is_started_again_with_growing_pauses() -> None:
    async def run() -> None:
        build, clock = Builder(), Clock()
        slot = ModelSlot(build, clock=clock)
        await slot.start(V1)
        pauses = []
        for _ in range(8):
            await build.built[-1].close()
            if pauses:
                with pytest.raises(EngineBusy, match="started again in") as caught:
                    await said(slot)
                pauses.append(caught.value.retry_after_s)
                clock.now += caught.value.retry_after_s
            else:
                pauses.append(0)
            assert (slot.problem is not None) == (len(pauses) > 5)
            assert "v1" in await said(slot)
            assert slot.problem is None
        assert pauses == [0, 1, 2, 4, 8, 16, 32, 60]
        clock.now += 60
        await build.built[-1].close()
        assert "v1" in await said(slot)  # it had lived for a minute: at once
        await slot.close()

    asyncio.run(run())


def test_after_five_tries_that_failed_the_slot_says_so_and_still_tries() -> None:
    async def run() -> None:
        build, clock = Builder(), Clock()
        slot = ModelSlot(build, clock=clock)
        await slot.start(V1)
        await build.built[0].close()
        build.fail = True
        for tries in range(1, 6):
            assert slot.problem is None
            with pytest.raises(EngineStartFailed, match="no more memory"):
                await said(slot)
            with pytest.raises(EngineBusy, match="no more memory"):
                await said(slot)
            clock.now += 2 ** (tries - 1)
        assert slot.problem is not None
        assert "5 tries" in slot.problem
        build.fail = False
        assert "v1" in await said(slot)
        assert slot.problem is None
        await slot.close()

    asyncio.run(run())
