"""A circuit breaker: after failures in a row nobody waits for a server that does not work; later one request tries it.

    closed ── `limit` failures in a row ──> open ── `cool_down_s` ──> half-open ── the trial answers ──> closed
                                              └──────────── the trial fails ────────────┘

Where it sits: one for each URL of `upstream.py`. It knows no HTTP: the caller says how its request went. A class of our
own, because of the libraries for this the asyncio ones are unmaintained or cannot be given a clock, and none lets
exactly one trial through.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from chat_app.serving.engine import EngineBusy


class CircuitBreaker:
    """Call `enter` before a request, then exactly one of `succeeded`, `failed`, `left`; `answered` in between."""

    def __init__(
        self,
        name: str,
        *,
        limit: int = 5,
        cool_down_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._limit = limit
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._failures = 0
        self._opened_at: float | None = None
        self._trying = False  # half-open: the one trial is under way

    @property
    def is_open(self) -> bool:
        """True while requests are refused without asking the server."""
        return self._opened_at is not None and (self._trying or self._wait_s() > 0)

    def enter(self) -> None:
        """Let a request through. Raises EngineBusy while open, and during the trial."""
        if self._opened_at is None:
            return
        if self.is_open:
            wait_s = max(self._wait_s(), 1.0)
            raise EngineBusy(f"{self._name} failed {self._failures} times in a row; next try in {wait_s:.0f} s", wait_s)
        self._trying = True

    def answered(self) -> None:
        """The server works (its first token came, or an error of the request's own): the trial has succeeded."""
        if self._opened_at is not None:
            self._failures = 0
            self._opened_at, self._trying = None, False

    def succeeded(self) -> None:
        """The request went well to its end."""
        self.answered()
        self._failures = 0

    def failed(self) -> None:
        """The server did not answer, or broke its answer off."""
        self._failures += 1
        self._trying = False
        if self._failures >= self._limit:
            self._opened_at = self._clock()

    def left(self) -> None:
        """The request ended without a verdict: its client went away."""
        self._trying = False

    def _wait_s(self) -> float:
        assert self._opened_at is not None
        return self._opened_at + self._cool_down_s - self._clock()
