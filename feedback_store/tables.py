"""Preferences and labelled answers as Arrow tables: the columns a snapshot takes and keeps, and what follows from them.

    records --rows_of--> ROWS --redacted--> ROWS --finished--> SCHEMA (Parquet) --preference_of_row--> records
    labelled --ratings_of--> RATING_ROWS --redacted, finished--> RATING_SCHEMA (Parquet) --rating_of_row--> labelled

Used by ``snapshots.py`` and by the store, which loads ``ROWS`` straight from the database: 100,000 preferences are
columns, not 100,000 objects. Not here: which rows are taken (``mixing.py``), files (``snapshots.py``).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from feedback_store.records import Message, Preference, UnpairedPreference
from feedback_store.redaction import redact_column

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES = pa.list_(MESSAGE)
_PROVENANCE = [
    ("source", pa.string()),
    ("rater", pa.string()),
    ("weight", pa.float64()),
    ("pick_id", pa.string()),
    ("versions", pa.list_(pa.string())),
    ("practice", pa.string()),
]
_MADE = ("created_at", pa.timestamp("us", tz="UTC"))
# What freeze takes: one row a preference, the answers as text.
ROWS = pa.schema(
    [
        ("preference_id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        *_PROVENANCE,
        _MADE,
    ]
)
# What a part holds: TRL's conversational columns, and the key of the prompt as it was before anything was redacted.
SCHEMA = pa.schema(
    [
        ("preference_id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        *_PROVENANCE,
        ("prompt_key", pa.string()),
        _MADE,
    ]
)
_RATED = [
    ("source", pa.string()),
    ("rater", pa.string()),
    ("weight", pa.float64()),
    ("versions", pa.list_(pa.string())),
]
# The same for labelled answers: TRL's conversational "unpaired preference" columns, which KTO learns from.
RATING_ROWS = pa.schema(
    [
        ("unpaired_id", pa.string()),
        ("prompt", MESSAGES),
        ("completion", pa.string()),
        ("label", pa.bool_()),
        *_RATED,
        _MADE,
    ]
)
RATING_SCHEMA = pa.schema(
    [
        ("unpaired_id", pa.string()),
        ("prompt", MESSAGES),
        ("completion", MESSAGES),
        ("label", pa.bool_()),
        *_RATED,
        ("prompt_key", pa.string()),
        _MADE,
    ]
)
_ANSWERS = ("chosen", "rejected", "completion")


def rows_of(preferences: Iterable[Preference]) -> pa.Table:
    """Preferences as a table of the schema ``ROWS``."""
    return pa.Table.from_pylist(
        [
            {
                "preference_id": preference.preference_id,
                "prompt": [{"role": m["role"], "content": m["content"]} for m in preference.prompt],
                "chosen": preference.chosen,
                "rejected": preference.rejected,
                "source": preference.source,
                "rater": preference.rater,
                "weight": float(preference.weight),
                "pick_id": preference.pick_id,
                "versions": list(preference.versions),
                "practice": preference.practice,
                "created_at": preference.created_at,
            }
            for preference in preferences
        ],
        schema=ROWS,
    )


def ratings_of(labelled: Iterable[UnpairedPreference]) -> pa.Table:
    """Labelled answers as a table of the schema ``RATING_ROWS``."""
    return pa.Table.from_pylist(
        [
            {
                "unpaired_id": one.unpaired_id,
                "prompt": [{"role": m["role"], "content": m["content"]} for m in one.prompt],
                "completion": one.completion,
                "label": one.label,
                "source": one.source,
                "rater": one.rater,
                "weight": float(one.weight),
                "versions": list(one.versions),
                "created_at": one.created_at,
            }
            for one in labelled
        ],
        schema=RATING_ROWS,
    )


def redacted(rows: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """The rows with addresses, numbers and keys hidden in every text, and how many by kind."""
    found: Counter[str] = Counter()
    for name in [name for name in _ANSWERS if name in rows.column_names]:
        hidden, kinds = redact_column(_one_array(rows[name]))
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), hidden)
        found += kinds
    prompts = _one_array(rows["prompt"])
    contents, kinds = redact_column(pc.struct_field(prompts.flatten(), "content"))
    roles = pc.struct_field(prompts.flatten(), "role")
    messages = pa.StructArray.from_arrays([roles, contents], fields=list(MESSAGE))
    hidden_prompts = pa.ListArray.from_arrays(_offsets(prompts), messages)
    rows = rows.set_column(rows.schema.get_field_index("prompt"), rows.schema.field("prompt"), hidden_prompts)
    return rows, found + kinds


def finished(rows: pa.Table, indexes: Sequence[int], keys: Sequence[str]) -> pa.Table:
    """The rows at these indexes, in this order, with the columns of ``SCHEMA``; ``keys`` are those of all rows.

    Rows of ``RATING_ROWS`` get those of ``RATING_SCHEMA``.
    """
    schema = SCHEMA if "chosen" in rows.column_names else RATING_SCHEMA
    taken = rows.take(pa.array(indexes, pa.int64()))
    columns = {name: taken[name] for name in rows.column_names}
    columns |= {name: _as_messages(taken[name]) for name in _ANSWERS if name in columns}
    columns["prompt_key"] = pa.array([keys[index] for index in indexes], pa.string())
    return pa.table([columns[name] for name in schema.names], schema=schema)


def weighted(part: pa.Table, weights: Mapping[str, float]) -> pa.Table:
    """The part with each row's weight multiplied by that of its rater, where they have one."""
    if not weights:
        return part
    by_row = pa.array([weights.get(rater, 1.0) for rater in part["rater"].to_pylist()], pa.float64())
    index = part.schema.get_field_index("weight")
    return part.set_column(index, part.schema.field(index), pc.multiply(part["weight"], by_row))


def _as_messages(answers: pa.ChunkedArray) -> pa.ListArray:
    contents = _one_array(answers)
    roles = pa.array(["assistant"], pa.string()).take(pa.array([0] * len(contents), pa.int64()))
    messages = pa.StructArray.from_arrays([roles, contents], fields=list(MESSAGE))
    return pa.ListArray.from_arrays(pa.array(range(len(contents) + 1), pa.int32()), messages)


def first_user_texts(prompts: pa.ChunkedArray) -> list[str]:
    """The first user message of every prompt."""
    array = _one_array(prompts)
    roles, contents = (pc.struct_field(array.flatten(), name).to_pylist() for name in ("role", "content"))
    starts = _offsets(array).to_pylist()
    return [contents[roles.index("user", start, end)] for start, end in pairwise(starts)]


def said(rows: pa.Table, index: int) -> tuple[str, str, str]:
    """The prompt (as one text that stands for all its messages), the better and the worse answer of one row.

    A labelled answer is better or worse than none.
    """
    messages = rows["prompt"][index].as_py()
    prompt = "\0".join(text for message in messages for text in (message["role"], message["content"]))
    if "chosen" in rows.column_names:
        return prompt, rows["chosen"][index].as_py(), rows["rejected"][index].as_py()
    completion = rows["completion"][index].as_py()
    return (prompt, completion, "") if rows["label"][index].as_py() else (prompt, "", completion)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _offsets(lists: pa.ListArray) -> pa.Array:
    """Where each list begins in ``lists.flatten()``, and the end."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    return pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(lengths).cast(pa.int32())])


def content_hash(table: pa.Table) -> str:
    """The SHA-256 of every column but ``created_at``: when a row was made does not count.

    Each column goes in as its name, the lengths of its values (-1 for null) and their bytes, so that it does not
    depend on how Arrow chunks or pads them.
    """
    digest = hashlib.sha256()
    for name in table.column_names:
        if name != "created_at":
            digest.update(name.encode())
            _digest_array(_one_array(table[name]), digest)
    return digest.hexdigest()


def _digest_array(array: pa.Array, digest: Any) -> None:
    if pa.types.is_list(array.type):
        digest.update(pc.fill_null(pc.list_value_length(array), -1).cast(pa.int32()).to_numpy().astype("<i4").tobytes())
        _digest_array(array.flatten(), digest)
    elif pa.types.is_struct(array.type):
        for field in array.type:
            _digest_array(pc.struct_field(array, field.name), digest)
    elif pa.types.is_floating(array.type):
        digest.update(array.to_numpy(zero_copy_only=False).astype("<f8").tobytes())
    elif pa.types.is_boolean(array.type):
        digest.update(array.to_numpy(zero_copy_only=False).astype("u1").tobytes())
    else:
        digest.update(pc.fill_null(pc.binary_length(array), -1).to_numpy().astype("<i4").tobytes())
        filled = pc.fill_null(array, "") if array.null_count else array
        buffer = filled.buffers()[2]
        begin, end = _string_range(filled)
        digest.update(memoryview(buffer)[begin:end] if buffer is not None else b"")


def _string_range(array: pa.Array) -> tuple[int, int]:
    """First and last byte of a string array in its data buffer."""
    if not len(array):
        return 0, 0
    offsets = memoryview(array.buffers()[1]).cast("i")
    return offsets[array.offset], offsets[array.offset + len(array)]


def preference_of_row(row: Mapping[str, Any]) -> Preference:
    """A row of ``ROWS`` or ``SCHEMA`` as a record."""
    return Preference(
        preference_id=row["preference_id"],
        prompt=tuple(Message(role=m["role"], content=m["content"]) for m in row["prompt"]),
        chosen=_text(row["chosen"]),
        rejected=_text(row["rejected"]),
        source=row["source"],
        weight=row["weight"],
        rater=row["rater"],
        pick_id=row["pick_id"],
        versions=tuple(row["versions"]),
        practice=row["practice"],
        created_at=row["created_at"].astimezone(UTC),
    )


def rating_of_row(row: Mapping[str, Any]) -> UnpairedPreference:
    """A row of ``RATING_ROWS`` or ``RATING_SCHEMA`` as a record."""
    return UnpairedPreference(
        unpaired_id=row["unpaired_id"],
        prompt=tuple(Message(role=m["role"], content=m["content"]) for m in row["prompt"]),
        completion=_text(row["completion"]),
        label=row["label"],
        source=row["source"],
        weight=row["weight"],
        rater=row["rater"],
        versions=tuple(row["versions"]),
        created_at=row["created_at"].astimezone(UTC),
    )


def _text(answer: Any) -> str:
    return str(answer if isinstance(answer, str) else answer[0]["content"])
