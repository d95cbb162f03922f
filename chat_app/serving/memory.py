"""Whether another engine fits: how much memory is free, and how much a GGUF model's cache takes.

Asked by `llama_engine.py` before it starts a server. Counted are the machine's memory and the limit of the control
group (version 2, as containers have it). Pages of a model file that several servers share count as free and as needed,
which cancels out. Not covered: the memory of graphics cards, architectures that keep no plain key-value cache.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import psutil

CGROUPS = Path("/sys/fs/cgroup")
CACHE_VALUE_BYTES = 2  # 16-bit floats
# GGUF's value types: how `struct` reads each. 8 is a string, 9 an array.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def available_bytes(cgroups: Path = CGROUPS) -> int:
    """Memory that can be used without pushing anything out, in bytes."""
    return min([int(psutil.virtual_memory().available), *_limits(cgroups)])


def total_bytes(cgroups: Path = CGROUPS) -> int:
    """Memory there is, used or not, in bytes."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = (cgroups / "memory.max").read_text().strip()
        return total if limit == "max" else min(total, int(limit))
    except (OSError, ValueError):
        return total


def cache_bytes(gguf: Path, context_tokens: int) -> int:
    """What the keys and values of `context_tokens` tokens take; 0 where the file does not say (it is no model then)."""
    try:
        said = _header(gguf)
        name = said["general.architecture"]
        heads = int(said[f"{name}.attention.head_count"])
        kv_heads = int(said.get(f"{name}.attention.head_count_kv", heads))
        head_size = int(said.get(f"{name}.attention.key_length", said[f"{name}.embedding_length"] // heads))
        layers = int(said[f"{name}.block_count"])
    except (KeyError, TypeError, ValueError, OverflowError, struct.error):
        return 0
    return 2 * layers * kv_heads * head_size * CACHE_VALUE_BYTES * context_tokens


def _limits(cgroups: Path) -> list[int]:
    """What the control group leaves: its limit less what is used, file pages that can be dropped not counted."""
    try:
        limit = (cgroups / "memory.max").read_text().strip()
        if limit == "max":
            return []
        used = int((cgroups / "memory.current").read_text())
        lines = (line.split() for line in (cgroups / "memory.stat").read_text().splitlines())
        droppable = sum(int(value) for name, value in lines if name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return []  # no such limit here
    return [max(0, int(limit) - used + droppable)]


def _header(gguf: Path) -> dict[str, Any]:
    """The plain values at the head of a GGUF file, up to its tokenizer, which is long and not needed."""
    found: dict[str, Any] = {}
    with gguf.open("rb") as file:
        magic, _, _, count = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF":
            raise ValueError(f"{gguf} is not a GGUF file")
        for _ in range(count):
            key = _text(file)
            if key.startswith("tokenizer."):
                break
            found[key] = _value(file, _one(file, "<I"))
    return found


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, length = _one(file, "<I"), _one(file, "<Q")
        return [_value(file, inner) for _ in range(length)]
    return _one(file, _SCALARS[kind])


def _text(file: BinaryIO) -> str:
    return file.read(_one(file, "<Q")).decode(errors="replace")


def _one(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]
