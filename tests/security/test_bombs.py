"""Small files that stand for gigabytes: each is refused as BadImport, with value and limit, and little memory is used.

The reading happens in a process of its own, whose largest size (its children's too) the system tells afterwards; not by
`RUSAGE_SELF`, which begins with the size of the process that started it.
"""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MIB = 2**20
MOST_BYTES = 500 * 10**6
TIME_S = 300
# What an attacker's file may take at most before this test machine is in danger; the old code runs into it.
WALL = 3 * 2**30
READ = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]), int(sys.argv[2])))
from datetime import UTC, datetime
from feedback_store.errors import BadImport
from feedback_store.importers import read_preferences
said = "it was taken"
try:
    for batch in read_preferences(sys.argv[1], "auto", datetime.now(UTC)).batches(2000):
        pass
except BadImport as error:
    said = str(error)
own = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024, said)
"""


def members(path: Path, content: bytes, times: int, end: bytes = b"", begin: bytes = b"") -> Path:
    """A gzip file that unpacks to ``times`` times the content; packed once, repeated as members."""
    packed = gzip.compress(content, 9, mtime=0)
    with path.open("wb") as file:
        file.write(gzip.compress(begin, mtime=0))
        for _ in range(times):
            file.write(packed)
        file.write(gzip.compress(end, mtime=0))
    return path


def repeated(path: Path, length: int, rows: int) -> Path:
    """Three columns, each one text, a dictionary's, in every row."""
    texts = [pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [sign * length]) for sign in "abc"]
    table = pa.table(texts, ["prompt", "chosen", "rejected"])
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False)
    return path


def dictionary_kept(folder: Path) -> Path:
    """The same, and the file says that its columns are dictionaries in memory, too."""
    texts = [pa.DictionaryArray.from_arrays(pa.array([0] * 2600, pa.int32()), [sign * MIB]) for sign in "abc"]
    path = folder / "kept.parquet"
    pq.write_table(
        pa.table(texts, ["prompt", "chosen", "rejected"]), path, compression="zstd", dictionary_pagesize_limit=2**30
    )
    return path


def nothing_in_a_list(folder: Path) -> Path:
    """One row whose list has 40 million nulls, which take no bytes at all in Arrow."""
    long = pa.ListArray.from_arrays([0, 40_000_000], pa.nulls(40_000_000))
    text = pa.array(["text"])
    path = folder / "nulls.parquet"
    pq.write_table(pa.table([text, text, text, long], ["prompt", "chosen", "rejected", "more"]), path)
    return path


def one_cell(folder: Path) -> Path:
    path = folder / "cell.csv"
    with path.open("wb") as file:
        file.write(b'prompt,chosen,rejected\n"')
        for _ in range(300):
            file.write(b"a" * MIB)
        file.write(b'",b,c\n')
    return path


def many_cells(folder: Path) -> Path:
    path = folder / "cells.csv"
    path.write_bytes(b",".join(b"c%d" % number for number in range(400_000)) + b"\n" + b"," * 399_999 + b"\n")
    return path


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def one_of_emoji(folder: Path) -> Path:
    """A single sign beyond the first plane makes every letter of a text four bytes."""
    return written(folder, "emoji.json", json.dumps([{"prompt": "a" * 31 * MIB + "😀"}], ensure_ascii=False).encode())


def twenty_rows(folder: Path) -> Path:
    """Rows below every limit that is about one row."""
    row = b'{"prompt": "' + b"a" * (4 * MIB - 100) + b'\xf0\x9f\x98\x80", "chosen": "b", "rejected": "c"}\n'
    return written(folder, "twenty.jsonl", row * 40)


BOMBS: dict[str, Callable[[Path], Path]] = {
    "parquet dictionary": lambda folder: repeated(folder / "dictionary.parquet", MIB, 2600),
    "parquet one huge value": lambda folder: repeated(folder / "value.parquet", 100 * MIB, 1),
    "parquet dictionary kept": dictionary_kept,
    "parquet list of nothing": nothing_in_a_list,
    "parquet many rows": lambda folder: repeated(folder / "rows.parquet", 1, 3_000_000),
    "parquet in gzip": lambda folder: members(folder / "big.parquet.gz", b"PAR1" + bytes(16 * MIB), 100, b"PAR1"),
    "gzip of one line": lambda folder: members(folder / "line.jsonl.gz", b" " * 16 * MIB, 160, b"{}\n"),
    "gzip of rows": lambda folder: members(
        folder / "rows.jsonl.gz", b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * MIB, 99
    ),
    "gzip of empty lines": lambda folder: members(folder / "empty.jsonl.gz", b"\n" * 16 * MIB, 160, b"{}"),
    "gzip of a document": lambda folder: members(folder / "all.json.gz", b'{"prompt": "a"},' * MIB, 200, b"{}]", b"["),
    "gzip of a cell": lambda folder: members(
        folder / "cell.csv.gz", b"a" * 16 * MIB, 160, b'",b,c\n', b'prompt,chosen,rejected\n"'
    ),
    "gzip of a csv's empty lines": lambda folder: members(folder / "lines.csv.gz", b"\n" * 16 * MIB, 160, b"a,b"),
    "one csv cell": one_cell,
    "many csv columns": many_cells,
    "one line": lambda folder: written(folder, "line.jsonl", b'{"prompt": "' + b"a" * 200 * MIB + b'"}\n'),
    "second line": lambda folder: written(folder, "two.jsonl", b'{"prompt": "a"}\n{"prompt": "' + b"a" * 200 * MIB),
    "200 MB of JSON": lambda folder: written(folder, "all.json", b"[" + b'{"prompt":"a"},' * 13_500_000 + b"{}]"),
    "small values": lambda folder: written(folder, "small.json", b"[" + b"{}," * 10 * MIB + b"{}]"),
    "small values in a line": lambda folder: written(
        folder, "s.jsonl", b'{"a":1}\n{"a":[' + b"[]," * 1_300_000 + b"[]]}"
    ),
    "small values in a cell": lambda folder: written(
        folder, "cell.csv", b'prompt,chosen,rejected\n"[{},' + b"{}," * 600_000 + b'{}]",b,c\n'
    ),
    "deep JSON": lambda folder: written(folder, "deep.json", b"[" * 20_000_000),
    "deep JSON in a line": lambda folder: written(folder, "deep.jsonl", b'{"a":1}\n{"a":' + b"[" * 4_000_000),
    "one sign of four bytes": one_of_emoji,
    "a zip by another name": lambda folder: written(folder, "zip.json", b"PK\x03\x04" + bytes(200 * MIB)),
}


def read(path: Path) -> tuple[int, str]:
    """The largest size of the process that reads a file, and what it says."""
    command = [sys.executable, "-c", READ, str(path), str(WALL)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_S, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    size, _, said = done.stdout.partition(" ")
    return int(size), said


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_bomb_is_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    size, said = read(BOMBS[name](tmp_path))
    assert "Nothing was imported from" in said
    assert size < MOST_BYTES, f"{size:,} bytes: {said}"
    assert len(said) < 2_000
    assert any(sign.isdigit() for sign in said.partition(": ")[2]), said  # the value and its limit


def test_rows_below_every_limit_do_not_add_up(tmp_path: Path) -> None:
    size, said = read(twenty_rows(tmp_path))
    assert size < MOST_BYTES, f"{size:,} bytes: {said}"


def test_a_row_of_many_judgements_does_not_multiply_its_prompt(tmp_path: Path) -> None:
    judged = [
        {"value": {"better": "response-1"}, "user_id": str(number), "status": "submitted"} for number in range(40_000)
    ]
    row = {"prompt": "p" * 20_000, "chosen": "c", "rejected": "r", "responses": judged}
    size, said = read(written(tmp_path, "judged.jsonl", json.dumps(row).encode() + b"\n"))
    assert size < MOST_BYTES, f"{size:,} bytes: {said}"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv.gz"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, suffix: str) -> None:
    import os

    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    assert "Nothing was imported" in read(path)[1]
