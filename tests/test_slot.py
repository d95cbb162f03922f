"""The slot: pins keep their engine, swaps lose nothing, a failed swap changes nothing, a dead engine comes back."""

from __future__ import annotations

import asyncio
import logging

import pytest

from chat_app.serving.engine import EngineBroken, EngineStartFailed, Sampling, ServedVersion
from chat_app.serving.scripted_engine import ScriptedEngine
from chat_app.serving.slot import ModelSlot
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


async def said(slot: ModelSlot, seed: int = 1) -> str:
    async with slot.pin() as engine:
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
