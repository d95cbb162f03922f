"""Which rows of a database are a person's, and the tombstones that stay in their place.

    mark → gone_… tables → count, collect (what to look for elsewhere) → without: how to copy what stays
    load_tombstones, add_tombstones, still_there (after a restore)

Everything that was made of a person's words goes with them: the conversation, the answers, the pairs, and what others
said about those. Events they caused stay without their name. Nothing is deleted in place, because DuckDB leaves the
bytes of deleted rows in the file: what stays is copied to a new one (``backup.copy_database``). Works on a store of
every schema that was released, so on old backups too, where people stand by their names. A tombstone holds salted
hashes of the label and of the training rows, no word. Used by ``erasure.py`` and, for a restore, ``backup.py``.

A judgement is one rater's word on a row: the same row judged by somebody else stays, with its texts.
"""

# ruff: noqa: S608 - only our own table and column names are put into SQL; values are always parameters
from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa

from feedback_store.database import Cursor
from feedback_store.people import OWN, Person, load_labels
from feedback_store.preferences import judgement_id, preference_id, unpaired_id

ERASED = "erased"
_BATCH_ROWS = 1000

# Tables whose rows belong to a rater; tables of events that stay, without the name; and the texts that are mended.
_OWNED = (
    "conversations", "pairs", "generations", "picks", "ratings", "edits", "preferences", "unpaired_preferences",
    "quarantines",
)  # fmt: skip
_CAUSED = ("promotions", "learning_choices", "trials", "trial_ends", "dismissals", "quarantines")
_MENDED = {
    "promotions": ("by", "reason", "evaluation"),
    "learning_choices": ("by",),
    "imports": ("source",),
    "trials": ("by", "reason"),
    "trial_ends": ("by", "reason"),
    "proposals": ("sentence", "reason"),
    "dismissals": ("by", "reason"),
    "quarantines": ("by", "reason"),
}
# The ids of what goes, in the order in which one needs the other.
_GONE = {
    "conversations": "SELECT conversation_id AS id FROM conversations WHERE {owner} IN (FROM gone_raters)",
    "turns": "SELECT turn_id AS id FROM turns WHERE conversation_id IN (FROM gone_conversations)",
    # An answer that somebody else's conversation went on with is theirs.
    "candidates": """
        SELECT candidate_id AS id FROM generations WHERE rater IN (FROM gone_raters) OR turn_id IN (FROM gone_turns)
        UNION SELECT candidate_id FROM answers WHERE turn_id IN (FROM gone_turns)
        UNION SELECT unnest([first_candidate_id, second_candidate_id]) FROM pairs
            WHERE rater IN (FROM gone_raters) OR turn_id IN (FROM gone_turns)
        EXCEPT SELECT candidate_id FROM answers WHERE turn_id NOT IN (FROM gone_turns)""",
    "pairs": """
        SELECT pair_id AS id FROM pairs WHERE rater IN (FROM gone_raters) OR turn_id IN (FROM gone_turns)
        OR first_candidate_id IN (FROM gone_candidates) OR second_candidate_id IN (FROM gone_candidates)""",
    "picks": "SELECT pick_id AS id FROM picks WHERE rater IN (FROM gone_raters) OR pair_id IN (FROM gone_pairs)",
    "ratings": """
        SELECT rating_id AS id FROM ratings
        WHERE rater IN (FROM gone_raters) OR candidate_id IN (FROM gone_candidates)""",
    "edits": """
        SELECT edit_id AS id FROM edits WHERE rater IN (FROM gone_raters) OR candidate_id IN (FROM gone_candidates)""",
    "ids": """
        FROM gone_conversations UNION ALL FROM gone_turns UNION ALL FROM gone_candidates UNION ALL FROM gone_pairs
        UNION ALL FROM gone_picks UNION ALL FROM gone_ratings UNION ALL FROM gone_edits""",
}
_ROWS = {
    "titles": "conversation_id IN (FROM gone_conversations)",
    "preset_choices": "conversation_id IN (FROM gone_conversations)",
    "answers": "turn_id IN (FROM gone_turns) OR candidate_id IN (FROM gone_candidates)",
    "turns": "turn_id IN (FROM gone_turns)",
    "conversations": "conversation_id IN (FROM gone_conversations)",
    "generations": """rater IN (FROM gone_raters) OR turn_id IN (FROM gone_turns)
        OR candidate_id IN (FROM gone_candidates)""",
    "candidates": "candidate_id IN (FROM gone_candidates)",
    "pick_keys": "pick_id IN (FROM gone_picks)",
    "pick_words": "pick_id IN (FROM gone_picks)",
    "picks": "pick_id IN (FROM gone_picks)",
    "pairs": "pair_id IN (FROM gone_pairs)",
    "ratings": "rating_id IN (FROM gone_ratings)",
    "edits": "edit_id IN (FROM gone_edits)",
    "event_keys": "record_id IN (FROM gone_ids)",
    "preferences": "rater IN (FROM gone_judges) OR {preferences} IN (FROM gone_contents)",
    "unpaired_preferences": "rater IN (FROM gone_judges) OR {unpaired_preferences} IN (FROM gone_contents)",
    "learning_choices": """(scope = 'rater' AND subject IN (FROM gone_raters))
        OR (scope = 'conversation' AND subject IN (FROM gone_conversations))""",
    "quarantines": "rater IN (FROM gone_raters)",
    "people": f"person_id IN (FROM gone_raters) AND label <> '{OWN}'",
}
_PROMPTS = """
    SELECT prompt FROM pairs WHERE pair_id IN (FROM gone_pairs)
    UNION ALL SELECT prompt FROM generations
        WHERE candidate_id IN (FROM gone_candidates) OR rater IN (FROM gone_raters)"""
# The system message of a prompt is the house's.
_TEXTS = f"""
    SELECT title FROM titles WHERE conversation_id IN (FROM gone_conversations)
    UNION ALL SELECT text FROM turns WHERE turn_id IN (FROM gone_turns)
    UNION ALL SELECT text FROM candidates WHERE candidate_id IN (FROM gone_candidates)
    UNION ALL SELECT text FROM edits WHERE edit_id IN (FROM gone_edits)
    UNION ALL SELECT comment FROM picks WHERE pick_id IN (FROM gone_picks) AND comment IS NOT NULL
    UNION ALL SELECT comment FROM ratings WHERE rating_id IN (FROM gone_ratings) AND comment IS NOT NULL
    UNION ALL SELECT message.content FROM (SELECT unnest(prompt) AS message FROM ({_PROMPTS}))
        WHERE message.role <> 'system'"""
_JUDGED = """
    SELECT unnest([chosen, rejected]) AS text FROM preferences WHERE {paired}
    UNION ALL SELECT completion FROM unpaired_preferences WHERE {unpaired}
    UNION ALL SELECT message.content FROM (SELECT unnest(prompt) AS message FROM (
        SELECT prompt FROM preferences WHERE {paired}
        UNION ALL SELECT prompt FROM unpaired_preferences WHERE {unpaired})) WHERE message.role <> 'system'"""
_IMPORTED = """
    SELECT preference_id, content FROM preferences WHERE rater IN (FROM gone_judges)
    UNION ALL SELECT unpaired_id, content FROM unpaired_preferences WHERE rater IN (FROM gone_judges)"""
_SAME = """
    SELECT preference_id FROM preferences WHERE content IN (FROM gone_contents)
    UNION ALL SELECT unpaired_id FROM unpaired_preferences WHERE content IN (FROM gone_contents)"""
# Every training row that ever came of these words, with the id of what it came from; see ``evidence.py``.
_COMPARED = """
    SELECT pairs.prompt, chosen.text, rejected.text, picks.pick_id FROM picks JOIN pairs USING (pair_id)
        JOIN candidates AS chosen ON chosen.candidate_id =
            CASE picks.pick WHEN 'first' THEN first_candidate_id ELSE second_candidate_id END
        JOIN candidates AS rejected ON rejected.candidate_id =
            CASE picks.pick WHEN 'first' THEN second_candidate_id ELSE first_candidate_id END
        WHERE picks.pick IN ('first', 'second') AND picks.pick_id IN (FROM gone_picks)
    UNION ALL SELECT generations.prompt, edits.text, candidates.text, edits.edit_id FROM edits
        JOIN generations USING (candidate_id) JOIN candidates USING (candidate_id)
        WHERE edits.edit_id IN (FROM gone_edits)
    UNION ALL SELECT generations.prompt, kept.text, given_up.text, later.turn_id FROM answers AS later
        JOIN answers AS earlier ON earlier.turn_id = later.turn_id AND earlier.event < later.event
        JOIN generations ON generations.candidate_id = later.candidate_id
        JOIN candidates AS kept ON kept.candidate_id = later.candidate_id
        JOIN candidates AS given_up ON given_up.candidate_id = earlier.candidate_id
        WHERE later.turn_id IN (FROM gone_turns)"""
_LABELLED = """
    SELECT generations.prompt, candidates.text, ratings.rating = 'up', ratings.rating_id FROM ratings
        JOIN generations USING (candidate_id) JOIN candidates USING (candidate_id)
        WHERE ratings.rating_id IN (FROM gone_ratings)
    UNION ALL SELECT pairs.prompt, candidates.text, false, picks.pick_id FROM picks JOIN pairs USING (pair_id)
        JOIN candidates ON candidate_id IN (first_candidate_id, second_candidate_id)
        WHERE picks.pick = 'both_bad' AND picks.pick_id IN (FROM gone_picks)"""


@dataclass(frozen=True, slots=True)
class Tombstones:
    """Who and what was erased: hashes of names with times and counts (JSON), hashes of training rows, the salts."""

    salts: tuple[str, ...] = ()
    raters: Mapping[tuple[str, datetime], str] = field(default_factory=dict)
    contents: frozenset[str] = frozenset()

    def __or__(self, other: Tombstones) -> Tombstones:
        salts = tuple(dict.fromkeys((*self.salts, *other.salts)))
        return Tombstones(salts, {**self.raters, **other.raters}, self.contents | other.contents)

    def times_of(self, *names: str) -> list[datetime]:
        """When the person with one of these names was erased, oldest first."""
        hashes = {rater_hash(salt, name) for salt in self.salts for name in names}
        return sorted(moment for one, moment in self.raters if one in hashes)


@dataclass(frozen=True, slots=True)
class Collected:
    """What was made of the marked rows: their ids and texts, and the hashes of the training rows."""

    ids: frozenset[str]
    texts: frozenset[str]
    contents: frozenset[str]


def rater_hash(salt: str, rater: str) -> str:
    """What a tombstone keeps of a name."""
    return hashlib.sha256((salt + rater).encode()).hexdigest()


def nobodys(content: str) -> str:
    """What a tombstone keeps of an imported row whose rater was erased: without a name it may still be theirs."""
    return judgement_id(content, "")


def names_in_tombstones(person: Person) -> tuple[str, ...]:
    """By what tombstones know a person: the label; of those from before there were labels the name."""
    return (person.label,) if person.name == OWN else (person.label, person.name)


# Marking, looking, removing


def mark(cursor: Cursor, people: Collection[Person], contents: Collection[str] = ()) -> None:
    """Name the rows of these people, and the imported rows with these hashes, in temporary tables ``gone_…``."""
    tables = _tables(cursor)
    labels = {person.label for person in people}
    raters, judges = labels | {person.person_id for person in people}, set()
    if "people" in tables:
        # A store with another salt has other ids for the same people.
        raters |= {person_id for person_id, label in load_labels(cursor).items() if label in labels}
    else:
        # There a name that is a word of the program's own is an imported person's in imported rows only.
        judges = {person.name for person in people if person.name != person.label}
    if "generations" not in tables:
        cursor.execute(
            "CREATE OR REPLACE TEMP TABLE generations (candidate_id VARCHAR, turn_id VARCHAR, rater VARCHAR)"
        )
    _fill(cursor, "raters", raters)
    _fill(cursor, "judges", raters | judges)
    _fill(cursor, "contents", contents)
    # Before conversations had raters, everybody was `local`.
    owner = "rater" if "rater" in tables["conversations"] else "'local'"
    for name, sql in _GONE.items():
        cursor.execute(f"CREATE OR REPLACE TEMP TABLE gone_{name} AS {sql.format(owner=owner)}")


def collect(cursor: Cursor) -> Collected:
    """Read what has to be looked for elsewhere. The imported rows with the same contents are marked too then."""
    ids = {one for (one,) in _found(cursor, "FROM gone_ids")}
    contents: set[str] = set()
    for identity, content in _found(cursor, _IMPORTED):
        ids.add(identity)
        contents.add(nobodys(content))
    for prompt, chosen, rejected, origin in _found(cursor, _COMPARED):
        contents.add(preference_id(prompt, chosen, rejected, None))
        ids.add(preference_id(prompt, chosen, rejected, origin))
    for prompt, completion, label, origin in _found(cursor, _LABELLED):
        contents.add(unpaired_id(prompt, completion, label, None))
        ids.add(unpaired_id(prompt, completion, label, origin))
    _fill(cursor, "contents", contents)
    ids |= {one for (one,) in _found(cursor, _SAME)}
    texts = {text for (text,) in _found(cursor, _TEXTS)}
    rows = _rows(_tables(cursor))
    gone = {"paired": rows["preferences"], "unpaired": rows["unpaired_preferences"]}
    staying = {name: f"({which}) IS NOT TRUE" for name, which in gone.items()}
    texts |= {text for (text,) in _found(cursor, f"({_JUDGED.format(**gone)}) EXCEPT ({_JUDGED.format(**staying)})")}
    return Collected(frozenset(ids), frozenset(texts), frozenset(contents))


def count(cursor: Cursor) -> Counter[str]:
    """The marked rows, and the events the people caused, by table, where there are any. Labels are no rows."""
    tables = _tables(cursor)
    rows = _rows(tables)
    owned = {table: f"SELECT count(*) FROM {table} WHERE {which}" for table, which in rows.items() if table != "people"}
    caused = {
        table: f"""SELECT count(*) FROM {table}
        WHERE "by" IN (FROM gone_raters) AND ({rows.get(table, "false")}) IS NOT TRUE"""
        for table in _CAUSED
    }
    return _counted(cursor, owned, tables) + _counted(cursor, caused, tables)


def is_marked(cursor: Cursor) -> bool:
    """Whether anything of the marked people is here, if only their label."""
    tables = _tables(cursor)
    label = {"people": f"SELECT count(*) FROM people WHERE {_ROWS['people']}"}
    return bool(_counted(cursor, label, tables) or count(cursor))


def holds(cursor: Cursor, people: Collection[Person], contents: Collection[str] = ()) -> bool:
    """Whether a database has anything of these people, or an imported row with one of these hashes."""
    mark(cursor, people, contents)
    return is_marked(cursor)


def mark_texts(cursor: Cursor, mended: Callable[[str], str] = str) -> int:
    """Say in ``gone_texts`` what stands in the place of names and texts of events that stay; how many change.

    These are the name and the reason of an event that a marked person caused, and whatever ``mended`` changes in a
    reason, an evaluation or the path of an import.
    """
    tables = _tables(cursor)
    changes: list[dict[str, object]] = []
    for table in sorted(_MENDED.keys() & tables.keys()):
        is_theirs = '"by" IN (FROM gone_raters)' if table in _CAUSED else "false"
        for column in _MENDED[table]:
            texts = _found(cursor, f'SELECT event, CAST("{column}" AS VARCHAR), {is_theirs} FROM {table}')
            for event, text, theirs in texts:
                after = _text_after(column, text, mended, is_theirs=theirs)
                if after != text:
                    changes.append({"place": f"{table}.{column}", "event": event, "text": after})
    places = pa.schema([("place", pa.string()), ("event", pa.int64()), ("text", pa.string())])
    _replace_temporary(cursor, "gone_texts", pa.Table.from_pylist(changes, schema=places))
    return len(changes)


def _text_after(column: str, text: str | None, mended: Callable[[str], str], *, is_theirs: bool) -> str | None:
    if column == "by" or (column == "reason" and is_theirs):
        return ERASED if is_theirs else text
    return None if text is None else mended(text)


def without(
    cursor: Cursor, people: Collection[Person], contents: Collection[str], mended: Callable[[str], str] = str
) -> dict[str, str]:
    """How to read, with this cursor, every table that is not to be copied as it is: what stays, names taken out."""
    mark(cursor, people, contents)
    mark_texts(cursor, mended)
    queries = {}
    tables = _tables(cursor)
    rows = _rows(tables)
    for table in {*rows, *_MENDED} & tables.keys():
        texts = ", ".join(
            f"""coalesce((SELECT text FROM gone_texts WHERE place = '{table}.{column}' AND event = {table}.event),
            CAST("{column}" AS VARCHAR)) AS "{column}\""""
            for column in _MENDED.get(table, ())
        )
        queries[table] = f"SELECT *{f' REPLACE ({texts})' if texts else ''} FROM {table}"
        if table in rows:
            queries[table] += f" WHERE ({rows[table]}) IS NOT TRUE"
    return queries


def _rows(tables: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Which rows of each table go. Before judgements had ids of their own, an imported row's was of its contents."""
    contents = {
        table: "content" if "content" in tables.get(table, ()) else key
        for table, key in (("preferences", "preference_id"), ("unpaired_preferences", "unpaired_id"))
    }
    return {table: which.format(**contents) for table, which in _ROWS.items()}


def _counted(cursor: Cursor, statements: Mapping[str, str], tables: Collection[str]) -> Counter[str]:
    return +Counter(
        {table: cursor.execute(sql).fetchall()[0][0] for table, sql in statements.items() if table in tables}
    )


def _fill(cursor: Cursor, name: str, values: Collection[str]) -> None:
    _replace_temporary(cursor, f"gone_{name}", pa.table({"value": pa.array(list(values), pa.string())}))


def _replace_temporary(cursor: Cursor, name: str, rows: pa.Table) -> None:
    cursor.register("arriving", rows)
    try:
        cursor.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS FROM arriving")
    finally:
        cursor.unregister("arriving")


def _found(cursor: Cursor, sql: str) -> Iterator[Any]:
    found = cursor.execute(sql)
    while fetched := found.fetchmany(_BATCH_ROWS):
        yield from fetched


def _tables(cursor: Cursor) -> dict[str, set[str]]:
    """The tables of a database with their columns."""
    found: dict[str, set[str]] = {}
    for table, column in cursor.execute(
        "SELECT table_name, column_name FROM duckdb_columns() WHERE database_name = current_database()"
    ).fetchall():
        found.setdefault(table, set()).add(column)
    return found


# Tombstones


def load_tombstones(cursor: Cursor) -> Tombstones:
    """The tombstones of a database; none in one from before there were any."""
    if "erasures" not in _tables(cursor):
        return Tombstones()
    salts = cursor.execute("SELECT value FROM store_facts WHERE name LIKE 'salt%' ORDER BY name").fetchall()
    raters = cursor.execute("SELECT rater_hash, created_at, CAST(counts AS VARCHAR) FROM erasures").fetchall()
    contents = cursor.execute("SELECT content_hash FROM erased_contents").fetchall()
    return Tombstones(
        salts=tuple(salt for (salt,) in salts),
        raters={(one, moment): counts for one, moment, counts in raters},
        contents=frozenset(content for (content,) in contents),
    )


def add_tombstones(cursor: Cursor, tombstones: Tombstones) -> None:
    """Keep what is not there yet. A database from before there were tombstones keeps none."""
    if "erasures" not in _tables(cursor):
        return
    own = load_tombstones(cursor)
    for salt in tombstones.salts:
        if salt not in own.salts:
            name = f"salt {hashlib.sha256(salt.encode()).hexdigest()[:16]}"
            cursor.execute("INSERT INTO store_facts VALUES (?, ?)", [name, salt])
    for (one, moment), counts in tombstones.raters.items():
        if (one, moment) not in own.raters:
            cursor.execute(
                "INSERT INTO erasures (rater_hash, counts, created_at) VALUES (?, ?, ?)", [one, counts, moment]
            )
    cursor.register("arriving", pa.table({"content_hash": pa.array(sorted(tombstones.contents), pa.string())}))
    try:
        cursor.execute("INSERT INTO erased_contents FROM arriving ON CONFLICT DO NOTHING")
    finally:
        cursor.unregister("arriving")


def still_there(cursor: Cursor, tombstones: Tombstones) -> tuple[set[Person], frozenset[str]]:
    """The people in a restored store who were erased since it was made, and the hashes of rows that went with them.

    The tombstones it has itself are done: a person who came back after an erasure stays, with what they said since.
    """
    own = load_tombstones(cursor)
    hashes = {one for one, moment in tombstones.raters if (one, moment) not in own.raters}
    labels = load_labels(cursor)
    people = {Person(one, labels.get(one, one)) for one in {*_raters(cursor), *labels}}
    erased = {
        person
        for person in people
        if any(rater_hash(salt, name) in hashes for salt in tombstones.salts for name in names_in_tombstones(person))
    }
    return erased, tombstones.contents - own.contents


def _raters(cursor: Cursor) -> set[str]:
    named = [f"SELECT rater FROM {table}" for table in _OWNED] + [f'SELECT "by" FROM {table}' for table in _CAUSED]
    named.append("SELECT subject FROM learning_choices WHERE scope = 'rater'")
    return {one for (one,) in cursor.execute(" UNION ".join(named)).fetchall() if one is not None}
