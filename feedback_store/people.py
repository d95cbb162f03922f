"""Who is who: the one table that holds people's names. Rows and files name a person by an opaque id.

    name in an import → label_of ─┐
    name in a request ────────────┴→ person_id_of → rows, snapshots, runs          ids → load_labels → what people read

An id is a keyed hash of the label: the same person has one id in a store and its copies, and it tells nothing without
the store. Labels are unique. The program's own user is ``local``; an import that names somebody so, or as another
actor of the program, means somebody else, whose label is ``imported:local``.

An id that is in no table is shown as it is: the library may be used with names of its own. Erasing somebody removes
their label (``erased_rows.py``). Used by ``store.py``, ``imports.py`` and ``erasure.py``.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from feedback_store.database import Cursor
from feedback_store.errors import NotFound
from feedback_store.records import GOLD

OWN = "local"
IMPORTED = "imported:"
ACTORS = frozenset({OWN, GOLD, "schedule", "policy", "baking", "auto", "erased", "[erased]"})
"""What the program writes itself where a person may stand."""

_ID = re.compile("person_[0-9a-f]{32}")
_SAYING = ("picks", "ratings", "edits", "conversations", "generations", "preferences", "unpaired_preferences")
_RATERS = " UNION ".join(f"SELECT rater FROM {table}" for table in _SAYING)  # noqa: S608 - our own names


@dataclass(frozen=True, slots=True)
class Person:
    """A person's id, and the label that is shown."""

    person_id: str
    label: str

    @property
    def name(self) -> str:
        """What an import called them: the label without what sets it apart from the program's own words."""
        return self.label.removeprefix(IMPORTED)


def label_of(name: str) -> str:
    """The label of somebody an import names; no two names have the same, and none is a word of the program's own."""
    is_taken = is_actor(name) or name.startswith(IMPORTED) or is_person_id(name)
    return IMPORTED + name if is_taken else name


def is_actor(name: str) -> bool:
    """Whether a name is a word of the program's own for who did something, however it is written."""
    return unicodedata.normalize("NFKC", name).strip().casefold() in ACTORS


def person_id_of(salt: str, label: str) -> str:
    """The id of the person with this label in the store with this salt."""
    return "person_" + hashlib.sha256(f"{salt} person {label}".encode()).hexdigest()[:32]


def is_person_id(text: str) -> bool:
    """Whether a text has the form of an id."""
    return _ID.fullmatch(text) is not None


def load_salt(cursor: Cursor) -> str:
    """The secret of this store; a copy has the same."""
    ((salt,),) = cursor.execute("SELECT value FROM store_facts WHERE name = 'salt'").fetchall()
    return str(salt)


def ensure_people(cursor: Cursor, labels: Iterable[str]) -> dict[str, str]:
    """Give everybody with these labels a row where they have none; their ids by label."""
    salt = load_salt(cursor)
    ids = {label: person_id_of(salt, label) for label in labels}
    for label, person_id in sorted(ids.items()):
        cursor.execute("INSERT INTO people VALUES (?, ?) ON CONFLICT DO NOTHING", [person_id, label])
    return ids


def load_labels(cursor: Cursor) -> dict[str, str]:
    """Every label by its id."""
    return dict(cursor.execute("SELECT person_id, label FROM people").fetchall())


def load_raters(cursor: Cursor) -> set[str]:
    """The ids of everybody who said, asked or was imported with something."""
    return {rater for (rater,) in cursor.execute(_RATERS).fetchall() if rater is not None and rater != GOLD}


def find_person(cursor: Cursor, name: str) -> Person | None:
    """Whom an id or a label means. Of the program's words only ``local`` is a person; another means an imported one."""
    is_imported = is_person_id(name) or (is_actor(name) and name != OWN)
    found = cursor.execute(
        "SELECT person_id, label FROM people WHERE person_id = $1 OR label = $2 ORDER BY person_id = $1 DESC",
        [name, IMPORTED + name if is_imported else name],
    ).fetchall()
    if found:
        return Person(*found[0])
    return Person(name, name) if name in load_raters(cursor) else None


def require_person(cursor: Cursor, name: str) -> Person:
    """The same; raises ``NotFound`` for nobody."""
    person = find_person(cursor, name.strip())
    if person is None:
        raise NotFound("rater", name)
    return person


def named(value: Any, labels: Mapping[str, str]) -> Any:
    """What people read: JSON with the label in the place of every id, in sentences and keys too."""
    if isinstance(value, str):
        return _ID.sub(lambda found: labels.get(found[0], found[0]), value) if "person_" in value else value
    if isinstance(value, Mapping):
        return {named(key, labels): named(one, labels) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [named(one, labels) for one in value]
    return value
