"""A turn: messages in, a stream out, and at its end the Candidate that is stored.

`TurnStream` follows one answer of a pinned engine; `merge` follows several at once, for two answers side by side.
Neither pins an engine (the caller does, for as long as it streams) nor writes to the store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Protocol

from chat_app.prompts import LeftOut, Prompt
from chat_app.serving.engine import Chunk, EngineError, Sampling, Usage
from feedback_store.records import Candidate, Message, new_id, now

TICK_S = 1.0
CHARACTERS_A_TOKEN = 4


class Writer(Protocol):
    """What a turn follows: an engine, or a `Prompt` in front of one."""

    @property
    def version(self) -> str: ...
    @property
    def is_alive(self) -> bool: ...
    def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]: ...


class TurnStream:
    """One answer as it is written: iterate over it once, inside `contextlib.aclosing`, then ask for the candidate.

        async with aclosing(TurnStream(engine, messages, sampling)) as turn:
            async for chunk in turn:
                ...
        store.record_candidate(turn.candidate())

    `finish_reason` is None until the end, then what the engine said, `cancelled` when the consumer stopped first, or
    `error` when the stream broke (`error` has the EngineError, which the iteration raises too).
    """

    def __init__(
        self,
        engine: Writer,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.candidate_id = new_id("cand")
        self.version = engine.version
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.error: EngineError | None = None
        self.first_token_ms: float | None = None
        self.latency_ms = 0.0
        self.gaps_s: list[float] = []  # between two pieces of text
        self.wrote_at: float | None = None  # when the last piece of text came, by `clock`
        self._engine = engine
        self._messages = tuple(messages)
        self._sampling = sampling
        self._clock = clock
        self._created_at = now()
        self._chunks = self._follow()

    def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        return self._chunks

    @property
    def messages(self) -> tuple[Message, ...]:
        """What is answered."""
        return self._messages

    @property
    def sampling(self) -> Sampling:
        """How it is drawn."""
        return self._sampling

    @property
    def is_on_own_terms(self) -> bool:
        """Whether the request left to the product how it is drawn: only then it is evidence about the version."""
        return not self._sampling.by_request

    @property
    def engine_is_alive(self) -> bool:
        """Whether the engine could write another one."""
        return self._engine.is_alive

    @property
    def left_out(self) -> LeftOut:
        """What the model did not read, for want of room; final once the first piece has come."""
        return self._engine.left_out if isinstance(self._engine, Prompt) else LeftOut()

    async def aclose(self) -> None:
        """Stop the answer where it is; the engine stops writing. After the end this does nothing."""
        await self._chunks.aclose()
        self.finish_reason = self.finish_reason or "cancelled"

    def note_failure(self) -> None:
        """Who followed it failed: it is stored as broken, never as complete or as stopped by a person."""
        self.finish_reason = "error"

    def candidate(self) -> Candidate:
        """The record of this answer. Ask after the end; an answer nobody waited for is `cancelled`."""
        return Candidate(
            candidate_id=self.candidate_id,
            version=self.version,
            text=self.text,
            finish_reason=self.finish_reason or "cancelled",
            sampling=self._sampling.as_record(),
            seed=self._sampling.seed,
            latency_ms=self.latency_ms,
            created_at=self._created_at,
        )

    @property
    def tokens(self) -> int:
        """Tokens read and written; estimated where the answer ended before the engine counted them."""
        if self.usage is not None:
            return self.usage.prompt_tokens + self.usage.completion_tokens
        pieces = len(self.gaps_s) + (self.first_token_ms is not None)  # engines send about a token at a time
        return sum(len(message["content"]) for message in self._messages) // CHARACTERS_A_TOKEN + pieces

    def _note_piece(self, began: float) -> None:
        if self.wrote_at is None:
            self.first_token_ms = self.latency_ms
        else:
            self.gaps_s.append(began + self.latency_ms / 1000 - self.wrote_at)
        self.wrote_at = began + self.latency_ms / 1000

    async def _follow(self) -> AsyncGenerator[Chunk, None]:
        began = self._clock()
        try:
            async with aclosing(self._engine.stream(self._messages, self._sampling)) as chunks:
                async for chunk in chunks:
                    self.latency_ms = (self._clock() - began) * 1000
                    if chunk.text:
                        self._note_piece(began)
                    self.text += chunk.text
                    self.finish_reason = chunk.finish_reason
                    self.usage = chunk.usage or self.usage
                    yield chunk
        except EngineError as error:
            self.error, self.finish_reason = error, "error"
            raise
        except (GeneratorExit, asyncio.CancelledError):
            self.finish_reason = self.finish_reason or "cancelled"
            raise
        except Exception:
            self.finish_reason = (
                "error"  # also where the engine had said `stop`: our own fault, and the end is not known
            )
            raise
        finally:
            self.latency_ms = (self._clock() - began) * 1000
            self.finish_reason = self.finish_reason or "error"


async def merge(turns: Sequence[TurnStream], *, tick_s: float = TICK_S) -> AsyncGenerator[tuple[int, str], None]:
    """Follow several turns at once: (index, text so far) whenever a turn has news.

    A slow consumer gets the newest text, not every step of it. Where nothing happens for `tick_s` seconds the first
    turn's text is given again, so that a consumer who went away is noticed. A turn that breaks does not stop the
    others: look at its `error` at the end. Closing this generator (use `aclosing`) or cancelling it stops all turns.
    """
    news: set[int] = set()
    wake = asyncio.Event()

    async def pump(index: int, turn: TurnStream) -> None:
        with suppress(EngineError):  # kept in turn.error
            async for _ in turn:
                news.add(index)
                wake.set()

    pumps = [asyncio.create_task(pump(index, turn)) for index, turn in enumerate(turns)]
    for task in pumps:
        task.add_done_callback(lambda _: wake.set())
    try:
        while news or not all(task.done() for task in pumps):
            with suppress(TimeoutError):
                async with asyncio.timeout(tick_s):  # not wait_for: that makes a task for every token
                    await wake.wait()
            wake.clear()
            fresh = sorted(news) or [0]
            news.clear()
            for index in fresh:
                yield index, turns[index].text
        for task in pumps:
            task.result()  # anything but an EngineError is our own bug and must be seen
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for turn in turns:
            await turn.aclose()
