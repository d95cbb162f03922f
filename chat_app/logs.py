"""The server's log: a line that comes again and again is written a few times, then counted.

Where it sits: the composition root puts `Sparing` on the log's handler. Whoever can make the server log a line (a
broken request, a refused page) can otherwise fill the disk with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LINES = 5
"""Lines of one kind within `SECONDS`; a kind is a place in the code: logger, level and format."""
SECONDS = 60.0
KINDS = 1_000


class Sparing(logging.Filter):
    """Lets `LINES` lines of one kind through in `SECONDS`; the next that is let through says how many were not."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[str, int, str], tuple[float, int]] = {}  # kind → since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        if record.levelno < logging.WARNING:
            return True
        kind = (record.name, record.levelno, f"{record.pathname}:{record.lineno}:{str(record.msg)[:80]}")
        since, seen = self._seen.pop(kind, (self._clock(), 0))
        if self._clock() - since >= SECONDS:
            if seen > LINES:
                record.msg = f"{record.msg} ({seen - LINES} more lines like this one were left out)"
            since, seen = self._clock(), 0
        self._seen[kind] = since, seen + 1
        while len(self._seen) > KINDS:
            del self._seen[next(iter(self._seen))]
        return seen < LINES
