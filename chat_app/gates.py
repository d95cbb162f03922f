"""How many of the long operations go on at once: a few, and whoever comes beyond that is told so instead of waiting.

    button, command, route → operation → `with gates.importing:` → done, or Refused (429, Retry-After)

Where it sits: `Operations` and its parts enter the gates, so that pages, commands and routes share them. All of them
together let in fewer than half of the threads that routes and page handlers have (40), so that picks, chats and health
always find one. Nobody waits in front of a gate.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TypeVar

from chat_app.refused import Refused

Item = TypeVar("Item")


class Gate:
    """Lets `at_once` in. Entered with `with`, or for as long as an iterator is read."""

    def __init__(self, what: str, at_once: int, retry_after_s: int) -> None:
        self.at_once = at_once
        self._what = what
        self._retry_after_s = retry_after_s
        self._inside = 0
        self._changing = threading.Lock()

    def __enter__(self) -> None:
        with self._changing:
            self._refuse_if_full()
            self._inside += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changing:
            self._inside -= 1

    def check(self) -> None:
        """Raise Refused where nobody would be let in now."""
        with self._changing:
            self._refuse_if_full()

    def _refuse_if_full(self) -> None:
        if self._inside >= self.at_once:
            raise Refused(
                429,
                f"{self._what} goes on already ({self._inside} of {self.at_once} at once). "
                f"Try again when that is over, in {self._retry_after_s} s or later.",
                retry_after_s=self._retry_after_s,
            )

    def around(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items; whoever reads them is inside until they are read, or nobody holds them any more."""
        self.__enter__()
        return _Guarded(items, self)


class _Guarded(Iterator[Item]):
    def __init__(self, items: Iterator[Item], gate: Gate) -> None:
        self._items = items
        self._gate: Gate | None = gate

    def __next__(self) -> Item:
        try:
            return next(self._items)
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.__exit__(None, None, None)

    def __del__(self) -> None:
        self._leave()


class Gates:
    """The gates of one server."""

    def __init__(self) -> None:
        self.importing = Gate("An import", 1, 10)
        self.exporting = Gate("An export", 2, 10)
        self.counting = Gate("Counting", 2, 3)
        self.asking = Gate("A query", 2, 3)
        self.erasing = Gate("An erasure", 1, 30)
        self.backing_up = Gate("A backup", 1, 30)
        self.freezing = Gate("The making of a snapshot", 1, 10)
        self.starting = Gate("The start of a run", 3, 5)
        self.evaluating = Gate("An evaluation", 1, 60)
        self.reporting = Gate("The writing of a report", 2, 5)
        self.loading = Gate("The loading of a version", 2, 10)
