"""What an event of a page may carry: a session, and no file but one that was uploaded for it.

Where it sits: `guard.py` asks it for every `queue/join`. Gradio reads a file wherever a value of an event looks like
its `FileData`, whatever component the value is for, and fetches it where its path is a URL; so a value like that is
refused before Gradio sees it, on every page but the one that has an upload, and there unless it lies in the folder of
uploads. (`mount.py` has Gradio refuse them too.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SESSION = re.compile(r"[A-Za-z0-9_-]{6,64}")


@dataclass(frozen=True, slots=True)
class Event:
    """The body of an event; `uploads` is the folder of the page's uploads, None where it has none."""

    body: Any
    uploads: Path | None = None

    @property
    def session(self) -> str:
        """The page that sends it; empty where it does not say."""
        given = self.body.get("session_hash") if isinstance(self.body, dict) else None
        return given if isinstance(given, str) and SESSION.fullmatch(given) else ""


def event_problem(event: Event) -> str | None:
    """Why an event is refused, in a sentence; None where it is let in."""
    if not event.session:
        return "An event needs the session of its page (session_hash)."
    for value in _objects(event.body):
        if not _is_file(value):
            continue
        if event.uploads is None:
            return "This page takes no files."
        if not _was_uploaded(value, event.uploads):
            return "Only a file that was uploaded on this page can be used here."
    return None


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _is_file(value: dict[str, Any]) -> bool:
    meta = value.get("meta")
    return "path" in value or value.get("_type") == "gradio.FileData" or (isinstance(meta, dict) and "_type" in meta)


def _was_uploaded(value: dict[str, Any], uploads: Path) -> bool:
    path = value.get("path")
    if not isinstance(path, str):
        return set(value) <= {"_type"}  # the `meta` of a file
    if "\x00" in path or not Path(path).is_absolute():
        return False
    found = Path(path).resolve()
    return found.is_relative_to(uploads.resolve()) and found.is_file()
