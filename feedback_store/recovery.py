"""The DuckDB file after a crash: what is mended, what is refused, what goes on.

    refuse_silent_loss → open_file → a connection

A log that ends within a transaction lost only what nobody was told was kept, and DuckDB cuts the rest off. A changed
byte in an entry fails its checksum: DuckDB refuses the file. A changed byte in an entry's length or in the log's header
makes DuckDB drop what follows without a word; commits that stand after such a place, and a log of another file, are
found here and refused. Not found: a log that is gone, empty or cut short by something else than a crash, and damage in
table data that no question has read yet.

Mended: DuckDB 2.0 writes a checkpoint's metadata into free parts of blocks whose other parts the present state needs,
in place. A kill or a power cut within such a write leaves a block part old, part new: what the present state needs is
the same in both, but the checksum is wrong and DuckDB refuses the file. Where the log says that a checkpoint was under
way and the block has the form of metadata, it gets its checksum here; whatever else has a wrong one is refused.
Used by ``database.py``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
from pathlib import Path
from typing import BinaryIO

import duckdb

from feedback_store.errors import StoreDamaged

Config = dict[str, str | bool | int | float | list[str]]

# DuckDB's log: a header, then entries of 8 bytes length, 8 bytes checksum, body. Each transaction ends with the same
# entry; these are its checksum and its body. The header repeats the identifier that stands in the database file.
LOG_COMMIT = bytes.fromhex("e7fe7d722fed3d5e640064ffff")
_LOG_HEADER = bytes.fromhex("640062650002660010")
# Beside a database file: what was committed since the last checkpoint, also where that was broken off.
LOG_SUFFIXES = (".wal", ".wal.checkpoint", ".wal.recovery")
_IDENTIFIER = slice(124, 140)
# The log's last two entries while a checkpoint is under way: that it began, and the end of a transaction.
_CHECKPOINT_BYTES = 80
_CHECKPOINT_BEGAN = re.compile(
    rb"\x64\x00\x63\x65\x00.{1,24}\xff\xff\xff\xff\x05\x00{7}" + re.escape(LOG_COMMIT) + rb"\Z", re.DOTALL
)
_BLOCK_SIZE_AT = 4096 + 40


def open_file(path: Path, config: Config) -> duckdb.DuckDBPyConnection:
    """Open the file, mending the blocks that a checkpoint left half written; where it stays refused it is as it was.

    Raises ``duckdb.Error`` where DuckDB refuses it.
    """
    before: dict[int, bytes] = {}
    while True:
        try:
            return duckdb.connect(str(path), config=config)
        except duckdb.Error as error:
            refused = re.search(r"computed checksum \d+ does not match .* in block at location (\d+)", str(error))
            place = int(refused[1]) if refused else -1
            with contextlib.suppress(OSError):
                if refused and place not in before and _is_torn(path, place):
                    before[place] = _write_checksum(path, place, None)
                    continue
            for mended, checksum in before.items():
                with contextlib.suppress(OSError):
                    _write_checksum(path, mended, checksum)
            raise


def _is_torn(path: Path, place: int) -> bool:
    """Whether a checkpoint was under way when the file was left, and the block at this byte is metadata.

    A block of metadata has 64 parts, each with the number of the part and of the block where it goes on, or none.
    """
    if not _CHECKPOINT_BEGAN.search(path.with_name(f"{path.name}.wal").read_bytes()[-_CHECKPOINT_BYTES:]):
        return False
    block = _block(path, place)
    part = (len(block) - 8) // 64 // 8 * 8
    if part <= 0:
        return False
    goes_on = [int.from_bytes(block[start : start + 8], "little") for start in range(8, 8 + 64 * part, part)]
    return all(at == 2**64 - 1 or (at >> 56 < 64 and at % 2**56 < 2**32) for at in goes_on)


def _write_checksum(path: Path, place: int, checksum: bytes | None) -> bytes:
    """Give the block at this byte its checksum, or the given one; the one it had."""
    block = _block(path, place)
    if checksum is None:
        total = 5381
        for (word,) in struct.iter_unpack("<Q", block[8:]):
            total ^= word * 0xBF58476D1CE4E5B9 % 2**64
        checksum = total.to_bytes(8, "little")
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(place)
        file.write(checksum)
        file.flush()
        os.fsync(file.fileno())
    return block[:8]


def _block(path: Path, place: int) -> bytes:
    with path.open("rb") as file:
        file.seek(_BLOCK_SIZE_AT)
        size = int.from_bytes(file.read(8), "little")
        file.seek(place)
        return file.read(size)


def refuse_silent_loss(path: Path, backups: Path) -> None:
    """Raise ``StoreDamaged`` where DuckDB would open the file and leave out commits of its log without a word."""
    with contextlib.suppress(OSError):  # what cannot be read, DuckDB refuses in its own words
        with path.open("rb") as file:
            header = _log_header(file.read(_IDENTIFIER.stop)[_IDENTIFIER])
        for log in (Path(f"{path}{suffix}") for suffix in LOG_SUFFIXES):
            if log.is_file() and (place := _lost_from(log, header)) is not None:
                what = (
                    f"is damaged at byte {place}" if place else f"is not of {path.name}, or its first bytes are damaged"
                )
                raise StoreDamaged(
                    f"The log {log} {what}: what was recorded after the last checkpoint would be lost without a word. "
                    f"Nothing was changed. Copy {path} and {log.name} to a safe place; then put a copy from {backups} "
                    f"in the place of {path.name}, or go on without what the log holds, and remove {log.name}."
                )


def _log_header(identifier: bytes) -> bytes:
    """How the log of the database file with this identifier begins; its 16 bytes stand there as LEB128 numbers."""
    return _LOG_HEADER + b"".join(bytes([byte] if byte < 128 else [byte, 1]) for byte in identifier) + b"\x67\x00"


def _lost_from(log: Path, header: bytes) -> int | None:
    """The byte where DuckDB stops reading the log although commits follow; None where it reads all of them."""
    size = log.stat().st_size
    with log.open("rb") as file:
        place = 0
        if _has_header(file, header):
            end = file.tell()
            while end <= size:
                place = end
                file.seek(place)
                length = file.read(8)
                end = place + 16 + int.from_bytes(length, "little")
        file.seek(place)
        return place if LOG_COMMIT in file.read() else None


def _has_header(file: BinaryIO, header: bytes) -> bool:
    if file.read(len(header)) != header:
        return False
    while file.read(1) >= b"\x80":  # the number of the checkpoint, LEB128
        pass
    return file.read(2) == b"\xff\xff"
