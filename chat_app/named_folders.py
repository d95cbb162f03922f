"""Which files of this machine a request may name: those in folders that are named for it, and nothing else.

    a request's "source" → NamedFolders.file → a regular file in data/imports, data/uploads … → the operation
    the file of a person at the shell → lent → data/uploads/<hash>/<name> → the same request

Where it sits: beside the operations that read or write files for somebody; the edges know nothing of it. A path is
followed to where it really is before it is judged, and the answer is the same whether there is nothing of that name or
something that is not to be read. A person at the shell has rights of their own: a command puts a copy where the server
may read it, and takes it away afterwards.
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

UPLOADS = "uploads"
EXPIRED_S = 3600.0
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LONGEST_NAME = 120


class NamedFolders:
    """Folders whose files may be read for whoever asks."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)

    def file(self, given: str) -> Path | None:
        """The file that ``given`` names: a name within one of the folders, or its whole path. None for all else."""
        if "\0" in given:
            return None
        for folder in self.folders:
            with suppress(OSError, ValueError, RuntimeError):
                home = folder.resolve(strict=True)
                there = (home / given).resolve(strict=True)
                if there.is_relative_to(home) and there.is_file():
                    return there
        return None

    @property
    def sentence(self) -> str:
        """What to do where a file may not be named."""
        return (
            f"Only files in {' or '.join(map(str, self.folders[:-1]))} are read by their name. Put the file there, "
            "upload it (POST /v1/imports as multipart/form-data, or the button of the Admin page), or use the command "
            "`zloop`, which takes any file of yours."
        )


def folder_name(given: str) -> str | None:
    """``given`` where it can be the name of a folder within another one, and leads nowhere else."""
    return given if _FOLDER_NAME.fullmatch(given) and ".." not in given else None


def upload_folder(data_dir: Path) -> Path:
    """A new folder for one upload; nobody else may look into it."""
    folder = data_dir / UPLOADS / uuid.uuid4().hex
    folder.mkdir(parents=True, mode=0o700)
    return folder


def upload_name(given: str | None) -> str:
    """A harmless file name with the ending of ``given``, which says what is in the file."""
    name = re.sub(r"[^\w.-]", "_", Path(given or "upload").name, flags=re.ASCII)[-_LONGEST_NAME:].lstrip(".-")
    return name or "upload"


@contextmanager
def lent(data_dir: Path, path: Path) -> Iterator[Path]:
    """A copy of a file where a request may name it, for as long as the block lasts."""
    folder = upload_folder(data_dir)
    try:
        yield Path(shutil.copyfile(path, folder / upload_name(path.name)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_upload(data_dir: Path, path: Path) -> None:
    """Remove an uploaded file with its folder; what is not in the folder of uploads stays."""
    uploads = (data_dir / UPLOADS).resolve()
    there = path.resolve()
    if there.is_relative_to(uploads) and there != uploads:
        top = uploads / there.relative_to(uploads).parts[0]
        if top.is_dir():
            shutil.rmtree(top, ignore_errors=True)
        else:
            top.unlink(missing_ok=True)


def remove_expired(data_dir: Path, older_than_s: float = EXPIRED_S) -> None:
    """Remove uploads that nobody took: a page that was left, a command that was killed."""
    uploads = data_dir / UPLOADS
    for path in sorted(uploads.rglob("*"), reverse=True) if uploads.is_dir() else ():
        with suppress(OSError):  # gone meanwhile, or a folder that is not empty
            if time.time() - path.lstat().st_mtime > older_than_s:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
