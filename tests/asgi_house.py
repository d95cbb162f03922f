"""Test support: the product's API without a socket, in the test's own event loop, on a real store."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from chat_app.__main__ import TRAINER_STATUSES, open_store
from chat_app.api import create_api
from chat_app.engines import engine_builder
from chat_app.operations import Operations
from chat_app.serving.engine import EngineBuilder
from chat_app.serving.slot import ModelSlot
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from trainer import schedule


@asynccontextmanager
async def api_in_process(
    data_dir: Path, build: EngineBuilder | None = None
) -> AsyncIterator[tuple[Operations, httpx.AsyncClient]]:
    """What the API answers, a 500 too: nothing is raised past it."""
    chosen = load_settings({"ZLOOP_DATA_DIR": str(data_dir), "ZLOOP_ENGINE": "scripted"})
    with open_store(chosen) as store:
        slot = ModelSlot(build or engine_builder(chosen))
        operations = Operations(chosen, store, TrainerRoom(chosen, store), slot, schedule.is_due)
        await operations.start_serving()
        transport = httpx.ASGITransport(app=create_api(operations, TRAINER_STATUSES), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=300) as http:
            yield operations, http
        await operations.close()
