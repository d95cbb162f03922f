"""Turns: what a stream leaves behind when it ends, is stopped or breaks, and two of them side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from chat_app.serving.engine import Chunk, EngineBroken, Sampling
from chat_app.serving.scripted_engine import ScriptedEngine
from chat_app.turns import TurnStream, merge
from feedback_store.records import Message

HELLO: list[Message] = [{"role": "user", "content": "Hello"}]


def turn(delay_s: float = 0.0, **sampling: object) -> TurnStream:
    return TurnStream(ScriptedEngine("v1", delay_s=delay_s), HELLO, Sampling(**sampling))  # type: ignore[arg-type]


class BreaksAfterTwo(ScriptedEngine):
    """Says two words, then its process is gone."""

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        yield Chunk("one ")
        yield Chunk("two ")
        raise EngineBroken("gone")


class Freezes(ScriptedEngine):
    """Never says anything; remembers that it was stopped."""

    stopped = False

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        try:
            await asyncio.sleep(60)
            yield Chunk("", "stop")
        finally:
            self.stopped = True


def test_a_complete_answer() -> None:
    async def run() -> None:
        answer = turn(delay_s=0.01, seed=4)
        said = "".join([chunk.text async for chunk in answer])
        candidate = answer.candidate()
        assert candidate.text == answer.text == said
        assert (candidate.version, candidate.seed, candidate.finish_reason) == ("v1", 4, "stop")
        assert candidate.sampling == Sampling(seed=4).as_record()
        assert candidate.candidate_id == answer.candidate_id
        assert candidate.created_at.utcoffset() is not None
        assert answer.usage is not None
        assert answer.first_token_ms is not None
        assert 10 <= answer.first_token_ms < candidate.latency_ms
        await answer.aclose()
        assert answer.finish_reason == "stop"

    asyncio.run(run())


def test_latency_is_read_from_the_clock() -> None:
    async def run() -> None:
        ticks = iter(range(100))
        answer = TurnStream(ScriptedEngine("v1"), HELLO, Sampling(max_tokens=3), clock=lambda: float(next(ticks)))
        async for _ in answer:
            pass
        assert answer.finish_reason == "length"
        assert answer.first_token_ms == 1000.0
        assert answer.gaps_s == [1.0, 1.0]
        assert answer.wrote_at == 3.0
        assert answer.candidate().latency_ms == 5000.0  # three words, the end, and the close

    asyncio.run(run())


def test_tokens_are_those_the_engine_counted_or_an_estimate() -> None:
    async def run() -> None:
        whole, left = turn(max_tokens=3), turn()
        async for _ in whole:
            pass
        assert whole.usage is not None
        assert whole.tokens == whole.usage.prompt_tokens + 3
        async with aclosing(left):
            async for _ in left:
                break
        assert left.tokens == sum(len(message["content"]) for message in HELLO) // 4 + 1

    asyncio.run(run())


def test_a_consumer_who_stops_leaves_a_cancelled_candidate() -> None:
    async def run() -> None:
        async with aclosing(turn()) as answer:
            async for _ in answer:
                break
        assert answer.candidate().finish_reason == "cancelled"
        assert answer.candidate().text == "This "
        assert answer.error is None

        frozen = Freezes("v1")
        waiting = TurnStream(frozen, HELLO, Sampling())
        task = asyncio.create_task(anext(aiter(waiting)))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert waiting.candidate().finish_reason == "cancelled"
        assert frozen.stopped

    asyncio.run(run())


def test_an_answer_nobody_waited_for_is_cancelled_and_empty() -> None:
    async def run() -> None:
        answer = turn()
        await answer.aclose()
        assert (answer.candidate().finish_reason, answer.candidate().text) == ("cancelled", "")

    asyncio.run(run())


def test_a_broken_stream_raises_and_leaves_an_error_candidate() -> None:
    async def run() -> None:
        answer = TurnStream(BreaksAfterTwo("v1"), HELLO, Sampling())
        with pytest.raises(EngineBroken, match="gone"):
            [chunk async for chunk in answer]
        assert (answer.candidate().finish_reason, answer.candidate().text) == ("error", "one two ")
        assert isinstance(answer.error, EngineBroken)

    asyncio.run(run())


def test_merge_follows_both_to_the_end() -> None:
    async def run() -> None:
        turns = [turn(delay_s=0.002, seed=1), turn(delay_s=0.003, seed=2)]
        latest = ["", ""]
        switches, previous = 0, 0
        async with aclosing(merge(turns)) as steps:
            async for index, text in steps:
                assert text.startswith(latest[index])
                latest[index] = text
                switches, previous = switches + (index != previous), index
        assert latest == [one.text for one in turns]
        assert [one.finish_reason for one in turns] == ["stop", "stop"]
        assert switches > 4

    asyncio.run(run())


def test_merge_ticks_where_nothing_happens() -> None:
    async def run() -> None:
        turns = [TurnStream(Freezes("v1"), HELLO, Sampling()) for _ in range(2)]
        began = time.monotonic()
        async with aclosing(merge(turns, tick_s=0.05)) as steps:
            assert [await anext(steps) for _ in range(3)] == [(0, "")] * 3
        assert 0.15 <= time.monotonic() - began < 10
        assert [one.finish_reason for one in turns] == ["cancelled", "cancelled"]

    asyncio.run(run())


def test_merge_goes_on_with_the_other_when_one_breaks() -> None:
    async def run() -> None:
        turns = [TurnStream(BreaksAfterTwo("v1"), HELLO, Sampling()), turn(delay_s=0.001, seed=2)]
        async with aclosing(merge(turns)) as steps:
            latest = {index: text async for index, text in steps}
        assert latest == {0: "one two ", 1: turns[1].text}
        assert [one.finish_reason for one in turns] == ["error", "stop"]

    asyncio.run(run())


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_stopping_a_merge_stops_the_engines(how: str) -> None:
    async def run() -> None:
        engines = [Freezes("v1"), Freezes("v2")]
        turns = [TurnStream(engine, HELLO, Sampling()) for engine in engines]

        async def consume() -> None:
            async with aclosing(merge(turns, tick_s=0.01)) as steps:
                async for _ in steps:
                    if how == "close":
                        return

        consumer = asyncio.create_task(consume())
        await asyncio.sleep(0.05)
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)
        assert [engine.stopped for engine in engines] == [True, True]
        assert [one.candidate().finish_reason for one in turns] == ["cancelled", "cancelled"]

    asyncio.run(run())


def test_merge_shows_our_own_bugs() -> None:
    class Buggy(ScriptedEngine):
        async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
            yield Chunk("x")
            raise ZeroDivisionError

    async def run() -> None:
        turns = [TurnStream(Buggy("v1"), HELLO, Sampling()), turn()]
        with pytest.raises(ZeroDivisionError):
            async for _ in merge(turns):
                pass
        assert turns[0].finish_reason == "error"

    asyncio.run(run())
