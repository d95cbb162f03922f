"""The one shape of an error, as a body, as a response, as OpenAPI describes it; and the words for our own faults.

    {"error": {"type": "not_found", "message": "There is no run 'x'. …", "param": "run_id"}}

Where it sits: at the edge, below everything that answers. What a client did is told with value and limit; what went
wrong here is told without paths, names or traces: these stand in the log.
"""

import errno
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

log = logging.getLogger(__name__)

TYPES = {
    400: "bad_request",
    403: "forbidden",
    404: "not_found",
    405: "bad_method",
    408: "too_slow",
    409: "conflict",
    413: "too_long",
    415: "bad_type",
    422: "invalid",
    429: "too_many",
    503: "unavailable",
}
RETRY_AFTER_S = 5
BROKEN = "Something went wrong inside Zephyr Loop; its log says what. Try again, and please report it if it stays."
SCHEMA: Mapping[str, Any] = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {
                "type": {"type": "string", "description": "One word for programs."},
                "message": {"type": "string", "description": "What is wrong, the limit, what to do: for people."},
                "param": {"type": "string", "description": "The place in the request, such as messages.3.content."},
            },
        }
    },
}

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS)


def error_body(kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The shape. What is no Unicode in a message (a file name can be such) is escaped: the answer must reach people."""
    told = {"type": kind, "message": _sendable(message)} | ({"param": _sendable(param)} if param else {})
    return {"error": told}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    extra: Mapping[str, Any] | None = None,
    retry_after_s: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error with its status; 429 and 503 say when to come back."""
    sent = dict(headers or {})
    if retry_after_s is not None or status in (429, 503):
        sent["Retry-After"] = str(retry_after_s or RETRY_AFTER_S)
    return JSONResponse({**(extra or {}), **error_body(TYPES.get(status, "failed"), message, param)}, status, sent)


def response_to_os_error(error: OSError) -> JSONResponse:
    """What a client hears of an error of the operating system; the log has the rest."""
    if error.errno == errno.ENAMETOOLONG:
        return error_response(422, "A name in this request is too long for a file: names have up to 255 bytes.")
    log.warning("%s: %r", type(error).__name__, str(error), exc_info=error)
    return error_response(503, os_error_sentence(error))


def os_error_sentence(error: OSError) -> str:
    """A sentence for people, without the path."""
    if error.errno in _FULL:
        return "The disk of the server is full, and nothing of this was kept. Make room, then try again."
    if error.errno in _FORBIDDEN:
        return "The server may not read or write one of its own files; its log says which. Mend that, then try again."
    if error.errno in _TOO_MANY:
        return "The server has too many files and connections open just now. Try again in a moment."
    if isinstance(error, TimeoutError):
        return "This took too long on the server. Try again in a moment."
    return "The server could not read or write one of its files; its log says which. Try again in a moment."


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
