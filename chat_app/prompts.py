"""What the model reads: the messages as they were typed, less what no longer fits, with control text broken.

    messages ─► fit: the oldest turns are left out until prompt and answer fit ─► Prompt ─► TurnStream, engine

Where it sits: between `answers.py` and the pinned engine; the one place where messages become what an engine is
given. What is stored is `Prompt.messages`: what was read, as it was typed. Who the control text belongs to and how it
is broken stands in `feedback_store/control_text.py`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from chat_app.serving.engine import BadMessages, BadSampling, Chunk, ContextOverflow, Engine, Sampling
from feedback_store.control_text import neutralised
from feedback_store.records import Message

ANSWER_SHARE = 4  # at most a quarter of the context is kept for the answer
RETRIES = 3
# More than any chat template adds: to a conversation (its own system prompt), and to each message.
TEMPLATE_TOKENS, MESSAGE_TOKENS = 256, 32


@dataclass(frozen=True, slots=True)
class LeftOut:
    """How much of the beginning of a conversation the model did not read; `tokens` None where nobody counted."""

    messages: int = 0
    tokens: int | None = None

    def as_body(self) -> dict[str, int | None]:
        return {"messages": self.messages, "tokens": self.tokens}


def left_out_sentence(messages: int) -> str:
    """The line above an answer that was written without the first `messages` messages."""
    if messages == 1:
        return "The first message no longer fits and was left out of this answer."
    return f"The first {messages} messages no longer fit and were left out of this answer."


async def fit(engine: Engine, messages: Sequence[Message], sampling: Sampling) -> Prompt:
    """The prompt for one answer, or for both of a pair: system messages, the last message, and the turns that fit.

    Raises ContextOverflow where the last message alone does not fit, BadSampling where a request asks for more tokens
    than the model can have, and EngineError.
    """
    prompt = Prompt(engine, messages, await engine.control_markers())
    if engine.context_tokens is not None:
        if "max_tokens" in sampling.by_request and sampling.max_tokens > engine.context_tokens:
            raise BadSampling(
                f"max_tokens is {sampling.max_tokens}, but {engine.version} reads and writes at most "
                f"{engine.context_tokens} tokens: ask for no more than that, or leave max_tokens out"
            )
        kept_for_answer = min(sampling.max_tokens, engine.context_tokens // ANSWER_SHARE)
        await prompt.make_room(engine.context_tokens, kept_for_answer)
    return prompt


class Prompt:
    """A pinned engine and what it is asked, for a `TurnStream` to follow. Made by `fit`.

    `messages` is what is read, as typed; it is final once the first piece of the answer has come.
    """

    def __init__(self, engine: Engine, messages: Sequence[Message], markers: frozenset[str]) -> None:
        self.messages = tuple(messages)
        self._engine = engine
        self._markers = markers
        self._all = self.messages
        self._turns = _old_turns(self._all)
        self._counted: dict[int, int] = {}  # number of messages → tokens of the prompt they make

    @property
    def version(self) -> str:
        """The version that answers."""
        return self._engine.version

    @property
    def is_alive(self) -> bool:
        """Whether the engine that answers lives."""
        return self._engine.is_alive

    @property
    def left_out(self) -> LeftOut:
        """What of the conversation is not read."""
        missing = len(self._all) - len(self.messages)
        whole, read = self._counted.get(len(self._all)), self._counted.get(len(self.messages))
        return LeftOut(missing, None if whole is None or read is None else whole - read)

    async def make_room(self, context_tokens: int, kept_for_answer: int) -> None:
        """Leave out as few of the oldest turns as it takes. Raises ContextOverflow, EngineError."""
        room = context_tokens - kept_for_answer
        if self._tokens_at_most() <= room or (await self._count(0) or 0) <= room:
            return
        shortest = await self._count(len(self._turns)) or 0
        if shortest > room:
            raise ContextOverflow(shortest, context_tokens, kept_for_answer)
        low, high = 1, len(self._turns)
        while low < high:
            middle = (low + high) // 2
            if (await self._count(middle) or 0) <= room:
                high = middle
            else:
                low = middle + 1
        self.messages = self._without(low)

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """Stream one answer to `messages`, with control text broken.

        Where the engine finds them too long before it has begun, it is asked again with fewer, `RETRIES` times.
        Raises EngineError.
        """
        retries = RETRIES
        while True:
            begun = False
            try:
                async with aclosing(self._engine.stream(neutralised(messages, self._markers), sampling)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except ContextOverflow as error:
                shorter = self._shorter(messages, error, last=retries == 1)
                if begun or not retries or shorter is None:
                    raise
                retries -= 1
                messages = shorter
                self.messages = min(self.messages, messages, key=len)
            except BadMessages as error:
                raise self._as_typed(error, len(messages)) from error

    def _shorter(
        self, messages: Sequence[Message], error: ContextOverflow, *, last: bool
    ) -> tuple[Message, ...] | None:
        """Fewer messages than these: by the engine's own numbers, else half of the old turns; at last, none of them."""
        gone = next(number for number in range(len(self._turns) + 1) if len(self._without(number)) == len(messages))
        if gone == len(self._turns):
            return None
        fewest = gone + math.ceil((len(self._turns) - gone) / 2)
        if 0 < error.limit < error.prompt_tokens:
            room = error.limit * (ANSWER_SHARE - 1) / ANSWER_SHARE / error.prompt_tokens * _size(messages)
            fits = (number for number in range(gone + 1, len(self._turns)) if _size(self._without(number)) <= room)
            fewest = next(fits, len(self._turns))
        return self._without(len(self._turns) if last else fewest)

    def _as_typed(self, error: BadMessages, read: int) -> BadMessages:
        """A refusal of the `read` messages that were asked about, with its place among all messages."""
        turns = next(number for number in range(len(self._turns) + 1) if len(self._without(number)) == read)
        gone = {index for turn in self._turns[:turns] for index in turn}
        there = [index for index in range(len(self._all)) if index not in gone]
        return error.at(None if error.index is None else there[error.index], [one["role"] for one in self._all])

    def _without(self, turns: int) -> tuple[Message, ...]:
        """The messages without the oldest turns."""
        gone = {index for turn in self._turns[:turns] for index in turn}
        return tuple(message for index, message in enumerate(self._all) if index not in gone)

    def _tokens_at_most(self) -> int:
        """No token is shorter than a byte, so this many tokens are never exceeded."""
        return _size(neutralised(self._all, self._markers)) + TEMPLATE_TOKENS + MESSAGE_TOKENS * len(self._all)

    async def _count(self, turns: int) -> int | None:
        messages = self._without(turns)
        try:
            tokens = await self._engine.prompt_tokens(neutralised(messages, self._markers))
        except BadMessages as error:
            raise self._as_typed(error, len(messages)) from error
        if tokens is not None:
            self._counted[len(messages)] = tokens
        return tokens


def _old_turns(messages: Sequence[Message]) -> list[list[int]]:
    """The turns that may be left out, oldest first, as indexes: a user message and the answers to it."""
    turns: list[list[int]] = []
    for index, message in enumerate(messages[:-1]):
        if message["role"] == "user" or (message["role"] == "assistant" and not turns):
            turns.append([])
        if message["role"] != "system":
            turns[-1].append(index)
    return turns


def _size(messages: Sequence[Message]) -> int:
    """UTF-8 bytes of the contents."""
    return sum(len(message["content"].encode()) for message in messages)
