"""The port every engine stands behind: what goes in (`Sampling`), what comes out (`Chunk`), what can go wrong.

    EngineError
    ├── EngineStartFailed   the engine could not be started, or its check failed
    │   ├── NoRoom          there is not enough memory for another engine beside those that run
    │   └── VersionUnservable  this engine can never serve that version
    ├── EngineBroken        a stream ended without a finish_reason, or the engine is gone
    │   └── EngineTimeout   nothing came within the time allowed
    ├── EngineRefused       the engine answered with an error that is none of the others
    │   └── VersionNotServed   that version is not among those that are served now
    ├── EngineBusy          too many requests: here, or at the engine; says when to come back
    ├── ContextOverflow     the conversation is longer than the model can read
    └── BadSampling         a sampling value outside its limits

One engine is one version for all its life. Swapping versions is the work of `slot.py`; turning a stream into a
stored answer is that of `chat_app/turns.py`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from feedback_store.records import Message

MAX_TEMPERATURE = 2.0
MAX_SEED = 2**32 - 2  # 2**32 - 1 means "any seed" to llama-server
MAX_STOPS = 16


class EngineError(Exception):
    """The root of what an engine can raise."""


class EngineStartFailed(EngineError):
    """The engine could not be started, or its check failed."""


class NoRoom(EngineStartFailed):
    """There is not enough memory for another engine beside those that run."""


class VersionUnservable(EngineStartFailed):
    """This engine can never serve that version: another base, no adapter in its form, or none can be loaded."""


class EngineBroken(EngineError):
    """A stream ended without a finish_reason, or the engine is gone. The answer is not complete."""


class EngineTimeout(EngineBroken):
    """Nothing came within the time allowed. The answer is not complete."""


class EngineRefused(EngineError):
    """The engine answered a request with an error of its own."""


class VersionNotServed(EngineRefused):
    """That version is not among those that are served now."""


class EngineBusy(EngineError):
    """Too many requests at once. `retry_after_s`: when to come back; `yours`: they are the caller's own."""

    def __init__(self, message: str, retry_after_s: float, *, yours: bool = False) -> None:
        self.retry_after_s = retry_after_s
        self.yours = yours
        super().__init__(message)


class ContextOverflow(EngineError):
    """The conversation has more tokens than the model can read; `kept_for_answer` of them may be the answer's."""

    def __init__(self, prompt_tokens: int, limit: int, kept_for_answer: int = 0) -> None:
        self.prompt_tokens = prompt_tokens
        self.limit = limit
        kept = f" and {kept_for_answer} of them are kept for the answer" if kept_for_answer else ""
        super().__init__(
            f"the conversation has {prompt_tokens} tokens, the model reads at most {limit}{kept}: "
            "start a new conversation or shorten the message"
        )


class BadSampling(EngineError):
    """A sampling value outside its limits."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw an answer.

    temperature 0 is greedy; top_p is in (0, 1]; max_tokens is at least 1; seed None means any.
    Raises BadSampling with the value and its limits.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 1024
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _within("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise BadSampling("top_p is 0, it must be above 0 and at most 1")
        _whole("max_tokens", self.max_tokens, 1, None)
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED)
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise BadSampling(f"stop is {self.stop!r}, it must be at most {MAX_STOPS} texts, none of them empty")

    def as_record(self) -> dict[str, object]:
        """The values as a Candidate stores them (the seed has a field of its own there)."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
        }


def _within(name: str, value: object, low: float, high: float) -> None:
    """Refuse anything but a finite number in [low, high]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise BadSampling(f"{name} is {value!r}, it must be a number from {low:g} to {high:g}")


def _whole(name: str, value: object, low: int, high: int | None) -> None:
    """Refuse anything but a whole number in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise BadSampling(f"{name} is {value!r}, it must be a whole number {limit}")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and tokens written for one answer."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one of a stream, and only that one, has a finish_reason."""

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Canary:
    """A prompt, and how its greedy answer begins where the version is served as it was evaluated.

    `begins` ends before the first token that was no clear winner, so that engines which round otherwise agree on it.
    `prompt` is what the chat template made of the messages; None where that is not always the same text.
    """

    messages: tuple[Message, ...]
    begins: str
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """What to serve. Each engine takes the form it can read: GGUF files, or a directory (or hub id) and PEFT adapter.

    Without an adapter the version is the base itself, unless it is a whole model of its own: then `checkpoint` is its
    directory, and `base_gguf` the same as GGUF, None where it has no such form.
    """

    version: str
    base_gguf: Path | None = None
    adapter_gguf: Path | None = None
    base_model: str | None = None
    adapter_directory: Path | None = None
    checkpoint: Path | None = None
    canaries: tuple[Canary, ...] = ()


class Engine(Protocol):
    """Something that writes answers as one version."""

    @property
    def version(self) -> str:
        """The version that writes."""

    @property
    def is_alive(self) -> bool:
        """False once the engine can never answer again (closed, or its process died)."""

    @property
    def context_tokens(self) -> int | None:
        """How many tokens prompt and answer may have together; None where the engine cannot say."""

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """Stream one answer; closing the generator early stops the work. Raises EngineError."""

    async def prompt_tokens(self, messages: Sequence[Message]) -> int | None:
        """The tokens of the prompt these messages make; None where the engine cannot say. Raises EngineError."""

    async def control_markers(self) -> frozenset[str]:
        """What must not stand in a message as it is: special tokens and role markers, made by
        `feedback_store.control_text`; its `FLOOR` where the engine cannot say. Raises EngineError.
        """

    async def check(self) -> None:
        """Write a few tokens for real. Raises EngineError when that fails."""

    async def close(self) -> None:
        """Stop for ever; running streams break. Closing twice does nothing."""


@runtime_checkable
class ShowsPrompt(Protocol):
    """What an engine can do beside the port: show what its chat template makes of messages."""

    async def prompt_text(self, messages: Sequence[Message]) -> str:
        """The prompt, without a first token that the tokenizer adds by itself. Raises EngineError."""


EngineBuilder = Callable[[ServedVersion], Awaitable[Engine]]
