"""Everything that can go wrong in the feedback store, as one tree.

    StoreError
    ├── StoreBusy              another process has the database file open
    ├── StoreDamaged           the file cannot be opened, read or written
    ├── StoreTooNew            the file was written by a newer Zephyr Loop
    ├── InvalidRecord          a value a record cannot hold (also a ValueError)
    ├── NotFound               no record with this id (also a LookupError)
    ├── Conflict               the same id or idempotency key with other contents
    ├── BadImport              a preference source that cannot be read; nothing was imported
    ├── BadGoldPairs           the file of gold pairs holds a line that is none
    ├── NotEnoughPreferences   nothing to freeze into a snapshot
    ├── LeakedPrompt           a held-out prompt in the train part
    ├── SnapshotDamaged        a snapshot whose files do not match its manifest
    ├── PushRefused            an export that was not sent to a hub
    └── QueryRefused           a question in SQL that is not one SELECT, fails or takes too long

A message says what, the value, the limit and what to do next. Callers catch at the edges only.
"""

from __future__ import annotations

_SHOWN_CHARACTERS = 120


def shown(value: object) -> str:
    """A value as it stands in a message: its repr, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


class StoreError(Exception):
    """Base of all errors of ``feedback_store``."""


class StoreBusy(StoreError):
    """Another process holds the database; ``owner_pid`` is its process id where the system told it."""

    def __init__(self, path: object, owner_pid: int | None) -> None:
        owner = "another process" if owner_pid is None else f"process {owner_pid}"
        super().__init__(
            f"The database {path} is in use by {owner}. Only one process can open it. "
            f"Let the running server do the work (commands talk to it on their own), or stop {owner} and try again."
        )
        self.owner_pid = owner_pid


class StoreDamaged(StoreError):
    """The database file cannot be opened, read or written; the message says which and what to do."""


class StoreTooNew(StoreError):
    """The file has a schema version this program does not know."""

    def __init__(self, path: object, found: int, known: int) -> None:
        super().__init__(
            f"The database {path} has schema version {found}; this Zephyr Loop knows versions up to {known}. "
            "Update Zephyr Loop, or point ZLOOP_DATA_DIR at another data directory."
        )
        self.found = found
        self.known = known


class InvalidRecord(StoreError, ValueError):
    """A record was given a value it cannot hold."""

    def __init__(self, record: str, field: str, value: object, expected: str) -> None:
        super().__init__(f"{record}.{field} is {shown(value)}; it must be {expected}.")
        self.record = record
        self.field = field


class NotFound(StoreError, LookupError):
    """There is no record of this kind with this id."""

    def __init__(self, kind: str, record_id: str) -> None:
        super().__init__(f"There is no {kind} {shown(record_id)}. Check the id; it may be of another data directory.")
        self.kind = kind
        self.record_id = record_id


class Conflict(StoreError):
    """A record exists already, with other contents."""


class BadImport(StoreError):
    """A preference source cannot be read. Nothing was imported."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"Nothing was imported from {source}: {reason}")
        self.source = source
        self.reason = reason


class BadGoldPairs(StoreError):
    """The file of gold pairs cannot be read, or a line of it is no gold pair."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"The gold pairs in {path} cannot be used: {reason}")


class NotEnoughPreferences(StoreError):
    """There are no preferences to train on."""


class LeakedPrompt(StoreError):
    """A held-out prompt would be in the train part, or the other way round."""


class SnapshotDamaged(StoreError):
    """A snapshot is incomplete, or its files do not match its manifest."""


class PushRefused(StoreError):
    """An export was not sent to a hub, or the hub did not take it."""

    def __init__(self, repo_id: str, reason: str) -> None:
        super().__init__(f"The export was not pushed to {shown(repo_id)}: {reason}")
        self.repo_id = repo_id
        self.reason = reason


class QueryRefused(StoreError):
    """A question in SQL was not answered; the message says why. Nothing was changed."""
