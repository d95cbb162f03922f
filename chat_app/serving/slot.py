"""The one reference to what is served: pin it to answer, swap it to serve another version.

A swap starts the new engine beside the old one, verifies it (`verification.py`), commits, and flips one reference. A
stream keeps the engine it began with, so no answer mixes two versions. Whatever fails before the flip leaves the old
engine serving, untouched. The engine before stays warm, so that going back is a flip; the one before that is drained
and closed. Other versions can be served beside the champion, each pinned by its name. Where there is no room for two
engines a swap is refused, unless a maintenance swap is asked for: then new answers wait in a short queue while the old
engine ends and the new one starts. `pause` ends every engine to lend its memory to a training, until `resume`. An
engine whose process died is started again by the next pin, at once the first
time and then with growing pauses (`backoff.py`).

All methods belong to one event loop; other threads use `asyncio.run_coroutine_threadsafe`. Which version *should*
be served is the store's word (its last promotion), not this file's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from chat_app.serving.backoff import Backoff
from chat_app.serving.engine import (
    Engine,
    EngineBroken,
    EngineBuilder,
    EngineBusy,
    EngineError,
    EngineRefused,
    EngineStartFailed,
    NoRoom,
    ServedVersion,
    VersionNotServed,
)
from chat_app.serving.verification import Starter

log = logging.getLogger(__name__)

QUEUE_LIMIT = 32  # answers that wait while a maintenance swap goes on
QUEUE_RETRY_S = 10.0
WARM_CHECK_S = 10.0
PAUSE_RETRY_S = (10.0, 600.0)  # who asks in a pause comes back after what is left of it, within these bounds
TRIES_BEFORE_A_PROBLEM = 5

Commit = Callable[[], Awaitable[None]]
Result = TypeVar("Result")


class _Holder:
    """One engine with the number of streams that hold it, and the tries to bring it back."""

    def __init__(self, served: ServedVersion, engine: Engine, backoff: Backoff) -> None:
        self.served = served
        self.engine = engine
        self.backoff = backoff
        self.last_failure = ""
        self.pins = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def version(self) -> str:
        return self.served.version

    def pin(self) -> None:
        self.pins += 1
        self.idle.clear()

    def unpin(self) -> None:
        self.pins -= 1
        if self.pins == 0:
            self.idle.set()


class SlotPaused(EngineBusy):
    """Nothing is served for a while: the memory is lent to a run."""


@dataclass(frozen=True, slots=True)
class _Pause:
    """Why nothing is served for a while, and when it should be over by the slot's clock."""

    why: str
    until_s: float

    def sentence(self, now_s: float) -> str:
        """What people read; whole minutes, so that it does not change every second."""
        left_min = round((self.until_s - now_s) / 60)
        return f"{self.why}: chat comes back by itself, {f'in about {left_min} min' if left_min > 0 else 'soon'}."


class ModelSlot:
    """Holds the served engines.

    `drain_s`: how long an old engine may go on with streams that began with it. `build_limit_s`: how long a new one
    may take until it has been verified. `keep_warm`: keep the champion before, for a rollback. `clock` gives seconds.
    """

    def __init__(
        self,
        build: EngineBuilder,
        *,
        drain_s: float = 120.0,
        build_limit_s: float = 180.0,
        keep_warm: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._starter = Starter(build, build_limit_s)
        self._drain_s = drain_s
        self._build_limit_s = build_limit_s
        self._keep_warm = keep_warm
        self._clock = clock
        self._champion: _Holder | None = None
        self._beside: dict[str, _Holder] = {}
        self._warm: str | None = None  # which of those beside is the champion before
        self._closed = False
        self._paused: _Pause | None = None
        self._lock = asyncio.Lock()  # held by whoever changes what is served
        self._switching: str | None = None  # the version a maintenance swap goes to
        self._reopened = asyncio.Event()
        self._queued = 0
        self._rebuilds: dict[str, asyncio.Task[None]] = {}
        self._changes: set[asyncio.Task[Any]] = set()
        self._retiring: dict[asyncio.Task[None], _Holder] = {}

    @property
    def version(self) -> str:
        """The champion. Raises EngineBroken before start and after close."""
        return self._holder().version

    @property
    def versions(self) -> tuple[str, ...]:
        """Every version that can be pinned now, the champion first."""
        beside = [one for one in list(self._beside.values()) if one.engine.is_alive or one.version != self._warm]
        return () if self._champion is None else (self._champion.version, *(one.version for one in beside))

    @property
    def is_ready(self) -> bool:
        """True where a living engine is being served."""
        return self._champion is not None and self._champion.engine.is_alive and not self._closed

    @property
    def problem(self) -> str | None:
        """What people should know about the champion's engine, if there is anything."""
        if self._paused is not None:
            return self._paused.sentence(self._clock())
        if self._switching is not None:
            return f"Switching to {self._switching}: new answers wait until it is ready."
        one = self._champion
        if one is None or one.engine.is_alive or one.backoff.tries < TRIES_BEFORE_A_PROBLEM:
            return None
        return (
            f"The engine of {one.version} stopped, and {one.backoff.tries} tries to start it again did not last "
            f"({one.last_failure or 'it died again'}). It is tried again when somebody asks something."
        )

    @property
    def is_paused(self) -> bool:
        """True from `pause` to `resume`."""
        return self._paused is not None

    @property
    def has_started(self) -> bool:
        """Whether there is a champion, alive or not."""
        return self._champion is not None

    @property
    def draining(self) -> int:
        """How many old engines still wait for their streams to end."""
        return len(self._retiring)

    @property
    def maintenance_limit_s(self) -> float:
        """The longest a maintenance swap makes answers wait, where the new version starts."""
        return self._drain_s + self._build_limit_s

    async def start(self, served: ServedVersion) -> None:
        """Start, verify and serve the first engine. Raises EngineError."""
        async with self._lock:
            self._refuse_while_paused()
            if self._champion is not None or self._closed:
                raise EngineStartFailed(f"the slot cannot start {served.version}: it was started before; swap instead")
            self._champion = await self._new(served)

    @asynccontextmanager
    async def pin(self, version: str | None = None) -> AsyncIterator[Engine]:
        """The champion's engine, or that of a version served beside it, kept open until the block ends.

        Raises EngineError where none can be had: VersionNotServed, EngineBusy while it is too early to try again.
        """
        holder = await self._living(version)
        holder.pin()
        try:
            yield holder.engine
        finally:
            holder.unpin()

    async def swap(self, served: ServedVersion, commit: Commit | None = None, *, maintenance: bool = False) -> str:
        """Serve another version; returns the one served before.

        `commit` runs after the new engine has been verified and just before the flip: record the promotion there.
        When starting, verifying or committing fails, the error is raised and the old engine serves on. Swaps run one
        after the other, and to their end even where the caller is cancelled. The version already served is left as
        it is, without commit; only a dead engine of it is built again.

        Raises EngineError, or what commit raises. NoRoom: there is no room for two engines; with `maintenance` the old
        one ends before the new one starts, answers wait meanwhile, and where the new one fails the old one comes back.
        """
        return await self._unstoppable(self._swap(served, commit, maintenance=maintenance))

    async def serve_beside(self, served: ServedVersion) -> None:
        """Serve a version beside the champion until `release`; pin it by its name. Raises EngineError."""
        await self._unstoppable(self._serve_beside(served))

    async def release(self, version: str) -> None:
        """Serve a version beside the champion no longer; its streams may end. Raises EngineRefused."""
        async with self._lock:
            if version == self.version:
                raise EngineRefused(f"{version} is the champion: promote another version instead of releasing it")
            self._find(version)
            self._retire(self._beside.pop(version))
            self._warm = None if self._warm == version else self._warm

    async def pause(self, why: str, back_in_s: float) -> None:
        """End every engine, once its streams have ended: its memory is needed. Nothing starts until `resume`.

        Who asks meanwhile gets SlotPaused with `why`, half a sentence; `back_in_s` is when to come back. Before `start`
        it keeps the slot empty; pausing twice only changes the words.
        """
        await self._unstoppable(self._pause(_Pause(why, self._clock() + back_in_s)))

    async def resume(self) -> None:
        """Start again what was served before `pause`. What cannot start is tried again by the next pin."""
        await self._unstoppable(self._resume())

    async def close(self) -> None:
        """Close every engine now, the draining ones too; their streams break."""
        self._closed = True
        self._reopened.set()
        await self._starter.close()
        await self._close_all()  # a maintenance swap may wait for streams to end
        await asyncio.gather(*self._changes, return_exceptions=True)
        async with self._lock:
            retiring = list(self._retiring)
            for task in retiring:
                task.cancel()
            await asyncio.gather(*retiring, return_exceptions=True)
            await self._close_all()
            self._champion = None
            self._beside.clear()

    # --- finding what is asked for ---------------------------------------------------------------------------------

    def _holder(self) -> _Holder:
        if self._champion is None or self._closed:
            raise EngineBroken("no model is being served: the server is starting or stopping; try again in a moment")
        return self._champion

    def _find(self, version: str | None) -> _Holder:
        champion = self._holder()
        if version in (None, champion.version):
            return champion
        if version in self.versions:
            return self._beside[str(version)]
        raise VersionNotServed(f"{version} is not being served; these are: {', '.join(self.versions)}")

    async def _living(self, version: str | None) -> _Holder:
        """The living engine asked for: waited for while a maintenance swap goes on, started again where it is dead."""
        while True:
            self._refuse_while_paused()
            holder = self._find(version)
            if self._switching is not None and holder is self._champion:
                await self._wait_in_the_queue(self._switching)
            elif holder.engine.is_alive:
                return holder
            else:
                await self._revived(holder)

    def _refuse_while_paused(self) -> None:
        if self._paused is not None:
            now_s = self._clock()
            wait_s = min(PAUSE_RETRY_S[1], max(PAUSE_RETRY_S[0], self._paused.until_s - now_s))
            raise SlotPaused(self._paused.sentence(now_s), wait_s)

    async def _wait_in_the_queue(self, switching_to: str) -> None:
        if self._queued >= QUEUE_LIMIT:
            raise EngineBusy(
                f"{self._queued} answers wait already while the server switches to {switching_to}: try again soon",
                QUEUE_RETRY_S,
            )
        self._queued += 1
        try:
            await self._reopened.wait()
        finally:
            self._queued -= 1

    async def _revived(self, dead: _Holder) -> None:
        """Start a dead engine again. All who wait share one try; between tries nobody waits."""
        rebuild = self._rebuilds.get(dead.version)
        if rebuild is None:
            if dead.backoff.wait_s > 0:
                raise EngineBusy(
                    f"the engine of {dead.version} stopped ({dead.last_failure or 'it died again'}); "
                    f"it is started again in {dead.backoff.wait_s:.0f} s",
                    dead.backoff.wait_s,
                )
            rebuild = self._rebuilds[dead.version] = asyncio.create_task(self._unstoppable(self._rebuild(dead)))
            rebuild.add_done_callback(lambda _: self._rebuilds.pop(dead.version))
        await asyncio.shield(rebuild)

    async def _rebuild(self, dead: _Holder) -> None:
        async with self._lock:
            if dead is not self._champion and dead is not self._beside.get(dead.version):
                return  # a swap came first
            if self._paused is not None:
                return  # its memory is lent
            log.warning("The engine of %s died; starting it again.", dead.version)
            try:
                new = await self._new(dead.served, dead.backoff)
            except BaseException as error:
                dead.last_failure = str(error)
                dead.backoff.note(lives=False)
                raise
            new.backoff.note(lives=True)
            if dead is self._champion:
                self._champion = new
            else:
                self._beside[dead.version] = new
            self._retire(dead)

    # --- changing what is served: with the lock held ---------------------------------------------------------------

    async def _new(self, served: ServedVersion, backoff: Backoff | None = None) -> _Holder:
        """A new verified engine. Where there is no room, whatever only waits to be closed is closed first."""
        try:
            engine = await self._starter.start(served)
        except NoRoom:
            self._drop_warm()
            if not self._retiring:
                raise
            await asyncio.wait(set(self._retiring))
            engine = await self._starter.start(served)
        return _Holder(served, engine, backoff or Backoff(self._clock))

    async def _swap(self, served: ServedVersion, commit: Commit | None, *, maintenance: bool) -> str:
        async with self._lock:
            self._refuse_while_paused()
            old = self._holder()
            if served.version == old.version:
                if not old.engine.is_alive:
                    self._champion = await self._new(served)
                    self._retire(old)
                return old.version
            there = self._beside.get(served.version)
            if there is not None and await _can_serve(there, served):
                await self._committed(old, there, commit)
                self._flip(there)
                return old.version
            try:
                new = await self._new(served)
            except NoRoom:
                if not maintenance:
                    raise
                await self._swap_in_turn(old, served, commit)
                return old.version
            try:
                await self._committed(old, new, commit)
            except BaseException:  # whatever it is, the new engine must not stay behind
                await new.engine.close()
                raise
            self._flip(new)
            return old.version

    async def _committed(self, old: _Holder, new: _Holder, commit: Commit | None) -> None:
        try:
            if self._closed:
                raise EngineBroken(f"{new.version} is not served: the server is stopping")
            if commit is not None:
                await commit()
        except BaseException as error:
            log.warning("%s stays the champion: %s could not be committed: %r", old.version, new.version, error)
            raise

    def _flip(self, new: _Holder) -> None:
        """Serve the new engine from here on; the old one stays warm, or is drained and closed in the background."""
        old, self._champion = self._champion, new
        assert old is not None
        there = self._beside.pop(new.version, None)
        if there is not None and there is not new:
            self._retire(there)
        if self._warm == new.version:
            self._warm = None
        self._drop_warm()
        if self._keep_warm and old.engine.is_alive:
            self._beside[old.version] = old
            self._warm = old.version
        else:
            self._retire(old)
        log.info("Serving %s instead of %s.", new.version, old.version)

    async def _swap_in_turn(self, old: _Holder, served: ServedVersion, commit: Commit | None) -> None:
        """The maintenance swap: end the old engine, start the new one, and let those who wait go on with it."""
        log.warning("Switching from %s to %s without room for both: new answers wait.", old.version, served.version)
        self._switching = served.version
        self._reopened.clear()
        try:
            await self._drain(old)
            try:
                new = await self._new(served)
                try:
                    await self._committed(old, new, commit)
                except BaseException:
                    await new.engine.close()
                    raise
            except BaseException:
                await self._bring_back(old)
                raise
            self._champion = new
        finally:
            self._switching = None
            self._reopened.set()

    async def _bring_back(self, old: _Holder) -> None:
        """After a maintenance swap that failed; where this fails too, the next pin tries again."""
        try:
            self._champion = await self._new(old.served, old.backoff)
        except EngineError as error:
            log.exception("%s could not be started again after a swap that failed.", old.version)
            old.last_failure = str(error)
            old.backoff.note(lives=False)

    async def _serve_beside(self, served: ServedVersion) -> None:
        async with self._lock:
            self._refuse_while_paused()
            if served.version == self.version:
                return
            there = self._beside.get(served.version)
            if there is None or not await _can_serve(there, served):
                new = await self._new(served)
                there = self._beside.pop(served.version, None)
                if there is not None:
                    self._retire(there)
                self._beside[served.version] = new
            if self._warm == served.version:
                self._warm = None  # it stays because somebody asked for it now

    async def _pause(self, pause: _Pause) -> None:
        self._paused = pause  # from here on nobody gets a pin
        async with self._lock:
            self._drop_warm()
            served = [one for one in (self._champion, *self._beside.values()) if one is not None]
            await asyncio.gather(*map(self._drain, served), *self._retiring)
            log.warning("Paused: %s", pause.why)

    async def _resume(self) -> None:
        async with self._lock:
            if self._paused is None:
                return
            self._paused = None
            if self._closed or self._champion is None:
                return
            await self._bring_back(self._champion)
            for version, old in list(self._beside.items()):
                try:
                    self._beside[version] = await self._new(old.served, old.backoff)
                except EngineError as error:
                    log.warning("%s is not served beside again after a pause: %s", version, error)
            log.info("Serving %s again.", self._champion.version)

    def _drop_warm(self) -> None:
        if self._warm is not None:
            self._retire(self._beside.pop(self._warm))
            self._warm = None

    # --- ending engines --------------------------------------------------------------------------------------------

    def _retire(self, old: _Holder) -> None:
        """Drain and close an engine that nobody can pin any more, in the background."""
        task = asyncio.create_task(self._drain(old))
        self._retiring[task] = old
        task.add_done_callback(self._retiring.pop)

    async def _drain(self, old: _Holder) -> None:
        try:
            await asyncio.wait_for(old.idle.wait(), self._drain_s)
        except TimeoutError:
            log.warning(
                "Closing %s although %d streams still use it: the limit of %g s is over.",
                old.version, old.pins, self._drain_s,
            )  # fmt: skip
        finally:
            await old.engine.close()

    async def _close_all(self) -> None:
        champion = [] if self._champion is None else [self._champion]
        for holder in (*champion, *self._beside.values(), *self._retiring.values()):
            await holder.engine.close()

    async def _unstoppable(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a change to its end, even where the one who asked for it is cancelled."""
        task = asyncio.create_task(work)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)


async def _can_serve(there: _Holder, served: ServedVersion) -> bool:
    """Whether an engine that runs already is of exactly this version, and answers."""
    if there.served != served or not there.engine.is_alive:
        return False
    try:
        await asyncio.wait_for(there.engine.check(), WARM_CHECK_S)
    except (EngineError, TimeoutError) as error:
        log.warning("The engine of %s runs but does not answer (%s); starting another.", there.version, error)
        return False
    return True
