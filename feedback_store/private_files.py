"""What is kept here is for its owner alone: new files, and those of a data directory from before.

    new_files_private() first thing in every process, tighten(data_dir) where the data directory is opened

Not covered: a data directory that is lent to a group on purpose, files that another person owns.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OURS = (
    "store.duckdb*", "snapshots", "runs", "by_hand", "versions", "evaluations", "models", "backups", "exports",
    "imports", "uploads", "benchmarks", "evaluation_prompts", "recipes", "texts", "dialogues", "*.json", "*.jsonl",
    "*.yaml", "*.log", "*.txt", ".erasing-*",
)  # fmt: skip


def new_files_private() -> None:
    """From now on this process and its children make files that nobody else may read."""
    os.umask(0o077)


def tighten(data_dir: Path) -> None:
    """Take everybody else's rights off a data directory and what is ours in it. Links are left alone."""
    if not _is_shared(data_dir):
        _close(data_dir)
    for pattern in _OURS:
        for path in data_dir.glob(pattern):
            _close(path)
            if path.is_dir() and not path.is_symlink():
                for folder, names, files in os.walk(path):
                    for name in (*names, *files):
                        _close(Path(folder, name))


def _is_shared(directory: Path) -> bool:
    """Whether a folder is everybody's, such as /tmp, or a home: closing it would lock others out."""
    there = directory.resolve()
    return there in (Path(there.anchor), Path.home()) or bool(there.stat().st_mode & stat.S_ISVTX)


def _close(path: Path) -> None:
    with suppress(OSError):  # gone meanwhile, or somebody else's: not ours to close
        found = path.lstat()
        if found.st_mode & _OTHERS and not stat.S_ISLNK(found.st_mode):
            path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)
