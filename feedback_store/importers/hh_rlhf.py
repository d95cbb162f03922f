"""The layout of Anthropic/hh-rlhf: two whole dialogues as text that differ in their last answer.

Columns ``chosen`` and ``rejected``: ``\\n\\nHuman: …\\n\\nAssistant: …`` again and again (repository
anthropics/hh-rlhf, README.md: "helpful" and "harmless" data). Some copies put all but the answers into ``prompt``,
still with the marks; these are read as well. The turns must alternate and all before the last answer must be equal.
Of the 2,354 pairs in ``helpful-base/test.jsonl.gz`` 15 are not so (a writer or a model typed a mark of their own);
they are skipped as malformed, for a common beginning would leave marks inside the answers. Red-team transcripts
have one side and are not read.
"""

from __future__ import annotations

from feedback_store.importers.pairs import Choices, ImportedPair, Skip, read_pair
from feedback_store.importers.sources import Row
from feedback_store.records import Message

NAME = "hh_rlhf"
WHY = "its texts chosen and rejected are dialogues with the marks Human: and Assistant:"

_ROLES = {"Human:": "user", "Assistant:": "assistant"}


def matches(row: Row) -> bool:
    """Whether both sides are dialogues with marks."""
    sides = _sides(row)
    return sides is not None and all(side.startswith("\n\nHuman:") and "\n\nAssistant:" in side for side in sides)


def read(row: Row, _choices: Choices) -> ImportedPair | Skip:
    """The pair of a row: the last turn of each side is its answer."""
    sides = _sides(row)
    if sides is None:
        return Skip("malformed")
    chosen, rejected = map(_turns, sides)
    if chosen is None or rejected is None or chosen[:-1] != rejected[:-1]:
        return Skip("malformed")
    if not all(message["content"] for message in chosen[:-1]):
        return Skip("empty")
    return read_pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _sides(row: Row) -> tuple[str, str] | None:
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str) or not isinstance(prompt, str | None):
        return None
    before = (prompt or "").lstrip(" ")
    return before + chosen, before + rejected


def _turns(text: str) -> list[Message] | None:
    """The dialogue as messages; None unless the human begins, the turns alternate and the assistant ends."""
    turns: list[Message] = []
    for part in text.split("\n\n")[1:]:
        mark = part[: part.find(":") + 1]
        if mark in _ROLES:
            turns.append(Message(role=_ROLES[mark], content=part[len(mark) :]))
        elif turns:
            turns[-1]["content"] += "\n\n" + part
    for turn in turns:
        turn["content"] = turn["content"].strip()
    expected = ["user", "assistant"] * (len(turns) // 2)
    return turns if turns and [turn["role"] for turn in turns] == expected else None
