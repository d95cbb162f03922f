"""Many swaps under many streams: none failed, mixed, mislabelled, doubled or cut, and nothing left behind.

The scripted engine here; `scripts/soak_swaps.py` does the same to the native engine over HTTP.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count

import pytest

from chat_app.serving import verification
from chat_app.serving.engine import Chunk, EngineError, EngineStartFailed, NoRoom, Sampling, ServedVersion
from chat_app.serving.scripted_engine import Fault, ScriptedEngine, build_scripted_engine
from chat_app.serving.slot import ModelSlot
from feedback_store.records import Message

SWAPS, STREAMS, TIMES = 200, 32, 10
HELLO: list[Message] = [{"role": "user", "content": "Hello there"}]


async def listen(slot: ModelSlot, heard: list[Chunk]) -> None:
    """Follow one answer; what came stays in `heard`, however it ends."""
    async with slot.pin() as engine:
        async for chunk in engine.stream(HELLO, Sampling()):
            heard.append(chunk)  # noqa: PERF401 (what came before an error counts)


async def answers_while(slot: ModelSlot, work: Callable[[], Awaitable[None]], streams: int = STREAMS) -> Counter[str]:
    """Ask in `streams` loops while `work` goes on; every answer is compared with what its version says. By version."""
    written: Counter[str] = Counter()
    seeds, over = count(1), asyncio.Event()

    async def ask() -> None:
        while not over.is_set():
            sampling = Sampling(seed=next(seeds))
            async with slot.pin() as engine:
                version = engine.version
                chunks = [chunk async for chunk in engine.stream(HELLO, sampling)]
            assert chunks == [chunk async for chunk in ScriptedEngine(version).stream(HELLO, sampling)]
            written[version] += 1

    async def all_of_it() -> None:
        try:
            await work()
        finally:
            over.set()

    await asyncio.gather(all_of_it(), *(ask() for _ in range(streams)))
    return written


class Engines:
    """Builds scripted engines and counts those that are open."""

    def __init__(self, **settings: object) -> None:
        self._build = partial(build_scripted_engine, **settings)  # type: ignore[arg-type]
        self._made: list[ScriptedEngine] = []

    async def __call__(self, served: ServedVersion) -> ScriptedEngine:
        await asyncio.sleep(0.001)
        self._made = [engine for engine in self._made if engine.is_alive]
        self._made.append(await self._build(served))
        return self._made[-1]

    @property
    def open(self) -> int:
        return sum(engine.is_alive for engine in self._made)


async def drained(slot: ModelSlot) -> None:
    async with asyncio.timeout(10):
        while slot.draining:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH112, PTH208


def test_200_swaps_under_32_streams_lose_nothing_and_leave_nothing() -> None:
    async def run() -> None:
        engines = Engines(delay_s=0.001)
        slot = ModelSlot(engines)
        await slot.start(ServedVersion("v0"))
        before = len(asyncio.all_tasks()), open_files()

        async def swaps() -> None:
            for number in range(1, SWAPS + 1):
                assert await slot.swap(ServedVersion(f"v{number}")) == f"v{number - 1}"
                await asyncio.sleep(0.002)
                assert slot.draining <= 8

        written = await answers_while(slot, swaps)
        assert slot.version == f"v{SWAPS}"
        assert len(written) > SWAPS / 2
        await drained(slot)
        gc.collect()
        assert engines.open == 2  # the champion, and the one before it, warm
        assert (len(asyncio.all_tasks()), open_files()) == before
        assert sum(type(thing) is ScriptedEngine for thing in gc.get_objects()) < 10
        await slot.close()
        assert engines.open == 0

    asyncio.run(run())


def test_going_back_and_forth_builds_no_engine() -> None:
    async def run() -> None:
        engines = Engines(delay_s=0.001)
        slot = ModelSlot(engines)
        await slot.start(ServedVersion("v1"))

        async def swaps() -> None:
            for _ in range(SWAPS // 2):
                await slot.swap(ServedVersion("v2"))
                await slot.swap(ServedVersion("v1"))

        written = await answers_while(slot, swaps, streams=8)
        assert set(written) == {"v1", "v2"}
        assert engines.open == 2
        assert len(engines._made) == 2
        await slot.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        (Fault.FAILS_TO_START, EngineStartFailed, "told to fail"),
        (Fault.FAILS_ITS_CHECK, EngineStartFailed, "does not name its version"),
        (Fault.NO_ROOM, NoRoom, "no room"),
        (Fault.HANGS_IN_START, EngineStartFailed, "not ready after"),
        (None, EngineStartFailed, "not ready after"),
    ],
)
def test_a_swap_that_fails_is_noticed_by_no_stream(
    fault: Fault | None, error: type[EngineError], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "CANCEL_GRACE_S", 0.02)
    comes_back = asyncio.Event()

    async def hang(_: ServedVersion) -> ScriptedEngine:
        while not comes_back.is_set():
            try:
                await comes_back.wait()
            except asyncio.CancelledError:
                continue
        raise EngineStartFailed("too late")

    async def run() -> None:
        engines = Engines(delay_s=0.001, faults={"v2": fault} if fault else {})

        async def build(served: ServedVersion) -> ScriptedEngine:
            stubborn = fault is None and served.version == "v2"  # it hangs, and does not obey a cancellation
            return await (hang(served) if stubborn else engines(served))

        slot = ModelSlot(build, build_limit_s=0.05)
        await slot.start(ServedVersion("v1"))

        async def swaps() -> None:
            for _ in range(TIMES):
                with pytest.raises(error, match=sentence):
                    await slot.swap(ServedVersion("v2"))

        written = await answers_while(slot, swaps, streams=8)
        assert set(written) == {"v1"}
        assert engines.open == 1
        comes_back.set()
        await slot.close()

    asyncio.run(run())


@pytest.mark.parametrize("fault", [Fault.DIES, Fault.BREAKS_OFF])
def test_a_stream_that_breaks_is_told_apart_from_one_that_ends(fault: Fault) -> None:
    async def run() -> None:
        slot = ModelSlot(Engines(faults={"v1": fault}))
        await slot.start(ServedVersion("v1"))
        chunks: list[Chunk] = []
        with pytest.raises(EngineError):
            await listen(slot, chunks)
        assert chunks
        assert all(chunk.finish_reason is None for chunk in chunks)
        await slot.swap(ServedVersion("v2"))
        async with slot.pin() as engine:
            assert [chunk async for chunk in engine.stream(HELLO, Sampling())][-1].finish_reason == "stop"
        await slot.close()

    asyncio.run(run())


def test_a_stalled_stream_is_cut_at_the_drain_deadline_and_never_complete() -> None:
    async def run() -> None:
        slot = ModelSlot(Engines(faults={"v1": Fault.STALLS}), drain_s=0.1, keep_warm=False)
        await slot.start(ServedVersion("v1"))
        chunks: list[Chunk] = []

        listening = asyncio.create_task(listen(slot, chunks))
        await asyncio.sleep(0.01)
        await slot.swap(ServedVersion("v2"))
        with pytest.raises(EngineError, match="closed before the answer was complete"):
            await listening
        assert chunks[-1].finish_reason is None
        await slot.close()

    asyncio.run(run())
