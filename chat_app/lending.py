"""The served model lends its memory to a run: the supervisor's thread asks, the server's event loop does it.

Where it sits: part of what the composition root builds, between `trainer.supervisor` (its port `Lender`) and
`operations.py`. When to lend is `trainer/preflight.py`'s word (ZLOOP_DEVICE_POLICY).
"""

import asyncio
import logging
from concurrent.futures import Future

from chat_app.operations import Operations

log = logging.getLogger(__name__)


class EngineLender:
    """Ends what is served, and brings it back. Make it in the server's event loop; other threads may use it."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._loop = asyncio.get_running_loop()

    def pause(self, why: str, back_in_s: float) -> Future[None]:
        """Begin to end the served model; done once its memory is free."""
        return asyncio.run_coroutine_threadsafe(self._operations.answers.slot.pause(why, back_in_s), self._loop)

    def resume(self) -> None:
        """Begin to serve it again. What fails is logged, and tried again when somebody asks something."""
        asyncio.run_coroutine_threadsafe(self._operations.resume_serving(), self._loop).add_done_callback(_said)


def _said(resumed: Future[None]) -> None:
    if not resumed.cancelled() and (error := resumed.exception()) is not None:
        log.error("The model could not be served again after a run: %s", error)
