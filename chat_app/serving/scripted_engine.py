"""An engine without a model, for tests, demos and smoke checks: answers follow from version, messages and seed.

Two seeds always give two different answers, every answer names its version (a swap can be seen), and it ends with
`stop`, or with `length` when max_tokens words are reached. Nothing here is random and nothing is learnt. What can go
wrong with a real engine goes wrong here on demand: `Fault`, given to the builder for the versions that are to have it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from enum import Enum, auto

from chat_app.serving.engine import Chunk, EngineBroken, EngineStartFailed, NoRoom, Sampling, ServedVersion, Usage
from feedback_store.control_text import FLOOR
from feedback_store.records import Message

_THOUGHTS = (
    "Begin with the smallest part that works.",
    "Write down what you know before you guess the rest.",
    "Ask one person who has done it already.",
    "Give it a day, then look at it again.",
    "Keep the first step so short that you can do it now.",
    "Try it once on something that does not matter.",
    "Compare two ways and keep the one you can explain.",
    "Leave out what nobody would miss.",
)
_ENDINGS = ("That is all you need for a start.", "The rest follows from there.", "You can always change it later.")


class Fault(Enum):
    """What goes wrong with a version: while it starts, or in every answer of more than `CHECK_WORDS` words."""

    FAILS_TO_START = auto()
    NO_ROOM = auto()
    HANGS_IN_START = auto()
    FAILS_ITS_CHECK = auto()
    DIES = auto()  # in the middle of an answer, and stays dead
    STALLS = auto()  # in the middle of an answer
    BREAKS_OFF = auto()  # in the middle of an answer, and lives on
    FAILS_AT_ONCE = auto()  # before the first word of an answer, and lives on
    EMPTY = auto()
    SLOW = auto()  # the first word of an answer comes `SLOW_S` late
    REPEATS = auto()  # goes round in circles
    DOUBLES = auto()  # says everything twice as long, in other words


CHECK_WORDS = 8  # as many as the check asks for; in answers this short nothing goes wrong
SLOW_S = 1.5
CIRCLES = 8


class ScriptedEngine:
    """Deterministic answers; `delay_s` is the wait before each word, so that streaming can be watched."""

    def __init__(self, version: str, *, delay_s: float = 0.0, fault: Fault | None = None) -> None:
        self._version = version
        self._delay_s = delay_s
        self._fault = fault
        self._closing = asyncio.Event()

    @property
    def version(self) -> str:
        return self._version

    @property
    def is_alive(self) -> bool:
        return not self._closing.is_set()

    @property
    def context_tokens(self) -> None:
        return None

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """Stream the scripted answer word by word. Raises EngineBroken once the engine is closed."""
        script = _script(self._version, messages, sampling.seed)
        if sampling.max_tokens > CHECK_WORDS:
            script = await self._spoilt(script)
        words, finish_reason = _cut(script, sampling)
        for written, word in enumerate(words):
            await asyncio.sleep(self._delay_s)
            if written == CHECK_WORDS:
                await self._suffer()
            self._require_alive()
            yield Chunk(word)
        self._require_alive()
        yield Chunk("", finish_reason, Usage(await self.prompt_tokens(messages), len(words)))

    async def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Words stand for tokens here."""
        return sum(len(message["content"].split()) for message in messages)

    async def control_markers(self) -> frozenset[str]:
        return FLOOR

    async def check(self) -> None:
        """Write eight words and see that they name the version. Raises EngineStartFailed."""
        said = [
            chunk.text
            async for chunk in self.stream([{"role": "user", "content": "Hello"}], Sampling(max_tokens=CHECK_WORDS))
        ]
        if self._version not in "".join(said) or self._fault is Fault.FAILS_ITS_CHECK:
            raise EngineStartFailed(f"the scripted engine of {self._version} does not name its version: {said!r}")

    async def close(self) -> None:
        self._closing.set()

    async def _spoilt(self, script: str) -> str:
        """The script as a faulty version says it, after the wait that goes with it. Raises EngineBroken."""
        if self._fault is Fault.FAILS_AT_ONCE:
            raise EngineBroken(f"the scripted engine of {self._version} did not begin its answer")
        if self._fault is Fault.SLOW:
            await asyncio.sleep(SLOW_S)
        opening, _, rest = script.partition(". ")
        spoilt = {
            Fault.EMPTY: "",
            Fault.REPEATS: f"{opening}. " + f"{rest} " * CIRCLES,
            Fault.DOUBLES: f"{script} {' '.join(_THOUGHTS)}",
        }
        return spoilt.get(self._fault, script) if self._fault is not None else script

    async def _suffer(self) -> None:
        """Whatever is to go wrong in the middle of an answer."""
        if self._fault is Fault.DIES:
            self._closing.set()
        elif self._fault is Fault.STALLS:
            await self._closing.wait()
        elif self._fault is Fault.BREAKS_OFF:
            raise EngineBroken(f"the scripted engine of {self._version} broke off its answer")

    def _require_alive(self) -> None:
        if self._closing.is_set():
            raise EngineBroken(f"the scripted engine of {self._version} was closed before the answer was complete")


async def build_scripted_engine(
    served: ServedVersion, *, delay_s: float = 0.0, faults: Mapping[str, Fault] | None = None
) -> ScriptedEngine:
    """The builder a ModelSlot is given where no model is wanted. `faults`: which versions are to have one.

    Raises EngineStartFailed and NoRoom where a fault says so.
    """
    fault = (faults or {}).get(served.version)
    if fault is Fault.FAILS_TO_START:
        raise EngineStartFailed(f"the scripted engine of {served.version} was told to fail")
    if fault is Fault.NO_ROOM:
        raise NoRoom(f"the scripted engine of {served.version} was told that there is no room")
    if fault is Fault.HANGS_IN_START:
        await asyncio.Event().wait()
    return ScriptedEngine(served.version, delay_s=delay_s, fault=fault)


def _script(version: str, messages: Sequence[Message], seed: int | None) -> str:
    """The whole answer. The take number stands in it, so that no two seeds can say the same."""
    take = seed or 0
    dice = hashlib.sha256(json.dumps([version, list(messages), take], sort_keys=True).encode()).digest()
    asked = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    topic = " ".join(asked.split()[:8]) or "nothing yet"
    thoughts = [_THOUGHTS[byte % len(_THOUGHTS)] for byte in dice[: 1 + dice[31] % 4]]
    opening = f"This is {version}, take {take}. You asked: {topic}"
    return " ".join(
        [opening if opening[-1] in ".?!" else opening + ".", *dict.fromkeys(thoughts), _ENDINGS[dice[30] % 3]]
    )


def _cut(script: str, sampling: Sampling) -> tuple[list[str], str]:
    """The words up to the first stop text or max_tokens, and why they end there."""
    ends = [script.find(stop) for stop in sampling.stop if stop in script]
    words = re.findall(r"\S+\s*", script[: min(ends)] if ends else script)
    if len(words) > sampling.max_tokens:
        return words[: sampling.max_tokens], "length"
    return words, "stop"
