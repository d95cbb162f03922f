"""Where rows come from: a file, or a data set of the Hugging Face hub, as dictionaries with their row numbers.

    path or hub id --open_rows--> Rows: (number, row), (number, row), …   bytes_read of bytes_total on the way

Files: ``.jsonl`` and ``.json`` (either may hold one object a line, or one document), ``.parquet``, ``.csv``, each also
``.gz``. A hub data set is ``owner/name``; the files of its train split are downloaded first (``huggingface_hub`` is
loaded only then). JSON lines, CSV and Parquet are streamed; a JSON document and ``.parquet.gz`` are read whole and take
a few times their size in memory. Not here: what the columns mean.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from feedback_store.errors import BadImport

Row = dict[str, Any]
NumberedRow = tuple[int, Row]

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
# The one column of a CSV file that has no header.
CELLS = "cells"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SPLIT_NAME = re.compile(r"(?<![a-z])(train|test|valid|validation|dev|eval)(?![a-z])")
# What an exported document may hold its list of rows under, beside plain facts such as a total.
_LISTS = ("feedbacks", "items", "records", "conversations", "data", "rows")
_BATCH_ROWS = 500
_BUFFER_BYTES = 2**17
_MAX_CELL_CHARACTERS = 16_000_000
_SHORTEST_TIME = len("2024-10-01 12:34:56")
_HUB_TIMEOUT_S = 20.0


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
    if _HUB_ID.fullmatch(source) and not source.endswith((*SUFFIXES, ".gz")):
        return Rows(_download(source, endpoint, cache))
    raise BadImport(source, "there is no such file. Give a path, or owner/name of a data set on the hub.")


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
        """The contents as bytes, unpacked where the file is ``.gz``."""
        self._raw = self._open.enter_context(self.path.open("rb", _BUFFER_BYTES))
        if self.path.suffix.lower() != ".gz":
            return self._raw
        return cast(IO[bytes], self._open.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=self._raw))))


def _file_rows(file: _File) -> Iterator[NumberedRow]:
    number = 0
    try:
        for number, row in _READERS[_kind(file.path)](file):
            if not isinstance(row, dict):
                raise BadImport(
                    str(file.path), f"row {number} is a {type(row).__name__}, not an object with columns. Correct it."
                )
            yield number, row
    # gzip and zlib, csv, Arrow, wrong encodings and too deep nesting: each has its own idea of an error.
    except (OSError, EOFError, ValueError, csv.Error, pa.ArrowException, RecursionError) as error:
        raise BadImport(
            str(file.path),
            f"it cannot be read after row {number}: {error}. Check that it is a whole {_kind(file.path)} file.",
        ) from error


def _json_rows(file: _File) -> Iterator[tuple[int, Any]]:
    """One object a line, or one document; the ending of the name does not say which, the beginning of the file does."""
    stream = file.unpacked()
    lines = ((number, line) for number, line in enumerate(stream, start=1) if not line.isspace())
    number, first = next(lines, (0, b""))
    first = first.removeprefix(BOM_UTF8)
    if not first.strip():
        return
    if first.lstrip().startswith(b"["):
        yield from _document_rows(file, _parsed(first + stream.read()))
        return
    try:
        row = _parsed_line(number, first)
    except ValueError as broken_line:
        try:
            document = _parsed(first + stream.read())
        except ValueError as broken_document:
            raise (broken_line if _kind(file.path) == ".jsonl" else broken_document) from None
        yield from _document_rows(file, document)
        return
    second = next(lines, None)
    if second is None:
        yield from _document_rows(file, row)
        return
    yield number, row
    yield second[0], _parsed_line(*second)
    for number, line in lines:
        yield number, _parsed_line(number, line)


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
    try:
        return _parsed(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error.msg} at character {error.colno})") from error


def _parsed(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # The standard parser also takes NaN and half a surrogate pair, and says better what is wrong.
        return json.loads(text.removeprefix(BOM_UTF8))


def _parquet_rows(file: _File) -> Iterator[tuple[int, Any]]:
    source: Any = file.path if file.path.suffix.lower() != ".gz" else pa.BufferReader(file.unpacked().read())
    number = 0
    with pq.ParquetFile(source) as table:
        for batch in table.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                file.share = number / table.metadata.num_rows
                yield number, row


def _csv_rows(file: _File) -> Iterator[tuple[int, Any]]:
    """The rows below the header. A first row that ends with a time is no header: then each row is its cells."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with io.TextIOWrapper(file.unpacked(), encoding="utf-8-sig", newline="") as text:
        rows = (row for row in csv.reader(text, strict=True) if row)
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


def _cell(value: str) -> Any:
    """A CSV cell; a list of messages comes as JSON in it."""
    if not value.startswith("[{"):
        return value
    try:
        return json.loads(value)
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
        siblings = api.dataset_info(hub_id, timeout=_HUB_TIMEOUT_S).siblings or []
        names = train_files([sibling.rfilename for sibling in siblings])
        if not names:
            raise BadImport(hub_id, "its train split is not clear from its file names. Download one file and name it.")
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
