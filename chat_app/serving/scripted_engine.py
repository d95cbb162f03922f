"""An engine without a model, for tests, demos and smoke checks: answers follow from version, messages and seed.

Two seeds always give two different answers, every answer names its version (a swap can be seen), and it ends with
`stop`, or with `length` when max_tokens words are reached. Nothing here is random and nothing is learnt.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Sequence

from chat_app.serving.engine import Chunk, EngineBroken, EngineStartFailed, Sampling, ServedVersion, Usage
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


class ScriptedEngine:
    """Deterministic answers; `delay_s` is the wait before each word, so that streaming can be watched."""

    def __init__(self, version: str, *, delay_s: float = 0.0) -> None:
        self._version = version
        self._delay_s = delay_s
        self._alive = True

    @property
    def version(self) -> str:
        return self._version

    @property
    def is_alive(self) -> bool:
        return self._alive

    @property
    def context_tokens(self) -> None:
        return None

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """Stream the scripted answer word by word. Raises EngineBroken once the engine is closed."""
        words, finish_reason = _cut(_script(self._version, messages, sampling.seed), sampling)
        for word in words:
            await asyncio.sleep(self._delay_s)
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
            chunk.text async for chunk in self.stream([{"role": "user", "content": "Hello"}], Sampling(max_tokens=8))
        ]
        if self._version not in "".join(said):
            raise EngineStartFailed(f"the scripted engine of {self._version} does not name its version: {said!r}")

    async def close(self) -> None:
        self._alive = False

    def _require_alive(self) -> None:
        if not self._alive:
            raise EngineBroken(f"the scripted engine of {self._version} was closed before the answer was complete")


async def build_scripted_engine(served: ServedVersion, *, delay_s: float = 0.0) -> ScriptedEngine:
    """The builder a ModelSlot is given where no model is wanted."""
    return ScriptedEngine(served.version, delay_s=delay_s)


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
