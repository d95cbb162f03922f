"""The metadata at the head of a GGUF file, a few keys of it: which tokens are control tokens.

Where it sits: asked by `llama_engine.py` for every engine, read once per file. The `gguf` package is there only where
training is, and maps the whole file. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Not covered:
big-endian files, versions before 2.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

_PLAIN = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # llama.cpp finds tokens of these three types in a text


def read_metadata(path: Path, wanted: Collection[str]) -> dict[str, Any]:
    """The values of these keys, where the file has them. Raises OSError, and ValueError for what is no GGUF file."""
    found: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            magic, version, _, keys = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version < 2:
                raise ValueError(f"{path} is no GGUF file of version 2 or later")
            for _ in range(keys):
                if len(found) == len(wanted):
                    break
                key = _text(file)
                value = _value(file, _number(file, "<I"))
                if key in wanted:
                    found[key] = value
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no GGUF file that can be read: {error!r}") from error
    return found


def special_tokens(path: Path) -> tuple[list[str], list[str]]:
    """The control tokens of a model, and the tokens its makers added beside them. Raises like `read_metadata`."""
    return _special_tokens(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _special_tokens(path: Path, _: int) -> tuple[list[str], list[str]]:
    """Of a file as it was at that time: many versions stand on one base, and a large vocabulary takes 50 ms."""
    tokens, kinds = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
    found = read_metadata(path, (tokens, kinds))
    named = list(zip(found.get(tokens, ()), found.get(kinds, ()), strict=False))
    control = [text for text, kind in named if kind in (_UNKNOWN, _CONTROL)]
    return control, [text for text, kind in named if kind == _USER_DEFINED]


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _number(file, _PLAIN[kind])
    inner, count = _number(file, "<I"), _number(file, "<Q")
    if inner in (_STRING, _ARRAY):
        return [_value(file, inner) for _ in range(count)]
    layout = f"<{count}{_PLAIN[inner][1]}"
    return list(struct.unpack(layout, file.read(struct.calcsize(layout))))


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "<Q")).decode("utf-8", errors="replace")


def _number(file: BinaryIO, layout: str) -> Any:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]
