"""The web server: uvicorn, which finishes the answers it has begun before it stops.

Where it sits: the composition root runs it. On the first SIGTERM or SIGINT the port stays open, so that probes see
red and newcomers are told to come back, until `drain` returns; then the port is closed, and what is left of the
connections a moment later (an open page keeps one for ever). A second signal ends everything at once.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import uvicorn

LAST_BYTES_S = 1.0
"""Seconds for the ends of responses, once no answer is being written; then the server hangs up."""
TASKS_S = 5
"""Seconds for what still runs after that; then uvicorn cancels it."""


class Server(uvicorn.Server):
    """`drain` is awaited between the first signal and the closing of the port."""

    def __init__(self, app: Any, drain: Callable[[], Awaitable[None]]) -> None:
        # loop and http are named: other packages bring faster ones along, which would be taken unseen and untested.
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,  # the composition root says how a line looks
                log_level="warning",
                timeout_graceful_shutdown=TASKS_S,
                ws="none",
                loop="asyncio",
                http="h11",
            )
        )
        self._drain = drain

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
