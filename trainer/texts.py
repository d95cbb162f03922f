"""A team's own texts for continued pretraining: a folder of .txt and .md files, frozen by their hashes.

    find_texts(folder) when a run is planned → described in its config.json → load_texts in the child

The files stay where they are; a run whose texts have changed since it was planned does not start, so that a version
stays a function of its inputs. Not covered: other formats (PDF, Word), copies of the texts: keep them yourselves.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from feedback_store.durable import sha256_of
from trainer.errors import BadRunRequest, JobError

FOLDER = "texts"
SUFFIXES = (".txt", ".md")


def find_texts(folder: Path) -> dict[str, Any]:
    """What config.json says of the texts: directory, hash, bytes, and each file with its SHA-256. Hidden files are not
    taken, nor links. Raises BadRunRequest without any, or where one is not UTF-8.
    """
    files: dict[str, str] = {}
    size = 0
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = path.relative_to(folder)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink() and not _is_hidden(name):
            _require_utf8(path)
            files[name.as_posix()] = sha256_of(path)
            size += path.stat().st_size
    if not size:
        raise BadRunRequest(
            f"There is no text to learn from in {folder}. Put .txt or .md files (UTF-8) there, "
            "or name another folder with `texts` in a recipe of your own."
        )
    digest = hashlib.sha256("".join(f"{name}\0{sha256}\0" for name, sha256 in files.items()).encode()).hexdigest()
    return {"directory": str(folder.absolute()), "hash": digest, "bytes": size, "files": files}


def load_texts(described: dict[str, Any]) -> list[str]:
    """The texts in the order of their names. Raises JobError where one is gone or is not what it was."""
    texts = []
    for name, expected in described["files"].items():
        path = Path(described["directory"]) / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise JobError(f"The text {path} cannot be read any more: {error}. Start a new run.") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise JobError(f"The text {path} was changed after the run was planned. Start a new run.")
        texts.append(content.decode("utf-8"))
    return texts


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _require_utf8(path: Path) -> None:
    try:
        path.read_text(encoding="utf-8")
    except ValueError as error:
        raise BadRunRequest(f"The text {path} is not UTF-8 ({error}). Save it as UTF-8, or take it away.") from error
