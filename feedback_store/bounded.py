"""Files that are read whole – settings, states, manifests – within limits, so that none of them takes the memory.

    read_text → load_json, load_yaml        every reader of YAML, of manifests and of states, in all three packages

A text is counted before it is parsed: bytes, then what its values would take in memory. YAML has no anchors and no
aliases here (a few lines of them unfold to gigabytes) and little depth. Only regular files are opened, so that neither
a device nor a pipe is read for ever. Raises ``TooMuch`` and ``ValueError``, whose sentences have value and limit.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

MIB = 2**20
JSON_BYTES = 128 * MIB
JSON_MEMORY = 320 * MIB
YAML_BYTES = MIB // 4
YAML_DEPTH, YAML_VALUES = 20, 20_000
_BYTES_A_VALUE = 90  # an empty object with its place in a list; measured, rounded up
_COPIES = 3  # of the text itself while it is parsed


class TooMuch(ValueError):
    """A file that is larger, or would be in memory, than anything of its kind has reason to be."""


def read_text(path: Path, limit: int) -> str:
    """The text of a regular file of at most ``limit`` bytes, as UTF-8. Raises OSError, TooMuch, ValueError."""
    return read_bytes(path, limit).decode("utf-8")


def read_bytes(path: Path, limit: int) -> bytes:
    """The same as bytes. What is no file – a pipe, a device – is refused unread."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise TooMuch(f"{path} is not a regular file. Put a file in its place, or remove it.")
        content = file.read(min(limit, max(found.st_size, 2**16)) + 1)  # so much memory is taken at once
    if len(content) > limit:
        raise TooMuch(f"{path} is larger than {limit:,} bytes, the limit for a file of its kind. Make it smaller.")
    return content


def load_json(path: Path, limit: int = JSON_BYTES, memory: int = JSON_MEMORY) -> Any:
    """The value of a JSON file. Raises OSError, TooMuch, and ValueError where it is no JSON."""
    content = read_bytes(path, limit)
    check_json(content, str(path), memory)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise TooMuch(f"{path} nests its values too deeply to be read. Mend it or remove it.") from error


def check_json(content: bytes, name: str, memory: int = JSON_MEMORY) -> None:
    """Raise TooMuch where parsing would take more than ``memory`` bytes, as counted by the signs between values."""
    values = 1 + sum(map(content.count, (b",", b":", b"{", b"[")))
    widest = 4 if max(content, default=0) >= 0xF0 else 2 if max(content, default=0) >= 0xC4 else 1
    needed = len(content) * (_COPIES - 1 + widest) + values * _BYTES_A_VALUE
    if needed > memory:
        raise TooMuch(
            f"{name} has {len(content):,} bytes of JSON with up to {values:,} values, which take about "
            f"{needed // MIB:,} MiB to read; the limit is {memory // MIB:,} MiB. Split it, or write one object a line."
        )


def load_yaml(path: Path, limit: int = YAML_BYTES) -> Any:
    """The value of a YAML file, without anchors and aliases. Raises OSError, TooMuch, ValueError."""
    text = read_text(path, limit)
    try:
        return yaml.load(text, _BoundedLoader)  # noqa: S506 - a SafeLoader with limits
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise TooMuch(f"{path} nests its values too deeply to be read. Mend it or remove it.") from error


class _BoundedLoader(yaml.SafeLoader):
    """A SafeLoader that counts: at most ``YAML_VALUES`` values, ``YAML_DEPTH`` deep, none of them twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            where = event.start_mark
            raise TooMuch(
                f"line {where.line + 1} has an anchor or an alias (& or *), which are not read here. Write the value "
                "out where it is used."
            )
        self._depth, self._values = self._depth + 1, self._values + 1
        if self._depth > YAML_DEPTH or self._values > YAML_VALUES:
            raise TooMuch(
                f"it has more than {YAML_DEPTH} values within one another or more than {YAML_VALUES:,} in all, which "
                "are the limits. Make it smaller."
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1
