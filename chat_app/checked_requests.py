"""In front of the routes: a request whose text cannot be ours is refused, and no request ends without a word.

    CheckedRequests   path and query → request_text.check_path;  a JSON body → request_text.check_json;  then the app
    LastWord          what nobody caught → logged once, and a 500 in our shape; cut short where the answer had begun

Where it sits: ASGI middlewares that `api.create_api` puts around every route, the pages too. Uploads pass untouched.
Not covered: who may ask, how often, and of what type a body must be.
"""

import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chat_app.error_shape import BROKEN, error_response
from chat_app.request_text import BadText, check_json, check_path

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 2**20
CHECKED = "zloop.checked"
"""Set in the scope by whoever stands further outside and has checked the request already."""
_UNSAFE = ("POST", "PUT", "PATCH", "DELETE")


class TooLarge(Exception):
    """A JSON body of more than `MAX_BODY_BYTES`."""


class CheckedRequests:
    """Refuses with a sentence that names the place; 413 for a JSON body that is too large to be looked at."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope.get(CHECKED):
            await self._app(scope, receive, send)
            return
        try:
            check_path(scope.get("raw_path") or scope["path"].encode(), scope.get("query_string", b""))
            if scope["method"] in _UNSAFE and _may_be_json(scope):
                body = await _whole(receive)
                if body is None:
                    return  # the client left before the end of its own request
                if body:
                    check_json(body)
                receive = _again(body, receive)
        except BadText as error:
            refusal = error_response(error.status, error.message, param=error.param)
        except TooLarge:
            refusal = error_response(413, f"The body has more than {MAX_BODY_BYTES // 2**20} MiB. Send less at once.")
        else:
            await self._app(scope, receive, send)
            return
        await refusal(scope, receive, send)


class LastWord:
    """The outermost layer of the application. Errors after the first byte go on, so that the connection is cut."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if has_begun:
                raise
            log.exception("%s %r failed.", scope["method"], scope["path"])
            await error_response(500, BROKEN)(scope, receive, send)


def _may_be_json(scope: Scope) -> bool:
    """Every body on its way to the API, and what calls itself JSON elsewhere."""
    media_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"").lower()
    is_form = media_type.startswith((b"multipart/", b"application/x-www-form-urlencoded"))
    return b"json" in media_type or (scope["path"].startswith("/v1") and not is_form)


async def _whole(receive: Receive) -> bytes | None:
    """The body, None where the client left. Raises TooLarge."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise TooLarge
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what the connection says next."""
    waiting: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
