"""Where rows come from: a file, or a data set of the Hugging Face hub, as dictionaries with their row numbers.

Files: ``.jsonl``, ``.json`` (a list, or one object a line), ``.parquet``, ``.csv``, each also ``.gz``. A hub data set
is ``owner/name``; the files of its train split are downloaded (``huggingface_hub`` is loaded only then).
All but ``.json`` and ``.parquet.gz`` are streamed. Not here: what the columns mean.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from feedback_store.errors import BadImport

Row = dict[str, Any]
NumberedRow = tuple[int, Row]

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_BATCH_ROWS = 500
_MAX_CELL_CHARACTERS = 16_000_000
_HUB_TIMEOUT_S = 20.0


def open_rows(source: str, *, endpoint: str | None = None, cache: Path | None = None) -> Iterator[NumberedRow]:
    """The rows of a path or hub id, numbered from 1 in each file.

    ``endpoint`` and ``cache`` are the hub's address and the download folder where they are not the usual ones.
    Raises ``BadImport``: at once where the source cannot be opened, while iterating at a row that cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        _kind(path)
        return _file_rows(path)
    if path.exists():
        raise BadImport(source, "it is a folder. Name one file in it.")
    if _HUB_ID.fullmatch(source) and not source.endswith((*SUFFIXES, ".gz")):
        return _rows_of_files(_download(source, endpoint, cache))
    raise BadImport(source, "there is no such file. Give a path, or owner/name of a data set on the hub.")


def train_files(names: Sequence[str]) -> list[str]:
    """The files of the train split among a data set's file names; empty where it is unclear.

    ``train_prefs`` (the H4 sets) goes before ``train``; Parquet before JSON lines, JSON and CSV.
    """
    data = [name for name in names if _suffix(name) and not name.endswith("dataset_infos.json")]
    for mark in (r"train_prefs", r"train(?!_)"):
        marked = [name for name in data if re.search(rf"(?<![a-z]){mark}(?![a-z])", name.lower())]
        for suffix in SUFFIXES:
            if found := sorted(name for name in marked if _suffix(name) == suffix):
                return found
    return data if len(data) == 1 else []


def _rows_of_files(paths: Sequence[Path]) -> Iterator[NumberedRow]:
    for path in paths:
        yield from _file_rows(path)


def _file_rows(path: Path) -> Iterator[NumberedRow]:
    number = 0
    try:
        for number, row in _READERS[_kind(path)](path):
            if not isinstance(row, dict):
                raise BadImport(
                    str(path), f"row {number} is a {type(row).__name__}, not an object with columns. Correct it."
                )
            yield number, row
    # gzip and zlib, csv, Arrow, wrong encodings and too deep nesting: each has its own idea of an error.
    except (OSError, EOFError, ValueError, csv.Error, pa.ArrowException, RecursionError) as error:
        raise BadImport(
            str(path), f"it cannot be read after row {number}: {error}. Check that it is a whole {_kind(path)} file."
        ) from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with _open_text(path) as lines:
        yield from _json_lines(lines)


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with _open_text(path) as text:
        start = text.read(1)
        while start.isspace():
            start = text.read(1)
        text.seek(0)
        if start == "[":
            yield from enumerate(json.load(text), start=1)
        else:
            yield from _json_lines(text)


def _json_lines(lines: IO[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg} at character {error.colno})") from error
            yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".gz":
        with gzip.open(path) as packed:
            source: Any = pa.BufferReader(packed.read())
    else:
        source = path
    number = 0
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with _open_text(path, newline="") as text:
        for number, row in enumerate(csv.DictReader(text, strict=True), start=1):
            if None in row or None in row.values():
                raise ValueError(f"row {number} has more or fewer cells than the header")
            yield number, {name: _cell(value) for name, value in row.items()}


def _cell(value: str) -> Any:
    """A CSV cell; a list of messages comes as JSON in it."""
    if not value.startswith("[{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}


def _open_text(path: Path, newline: str | None = None) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


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
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    api = HfApi(endpoint=endpoint)
    try:
        # dataset_info asks once; list_repo_files would try for 23 s before it says that the hub is out of reach.
        siblings = api.dataset_info(hub_id, timeout=_HUB_TIMEOUT_S).siblings or []
        names = train_files([sibling.rfilename for sibling in siblings])
        if not names:
            raise BadImport(hub_id, "its train split is not clear from its file names. Download one file and name it.")
        return [Path(api.hf_hub_download(hub_id, name, repo_type="dataset", cache_dir=cache)) for name in names]
    except RepositoryNotFoundError as error:
        raise BadImport(hub_id, "the hub has no such data set, or it is private (then set HF_TOKEN).") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise BadImport(
            hub_id,
            f"the hub {api.endpoint} cannot be reached ({error}). Check the network, or download the file "
            "elsewhere and import it by its path; no file of that name is here either.",
        ) from error
