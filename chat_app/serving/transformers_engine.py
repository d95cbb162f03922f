"""The in-process engine: any model that transformers loads, on the GPU where there is one; versions side by side.

A version's engine is a handle: its adapter on a base that all versions of this process share (`model_host.py`), where
one worker writes all answers together (`batch.py`). The last handle that closes frees the base. Only this engine
imports torch into the server.

Measured on a CPU; written for a GPU too, where it has not been run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

from chat_app.serving.answer_text import AnswerText
from chat_app.serving.batch import Request
from chat_app.serving.engine import (
    BadMessages,
    Chunk,
    ContextOverflow,
    EngineBroken,
    EngineError,
    EngineStartFailed,
    EngineTimeout,
    Sampling,
    ServedVersion,
    VersionUnservable,
)
from chat_app.serving.model_host import ModelHost
from chat_app.serving.roles import first_refused
from chat_app.serving.sampler import dice
from feedback_store.records import Message

SILENCE_LIMIT_S = 300.0  # between two pieces of a stream, waiting for a place included

Pieces = asyncio.Queue[Chunk | EngineError]


class TransformersEngine:
    """A version on a shared base. Made by `TransformersEngines`."""

    def __init__(
        self, version: str, host: ModelHost, adapter: str | None, release: Callable[[ModelHost], Awaitable[None]]
    ) -> None:
        self._version = version
        self._host = host
        self._adapter = adapter
        self._release = release
        self._running: dict[Request, Pieces] = {}
        self._is_closed = False

    @property
    def version(self) -> str:
        return self._version

    @property
    def is_alive(self) -> bool:
        return not self._is_closed and self._host.is_alive

    @property
    def context_tokens(self) -> int:
        return self._host.context_tokens

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """Stream one answer. Closing the generator takes its row out of the batch before the next step.

        Raises ContextOverflow, BadMessages, EngineBroken, EngineTimeout.
        """
        request, pieces = self._request(await self._prompt(messages), sampling)
        self._require_open()
        self._running[request] = pieces
        try:
            self._host.submit(request)
            while True:
                piece = await self._next(pieces)
                if isinstance(piece, EngineError):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            request.is_left = True
            del self._running[request]

    async def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """The tokens of the prompt these messages make. Raises EngineError."""
        return len(await self._prompt(messages))

    async def control_markers(self) -> frozenset[str]:
        """From the base's tokenizer and chat template; found out once."""
        return await asyncio.to_thread(self._host.control_markers)

    async def check(self) -> None:
        """Write up to 8 tokens greedily. Raises EngineError."""
        hello: Message = {"role": "user", "content": "Say hello."}
        said = "".join([chunk.text async for chunk in self.stream([hello], Sampling(temperature=0, max_tokens=8))])
        if not said.strip():
            raise EngineStartFailed(f"{self.version} answers nothing to {hello['content']!r}")

    async def close(self) -> None:
        """Break the running streams, take the adapter away; the last engine on a base frees it."""
        if self._is_closed:
            return
        self._is_closed = True
        for request, pieces in self._running.items():
            request.is_left = True
            pieces.put_nowait(EngineBroken(f"the engine of {self.version} was closed: the answer is not complete"))
        if self._adapter is not None:
            with suppress(EngineBroken):  # a host that is gone has no adapters either
                await asyncio.to_thread(self._host.remove_adapter, self._adapter)
        await self._release(self._host)

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineBroken(f"the engine of {self.version} was closed")

    async def _prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        self._require_open()
        try:
            return await asyncio.to_thread(self._host.encode, messages)
        except BadMessages as error:
            raise error.at(await first_refused(messages, self._reads), error.roles) from error

    async def _reads(self, messages: Sequence[Message]) -> bool:
        try:
            await asyncio.to_thread(self._host.encode, messages)
        except BadMessages:
            return False
        return True

    def _request(self, prompt: tuple[int, ...], sampling: Sampling) -> tuple[Request, Pieces]:
        """What the batch needs to write an answer, and where its pieces arrive. Raises ContextOverflow."""
        if len(prompt) >= self.context_tokens:
            raise ContextOverflow(len(prompt), self.context_tokens)
        loop, pieces = asyncio.get_running_loop(), Pieces()

        def emit(piece: Chunk | EngineError) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        request = Request(
            prompt=prompt,
            adapter=self._adapter,
            sampling=sampling,
            limit=min(sampling.max_tokens, self.context_tokens - len(prompt)),
            text=AnswerText(self._host.decode, sampling.stop),
            dice=dice(sampling.seed),
            emit=emit,
        )
        return request, pieces

    async def _next(self, pieces: Pieces) -> Chunk | EngineError:
        try:
            async with asyncio.timeout(SILENCE_LIMIT_S):
                return await pieces.get()
        except TimeoutError as error:
            raise EngineTimeout(f"{self.version} wrote nothing for {SILENCE_LIMIT_S:g} s") from error


class TransformersEngines:
    """Builds the engines, each base loaded once. All methods belong to one event loop."""

    def __init__(self, *, precision: str = "auto", threads: int | None = None) -> None:
        self._open_host = partial(ModelHost, precision=precision, threads=threads)
        self._hosts: dict[ModelHost, int] = {}  # how many engines share it
        self._lock = asyncio.Lock()

    async def build(self, served: ServedVersion) -> TransformersEngine:
        """An engine for the version, its base loaded where it is not. Raises EngineStartFailed and its kinds."""
        building = asyncio.create_task(self._build(served))
        try:
            return await asyncio.shield(building)
        except asyncio.CancelledError:
            with suppress(EngineError):  # a thread cannot be stopped: what it loads is given back when it is there
                await (await building).close()
            raise

    async def _build(self, served: ServedVersion) -> TransformersEngine:
        if served.base_model is None:
            raise VersionUnservable(f"{served.version} names no directory or hub id: this engine cannot serve it")
        host = await self._share(served.base_model)
        try:
            adapter = None
            if served.adapter_directory is not None:
                adapter = await asyncio.to_thread(host.add_adapter, served.adapter_directory, served.version)
        except BaseException:  # nobody else knows of this share
            await self._leave(host)
            raise
        return TransformersEngine(served.version, host, adapter, self._leave)

    async def _share(self, base_model: str) -> ModelHost:
        """The living host of a base, loaded where there is none."""
        async with self._lock:
            host = next((host for host in self._hosts if host.name == base_model and host.is_alive), None)
            if host is None:
                host = await asyncio.to_thread(self._open_host, base_model)
            self._hosts[host] = self._hosts.get(host, 0) + 1
            return host

    async def _leave(self, host: ModelHost) -> None:
        """One engine less; the last one closes the host."""
        async with self._lock:
            self._hosts[host] -= 1
            if self._hosts[host] == 0:
                del self._hosts[host]
                await asyncio.to_thread(host.close)
