"""One model server of others behind a URL: vLLM, TGI, or anything that speaks OpenAI's chat completions.

Where it sits: `remote_engine.py` asks it what it serves, has adapters loaded, and streams. Requests for answers go
through `huggingface_hub.AsyncInferenceClient`, one client an answer (a client shared by streams keeps each of them
until it is closed itself), over the checked client of `checked_transport.py`.

Nothing waits without a deadline: connecting, the first token, the time between two pieces of text, the whole answer.
Tries again only before the first token. Not covered: tools, images, reasoning texts (they are waited through).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import httpx2
from huggingface_hub import AsyncInferenceClient, set_async_client_factory
from huggingface_hub.errors import InferenceTimeoutError, TextGenerationError

from chat_app.serving.checked_transport import EVENTS, Answered, BadBytes, new_client
from chat_app.serving.circuit_breaker import CircuitBreaker
from chat_app.serving.deadlines import Closed, Deadlines, Timeouts, Waits
from chat_app.serving.engine import (
    BadMessages,
    Chunk,
    ContextOverflow,
    Crowded,
    EngineBroken,
    EngineBusy,
    EngineError,
    EngineRefused,
    EngineTimeout,
    Sampling,
    Usage,
)
from chat_app.serving.stop_cut import StopCut
from chat_app.serving.upstream_errors import (
    ModelGone,
    NotAllowed,
    blames_request,
    broken_off,
    error_of,
    refusal,
    template_words,
)
from feedback_store.records import Message

log = logging.getLogger(__name__)

Kind = Literal["vllm", "tgi", "openai"]

# Sent where no key is set: with an empty one the hub's client would send this machine's Hugging Face token.
NO_KEY = "no-key"
TRIES = 3
PAUSE_S = 0.25  # before the second try; doubles; with full jitter
MAX_PAUSE_S = 2.0  # a busy server that asks for more is not waited for: the caller is told when to come back
AGENT = "zephyr-loop"
ASK_LIMIT_S = 10.0
LOAD_LIMIT_S = 120.0
LONG_PROMPT_CHARACTERS = 20_000
TGI_BASE = "tgi"  # TGI takes any other model name for an adapter's
# What an engine of ours calls a natural end; TGI says the others.
_STOPS = {"stop": "stop", "eos_token": "stop", "stop_sequence": "stop"}
_NO_ENDS = ("abort", "error")
# vLLM's defaults for these come with the model; an answer must not depend on them.
_VLLM_SAMPLING = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model as /v1/models lists it; `parent` names an adapter's base."""

    name: str
    root: str | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server said of itself when it was last asked."""

    kind: Kind
    models: tuple[ModelCard, ...]
    context_tokens: int | None
    loads_adapters: bool

    @property
    def bases(self) -> tuple[ModelCard, ...]:
        return tuple(card for card in self.models if card.parent is None)


class _Growing:
    """What has come of an answer so far."""

    def __init__(self, stop: StopCut, deadlines: Deadlines) -> None:
        self.stop = stop
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self._deadlines = deadlines

    @property
    def is_cut(self) -> bool:
        """True where a stop text was found here: whatever else comes is not part of the answer."""
        return self.stop.is_found

    def take(self, event: Any) -> str:
        """The text an event adds. Raises TextGenerationError or what Python says of an event that is none."""
        if event.choices is None and event.usage is None:  # the errors of vLLM before 0.9 look like this
            raise TextGenerationError(getattr(event, "message", "an event without choices"))
        said = event.usage
        if said is not None and said.prompt_tokens is not None and said.completion_tokens is not None:
            self.usage = Usage(int(said.prompt_tokens), int(said.completion_tokens))
        shown = ""
        for choice in event.choices or ():
            if self.finish_reason is not None:
                break
            if choice.delta is not None and choice.delta.content:
                self._deadlines.on_text()
                shown += self.stop.cut(choice.delta.content)
            if self.stop.is_found:
                self.finish_reason = "stop"
            elif choice.finish_reason:
                self.finish_reason = _STOPS.get(choice.finish_reason, choice.finish_reason)
                self._deadlines.on_end()
        return shown


class _TryAgain(Exception):
    """An error before the first token that may be gone in a moment."""

    def __init__(self, error: EngineError, pause_s: float | None = None) -> None:
        self.error = error
        self.pause_s = pause_s


class Upstream:
    """A model server. `kind` None: find out. The key is never in a message, a log or a repr."""

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        kind: Kind | None = None,
        timeouts: Timeouts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeouts = timeouts or Timeouts()
        self.breaker = CircuitBreaker(f"the model server {self.url}", clock=clock)
        self._key = key or NO_KEY
        self._kind = kind
        self._root = self.url.removesuffix("/v1")
        self._facts: Facts | None = None
        self.problem: EngineError | None = None  # why it could not be asked, the last time
        self._dice = random.SystemRandom()
        set_async_client_factory(new_client)  # process-wide; nothing else here uses the hub's asynchronous client

    def __repr__(self) -> str:
        return f"Upstream({self.url!r})"

    @property
    def name(self) -> str:
        """How sentences call it."""
        kind = self._facts.kind if self._facts else self._kind
        called = {"vllm": "vLLM", "tgi": "TGI"}.get(kind or "", "the model server")
        return f"{called} at {self.url}"

    @property
    def facts(self) -> Facts:
        """What `probe` found."""
        assert self._facts is not None, "probe first"
        return self._facts

    @property
    def is_probed(self) -> bool:
        """True where it has answered and `facts` are known."""
        return self._facts is not None and self.problem is None

    # --- asking -----------------------------------------------------------------------------------------------------

    async def probe(self) -> Facts:
        """Ask the server what it is and what it serves. Raises EngineError."""
        listed = await self._found("/v1/models")
        cards = _cards(listed)
        info = await self._found_if_any("/info") if self._kind in (None, "tgi") and not _by_vllm(listed) else None
        kind: Kind = self._kind or ("vllm" if _by_vllm(listed) else "tgi" if _is_tgi(info) else "openai")
        if kind == "tgi" and isinstance(info, dict) and info.get("model_id"):
            cards = (ModelCard(str(info["model_id"])),)
        loads = kind == "vllm" and await self._has_post("/v1/load_lora_adapter")
        self._facts = Facts(kind, cards, await self._context(kind, listed, info), loads)
        return self._facts

    async def look(self) -> None:
        """`probe`, but what goes wrong is kept in `problem`."""
        try:
            await self.probe()
        except EngineError as error:
            self.problem = error
        else:
            self.problem = None

    async def count_tokens(self, model: str, messages: Sequence[Message]) -> int | None:
        """The tokens of the prompt these messages make; None where the server cannot say. Raises EngineError."""
        talk = list(messages)
        try:
            if self.facts.kind == "vllm":
                return _int((await self._ask("/tokenize", {"model": model, "messages": talk})).get("count"))
            if self.facts.kind == "tgi":
                said = await self._ask("/chat_tokenize", {"model": model, "messages": talk})
                return len(said["tokenize_response"])
            prompt = str((await self._ask("/apply-template", {"messages": talk}))["prompt"])  # llama-server
            return len((await self._ask("/tokenize", {"content": prompt, "add_special": True}))["tokens"])
        except (ModelGone, EngineRefused, KeyError, TypeError):
            return None  # no such route here: the chat works without

    async def differ(self, one: str, other: str) -> bool:
        """Whether two models give other answers to a fixed prompt, by more than each varies between two askings."""
        asked = [await self._fingerprint(model) for model in (one, one, other, other)]
        noise = max(_gap(*asked[:2]), _gap(*asked[2:]))
        return min(_gap(a, b) for a in asked[:2] for b in asked[2:]) > 2 * noise

    async def _fingerprint(self, model: str) -> tuple[str, tuple[float, ...]]:
        """What `model` makes of a fixed prompt: the text and its log-probabilities."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Write one sentence about the sea."}],
            "max_tokens": 16, "temperature": 0.0, "seed": 1, "logprobs": True, "stream": False,
        }  # fmt: skip
        answer = await self._ask("/v1/chat/completions", body, limit_s=self.timeouts.first_token_s)
        try:
            choice = answer["choices"][0]
            tokens = (choice.get("logprobs") or {}).get("content") or ()
            return str(choice["message"]["content"]), tuple(float(token["logprob"]) for token in tokens)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineBroken(f"{self.name} answered with what is no chat completion: {error!r}") from error

    async def load_adapter(self, name: str, path: PurePosixPath) -> None:
        """Have vLLM load an adapter under a new name; never in place (it would serve stale prefixes)."""
        await self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, limit_s=LOAD_LIMIT_S)

    async def unload_adapter(self, name: str) -> None:
        """Have vLLM forget an adapter; one it does not know is gone already."""
        with suppress(ModelGone):
            await self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    async def _context(self, kind: Kind, listed: Any, info: Any) -> int | None:
        if kind == "tgi":
            return _int(info.get("max_total_tokens")) if isinstance(info, dict) else None
        lengths = [_int(card.get("max_model_len")) for card in _rows(listed)]
        known = next((length for length in lengths if length), None)
        if known is None and kind == "openai":
            props = await self._found_if_any("/props")  # llama-server
            settings = props.get("default_generation_settings") if isinstance(props, dict) else None
            known = _int(settings.get("n_ctx")) if isinstance(settings, dict) else None
        return known

    async def _found(self, path: str) -> Any:
        """The JSON at `path`; None where there is no such route."""
        try:
            return await self._json("GET", path, None)
        except ModelGone:
            return None

    async def _found_if_any(self, path: str) -> Any:
        """The JSON at a path only some servers know; others may answer it as they like."""
        try:
            return await self._found(path)
        except (EngineRefused, EngineBroken, EngineBusy):
            return None

    async def _has_post(self, path: str) -> bool:
        """A route that only takes POST answers GET with 405; one that is not there with 404."""
        try:
            await self._json("GET", path, None)
        except NotAllowed:
            return True
        except ModelGone:
            return False
        return True

    async def _ask(self, path: str, body: Mapping[str, object], *, limit_s: float = ASK_LIMIT_S) -> dict[str, Any]:
        answer = await self._json("POST", path, body, limit_s)
        return answer if isinstance(answer, dict) else {}

    async def _json(
        self, method: str, path: str, body: Mapping[str, object] | None, limit_s: float = ASK_LIMIT_S
    ) -> Any:
        """The parsed answer; None for text that is no JSON (vLLM confirms a load in words). Raises EngineError."""
        try:
            async with asyncio.timeout(limit_s), new_client(self.timeouts.connect_s) as client:
                headers = {"Authorization": f"Bearer {self._key}", "User-Agent": AGENT}
                return json.loads((await client.request(method, self._root + path, json=body, headers=headers)).content)
        except Answered as answer:
            raise self._refusal(answer) from None
        except TimeoutError as error:
            raise EngineTimeout(f"{self.name} did not answer {path} within {limit_s:g} s") from error
        except (httpx2.HTTPError, httpx2.StreamError, BadBytes) as error:
            raise self._unreachable(error) from error
        except ValueError:
            return None

    # --- answering --------------------------------------------------------------------------------------------------

    async def stream(
        self, model: str, messages: Sequence[Message], sampling: Sampling, waits: Waits
    ) -> AsyncGenerator[Chunk, None]:
        """Stream one answer of `model`. Closing the generator closes the connection. Raises EngineError."""
        self.breaker.enter()
        try:
            async with aclosing(self._with_tries(_Request(model, messages, sampling, waits))) as chunks:
                async for chunk in chunks:
                    self.breaker.answered()
                    yield chunk
        except (EngineBusy, EngineRefused, ModelGone, ContextOverflow, Crowded):
            self.breaker.answered()
            raise
        except Closed:
            self.breaker.left()
            raise
        except EngineTimeout as error:
            error.by_length = error.by_length or _is_long(messages)
            if error.by_length:  # a server that writes until the last moment works, and a long prompt takes its time
                self.breaker.left()
            else:
                self.breaker.failed()
            raise
        except EngineError:
            self.breaker.failed()
            raise
        except BaseException:
            self.breaker.left()
            raise
        self.breaker.succeeded()

    async def reads(self, model: str, messages: Sequence[Message]) -> bool | None:
        """Whether the model's chat template takes these messages; None where the server cannot say."""
        paths = {"vllm": "/tokenize", "tgi": "/chat_tokenize", "openai": "/apply-template"}  # the last: llama-server
        try:
            await self._ask(paths[self.facts.kind], {"model": model, "messages": list(messages)})
        except EngineRefused:
            return False
        except EngineError:
            return None
        return True

    async def _with_tries(self, request: _Request) -> AsyncGenerator[Chunk, None]:
        """Try again while nothing was said yet, the error may pass, and there is time."""
        deadlines = Deadlines(self.timeouts)
        for attempt in range(1, TRIES + 1):
            try:
                async with aclosing(self._once(request, deadlines)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except _TryAgain as again:
                pause_s = again.pause_s
                if pause_s is None:
                    pause_s = self._dice.uniform(0, PAUSE_S * 2**attempt)
                if attempt == TRIES or pause_s > MAX_PAUSE_S or pause_s > deadlines.left_s:
                    raise again.error from again.__cause__
                log.info("%s. Trying again in %.1f s (try %d of %d).", again.error, pause_s, attempt + 1, TRIES)
            await asyncio.sleep(pause_s)

    async def _once(self, request: _Request, deadlines: Deadlines) -> AsyncGenerator[Chunk, None]:
        """One request. Raises _TryAgain for what may pass, before the first token only."""
        client = self._hub_client()
        growing = _Growing(StopCut(request.sampling.stop if self.facts.kind == "tgi" else ()), deadlines)
        try:
            async with request.waits.until(deadlines):
                events = await self._ask_for_answer(client, request)
            while not growing.is_cut:
                async with request.waits.until(deadlines):
                    event = await anext(events, None)
                if event is None:
                    break
                if text := growing.take(event):
                    yield Chunk(text)
                    if growing.finish_reason is None:
                        deadlines.on_text()  # the time our reader took is not the server's
        except Closed as closed:
            raise Closed(f"{self.name} is no longer used for {request.model}: {closed}") from None
        except _CAUGHT as error:
            if growing.finish_reason is None:  # after it the answer is complete, whatever happens to the connection
                raise self._mapped(error, deadlines) from error
        finally:
            await _close(client)
        if growing.finish_reason is None:
            raise EngineBroken(f"the stream of {self.name} ended without a finish_reason: the answer is not complete")
        if growing.finish_reason in _NO_ENDS:
            raise EngineBroken(f"{self.name} broke off its answer: its finish_reason is {growing.finish_reason!r}")
        yield Chunk(growing.stop.rest(), growing.finish_reason, growing.usage)

    async def _ask_for_answer(self, client: AsyncInferenceClient, request: _Request) -> AsyncGenerator[Any, None]:
        asking: Any = client.chat_completion  # its types want the hub's own classes where it takes plain values
        return await asking(  # type: ignore[no-any-return]
            list(request.messages),
            model=request.model,
            stream=True,
            stream_options={"include_usage": True},
            **_parameters(self.facts.kind, request.sampling),
        )

    def _hub_client(self) -> AsyncInferenceClient:
        return AsyncInferenceClient(
            base_url=self.url,
            api_key=self._key,
            timeout=httpx2.Timeout(None, connect=self.timeouts.connect_s),  # type: ignore[arg-type]
            headers={"User-Agent": AGENT, "Accept": EVENTS},
        )

    def _mapped(self, error: Exception, deadlines: Deadlines) -> Exception:
        """The error a person reads; wrapped in _TryAgain where a second try makes sense."""
        if isinstance(error, (TimeoutError, TextGenerationError, *_GARBAGE)) and not _no_connection(error):
            return self._final(error, deadlines)
        if isinstance(error, Answered):
            refused = self._refused_chat(error)
            if isinstance(refused, EngineBusy):
                return _TryAgain(refused, refused.retry_after_s if "retry-after" in error.headers else None)
            return _TryAgain(refused) if isinstance(refused, EngineBroken) else refused
        broken = self._unreachable(error)
        return broken if deadlines.has_text else _TryAgain(broken)

    def _final(self, error: Exception, deadlines: Deadlines) -> EngineError:
        if isinstance(error, TimeoutError):
            said = f"{self.name}: {deadlines.which}. The answer is not complete."
            return EngineTimeout(said, by_length=deadlines.has_text and deadlines.is_over)
        if isinstance(error, TextGenerationError):
            return broken_off(self.name, error.args[0] if error.args else "no reason given")
        why = str(error) if isinstance(error, BadBytes) else "it sends what is no event of a chat completion"
        return EngineBroken(f"{self.name} cannot be understood: {why}. The answer is not complete.")

    def _refusal(self, answer: Answered) -> EngineError:
        return refusal(self.name, answer.status, answer.headers, self._body(answer))

    def _refused_chat(self, answer: Answered) -> EngineError:
        refused, message = self._refusal(answer), error_of(self._body(answer)).get("message")
        if isinstance(refused, ContextOverflow) or not blames_request(answer.status, message):
            return refused
        return BadMessages(self.name, f"({answer.status}) {template_words(message)}", ())

    def _body(self, answer: Answered) -> bytes:
        return answer.body.replace(self._key.encode(), b"(key)")  # some servers repeat the key they refuse

    def _unreachable(self, error: Exception) -> EngineBroken:
        if _no_connection(error):
            return EngineTimeout(f"{self.name}: no connection within {self.timeouts.connect_s:g} s")
        if isinstance(error, httpx2.ConnectError):
            return EngineBroken(f"{self.name} cannot be reached ({error}): is it running?")
        return EngineBroken(f"the connection to {self.name} broke ({str(error) or type(error).__name__})")


# What comes of an upstream's nonsense, here and in the hub's parser.
_GARBAGE = (BadBytes, ValueError, TypeError, AttributeError, LookupError)
_CAUGHT = (Answered, TimeoutError, httpx2.HTTPError, httpx2.StreamError, *_GARBAGE)


def _no_connection(error: Exception) -> bool:
    """True for the one limit httpx2 is given itself; the hub wraps it as a TimeoutError of its own."""
    return isinstance(error, (httpx2.ConnectTimeout, InferenceTimeoutError))


@dataclass(frozen=True, slots=True)
class _Request:
    model: str
    messages: Sequence[Message]
    sampling: Sampling
    waits: Waits


def _is_long(messages: Sequence[Message]) -> bool:
    return sum(len(message["content"]) for message in messages) > LONG_PROMPT_CHARACTERS


def _parameters(kind: Kind, sampling: Sampling) -> dict[str, Any]:
    """The sampling in the words of chat completions."""
    return {
        "temperature": sampling.temperature,
        "top_p": None if kind == "tgi" and sampling.top_p >= 1 else sampling.top_p,  # TGI wants less than 1, or nothing
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
        "extra_body": _VLLM_SAMPLING if kind == "vllm" else None,
    }


def _gap(one: tuple[str, tuple[float, ...]], other: tuple[str, tuple[float, ...]]) -> float:
    """How far two fingerprints are apart; another text is infinitely far."""
    if one[0] != other[0] or len(one[1]) != len(other[1]):
        return math.inf
    return max((abs(a - b) for a, b in zip(one[1], other[1], strict=True)), default=0.0)


async def _close(client: AsyncInferenceClient) -> None:
    """Close the request's client and with it the connection, also when the one who asked is being cancelled."""
    closing = asyncio.ensure_future(client.close())  # type: ignore[no-untyped-call]
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await asyncio.wait([closing])
        raise


def _rows(listed: Any) -> list[dict[str, Any]]:
    rows = listed.get("data") if isinstance(listed, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _cards(listed: Any) -> tuple[ModelCard, ...]:
    return tuple(ModelCard(str(row["id"]), row.get("root"), row.get("parent")) for row in _rows(listed) if "id" in row)


def _by_vllm(listed: Any) -> bool:
    return any(row.get("owned_by") == "vllm" for row in _rows(listed))


def _is_tgi(info: Any) -> bool:
    return isinstance(info, dict) and "model_id" in info and "max_total_tokens" in info


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
