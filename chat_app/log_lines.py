"""One event, one beginning of a line in the log: what a client or a file says cannot pretend to be another event.

Where it sits: the composition root gives every handler this formatter; uvicorn's loggers use it too. Control
characters of a message are written as `repr` writes them; the lines of a traceback, and what a library prints by
itself, are indented, so that none of them begins like an event. A line that comes again and again is counted: whoever
makes the server log one cannot fill the disk with it.
"""

import io
import logging
import time
from collections.abc import Callable
from typing import TextIO

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
INDENT = "  | "
LINES = 5
"""Lines of one kind within `SECONDS`; a kind is a place in the code."""
SECONDS = 60.0
KINDS = 1_000
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
# What turns the direction of writing, or is not seen at all.
_UNSEEN = "\u00ad\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
_ESCAPES = {
    code: ascii(chr(code))[1:-1]
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), *map(ord, _LINE_ENDS + _UNSEEN))
}
_ESCAPES_OF_LINES = {code: escape for code, escape in _ESCAPES.items() if code not in map(ord, "\n\t")}


class OneLineFormatter(logging.Formatter):
    """A message on one line, tracebacks below it, indented."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return super().formatMessage(record).translate(_ESCAPES)

    def formatException(self, ei: object) -> str:  # noqa: N802 - logging's name
        return indented(super().formatException(ei))  # type: ignore[arg-type]

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        return indented(super().formatStack(stack_info))


def indented(text: str) -> str:
    """Several lines below an event."""
    return "\n".join(INDENT + line for line in text.translate(_ESCAPES_OF_LINES).split("\n"))


class Aside(io.TextIOBase):
    """Standard error for those who print: every line is indented, so that it cannot be taken for an event."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._at_beginning = True

    def write(self, text: str) -> int:
        for line in text.translate(_ESCAPES_OF_LINES).splitlines(keepends=True):
            self._stream.write(INDENT + line if self._at_beginning else line)
            self._at_beginning = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True


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


def write_log_lines() -> None:
    """Log to standard error, this process's one handler; what others install for themselves is taken off."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLineFormatter())
    handler.addFilter(Sparing())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for chatty in ("httpx", "httpcore", "httpx2", "httpcore2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
