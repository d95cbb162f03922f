"""Test support: the product's API without a socket, in the test's own event loop, on a real store."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
from fastapi import FastAPI

from chat_app.__main__ import TRAINER_STATUSES, open_store
from chat_app.api import create_api
from chat_app.engines import engine_builder
from chat_app.operations import Operations
from chat_app.serving.engine import EngineBuilder
from chat_app.serving.slot import ModelSlot
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from trainer import schedule


@contextmanager
def application(data_dir: Path, build: EngineBuilder | None = None) -> Iterator[tuple[Operations, FastAPI]]:
    """The API as the composition root makes it, without pages; nothing is served yet."""
    chosen = load_settings({"ZLOOP_DATA_DIR": str(data_dir), "ZLOOP_ENGINE": "scripted"})
    with open_store(chosen) as store:
        slot = ModelSlot(build or engine_builder(chosen))
        operations = Operations(chosen, store, TrainerRoom(chosen, store), slot, schedule.is_due)
        yield operations, create_api(operations, TRAINER_STATUSES)


@asynccontextmanager
async def api_in_process(
    data_dir: Path, build: EngineBuilder | None = None
) -> AsyncIterator[tuple[Operations, httpx.AsyncClient]]:
    """What the API answers, a 500 too: nothing is raised past it."""
    with application(data_dir, build) as (operations, app):
        await operations.start_serving()
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=300) as http:
            yield operations, http
        await operations.close()
