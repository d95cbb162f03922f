"""When to bring back what died: at once the first time, then after 1, 2, 4 … 60 s. Asked by `slot.py`."""

from __future__ import annotations

from collections.abc import Callable

FIRST_S, LONGEST_S = 1.0, 60.0
STEADY_S = 60.0  # whoever lives this long owes nothing for earlier deaths


class Backoff:
    """The tries to bring one engine back since it last lived for `STEADY_S`. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ended = clock()
        self._lives = True
        self.tries = 0

    @property
    def wait_s(self) -> float:
        """Seconds until the next try is due; 0 where it is due now."""
        if self.tries == 0 or self._has_been_steady:
            return 0.0
        return max(0.0, self._ended + min(LONGEST_S, FIRST_S * 2.0 ** (self.tries - 1)) - self._clock())

    def note(self, *, lives: bool) -> None:
        """A try has ended; the pause counts from here."""
        self.tries = 1 if self._has_been_steady else self.tries + 1
        self._ended, self._lives = self._clock(), lives

    @property
    def _has_been_steady(self) -> bool:
        return self._lives and self._clock() - self._ended >= STEADY_S
