"""Readiness: can the next person be answered, and can what they say be kept?

Where it sits: behind `GET /readyz` (`api.py`), above the answers, the slot and the store. A real write is tried each
time; a real generation only where nobody was answered within the last `FRESH_S` seconds, so that a probe never stands
in line with people, nor makes them wait.
"""

import asyncio
import time
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool

from chat_app.operations import Operations
from chat_app.serving.engine import EngineBroken, EngineError
from feedback_store.errors import StoreError

FRESH_S = 15.0
CHECK_LIMIT_S = 20.0


class Readiness:
    """Asked by probes, as often as they like."""

    def __init__(self, operations: Operations, clock: Callable[[], float] = time.monotonic) -> None:
        self._operations = operations
        self._clock = clock
        self._generated_at: float | None = None
        self._checking: asyncio.Task[EngineError | None] | None = None

    async def problem(self) -> str | None:
        """Why nobody should be sent here just now; None where all is well."""
        if self._operations.answers.admission.is_closed:
            return "the server is stopping: it finishes the answers it has begun"
        try:
            self._operations.require_served("champion")  # says so while the server starts
            await self._require_generation()
            await run_in_threadpool(self._operations.check_store)
        except (EngineError, StoreError) as error:
            return str(error)
        return None

    async def _require_generation(self) -> None:
        """An answer of the last seconds, else a few tokens for nobody. All who ask share one try."""
        answers = self._operations.answers
        newest = max((at for at in (self._generated_at, answers.wrote_at) if at is not None), default=None)
        if answers.slot.is_ready and newest is not None and self._clock() - newest < FRESH_S:
            return
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._generate())
        broken = await asyncio.shield(self._checking)
        if broken is not None:
            raise broken

    async def _generate(self) -> EngineError | None:
        """Write a few tokens; a dead engine is built again first. Returns what went wrong."""
        try:
            async with asyncio.timeout(CHECK_LIMIT_S), self._operations.answers.slot.pin() as engine:
                await engine.check()
        except TimeoutError:
            return EngineBroken(f"the engine wrote nothing within {CHECK_LIMIT_S:g} s")
        except EngineError as error:
            return error
        self._generated_at = self._clock()
        return None
