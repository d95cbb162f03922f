"""What one row of a preference file becomes: a prompt with two answers, or the reason why it is skipped.

Shared by the formats, which differ in their columns and in where their scores stand.
"""

from __future__ import annotations

from dataclasses import dataclass

from feedback_store.records import Message

MAX_PROMPT_CHARACTERS = 24_000
MAX_ANSWER_CHARACTERS = 24_000

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True, slots=True)
class ImportedPair:
    """A prompt, the better answer and the worse one."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Skip:
    """A row that is not taken; ``reason`` is tie, empty, identical, over_long or malformed."""

    reason: str


def read_pair(prompt: object, chosen: object, rejected: object, scores: tuple[object, object]) -> ImportedPair | Skip:
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
    reason = _reason_to_skip(messages, better, worse, scores)
    return ImportedPair(messages, better, worse) if reason is None else Skip(reason)


def is_dialogue(value: object) -> bool:
    """Whether a column holds a list of messages, in either spelling."""
    return read_messages(value) is not None


def read_messages(value: object) -> tuple[Message, ...] | None:
    """Messages spelled ``role``/``content`` or ``from``/``value``; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    messages = [_read_message(item) for item in value]
    known = tuple(message for message in messages if message is not None)
    return known if len(known) == len(messages) else None


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


def _reason_to_skip(
    prompt: tuple[Message, ...], chosen: str, rejected: str, scores: tuple[object, object]
) -> str | None:
    better, worse = _number(scores[0]), _number(scores[1])
    if better is not None and better == worse:
        return "tie"
    if _is_empty(chosen) or _is_empty(rejected) or not prompt[-1]["content"].strip():
        return "empty"
    if chosen.strip() == rejected.strip():
        return "identical"
    if sum(len(message["content"]) for message in prompt) > MAX_PROMPT_CHARACTERS:
        return "over_long"
    return "over_long" if max(len(chosen), len(rejected)) > MAX_ANSWER_CHARACTERS else None


def _is_empty(answer: str) -> bool:
    # UltraFeedback writes N/A where a prompt had fewer than two completions.
    return answer.strip() in ("", "N/A")


def _number(score: object) -> float | None:
    if not isinstance(score, int | float | str):
        return None
    try:
        return float(score)
    except ValueError:
        return None
