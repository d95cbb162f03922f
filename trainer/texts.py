"""A team's own files to learn from, frozen by their hashes: texts, and dialogues for supervised fine-tuning.

    find_texts, find_dialogues when a run is planned → described in its config.json → load_… in the child

Texts are .txt and .md files. Dialogues are .jsonl or .parquet files whose rows have `messages`, a list of {role,
content}: the layout of UltraChat 200k. The files stay where they are; a run whose files have changed since it was
planned does not start, so that a version stays a function of its inputs. Not covered: other formats (PDF, Word), copies
of the files: keep them yourselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feedback_store.durable import sha256_of
from feedback_store.records import Message
from trainer.errors import BadRunRequest, JobError

TEXTS, DIALOGUES = "texts", "dialogues"
_TEXT_SUFFIXES = (".txt", ".md")
_DIALOGUE_SUFFIXES = (".jsonl", ".parquet")
_ROLES = ("system", "user", "assistant")


def find_texts(folder: Path) -> dict[str, Any]:
    """What config.json says of the texts: directory, hash, bytes, and each file with its SHA-256.

    Hidden files are not taken, nor links. Raises BadRunRequest without any text, or where a file is not UTF-8.
    """
    described = _describe(folder, _TEXT_SUFFIXES)
    if not described["bytes"]:
        raise BadRunRequest(
            f"There is no text to learn from in {folder}. Put .txt or .md files (UTF-8) there, "
            "or name another folder with `texts` in a recipe of your own."
        )
    for name in described["files"]:
        _require_utf8(folder / name)
    return described


def find_dialogues(folder: Path) -> dict[str, Any] | None:
    """The same for files of dialogues; None where there are none. Their rows are looked at in the child."""
    described = _describe(folder, _DIALOGUE_SUFFIXES)
    return described if described["files"] else None


def load_texts(described: dict[str, Any]) -> list[str]:
    """The texts in the order of their names. Raises JobError where one is gone or is not what it was."""
    return [content.decode("utf-8") for _, content in _unchanged(described)]


def load_dialogues(described: dict[str, Any]) -> list[tuple[Message, ...]]:
    """The dialogues in the order of their files, each with an answer in it. Raises JobError naming file and row."""
    dialogues = []
    for path, content in _unchanged(described):
        for number, row in enumerate(_rows(path, content), start=1):
            dialogues.append(_dialogue(row, f"{path}, row {number}"))
    return dialogues


def _describe(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Any]:
    files: dict[str, str] = {}
    size = 0
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.suffix.lower() in suffixes and path.is_file() and not path.is_symlink() and not is_hidden:
            files[name.as_posix()] = sha256_of(path)
            size += path.stat().st_size
    digest = hashlib.sha256("".join(f"{name}\0{sha256}\0" for name, sha256 in files.items()).encode()).hexdigest()
    return {"directory": str(folder.absolute()), "hash": digest, "bytes": size, "files": files}


def _unchanged(described: dict[str, Any]) -> Iterator[tuple[Path, bytes]]:
    for name, expected in described["files"].items():
        path = Path(described["directory"]) / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise JobError(f"The file {path} cannot be read any more: {error}. Start a new run.") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise JobError(f"The file {path} was changed after the run was planned. Start a new run.")
        yield path, content


def _rows(path: Path, content: bytes) -> Iterator[Any]:
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            yield from pq.read_table(pa.BufferReader(content), columns=["messages"]).to_pylist()
        else:
            for line in content.decode("utf-8").splitlines():
                if line.strip():
                    yield json.loads(line)
    except (ValueError, OSError, KeyError) as error:  # Arrow's errors are among these
        raise JobError(f"The dialogues of {path} cannot be read: {error}. Mend the file or take it away.") from error


def _dialogue(row: Any, where: str) -> tuple[Message, ...]:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise JobError(f"{where} has no `messages`, a list of role ({', '.join(_ROLES)}) and content. Mend it.")
    roles = [message["role"] for message in messages]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        raise JobError(f"{where} has no answer to a user's message: there is nothing to learn from it. Take it out.")
    return tuple(Message(role=message["role"], content=message["content"]) for message in messages)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)


def _require_utf8(path: Path) -> None:
    try:
        path.read_text(encoding="utf-8")
    except ValueError as error:
        raise BadRunRequest(f"The text {path} is not UTF-8 ({error}). Save it as UTF-8, or take it away.") from error
