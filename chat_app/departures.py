"""Clients that leave: work done for a connection ends with it.

Where it sits: `api.py` runs every answer through `while_present`. The pages' connections are Gradio's, which closes a
handler at its next update; `answers.py` yields at least twice a second.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

Result = TypeVar("Result")


class ClientGone(Exception):
    """The connection was closed before the work was done; the work has been stopped."""


async def while_present(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` for as long as the connection behind `receive` is open; the request's body must have been read.

    The work is a task of its own and cancelled once: Starlette's own way cancels again and again while the work tidies
    up, and an engine's connection may then stay open. Raises ClientGone, or what `work` raises.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
