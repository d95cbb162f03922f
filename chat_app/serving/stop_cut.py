"""A text that grows, cut at the first stop text.

Where it sits: `upstream.py` puts TGI's answers through it. TGI ends at a stop text as the others do, but sends it too.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopCut:
    """Put each piece through `cut`; `rest` at the end."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_found = False

    def cut(self, text: str) -> str:
        """What of the text so far is certain to be shown; the beginning of a stop text is held back."""
        self._held += text
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.is_found = True
            shown, self._held = self._held[: min(ends)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def rest(self) -> str:
        """What was held back when the text ended."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
