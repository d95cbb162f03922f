"""The embedded engine: one managed native llama-server per version, base and adapter as GGUF. No torch.

The server is a child process (`llama_process.py`) on a free loopback port with a random key; this side starts it,
talks to it over HTTP and stops it. An engine never restarts its child: it reports `is_alive` False, and the slot
builds a new one. Which version to serve and when to swap is the work of `slot.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import httpx

from chat_app.serving.engine import (
    BadMessages,
    Chunk,
    ContextOverflow,
    Crowded,
    EngineBroken,
    EngineError,
    EngineRefused,
    EngineStartFailed,
    NoRoom,
    Sampling,
    ServedVersion,
    Usage,
    VersionUnservable,
)
from chat_app.serving.gguf_metadata import special_tokens
from chat_app.serving.memory import available_bytes, cache_bytes
from chat_app.serving.roles import first_refused
from chat_app.serving.upstream_errors import CACHE_IS_FULL, blames_request, template_words
from feedback_store.clean_environment import clean_environment
from feedback_store.control_text import PROBES, control_markers
from feedback_store.records import Message

CONTEXT_TOKENS = 8192  # shared by all streams of an engine
PARALLEL = 8  # streams written at once; more wait at the server for a free place
START_LIMIT_S = 120.0
STOP_LIMIT_S = 5.0
SILENCE_LIMIT_S = 300.0  # between two pieces of a stream, waiting for a free server slot included
LOG_LINES = 12
SERVER_BYTES = 64 * 2**20  # what a server takes beside model and cache (measured on the embedded model)
LARGE_PAGES = "glibc.malloc.hugetlb=1"  # where the system lets one ask for them: the cache is there 70 ms sooner
# Fixed beside temperature and top_p, so that an answer does not depend on the server's defaults.
TOP_K = 40
MIN_P = 0.05


class LlamaEngine:
    """A handle on a running llama-server. Made by `build_llama_engine`."""

    def __init__(
        self,
        served: ServedVersion,
        process: subprocess.Popen[bytes],
        client: httpx.AsyncClient,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._served = served
        self._process = process
        self._client = client
        self._on_close = on_close
        self._markers: frozenset[str] | None = None

    @property
    def version(self) -> str:
        return self._served.version

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None and not self._client.is_closed

    @property
    def context_tokens(self) -> int:
        return CONTEXT_TOKENS

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """Stream one answer. Closing the generator drops the connection, which frees the server's slot.

        Raises ContextOverflow, BadMessages, EngineRefused, and EngineBroken when the stream ends without a
        finish_reason.
        """
        finish_reason: str | None = None
        usage: Usage | None = None
        try:
            async with aclosing(self._events(_request_body(messages, sampling))) as events:
                async for event in events:
                    usage = _usage(event) or usage
                    for choice in event.get("choices", ()):
                        finish_reason = choice.get("finish_reason") or finish_reason
                        if text := choice.get("delta", {}).get("content"):
                            yield Chunk(text)
        except BadMessages as error:
            raise await self._located(error, messages) from error
        if finish_reason is None:
            raise EngineBroken(
                f"the stream of {self.version} ended without a finish_reason: the answer is not complete"
            )
        yield Chunk("", finish_reason, usage)

    async def prompt_text(self, messages: Sequence[Message]) -> str:
        """What the model's chat template makes of these messages. Raises EngineError."""
        return str((await self._ask("/apply-template", {"messages": list(messages)}))["prompt"])

    async def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """The tokens of the prompt these messages make. Raises EngineError."""
        try:
            prompt = await self.prompt_text(messages)
        except BadMessages as error:
            raise await self._located(error, messages) from error
        return len((await self._ask("/tokenize", {"content": prompt, "add_special": True}))["tokens"])

    async def control_markers(self) -> frozenset[str]:
        """From the tokens in the GGUF file and the chat template as the server renders it; found out once."""
        if self._markers is None:
            rendered = []
            for probe in PROBES:
                with suppress(EngineRefused):  # a template may refuse a role
                    rendered.append(await self.prompt_text(probe))
            self._markers = await asyncio.to_thread(_control_markers, self._served, rendered)
        return self._markers

    async def check(self) -> None:
        """Write a word greedily and see that the adapter is loaded. Raises EngineError.

        The control markers are found out here, too: the first answer would have to wait for them.
        """
        if self._served.adapter_gguf is not None:
            await self._check_adapter(self._served.adapter_gguf)
        await self.control_markers()
        hello: Message = {"role": "user", "content": "Say hello."}
        async with aclosing(self.stream([hello], Sampling(temperature=0, max_tokens=8))) as chunks:
            async for chunk in chunks:
                if chunk.text.strip():
                    return
        raise EngineStartFailed(f"{self.version} answers nothing to {hello['content']!r}")

    async def close(self) -> None:
        """Stop the server; its streams break with EngineBroken."""
        on_close, self._on_close = self._on_close, None
        await asyncio.to_thread(stop_process, self._process)
        await self._client.aclose()
        if on_close is not None:
            on_close()

    async def _check_adapter(self, adapter_gguf: Path) -> None:
        self._require_open()
        try:
            loaded = (await self._client.get("/lora-adapters")).raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineBroken(f"{self.version} does not say which adapters it has loaded: {error!r}") from error
        if [(entry["path"], entry["scale"]) for entry in loaded] != [(str(adapter_gguf), 1.0)]:
            raise EngineStartFailed(f"{self.version} must serve the adapter {adapter_gguf}, the server has {loaded}")

    async def _located(self, error: BadMessages, messages: Sequence[Message]) -> BadMessages:
        """The same refusal with the message it is about, where it is the chat template's."""

        async def reads(some: Sequence[Message]) -> bool:
            try:
                await self.prompt_text(some)
            except BadMessages:
                return False
            return True

        return error.at(await first_refused(messages, reads), [one["role"] for one in messages])

    async def _ask(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        self._require_open()
        try:
            response = await self._client.post(path, json=body)
            if response.status_code != httpx.codes.OK:
                raise self._refusal(response.status_code, response.content)
            answer: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineBroken(f"{self.version} does not answer {path}: {error!r}") from error
        return answer

    async def _events(self, body: dict[str, object]) -> AsyncGenerator[dict[str, Any], None]:
        """The server-sent events of one request as JSON objects. Raises EngineError."""
        self._require_open()
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise self._refusal(response.status_code, await response.aread())
                async with aclosing(_lines(response)) as lines:
                    async for line in lines:
                        if not line.startswith(b"data:") or line == b"data: [DONE]":
                            continue
                        event: dict[str, Any] = json.loads(line[len(b"data:") :])
                        if "error" in event:
                            raise self._broken(event["error"])
                        yield event
        except (httpx.HTTPError, httpx.StreamError, ValueError) as error:
            await self._reap()
            state = "is still running" if self.is_alive else "is gone"
            raise EngineBroken(
                f"the connection to the engine of {self.version} broke ({error!r}); it {state}"
            ) from error

    def _require_open(self) -> None:
        if self._client.is_closed:
            raise EngineBroken(f"the engine of {self.version} was closed")

    def _refusal(self, status: int, content: bytes) -> EngineError:
        try:
            error = json.loads(content)["error"]
        except (ValueError, KeyError, TypeError):
            error = {"message": content.decode(errors="replace")[:200]}
        if (overflow := _overflow(error)) is not None:
            return overflow
        if blames_request(status, error.get("message")):
            return BadMessages(self.version, template_words(error.get("message")), ())
        return EngineRefused(f"{self.version} answered {status}: {error.get('message')}")

    def _broken(self, error: dict[str, Any]) -> EngineError:
        said = f"{self.version} broke off its answer: {error.get('message', error)}"
        crowded = CACHE_IS_FULL in str(error.get("message"))
        return _overflow(error) or (Crowded(said) if crowded else EngineBroken(said))

    async def _reap(self) -> None:
        """Give a dying server a moment, so that `is_alive` tells the truth right after a broken stream."""
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, 0.5)


async def build_llama_engine(
    served: ServedVersion,
    *,
    log_dir: Path,
    threads: int | None = None,
    spawn: Callable[[Path], subprocess.Popen[bytes]] | None = None,
    on_close: Callable[[], None] | None = None,
) -> LlamaEngine:
    """Start a llama-server for the version and wait until it is healthy.

    `threads` None: one answer alone is written by all cores but one, which is left to everything else; prompts and
    answers written together take all of them. `spawn` gives the child, `on_close` is called once the engine is closed.
    The server's own words go to `log_dir/llama-<version>.log`. Raises EngineStartFailed with the last of them, and
    NoRoom before anything is started.
    """
    if served.base_gguf is None and served.checkpoint is not None:
        raise VersionUnservable(
            f"cannot serve {served.version}: it is a whole model without a GGUF form, and the embedded engine serves "
            "nothing else. Use ZLOOP_ENGINE=transformers"
        )
    if served.base_gguf is None:
        raise EngineStartFailed(f"{served.version} has no GGUF file of its base: the embedded engine cannot serve it")
    for path in (served.base_gguf, served.adapter_gguf):
        if path is not None and not path.is_file():
            raise EngineStartFailed(f"{served.version} cannot be served: there is no file {path}")
    await asyncio.to_thread(_require_room, served)
    log_path, log_start = _ensure_log(log_dir, served.version)
    key = secrets.token_urlsafe(32)
    process = (spawn or _spawn)(log_path)
    try:
        async with asyncio.timeout(START_LIMIT_S):
            config = {**_config(served, key, threads), "log_path": str(log_path)}
            address = await asyncio.to_thread(_hand_over, process, config)
            client = _client(address, key)
            await _wait_healthy(client)
    except BaseException as error:  # cancelled or failed: no server may stay behind
        await asyncio.to_thread(stop_process, process)
        if isinstance(error, (OSError, ValueError, httpx.HTTPError)):  # TimeoutError is an OSError
            raise _start_failure(served.version, error, log_path, log_start) from error
        raise
    return LlamaEngine(served, process, client, on_close)


def _control_markers(served: ServedVersion, rendered: Sequence[str]) -> frozenset[str]:
    assert served.base_gguf is not None
    try:
        return control_markers(*special_tokens(served.base_gguf), rendered)
    except (OSError, ValueError) as error:
        raise EngineBroken(f"the control tokens of {served.version} cannot be read: {error}") from error


def _require_room(served: ServedVersion) -> None:
    """Refuse to start a server that would push others out of memory. Raises NoRoom with the numbers."""
    assert served.base_gguf is not None
    files = [path for path in (served.base_gguf, served.adapter_gguf) if path is not None]
    needed = sum(path.stat().st_size for path in files) + cache_bytes(served.base_gguf, CONTEXT_TOKENS) + SERVER_BYTES
    free = available_bytes()
    if needed > free:
        raise NoRoom(
            f"{served.version} needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free: "
            "close other programs, or use a smaller model"
        )


def _ensure_log(log_dir: Path, version: str) -> tuple[Path, int]:
    """The log file of a version and where this start begins in it."""
    log_dir.mkdir(parents=True, exist_ok=True)
    log_path = log_dir / f"llama-{version}.log"
    log_path.touch()
    return log_path, log_path.stat().st_size


def _start_failure(version: str, error: Exception, log_path: Path, log_start: int) -> EngineStartFailed:
    said = log_path.read_bytes()[log_start:].decode(errors="replace").splitlines()[-LOG_LINES:]
    reason = f"not ready after {START_LIMIT_S:g} s" if isinstance(error, TimeoutError) else str(error)
    return EngineStartFailed(
        f"the engine of {version} did not start: {reason}. Last lines of {log_path}:\n" + "\n".join(said)
    )


def _spawn(log_path: Path | None) -> subprocess.Popen[bytes]:
    """The child, waiting for its configuration. In a group of its own: Ctrl-C is for the server that owns it.

    `log_path` None: not known yet; the configuration names it.
    """
    command = [sys.executable, "-m", "chat_app.serving.llama_process"]
    pipe = subprocess.PIPE
    environment = {
        "GLIBC_TUNABLES": LARGE_PAGES,
        **clean_environment(),
    }  # read by the C library before there is any Python
    with Path(os.devnull if log_path is None else log_path).open("ab") as log_file:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log_file, env=environment, process_group=0)


def _config(served: ServedVersion, key: str, threads: int | None) -> dict[str, object]:
    cores = len(os.sched_getaffinity(0))
    return {
        "base_gguf": str(served.base_gguf),
        "adapter_gguf": None if served.adapter_gguf is None else str(served.adapter_gguf),
        "key": key,
        "threads": threads or max(1, cores - 1),
        "batch_threads": threads or cores,
        "context_tokens": CONTEXT_TOKENS,
        "parallel": PARALLEL,
    }


def _hand_over(process: subprocess.Popen[bytes], config: dict[str, object]) -> str:
    """Send the configuration, wait for the address. Raises OSError when the child dies instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(config).encode() + b"\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise ChildProcessError(f"its process ended with exit code {process.wait()}")
    return str(json.loads(line)["address"])


def _client(address: str, key: str) -> httpx.AsyncClient:
    """A client for this one server: no proxies, no kept connections (a stale one looks like a broken engine)."""
    return httpx.AsyncClient(
        base_url=address,
        headers={"Authorization": f"Bearer {key}"},
        timeout=httpx.Timeout(SILENCE_LIMIT_S, connect=5.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,
        verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # never used; loading the system's certificates takes 20 ms
    )


async def _wait_healthy(client: httpx.AsyncClient) -> None:
    """Until /health says 200; the caller sets the deadline."""
    while (await client.get("/health")).status_code != httpx.codes.OK:  # noqa: ASYNC110 (another process: no Event)
        await asyncio.sleep(0.05)


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """End the child: close its stdin, which it obeys; kill it when it does not."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _request_body(messages: Sequence[Message], sampling: Sampling) -> dict[str, object]:
    body: dict[str, object] = {
        "messages": list(messages),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": TOP_K,
        "min_p": MIN_P,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "cache_prompt": sampling.temperature > 0,  # a cached prefix rounds otherwise: greedy text would not repeat
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body if sampling.seed is None else body | {"seed": sampling.seed}


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Lines by newline only: httpx's own splitter also cuts at characters which JSON text may hold (U+2028)."""
    rest = b""
    async with aclosing(response.aiter_bytes()) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line.rstrip(b"\r")


def _usage(event: dict[str, Any]) -> Usage | None:
    said = event.get("usage")
    return Usage(int(said["prompt_tokens"]), int(said["completion_tokens"])) if said else None


def _overflow(error: dict[str, Any]) -> ContextOverflow | None:
    if error.get("type") != "exceed_context_size_error":
        return None
    return ContextOverflow(int(error.get("n_prompt_tokens", 0)), int(error.get("n_ctx", CONTEXT_TOKENS)))
