"""What an engine must show before it serves: it starts in time, it writes, and it says what its version said before.

Where it sits: `slot.py` starts every engine through here. The files behind a version (hashes, finite weights) are
checked before, where they are (`trainer/versions.py`); canaries are recorded at evaluation (`trainer/canaries.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from contextlib import aclosing

from chat_app.serving.engine import (
    Canary,
    Engine,
    EngineBuilder,
    EngineStartFailed,
    Sampling,
    ServedVersion,
    ShowsPrompt,
)

log = logging.getLogger(__name__)

CANARY_TOKENS = 32  # more than any canary begins with
CANCEL_GRACE_S = 10.0  # what a cancelled start may take to clean up
SHOWN = 200


class Starter:
    """Starts engines that have shown all of the above. `limit_s`: for the whole start of one."""

    def __init__(self, build: EngineBuilder, limit_s: float) -> None:
        self._build = build
        self._limit_s = limit_s
        self._closed = False
        self._starts: set[asyncio.Task[Engine]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self, served: ServedVersion) -> Engine:
        """A new engine that may serve. Raises EngineError; then no engine stays behind, or it is closed when it comes.

        A builder that hangs is cancelled; one that does not even end then is left alone, so that nobody waits for it.
        """
        if self._closed:
            raise EngineStartFailed(f"{served.version} is not started: the server is stopping")
        began = time.monotonic()
        task = asyncio.create_task(self._verified(served))
        self._starts.add(task)
        task.add_done_callback(self._starts.discard)
        try:
            await asyncio.wait({task}, timeout=self._limit_s)
        except asyncio.CancelledError:
            await self._end(task)
            raise
        if not task.done():
            await self._end(task)
            raise EngineStartFailed(f"{served.version} did not start: it was not ready after {self._limit_s:g} s")
        if task.cancelled():
            raise EngineStartFailed(f"{served.version} did not start: the server is stopping")
        engine = task.result()
        log.info("%s is ready after %.1f s.", served.version, time.monotonic() - began)
        return engine

    async def close(self) -> None:
        """Cancel what is being started; nothing more is."""
        self._closed = True
        for task in set(self._starts):
            task.cancel()
        if self._starts or self._closing:
            await asyncio.wait({*self._starts, *self._closing}, timeout=CANCEL_GRACE_S)

    async def _end(self, task: asyncio.Task[Engine]) -> None:
        """See that a start comes to nothing."""
        task.add_done_callback(self._close_late)
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_GRACE_S)

    def _close_late(self, task: asyncio.Task[Engine]) -> None:
        if not task.cancelled() and task.exception() is None:
            closing = asyncio.create_task(task.result().close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _verified(self, served: ServedVersion) -> Engine:
        engine: Engine | None = None
        try:
            engine = await self._build(served)
            await _all_of(engine.check(), check_canaries(engine, served.canaries))
        except BaseException as error:  # cancelled or failed: either way nobody else knows this engine
            log.warning("%s could not be started: %s", served.version, str(error) or type(error).__name__)
            if engine is not None:
                await engine.close()
            raise
        return engine


async def check_canaries(engine: Engine, canaries: tuple[Canary, ...]) -> None:
    """See that the engine reads and answers every canary as it was recorded. Raises EngineStartFailed, EngineError."""
    await _all_of(*(_check_canary(engine, canary) for canary in canaries))


async def _all_of(*checks: Awaitable[None]) -> None:
    """All at once, to their end: together they take little longer than one. Raises what the first to fail raised."""
    for found in await asyncio.gather(*checks, return_exceptions=True):
        if found is not None:
            raise found


async def _check_canary(engine: Engine, canary: Canary) -> None:
    asked = canary.messages[-1]["content"]
    if canary.prompt is not None and isinstance(engine, ShowsPrompt):
        prompt = await engine.prompt_text(canary.messages)
        if prompt != canary.prompt:
            raise EngineStartFailed(
                f"{engine.version} reads {asked!r} as {_shown(prompt)}; it was evaluated on {_shown(canary.prompt)}: "
                "the chat template is another one. Serve it on the base it was trained on, or train again."
            )
    said = await _beginning(engine, canary)
    if said != canary.begins.lstrip():
        raise EngineStartFailed(
            f"{engine.version} answers {asked!r} with {_shown(said)}; when it was evaluated it began "
            f"{_shown(canary.begins)}: these are not the weights that were judged. Restore a backup or train again."
        )


async def _beginning(engine: Engine, canary: Canary) -> str:
    """As much of the greedy answer as the canary knows, without the white space that some engines put in front."""
    wanted, said = len(canary.begins.lstrip()), ""
    async with aclosing(engine.stream(canary.messages, Sampling(temperature=0, max_tokens=CANARY_TOKENS))) as chunks:
        async for chunk in chunks:
            said = (said + chunk.text).lstrip()
            if len(said) >= wanted:
                break
    return said[:wanted]


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")
