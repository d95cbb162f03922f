"""The text of one answer as its tokens come: whole characters only, and nothing that a stop text may still swallow.

A character may need several tokens, and a token's text may depend on the one before it, so a short window of tokens is
decoded again for each new one. Used by `batch.py`; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what a decoder shows for the bytes of a character that is not complete


class AnswerText:
    """Takes token ids one by one and gives out text. `decode` turns token ids into text."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        self._decode = decode
        self._stops = stops
        self._tokens: list[int] = []
        self._window = 0  # tokens before it do not change the text of new ones
        self._shown = 0  # tokens before it are in the text already
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that can be shown now that `token` has come; sets `is_stopped` where a stop text is complete."""
        self._tokens.append(token)
        fresh = self._fresh()
        if fresh.endswith(BROKEN):
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        return self._release(fresh)

    def rest(self) -> str:
        """What was held back, once no token comes any more. Half a character at the end is dropped."""
        if self.is_stopped:
            return ""
        shown = self._release(self._fresh().rstrip(BROKEN))
        held, self._held = self._held, ""
        return shown if self.is_stopped else shown + held

    def _fresh(self) -> str:
        """The text of the tokens that are not shown yet."""
        before = self._decode(self._tokens[self._window : self._shown])
        return self._decode(self._tokens[self._window :])[len(before) :]

    def _release(self, fresh: str) -> str:
        """Add to the held text; give out what no stop text can begin in."""
        text = self._held + fresh
        ends = [found for found in (text.find(stop) for stop in self._stops) if found >= 0]
        if ends:
            self.is_stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
