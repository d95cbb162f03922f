"""What a model server's refusal means: status, headers and body → one of the errors of `engine.py`.

Where it sits: `upstream.py` asks. The bodies are those of vLLM (`{"error": {"message", "type", "code"}}`, before 0.9
without the outer object), of TGI (`{"error": text, "error_type"}`), of llama-server and of OpenAI. Nothing here raises.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from chat_app.serving.engine import (
    ContextOverflow,
    Crowded,
    EngineBroken,
    EngineBusy,
    EngineError,
    EngineRefused,
    VersionUnservable,
)

MAX_MESSAGE = 300
MAX_RETRY_AFTER_S = 120.0
RETRY_AFTER_S = 5.0  # where a busy server names no time
BUSY = (429, 503)
_BAD_REQUEST = (400, 413, 422)

CACHE_IS_FULL = "Context size has been exceeded"  # llama-server, by all streams together

# (limit, prompt tokens) as vLLM, TGI and llama-server word it; the newest wording first.
_TOO_LONG = (
    re.compile(
        r"maximum context length is (?P<limit>\d+) tokens.*?"
        r"(?:prompt contains (?:at least )?(?P<prompt>\d+)|\((?P<messages>\d+) in the messages"
        r"|resulted in (?P<resulted>\d+) tokens)",
        re.DOTALL,
    ),
    re.compile(r"passed (?P<prompt>\d+) input tokens.*?context length is only (?P<limit>\d+)", re.DOTALL),
    re.compile(r"prompt \(length (?P<prompt>\d+)\) is longer than the maximum model length of (?P<limit>\d+)"),
    re.compile(r"must be <= (?P<limit>\d+)\. Given: (?P<prompt>\d+) `inputs` tokens"),
    re.compile(r"`inputs` must have less than (?P<limit>\d+) tokens\. Given: (?P<prompt>\d+)"),
    re.compile(r"request \((?P<prompt>\d+) tokens\) exceeds the available context size \((?P<limit>\d+) tokens\)"),
)

# What a chat template says is passed on as a refusal, and by some servers as a failure of their own.
_TEMPLATE = re.compile(r"jinja|chat template|template[ _]error|raise_exception|roles must alternate", re.IGNORECASE)
_JINJA_WORDS = re.compile(r"Jinja Exception: *(?P<said>.+)", re.DOTALL)


class ModelGone(VersionUnservable):
    """The server does not know the model by this name: a runtime adapter is lost when the server restarts."""


class NotAllowed(EngineRefused):
    """The route is there and takes another method."""


def refusal(server: str, status: int, headers: Mapping[str, str], body: bytes) -> EngineError:
    """The error for an answer that is not 200. `server` begins the sentence."""
    error = error_of(body)
    message = said(error)
    if status in BUSY:
        return EngineBusy(f"{server} is busy ({status}): {message}", retry_after_s(headers))
    if (overflow := overflow_of(error)) is not None:
        return overflow
    return _by_status(server, status, message, headers.get("location", "nowhere")[:MAX_MESSAGE])


def _by_status(server: str, status: int, message: str, location: str) -> EngineError:
    if status in (401, 403):
        return EngineRefused(f"{server} refused our key ({status}): set ZLOOP_REMOTE_KEY to one it knows")
    if 300 <= status < 400:
        return EngineRefused(f"{server} redirects to {location}, which is not followed: set ZLOOP_REMOTE_URL to it")
    if status == 404:
        return ModelGone(f"{server} has no such model or route (404): {message}")
    if status == 405:
        return NotAllowed(f"{server} takes this request by another method (405)")
    if status >= 500:
        return EngineBroken(f"{server} failed ({status}): {message}")
    return EngineRefused(f"{server} refused the request ({status}): {message}")


def blames_request(status: int, message: object) -> bool:
    """Whether this answer to a chat request of ours refuses what its client wrote; our own part of it is right."""
    return status in _BAD_REQUEST or (status >= 500 and _TEMPLATE.search(str(message)) is not None)


def template_words(message: object) -> str:
    """What the template itself says, where a server puts its own words around it; in one line of bounded length."""
    found = _JINJA_WORDS.search(str(message))
    return said({"message": found["said"] if found else message})


def broken_off(server: str, error: object) -> EngineError:
    """The error for one that came inside a stream."""
    parts = error if isinstance(error, dict) else {"message": str(error)}
    broke_off = f"{server} broke off its answer: {said(parts)}"
    crowded = CACHE_IS_FULL in str(parts.get("message"))
    return overflow_of(parts) or (Crowded(broke_off) if crowded else EngineBroken(broke_off))


def error_of(body: bytes) -> dict[str, Any]:
    """The error object of a body, whatever its shape; {"message": the text} for what is no JSON."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return {"message": body.decode(errors="replace")}
    if not isinstance(parsed, dict):
        return {"message": str(parsed)}
    inner = parsed.get("error")
    if isinstance(inner, dict):
        return inner
    return {**parsed, "message": inner} if isinstance(inner, str) else parsed


def said(error: Mapping[str, Any]) -> str:
    """The message of an error object, in one line of bounded length."""
    message = " ".join(str(error.get("message") or error.get("detail") or "no reason given").split())
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"


def overflow_of(error: Mapping[str, Any]) -> ContextOverflow | None:
    """The numbers of an error that says the conversation is too long; None where it says something else."""
    prompt, limit = error.get("n_prompt_tokens"), error.get("n_ctx")
    if isinstance(prompt, int) and isinstance(limit, int):
        return ContextOverflow(prompt, limit)
    for wording in _TOO_LONG:
        if found := wording.search(str(error.get("message"))):
            named = {name: int(value) for name, value in found.groupdict().items() if value is not None}
            limit = named.pop("limit")
            return ContextOverflow(next(iter(named.values())), limit)
    return None


def retry_after_s(headers: Mapping[str, str], now: float | None = None) -> float:
    """`Retry-After` in seconds, as a number or as an HTTP date; within [0, MAX_RETRY_AFTER_S]."""
    given = headers.get("retry-after", "").strip()
    try:
        wait_s = float(given) if re.fullmatch(r"\d+(\.\d+)?", given) else _until(given, now)
    except (ValueError, TypeError, OverflowError):
        return RETRY_AFTER_S
    return min(max(wait_s, 0.0), MAX_RETRY_AFTER_S)


def _until(date: str, now: float | None) -> float:
    return parsedate_to_datetime(date).timestamp() - (time.time() if now is None else now)
