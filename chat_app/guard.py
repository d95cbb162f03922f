"""The guard: the outermost layer, which decides for every request before anything else sees it.

    Host ─► path and method ─► where it comes from ─► pace ─► content type ─► size and time of the body ─► its texts

Where it sits: around the whole application (API, pages, Gradio's routes, OPTIONS), put there by the composition root;
what each route may be asked stands in `guard_rules.py`. A browser sends a foreign page's request with our cookies and
from our address, so where a request comes from is read from `Origin` and `Sec-Fetch-Site`, which a page cannot set
(W3C Fetch Metadata); a client that is no browser sends neither. No CORS header leaves here and no forwarded header
comes in. Connections are limited below this layer, in `server.py`.

Not covered: who asks. Accounts do not exist yet; any program of this machine may ask anything.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chat_app.checked_requests import CHECKED
from chat_app.error_shape import error_response
from chat_app.gradio_events import Event, event_problem
from chat_app.guard_rules import MIB, RULES, Body, Rule
from chat_app.request_text import LONGEST_TEXT, BadText, check_json, check_path

log = logging.getLogger(__name__)

BODY_S = 20.0
"""Seconds for a JSON body to arrive whole, and for the next piece of a file."""
READ_S = 60.0
"""Seconds for a client to take the next piece of an answer."""
BUFFERED_BYTES = 64 * MIB
"""JSON bodies in memory at once, all requests together."""
STREAMS = 400
"""Event streams of pages that are open at once."""
NEW_SESSIONS = (120, 60)
"""Pages one address may open: (sessions, seconds)."""
SESSIONS = 4_000
"""Sessions that are remembered as known."""
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?")
SAFE = ("GET", "HEAD")
NOT_OURS = ("forwarded", "x-real-ip", "x-original-url", "x-rewrite-url", "x-http-method-override")
NOT_OURS_BEGIN = ("x-forwarded-", "x-gradio-", "x-original-")


class Refusal(Exception):
    """A request that is not let in: its status, and a sentence for people."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.allow = allow

    def response(self) -> JSONResponse:
        """The refusal in the API's one shape of an error."""
        headers = {"Cache-Control": "no-store"} | ({"Allow": self.allow} if self.allow is not None else {})
        return error_response(
            self.status, self.message, param=self.param, retry_after_s=self.retry_after_s, headers=headers
        )


class Guard:
    """ASGI middleware. `hosts`: the names this server answers to; `uploads`: where files of the admin page arrive.

    What passed here is marked, so that no layer further in looks at the same text again.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str],
        uploads: Path,
        rules: Sequence[Rule] = RULES,
        read_s: float = READ_S,
    ) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._uploads = uploads
        self._rules = rules
        self._read_s = read_s
        self._plain = {(method, rule.path): rule for rule in rules if "{" not in rule.path for method in rule.methods}
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._buffered = 0
        self._streams = 0
        self._sessions: dict[str, None] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it with a refusal."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        stepping = _Stepping(send, self._read_s)
        try:
            try:
                await self._let_in(scope, receive, stepping)
            except BadText as bad:
                raise Refusal(bad.status, bad.message, param=bad.param) from None
        except Refusal as refusal:
            if refusal.status in (403, 429, 503):
                log.warning("Refused with %d: %s", refusal.status, refusal.message)
            if not stepping.has_begun:
                await refusal.response()(scope, receive, send)
        except (ClientDisconnect, Stalled):
            pass

    async def _let_in(self, scope: Scope, receive: Receive, send: _Stepping) -> None:
        headers = Headers(scope=scope)
        host = self._require_host(headers)
        rule = self._require_rule(scope["method"], scope["path"])
        _require_ours(rule, headers, f"{scope['scheme']}://{host}", scope["method"])
        check_path(scope["raw_path"], scope["query_string"])
        address = scope["client"][0] if scope.get("client") else "local"
        await self._keep_pace(rule.pace.name, rule.pace.value, address)
        kind = _require_content(rule, headers, scope["method"])
        inner = {**scope, "headers": _own_headers(scope["headers"]), "query_string": _query(rule, scope), CHECKED: True}
        if rule.is_stream:
            await self._stream(inner, receive, send)
        elif kind is Body.JSON:
            await self._json(rule, inner, receive, send, address)
        elif kind is Body.FORM:
            await self._app(inner, _Counted(receive, rule.form_bytes), send)
        else:
            await self._app(inner, receive, send)

    # --- what is asked, and by whom ---------------------------------------------------------------------------------

    def _require_host(self, headers: Headers) -> str:
        given = headers.getlist("host")
        name = _host_name(given[0]) if len(given) == 1 else None
        if name not in self._hosts:
            shown = ", ".join(given)[:100]
            raise Refusal(
                400, f"This server does not answer to the name {shown!r}. Use one of: {', '.join(sorted(self._hosts))}."
            )
        return given[0].lower()

    def _require_rule(self, method: str, path: str) -> Rule:
        rule = self._plain.get((method, path))
        if rule is not None:
            return rule
        fitting = [one for one in self._rules if one.pattern.fullmatch(path)]
        for one in fitting:
            if method in one.methods:
                return one
        if fitting:
            allowed = ", ".join(dict.fromkeys(name for one in fitting for name in one.methods))
            raise Refusal(405, f"{path[:200]} is not for {method[:20]}; it takes {allowed}.", allow=allowed)
        raise Refusal(404, f"There is no {method[:20]} {path[:200]}. /openapi.json lists what there is.")

    async def _keep_pace(self, name: str, pace: tuple[int, int], address: str) -> None:
        requests, seconds = pace
        if not await self._limiter.hit(RateLimitItemPerSecond(requests, seconds), name, address):
            raise Refusal(
                429, f"More than {requests} requests of this kind came from your address within {seconds} s. "
                "Wait a moment.", retry_after_s=seconds,
            )  # fmt: skip

    # --- what is sent -----------------------------------------------------------------------------------------------

    async def _stream(self, scope: Scope, receive: Receive, send: _Stepping) -> None:
        if self._streams >= STREAMS:
            raise Refusal(503, f"{self._streams} pages are open already. Close one.", retry_after_s=15)
        self._streams += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._streams -= 1

    async def _json(self, rule: Rule, scope: Scope, receive: Receive, send: _Stepping, address: str) -> None:
        """A JSON body is read whole and checked once, here, for every route."""
        size = 0
        try:
            pieces = []
            try:
                async with asyncio.timeout(BODY_S):
                    async for piece in _pieces(receive):
                        size += len(piece)
                        self._buffered += len(piece)
                        pieces.append(piece)
                        if size > rule.max_bytes:
                            raise _too_long(rule.max_bytes)
                        if self._buffered > BUFFERED_BYTES:
                            raise Refusal(503, "Too much is being sent to the server at once.", retry_after_s=5)
            except TimeoutError:
                raise Refusal(408, f"The body did not arrive within {BODY_S:.0f} s.") from None
            body = b"".join(pieces)
            del pieces
            # A page itself says what is too long for it, in its own words; to Gradio a refusal here is an error.
            value = check_json(body, rule.max_bytes if rule.is_event else LONGEST_TEXT) if body else None
            if rule.is_event:
                await self._admit_event(scope["path"], value, address)
            await self._app(scope, _replayed(body, receive), send)
        finally:
            self._buffered -= size

    async def _admit_event(self, path: str, value: Any, address: str) -> None:
        event = Event(value, self._uploads if path.startswith("/admin/") else None)
        problem = event_problem(event)
        if problem is not None:
            raise Refusal(422, problem)
        session = event.session
        if session not in self._sessions:
            await self._keep_pace("session", NEW_SESSIONS, address)
        self._sessions.pop(session, None)
        self._sessions[session] = None
        while len(self._sessions) > SESSIONS:
            del self._sessions[next(iter(self._sessions))]


def _host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None where it is none."""
    found = HOST.fullmatch(host.lower())
    return found["name"].strip("[]") if found else None


def _require_ours(rule: Rule, headers: Headers, ours: str, method: str) -> None:
    """A request that a page elsewhere makes is refused; a person who follows a link to a page of ours is not."""
    site = headers.get("sec-fetch-site")
    origins = headers.getlist("origin")
    foreign = site not in (None, "none", "same-origin") or any(_plain(origin) != _plain(ours) for origin in origins)
    if not foreign:
        return
    navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if method in SAFE and not origins and rule.opens_from_elsewhere and navigates:
        return
    shown = (origins[0] if origins else str(site))[:100]
    raise Refusal(403, f"A page elsewhere ({shown!r}) may not ask this server for anything.")


def _plain(origin: str) -> tuple[str, str | None, int | None] | None:
    """Scheme, name and port of an origin; None where it is none."""
    try:
        parts = urlsplit(origin.lower())
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.scheme, parts.hostname, port) if parts.scheme and parts.hostname else None


def _require_content(rule: Rule, headers: Headers, method: str) -> Body:
    """Which kind of body comes, by its declared type. A form of another site can declare none that is let in here."""
    declared = headers.get("content-length")
    length = int(declared) if declared is not None and declared.isascii() and declared.isdigit() else 0
    if method in SAFE:
        if length or "transfer-encoding" in headers:
            raise Refusal(400, f"{method} carries no body.")
        return Body.NONE
    if "content-encoding" in headers:
        raise Refusal(415, "A body must be sent as it is, without Content-Encoding.")
    given = headers.getlist("content-type")
    name, _, parameters = (given[0] if len(given) == 1 else "").partition(";")
    charset = parameters.lower().replace(" ", "").replace('"', "").partition("charset=")[2]
    kind = next((body for body in rule.bodies if body.value == name.strip().lower()), None)
    if kind is None or (kind is Body.JSON and charset not in ("", "utf-8", "utf8")):
        wanted = " or ".join(body.value for body in rule.bodies)
        shown = ", ".join(given)[:100] or "no Content-Type"
        raise Refusal(415, f"This request needs Content-Type: {wanted}, also where its body is empty (got {shown!r}).")
    limit = rule.form_bytes if kind is Body.FORM else rule.max_bytes
    if length > limit:
        raise _too_long(limit)
    return kind


def _too_long(limit: int) -> Refusal:
    size = f"{limit // MIB} MiB" if limit >= MIB else f"{limit // 1024} KiB"
    return Refusal(413, f"The body is larger than the {size} that this route takes.")


def _own_headers(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without `Origin`, which has been judged, and without what only a proxy may say."""
    return [
        (name, value)
        for name, value in headers
        if name != b"origin"
        and name.decode("latin-1") not in NOT_OURS
        and not name.decode("latin-1").startswith(NOT_OURS_BEGIN)
    ]


def _query(rule: Rule, scope: Mapping[str, Any]) -> bytes:
    """A page takes no parameters: Gradio would restore another's session from one."""
    query: bytes = scope["query_string"]
    return b"" if rule.opens_from_elsewhere else query


async def _pieces(receive: Receive) -> Any:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what the connection says."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


class _Counted:
    """Counts a file as it arrives. Raises Refusal where it is too large, or stops coming."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0
        self._is_whole = False

    async def __call__(self) -> Message:
        if self._is_whole:
            return await self._receive()  # waits for the client to leave
        try:
            async with asyncio.timeout(BODY_S):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, f"Nothing more of the body arrived for {BODY_S:.0f} s.") from None
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            raise _too_long(self._limit)
        self._is_whole = not message.get("more_body", False)
        return message


class Stalled(Exception):
    """A client that no longer takes its answer."""


class _Stepping:
    """Sends an answer, for as long as the client takes it; no CORS header leaves."""

    def __init__(self, send: Send, read_s: float) -> None:
        self._send = send
        self._read_s = read_s
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            kept = [(name, value) for name, value in message.get("headers", ()) if not _is_cors(name)]
            message = {**message, "headers": kept}
        try:
            async with asyncio.timeout(self._read_s):
                await self._send(message)
        except TimeoutError:
            log.warning("A client took nothing of its answer for %.0f s: its connection is closed.", self._read_s)
            raise Stalled from None


def _is_cors(name: bytes) -> bool:
    return name.lower().startswith(b"access-control-")
