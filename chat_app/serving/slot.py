"""The one reference to what is served: pin it to answer, swap it to serve another version.

A swap builds the new engine beside the old one, checks it, commits, flips one reference, and only then drains and
closes the old one. A stream keeps the engine it began with, so no answer mixes two versions. Whatever fails before
the flip leaves the old engine serving, untouched. An engine whose process died is built again by the next pin.

All methods belong to one event loop; other threads use `asyncio.run_coroutine_threadsafe`. Which version *should*
be served is the store's word (its last promotion), not this file's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from chat_app.serving.engine import Engine, EngineBroken, EngineBuilder, EngineStartFailed, ServedVersion

log = logging.getLogger(__name__)

Commit = Callable[[], Awaitable[None]]
Result = TypeVar("Result")


class _Holder:
    """One engine with the number of streams that hold it."""

    def __init__(self, served: ServedVersion, engine: Engine) -> None:
        self.served = served
        self.engine = engine
        self.pins = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def pin(self) -> None:
        self.pins += 1
        self.idle.clear()

    def unpin(self) -> None:
        self.pins -= 1
        if self.pins == 0:
            self.idle.set()


class ModelSlot:
    """Holds the served engine. `drain_s`: how long an old engine may go on with streams that began with it."""

    def __init__(self, build: EngineBuilder, *, drain_s: float = 120.0) -> None:
        self._build = build
        self._drain_s = drain_s
        self._now: _Holder | None = None
        self._closed = False
        self._lock = asyncio.Lock()  # held by whoever changes what is served
        self._rebuilding: asyncio.Task[None] | None = None
        self._changes: set[asyncio.Task[Any]] = set()
        self._retiring: dict[asyncio.Task[None], _Holder] = {}

    @property
    def version(self) -> str:
        """The version being served. Raises EngineBroken before start and after close."""
        return self._holder().served.version

    @property
    def is_ready(self) -> bool:
        """True where a living engine is being served."""
        return self._now is not None and self._now.engine.is_alive

    @property
    def draining(self) -> int:
        """How many old engines still wait for their streams to end."""
        return len(self._retiring)

    async def start(self, served: ServedVersion) -> None:
        """Build, check and serve the first engine. Raises EngineError."""
        async with self._lock:
            if self._now is not None or self._closed:
                raise EngineStartFailed(f"the slot cannot start {served.version}: it was started before; swap instead")
            self._now = _Holder(served, await self._built(served))

    @asynccontextmanager
    async def pin(self) -> AsyncIterator[Engine]:
        """The served engine, kept open until the block ends. Raises EngineError where none can be had."""
        holder = await self._living()
        holder.pin()
        try:
            yield holder.engine
        finally:
            holder.unpin()

    async def swap(self, served: ServedVersion, commit: Commit | None = None) -> str:
        """Serve another version; returns the one served before.

        `commit` runs after the new engine has passed its check and just before the flip: record the promotion there.
        When building, checking or committing fails, the error is raised and the old engine serves on. Swaps run one
        after the other, and to their end even where the caller is cancelled. The version already served is left as
        it is, without commit; only a dead engine of it is built again. Raises EngineError, or what commit raises.
        """
        return await self._unstoppable(self._swap(served, commit))

    async def close(self) -> None:
        """Close every engine now, the draining ones too; their streams break."""
        self._closed = True
        await asyncio.gather(*self._changes, return_exceptions=True)
        async with self._lock:
            retiring = dict(self._retiring)
            for task in retiring:
                task.cancel()
            await asyncio.gather(*retiring, return_exceptions=True)
            holders = [*retiring.values(), *([self._now] if self._now is not None else [])]
            self._now = None
            for holder in holders:
                await holder.engine.close()

    def _holder(self) -> _Holder:
        if self._now is None:
            raise EngineBroken("no model is being served: the server is starting or stopping; try again in a moment")
        return self._now

    async def _built(self, served: ServedVersion) -> Engine:
        """A new engine that has passed its check; one that has not is closed."""
        began = time.monotonic()
        engine: Engine | None = None
        try:
            engine = await self._build(served)
            await engine.check()
        except BaseException as error:  # cancelled or failed: either way nobody else knows this engine
            log.warning("%s could not be started: %s", served.version, str(error) or type(error).__name__)
            if engine is not None:
                await engine.close()
            raise
        log.info("%s is ready after %.1f s.", served.version, time.monotonic() - began)
        return engine

    async def _swap(self, served: ServedVersion, commit: Commit | None) -> str:
        async with self._lock:
            old = self._holder()
            if served.version == old.served.version:
                if not old.engine.is_alive:
                    self._flip(_Holder(served, await self._built(served)))
                return old.served.version
            engine = await self._built(served)
            try:
                if self._closed:
                    raise EngineBroken(f"{served.version} is not served: the server is stopping")
                if commit is not None:
                    await commit()
            except BaseException as error:  # whatever it is, the new engine must not stay behind
                log.warning("%s serves on: %s could not be committed: %r", old.served.version, served.version, error)
                await engine.close()
                raise
            self._flip(_Holder(served, engine))
            log.info("Serving %s instead of %s.", served.version, old.served.version)
            return old.served.version

    def _flip(self, new: _Holder) -> None:
        """Serve the new engine from here on; the old one is drained and closed in the background."""
        old, self._now = self._holder(), new
        task = asyncio.create_task(self._retire(old))
        self._retiring[task] = old
        task.add_done_callback(self._retiring.pop)

    async def _retire(self, old: _Holder) -> None:
        try:
            await asyncio.wait_for(old.idle.wait(), self._drain_s)
        except TimeoutError:
            log.warning(
                "Closing %s although %d streams still use it: the limit of %g s is over.",
                old.served.version, old.pins, self._drain_s,
            )  # fmt: skip
        finally:
            await old.engine.close()

    async def _living(self) -> _Holder:
        """What is served, built again first where its engine is dead. All who wait share one rebuild."""
        if not self._holder().engine.is_alive:
            if self._rebuilding is None or self._rebuilding.done():
                self._rebuilding = asyncio.create_task(self._unstoppable(self._rebuild()))
            await asyncio.shield(self._rebuilding)
        return self._holder()

    async def _rebuild(self) -> None:
        async with self._lock:
            dead = self._holder()
            if dead.engine.is_alive or self._closed:
                return  # a swap came first
            log.warning("The engine of %s died; starting it again.", dead.served.version)
            self._flip(_Holder(dead.served, await self._built(dead.served)))

    async def _unstoppable(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a change to its end, even where the one who asked for it is cancelled."""
        task = asyncio.create_task(work)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)
