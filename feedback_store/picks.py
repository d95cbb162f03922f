"""Picks of many people at once, kept in a handful of statements.

    store.record_pick → Database.submit → record_picks: pairs, answers (by their indexes) → words, keys, picks

A word is what one rater says of one pair; ``pick_words`` numbers the words of a rater on a pair from 0. A later word
supersedes the one before and carries what that one counted for, so that the picks that stand are counted by adding up.
Most words are the first of their rater on their pair, under a key nobody used: that is taken for granted, and only
where a primary key of ``pick_words`` or ``pick_keys`` refuses it are the earlier words and keys looked up: words by
number, 0 first, then twice as many each time. (DuckDB finds rows by a primary key of one column only, so number, pair
and rater of a word are one text.)
Not here: what a pick teaches (``preferences.py``), counting (``statistics.py``).
"""

# ruff: noqa: S608 - only our own column and table names are put into SQL; values are always parameters
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import duckdb

from feedback_store import rows
from feedback_store.database import Cursor
from feedback_store.errors import Conflict, NotFound, StoreError
from feedback_store.preferences import preference_of
from feedback_store.records import Candidate, Pair, Pick, PickChoice

_PAIR_COLUMNS = (
    "pair_id", "prompt", "split", "turn_id", "rater", "created_at", "first_candidate_id", "second_candidate_id",
)  # fmt: skip
_COLUMNS = {
    "picks": {
        "pick_id": "VARCHAR",
        "pair_id": "VARCHAR",
        "pick": "VARCHAR",
        "reasons": "VARCHAR[]",
        "comment": "VARCHAR",
        "rater": "VARCHAR",
        "idempotency_key": "VARCHAR",
        "preference_id": "VARCHAR",
        "part": "VARCHAR",
        "supersedes": "VARCHAR",
        "superseded_pick": "VARCHAR",
        "superseded_part": "VARCHAR",
        "created_at": "TIMESTAMP",
    },
    "pick_keys": {"idempotency_key": "VARCHAR", "pick_id": "VARCHAR"},
    "pick_words": {
        "word": "VARCHAR",
        "pair_id": "VARCHAR",
        "rater": "VARCHAR",
        "number": "INTEGER",
        "pick_id": "VARCHAR",
    },
}
_statements: dict[str, duckdb.Statement] = {}


@dataclass(frozen=True, slots=True)
class _Word:
    """How a pick is stored: its number among its rater's words on its pair, what it counts for, what it supersedes."""

    number: int
    pick_id: str
    pick: str
    part: str | None
    preference_id: str | None = None
    supersedes: _Word | None = None


def record_picks(cursor: Cursor, words: Sequence[Pick]) -> list[Pick | StoreError]:
    """Keep people's words on pairs, in order; the transaction is this function's own.

    For each word the pick that is kept: the word itself, or the first pick under its idempotency key; ``Conflict``
    where that is another one, ``NotFound`` for a pair that is not there.
    """
    pairs = _load_pairs(cursor, words)
    known = {} if all(word.pair_id in pairs for word in words) else _load_known(cursor, words)
    outcomes, kept = _decide(words, pairs, known, {})
    try:
        _insert_keys(cursor, kept)
    except duckdb.ConstraintException:
        # The statement has ended the transaction; nobody else writes to these tables before this one has ended.
        cursor.rollback()
        cursor.begin()
        outcomes, kept = _decide(words, pairs, _load_known(cursor, words), _load_standing(cursor, words))
        _insert_keys(cursor, kept)
    _insert_picks(cursor, kept)
    return outcomes


def record_first_picks(cursor: Cursor, words: Sequence[Pick]) -> list[Pick | StoreError]:
    """As ``record_picks``, but where a rater has judged a pair, the word that stands is given back and none is kept."""
    standing = _load_standing(cursor, words)
    picks = _load(cursor, "picks", rows.PICK_COLUMNS, "pick_id", [word.pick_id for word in standing.values()])
    said = {(pick.pair_id, pick.rater): pick for pick in map(rows.loaded_pick, picks)}
    first: dict[tuple[str, str], Pick] = {}
    for word in words:
        if (word.pair_id, word.rater) not in said:
            first.setdefault((word.pair_id, word.rater), word)
    outcomes = said | dict(zip(first, record_picks(cursor, list(first.values())), strict=True))
    return [outcomes[word.pair_id, word.rater] for word in words]


def _decide(
    words: Sequence[Pick],
    pairs: Mapping[str, tuple[str, Pair | None]],
    known: Mapping[str, Pick],
    standing: Mapping[tuple[str, str], _Word],
) -> tuple[list[Pick | StoreError], list[tuple[Pick, _Word]]]:
    """The outcome of every word, and the words that are new."""
    known, standing = dict(known), dict(standing)
    outcomes: list[Pick | StoreError] = []
    kept: list[tuple[Pick, _Word]] = []
    for word in words:
        if word.idempotency_key in known:
            outcomes.append(_same(known[word.idempotency_key], word))
        elif word.pair_id not in pairs:
            outcomes.append(NotFound("pair", word.pair_id))
        else:
            earlier = standing.get((word.pair_id, word.rater))
            stored = _stored(word, *pairs[word.pair_id], earlier)
            standing[word.pair_id, word.rater] = stored
            if word.idempotency_key is not None:
                known[word.idempotency_key] = word
            outcomes.append(word)
            kept.append((word, stored))
    return outcomes, kept


def _same(earlier: Pick, word: Pick) -> Pick | StoreError:
    if (earlier.pair_id, earlier.pick, earlier.rater) == (word.pair_id, word.pick, word.rater):
        return earlier
    return Conflict(
        f"The idempotency key {word.idempotency_key!r} belongs to the pick {earlier.pick} on {earlier.pair_id}. "
        "Send a new key for a new pick."
    )


def _stored(word: Pick, part: str, pair: Pair | None, earlier: _Word | None) -> _Word:
    preference = None if pair is None else preference_of(word, pair)
    return _Word(
        number=0 if earlier is None else earlier.number + 1,
        pick_id=word.pick_id,
        pick=word.pick.value,
        part=None if preference is None else part,
        preference_id=None if preference is None else preference.preference_id,
        supersedes=earlier,
    )


def _load_known(cursor: Cursor, words: Sequence[Pick]) -> dict[str, Pick]:
    """The picks that are kept under the idempotency keys of these words."""
    keys = [word.idempotency_key for word in words if word.idempotency_key is not None]
    found = _load(cursor, "pick_keys", ("idempotency_key", "pick_id"), "idempotency_key", keys)
    picks = _load(cursor, "picks", rows.PICK_COLUMNS, "pick_id", [pick_id for _, pick_id in found])
    by_id = {row[0]: rows.loaded_pick(row) for row in picks}
    return {key: by_id[pick_id] for key, pick_id in found}


def _load_pairs(cursor: Cursor, words: Sequence[Pick]) -> dict[str, tuple[str, Pair | None]]:
    """The part each pair of these words is in; where a word prefers an answer, also what decides what that teaches."""
    found = _load(cursor, "pairs", _PAIR_COLUMNS, "pair_id", [word.pair_id for word in words])
    preferring = {word.pair_id for word in words if word.pick in (PickChoice.FIRST, PickChoice.SECOND)}
    answers = _load(
        cursor,
        "candidates",
        ("candidate_id", "version", "text", "finish_reason"),
        "candidate_id",
        [candidate_id for row in found if row[0] in preferring for candidate_id in row[6:]],
    )
    by_id = {row[0]: row for row in answers}
    pairs: dict[str, tuple[str, Pair | None]] = {}
    for pair_id, prompt, part, turn_id, rater, created_at, first_id, second_id in found:
        pairs[pair_id] = (part, None)
        if first_id in by_id and second_id in by_id:
            moment = rows.loaded_time(created_at)
            first, second = (_answer(by_id[answer_id], moment) for answer_id in (first_id, second_id))
            pair = Pair(pair_id, rows.loaded_prompt(prompt), first, second, turn_id, rater, moment)
            pairs[pair_id] = (part, pair)
    return pairs


def _answer(row: rows.Row, moment: datetime) -> Candidate:
    candidate_id, version, text, finish_reason = row
    return Candidate(candidate_id, version, text, finish_reason, {}, None, 0.0, moment)


def _load_standing(cursor: Cursor, words: Sequence[Pick]) -> dict[tuple[str, str], _Word]:
    """The last words so far of these raters on these pairs."""
    last: dict[tuple[str, str], rows.Row] = {}
    asked, first = {(word.pair_id, word.rater) for word in words}, 0
    while asked:
        keys = [_key(*one, number) for one in sorted(asked) for number in range(first, 2 * first + 1)]
        said = _load(cursor, "pick_words", ("pair_id", "rater", "number", "pick_id"), "word", keys)
        last |= {(row[0], row[1]): row for row in sorted(said, key=lambda row: row[2])}
        asked, first = {(row[0], row[1]) for row in said if row[2] == 2 * first}, 2 * first + 1
    picks = _load(cursor, "picks", ("pick_id", "pick", "part"), "pick_id", [row[3] for row in last.values()])
    by_id = {row[0]: row for row in picks}
    return {one: _Word(number, *by_id[pick_id]) for one, (_, _, number, pick_id) in last.items()}


def _key(pair_id: str, rater: str, number: int) -> str:
    return f"{number} {len(pair_id)} {pair_id} {rater}"


def _insert_keys(cursor: Cursor, kept: Sequence[tuple[Pick, _Word]]) -> None:
    """What may be there once only; ``duckdb.ConstraintException`` where it is there already."""
    said = [
        (_key(word.pair_id, word.rater, stored.number), word.pair_id, word.rater, stored.number, word.pick_id)
        for word, stored in kept
    ]
    _insert(cursor, "pick_words", said)
    keys = [(word.idempotency_key, word.pick_id) for word, _ in kept if word.idempotency_key is not None]
    _insert(cursor, "pick_keys", keys)


def _insert_picks(cursor: Cursor, kept: Sequence[tuple[Pick, _Word]]) -> None:
    _insert(
        cursor,
        "picks",
        [
            (
                word.pick_id,
                word.pair_id,
                stored.pick,
                list(word.reasons),
                word.comment,
                word.rater,
                word.idempotency_key,
                stored.preference_id,
                stored.part,
                stored.supersedes and stored.supersedes.pick_id,
                stored.supersedes and stored.supersedes.pick,
                stored.supersedes and stored.supersedes.part,
                rows.stored_time(word.created_at),
            )
            for word, stored in kept
        ],
    )


def _load(cursor: Cursor, table: str, columns: Sequence[str], key: str, wanted: Iterable[str]) -> list[rows.Row]:
    """The rows with these keys: a list of parameters is looked up in the index, a join would read the table."""
    values = _padded(wanted)
    if not values:
        return []
    query = f"SELECT {', '.join(columns)} FROM {table} WHERE {key} IN ({', '.join('?' * len(values))})"
    return list(cursor.execute(_parsed(cursor, query), values).fetchall())


def _insert(cursor: Cursor, table: str, values: Sequence[tuple[object, ...]]) -> None:
    """Insert rows as one list a column: the same statement whatever their number."""
    if values:
        columns = _COLUMNS[table]
        lists = ", ".join(f"unnest(CAST(? AS {type_}[]))" for type_ in columns.values())
        statement = _parsed(cursor, f"INSERT INTO {table} ({', '.join(columns)}) SELECT {lists}")
        cursor.execute(statement, [list(column) for column in zip(*values, strict=True)])


def _padded(wanted: Iterable[str]) -> list[str]:
    """Each value once, the last repeated up to a power of two: so there are few statements to keep parsed."""
    values = list(dict.fromkeys(wanted))
    return values + values[-1:] * ((1 << (len(values) - 1).bit_length()) - len(values)) if values else []


def _parsed(cursor: Cursor, query: str) -> duckdb.Statement:
    """A statement of this module, parsed once: that takes as long as running it."""
    if query not in _statements:
        (_statements[query],) = cursor.extract_statements(query)
    return _statements[query]
