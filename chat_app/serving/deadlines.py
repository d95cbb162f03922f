"""Until when something must come from a model server, and how closing an engine ends every wait for it.

Where it sits: used by `upstream.py`, one `Deadlines` an answer, one `Waits` an engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from chat_app.serving.engine import EngineBroken

LAST_WORDS_S = 2.0  # after the finish_reason, for the usage


class Closed(EngineBroken):
    """The engine was closed while this answer was being written."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect, to the first token, between two pieces of text, for the whole answer."""

    connect_s: float = 5.0
    first_token_s: float = 120.0
    between_s: float = 60.0
    total_s: float = 900.0


class Deadlines:
    """Until when the next thing must come. Events without text do not move a deadline."""

    def __init__(self, timeouts: Timeouts, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeouts = timeouts
        self._clock = clock
        self._total = clock() + timeouts.total_s
        self._next = clock() + timeouts.first_token_s
        self.has_text = False

    @property
    def left_s(self) -> float:
        return max(0.0, min(self._next, self._total) - self._clock())

    @property
    def is_over(self) -> bool:
        """Whether the time for the whole answer has passed."""
        return self._clock() >= self._total

    @property
    def which(self) -> str:
        """Which deadline has passed, with its value."""
        if self.is_over:
            return f"the answer was not finished within {self._timeouts.total_s:g} s"
        if not self.has_text:
            return f"no first token within {self._timeouts.first_token_s:g} s"
        return f"nothing new for {self._timeouts.between_s:g} s"

    def on_text(self) -> None:
        self.has_text = True
        self._next = self._clock() + self._timeouts.between_s

    def on_end(self) -> None:
        self._next = self._clock() + LAST_WORDS_S


class Waits:
    """Every wait of one engine's streams, so that closing the engine ends them at once."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Timeout] = set()
        self._closed = False

    def close(self) -> None:
        """End the waits there are; later ones end as they begin."""
        self._closed = True
        now = asyncio.get_running_loop().time()
        for wait in self._waiting:
            wait.reschedule(now)

    @asynccontextmanager
    async def until(self, deadlines: Deadlines) -> AsyncIterator[None]:
        """Wait until the next deadline. Raises TimeoutError, or Closed."""
        left_s = deadlines.left_s
        if left_s <= 0 and not self._closed:  # where everything is there at once nobody looks at the clock
            raise TimeoutError
        try:
            async with asyncio.timeout(0 if self._closed else left_s) as wait:
                self._waiting.add(wait)
                try:
                    yield
                finally:
                    self._waiting.discard(wait)
        except TimeoutError:
            if self._closed:
                raise Closed("its engine was closed") from None
            raise
        if self._closed:
            raise Closed("its engine was closed")
