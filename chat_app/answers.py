"""Answers: from messages to a stored candidate, or to a stored pair, by the engine that is served.

Where it sits: asked by `operations.py` and `api.py`; takes a seat in `admission.py`, pins an engine in `slot.py`,
follows it in `turns.py`, stores what it wrote. Whoever leaves early leaves what was written, as `cancelled`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from chat_app.admission import Admission, Place
from chat_app.metrics import Metrics
from chat_app.pairs import shuffle
from chat_app.prompts import LeftOut, Prompt, fit
from chat_app.serving.engine import CLIENTS_FAULT, MAX_SEED, Engine, EngineBroken, EngineError, Sampling, is_its_fault
from chat_app.serving.slot import ModelSlot
from chat_app.turns import TurnStream, merge
from feedback_store.records import Candidate, Message, Pair, new_id, now
from feedback_store.store import FeedbackStore

log = logging.getLogger(__name__)

CLOSING_S = 10.0
STOPPING_S = 2.0
STOPPED = "The server is stopping: the answer is not complete. Ask again in a moment."
TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers as they grow, in shown order; `pair` is there once both are complete and stored."""

    first: TurnStream
    second: TurnStream
    pair: Pair | None = None


@dataclass(slots=True)
class _Duel:
    """Two answers of a pair, in shown order; `challenger` is its answer and its own prompt, where one is on trial."""

    prompt: Prompt
    first: TurnStream
    second: TurnStream
    challenger: tuple[TurnStream, Prompt] | None = None
    is_complete: bool = False


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, for admission only (never stored), and through which door, for the metrics.

    `origin`: where from. A client may call itself as it likes, so whose rating it is goes by this.
    """

    user: str = "local"
    route: str = "page"
    origin: str = "local"


ANYBODY = Asker()


class Watcher(Protocol):
    """Who is told of every answer; `baking_watch.Baking` fits it."""

    def rescuer(self) -> str | None:
        """The version to ask where the champion breaks an answer before its first word; None: no other."""

    def rescued(self) -> None: ...
    def begun(self, turn: TurnStream) -> None:
        """An answer grows; told more than once of each."""

    def ended(self, turn: TurnStream, origin: str) -> None: ...
    def could_not_begin(self, version: str, candidate_id: str, error: EngineError) -> None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked, by whom, and from which seat; `stopped` ends it."""

    messages: Sequence[Message]
    sampling: Sampling
    turn_id: str | None
    asker: Asker
    place: Place
    stopped: asyncio.Event


class NothingWritten(Exception):
    """An answer ended before its first word, and another version may be asked; `error` is why, if it broke."""

    def __init__(self, error: EngineError | None = None) -> None:
        super().__init__(str(error or "an empty answer"))
        self.error = error


def _may_be_another_answers(answer: TurnStream) -> bool:
    """Whether another version may write what this one did not: not where the request is why there is nothing."""
    if answer.error is not None:
        return not isinstance(answer.error, CLIENTS_FAULT)
    return answer.finish_reason != "cancelled" and answer.is_on_own_terms


class Contest(Protocol):
    """Who is on live trial; `chat_app.trials.TrialOperations` fits it."""

    def drawn(self, champion: str) -> str | None:
        """The version to show against `champion` in the next pair, None for the champion against itself."""
        ...

    async def answered(self, version: str, error: EngineError | None) -> None:
        """Hear whether a version that was drawn could answer."""
        ...


class ChallengerFailed(EngineError):
    """The challenger could not answer, and the champion could."""


class Answers:
    """Writes answers and keeps them. `slot` is None where nothing is served (a command on the data directory)."""

    def __init__(
        self,
        store: FeedbackStore,
        slot: ModelSlot | None,
        rater: str,
        admission: Admission,
        metrics: Metrics,
        *,
        watcher: Watcher,
    ) -> None:
        self.admission = admission
        self.contest: Contest | None = None
        self.wrote_at: float | None = None  # when an engine last wrote something for somebody (time.monotonic)
        self._store = store
        self._slot = slot
        self._rater = rater
        self._metrics = metrics
        self._watcher = watcher
        self._recording: set[asyncio.Task[None]] = set()
        self._stops: dict[str, asyncio.Event] = {}  # turn id → set to end its growing answers
        self._dice = random.SystemRandom()

    async def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        turn_id: str | None = None,
        asker: Asker = ANYBODY,
        version: str | None = None,
    ) -> AsyncGenerator[TurnStream | Place, None]:
        """Answer `messages`: yields the growing answer; at the end it is stored, with the turn if any.

        While all seats are taken it yields the place in line. The champion, or a version served beside it, is pinned
        once there is a seat. Leaving early, or `stop`, stores what was written, as `cancelled`. Where the watcher names
        a rescuer and the champion writes nothing, the rescuer is asked. Raises EngineError (EngineBusy: nothing was
        begun).
        """
        async with self._growing(turn_id) as stopped, self.admission.admit(asker.user) as place:
            while not await place.seated(TICK_S):
                yield place
                if stopped.is_set():
                    return
            rescuer = None if version is not None else self._watcher.rescuer()
            request = Request(messages, sampling, turn_id, asker, place, stopped)
            try:
                async with aclosing(self._written(request, version, from_first_word=rescuer is not None)) as growing:
                    async for answer in growing:
                        yield answer
                return
            except NothingWritten as nothing:
                log.warning("A new champion began no answer (%s); %s is asked.", nothing, rescuer)
                self._watcher.rescued()
            async with aclosing(self._written(request, rescuer, from_first_word=False)) as growing:
                async for answer in growing:
                    yield answer

    async def _written(
        self, request: Request, version: str | None, *, from_first_word: bool
    ) -> AsyncGenerator[TurnStream, None]:
        """One answer of one version, stored at its end; `from_first_word`: nothing is yielded before there is a word.

        Raises EngineError; NothingWritten where nothing was yielded and another version may be asked.
        """
        async with self._prompt(request, version, from_first_word=from_first_word) as prompt:
            answer = TurnStream(prompt, prompt.messages, self._seeded(request.sampling))
            self._watcher.begun(answer)
            try:
                async with aclosing(merge((answer,), tick_s=TICK_S)) as growing:
                    async for _ in growing:
                        self._note_words(answer)
                        if answer.text.strip() or not from_first_word:
                            yield answer
                        if request.stopped.is_set():
                            break
            except EngineError:
                raise
            except Exception:  # ours
                answer.note_failure()
                raise
            finally:
                self._account(request.place, request.asker, answer)
                if not isinstance(answer.error, CLIENTS_FAULT):  # then there is no answer of this version
                    keeping = self._in_background(self._keep_answer, answer.candidate(), prompt, request.turn_id)
        has_words = bool(answer.text.strip())
        if from_first_word and not has_words and _may_be_another_answers(answer):
            raise NothingWritten(answer.error)
        if answer.error is not None:
            raise answer.error
        await asyncio.shield(keeping)
        if from_first_word and not has_words and answer.finish_reason != "cancelled":
            yield answer  # it is empty because the request has it so

    @asynccontextmanager
    async def _prompt(
        self, request: Request, version: str | None, *, from_first_word: bool
    ) -> AsyncGenerator[Prompt, None]:
        """The prompt before a pinned engine; where there is none, and another version may be asked, NothingWritten."""
        async with AsyncExitStack() as pins:
            champion = self.slot.version
            try:
                engine = await pins.enter_async_context(self.slot.pin(version))
                prompt = await fit(engine, request.messages, request.sampling)
            except EngineError as error:
                if not from_first_word or isinstance(error, CLIENTS_FAULT):
                    raise
                self._watcher.could_not_begin(champion, new_id("cand"), error)
                raise NothingWritten(error) from error
            yield prompt

    async def answer(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        asker: Asker = ANYBODY,
        version: str | None = None,
    ) -> TurnStream:
        """Answer `messages` whole; stored like a streamed one. Raises EngineBroken where the server stopped it."""
        answer: TurnStream | Place | None = None
        async with aclosing(self.stream(messages, sampling, asker=asker, version=version)) as growing:
            async for grown in growing:
                answer = grown
        if not isinstance(answer, TurnStream) or answer.finish_reason == "cancelled":
            raise EngineBroken(STOPPED)
        return answer

    async def stream_pair(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        turn_id: str | None = None,
        asker: Asker = ANYBODY,
    ) -> AsyncGenerator[Comparison | Place, None]:
        """Two answers to `messages`, growing together, blind, in random order; the last one yielded has the pair.

        One is the champion's, the other the challenger's where one is on trial and drawn, else the champion's too;
        where the challenger fails, both are written again by the champion. Both seats are taken together; until then
        it yields the place in line. Leaving early, or `stop`, stores both answers as `cancelled`, and no pair. Raises
        EngineError (EngineBusy: nothing was begun).
        """
        async with self._growing(turn_id) as stopped, self.admission.admit(asker.user, seats=2) as place:
            while not await place.seated(TICK_S):
                yield place
                if stopped.is_set():
                    return
            async with AsyncExitStack() as pins:
                engine = await pins.enter_async_context(self.slot.pin())
                challenger = await self._challenger(engine.version, pins)
                while True:
                    try:
                        duel = await self._duel(engine, challenger, messages, sampling)
                        async with aclosing(self._fought(duel, place, asker, stopped)) as growing:
                            async for comparison in growing:
                                yield comparison
                        break
                    except ChallengerFailed as error:
                        log.warning(
                            "The champion writes both answers of a pair, because the challenger failed: %s", error
                        )
                        challenger = None
        if not duel.is_complete:
            return
        first, second = duel.first.candidate(), duel.second.candidate()
        pair = Pair(new_id("pair"), duel.prompt.messages, first, second, turn_id, self._rater, now())
        await asyncio.shield(self._in_background(self._keep_pair, pair, duel.prompt))
        yield Comparison(duel.first, duel.second, pair)

    async def _challenger(self, champion: str, pins: AsyncExitStack) -> Engine | None:
        """The engine of the version on trial, where it is drawn for this pair and can be had."""
        version = None if self.contest is None else self.contest.drawn(champion)
        if version is None:
            return None
        try:
            return await pins.enter_async_context(self.slot.pin(version))
        except EngineError as error:
            await self._note_challenger(version, error)
            return None

    async def _duel(
        self, champion: Engine, challenger: Engine | None, messages: Sequence[Message], sampling: Sampling
    ) -> _Duel:
        """Two answers to begin, in random order. Raises ChallengerFailed where the challenger cannot read it."""
        one = self._seeded(sampling)
        other = replace(one, seed=((one.seed or 0) + 1) % MAX_SEED)
        prompt = await fit(champion, messages, sampling)
        if challenger is None:
            first, second = (TurnStream(prompt, prompt.messages, draw) for draw in shuffle((one, other), self._dice))
            return _Duel(prompt, first, second)
        try:
            read = await fit(challenger, messages, sampling)
        except EngineError as error:
            await self._note_challenger(challenger.version, error)
            raise ChallengerFailed(str(error)) from error
        answers = (TurnStream(prompt, prompt.messages, one), TurnStream(read, read.messages, other))
        return _Duel(prompt, *shuffle(answers, self._dice), challenger=(answers[1], read))

    async def _fought(
        self, duel: _Duel, place: Place, asker: Asker, stopped: asyncio.Event
    ) -> AsyncGenerator[Comparison, None]:
        """The two answers as they grow, to their end or until `stopped`. Raises EngineError."""
        first, second = duel.first, duel.second
        self._watcher.begun(first)
        self._watcher.begun(second)
        try:
            async with aclosing(merge((first, second), tick_s=TICK_S)) as growing:
                async for _ in growing:
                    self._note_words(first, second)
                    yield Comparison(first, second)
                    if stopped.is_set():
                        return
            await self._judge_challenger(duel)
            broken = first.error or second.error
            if broken is not None:
                raise broken
            duel.is_complete = True
        except EngineError:
            raise
        except Exception:  # ours
            first.note_failure()
            second.note_failure()
            raise
        finally:
            self._account(place, asker, first, second)
            if not duel.is_complete:
                kept = (one for one in (first, second) if not isinstance(one.error, CLIENTS_FAULT))
                for answer in kept:
                    self._in_background(self._keep_answer, answer.candidate(), duel.prompt, None)

    async def _judge_challenger(self, duel: _Duel) -> None:
        """Tell the contest how it went. Raises ChallengerFailed where only the challenger failed."""
        if duel.challenger is None:
            return
        answer, read = duel.challenger
        champion = duel.first if answer is duel.second else duel.second
        if champion.error is not None:
            return
        if answer.error is None or is_its_fault(answer.error, on_own_terms=answer.is_on_own_terms):
            await self._note_challenger(answer.version, answer.error)
        if answer.error is not None:
            raise ChallengerFailed(str(answer.error)) from answer.error
        if read.messages != duel.prompt.messages:
            raise ChallengerFailed("it read less of the conversation than the champion")

    async def _note_challenger(self, version: str, error: EngineError | None) -> None:
        if self.contest is not None:
            await self.contest.answered(version, error)

    async def make_pair(
        self, messages: Sequence[Message], sampling: Sampling, asker: Asker = ANYBODY
    ) -> tuple[Pair, LeftOut]:
        """Two whole answers to `messages`, stored as a pair, and what of the messages was not read.

        Raises EngineBroken where the server stopped them.
        """
        comparison: Comparison | Place | None = None
        async with aclosing(self.stream_pair(messages, sampling, asker=asker)) as growing:
            async for grown in growing:
                comparison = grown
        if not isinstance(comparison, Comparison) or comparison.pair is None:
            raise EngineBroken(STOPPED)
        return comparison.pair, comparison.first.left_out

    @property
    def slot(self) -> ModelSlot:
        """What serves. Raises EngineBroken where nothing does."""
        if self._slot is None:
            raise EngineBroken("No model is served here. Start the server: make run")
        return self._slot

    def stop(self, turn_id: str) -> None:
        """End the answers that grow, or wait, for a turn, within half a second; where none does this does nothing."""
        if turn_id in self._stops:
            self._stops[turn_id].set()

    async def drain(self, limit_s: float) -> None:
        """Begin no more answers; wait for those being written, for at most `limit_s` seconds; then stop them.

        Those stopped are stored as `cancelled`. Returns once everything is stored.
        """
        self.admission.close()
        if self.admission.decoding:
            log.info("Finishing %d answers, for at most %g s.", self.admission.decoding, limit_s)
        try:
            await asyncio.wait_for(self.admission.idle(), limit_s)
        except TimeoutError:
            log.warning("Stopping %d answers: the limit of %g s is over.", self.admission.decoding, limit_s)
            for stopped in self._stops.values():
                stopped.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.admission.idle(), STOPPING_S)
        await self.settled()

    @asynccontextmanager
    async def _growing(self, turn_id: str | None) -> AsyncGenerator[asyncio.Event, None]:
        """While answers grow, `stop` (by their turn) and `drain` reach them through this event."""
        stopped = asyncio.Event()
        key = turn_id or new_id("answer")
        self._stops[key] = stopped
        try:
            yield stopped
        finally:
            if self._stops.get(key) is stopped:
                del self._stops[key]

    def _note_words(self, *answers: TurnStream) -> None:
        """That an engine writes for people is the best proof that it can."""
        for answer in answers:
            self._watcher.begun(answer)
        self.wrote_at = max((one.wrote_at for one in answers if one.wrote_at is not None), default=self.wrote_at)

    def _account(self, place: Place, asker: Asker, *answers: TurnStream) -> None:
        """What ended answers used, for the budget and the metrics; and how they ended, for who watches."""
        for answer in answers:
            place.charge(answer.tokens)
            self._metrics.answered(answer, asker.route)
            self._watcher.ended(answer, asker.origin)

    async def settled(self) -> None:
        """Wait until everything written so far is stored."""
        if self._recording:
            await asyncio.wait(set(self._recording))

    async def close(self) -> None:
        """Finish what is being stored, then stop the engine."""
        if self._recording:
            await asyncio.wait(set(self._recording), timeout=CLOSING_S)
        if self._slot is not None:
            await self._slot.close()

    def _seeded(self, sampling: Sampling) -> Sampling:
        """The same sampling with a seed of its own where none is given, so that every answer can be drawn again."""
        return sampling if sampling.seed is not None else replace(sampling, seed=self._dice.randrange(MAX_SEED))

    def _in_background(self, keep: Callable[..., None], *what: Any) -> asyncio.Task[None]:
        """Store in a thread, also when the asking task is being cancelled; `settled` waits for all of it."""
        task = asyncio.get_running_loop().create_task(asyncio.to_thread(keep, *what))
        self._recording.add(task)
        task.add_done_callback(self._recorded)
        return task

    def _recorded(self, task: asyncio.Task[None]) -> None:
        self._recording.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("An answer could not be stored: %s", task.exception())

    def _keep_pair(self, pair: Pair, prompt: Prompt) -> None:
        self._store.record_pair(pair, left_out=prompt.left_out.messages)

    def _keep_answer(self, candidate: Candidate, prompt: Prompt, turn_id: str | None) -> None:
        self._store.record_candidate(
            candidate, prompt.messages, turn_id=turn_id, rater=self._rater, left_out=prompt.left_out.messages
        )
        if turn_id is not None and candidate.text and candidate.finish_reason != "error":
            self._store.record_answer(turn_id, candidate.candidate_id)
