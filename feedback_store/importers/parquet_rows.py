"""CHILD: the rows of a Parquet file, unpacked within a limit of memory that the system enforces.

    file → stdin | python -m feedback_store.importers.parquet_rows | stdout → Arrow record batches

A page of a Parquet file can stand for any number of values of any length, and the file's own words about its sizes may
be false. So it is unpacked in a process that the system gives no more than ``MEMORY_BYTES``, and that is not ours if it
crashes. What comes out is weighed as Python will hold it, and handed on in small batches. The reason of an exit
code above 0 is on stderr.

Where the system knows no such limit (macOS), the batches are still weighed.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq

from feedback_store.importers.limits import (
    DAMAGED,
    FOOTER_BYTES,
    REFUSED,
    ROW_MEMORY,
    ROWS_KEY,
    UNPACKED_BYTES,
    TooLarge,
    check_columns,
    check_rows,
)

MEMORY_BYTES = 320 * 2**20
CPU_S = 900
_BATCH_ROWS = 64
_BATCH_WEIGHT = 4 * 2**20
_BYTES_A_SLOT = 64  # of a value in Python, beside its content
_SIMPLE = (
    pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_temporal,
    pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null,
    pa.types.is_fixed_size_binary,
)  # fmt: skip


def main() -> None:
    """Read stdin, write stdout."""
    _limit_ourselves()
    try:
        _write(sys.stdin.fileno(), sys.stdout.fileno())
    except TooLarge as error:
        _refuse(str(error))
    except (MemoryError, pa.ArrowMemoryError):
        _refuse(
            f"{_BATCH_ROWS} of its rows need more than {MEMORY_BYTES:,} bytes of memory to unpack, the limit. "
            "Write it with shorter rows and smaller pages"
        )
    except BrokenPipeError:
        os._exit(0)  # enough was read
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:  # Arrow has many names for a damaged file
        _refuse(f"{error}", DAMAGED)


def _limit_ourselves() -> None:
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _write(source: int, target: int) -> None:
    with os.fdopen(source, "rb", closefd=False) as file, os.fdopen(target, "wb", closefd=False) as out:
        _check_footer(file.fileno())
        with pq.ParquetFile(
            file,
            buffer_size=2**20,
            pre_buffer=False,
            thrift_string_size_limit=FOOTER_BYTES,
            thrift_container_size_limit=1_000_000,
            arrow_extensions_enabled=False,
        ) as table:
            _check(table)
            rows = str(table.metadata.num_rows)
            plain = pa.schema([_plain_field(field) for field in table.schema_arrow], {ROWS_KEY: rows})
            with pa.ipc.new_stream(out, plain) as writer:
                bytes_so_far = read = 0
                for batch in table.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                    read += batch.num_rows
                    check_rows(read)
                    for part in _parts(pa.record_batch(list(map(_decoded, batch.columns)), plain)):
                        bytes_so_far += part.nbytes
                        if bytes_so_far > UNPACKED_BYTES:
                            raise TooLarge(f"it unpacks to more than {UNPACKED_BYTES:,} bytes, the limit. Split it")
                        writer.write_batch(part)


def _check_footer(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 4, max(0, size - 8)), "little")
    if FOOTER_BYTES < length < size:
        raise TooLarge(f"its description of itself has {length:,} bytes, the limit is {FOOTER_BYTES:,}. Write it anew")


def _check(table: pq.ParquetFile) -> None:
    """What the file says of itself; it may be too little."""
    described = table.metadata
    check_rows(described.num_rows)
    check_columns(described.num_columns)
    groups = range(described.num_row_groups)
    if (said := sum(max(0, described.row_group(group).total_byte_size) for group in groups)) > UNPACKED_BYTES:
        raise TooLarge(f"it says that it unpacks to {said:,} bytes, the limit is {UNPACKED_BYTES:,}. Split it")


def _plain_field(field: pa.Field) -> pa.Field:
    """The field without a dictionary; a type that may unfold in ways that cannot be weighed is refused."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    _require_known(field.name, kind)
    return pa.field(field.name, kind, nullable=True)


def _require_known(name: str, kind: pa.DataType) -> None:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _require_known(name, kind.value_type)
    elif pa.types.is_struct(kind):
        for one in kind:
            _require_known(name, one.type)
    elif not any(is_such(kind) for is_such in _SIMPLE):
        raise TooLarge(f"its column {name[:100]!r} is of the type {str(kind)[:100]}, which is not read. Leave it out")


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in pieces that are light enough. Raises TooLarge for a row that is not."""
    weight = sum(map(_weight, batch.columns))
    if weight <= _BATCH_WEIGHT or (batch.num_rows == 1 and weight <= ROW_MEMORY):
        yield batch
    elif batch.num_rows == 1:
        raise TooLarge(f"a row of it takes {weight:,} bytes of memory, the limit is {ROW_MEMORY:,}. Take it out")
    else:
        half = batch.num_rows // 2
        yield from _parts(batch.slice(0, half))
        yield from _parts(batch.slice(half))


def _weight(column: pa.Array) -> int:
    """About the bytes that its values take in Python."""
    own = _BYTES_A_SLOT * len(column)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return own + _weight(column.flatten())
    if pa.types.is_struct(column.type):
        return own + sum(map(_weight, column.flatten()))
    return own + int(column.nbytes)


def _decoded(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _refuse(reason: str, code: int = REFUSED) -> None:
    sys.stderr.write(" ".join(reason.split())[:1_000])
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
