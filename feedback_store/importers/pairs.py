"""What one row of a preference file becomes: a pair, a labelled answer, or the reason why it is skipped.

    columns of a row --read_pair--> ImportedPair or Skip        --read_label--> ImportedLabel or Skip

Shared by the formats, which differ in their columns and in where their scores stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from feedback_store.errors import InvalidRecord
from feedback_store.records import Message

MAX_PROMPT_CHARACTERS = 24_000
MAX_ANSWER_CHARACTERS = 24_000
REJECTED_CHOICES = ("random", "worst")
SCORE_CHOICES = ("ratings", "overall_score")

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True, slots=True)
class Choices:
    """What the importing person may choose; only raw UltraFeedback asks.

    ``rejected`` is a random other answer or the worst one, ``score`` the column that says which is better; ``seed``
    draws the random ones.
    """

    rejected: Literal["random", "worst"] = "random"
    score: Literal["ratings", "overall_score"] = "ratings"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rejected not in REJECTED_CHOICES:
            raise InvalidRecord("Choices", "rejected", self.rejected, " or ".join(REJECTED_CHOICES))
        if self.score not in SCORE_CHOICES:
            raise InvalidRecord("Choices", "score", self.score, " or ".join(SCORE_CHOICES))


@dataclass(frozen=True, slots=True)
class ImportedPair:
    """A prompt, the better answer and the worse one.

    ``rater`` is the person as the export names them, ``versions`` the models that wrote the answers, better one first;
    both where the layout has them. ``own_id`` is what a store of ours called the row, in our own export.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    rater: str | None = None
    versions: tuple[str, ...] = ()
    weight: float = 1.0
    own_id: str | None = None


@dataclass(frozen=True, slots=True)
class ImportedLabel:
    """A prompt and one answer that was called good (``label`` is True) or bad."""

    prompt: tuple[Message, ...]
    completion: str
    label: bool
    rater: str | None = None
    versions: tuple[str, ...] = ()
    weight: float = 1.0
    own_id: str | None = None


@dataclass(frozen=True, slots=True)
class Skip:
    """A row, or one judgement in it, that is not taken.

    ``reason`` is tie, empty, identical, over_long, malformed, unlabelled (nobody judged it), or practice (a practice
    row of our own export, which must not become a real one).
    """

    reason: str


Item = ImportedPair | ImportedLabel | Skip


def read_pair(
    prompt: object,
    chosen: object,
    rejected: object,
    scores: tuple[object, object] = (None, None),
    *,
    rater: str | None = None,
    versions: tuple[str, ...] = (),
    weight: float = 1.0,
    own_id: object = None,
) -> ImportedPair | Skip:
    """Judge the columns of one row.

    ``prompt`` is text, a list of messages, or None where the answers are whole dialogues with a common beginning.
    ``scores`` of chosen and rejected make a tie where they are equal numbers.
    """
    if chosen is None or rejected is None:
        return Skip("empty")
    good, bad = _read_side(prompt, chosen), _read_side(prompt, rejected)
    if good is None or bad is None or good[0] != bad[0]:
        return Skip("malformed")
    messages, better, worse = *good, bad[1]
    if messages[-1]["role"] != "user":
        return Skip("malformed")
    score = as_number(scores[0])
    if score is not None and score == as_number(scores[1]):
        return Skip("tie")
    reason = _reason_to_skip(messages, better, worse)
    if reason is not None:
        return Skip(reason)
    return ImportedPair(messages, better, worse, rater, versions, weight, _own_id(own_id))


def read_label(
    prompt: object,
    completion: object,
    label: bool | None,
    *,
    rater: str | None = None,
    versions: tuple[str, ...] = (),
    weight: float = 1.0,
    own_id: object = None,
) -> ImportedLabel | Skip:
    """Judge the columns of a row with one answer; ``label`` is None where nobody said whether it is good."""
    if label is None:
        return Skip("unlabelled")
    if completion is None:
        return Skip("empty")
    side = _read_side(prompt, completion)
    if side is None or side[0][-1]["role"] != "user":
        return Skip("malformed")
    messages, answer = side
    reason = _reason_to_skip(messages, answer)
    if reason is not None:
        return Skip(reason)
    return ImportedLabel(messages, answer, label, rater, versions, weight, _own_id(own_id))


def is_dialogue(value: object) -> bool:
    """Whether a column holds a list of messages, in either spelling."""
    return read_messages(value) is not None


def read_messages(value: object) -> tuple[Message, ...] | None:
    """Messages spelled ``role``/``content`` or ``from``/``value``; None for anything else."""
    if not isinstance(value, list | tuple) or not value:
        return None
    messages = [_read_message(item) for item in value]
    known = tuple(message for message in messages if message is not None)
    return known if len(known) == len(messages) else None


def read_rater(value: object) -> str | None:
    """Who judged, as the export names them; None where it names nobody."""
    text = str(value).strip() if isinstance(value, str | int) else ""
    return None if text in ("", "None") else text


def read_versions(*models: object) -> tuple[str, ...]:
    """The names of the models, or nothing where one of them has none."""
    names = tuple(model.strip() for model in models if isinstance(model, str) and model.strip())
    return names if len(names) == len(models) else ()


def read_provenance(row: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...], float]:
    """The rater, versions and weight of a row that our own export wrote (in CSV the versions are words)."""
    versions, weight = row.get("versions"), as_number(row.get("weight"))
    named = versions.split() if isinstance(versions, str) else versions if isinstance(versions, list) else ()
    return read_rater(row.get("rater")), read_versions(*named), 1.0 if weight is None else weight


def as_number(score: object) -> float | None:
    """A score that is a number, or text that is one; None for anything else."""
    if not isinstance(score, int | float | str):
        return None
    try:
        return float(score)
    except ValueError:
        return None


def _own_id(value: object) -> str | None:
    return value if isinstance(value, str) and value.isascii() else None


def _read_message(item: object) -> Message | None:
    if not isinstance(item, dict):
        return None
    role, content = (item.get("role"), item.get("content")) if "role" in item else (item.get("from"), item.get("value"))
    if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str):
        return None
    return Message(role=_ROLES[role], content=content)


def _read_side(prompt: object, side: object) -> tuple[tuple[Message, ...], str] | None:
    """The prompt messages and the answer that one side of a row gives."""
    given = (Message(role="user", content=prompt),) if isinstance(prompt, str) else read_messages(prompt)
    if prompt is not None and given is None:
        return None
    if isinstance(side, str):
        return None if given is None else (given, side)
    dialogue = read_messages(side)
    if dialogue is None or dialogue[-1]["role"] != "assistant":
        return None
    before, answer = dialogue[:-1], dialogue[-1]["content"]
    # A dialogue brings its own prompt; the prompt column then only repeats it, as text without its system message.
    if before and (given is None or isinstance(prompt, str) or before == given):
        return before, answer
    return None if before or given is None else (given, answer)


def _reason_to_skip(prompt: tuple[Message, ...], *answers: str) -> str | None:
    said = [answer.strip() for answer in answers]
    # UltraFeedback writes N/A where a prompt had fewer than two completions.
    if "" in said or "N/A" in said or not prompt[-1]["content"].strip():
        return "empty"
    if said.count(said[0]) > 1:
        return "identical"
    if max(map(len, answers)) > MAX_ANSWER_CHARACTERS:
        return "over_long"
    return "over_long" if sum(len(message["content"]) for message in prompt) > MAX_PROMPT_CHARACTERS else None
