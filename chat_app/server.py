"""The web server: uvicorn, which finishes the answers it has begun before it stops.

Where it sits: the composition root runs it. On the first SIGTERM or SIGINT the port stays open, so that probes see
red and newcomers are told to come back, until `drain` returns; then uvicorn closes the port and what is left of the
connections (an open page keeps one for ever). A second signal ends everything at once.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import uvicorn

CONNECTIONS_S = 2
"""Seconds for the last bytes of responses, once no answer is being written."""


class Server(uvicorn.Server):
    """`drain` is awaited between the first signal and the closing of the port."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
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

    def handle_exit(self, *_: object) -> None:
        """Unlike uvicorn's own, signals are not raised again at the end: a clean stop is exit code 0."""
        self.force_exit = self.should_exit
        self.should_exit = True
