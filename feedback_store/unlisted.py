"""What lies among snapshots, versions and backups that no manifest lists: for `zloop verify`, which names it.

    unlisted(a snapshot or version, what its manifest lists), strangers(their folder, what is known in it)

A link counts as unlisted, whatever it is called: what it leads to can be changed from elsewhere. What is being written
has a name with a dot in front; it is named only when it is an hour old and nobody can be at it any more.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import Path

WRITING_S = 3600.0


def unlisted(directory: Path, listed: Collection[str]) -> list[str]:
    """Sentences about files and links below a directory that its manifest does not list, by their relative names."""
    found = (
        path.relative_to(directory).as_posix()
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    )
    named = [name for name in found if name not in listed or (directory / name).is_symlink()]
    outside = [name for name in listed if Path(name).is_absolute() or ".." in Path(name).parts]
    return [
        *(
            f"{directory / name} is not listed by the manifest there: nobody knows what it is. Remove it."
            for name in named
        ),
        *(f"The manifest of {directory} lists {name!r}, which is not in it. Restore a backup." for name in outside),
    ]


def strangers(directory: Path, known: Collection[str]) -> list[str]:
    """Sentences about what lies directly in a folder of snapshots, versions or backups and is none of ours."""
    return [
        f"{path} is listed by no manifest: it is no {directory.name.removesuffix('s')} of ours, or it is unfinished. "
        "Remove it."
        for path in _entries(directory)
        if path.name not in known and not _is_being_written(path)
    ]


def _entries(directory: Path) -> Iterator[Path]:
    return iter(sorted(directory.iterdir())) if directory.is_dir() else iter(())


def _is_being_written(path: Path) -> bool:
    try:
        return path.name.startswith(".") and time.time() - path.lstat().st_mtime < WRITING_S
    except OSError:
        return True  # finished meanwhile
