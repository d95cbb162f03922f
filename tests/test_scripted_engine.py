"""The engine without a model: deterministic, seeds differ, ends as a real one does."""

from __future__ import annotations

import asyncio
import time

import pytest

from chat_app.serving.engine import Chunk, EngineBroken, Sampling, ServedVersion
from chat_app.serving.scripted_engine import ScriptedEngine, build_scripted_engine
from feedback_store.records import Message

HELLO: list[Message] = [{"role": "user", "content": "What can I cook with rice?"}]


def chunks(version: str = "v1", messages: list[Message] = HELLO, **sampling: object) -> list[Chunk]:
    async def collect() -> list[Chunk]:
        engine = await build_scripted_engine(ServedVersion(version))
        return [chunk async for chunk in engine.stream(messages, Sampling(**sampling))]  # type: ignore[arg-type]

    return asyncio.run(collect())


def text(version: str = "v1", messages: list[Message] = HELLO, **sampling: object) -> str:
    return "".join(chunk.text for chunk in chunks(version, messages, **sampling))


def test_the_same_inputs_give_the_same_answer() -> None:
    assert text(seed=3) == text(seed=3)
    assert text() == text()


def test_version_seed_and_messages_all_matter() -> None:
    assert text("v1", seed=1) != text("v2", seed=1)
    assert text(seed=1) != text(messages=[{"role": "user", "content": "And with beans?"}], seed=1)
    assert "v2" in text("v2")


def test_two_seeds_never_give_the_same_answer() -> None:
    assert len({text(seed=seed) for seed in range(300)}) == 300


def test_only_the_last_chunk_has_a_finish_reason_and_the_usage() -> None:
    *body, last = chunks(seed=1)
    assert all(chunk.finish_reason is None and chunk.usage is None for chunk in body)
    assert last.finish_reason == "stop"
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, len(body))


def test_max_tokens_cuts_after_that_many_words() -> None:
    *body, last = chunks(seed=1, max_tokens=5)
    assert len(body) == 5
    assert last.finish_reason == "length"


def test_a_stop_text_ends_the_answer() -> None:
    assert text(seed=1, stop=(" You asked",)) == "This is v1, take 1."
    assert chunks(seed=1, stop=(" You asked",))[-1].finish_reason == "stop"


def test_a_delay_makes_streaming_visible() -> None:
    async def first_and_total() -> tuple[float, float]:
        began, first = time.monotonic(), 0.0
        async for _ in ScriptedEngine("v1", delay_s=0.02).stream(HELLO, Sampling(max_tokens=10)):
            first = first or time.monotonic() - began
        return first, time.monotonic() - began

    first_s, total_s = asyncio.run(first_and_total())
    assert first_s >= 0.02
    assert total_s >= 0.2
    assert first_s < total_s / 2


def test_a_closed_engine_breaks_its_stream_and_refuses_new_ones() -> None:
    async def run() -> None:
        engine = ScriptedEngine("v1")
        await engine.check()
        running = engine.stream(HELLO, Sampling())
        await anext(running)
        await engine.close()
        assert not engine.is_alive
        with pytest.raises(EngineBroken, match="closed"):
            await anext(running)
        with pytest.raises(EngineBroken, match="closed"):
            await engine.check()

    asyncio.run(run())
