"""The HTTP client for model servers of others: what may come in, checked byte by byte before anything parses it.

Where it sits: `upstream.py` makes its requests with `new_client`, and gives it to huggingface_hub as client factory.
The hub's own client follows redirects, has no time limit and stays away from the network in offline mode, even from
localhost; ours does none of that. It takes no proxy from the environment (a forgotten one would see every
conversation), verifies TLS (SSL_CERT_FILE is honoured), and keeps no connection: a stale one looks like a broken
server.

Of a stream of events the hub's reader would replace bytes that are no UTF-8, cut lines at characters JSON may hold
(U+2028), and buffer a line without an end. So each line is checked here: strict UTF-8, at most MAX_LINE bytes.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from functools import cache

import httpx2

EVENTS = "text/event-stream"  # as `Accept` it means: nothing else will do
CONNECT_S = 5.0
MAX_LINE = 1 << 20
MAX_STREAM = 64 << 20
MAX_BODY = 16 << 20
MAX_ERROR_BODY = 64 << 10
# The line ends of str.splitlines that JSON allows in a string as they are.
_CUTTING = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class BadBytes(ValueError):
    """What came is no stream of events: no UTF-8, too long, compressed, or of another type."""


class Answered(Exception):
    """The server answered with another status than 200."""

    def __init__(self, status: int, headers: httpx2.Headers, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        super().__init__(f"status {status}")


def new_client(connect_s: float = CONNECT_S) -> httpx2.AsyncClient:
    """A client of its own for one request; the caller sets deadlines for everything but connecting."""
    return httpx2.AsyncClient(
        transport=CheckedTransport(httpx2.AsyncHTTPTransport(verify=_tls(), trust_env=False)),
        timeout=httpx2.Timeout(None, connect=connect_s),
        follow_redirects=False,
        trust_env=False,
    )


@cache
def _tls() -> ssl.SSLContext:
    """Loading the certificates takes longer than a request: once."""
    return httpx2.create_ssl_context()


class CheckedTransport(httpx2.AsyncBaseTransport):
    """Passes requests on; raises Answered for what is not 200, and bounds what is."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.headers["Accept-Encoding"] = "identity"  # the bytes are checked as they come
        response = await self._inner.handle_async_request(request)
        try:
            body = response.stream
            assert isinstance(body, httpx2.AsyncByteStream)
            if response.status_code != httpx2.codes.OK:
                raise Answered(response.status_code, response.headers, await _beginning(body))
            if "content-encoding" in response.headers:
                raise BadBytes(f"its answer is compressed ({response.headers['content-encoding']})")
            streamed = response.headers.get("content-type", "").startswith(EVENTS)
            if request.headers.get("accept") == EVENTS and not streamed:
                kind = response.headers.get("content-type", "no type")
                raise BadBytes(f"its answer is {kind}, not a stream of events (is the URL right?)")
        except BaseException:
            await response.aclose()
            raise
        checked = _Lines(body) if streamed else _Bounded(body)
        return httpx2.Response(200, headers=response.headers, stream=checked, extensions=response.extensions)

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _beginning(body: httpx2.AsyncByteStream) -> bytes:
    """As much of an error's body as anyone would read."""
    read = b""
    async for piece in body:
        read += piece
        if len(read) >= MAX_ERROR_BODY:
            break
    return read[:MAX_ERROR_BODY]


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream) -> None:
        self._inner = inner

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = 0
        async for piece in self._inner:
            read += len(piece)
            if read > MAX_BODY:
                raise BadBytes(f"its answer is longer than {MAX_BODY} bytes")
            yield piece

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Lines(_Bounded):
    """Whole lines only, each of them text."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read, rest = 0, b""
        async for piece in self._inner:
            read += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            if read > MAX_STREAM or len(rest) > MAX_LINE:
                raise BadBytes(f"it sends a line of more than {MAX_LINE} or a stream of more than {MAX_STREAM} bytes")
            for line in lines:
                yield _checked(line) + b"\n"
        if rest:
            yield _checked(rest) + b"\n"


def _checked(line: bytes) -> bytes:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BadBytes(f"it sends bytes that are no UTF-8 ({error.reason} at byte {error.start} of a line)") from None
    if text.isascii():
        return line
    for character, escape in _CUTTING.items():
        text = text.replace(character, escape)
    return text.encode()
