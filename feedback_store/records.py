"""The dictionary of the product as frozen records: what a conversation, a pair, a pick and a preference are.

Every other module speaks in these words. A record checks itself when it is made and raises
``errors.InvalidRecord`` with the bad value. Not here: how records are stored (``store.py``) and how picks
become preferences (``preferences.py``).
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypedDict

from feedback_store.errors import InvalidRecord

ROLES = ("system", "user", "assistant")
FINISH_REASONS = ("stop", "length", "cancelled", "error")
RATINGS = ("up", "down")
PROMOTION_KINDS = ("promote", "rollback", "auto-rollback", "auto")
FORWARD = ("promote", "auto")  # the others go back
PROPOSAL_OUTCOMES = ("proposed", "promoted", "left")
PROPOSAL_STATES = ("open", "dismissed", "promoted", "overtaken", "left")
TRIAL_ENDS = ("better", "worse", "futile", "max_votes", "stopped", "promoted", "overtaken", "failed")
IMPORT_SOURCES = (
    "ultrafeedback_raw", "ultrafeedback_binarized", "argilla", "argilla_records", "trl", "hh_rlhf", "kto",
    "open_webui", "librechat", "h2ogpt",
)  # fmt: skip
OWN_SOURCES = ("pick", "edit", "retry", "rating")
SOURCES = ("pick", "edit", "retry", *IMPORT_SOURCES, "practice")
UNPAIRED_SOURCES = ("rating", "pick", *IMPORT_SOURCES)
LEARNING_SCOPES = ("conversation", "rater")
BASE_VERSION = "v0"
GOLD = "gold"  # the version, and the asker, of a gold pair: its answers never teach


class Message(TypedDict):
    """One message of a prompt or an answer; ``role`` is system, user or assistant."""

    role: str
    content: str


class PickChoice(StrEnum):
    """A person's word on a pair, in shown order."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    BOTH_BAD = "both_bad"
    SKIP = "skip"


def new_id(prefix: str) -> str:
    """A fresh id such as ``pair_3f2a…``: the prefix and 32 hexadecimal characters."""
    return f"{prefix}_{uuid.uuid4().hex}"


def now() -> datetime:
    """The present moment in UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One generated answer. ``finish_reason`` is stop, length, cancelled or error; only stop ever teaches."""

    candidate_id: str
    version: str
    text: str
    finish_reason: str
    sampling: Mapping[str, object]
    seed: int | None
    latency_ms: float
    created_at: datetime

    def __post_init__(self) -> None:
        _check_named(self, "candidate_id", "version")
        _check_text(self, "text")
        _check_one_of(self, "finish_reason", FINISH_REASONS)
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InvalidRecord("Candidate", "seed", self.seed, "None or a number from 0 to 2**63 - 1")
        if not self.latency_ms >= 0:
            raise InvalidRecord("Candidate", "latency_ms", self.latency_ms, "0 or more milliseconds")
        _check_time(self, "created_at")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two candidates for one prompt; ``first`` and ``second`` are in the order the person saw them."""

    pair_id: str
    prompt: tuple[Message, ...]
    first: Candidate
    second: Candidate
    turn_id: str | None
    rater: str
    created_at: datetime

    def __post_init__(self) -> None:
        _check_named(self, "pair_id", "rater")
        _check_prompt(self)
        if self.first.candidate_id == self.second.candidate_id:
            raise InvalidRecord("Pair", "second", self.second.candidate_id, "another candidate than the first")
        _check_time(self, "created_at")


@dataclass(frozen=True, slots=True)
class Pick:
    """A person's word on a pair. A later pick of the same rater on the same pair supersedes this one."""

    pick_id: str
    pair_id: str
    pick: PickChoice
    reasons: tuple[str, ...]
    comment: str | None
    rater: str
    idempotency_key: str | None
    created_at: datetime

    def __post_init__(self) -> None:
        _check_named(self, "pick_id", "pair_id", "rater")
        if not isinstance(self.pick, PickChoice):
            raise InvalidRecord("Pick", "pick", self.pick, "one of " + ", ".join(PickChoice))
        for reason in self.reasons:
            if not isinstance(reason, str) or not reason.strip():
                raise InvalidRecord("Pick", "reasons", reason, "a list of words")
        _check_optional_text(self, "comment", "idempotency_key")
        _check_time(self, "created_at")


@dataclass(frozen=True, slots=True)
class Rating:
    """Thumbs up or down on one answer."""

    rating_id: str
    candidate_id: str
    rating: str
    comment: str | None
    rater: str
    created_at: datetime

    def __post_init__(self) -> None:
        _check_named(self, "rating_id", "candidate_id", "rater")
        _check_one_of(self, "rating", RATINGS)
        _check_optional_text(self, "comment")
        _check_time(self, "created_at")


@dataclass(frozen=True, slots=True)
class Edit:
    """A person's rewrite of an answer."""

    edit_id: str
    candidate_id: str
    text: str
    rater: str
    created_at: datetime

    def __post_init__(self) -> None:
        _check_named(self, "edit_id", "candidate_id", "text", "rater")
        _check_time(self, "created_at")


@dataclass(frozen=True, slots=True)
class Turn:
    """One user message of a conversation with the answer it has now, if any; ``position`` counts from 0.

    ``left_out``: how many of the oldest messages the model did not read for that answer, for want of room.
    """

    turn_id: str
    conversation_id: str
    position: int
    text: str
    answer: Candidate | None
    created_at: datetime
    left_out: int = 0

    def __post_init__(self) -> None:
        _check_named(self, "turn_id", "conversation_id", "text")
        if self.position < 0:
            raise InvalidRecord("Turn", "position", self.position, "0 or more")
        _check_time(self, "created_at")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A thread. ``updated_at`` is its latest activity: a turn or an answer (a new title is none)."""

    conversation_id: str
    title: str
    created_at: datetime
    updated_at: datetime

    def __post_init__(self) -> None:
        _check_named(self, "conversation_id")
        _check_text(self, "title")
        _check_time(self, "created_at", "updated_at")


@dataclass(frozen=True, slots=True)
class Promotion:
    """The event that makes ``version`` the champion in place of ``previous``."""

    version: str
    previous: str
    kind: str
    reason: str
    by: str
    evaluation: Mapping[str, object] | None
    created_at: datetime

    def __post_init__(self) -> None:
        _check_named(self, "version", "previous", "by")
        _check_one_of(self, "kind", PROMOTION_KINDS)
        _check_text(self, "reason")
        _check_time(self, "created_at")


@dataclass(frozen=True, slots=True)
class Proposal:
    """What followed from a verdict or a won trial (``source_id``) that spoke for ``version`` against ``champion``.

    ``outcome``: it was proposed to people, promoted by itself, or left. ``reason`` says why it was not promoted by
    itself, where there was something to say. A proposal is open until somebody dismisses it, or until its version, or
    another one (overtaken), is promoted; where people went back from that other one to ``champion``, it is open again.
    """

    source_id: str
    source: str
    version: str
    champion: str
    outcome: str
    sentence: str
    reason: str
    created_at: datetime
    state: str = "open"
    ended_by: str | None = None
    ended_reason: str = ""
    ended_at: datetime | None = None

    def __post_init__(self) -> None:
        _check_named(self, "source_id", "version", "champion")
        _check_one_of(self, "source", ("verdict", "trial"))
        _check_one_of(self, "outcome", PROPOSAL_OUTCOMES)
        _check_one_of(self, "state", PROPOSAL_STATES)
        _check_text(self, "sentence", "reason", "ended_reason")
        _check_time(self, "created_at")

    @property
    def is_open(self) -> bool:
        return self.state == "open"


@dataclass(frozen=True, slots=True)
class Trial:
    """A live trial: ``challenger`` is shown against ``champion``, blind, in a ``share`` of the pairs.

    ``rules`` are what it is decided by, fixed at its start. ``state`` is running, else how it ended: by its votes
    (better, worse, futile, max_votes), by a person (stopped), by the challenger's own promotion (promoted), by another
    champion (overtaken), because the challenger could not be served (failed). ``evidence`` is what its votes were then.
    """

    trial_id: str
    challenger: str
    champion: str
    share: float
    rules: Mapping[str, object]
    by: str
    reason: str
    created_at: datetime
    state: str = "running"
    ended_reason: str = ""
    evidence: Mapping[str, object] | None = None
    ended_by: str | None = None
    ended_at: datetime | None = None

    def __post_init__(self) -> None:
        _check_named(self, "trial_id", "challenger", "champion", "by")
        if self.challenger == self.champion:
            raise InvalidRecord("Trial", "challenger", self.challenger, "another version than the champion")
        if not 0 < self.share <= 1:
            raise InvalidRecord("Trial", "share", self.share, "a number above 0, up to 1")
        _check_one_of(self, "state", ("running", *TRIAL_ENDS))
        _check_text(self, "reason", "ended_reason")
        _check_time(self, "created_at")

    @property
    def is_running(self) -> bool:
        return self.state == "running"


@dataclass(frozen=True, slots=True)
class TrialVote:
    """One blind word on a pair of a trial: win, tie or loss of the challenger, and whether it was shown first.

    ``is_apart``: its rater was in quarantine when they said it, so it does not count.
    """

    result: str
    challenger_first: bool
    rater: str
    is_apart: bool = False


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A rater whose words are kept and teach nothing, since when, by whom and why."""

    rater: str
    reason: str
    by: str
    since: datetime

    def __post_init__(self) -> None:
        _check_named(self, "rater", "by")
        _check_text(self, "reason")
        _check_time(self, "since")


@dataclass(frozen=True, slots=True)
class Comparisons:
    """How often people judged pairs of two versions, in shown order: ``first``, ``second``, or a tie of them."""

    first_version: str
    second_version: str
    first: int
    ties: int
    second: int


@dataclass(frozen=True, slots=True)
class Preference:
    """One training row: for this prompt, ``chosen`` is a better answer than ``rejected``.

    ``source`` says where it comes from; ``practice`` names the taste of a practice row and is None for real ones.
    ``versions`` are the versions that wrote the two answers, chosen first, where they are known.
    """

    preference_id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    weight: float
    rater: str | None
    pick_id: str | None
    versions: tuple[str, ...]
    practice: str | None
    created_at: datetime

    def __post_init__(self) -> None:
        _check_named(self, "preference_id", "chosen", "rejected")
        _check_prompt(self)
        _check_one_of(self, "source", SOURCES)
        if self.chosen == self.rejected:
            raise InvalidRecord("Preference", "rejected", self.rejected, "another answer than the chosen one")
        if not 0 < self.weight < float("inf"):
            raise InvalidRecord("Preference", "weight", self.weight, "a number above 0")
        if (self.source == "practice") != (self.practice is not None):
            raise InvalidRecord("Preference", "practice", self.practice, "a taste for practice rows, None for others")
        _check_optional_text(self, "rater", "pick_id", "practice")
        _check_time(self, "created_at")


@dataclass(frozen=True, slots=True)
class UnpairedPreference:
    """One answer with a label: ``label`` is True where it is a good answer to the prompt, False where it is a bad one.

    What KTO learns from (Ethayarajh et al., 2024, arXiv:2402.01306; TRL's "unpaired preference" layout). ``source``
    is ``rating`` for thumbs, ``pick`` for the two answers of a pair somebody called both bad, or an import's format.
    """

    unpaired_id: str
    prompt: tuple[Message, ...]
    completion: str
    label: bool
    source: str
    weight: float
    rater: str | None
    versions: tuple[str, ...]
    created_at: datetime

    def __post_init__(self) -> None:
        _check_named(self, "unpaired_id", "completion")
        _check_prompt(self)
        _check_one_of(self, "source", UNPAIRED_SOURCES)
        if not isinstance(self.label, bool):
            raise InvalidRecord("UnpairedPreference", "label", self.label, "True or False")
        if not 0 < self.weight < float("inf"):
            raise InvalidRecord("UnpairedPreference", "weight", self.weight, "a number above 0")
        _check_optional_text(self, "rater")
        _check_time(self, "created_at")


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What an import did.

    ``imported`` counts new rows, ``unpaired`` those of them that are single labelled answers. ``why`` is the sign the
    format was known by. ``skipped`` counts rows by reason (tie, empty, identical, over_long, malformed, unlabelled,
    practice, erased); ``examples`` has the numbers of the first few rows of each reason, from 1.
    """

    import_id: str
    source: str
    format: str
    imported: int
    duplicates: int
    skipped: Mapping[str, int]
    unpaired: int = 0
    why: str = ""
    examples: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counts:
    """How much the store holds.

    ``picks`` are those that stand (not superseded by a later one of the same rater on the same pair).
    ``preferences`` counts the real ones by source, ``practice`` the practice ones by taste, both with 0 for what is
    not there; ``train`` and ``held_out`` are the two parts of the real preferences.
    """

    conversations: int
    turns: int
    pairs: int
    picks: int
    preferences: Mapping[str, int]
    practice: Mapping[str, int]
    train: int
    held_out: int


def _check_text(record: object, *fields: str) -> None:
    for field in fields:
        value = getattr(record, field)
        if not isinstance(value, str):
            raise InvalidRecord(type(record).__name__, field, value, "text")
        if not _is_storable(value):
            raise InvalidRecord(type(record).__name__, field, value, "valid Unicode (it holds half a surrogate pair)")


def _check_named(record: object, *fields: str) -> None:
    _check_text(record, *fields)
    for field in fields:
        value = getattr(record, field)
        if not value or value.isspace():
            raise InvalidRecord(type(record).__name__, field, value, "text that is not empty")


def _check_optional_text(record: object, *fields: str) -> None:
    for field in fields:
        if getattr(record, field) is not None:
            _check_text(record, field)


def _check_one_of(record: object, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(record, field)
    if value not in allowed:
        raise InvalidRecord(type(record).__name__, field, value, "one of " + ", ".join(allowed))


def _check_time(record: object, *fields: str) -> None:
    for field in fields:
        value = getattr(record, field)
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise InvalidRecord(type(record).__name__, field, value, "a time with a time zone (UTC)")


def _check_prompt(record: Pair | Preference | UnpairedPreference) -> None:
    name = type(record).__name__
    for message in record.prompt:
        if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] not in ROLES:
            raise InvalidRecord(name, "prompt", message, "messages {role, content} with a role of " + ", ".join(ROLES))
        if not isinstance(message["content"], str) or not _is_storable(message["content"]):
            raise InvalidRecord(name, "prompt", message, "messages whose content is valid Unicode text")
    if not record.prompt or record.prompt[-1]["role"] != "user" or not record.prompt[-1]["content"].strip():
        raise InvalidRecord(name, "prompt", record.prompt[-1:], "messages that end with what the user asked")


def _is_storable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
