"""The watch over a version that was just promoted: it collects what is seen, asks for a verdict, and goes back.

    promote ─► begin ─► every answer: ended ─► baking.decide ─► kept, or taken back (an `auto-rollback` in the store)

Where it sits: an attribute of `Operations`; `answers.py` reports to it (it is their `Watcher`), `slot.py` keeps the
version before warm, so that going back is a flip and drops nothing. While the watch lasts, an answer that the new
version breaks, or ends empty, before its first word is asked of the version before, and the person sees only that one.

Only what a version did on its own terms counts (`baking.py`). A text that looks bad may be what its client asked for,
so it counts once the version before, asked the same, wrote a better one; where that one is gone, at once.

The watch lasts until both limits are over (ZLOOP_BAKING_REQUESTS, ZLOOP_BAKING_S), at most a day. A promotion or a
rollback by a person ends it; so does a restart of the server. What is compared with: the last answers of the version
before, from the store; their first-token times are kept in memory only, so there are none right after a restart.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from chat_app.baking import Answered, Measure, Verdict, answered, decide, text_troubles
from chat_app.metrics import Metrics
from chat_app.prompts import fit
from chat_app.serving.engine import MAX_SEED, EngineError, is_its_fault
from chat_app.serving.slot import ModelSlot
from chat_app.settings import Settings
from chat_app.turns import TurnStream
from feedback_store.store import FeedbackStore

log = logging.getLogger(__name__)

LAST = 200  # answers of each version that are compared
LONGEST_S = 24 * 3600.0
LOOK_EVERY_S = 0.5
SILENT_S = 20.0  # in the middle of an answer: as good as broken
RETRY_S = 5.0
LONG_PROMPT_CHARACTERS = 2_000  # reading so many is taken for as much work as writing an answer beside the others
ASKED_AGAIN_AT_ONCE, ASKED_AGAIN, ASKED_AGAIN_S = 3, 20, 120.0  # of the version before: at once, waiting, at most

State = Literal["watching", "kept", "taken back", "ended"]


@dataclass
class Growing:
    """An answer being written; `load`: the most work at once until its first token."""

    turn: TurnStream
    began: float
    prompt_characters: int
    load: float = 0.0

    @property
    def work(self) -> float:
        """1 for writing; as long as a long prompt is being read, more."""
        return 1.0 if self.turn.wrote_at is not None else max(1.0, self.prompt_characters / LONG_PROMPT_CHARACTERS)


@dataclass
class Watch:
    """One version being watched, or how that ended. `before`: the last answers of the version before, oldest first."""

    version: str
    previous: str
    before: list[Answered]
    began: float
    judge_length: bool = True
    state: State = "watching"
    begun: int = 0
    requests: int = 0  # answers that ended and count
    rescued: int = 0
    engine_died: bool = False
    seen: deque[Answered] = field(default_factory=lambda: deque(maxlen=LAST))
    doubted: set[str] = field(default_factory=set)  # candidates of `seen` whose text may be their client's doing
    ratings: dict[str, str] = field(default_factory=dict)
    growing: dict[str, Growing] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=lambda: Verdict((), ()))
    reason: str = ""  # why it was taken back
    took_s: float = 0.0

    def look(self, now: float, crowd: float = 1.0) -> Verdict:
        """Judge what has been seen, by the clock `now`.

        `crowd`: how many times the usual work there is, answer by answer; where long prompts are read others wait.
        """
        waiting = []
        silent = []
        for one in self.growing.values():
            if one.turn.wrote_at is None:
                if one.turn.is_on_own_terms:
                    waiting.append((now - one.began, one.load))
            elif now - one.turn.wrote_at > SILENT_S * crowd:
                silent.append(answered(one.turn.candidate_id, "", failed=True))
        seen = [
            replace(one, rating=self.ratings.get(one.candidate_id))
            for one in self.seen
            if one.candidate_id not in self.doubted
        ]
        self.verdict = decide(
            [*seen, *silent],
            self.before,
            self.previous,
            engine_died=self.engine_died,
            waiting=waiting,
            judge_length=self.judge_length,
        )
        return self.verdict


class Baking:
    """All of it belongs to the slot's event loop, but `prepare`, `begin` and `rated`, which any thread may call.

    `go_back` makes the version before the champion again, for a reason; it returns False where the version is not the
    champion any more, and raises where nothing could be done. `clock` gives seconds.
    """

    def __init__(
        self,
        settings: Settings,
        store: FeedbackStore,
        slot: ModelSlot | None,
        metrics: Metrics,
        go_back: Callable[[str, str], Awaitable[bool]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._slot = slot
        self._metrics = metrics
        self._go_back = go_back
        self._clock = clock
        self._watch: Watch | None = None
        self._looking: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._growing: dict[str, Growing] = {}
        self._first_tokens: dict[str, tuple[float, float]] = {}  # seconds and load by candidate, of all versions
        self._asked_again: set[asyncio.Task[None]] = set()
        self._at_once = asyncio.Semaphore(ASKED_AGAIN_AT_ONCE)
        self._dice = random.SystemRandom()

    # --- beginning and ending --------------------------------------------------------------------------------------

    def prepare(self, version: str, previous: str, *, judge_length: bool = True) -> Watch | None:
        """A watch over `version` for `begin`; None where nothing is served, or ZLOOP_BAKING is off."""
        if self._slot is None or self._settings.baking == "off":
            return None
        recent = self._store.load_recent_answers(previous, LAST)
        before = []
        for one, rating in reversed(recent):
            first_token_s, load = self._first_tokens.get(one.candidate_id, (None, 1))
            failed = one.finish_reason == "error"
            before.append(
                answered(
                    one.candidate_id, one.text, failed=failed, first_token_s=first_token_s, load=load, rating=rating
                )
            )
        return Watch(version, previous, before, self._clock(), judge_length)

    def begin(self, watch: Watch | None) -> None:
        """Watch a version from its first answer on, and no longer the one before; None: watch none."""
        self.end()
        if watch is not None:
            watch.began = self._clock()
        self._watch = watch

    def keep_looking(self) -> None:
        """Look at the watch from time to time, so that answers that never come are seen too."""
        if self._watch is not None and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look())

    def end(self) -> None:
        """Watch no longer, and say nothing of it: a person has decided."""
        if self._watch is None:
            return
        if self._watch.state == "watching":
            self._metrics.baked("ended")
        self._watch.state = "ended"

    async def close(self) -> None:
        """The server stops: answers that break from now on are not the version's fault."""
        if self._watch is not None and self._watch.state == "watching":
            self.end()
        self._wake.set()
        tasks = [*self._asked_again, *([] if self._looking is None else [self._looking])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what `answers.py` reports ---------------------------------------------------------------------------------

    def rescuer(self) -> str | None:
        """The version that is asked where the champion breaks before its first word; None: nobody is."""
        watch, slot = self._watch, self._slot
        if watch is None or slot is None or watch.state != "watching" or watch.previous not in slot.versions:
            return None
        return watch.previous if slot.version == watch.version else None

    def rescued(self) -> None:
        """An answer was asked of the version before, because the watched one broke it."""
        if self._watch is not None:
            self._watch.rescued += 1
            self._metrics.rescued(self._watch.version)

    def begun(self, turn: TurnStream) -> None:
        """An answer is asked for, or grows."""
        if turn.candidate_id in self._growing:
            return
        characters = sum(len(message["content"]) for message in turn.messages)
        one = self._growing[turn.candidate_id] = Growing(turn, self._clock(), characters)
        load = self._load()
        for other in self._growing.values():
            if other.turn.wrote_at is None:
                other.load = max(other.load, load)
        if self._watch is not None and turn.version == self._watch.version:
            self._watch.begun += 1
            self._watch.growing[turn.candidate_id] = one

    def ended(self, turn: TurnStream, origin: str) -> None:
        """An answer for `origin` ended, however it did; one that somebody stopped says nothing."""
        growing = self._growing.pop(turn.candidate_id, None)
        load = 1.0 if growing is None else growing.load
        first_token_s = None if turn.first_token_ms is None else turn.first_token_ms / 1000
        if first_token_s is not None:
            self._first_tokens[turn.candidate_id] = first_token_s, load
            while len(self._first_tokens) > 4 * LAST:
                del self._first_tokens[next(iter(self._first_tokens))]
        watch = self._watch
        if watch is None or turn.version != watch.version:
            return
        watch.growing.pop(turn.candidate_id, None)
        if watch.state == "watching" and turn.finish_reason != "cancelled":
            one = answered(
                turn.candidate_id,
                turn.text,
                failed=turn.finish_reason == "error",
                first_token_s=first_token_s,
                load=load,
                on_own_terms=turn.is_on_own_terms,
                origin=origin,
            )
            self._doubt(watch, one, turn)
            self._see(watch, one, turn.error, engine_is_alive=turn.engine_is_alive)

    def could_not_begin(self, version: str, candidate_id: str, error: EngineError) -> None:
        """An answer could not even be asked for."""
        if self._watch is not None and self._watch.state == "watching" and version == self._watch.version:
            self._see(self._watch, answered(candidate_id, "", failed=True), error, engine_is_alive=True)

    def rated(self, candidate_id: str, rating: str) -> None:
        """Somebody rated an answer; a later rating of it takes the place of this one."""
        if self._watch is not None:
            self._watch.ratings[candidate_id] = rating

    def _see(self, watch: Watch, one: Answered, error: EngineError | None, *, engine_is_alive: bool) -> None:
        if one.failed and error is None:  # it broke in our own code, which is no version's doing
            return
        if error is not None and not is_its_fault(error, on_own_terms=one.on_own_terms):
            return
        watch.requests += one.failed or one.on_own_terms
        watch.seen.append(one)
        watch.engine_died = watch.engine_died or (one.on_own_terms and not engine_is_alive)
        self._look_now(watch)

    def _look_now(self, watch: Watch) -> None:
        if watch.look(self._clock(), self._crowd()).go_back:
            self._wake.set()

    def _load(self) -> float:
        """The work of all that is being written, for the watch too."""
        return sum(one.work for one in self._growing.values()) + min(len(self._asked_again), ASKED_AGAIN_AT_ONCE)

    def _crowd(self) -> float:
        return max(1.0, self._load() / max(1, len(self._growing)))

    # --- asking the version before -------------------------------------------------------------------------------

    def _doubt(self, watch: Watch, one: Answered, turn: TurnStream) -> None:
        """Where something is wrong with a text, leave it out until the version before was asked the same."""
        troubles = text_troubles(one, watch.before)
        if not troubles or self._slot is None or watch.previous not in self._slot.versions:
            return
        watch.doubted.add(one.candidate_id)
        if len(self._asked_again) < ASKED_AGAIN:
            task = asyncio.create_task(self._ask_again(watch, one.candidate_id, troubles, turn))
            self._asked_again.add(task)
            task.add_done_callback(self._asked_again.discard)

    async def _ask_again(self, watch: Watch, candidate_id: str, troubles: frozenset[Measure], turn: TurnStream) -> None:
        """Doubt an answer no longer where the version before has no such trouble with the same messages."""
        try:
            async with self._at_once, asyncio.timeout(ASKED_AGAIN_S):
                text = await self._said_before(watch, turn, only_whether=troubles == {Measure.EMPTY})
        except (EngineError, TimeoutError) as error:
            log.info("%s could not be asked again what %s was asked: %s", watch.previous, watch.version, error)
            return
        if not troubles & text_troubles(answered(candidate_id, text, failed=False), watch.before):
            watch.doubted.discard(candidate_id)
            if watch.state == "watching":
                self._look_now(watch)

    async def _said_before(self, watch: Watch, turn: TurnStream, *, only_whether: bool) -> str:
        """What the version before answers to the same; `only_whether` it does: up to its first word."""
        assert self._slot is not None
        sampling = replace(turn.sampling, seed=self._dice.randrange(MAX_SEED))
        async with self._slot.pin(watch.previous) as engine:
            prompt = await fit(engine, turn.messages, sampling)
            async with aclosing(TurnStream(prompt, prompt.messages, sampling)) as again:
                async for _ in again:
                    if only_whether and again.text.strip():
                        break
            return again.text

    # --- looking ---------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        while (watch := self._watch) is not None and watch.state == "watching":
            self._wake.clear()
            now = self._clock()
            if watch.look(now, self._crowd()).go_back:
                await self._take_back(watch)
            elif self._is_over(watch, now - watch.began):
                watch.state = "kept"
                self._metrics.baked("kept")
                log.info("%s", self.sentence())
            else:
                try:
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    def _is_over(self, watch: Watch, passed_s: float) -> bool:
        enough = watch.requests >= self._settings.baking_requests and passed_s >= self._settings.baking_s
        enough = enough and not self._asked_again  # which may still say something
        return enough or passed_s >= LONGEST_S

    async def _take_back(self, watch: Watch) -> None:
        watch.took_s = self._clock() - watch.began
        count = watch.requests + len(watch.growing)
        requests = f"{count} request{'' if count == 1 else 's'}"
        reason = f"{watch.version} was taken back after {requests}: {'; '.join(watch.verdict.reasons)}."
        try:
            if await self._go_back(watch.version, reason):
                watch.state, watch.reason = "taken back", reason
                self._metrics.baked("taken back")
                log.warning("%s", reason)
            elif watch.state == "watching":
                self.end()
        except Exception as error:  # whatever it is, it is tried again
            log.exception("%s is clearly worse than %s and could not be taken back.", watch.version, watch.previous)
            watch.reason = f"{watch.version} could not be taken back ({error}); it is tried again."
            await asyncio.sleep(RETRY_S)

    # --- what people see -------------------------------------------------------------------------------------------

    def sentence(self) -> str:
        """How the champion does, or why the last one was taken back; empty where there is nothing to say."""
        watch = self._watch
        if watch is None:  # since the start of the server; the store remembers
            promotions = self._store.load_promotions()
            return promotions[-1].reason if promotions and promotions[-1].kind == "auto-rollback" else ""
        if watch.state == "ended":
            return ""
        if watch.reason:
            return watch.reason
        if watch.state == "kept":
            return f"{watch.version} was watched over {watch.requests} requests and is kept."
        trouble = [
            share.sentence(watch.previous)
            for share in watch.verdict.shares
            if share.bad and share.measure not in (Measure.LATE, Measure.LONG)
        ]
        seen = f"{watch.requests} of {self._settings.baking_requests} requests"
        if watch.requests >= self._settings.baking_requests:
            seen = f"{watch.requests} requests"
        return f"{watch.version} is being watched: {seen}, {'; '.join(trouble) or 'no trouble'}."

    def watched(self) -> str | None:
        """The version that is being watched now."""
        return None if self._watch is None or self._watch.state != "watching" else self._watch.version

    def taken_back(self) -> dict[str, str]:
        """The versions that were taken back by themselves, with the reason, until a person promotes them again.

        None of them may be promoted without a person.
        """
        reasons: dict[str, str] = {}
        for one in self._store.load_promotions():
            if one.kind == "auto-rollback":
                reasons[one.previous] = one.reason
            elif one.kind == "promote":
                reasons.pop(one.version, None)
        return reasons

    def as_body(self) -> dict[str, Any]:
        """The watch with all its numbers."""
        watch = self._watch
        body: dict[str, Any] = {
            "state": "none" if watch is None else watch.state,
            "sentence": self.sentence(),
            "baking": self._settings.baking,
            "requests_wanted": self._settings.baking_requests,
            "seconds_wanted": self._settings.baking_s,
            "taken_back": self.taken_back(),
        }
        if watch is None:
            return body
        passed_s = watch.took_s or self._clock() - watch.began
        return body | {
            "version": watch.version,
            "previous": watch.previous,
            "requests": watch.requests,
            "begun": watch.begun,
            "seconds": round(passed_s, 1),
            "rescued": watch.rescued,
            "answers_before": len(watch.before),
            "in_doubt": len(watch.doubted),
            "asking_again": len(self._asked_again),
            "reasons": list(watch.verdict.reasons),
            "measures": [
                {
                    "measure": share.measure.name.lower(),
                    "bad": share.bad,
                    "of": share.of,
                    "bad_before": share.bad_before,
                    "of_before": share.of_before,
                    "p": share.p,
                    "clearly_worse": share.is_clearly_worse,
                }
                for share in watch.verdict.shares
            ],
        }
