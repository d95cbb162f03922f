"""Test support: a model server that imitates vLLM, TGI or llama-server over a real socket, and misbehaves on demand.

No mock of our side: bytes over TCP, read and written by hand, so that it can also send what no HTTP library would.

What it imitates, and where that is written down:
    vLLM   `vllm/entrypoints/openai/models/serving.py` (model cards with owned_by, root, parent, max_model_len; a load
           of a known name is 400, an unload of an unknown one 404), `.../serve/lora/api_router.py` (the two routes
           exist only under VLLM_ALLOW_RUNTIME_LORA_UPDATING; success is plain text), errors
           `{"error": {message, type, code}}`, `docs/features/lora.md`, /tokenize with messages.
    TGI    `router/src/server.rs` (/info, /v1/models with the one model_id, /chat_tokenize, 422 and 424 errors as
           `{"error": text, "error_type"}`), `router/src/lib.rs` (model "tgi" is the base, another name an adapter),
           issue 2505 (an unknown adapter is answered by the base), finish reasons and the stop text in the answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

FOREVER_S = 60.0  # no test waits that long


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    raw: bytes


@dataclass
class StandIn:
    """The server. Change its fields while it runs; `faults` are used up one a chat request."""

    kind: Literal["vllm", "tgi", "openai"] = "vllm"
    model: str = "base-model"
    aliases: tuple[str, ...] = ()
    runtime_lora: bool = True
    launch_adapters: tuple[str, ...] = ()  # TGI
    max_model_len: int = 4096
    key: str | None = None
    words: int = 5
    token_s: float = 0.0
    adapters: dict[str, str] = field(default_factory=dict)
    noise: float = 0.001  # in TGI's log-probabilities
    adapter_error: tuple[int, str] | None = None
    faults: deque[str] = field(default_factory=deque)
    always: str | None = None
    requests: list[Request] = field(default_factory=list)
    open_connections: int = 0
    generating: int = 0
    most_generating: int = 0
    closes_seen: int = 0
    unloaded_while_used: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def of(self, path: str) -> list[Request]:
        """The requests that came for a path."""
        return [request for request in self.requests if request.path == path]

    @property
    def chats(self) -> list[Request]:
        return self.of("/v1/chat/completions")

    # --- one connection --------------------------------------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                request = await _read(reader)
                self.requests.append(request)
                await self._answer(request, reader, writer)
        finally:
            self.open_connections -= 1
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            said = f"Incorrect API key provided: {request.headers.get('authorization')}"
            return await _json(writer, 401, {"error": {"message": said, "type": "invalid_request_error", "code": 401}})
        if request.path == "/v1/chat/completions":
            if (request.body or {}).get("stream"):
                return await self._chat(request.body, reader, writer)
            return await _json(writer, 200, self._whole(request.body))
        status, body = self._route(request)
        return await (_json(writer, status, body) if not isinstance(body, str) else _text(writer, status, body))

    def _route(self, request: Request) -> tuple[int, Any]:
        match self.kind, request.method, request.path:
            case _, "GET", "/v1/models":
                return 200, {"object": "list", "data": self._cards()}
            case "vllm", "GET", "/version":
                return 200, {"version": "0.11.0"}
            case "vllm", method, ("/v1/load_lora_adapter" | "/v1/unload_lora_adapter") if self.runtime_lora:
                if method != "POST":
                    return 405, {"detail": "Method Not Allowed"}
                return self._load(request.body) if "/load" in request.path else self._unload(request.body)
            case "vllm", "POST", "/tokenize":
                return 200, {"count": _count(request.body["messages"]), "max_model_len": self.max_model_len}
            case "tgi", "GET", "/info":
                return 200, {"model_id": self.model, "max_total_tokens": self.max_model_len, "router": "x"}
            case "tgi", "POST", "/chat_tokenize":
                return 200, {"tokenize_response": [{"id": 1}] * _count(request.body["messages"]), "templated_text": ""}
        return 404, {"detail": "Not Found"}

    def _cards(self) -> list[dict[str, Any]]:
        if self.kind == "tgi":
            return [{"id": self.model, "object": "model", "created": 0, "owned_by": self.model}]
        owner = "vllm" if self.kind == "vllm" else "someone"
        rows: list[dict[str, Any]] = [
            {
                "id": name,
                "owned_by": owner,
                "root": f"/models/{name}",
                "parent": None,
                "max_model_len": self.max_model_len,
            }
            for name in (self.model, *self.aliases)
        ]
        return rows + [
            {"id": name, "owned_by": owner, "root": path, "parent": self.model, "max_model_len": None}
            for name, path in self.adapters.items()
        ]

    def _load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, path = body["lora_name"], body["lora_path"]
        assert "load_inplace" not in body
        if self.adapter_error is not None:
            status, message = self.adapter_error
            return status, _error(status, message)
        if name in self.adapters:
            return 400, _error(400, f"The lora adapter '{name}' has already been loaded.")
        self.adapters[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["lora_name"]
        if name not in self.adapters:
            return 404, _error(404, f"The lora adapter '{name}' cannot be found.")
        if name in self.in_use:
            self.unloaded_while_used.append(name)
        del self.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    # --- answers ---------------------------------------------------------------------------------------------------

    def writer_of(self, model: str) -> str:
        """Who really writes: TGI answers for an adapter it does not know as the base."""
        if self.kind == "tgi":
            return model if model in self.launch_adapters else self.model
        return model

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        text = "the same text"
        noise = self.noise * (len(self.requests) % 3)  # as rounding in batches of other sizes makes it
        tokens = [{"token": word, "logprob": noise - len(self.writer_of(body["model"])) / 7} for word in text.split()]
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": {"content": tokens}}
        return {"choices": [choice | {"finish_reason": "length"}]}

    def _refusal(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        known = (self.model, *self.aliases, *self.adapters)
        if self.kind == "vllm" and body["model"] not in known:
            return 404, _error(404, f"The model `{body['model']}` does not exist.")
        prompt, wanted = _count(body["messages"]), body["max_tokens"]
        if prompt + wanted <= self.max_model_len:
            return None
        if self.kind == "tgi":
            said = (
                f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= {self.max_model_len}. "
                f"Given: {prompt} `inputs` tokens and {wanted} `max_new_tokens`"
            )
            return 422, {"error": said, "error_type": "validation"}
        if wanted > self.max_model_len:
            return 400, _error(
                400,
                f"max_tokens={wanted} cannot be greater than max_model_len=max_total_tokens={self.max_model_len}. "
                "Please request fewer output tokens.",
            )
        least = min(prompt, self.max_model_len - wanted + 1)
        said = (
            f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {wanted} "
            f"output tokens and your prompt contains at least {least} input tokens, for a total of at least "
            f"{least + wanted} tokens. Please reduce the length of the input prompt or the number of requested output "
            "tokens."
        )
        return 400, _error(400, said)

    async def _chat(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self.faults.popleft() if self.faults else self.always
        if fault in _REFUSALS:
            return await _REFUSALS[fault](writer)
        if fault is None and (refusal := self._refusal(body)) is not None:
            return await _json(writer, *refusal)
        writing = asyncio.create_task(self._stream(body, fault, writer))
        gone = asyncio.create_task(reader.read(1))
        self.generating += 1
        self.most_generating = max(self.most_generating, self.generating)
        self.in_use.append(body["model"])
        try:
            await asyncio.wait([writing, gone], return_when=asyncio.FIRST_COMPLETED)
            if not writing.done() or isinstance(writing.exception(), ConnectionError):
                self.closes_seen += 1
        finally:
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
            self.generating -= 1
            self.in_use.remove(body["model"])

    async def _stream(self, body: dict[str, Any], fault: str | None, writer: asyncio.StreamWriter) -> None:
        if fault == "stall_headers":
            await asyncio.sleep(FOREVER_S)
        kind = {"html": "text/html", "json": "application/json"}.get(fault or "", "text/event-stream; charset=utf-8")
        encoding = "Content-Encoding: gzip\r\n" if fault == "gzip" else ""
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{encoding}Transfer-Encoding: chunked\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        async for piece in self._pieces(body, fault):
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
        if fault != "cut":
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    async def _pieces(self, body: dict[str, Any], fault: str | None) -> AsyncIterator[bytes]:
        if fault in _NONSENSE:
            yield _event(_delta("", role="assistant"))
            yield _event(_delta("Half "))
            async for piece in _NONSENSE[fault]():
                yield piece
            return
        words, reason = self._script(body)
        yield _event(_delta("", role="assistant"))
        if fault == "stall_first":
            await asyncio.sleep(FOREVER_S)
        for index, word in enumerate(words):
            if fault == "stall_after" and index == 2:
                await asyncio.sleep(FOREVER_S)
            if fault in ("no_finish", "cut") and index == 2:
                break
            await asyncio.sleep(self.token_s)
            yield _event(_delta(word))
        if fault not in ("no_finish", "cut"):
            yield _event(_delta("", finish_reason="abort" if fault == "abort" else reason))
        if fault == "cut_after_finish":
            return
        if (body.get("stream_options") or {}).get("include_usage") and fault not in ("no_finish", "cut"):
            usage = {"prompt_tokens": _count(body["messages"]), "completion_tokens": len(words)}
            yield _event({"choices": [], "usage": usage | {"total_tokens": sum(usage.values())}})
        if fault == "stall_end":
            await asyncio.sleep(FOREVER_S)
        if fault not in ("no_done", "cut"):
            yield b"data: [DONE]\n\n"

    def _script(self, body: dict[str, Any]) -> tuple[list[str], str]:
        """`writer:seed:0 writer:seed:1 …`; as long as asked for, ended by a stop text."""
        writer = self.writer_of(body["model"])
        words = [f"{writer}:{body.get('seed')}:{index} " for index in range(self.words)]
        for stop in body.get("stop") or ():
            if (at := "".join(words).find(stop)) >= 0:
                shown = "".join(words)[: at + (len(stop) if self.kind == "tgi" else 0)]
                return [shown[i : i + 3] for i in range(0, len(shown), 3)], (
                    "stop_sequence" if self.kind == "tgi" else "stop"
                )
        if len(words) > body["max_tokens"]:
            return words[: body["max_tokens"]], "length"
        return words, "eos_token" if self.kind == "tgi" else "stop"


# --- what is no answer -----------------------------------------------------------------------------------------------


async def _internal(writer: asyncio.StreamWriter) -> None:
    await _json(writer, 500, _error(500, "EngineCore encountered an issue."))


async def _busy(writer: asyncio.StreamWriter, after: str = "7") -> None:
    body = {"error": "Model is overloaded", "error_type": "overloaded"}
    await _json(writer, 429, body, f"Retry-After: {after}\r\n")


async def _soon(writer: asyncio.StreamWriter) -> None:
    await _busy(writer, "0")


async def _unavailable(writer: asyncio.StreamWriter) -> None:
    await _json(writer, 503, {"error": "try later"})


async def _redirect(writer: asyncio.StreamWriter) -> None:
    await _json(writer, 307, {}, "Location: http://elsewhere.invalid/v1/chat/completions\r\n")


async def _odd(writer: asyncio.StreamWriter) -> None:
    await _json(writer, 418, {"error": {"message": "I am a teapot", "code": 418}})


async def _nothing(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


_REFUSALS = {
    "500": _internal,
    "429": _busy,
    "429_soon": _soon,
    "503": _unavailable,
    "redirect": _redirect,
    "teapot": _odd,
    "reset": _nothing,
}


async def _garbage() -> AsyncIterator[bytes]:
    yield b"data: \x00{{{ not json\n\n"
    yield b"data: [DONE]\n\n"


async def _half_utf8() -> AsyncIterator[bytes]:
    yield b'data: {"choices":[{"delta":{"content":"\xe2\x82"}}]}\n\n'
    yield _event(_delta("", finish_reason="stop")) + b"data: [DONE]\n\n"


async def _half_utf8_at_end() -> AsyncIterator[bytes]:
    yield b'data: {"choices":[{"delta":{"content":"\xe2\x82'


async def _no_object() -> AsyncIterator[bytes]:
    yield b"data: [1, 2]\n\n"


async def _other_object() -> AsyncIterator[bytes]:
    yield b'data: {"object":"error","message":"old vLLM"}\n\n'


async def _number_as_text() -> AsyncIterator[bytes]:
    yield b'data: {"choices":[{"delta":{"content":5}}]}\n\n'


async def _error_event() -> AsyncIterator[bytes]:
    yield b'data: {"error":{"message":"CUDA out of memory","type":"InternalServerError","code":500}}\n\n'
    yield b"data: [DONE]\n\n"


async def _empty_flood() -> AsyncIterator[bytes]:
    while True:
        yield _event(_delta("")) * 50
        await asyncio.sleep(0.001)


async def _comments() -> AsyncIterator[bytes]:
    while True:
        yield b": ping\n\n"
        await asyncio.sleep(0.02)


async def _drip() -> AsyncIterator[bytes]:
    while True:
        yield _event(_delta("x"))
        await asyncio.sleep(0.1)


async def _huge_line() -> AsyncIterator[bytes]:
    yield b"data: "
    while True:
        yield b"x" * 65536


_NONSENSE = {
    "garbage": _garbage,
    "half_utf8": _half_utf8,
    "half_utf8_at_end": _half_utf8_at_end,
    "no_object": _no_object,
    "other_object": _other_object,
    "number_as_text": _number_as_text,
    "error_event": _error_event,
    "empty_flood": _empty_flood,
    "comments": _comments,
    "drip": _drip,
    "huge_line": _huge_line,
}


# --- bytes -----------------------------------------------------------------------------------------------------------


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    raw = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, path, headers, json.loads(raw) if raw else None, head.encode() + raw)


async def _text(writer: asyncio.StreamWriter, status: int, text: str, more: str = "", kind: str = "text/plain") -> None:
    body = text.encode()
    writer.write(
        f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n".encode()
        + body
    )
    await writer.drain()


async def _json(writer: asyncio.StreamWriter, status: int, body: Any, more: str = "") -> None:
    await _text(writer, status, json.dumps(body), more, "application/json")


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


def _delta(text: str, *, role: str | None = None, finish_reason: str | None = None) -> dict[str, Any]:
    delta = {"content": text} | ({"role": role} if role else {})
    return {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _count(messages: list[dict[str, str]]) -> int:
    """Words stand for tokens here."""
    return sum(len(message["content"].split()) for message in messages)


@contextmanager
def standing_in(stand_in: StandIn) -> Iterator[StandIn]:
    """Serve on a free loopback port, in a thread with an event loop of its own, until the block ends."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def run() -> None:
        server = await asyncio.start_server(stand_in.serve, "127.0.0.1", stand_in.port)
        stand_in.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def work() -> None:
        try:
            loop.run_until_complete(run())
        finally:
            loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(10)
    try:
        yield stand_in
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
