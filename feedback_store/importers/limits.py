"""How much of a file is taken in: looked at while it is read, before the memory is used.

    sources.py, parquet_rows.py → TooLarge → BadImport

A few bytes can stand for gigabytes (gzip, Parquet's dictionaries, one endless line), and a name says nothing about it.
So bytes are counted as they come out, and nothing longer than one row is ever held.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import IO, cast

MIB = 2**20
PACKED_BYTES = 2048 * MIB  # of a file as it lies there
UNPACKED_BYTES = 2048 * MIB  # of what comes out of it
GZIP_FREE_BYTES, GZIP_RATIO = 64 * MIB, 100  # text is packed to a tenth, and only nothing at all to a hundredth
ROW_BYTES = 4 * MIB
ROW_MEMORY = 64 * MIB
CELL_CHARACTERS = 2_000_000
COLUMNS = 1_000
ROWS = 2_000_000
DOCUMENT_BYTES, DOCUMENT_MEMORY = 32 * MIB, 160 * MIB
PACKED_PARQUET_BYTES = 256 * MIB  # of a .parquet.gz, which has to be unpacked before it is read
FOOTER_BYTES = 16 * MIB
ROWS_KEY = "rows"  # in the metadata of its stream: how many rows the file says it has
REFUSED, DAMAGED = 3, 4  # exit codes of the child that unpacks Parquet


class TooLarge(ValueError):
    """A file, a row or a cell beyond its limit; the sentence has value, limit and what to do."""


def open_file(path: Path) -> IO[bytes]:
    """A regular file, open for reading; a pipe or a device is not waited for. Raises OSError, TooLarge."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_size <= PACKED_BYTES:
        return os.fdopen(descriptor, "rb", 2**17)
    os.close(descriptor)
    if stat.S_ISREG(found.st_mode):
        raise TooLarge(f"it has {found.st_size:,} bytes, the limit is {PACKED_BYTES:,}. Split it")
    raise TooLarge("it is a pipe, a device or a folder, and only regular files are read")


def watched(unpacking: IO[bytes], packed: IO[bytes]) -> IO[bytes]:
    """What comes out of ``unpacking``, for as long as it is no bomb; ``packed`` is the file that it is made of."""
    return cast(IO[bytes], io.BufferedReader(_Watched(unpacking, packed), 2**17))


class _Watched(io.RawIOBase):
    """Counts what it hands on. Raises TooLarge."""

    def __init__(self, unpacking: IO[bytes], packed: IO[bytes]) -> None:
        self._unpacking = unpacking
        self._packed = packed
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        content = self._unpacking.read(len(view))
        view[: len(content)] = content
        self._count += len(content)
        if self._count > UNPACKED_BYTES:
            raise TooLarge(f"it unpacks to more than {UNPACKED_BYTES:,} bytes, the limit. Split it")
        if self._count > GZIP_FREE_BYTES and self._count > GZIP_RATIO * self._packed.tell():
            raise TooLarge(
                f"it unpacks to more than {GZIP_RATIO} times its size ({self._count:,} bytes so far), which no text "
                "does. If it is what you want, unpack it yourself first"
            )
        return len(content)


def weight(value: object, most: int) -> int:
    """About the bytes that a value and all that is in it take in Python; counted until it is more than ``most``."""
    total, left = 0, [value]
    while left and total <= most:
        one = left.pop()
        total += 64 + (len(one) if isinstance(one, str | bytes) else 0)
        if isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            left += one
    return total


def check_rows(number: int, what: str = "rows") -> None:
    """Raise TooLarge beyond the last row that is read."""
    if number > ROWS:
        raise TooLarge(f"it has more than {ROWS:,} {what}, the limit of one import. Split it")


def check_columns(number: int) -> None:
    """Raise TooLarge for more columns than any layout has."""
    if number > COLUMNS:
        raise TooLarge(f"it has {number:,} columns, the limit is {COLUMNS:,}. Leave out those that are not needed")


def too_long(what: str, number: int, limit: int = ROW_BYTES, unit: str = "bytes") -> TooLarge:
    """A line, a row or a cell that goes on beyond its limit."""
    return TooLarge(f"{what} {number:,} is longer than {limit:,} {unit}, the limit. Shorten it or take it out")
