"""Where rows come from: a file, or a data set of the Hugging Face hub, as dictionaries with their row numbers.

    path or hub id --open_rows--> Rows: (number, row), (number, row), …   bytes_read of bytes_total on the way

Files: ``.jsonl`` and ``.json`` (either may hold one object a line, or one document), ``.parquet``, ``.csv``, each also
``.gz``. A hub data set is ``owner/name``; the files of its train split are downloaded first (``huggingface_hub`` is
loaded only then). JSON lines, CSV and Parquet are streamed, Parquet through a child (``parquet_rows.py``); a JSON
document is read whole, and ``.parquet.gz`` unpacked to disk first. What is too large is refused before its memory is
used (``limits.py``). Not here: what the columns mean.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import orjson
import pyarrow as pa

from feedback_store.bounded import check_json
from feedback_store.clean_environment import clean_environment
from feedback_store.errors import BadImport
from feedback_store.importers.limits import (
    CELL_CHARACTERS,
    DAMAGED,
    DOCUMENT_BYTES,
    DOCUMENT_MEMORY,
    PACKED_BYTES,
    PACKED_PARQUET_BYTES,
    REFUSED,
    ROW_BYTES,
    ROW_MEMORY,
    ROWS_KEY,
    TooLarge,
    check_columns,
    check_rows,
    open_file,
    too_long,
    watched,
)

Resource = TypeVar("Resource")
Row = dict[str, Any]
NumberedRow = tuple[int, Row]

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
# The one column of a CSV file that has no header.
CELLS = "cells"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SPLIT_NAME = re.compile(r"(?<![a-z])(train|test|valid|validation|dev|eval)(?![a-z])")
# What an exported document may hold its list of rows under, beside plain facts such as a total.
_LISTS = ("feedbacks", "items", "records", "conversations", "data", "rows")
_ENDING_S = 10.0
_SHORTEST_TIME = len("2024-10-01 12:34:56")
_HUB_TIMEOUT_S = 20.0
# The child shares its little memory with nobody's pools and threads.
_SMALL = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}


class HubId(str):
    """The id of a data set on the hub, for which no file is looked at, whatever there is of that name."""

    __slots__ = ()


class Rows:
    """The rows of one or more files, read as they are asked for, and how far the reading is.

    A number is what a person would count: the line of JSON lines, the item of a JSON document, the row of Parquet and
    of CSV below its header. Where a data set has several files, the count goes on from one to the next.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.bytes_total: int | None = sum(path.stat().st_size for path in paths)
        self._bytes_before = 0
        self._file: _File | None = None
        self._rows = self._read(paths)

    @property
    def bytes_read(self) -> int:
        """How many bytes of the files, packed as they are, lie behind."""
        return self._bytes_before + (0 if self._file is None else self._file.position)

    def __iter__(self) -> Iterator[NumberedRow]:
        return self

    def __next__(self) -> NumberedRow:
        return next(self._rows)

    def _read(self, paths: Sequence[Path]) -> Iterator[NumberedRow]:
        before = number = 0
        for path in paths:
            with _File(path) as file:
                self._file = file
                for number, row in _file_rows(file):
                    yield before + number, row
            before += number
            self._file, self._bytes_before = None, self._bytes_before + file.size


def open_rows(source: str, *, endpoint: str | None = None, cache: Path | None = None) -> Rows:
    """The rows of a path or hub id.

    ``endpoint`` and ``cache`` are the hub's address and the download folder where they are not the usual ones.
    Raises ``BadImport``: at once where the source cannot be found, while iterating at a row that cannot be read.
    """
    if isinstance(source, HubId):
        return Rows(_download(source, endpoint, cache))
    try:
        path = Path(source).expanduser()
        is_file, is_there = path.is_file(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home of nobody, NUL
        raise BadImport(source, "no file here can have that name, or it may not be looked at.") from error
    if is_file:
        _kind(path)
        return Rows([path])
    if is_there:
        raise BadImport(source, "it is a folder. Name one file in it.")
    if is_hub_id(source):
        return Rows(_download(source, endpoint, cache))
    raise BadImport(source, "there is no such file. Give a path, or owner/name of a data set on the hub.")


def is_hub_id(source: str) -> bool:
    """Whether this can be the id of a data set on the hub: owner/name, and no name of a file."""
    return bool(_HUB_ID.fullmatch(source)) and not source.endswith((*SUFFIXES, ".gz"))


def train_files(names: Sequence[str]) -> list[str]:
    """The files of the train split among a data set's file names; empty where it is unclear.

    ``train_prefs`` (the H4 sets) goes before ``train``; Parquet before JSON lines, JSON and CSV. Where no name speaks
    of a split (raw UltraFeedback has a file for each source), all JSON lines or all Parquet files are taken.
    """
    data = [name for name in names if _suffix(name) and not name.endswith("dataset_infos.json")]
    for mark in (r"train_prefs", r"train(?!_)"):
        marked = [name for name in data if re.search(rf"(?<![a-z]){mark}(?![a-z])", name.lower())]
        for suffix in SUFFIXES:
            if found := sorted(name for name in marked if _suffix(name) == suffix):
                return found
    suffixes = {_suffix(name) for name in data}
    if suffixes in ({".jsonl"}, {".parquet"}) and not any(_SPLIT_NAME.search(name.lower()) for name in data):
        return sorted(data)
    return data if len(data) == 1 else []


def is_time(text: str) -> bool:
    """Whether a cell holds a moment such as ``2024-10-01 12:34:56.789``."""
    if len(text) < _SHORTEST_TIME:
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


class _File:
    """One file while it is read. ``share`` is the part that lies behind, where a reader knows better than the bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.share: float | None = None
        self._raw: IO[bytes] | None = None
        self._open = ExitStack()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def position(self) -> int:
        if self.share is not None:
            return int(self.share * self.size)
        return 0 if self._raw is None or self._raw.closed else self._raw.tell()

    def unpacked(self) -> IO[bytes]:
        """The contents as bytes, unpacked where the file is ``.gz``. Raises TooLarge, here or at a byte too many."""
        self._raw = self._open.enter_context(open_file(self.path))
        if self.path.suffix.lower() != ".gz":
            return self._raw
        unpacking = self._open.enter_context(gzip.GzipFile(fileobj=self._raw))
        return watched(cast(IO[bytes], unpacking), self._raw)

    def keep_open(self, resource: AbstractContextManager[Resource]) -> Resource:
        """Something that is let go of with the file."""
        return self._open.enter_context(resource)


def _file_rows(file: _File) -> Iterator[NumberedRow]:
    number = 0
    try:
        for number, row in _READERS[_kind(file.path)](file):
            if not isinstance(row, dict):
                raise BadImport(
                    str(file.path), f"row {number} is a {type(row).__name__}, not an object with columns. Correct it."
                )
            yield number, row
    except TooLarge as error:
        raise BadImport(str(file.path), f"{error}.") from error
    # gzip and zlib, csv, Arrow, wrong encodings and too deep nesting: each has its own idea of an error.
    except (OSError, EOFError, ValueError, csv.Error, pa.ArrowException, RecursionError) as error:
        raise BadImport(
            str(file.path),
            f"it cannot be read after row {number}: {error}. Check that it is a whole {_kind(file.path)} file.",
        ) from error


def _json_rows(file: _File) -> Iterator[tuple[int, Any]]:
    """One object a line, or one document; the ending of the name does not say which, the beginning of the file does."""
    stream = file.unpacked()
    lines = _lines(stream, DOCUMENT_BYTES)
    number, first = next(lines, (0, b""))
    first = first.removeprefix(BOM_UTF8)
    if not first.strip():
        return
    if first.lstrip().startswith(b"["):
        yield from _document_rows(file, _parsed_document(first, stream))
        return
    try:
        row = _parsed_line(number, first)
    except json.JSONDecodeError as broken_line:
        try:
            document = _parsed_document(first, stream)
        except json.JSONDecodeError as broken_document:
            raise (_of_line(number, broken_line) if _kind(file.path) == ".jsonl" else broken_document) from None
        yield from _document_rows(file, document)
        return
    lines = _lines(stream, ROW_BYTES, number)
    second = next(lines, None)
    if second is None:
        yield from _document_rows(file, row)
        return
    yield number, row
    for number, line in chain([second], lines):
        try:
            row = _parsed_line(number, line)
        except json.JSONDecodeError as error:
            raise _of_line(number, error) from error
        yield number, row


def _lines(stream: IO[bytes], limit: int, number: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered; none is read beyond the limit. Raises TooLarge."""
    while line := stream.readline(limit + 1):
        number += 1
        check_rows(number, "lines")
        if len(line) > limit:
            raise too_long("line", number, limit) if limit == ROW_BYTES else _long_document(limit)
        if not line.isspace():
            yield number, line


def _parsed_document(beginning: bytes, stream: IO[bytes]) -> Any:
    """The whole file as one value. Raises TooLarge, and ValueError where it is none."""
    content = beginning + stream.read(max(0, DOCUMENT_BYTES + 1 - len(beginning)))
    if len(content) > DOCUMENT_BYTES:
        raise _long_document(DOCUMENT_BYTES)
    return _parsed(content, DOCUMENT_MEMORY)


def _long_document(limit: int) -> TooLarge:
    return TooLarge(
        f"it is one JSON document of more than {limit:,} bytes, the limit for what is read whole. Write one object a "
        "line (jq -c '.[]'): lines are read one by one"
    )


def _document_rows(file: _File, document: Any) -> Iterator[tuple[int, Any]]:
    items = _items(document)
    for number, item in enumerate(items, start=1):
        file.share = number / len(items)
        yield number, item


def _items(document: Any) -> Sequence[Any]:
    """The rows of a document: a list, an object with a list among plain facts, or the object itself."""
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        nested = [name for name, value in document.items() if isinstance(value, list | dict)]
        if len(nested) == 1 and nested[0] in _LISTS and isinstance(document[nested[0]], list):
            return cast(list[Any], document[nested[0]])
    return [document]


def _parsed_line(number: int, line: bytes) -> Any:
    return _parsed(line, ROW_MEMORY if len(line) <= ROW_BYTES else DOCUMENT_MEMORY, f"line {number}")


def _of_line(number: int, error: json.JSONDecodeError) -> ValueError:
    return ValueError(f"line {number} is not JSON ({error.msg} at character {error.colno})")


def _parsed(text: bytes, memory: int = ROW_MEMORY, name: str = "it") -> Any:
    """The value of a JSON text that takes no more memory than this. Raises TooLarge, JSONDecodeError, ValueError."""
    try:
        check_json(text, name, memory)
    except ValueError as error:
        raise TooLarge(str(error).rstrip(".")) from error
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # The standard parser also takes NaN and half a surrogate pair, and says better what is wrong.
        return json.loads(text.removeprefix(BOM_UTF8))


def _parquet_rows(file: _File) -> Iterator[tuple[int, Any]]:
    """The rows as a child unpacks them, which may not take more than its part of the memory."""
    is_packed = file.path.suffix.lower() == ".gz"
    source = _unpacked_to_disk(file) if is_packed else file.unpacked()
    if not is_packed and source.read(4) != b"PAR1":
        raise ValueError("it does not begin as a Parquet file does")
    source.seek(0)
    said = file.keep_open(tempfile.TemporaryFile())  # noqa: SIM115 - closed with the file
    child = file.keep_open(_Child(source, said))
    number = 0
    try:
        with pa.ipc.open_stream(child.out) as batches:
            rows = int(batches.schema.metadata[ROWS_KEY.encode()])
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    file.share = min(1.0, number / max(1, rows))
                    yield number, row
    except (pa.ArrowInvalid, OSError):
        child.check()  # it says better why there is no more
        raise
    child.check()


class _Child(AbstractContextManager["_Child"]):
    """``parquet_rows.py`` at work on an open file; ended with its reader."""

    def __init__(self, source: IO[bytes], said: IO[bytes]) -> None:
        root = str(Path(__file__).parent.parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._said = said
        self._process = subprocess.Popen(
            [sys.executable, "-m", "feedback_store.importers.parquet_rows"],
            stdin=source.fileno(),
            stdout=subprocess.PIPE,
            stderr=said,
            env={**clean_environment(), **_SMALL, "PYTHONPATH": paths},
        )
        assert self._process.stdout is not None
        self.out = self._process.stdout

    def __exit__(self, *_: object) -> None:
        self.out.close()
        self._process.kill()
        self._process.wait()

    def check(self) -> None:
        """Raise TooLarge or ValueError where it did not come to its end."""
        self.out.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_S)
        code = self._process.poll()
        if code == 0:
            return
        self._said.seek(0)
        reason = self._said.read(2_000).decode(errors="replace").strip()
        if code == REFUSED and reason:
            raise TooLarge(reason.rstrip("."))
        if code == DAMAGED and reason:
            raise ValueError(reason.rstrip("."))
        raise ValueError(f"what unpacks it broke off (exit code {code}: {reason[-300:]})")


def _unpacked_to_disk(file: _File) -> IO[bytes]:
    """A ``.parquet.gz`` as a file of its own, which is gone when it is closed."""
    unpacked = file.keep_open(tempfile.TemporaryFile())  # noqa: SIM115 - closed with the file
    source, size = file.unpacked(), 0
    while content := source.read(2**20):
        size += len(content)
        if size > PACKED_PARQUET_BYTES:
            raise TooLarge(f"it unpacks to more than {PACKED_PARQUET_BYTES:,} bytes, the limit. Unpack it yourself")
        unpacked.write(content)
    unpacked.flush()
    return unpacked


def _csv_rows(file: _File) -> Iterator[tuple[int, Any]]:
    """The rows below the header. A first row that ends with a time is no header: then each row is its cells."""
    csv.field_size_limit(CELL_CHARACTERS)
    with io.TextIOWrapper(file.unpacked(), encoding="utf-8-sig", newline="") as text:
        rows = _csv_cells(text)
        header = next(rows, None)
        if header is None:
            return
        if is_time(header[-1]):
            yield from enumerate(({CELLS: row} for row in chain([header], rows)), start=1)
            return
        for number, row in enumerate(rows, start=1):
            if len(row) != len(header):
                raise ValueError(f"row {number} has more or fewer cells than the header")
            yield number, dict(zip(header, map(_cell, row), strict=True))


def _csv_cells(text: io.TextIOWrapper) -> Iterator[list[str]]:
    """The rows that are not empty. A row may have many lines; neither a line nor all of them go beyond the limit."""
    length = number = 0

    def lines() -> Iterator[str]:
        nonlocal length, number
        while line := text.readline(ROW_BYTES + 1):
            length, number = length + len(line), number + 1
            check_rows(number, "lines")
            if length > ROW_BYTES:
                raise too_long("the row that ends in line", number, unit="characters")
            yield line

    try:
        for row in csv.reader(lines(), strict=True):
            length = 0
            check_columns(len(row))
            if row:
                yield row
    except csv.Error as error:
        if "field larger than field limit" not in str(error):
            raise
        raise too_long("a cell in line", number, CELL_CHARACTERS, "characters") from error


def _cell(value: str) -> Any:
    """A CSV cell; a list of messages comes as JSON in it."""
    if not value.startswith("[{"):
        return value
    try:
        return _parsed(value.encode("utf-8", "surrogatepass"))
    except TooLarge:
        raise
    except ValueError:
        return value


_READERS = {".jsonl": _json_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}


def _kind(path: Path) -> str:
    suffix = _suffix(path.name)
    if suffix is None:
        raise BadImport(
            str(path), f"files ending in {path.suffix!r} are not read. Use {', '.join(SUFFIXES)}, each also .gz."
        )
    return suffix


def _suffix(name: str) -> str | None:
    plain = name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), None)


def _download(hub_id: str, endpoint: str | None, cache: Path | None) -> list[Path]:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    api = HfApi(endpoint=endpoint)
    try:
        # dataset_info asks once; list_repo_files would try for 23 s before it says that the hub is out of reach.
        siblings = api.dataset_info(hub_id, timeout=_HUB_TIMEOUT_S, files_metadata=True).siblings or []
        names = train_files([sibling.rfilename for sibling in siblings])
        if not names:
            raise BadImport(hub_id, "its train split is not clear from its file names. Download one file and name it.")
        if (size := sum(sibling.size or 0 for sibling in siblings if sibling.rfilename in names)) > PACKED_BYTES:
            raise BadImport(
                hub_id, f"its train split has {size:,} bytes, the limit is {PACKED_BYTES:,}. Name one file."
            )
        return [Path(api.hf_hub_download(hub_id, name, repo_type="dataset", cache_dir=cache)) for name in names]
    except HFValidationError as error:
        raise BadImport(hub_id, f"no data set of the hub can have that name ({error}).") from error
    except RepositoryNotFoundError as error:
        raise BadImport(hub_id, "the hub has no such data set, or it is private (then set HF_TOKEN).") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise BadImport(
            hub_id,
            f"the hub {api.endpoint} cannot be reached ({error}). Check the network, or download the file "
            "elsewhere and import it by its path; no file of that name is here either.",
        ) from error
