"""The port every engine stands behind: what goes in (`Sampling`), what comes out (`Chunk`), what can go wrong.

    EngineError
    ├── EngineStartFailed   the engine could not be started, or its check failed
    │   ├── NoRoom          there is not enough memory for another engine beside those that run
    │   └── VersionUnservable  this engine can never serve that version
    ├── EngineBroken        a stream ended without a finish_reason, or the engine is gone
    │   ├── EngineTimeout   nothing came within the time allowed
    │   └── Crowded         its memory is full of other answers
    ├── EngineRefused       the engine answered with an error that is none of the others
    │   ├── VersionNotServed   that version is not among those that are served now
    │   └── BadMessages     the request itself is what it refuses: an order of roles, say
    ├── EngineBusy          too many requests: here, or at the engine; says when to come back
    ├── ContextOverflow     the conversation is longer than the model can read
    └── BadSampling         a sampling value outside its limits

What the request itself is to blame for is `CLIENTS_FAULT`; what says nothing about the version is `NOT_ITS_FAULT`.
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
MAX_TOKENS = 1_000_000  # more than any model writes
SHOWN_ROLES = 12


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
    """Nothing came within the time allowed. The answer is not complete.

    `by_length`: the engine wrote all the time and the answer was too long, or so was the prompt it had to read first.
    """

    def __init__(self, message: str, *, by_length: bool = False) -> None:
        self.by_length = by_length
        super().__init__(message)


class Crowded(EngineBroken):
    """There is no room left beside the other answers that are being written. The answer is not complete."""


class EngineRefused(EngineError):
    """The engine answered a request with an error of its own."""


class VersionNotServed(EngineRefused):
    """That version is not among those that are served now."""


class BadMessages(EngineRefused):
    """The engine refuses the request itself, in its words `said`, and would refuse it as any version.

    `index`: the first message that its chat template does not take, None where that is not known; `roles` of all.
    """

    def __init__(self, who: str, said: str, roles: Sequence[str], index: int | None = None) -> None:
        self.who, self.said, self.roles, self.index = who, said, tuple(roles), index
        super().__init__(self._sentence())

    def at(self, index: int | None, roles: Sequence[str]) -> BadMessages:
        """The same error in a list of messages with these roles, where the message is the one at `index`."""
        return BadMessages(self.who, self.said, roles, index)

    def _sentence(self) -> str:
        if self.index is None:
            return f"{self.who} refuses these messages (roles: {_listed(self.roles)}): {self.said}"
        before = f"after {self.roles[self.index - 1]}" if self.index else "first"
        return (
            f"messages[{self.index}] ({self.roles[self.index]}, {before}) is refused by the chat template of "
            f"{self.who} (roles: {_listed(self.roles)}): {self.said}"
        )


def _listed(roles: Sequence[str]) -> str:
    shown = ", ".join(roles[:SHOWN_ROLES])
    return shown if len(roles) <= SHOWN_ROLES else f"{shown}, and {len(roles) - SHOWN_ROLES} more"


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


CLIENTS_FAULT = (BadMessages, ContextOverflow, BadSampling)
"""What a request is refused for that any version would refuse."""

NOT_ITS_FAULT = (*CLIENTS_FAULT, EngineBusy, Crowded)
"""What says nothing about the version that was asked: its client's fault, or nobody's."""


def is_its_fault(error: EngineError, *, on_own_terms: bool) -> bool:
    """Whether a failure says something about the version; an answer may be as long in coming as its request has it."""
    if isinstance(error, EngineTimeout):
        return on_own_terms and not error.by_length
    return not isinstance(error, NOT_ITS_FAULT)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw an answer.

    temperature 0 is greedy; top_p is in (0, 1]; max_tokens is at least 1; seed None means any. `by_request` names what
    the request chose itself, other than the product would have: an answer drawn so is no evidence about its version.
    Raises BadSampling with the value and its limits.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 1024
    seed: int | None = None
    stop: tuple[str, ...] = ()
    by_request: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _within("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise BadSampling("top_p is 0, it must be above 0 and at most 1")
        _whole("max_tokens", self.max_tokens, 1, MAX_TOKENS)
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
            **({"by_request": list(self.by_request)} if self.by_request else {}),
        }


def _within(name: str, value: object, low: float, high: float) -> None:
    """Refuse anything but a finite number in [low, high]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise BadSampling(f"{name} is {value!r}, it must be a number from {low:g} to {high:g}")


def _whole(name: str, value: object, low: int, high: int) -> None:
    """Refuse anything but a whole number in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadSampling(f"{name} is {value!r}, it must be a whole number from {low} to {high}")


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
