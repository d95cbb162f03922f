"""Answers: from messages to a stored candidate, or to a stored pair, by the engine that is served.

Where it sits: asked by `operations.py` and `api.py`; pins an engine in `slot.py`, follows it in `turns.py`, stores
what it wrote. Whoever leaves early leaves what was written, as `cancelled`.
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from chat_app.pairs import shuffle
from chat_app.prompts import LeftOut, Prompt, fit
from chat_app.serving.engine import MAX_SEED, EngineBroken, Sampling
from chat_app.serving.slot import ModelSlot
from chat_app.turns import TurnStream, merge
from feedback_store.records import Candidate, Message, Pair, new_id, now
from feedback_store.store import FeedbackStore

log = logging.getLogger(__name__)

CLOSING_S = 10.0
TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers as they grow, in shown order; `pair` is there once both are complete and stored."""

    first: TurnStream
    second: TurnStream
    pair: Pair | None = None


class Answers:
    """Writes answers and keeps them. `slot` is None where nothing is served (a command on the data directory)."""

    def __init__(self, store: FeedbackStore, slot: ModelSlot | None, rater: str) -> None:
        self._store = store
        self._slot = slot
        self._rater = rater
        self._recording: set[asyncio.Task[None]] = set()
        self._stops: dict[str, asyncio.Event] = {}  # turn id → set to end its growing answers
        self._dice = random.SystemRandom()

    async def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        turn_id: str | None = None,
        version: str | None = None,
    ) -> AsyncGenerator[TurnStream, None]:
        """Answer `messages`: yields the growing answer; at the end it is stored, with the turn if any.

        The champion, or a version served beside it, is pinned at the start. Leaving early, or `stop`, stores what was
        written, as `cancelled`. Raises EngineError.
        """
        async with self.slot.pin(version) as engine, self._growing(turn_id) as stopped:
            prompt = await fit(engine, messages, sampling)
            answer = TurnStream(prompt, prompt.messages, self._seeded(sampling))
            try:
                async with aclosing(merge((answer,), tick_s=TICK_S)) as growing:
                    async for _ in growing:
                        yield answer
                        if stopped.is_set():
                            break
            finally:
                keeping = self._in_background(self._keep_answer, answer.candidate(), prompt, turn_id)
            if answer.error is not None:
                raise answer.error
        await asyncio.shield(keeping)

    async def answer(self, messages: Sequence[Message], sampling: Sampling, version: str | None = None) -> TurnStream:
        """Answer `messages` whole; stored like a streamed one."""
        answer = None
        async with aclosing(self.stream(messages, sampling, version=version)) as growing:
            async for grown in growing:
                answer = grown
        assert answer is not None  # an engine's stream ends with a finish_reason or raises
        return answer

    async def stream_pair(
        self, messages: Sequence[Message], sampling: Sampling, turn_id: str | None = None
    ) -> AsyncGenerator[Comparison, None]:
        """Two answers to `messages`, growing together, blind, in random order; the last one yielded has the pair.

        Leaving early, or `stop`, stores both answers as `cancelled`, and no pair. Raises EngineError.
        """
        async with self.slot.pin() as engine, self._growing(turn_id) as stopped:
            one = self._seeded(sampling)
            other = replace(one, seed=((one.seed or 0) + 1) % MAX_SEED)
            prompt = await fit(engine, messages, sampling)
            first, second = (TurnStream(prompt, prompt.messages, draw) for draw in shuffle((one, other), self._dice))
            complete = False
            try:
                async with aclosing(merge((first, second), tick_s=TICK_S)) as growing:
                    async for _ in growing:
                        yield Comparison(first, second)
                        if stopped.is_set():
                            return
                broken = first.error or second.error
                if broken is not None:
                    raise broken
                complete = True
            finally:
                if not complete:
                    for answer in (first, second):
                        self._in_background(self._keep_answer, answer.candidate(), prompt, None)
        pair = Pair(new_id("pair"), prompt.messages, first.candidate(), second.candidate(), turn_id, self._rater, now())
        await asyncio.shield(self._in_background(self._keep_pair, pair, prompt))
        yield Comparison(first, second, pair)

    async def make_pair(self, messages: Sequence[Message], sampling: Sampling) -> tuple[Pair, LeftOut]:
        """Two whole answers to `messages`, stored as a pair, and what of the messages was not read."""
        comparison = None
        async with aclosing(self.stream_pair(messages, sampling)) as growing:
            async for grown in growing:
                comparison = grown
        assert comparison is not None
        assert comparison.pair is not None
        return comparison.pair, comparison.first.left_out

    @property
    def slot(self) -> ModelSlot:
        """What serves. Raises EngineBroken where nothing does."""
        if self._slot is None:
            raise EngineBroken("No model is served here. Start the server: make run")
        return self._slot

    def stop(self, turn_id: str) -> None:
        """End the answers that grow for a turn, within half a second; where none grows this does nothing."""
        if turn_id in self._stops:
            self._stops[turn_id].set()

    @asynccontextmanager
    async def _growing(self, turn_id: str | None) -> AsyncGenerator[asyncio.Event, None]:
        """While answers of a turn grow, `stop` reaches them through this event."""
        stopped = asyncio.Event()
        if turn_id is None:
            yield stopped
            return
        self._stops[turn_id] = stopped
        try:
            yield stopped
        finally:
            if self._stops.get(turn_id) is stopped:
                del self._stops[turn_id]

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
