"""Table rows to records and back: the one place that knows the column order of each record.

Used by ``store.py`` only. Times in tables are UTC without a zone; in records they carry it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from feedback_store.preferences import split_of
from feedback_store.records import Candidate, Message, Pair, Pick, PickChoice, Preference, Promotion

Row = Sequence[Any]

CANDIDATE_COLUMNS = (
    "candidate_id", "version", "text", "finish_reason", "sampling", "seed", "latency_ms", "created_at",
)  # fmt: skip
PICK_COLUMNS = ("pick_id", "pair_id", "pick", "reasons", "comment", "rater", "idempotency_key", "created_at")
PAIR_COLUMNS = ("pair_id", "prompt", "turn_id", "rater", "created_at")
PREFERENCE_COLUMNS = (
    "preference_id", "prompt", "chosen", "rejected", "source", "weight", "rater", "versions", "practice", "created_at",
)  # fmt: skip
PROMOTION_COLUMNS = ("version", "previous", "kind", "reason", '"by"', "evaluation", "created_at")

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_PREFERENCES = pa.schema(
    [
        ("preference_id", pa.string()),
        ("prompt", _MESSAGES),
        ("split", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("source", pa.string()),
        ("weight", pa.float64()),
        ("rater", pa.string()),
        ("versions", pa.list_(pa.string())),
        ("practice", pa.string()),
        ("import_id", pa.string()),
        ("created_at", pa.timestamp("us")),
    ]
)


def columns(names: Iterable[str], table: str) -> str:
    """The names as a select list of one table alias."""
    return ", ".join(f"{table}.{name}" for name in names)


def stored_time(moment: datetime) -> datetime:
    """A zoned time as tables hold it."""
    return moment.astimezone(UTC).replace(tzinfo=None)


def loaded_time(moment: datetime) -> datetime:
    """A table's time as records hold it."""
    return moment.replace(tzinfo=UTC)


def stored_prompt(prompt: Sequence[Message]) -> list[dict[str, str]]:
    """A prompt as a DuckDB list of structs takes it."""
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def loaded_prompt(messages: Iterable[Any]) -> tuple[Message, ...]:
    """A prompt as records hold it."""
    return tuple(Message(role=message["role"], content=message["content"]) for message in messages)


def stored_candidate(candidate: Candidate) -> list[object]:
    """The values of a candidate in the order of CANDIDATE_COLUMNS."""
    return [
        candidate.candidate_id,
        candidate.version,
        candidate.text,
        candidate.finish_reason,
        json.dumps(dict(candidate.sampling)),
        candidate.seed,
        candidate.latency_ms,
        stored_time(candidate.created_at),
    ]


def loaded_candidate(row: Row) -> Candidate:
    """A row of CANDIDATE_COLUMNS."""
    candidate_id, version, text, finish_reason, sampling, seed, latency_ms, created_at = row
    return Candidate(
        candidate_id, version, text, finish_reason, json.loads(sampling), seed, latency_ms, loaded_time(created_at)
    )


def loaded_pair(row: Row) -> Pair:
    """A row of the pair's columns followed by those of its first and its second candidate."""
    (pair_id, prompt, turn_id, rater, created_at), candidates = row[:5], row[5:]
    middle = len(CANDIDATE_COLUMNS)
    first, second = loaded_candidate(candidates[:middle]), loaded_candidate(candidates[middle:])
    return Pair(pair_id, loaded_prompt(prompt), first, second, turn_id, rater, loaded_time(created_at))


def loaded_pick(row: Row) -> Pick:
    """A row of PICK_COLUMNS."""
    pick_id, pair_id, pick, reasons, comment, rater, key, created_at = row
    return Pick(pick_id, pair_id, PickChoice(pick), tuple(reasons), comment, rater, key, loaded_time(created_at))


def loaded_promotion(row: Row) -> Promotion:
    """A row of PROMOTION_COLUMNS."""
    version, previous, kind, reason, by, evaluation, created_at = row
    measured = None if evaluation is None else json.loads(evaluation)
    return Promotion(version, previous, kind, reason, by, measured, loaded_time(created_at))


def loaded_preference(row: Row) -> Preference:
    """A row of the preferences table: imported or practice, so without a pick."""
    identity, prompt, chosen, rejected, source, weight, rater, versions, practice, created_at = row
    return Preference(
        preference_id=identity,
        prompt=loaded_prompt(prompt),
        chosen=chosen,
        rejected=rejected,
        source=source,
        weight=weight,
        rater=rater,
        pick_id=None,
        versions=tuple(versions),
        practice=practice,
        created_at=loaded_time(created_at),
    )


def preference_table(preferences: Sequence[Preference], import_id: str | None) -> pa.Table:
    """Preferences as an Arrow table with the columns of the preferences table."""
    return pa.Table.from_pylist(
        [
            {
                "preference_id": preference.preference_id,
                "prompt": stored_prompt(preference.prompt),
                "split": split_of(preference.prompt),
                "chosen": preference.chosen,
                "rejected": preference.rejected,
                "source": preference.source,
                "weight": preference.weight,
                "rater": preference.rater,
                "versions": list(preference.versions),
                "practice": preference.practice,
                "import_id": import_id,
                "created_at": stored_time(preference.created_at),
            }
            for preference in preferences
        ],
        schema=_PREFERENCES,
    )
