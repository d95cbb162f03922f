"""What cost time stays: answers and judgements by the content of what was asked, one JSON line each.

A benchmark that broke off is asked for again and goes on where it was; one that is asked for twice costs nothing the
second time. A line that a crash left half-written is not there. One writer a file, many threads in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any


def key_of(*parts: Any) -> str:
    """The same for the same content, in this and any other process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Kept:
    """A dictionary of texts that is on disk. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._adding = threading.Lock()
        self._texts: dict[str, str] = {}
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
                self._texts[str(row["key"])] = str(row["text"])
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash: asked for again

    def get(self, key: str) -> str | None:
        """The text, None where it is not there."""
        return self._texts.get(key)

    def add(self, key: str, text: str) -> None:
        """Keep a text; it is on disk afterwards."""
        line = json.dumps({"key": key, "text": text}, ensure_ascii=False).encode() + b"\n"
        with self._adding:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                if file.tell() and not self._ends_whole():
                    file.write(b"\n")
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._texts[key] = text

    def _ends_whole(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
