"""Test support: the product's API on a real port in the test's own event loop, so that engine and tasks can be seen."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from server import free_port

from chat_app.__main__ import open_store
from chat_app.api import create_api
from chat_app.operations import Operations
from chat_app.serving.engine import Chunk, EngineBuilder, Sampling, ServedVersion
from chat_app.serving.scripted_engine import ScriptedEngine
from chat_app.serving.slot import ModelSlot
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from feedback_store.records import Message
from trainer import schedule


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
async def api_on_a_port(
    build: EngineBuilder, data_dir: Path, *, started: bool = True, **settings: object
) -> AsyncIterator[tuple[Operations, int]]:
    """The product's API on a real uvicorn, in this loop, so that engine and tasks can be looked at."""
    values = {f"ZLOOP_{name.upper()}": str(value) for name, value in settings.items()}
    chosen = load_settings({"ZLOOP_DATA_DIR": str(data_dir), **values})
    port = free_port()
    with open_store(chosen) as store:
        operations = Operations(chosen, store, TrainerRoom(chosen, store), ModelSlot(build), schedule.is_due)
        if started:
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
