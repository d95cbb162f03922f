"""A pause: every engine ends, who asks is told when to come back, and everything that was served comes back."""

from __future__ import annotations

import asyncio

import pytest
from test_slot import V1, V2, V3, Builder, Clock, said

from chat_app.serving.engine import EngineBusy
from chat_app.serving.slot import ModelSlot

WHY = "The model is learning"


def test_a_pause_waits_for_streams_ends_every_engine_and_resume_brings_all_back() -> None:
    async def run() -> None:
        build, clock = Builder(delay_s=0.005), Clock()
        slot = ModelSlot(build, clock=clock)
        await slot.start(V1)
        await slot.swap(V2)  # v1 stays warm
        await slot.serve_beside(V3)
        talking = asyncio.create_task(said(slot))
        await asyncio.sleep(0.02)
        pausing = asyncio.create_task(slot.pause(WHY, 120))
        await asyncio.sleep(0.01)
        assert not talking.done()
        with pytest.raises(EngineBusy, match="learning") as refused:
            await said(slot)
        assert refused.value.retry_after_s == 120
        await pausing
        assert "v2" in await talking, "a stream that had begun was broken"
        assert build.alive() == []
        assert (slot.is_paused, slot.is_ready) == (True, False)
        assert slot.problem == f"{WHY}: chat comes back by itself, in about 2 min."
        clock.now += 1000
        with pytest.raises(EngineBusy, match="comes back by itself, soon") as refused:
            await said(slot, version="v3")
        assert refused.value.retry_after_s == 10
        for change in (slot.swap(V1), slot.serve_beside(V1)):
            with pytest.raises(EngineBusy, match="learning"):
                await change
        await slot.resume()
        assert build.alive() == ["v2", "v3"]
        assert (slot.version, slot.problem) == ("v2", None)
        assert "v2" in await said(slot)
        assert "v3" in await said(slot, version="v3")
        await slot.close()
        assert build.alive() == []

    asyncio.run(run())


def test_a_pause_before_the_start_keeps_the_slot_empty() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.pause(WHY, 60)
        await slot.pause(WHY, 60)
        with pytest.raises(EngineBusy, match="learning"):
            await slot.start(V1)
        with pytest.raises(EngineBusy, match="learning"):
            await said(slot)
        await slot.resume()
        await slot.resume()
        assert not slot.has_started
        await slot.start(V1)
        assert "v1" in await said(slot)
        await slot.close()

    asyncio.run(run())


def test_what_cannot_start_after_a_pause_is_tried_by_the_next_who_asks() -> None:
    async def run() -> None:
        build, clock = Builder(), Clock()
        slot = ModelSlot(build, clock=clock)
        await slot.start(V1)
        await slot.pause(WHY, 60)
        build.fail = True
        await slot.resume()
        assert not slot.is_paused
        assert not slot.is_ready
        build.fail = False
        clock.now += 1000
        assert "v1" in await said(slot)
        await slot.close()

    asyncio.run(run())


def test_closing_within_a_pause_starts_nothing_again() -> None:
    async def run() -> None:
        build = Builder()
        slot = ModelSlot(build)
        await slot.start(V1)
        await slot.pause(WHY, 60)
        await slot.close()
        await slot.resume()
        assert build.alive() == []

    asyncio.run(run())


def test_a_dead_engine_is_not_started_again_within_a_pause() -> None:
    async def run() -> None:
        build = Builder(build_s=0.05)
        slot = ModelSlot(build)
        await slot.start(V1)
        await build.built[0].close()
        asking = asyncio.create_task(said(slot))
        await asyncio.sleep(0)
        await slot.pause(WHY, 60)
        await asyncio.gather(asking, return_exceptions=True)
        assert build.alive() == []
        await slot.resume()
        assert build.alive() == ["v1"]
        await slot.close()

    asyncio.run(run())
