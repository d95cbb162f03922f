"""The web server: uvicorn, which finishes the answers it has begun before it stops.

Where it sits: the composition root runs it. Below the guard (`guard.py`) it bounds connections: one that sends no whole
request in time is closed, and where there are too many, the one that has waited longest makes room.

On the first SIGTERM or SIGINT the port stays open, so that probes see
red and newcomers are told to come back, until `drain` returns; then the port is closed, and what is left of the
connections a moment later (an open page keeps one for ever). A second signal ends everything at once.
"""

import asyncio
import resource
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

LAST_BYTES_S = 1.0
"""Seconds for the ends of responses, once no answer is being written; then the server hangs up."""
TASKS_S = 5
"""Seconds for what still runs after that; then uvicorn cancels it."""

REQUEST_S = 10.0
"""Seconds in which a connection must have sent the head of its (next) request."""
FILES = 65_536
"""Files this process may open, where the system lets it."""
ACCEPTED = 64
"""Connections that asyncio takes at a time, before it looks at any: fewer than there are files left to open."""
QUEUED = 2_048
"""Connections that the system keeps for us meanwhile."""
CONNECTIONS = 1_000
"""Connections at once, at most; never more than half of the files this process may open."""


class Connection(H11Protocol):
    """One connection. uvicorn itself waits for ever for the head of a request, once it has begun to wait."""

    _deadline: asyncio.TimerHandle | None = None
    waiting_since: float | None = None

    @property
    def is_answering(self) -> bool:
        """Whether a request of this connection is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room for it, and begin to wait for its request."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > _most_connections():
            waiting = [(one.waiting_since, one) for one in self.connections if isinstance(one, Connection)]
            idle = [(since, id(one), one) for since, one in waiting if since is not None]
            longest = min(idle)[-1] if idle else self
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A request whose head is whole is waited for no longer."""
        super().data_received(data)
        if self.is_answering:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it is there already."""
        super().on_response_complete()
        if not self.is_answering and not self.transport.is_closing():
            self._wait()

    def _wait(self) -> None:
        self._stop_waiting()
        self.waiting_since = self.loop.time()
        self._deadline = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        self.waiting_since = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _most_connections() -> int:
    return min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class Server(uvicorn.Server):
    """`drain` is awaited between the first signal and the closing of the port."""

    def __init__(self, app: Any, drain: Callable[[], Awaitable[None]]) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, FILES), most))
        # loop and http are named: other packages bring faster ones along, which would be taken unseen and untested.
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,  # the composition root says how a line looks
                log_level="warning",
                timeout_graceful_shutdown=TASKS_S,
                ws="none",
                loop="asyncio",
                http=Connection,
                backlog=ACCEPTED,
                proxy_headers=False,  # by default uvicorn believes whoever on this machine says who is asking
                server_header=False,
            )
        )
        self._drain = drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port."""
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(QUEUED)

    async def main_loop(self) -> None:
        """Serve until a signal, then drain."""
        await super().main_loop()
        draining = asyncio.ensure_future(self._drain())
        while not draining.done() and not self.force_exit:
            await asyncio.wait({draining}, timeout=0.1)  # a signal handler can only set a flag
        draining.cancel()
        with suppress(asyncio.CancelledError):
            await draining

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, then the connections, then the application."""
        hanging_up = asyncio.create_task(self._hang_up())
        await super().shutdown(sockets)
        hanging_up.cancel()

    async def _hang_up(self) -> None:
        await asyncio.sleep(LAST_BYTES_S)
        for connection in list(self.server_state.connections):
            connection.transport.close()

    def handle_exit(self, *_: object) -> None:
        """Unlike uvicorn's own, signals are not raised again at the end: a clean stop is exit code 0."""
        self.force_exit = self.should_exit
        self.should_exit = True
