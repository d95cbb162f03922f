"""Durable files: what store and trainer use to leave something behind that is whole or not there at all.

Data first, manifest last, rename, fsync of file and directory. A half-written file or directory keeps
a temporary name (a leading dot) which no reader looks at.

Not covered: locking. Each file here has one writer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from feedback_store.bounded import load_json

LONGEST_NAME = 100
PLAIN_NAME = "^[A-Za-z0-9][A-Za-z0-9._-]*$"
_PLAIN = re.compile(PLAIN_NAME.rstrip("$"))


def is_plain_name(name: str) -> bool:
    """Whether `name` can be a file or folder that Zephyr Loop made: ask before a name from outside meets the disk.

    At most `LONGEST_NAME` ASCII letters, digits, dots, dashes and underscores, a letter or digit first: no path, no
    `..`, no NUL, nothing that a file system calls too long.
    """
    return len(name) <= LONGEST_NAME and _PLAIN.fullmatch(name) is not None


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, atomically and synced to disk. Raises OSError: then nothing is left behind."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None when the file is not there. Raises ValueError for one that is too large."""
    try:
        value = load_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, an object was expected.")
    return value


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Fill a temporary directory; on success it becomes `target` in one rename, otherwise it disappears.

    Raises OSError when `target` exists and is not empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        temporary.replace(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """fsync each file below `directory`, then each directory."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def sync(path: Path) -> None:
    """fsync a file, or a directory itself, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
